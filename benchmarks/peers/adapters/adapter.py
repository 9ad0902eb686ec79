"""What every adapter offers, and what several of them need."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.peers.exact import DenseMatrix
from benchmarks.peers.problem import Fisher, Problem
from benchmarks.peers.verdict import BlockEstimate, Outcome, Status, Structure


@dataclass(frozen=True)
class Mode:
    """One way in which a package is asked.

    Attributes:
        label: For the table.
        fisher: Which exact matrix it is compared with.
        structure: The form of the estimate.
        fallback: Whether only shown where the modes before are not right.
    """

    label: str
    fisher: Fisher
    structure: Structure = Structure.EKFAC
    fallback: bool = False


EXACT_EKFAC = (Mode("type2", "type2"), Mode("empirical", "empirical"))


@dataclass(frozen=True)
class RoundTrip:
    """What happens when a state is saved and loaded into a program whose model has moved on.

    Attributes:
        without_pickle: Whether the state could be read without running pickled code.
        same: Whether the loaded estimate is the saved one.
        weights_kept: Whether the model's weights are as they were before loading.
    """

    without_pickle: bool
    same: bool
    weights_kept: bool

    def outcome(self, about_weights: bool) -> Outcome:
        """The result for one of the two questions."""
        if about_weights:
            good, message = self.weights_kept, "overwrites the weights"
        else:
            good, message = self.without_pickle and self.same, "needs pickle"
            if not self.same:
                message = "does not come back the same"
        return Outcome(Status.RIGHT) if good else Outcome(Status.WRONG, message=message)


class Adapter:
    """A package behind one interface.

    Attributes:
        package: Name of the distribution.
        title: Name for the table.
        module: Name of the module to import.
        modes: How it is asked.
        raisers: Packages whose exceptions count as its own refusals.
        takes_loss: Whether it is given a loss object, which may have an unusable reduction.
    """

    package: ClassVar[str]
    title: ClassVar[str]
    module: ClassVar[str]
    modes: ClassVar[tuple[Mode, ...]]
    raisers: ClassVar[tuple[str, ...]]
    takes_loss: ClassVar[bool] = False

    @classmethod
    def installed(cls) -> bool:
        """Whether the package can be imported."""
        return find_spec(cls.module) is not None

    def estimate(self, problem: Problem, mode: Mode, model: nn.Module) -> list[BlockEstimate]:
        """Estimate a problem's matrix, in the scale of :mod:`benchmarks.peers.exact`.

        Args:
            problem: The problem.
            mode: How to ask.
            model: The problem's model.

        Raises:
            NotOffered: If the package has no such feature.
        """
        raise NotImplementedError

    def round_trip(self, problem: Problem, folder: Path) -> RoundTrip:
        """Save the state of an estimate and load it beside a model with other weights."""
        raise NotImplementedError


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Map every name of a parameter to the first name of the same parameter."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        first.setdefault(id(parameter), name)
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every}


def single_blocks(matrix: Tensor, problem: Problem, model: nn.Module) -> list[BlockEstimate]:
    """Cut the blocks of single parameters out of a matrix over all that are estimated."""
    shapes = {name: model.get_parameter(name).shape for name in problem.names(model)}
    dense = DenseMatrix(matrix, shapes)
    return [BlockEstimate((name,), dense.block([name])) for name in shapes]


def moved_model(problem: Problem) -> nn.Module:
    """The problem's model with other weights, as after further training."""
    model = problem.model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def all_equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are the same, entry by entry."""
    return len(left) == len(right) and all(
        torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )


def nearly_equal(left: Tensor, right: Tensor) -> bool:
    """Whether two matrices are the same up to rounding, which depends on how they are stored."""
    return torch.allclose(left, right, rtol=1e-12, atol=1e-12 * float(left.abs().max()))


def readable_without_pickle(path: Path) -> bool:
    """Whether ``torch.load`` reads a file although it may not run code in it."""
    try:
        torch.load(path, weights_only=True)
    # Whatever is raised, the file could not be read.
    except Exception:
        return False
    return True
