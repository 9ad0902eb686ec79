"""Small honest snapshots, what is in them, and whether a loaded one can be relied upon."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator, EKFACPenalty
from rotate_ewc.linalg.block import Block
from rotate_ewc.provenance import Provenance
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import dense_operator

Loaded = EKFACLinearOperator | EKFACPenalty

LARGEST_DENSE = 400


@dataclass(frozen=True)
class Honest:
    """A snapshot as it should be.

    Attributes:
        kind: The class that it is of.
        content: The file.
        state: The dictionary that the file holds: tensors, and the header.
        digest: Of everything that can be seen of what it loads to.
    """

    kind: type[Loaded]
    content: bytes
    state: dict[str, Any]
    digest: str


def random_block(
    names: tuple[str, ...],
    shape: tuple[int, int, int],
    *,
    seed: int,
    bases: str = "ga",
    ranks: tuple[int, int] | None = None,
    transposed: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Block:
    """Draw a block, thin where a rank is less than its side; one in three eigenvalues is zero."""
    generator = torch.Generator().manual_seed(seed)
    groups, d_out, d_in = shape
    k_out, k_in = ranks or (d_out, d_in)

    def basis(side: str, size: int, rank: int) -> Tensor | None:
        normal = torch.randn(groups, size, size, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(normal)[0][..., :rank].to(dtype) if side in bases else None

    rows, columns = k_out + (k_out < d_out), k_in + (k_in < d_in)
    values = torch.rand(groups, rows, columns, generator=generator, dtype=torch.float64)
    eigenvalues = ((values - 1 / 3).clamp(min=0) * 2).to(dtype)
    left, right = basis("g", d_out, k_out), basis("a", d_in, k_in)
    return Block(names, left, right, eigenvalues, transposed)


def operator(seed: int = 0, dtype: torch.dtype = torch.float32) -> EKFACLinearOperator:
    """Make an operator with a block of every kind."""
    shapes = {
        "0.weight": (6, 4),
        "1.weight": (5, 4),
        "1.bias": (5,),
        "conv.weight": (4, 3, 2),
        "embedding": (7, 3),
        "scale": (),
        "wide.weight": (4, 8),
    }
    blocks = [
        random_block(("0.weight",), (1, 6, 4), seed=seed, dtype=dtype),
        random_block(("1.weight", "1.bias"), (1, 5, 5), seed=seed + 1, dtype=dtype),
        random_block(("conv.weight",), (2, 2, 6), seed=seed + 2, dtype=dtype),
        random_block(
            ("embedding",), (1, 3, 7), seed=seed + 3, bases="g", transposed=True, dtype=dtype
        ),
        random_block(("scale",), (1, 1, 1), seed=seed + 4, bases="", dtype=dtype),
        random_block(("wide.weight",), (1, 4, 8), seed=seed + 5, ranks=(3, 2), dtype=dtype),
    ]
    settings = {"mc_samples": 1, "seed": 3}
    provenance = Provenance("CrossEntropyLoss", "mean", "mc", 50, 75.0, settings)
    return EKFACLinearOperator.from_blocks(blocks, shapes, provenance)


def penalty(mode: str, tasks: int = 2) -> EKFACPenalty:
    """Make a penalty that has learned some tasks."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    learned = exact_penalty(2.5, mode, exclude=["2.bias"], seed=7)
    for _ in range(tasks):
        inputs = torch.randn(6, 3, generator=generator)
        targets = torch.randint(2, (6,), generator=generator)
        learned.consolidate(model, nn.CrossEntropyLoss(), [(inputs, targets)])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
    return learned


def contents_of(made: Loaded) -> dict[str, Any]:
    """What a snapshot file of an operator or a penalty holds, by its keys there."""
    return made._state.to_dict() if isinstance(made, EKFACPenalty) else made.state_dict()


@lru_cache(maxsize=1)
def honest_snapshots(folder: str) -> dict[str, Honest]:
    """Write the honest snapshots to files and read these; by name."""
    path = Path(folder) / "honest"
    found: dict[str, Honest] = {}

    def add(name: str, made: Loaded, dtype: torch.dtype | None = None) -> None:
        made.save(path, storage_dtype=dtype)
        found[name] = Honest(
            type(made),
            path.read_bytes(),
            contents_of(made),
            digest_of(read(type(made), path)),
        )

    add("operator", operator())
    add("operator bfloat16", operator(10), torch.bfloat16)
    add("operator float64", operator(20, torch.float64))
    add("merged penalty", penalty("merged"))
    add("separate penalty", penalty("separate"))
    add("separate penalty bfloat16", penalty("separate", 3), torch.bfloat16)
    add("empty penalty", penalty("separate", 0))
    path.unlink()
    return found


def read(kind: type[Loaded], path: Path) -> Loaded:
    """Load a file as an operator or a penalty."""
    return kind.load(path)


def digest_of(loaded: Loaded) -> str:
    """Return a digest of everything that can be seen of an operator or a penalty."""
    digest = hashlib.sha256()

    def take(*values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor):
                take(str(value.dtype), tuple(value.shape))
                digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy())
            else:
                digest.update(repr(value).encode(errors="backslashreplace") + b"\0")

    for part in operators_of(loaded):
        take(part.parameter_shapes, part.provenance)
        for block in part.blocks:
            take(block.parameters, block.transposed, block.eigenvalues)
            take(block.gradient_basis, block.activation_basis)
    if isinstance(loaded, EKFACPenalty):
        take(loaded.strength, loaded.mode, loaded.weighting, loaded.decay, loaded.temperature)
        take(loaded.include, loaded.exclude, loaded.strict, loaded.settings, loaded.num_tasks)
        take(loaded.scale)
        for term in loaded.terms:
            take(term.weight, *(part for pair in term.anchor.items() for part in pair))
    return digest.hexdigest()


def operators_of(loaded: Loaded) -> list[EKFACLinearOperator]:
    """Return an operator, or those of a penalty's terms."""
    if isinstance(loaded, EKFACLinearOperator):
        return [loaded]
    return [term.operator for term in loaded.terms]


def check_consistent(loaded: Loaded) -> None:
    """Raise `AssertionError` unless something loaded is an operator, or a penalty, in every way."""
    for part in operators_of(loaded):
        _check_blocks(part)
        _check_products(part)
    if isinstance(loaded, EKFACPenalty):
        _check_penalty(loaded)


def _check_blocks(part: EKFACLinearOperator) -> None:
    held = sorted(name for block in part.blocks for name in block.parameters)
    assert held == sorted(part.parameter_shapes), "every parameter is in one block"
    for block in part.blocks:
        assert bool((block.eigenvalues >= 0).all()), "eigenvalues are not negative, and no NaN"
        assert bool((block.eigenvalues < torch.inf).all()), "eigenvalues are finite"
        groups, *sizes = block.eigenvalues.shape
        bases = (block.gradient_basis, block.activation_basis)
        for basis, size in zip(bases, sizes, strict=True):
            if basis is None:
                continue
            _, rows, rank = basis.shape
            assert len(basis) == groups, "bases have the shapes of their sides"
            assert size == rank + (rank < rows), "a thin side has one row or column more"
            assert basis.dtype == block.eigenvalues.dtype, "a block has one dtype"
            error = (basis.double().mT @ basis.double() - torch.eye(rank)).abs()
            # A basis is made whole to second order in what is tolerated of bfloat16.
            assert not error.numel() or error.max() < 0.1, "bases are orthonormal"


def _check_products(part: EKFACLinearOperator) -> None:
    size = sum(shape.numel() for shape in part.parameter_shapes.values())
    largest = max(
        (b.eigenvalues.double().max().item() for b in part.blocks if b.eigenvalues.numel()),
        default=0,
    )
    dtypes = {block.eigenvalues.dtype for block in part.blocks}
    if (
        not 0 < size <= LARGEST_DENSE
        or largest > 1e3
        or not dtypes <= {torch.float32, torch.float64}
    ):
        return
    dense = dense_operator([_double(b) for b in part.blocks], part.parameter_shapes)
    # A model may have parameters of several dtypes.
    dtype_of = {name: b.eigenvalues.dtype for b in part.blocks for name in b.parameters}
    ones = [torch.ones(s, dtype=dtype_of[name]) for name, s in part.parameter_shapes.items()]
    product = torch.cat([tensor.flatten().double() for tensor in part @ ones])
    torch.testing.assert_close(product, dense.sum(dim=1), rtol=1e-3, atol=1e-3 * max(largest, 1e-9))
    least = torch.linalg.eigvalsh(dense).min().item() if size else 0.0
    assert least >= -1e-9 * max(largest, 1e-9) * size, "the matrix is positive semidefinite"


def _check_penalty(loaded: EKFACPenalty) -> None:
    assert type(loaded.num_tasks) is int, "tasks are counted"
    assert loaded.num_tasks >= 0, "tasks are counted"
    assert loaded.mode == "separate" or len(loaded.terms) <= 1, "a merged penalty has one term"
    if len({tuple(sorted(term.anchor)) for term in loaded.terms}) > 1 or loaded.strength > 1e6:
        return
    expected, moved = 0.0, {}
    for term in reversed(loaded.terms):
        moved = moved or {n: a.double() + 0.01 for n, a in term.anchor.items()}
        if any(moved[name].shape != anchor.shape for name, anchor in term.anchor.items()):
            return
        shapes = term.operator.parameter_shapes
        delta = torch.cat([(moved[n] - term.anchor[n].double()).flatten() for n in shapes])
        dense = dense_operator([_double(b) for b in term.operator.blocks], shapes)
        expected += 0.5 * loaded.scale * term.weight * (delta @ dense @ delta).item()
    if not loaded.terms:
        assert loaded({}).item() == 0.0, "a penalty without tasks is zero"
    elif expected < 1e30:
        value = loaded({n: a.to(loaded.terms[-1].anchor[n].dtype) for n, a in moved.items()}).item()
        # Anchors may be large, and differences from them inexact.
        close = abs(value - expected) <= 1e-2 * abs(expected) + 1e-4
        large = max(
            (a.abs().max().item() for t in loaded.terms for a in t.anchor.values() if a.numel()),
            default=0,
        )
        assert close or large > 1e2, f"the penalty is {value}, and not {expected}"
    # An anchor is cast to the dtype of its block, and could be rounded by it.
    held = {b.eigenvalues.dtype for term in loaded.terms for b in term.operator.blocks}
    if len(loaded.terms) == 1 and held <= {torch.float32, torch.float64}:
        assert loaded(loaded.terms[0].anchor).item() == 0.0, "a penalty is zero at its anchor"


def _double(block: Block) -> Block:
    return block.map(lambda tensor: tensor.double())
