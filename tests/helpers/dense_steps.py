"""What an attached penalty has to do: torch's optimizers on the dense coordinates `x = Qᵀθ`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import (
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

from rotate_ewc import EKFACPenalty
from tests.helpers.oracles import assert_close, block_indices
from tests.helpers.penalties import flat, positions, shapes_of
from tests.helpers.thin import completed, spread

Options = dict[str, Any]
Case = tuple[type[Optimizer], Options]

# Every optimizer with a rule, and the options that change its steps. An ε that is well above the
# rounding errors of random gradients.
CASES: dict[str, Case] = {
    "sgd": (SGD, {"lr": 0.1}),
    "sgd-decay": (SGD, {"lr": 0.1, "weight_decay": 0.3, "maximize": True}),
    "sgd-momentum": (SGD, {"lr": 0.05, "momentum": 0.7, "dampening": 0.4}),
    "sgd-nesterov": (SGD, {"lr": 0.05, "momentum": 0.7, "nesterov": True, "foreach": True}),
    "sgd-dampening-alone": (SGD, {"lr": 0.05, "dampening": 0.4}),
    "sgd-fused": (SGD, {"lr": 0.05, "momentum": 0.7, "fused": True}),
    "adam": (Adam, {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-4}),
    "adam-tensor": (Adam, {"lr": torch.tensor(0.1, dtype=torch.float64), "eps": 1e-4}),
    "adam-decay": (Adam, {"lr": 0.1, "weight_decay": 0.3, "eps": 1e-4}),
    "adam-maximize": (Adam, {"lr": 0.1, "weight_decay": 0.3, "maximize": True}),
    "adam-amsgrad": (Adam, {"lr": 0.1, "betas": (0.5, 0.6), "amsgrad": True, "foreach": True}),
    "adam-fused": (Adam, {"lr": 0.1, "fused": True}),
    "adamw": (AdamW, {"lr": 0.1, "weight_decay": 0.5}),
    "adamw-fused": (AdamW, {"lr": 0.1, "weight_decay": 0.5, "fused": True, "amsgrad": True}),
    "nadam": (NAdam, {"lr": 0.1, "betas": (0.8, 0.95), "momentum_decay": 0.1}),
    "nadam-decay": (NAdam, {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True}),
    "radam": (RAdam, {"lr": 0.05, "betas": (0.8, 0.9)}),
    "radam-decay": (RAdam, {"lr": 0.05, "weight_decay": 0.3, "foreach": True}),
    "adamax": (Adamax, {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.2}),
    "adagrad": (Adagrad, {"lr": 0.3, "lr_decay": 0.1, "initial_accumulator_value": 0.2}),
    "adagrad-decay": (Adagrad, {"lr": 0.3, "weight_decay": 0.3, "fused": True}),
    "adadelta": (Adadelta, {"lr": 3.0, "rho": 0.7, "eps": 1e-2}),
    "adadelta-decay": (Adadelta, {"lr": 3.0, "weight_decay": 0.3, "foreach": True}),
    "rmsprop": (RMSprop, {"lr": 0.05, "alpha": 0.8}),
    "rmsprop-momentum": (RMSprop, {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.3, "alpha": 0.8}),
    "rmsprop-centered": (RMSprop, {"lr": 0.02, "centered": True, "eps": 1e-2}),
}


class Coordinates(NamedTuple):
    """Eigenvectors in columns, eigenvalues and anchor over the flat parameters of a model.

    Each coordinate has the place of an entry: the one that its block has in its own layout. Where
    nothing is protected, the basis is the identity, and eigenvalues and anchor are zero.
    """

    basis: Tensor
    eigenvalues: Tensor
    anchor: Tensor


class Dense(NamedTuple):
    """An optimizer of the coordinates, of which every parameter of a model has a part."""

    at: Coordinates
    parts: list[nn.Parameter]
    optimizer: Optimizer


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
            sides = zip(completed(block, 0), completed(block, 1), strict=True)
            spectra = [spread(block, group) for group in range(groups)]
            for group, (left, right) in enumerate(sides):
                index = where[entries[group]].flatten()
                values = spectra[group]
                turned = torch.from_numpy(np.kron(left, right))
                if block.activation_basis is None and block.gradient_basis is not None:
                    turned = _without_turning_equals(turned, spectra)
                basis[index[:, None], index] = turned
                eigenvalues[index] = torch.from_numpy(values.flatten())
        anchor[where] = torch.cat([term.anchor[name].flatten() for name in inner]).double()
    return Coordinates(basis, eigenvalues, anchor)


def _without_turning_equals(basis: Tensor, spectra: Sequence[NDArray[np.float64]]) -> Tensor:
    """Leave inputs as they are that have but one eigenvalue in each group, if half of all or more.

    A bias, which has one input, is always turned.
    """
    d_out, d_in = spectra[0].shape
    equal = [i for i in range(d_in) if all(len(set(s[:, i].tolist())) == 1 for s in spectra)]
    if d_in == 1 or 2 * len(equal) < d_in:
        return basis
    kept = basis.clone()
    places = torch.arange(d_out * d_in).reshape(d_out, d_in)[:, equal].flatten()
    kept[places], kept[:, places] = 0.0, 0.0
    kept[places, places] = 1.0
    return kept


def dense(
    penalty: EKFACPenalty,
    model: nn.Module,
    kind: Callable[..., Optimizer],
    options: Options | Sequence[Options],
) -> Dense:
    """An optimizer at a model's parameters, with the same options or some for each of them."""
    at = coordinates(penalty, model)
    sizes = [p.numel() for p in model.parameters()]
    x = at.basis.T @ flat(model).double()
    parts = [nn.Parameter(part.clone()) for part in x.split(sizes)]
    own = [options] * len(parts) if isinstance(options, dict) else options
    groups = [{"params": [part], **given} for part, given in zip(parts, own, strict=True)]
    # Adagrad heeds some of them as arguments alone.
    shared = options if isinstance(options, dict) else {}
    return Dense(at, parts, kind(groups, **shared))


def theta(oracle: Dense) -> Tensor:
    return oracle.at.basis @ torch.cat([p.detach() for p in oracle.parts])


def advance(oracle: Dense, gradients: Sequence[Tensor | None], scale: float) -> Tensor:
    """Step with the gradients of a model's parameters, then shrink; return where that leads."""
    sizes = [part.numel() for part in oracle.parts]
    whole = [
        torch.zeros(size).double() if g is None else g.flatten().double()
        for g, size in zip(gradients, sizes, strict=True)
    ]
    rotated = (oracle.at.basis.T @ torch.cat(whole)).split(sizes)
    for part, gradient, given in zip(oracle.parts, rotated, gradients, strict=True):
        part.grad = None if given is None else gradient.clone()
    oracle.optimizer.step()
    values = oracle.at.eigenvalues.split(sizes)
    anchors = (oracle.at.basis.T @ oracle.at.anchor).split(sizes)
    for group, part, value, anchor in zip(
        oracle.optimizer.param_groups, oracle.parts, values, anchors, strict=True
    ):
        if part.grad is not None:
            size = step_size(oracle.optimizer, group, oracle.optimizer.state[part])
            part.data = anchor + (part.data - anchor) / (1.0 + size * scale * value)
    return theta(oracle)


def step_size(optimizer: Optimizer, group: Options, state: Options) -> Tensor | float:
    """The step for a gradient of one that has not changed for long, written out for each class."""
    lr, eps = float(group["lr"]), group.get("eps", 0.0)
    t = float(state.get("step", 0.0))
    if isinstance(optimizer, SGD):
        if not group["momentum"]:
            return lr
        return lr * (1.0 - group["dampening"]) / (1.0 - group["momentum"])
    if isinstance(optimizer, Adagrad):
        return lr / (1.0 + (t - 1.0) * group["lr_decay"]) / (state["sum"] ** 0.5 + eps)
    if isinstance(optimizer, Adadelta):
        return lr * ((state["acc_delta"] + eps) / (state["square_avg"] + eps)) ** 0.5
    if isinstance(optimizer, RMSprop):
        average = state["square_avg"]
        if group["centered"]:
            average = average - state["grad_avg"] ** 2
        return lr / (1.0 - group["momentum"]) / (average**0.5 + eps)
    first, second = group["betas"]
    if isinstance(optimizer, Adamax):
        return lr / state["exp_inf"]
    v = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    bias = 1.0 - second**t
    if isinstance(optimizer, RAdam):
        longest = 2.0 / (1.0 - second) - 1.0
        length = longest - 2.0 * t * second**t / bias
        if length <= 5.0:
            return lr
        above = (length - 4.0) * (length - 2.0) * longest
        below = (longest - 4.0) * (longest - 2.0) * length
        return lr * (above / below * bias) ** 0.5 / (v**0.5 + eps)
    size = lr / ((v / bias) ** 0.5 + eps)
    if isinstance(optimizer, NAdam):
        products = float(state["mu_product"])
        mu, after = (
            first * (1.0 - 0.5 * 0.96 ** (n * group["momentum_decay"])) for n in (t, t + 1.0)
        )
        size = size * (
            (1.0 - mu) / (1.0 - products) + after * (1.0 - first**t) / (1.0 - products * after)
        )
    return size


def draw(model: nn.Module, seed: int) -> list[Tensor | None]:
    """Give a model random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return [p.grad for p in model.parameters()]


def follow(
    model: nn.Module, penalty: EKFACPenalty, case: str, scale: float, steps: int = 10
) -> Optimizer:
    """Compare steps with random gradients."""
    kind, options = CASES[case]
    oracle, start = dense(penalty, model, kind, options), flat(model)
    optimizer = kind(model.parameters(), **options)
    with penalty.attach(optimizer, model):
        for step in range(steps):
            expected = advance(oracle, draw(model, step), scale)
            optimizer.step()
        assert_close(flat(model) - start, expected - start, 1e-9)
    return optimizer
