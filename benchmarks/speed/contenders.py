"""Who is measured, and what can be said of each."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from benchmarks.speed import names

if TYPE_CHECKING:
    from benchmarks.speed.cases import Problem

# Does the work once with a seed for sampled labels, and returns the trace of the Fisher matrix of
# the mean loss, or None where there is no such thing.
Estimation = Callable[[int], float | None]

ADAPTERS = "benchmarks.speed.adapters"


class Kind(str, Enum):
    """What a contender's time can be compared with.

    Members:
        SAME: It computes what this package computes, and is compared with it.
        MORE: The same, for more parameters.
        OTHER: It computes another quantity; its time is shown for reference.
        SCALE: It computes no Fisher matrix at all.
    """

    SAME = "the same quantity"
    MORE = "more parameters"
    OTHER = "another quantity"
    SCALE = "for scale"


@dataclass(frozen=True)
class Contender:
    """One that is measured.

    Attributes:
        name: One of the names in :mod:`benchmarks.speed.names`.
        kind: What it is compared with.
        adapter: Module in :data:`ADAPTERS` with a function to prepare it.
        function: Name of that function.
        module: Module that must be there.
        distribution: Package that the module comes with.
        remark: What it computes, for the table; empty for the same quantity.
    """

    name: str
    kind: Kind
    adapter: str
    function: str = "prepare"
    module: str = "torch"
    distribution: str = "torch"
    remark: str = ""

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return find_spec(self.module) is not None

    @property
    def version(self) -> str:
        """Version of its package; one that is run from its sources has none."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return "unknown"

    def prepare(self, problem: "Problem", fisher: str) -> Estimation:
        """Make what is timed.

        Args:
            problem: The problem, whose model it may change.
            fisher: The Fisher type.

        Returns:
            A function that does the work once.
        """
        make: Any = getattr(import_module(f"{ADAPTERS}.{self.adapter}"), self.function)
        prepared: Estimation = make(problem, fisher)
        return prepared


ALL = (
    Contender(names.OURS, Kind.SAME, "ours", "prepare_known", "rotate_ewc", "rotate-ewc"),
    Contender(
        names.LEAN,
        Kind.SAME,
        "ours",
        "prepare_lean",
        "rotate_ewc",
        "rotate-ewc",
        "keeps no more than 32 MiB between its passes",
    ),
    Contender(
        names.EVERYTHING,
        Kind.MORE,
        "ours",
        "prepare_everything",
        "rotate_ewc",
        "rotate-ewc",
        "norms and embeddings as well",
    ),
    Contender(
        names.CURVLINOPS,
        Kind.SAME,
        "curvlinops",
        module="curvlinops",
        distribution="curvlinops-for-pytorch",
    ),
    Contender(
        names.NNGEOMETRY,
        Kind.SAME,
        "nngeometry",
        module="nngeometry",
        distribution="nngeometry",
    ),
    Contender(
        names.KRONFLUENCE,
        Kind.SAME,
        "kronfluence",
        module="kronfluence",
        distribution="kronfluence",
    ),
    Contender(
        names.LAPLACE,
        Kind.OTHER,
        "laplace",
        module="laplace",
        distribution="laplace-torch",
        remark="another quantity: Kronecker factors alone",
    ),
    Contender(
        names.AVALANCHE,
        Kind.OTHER,
        "avalanche",
        module="avalanche",
        distribution="avalanche-lib",
        remark="another quantity: squares of batch-mean gradients",
    ),
    Contender(names.PLAIN, Kind.SCALE, "plain", remark="forward and backward of the loss"),
)
BY_NAME = {contender.name: contender for contender in ALL}
