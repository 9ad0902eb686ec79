"""Snapshots with known contents, of which `tests/io/data` has files in every format.

`python -m tests.helpers.golden` writes those of the present format. Run it once when the format
changes, and never again: the files of released formats are what released versions wrote.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rotate_ewc import EKFACLinearOperator, EKFACPenalty
from rotate_ewc.io.layout import OPERATOR
from rotate_ewc.linalg.block import Block
from rotate_ewc.penalty.terms import Term
from rotate_ewc.provenance import Provenance
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import dense_operator

DATA = Path(__file__).parents[1] / "io" / "data"
VERSION = int(OPERATOR.split("/")[1])
SHAPES = {
    "layer.weight": (4, 3),
    "layer.bias": (4,),
    "conv.weight": (4, 2, 3),
    "embedding.weight": (5, 2),
    "head.weight": (2, 4),
    "head.bias": (2,),
    "wide.weight": (3, 6),
}
WEIGHTS = (1.0, 0.5)
STRENGTH = 3.0


def reflection(groups: int, size: int) -> Tensor:
    """Householder matrices, one for each group: orthogonal, and the same on every machine."""
    vectors = torch.arange(1, groups * size + 1, dtype=torch.float64).view(groups, size, 1)
    return torch.eye(size).double() - 2 * vectors @ vectors.mT / vectors.square().sum(1, True)


def eigenvalues(*shape: int) -> Tensor:
    """0, 1/8, 2/8, …: exact in every dtype."""
    size = torch.Size(shape).numel()
    return torch.arange(size, dtype=torch.float64).view(shape) / 8


def blocks() -> list[Block]:
    """One block of every kind: plain, with one basis, in groups, transposed, joint, thin."""
    return [
        Block(("layer.weight",), reflection(1, 4), reflection(1, 3), eigenvalues(1, 4, 3)),
        Block(("layer.bias",), reflection(1, 4), None, eigenvalues(1, 4, 1)),
        Block(("conv.weight",), reflection(2, 2), reflection(2, 6), eigenvalues(2, 2, 6)),
        Block(("embedding.weight",), reflection(1, 2), None, eigenvalues(1, 2, 5), transposed=True),
        Block(("head.weight", "head.bias"), None, reflection(1, 5), eigenvalues(1, 2, 5)),
        Block(
            ("wide.weight",),
            reflection(1, 3)[:, :, :1],
            reflection(1, 6)[:, :, 2:4],
            eigenvalues(1, 2, 3),
        ),
    ]


def operator() -> EKFACLinearOperator:
    """The operator in the files."""
    settings = {"mc_samples": 1, "seed": 7}
    provenance = Provenance("CrossEntropyLoss", "mean", "mc", 1000, 2500.5, settings)
    return EKFACLinearOperator.from_blocks(blocks(), SHAPES, provenance)


def dense() -> Tensor:
    """The operator's matrix."""
    return dense_operator(blocks(), {n: torch.Size(s) for n, s in SHAPES.items()})


def anchor(task: int) -> dict[str, Tensor]:
    """The parameters at the end of a task."""
    return {
        name: torch.full(shape, task + index / 4, dtype=torch.float64)
        for index, (name, shape) in enumerate(SHAPES.items())
    }


def penalty() -> EKFACPenalty:
    """The penalty in the files: the operator twice, at different anchors."""
    made = exact_penalty(STRENGTH, "separate", weighting="uniform", decay=0.5)
    terms = [Term(operator(), anchor(task), weight) for task, weight in enumerate(WEIGHTS)]
    made._replace_terms(terms, 2, 1000, 2500.5)
    return made


def penalty_value() -> float:
    """The penalty at the parameters of `anchor(2)`, by dense matrices."""
    total = 0.0
    for task, weight in enumerate(WEIGHTS):
        delta = torch.cat([(anchor(2)[n] - anchor(task)[n]).flatten() for n in SHAPES])
        total += 0.5 * STRENGTH * weight * (delta @ dense() @ delta).item()
    return total


def main() -> None:
    """Write the files of the present format."""
    DATA.mkdir(exist_ok=True)
    operator().save(DATA / f"operator-{VERSION}.safetensors")
    operator().save(DATA / f"operator-{VERSION}-bfloat16.safetensors", storage_dtype=torch.bfloat16)
    penalty().save(DATA / f"penalty-{VERSION}.safetensors")
    torch.save(operator().state_dict(), DATA / f"operator-{VERSION}.pt")
    torch.save(penalty().state_dict(), DATA / f"penalty-{VERSION}.pt")


if __name__ == "__main__":
    main()
