"""What `RotatedAdam` has to do: torch's Adam on the dense coordinates `z = Qᵀ(θ - θ*)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam

from rotate_ewc import EKFACPenalty
from tests.helpers.oracles import block_indices, kronecker_basis
from tests.helpers.penalties import flat, positions, shapes_of

Gradients = Sequence[Tensor | None]


class Coordinates(NamedTuple):
    """Eigenvectors in columns, eigenvalues and anchor over the flat parameters of a model.

    Each coordinate has the place of an entry: the one that its block has in its own layout. Where
    nothing is protected, the basis is the identity, and eigenvalues and anchor are zero.
    """

    basis: Tensor
    eigenvalues: Tensor
    anchor: Tensor


class Dense(NamedTuple):
    """Adam on the coordinates, of which every parameter of a model has a part."""

    at: Coordinates
    parts: list[nn.Parameter]
    adam: Adam


def coordinates(penalty: EKFACPenalty, model: nn.Module) -> Coordinates:
    shapes, size = shapes_of(model), len(flat(model))
    basis = torch.eye(size, dtype=torch.float64)
    eigenvalues, anchor = torch.zeros(size).double(), torch.zeros(size).double()
    for term in penalty.terms:
        inner = {name: tuple(shape) for name, shape in term.operator.parameter_shapes.items()}
        where = positions(inner, shapes)
        for block in term.operator.blocks:
            groups = len(block.eigenvalues)
            entries = block_indices(inner, block.parameters, groups, block.transposed)
            for index, vectors, values in zip(
                where[entries].flatten(start_dim=1),
                kronecker_basis(block),
                block.eigenvalues.flatten(start_dim=1),
                strict=True,
            ):
                basis[index[:, None], index] = vectors.double()
                eigenvalues[index] = values.double()
        anchor[where] = torch.cat([term.anchor[name].flatten() for name in inner]).double()
    return Coordinates(basis, eigenvalues, anchor)


def dense(
    penalty: EKFACPenalty, model: nn.Module, lr: float | Sequence[float] = 0.1, **options: Any
) -> Dense:
    """Adam at a model's parameters, with one learning rate or one for each parameter."""
    at = coordinates(penalty, model)
    sizes = [p.numel() for p in model.parameters()]
    z = at.basis.T @ (flat(model).double() - at.anchor)
    parts = [nn.Parameter(part.clone()) for part in z.split(sizes)]
    rates = [lr] * len(parts) if isinstance(lr, float) else lr
    groups = [{"params": [part], "lr": rate} for part, rate in zip(parts, rates, strict=True)]
    return Dense(at, parts, Adam(groups, **options))


def theta(oracle: Dense) -> Tensor:
    return oracle.at.anchor + oracle.at.basis @ torch.cat([p.detach() for p in oracle.parts])


def advance(oracle: Dense, gradients: Gradients, scale: float) -> Tensor:
    """Take a step with the gradients of a model's parameters; return where it leads to."""
    sizes = [part.numel() for part in oracle.parts]
    whole = [
        torch.zeros(size).double() if g is None else g.flatten().double()
        for g, size in zip(gradients, sizes, strict=True)
    ]
    rotated = (oracle.at.basis.T @ torch.cat(whole)).split(sizes)
    for part, gradient, given_one in zip(oracle.parts, rotated, gradients, strict=True):
        part.grad = None if given_one is None else gradient.clone()
    oracle.adam.step()
    values = oracle.at.eigenvalues.split(sizes)
    for group, part, own in zip(oracle.adam.param_groups, oracle.parts, values, strict=True):
        if part.grad is not None:
            state = oracle.adam.state[part]
            mean = state["exp_avg_sq"] / (1.0 - group["betas"][1] ** state["step"].item())
            size = group["lr"] / (mean.sqrt() + group["eps"])
            part.data = part.data / (1.0 + size * scale * own)
    return theta(oracle)
