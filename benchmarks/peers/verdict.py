"""Comparing a package's estimate with the exact matrix, and naming the result."""

import linecache
import math
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers.exact import DenseMatrix

TOLERANCE = 1e-6
# Values below this share of the largest of all are zeros but for rounding.
ZERO = 1e-10
# Eigenvalues this close, relative to the largest, share an eigenspace whose basis is arbitrary.
SAME_EIGENVALUE = 1e-8


class Status:
    """What came out of one measurement."""

    RIGHT = "right"
    WRONG = "wrong"
    LEFT_OUT = "left out"
    APPROXIMATE = "approximate"
    REFUSED = "refused"
    FAILS = "fails"
    NOT_OFFERED = "not offered"
    NOT_INSTALLED = "not installed"


class Structure(str, Enum):
    """The form of an estimate, which decides what of it must be exact."""

    EKFAC = "ekfac"
    DIAGONAL = "diagonal"
    KRON = "kron"


class NotOffered(Exception):  # noqa: N818 - not an error: the package has no such feature
    """Raised by an adapter where a package has no way to ask for something."""


@dataclass(frozen=True)
class BlockEstimate:
    """A package's matrix over one or more parameters."""

    parameters: tuple[str, ...]  # names, in the order of the matrix
    matrix: Tensor  # ``[d, d]``


@dataclass(frozen=True)
class Outcome:
    """The result of one measurement."""

    status: str  # one of the words of :class:`Status`
    # Estimated over exact trace, of the parameters that the estimate covers.
    trace_ratio: float | None = None
    # Largest deviation of an eigenvalue or diagonal entry, over the block's largest.
    error: float | None = None
    message: str = ""  # what the package said when it refused or failed; else what is worth adding


def judge(exact: DenseMatrix, structure: Structure, blocks: Sequence[BlockEstimate]) -> Outcome:
    """Compare an estimate with the exact matrix.

    An EKFAC's eigenvalues must be the diagonal of the exact block in the estimate's own eigenbasis;
    of the two other forms the diagonal itself is compared. Either way the traces must agree.
    """
    joined = add_blocks(blocks)
    covered = {name for block in joined for name in block.parameters}
    missing = [name for name in exact.shapes if name not in covered]
    found = sum(float(block.matrix.trace()) for block in joined)
    expected = sum(float(exact.block(block.parameters).trace()) for block in joined)
    ratio = found / expected if expected else math.nan
    error = max((block_error(exact, structure, block) for block in joined), default=math.nan)
    if not abs(ratio - 1) <= TOLERANCE or not error <= TOLERANCE:
        return Outcome(Status.WRONG, ratio, error)
    if missing:
        return Outcome(Status.LEFT_OUT, ratio, error, ", ".join(missing))
    return Outcome(Status.RIGHT, ratio, error)


def add_blocks(blocks: Sequence[BlockEstimate]) -> list[BlockEstimate]:
    """Add matrices of the same parameters, as a sum over the uses of a shared parameter does."""
    sums: dict[tuple[str, ...], Tensor] = {}
    for block in blocks:
        sums[block.parameters] = block.matrix + sums.get(block.parameters, 0)
    return [BlockEstimate(names, matrix.detach().double()) for names, matrix in sums.items()]


def block_error(exact: DenseMatrix, structure: Structure, block: BlockEstimate) -> float:
    """Largest deviation in one block, relative to the largest value that is expected."""
    reference = exact.block(block.parameters)
    floor = ZERO * float(exact.matrix.diagonal().max())
    if block.matrix.shape != reference.shape or not bool(block.matrix.isfinite().all()):
        return math.inf
    if structure is Structure.EKFAC:
        return eigenvalue_deviation(block.matrix, reference, floor)
    deviation = (block.matrix - reference).diagonal().abs().max()
    return float(deviation / reference.diagonal().max().clamp(min=floor))


def eigenvalue_deviation(estimate: Tensor, reference: Tensor, floor: float) -> float:
    """How far an estimate's eigenvalues are from the reference's diagonal in its eigenbasis.

    Where several eigenvalues coincide, the basis of their eigenspace is arbitrary; then the mean
    over the eigenspace is compared, which is not.
    """
    values, vectors = torch.linalg.eigh((estimate + estimate.T) / 2)
    diagonal = torch.einsum("ik,ij,jk->k", vectors, reference, vectors)
    apart = values.diff() > SAME_EIGENVALUE * values.abs().max()
    space = torch.cat([torch.zeros(1, dtype=torch.long), apart.long().cumsum(0)])
    sums = torch.zeros(int(space[-1]) + 1, dtype=values.dtype)
    differences = sums.index_add(0, space, values - diagonal)
    largest = (differences / torch.bincount(space)).abs().max()
    return float(largest / diagonal.max().clamp(min=floor))


def name_exception(error: Exception, packages: Sequence[str]) -> Outcome:
    """Name what an exception means.

    An exception that a package raises by a statement of its own is a refusal, and one that comes
    from anywhere else, such as a shape that does not fit, a failure.
    """
    if isinstance(error, NotOffered):
        return Outcome(Status.NOT_OFFERED, message=str(error))
    status = Status.REFUSED if _raised_by(error, packages) else Status.FAILS
    return Outcome(status, message=in_one_line(error))


def in_one_line(error: BaseException) -> str:
    """The name of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _raised_by(error: Exception, packages: Sequence[str]) -> bool:
    """Whether the innermost frame is a ``raise`` or ``assert`` of one of the packages."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    last = frames[-1]
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    specs = [find_spec(name) for name in packages]
    homes = [home for spec in specs if spec for home in spec.submodule_search_locations or ()]
    inside = any(Path(last.filename).is_relative_to(home) for home in homes)
    return inside and line.startswith(("raise", "assert"))
