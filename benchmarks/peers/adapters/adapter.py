"""What every adapter offers, and what several of them need."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from benchmarks.command import version_of
from benchmarks.peers.exact import DenseMatrix
from benchmarks.peers.problem import Fisher, Problem
from benchmarks.peers.verdict import BlockEstimate, NotOffered, Structure
from benchmarks.speed.cases import Estimate, Form, Workload


@dataclass(frozen=True)
class Mode:
    """One way in which a package is asked for a matrix that is known exactly."""

    label: str  # for the table
    fisher: Fisher  # which exact matrix it is compared with
    structure: Structure = Structure.EKFAC  # the form of the estimate
    fallback: bool = False  # whether only shown where the modes before are not right


class Adapter:
    """A package behind one interface."""

    package: ClassVar[str]  # name of the distribution
    module: ClassVar[str]  # name of the module to import
    title: ClassVar[str]  # name for the table
    modes: ClassVar[tuple[Mode, ...]] = ()  # how it is asked for a matrix
    raisers: ClassVar[tuple[str, ...]] = ()  # packages whose exceptions count as its own refusals
    # Whether it is given a loss object, which may have an unusable reduction.
    takes_loss: ClassVar[bool] = False

    def installed(self) -> bool:
        """Whether the package can be imported."""
        return find_spec(self.module) is not None

    def version(self) -> str | None:
        """Its version; None where it is not installed, or run from its sources."""
        return version_of(self.package)

    def estimate(self, problem: Problem, mode: Mode, model: nn.Module) -> list[BlockEstimate]:
        """Estimate a tiny problem's matrix, in the scale of :mod:`benchmarks.peers.exact`."""
        raise NotImplementedError

    def save(self, problem: Problem, folder: Path) -> list[Tensor]:
        """Estimate in the first mode, save that to a folder, and return it."""
        raise NotImplementedError

    def load(self, problem: Problem, folder: Path, model: nn.Module) -> list[Tensor]:
        """Load what :meth:`save` saved, for a model with other weights, and return it."""
        raise NotImplementedError

    def prepare(self, workload: Workload, fisher: str) -> Estimate:
        """Make a function that estimates the matrix of all parameters that are not frozen.

        The model, in evaluation mode, may be changed.
        """
        raise NotImplementedError

    def quadratic_form(self, workload: Workload) -> Form:
        """Estimate a matrix with sampled labels, and make its differentiable quadratic form.

        The model is at its anchor, and only known parameters are not frozen.
        """
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


def whole_layers(model: nn.Module) -> list[str]:
    """Names of the modules of which all parameters are estimated."""
    names = []
    for name, module in model.named_modules():
        own = [p.requires_grad for p in module.parameters(recurse=False)]
        if all(own) and own:
            names.append(name)
        elif any(own):
            raise NotOffered("whole layers only")
    return names


def has_options(loss: nn.Module) -> bool:
    """Whether a loss weights, smooths or ignores."""
    options = [getattr(loss, name, None) for name in ("weight", "pos_weight")]
    smoothing = getattr(loss, "label_smoothing", 0.0)
    return any(option is not None for option in options) or smoothing != 0.0


class OneRowPerToken(nn.Module):
    """A model of tokens with the outputs that some packages want: a matrix."""

    def __init__(self, model: nn.Module) -> None:
        """Keep a model whose outputs are ``[N, C, T]``."""
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores ``[N · T, C]``."""
        scores: Tensor = self.model(inputs)
        return scores.transpose(1, 2).flatten(0, 1)
