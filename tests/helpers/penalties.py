"""Small models, tasks, and the dense quadratics that a penalty on them has to be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator, EKFACPenalty
from rotate_ewc.linalg.block import Block
from rotate_ewc.linalg.cut import cut
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import Shapes, dense_operator

CE = nn.CrossEntropyLoss()
SUMMED = nn.CrossEntropyLoss(reduction="sum")

Batches = list[tuple[Tensor, Tensor]]


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3, bias=False)
    )


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(6, 4), nn.ConvTranspose1d(3, 4, 2, groups=1), nn.Flatten(), nn.Linear(20, 3)
    )


def words() -> nn.Module:
    """Tasks have five of the twenty words, some of them the same, and all of them nine."""
    return nn.Sequential(nn.Embedding(20, 3), nn.Flatten(), nn.Linear(9, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (plain, (4,)),
    "grouped": (grouped, (2, 5)),
    "transposed": (transposed, (3,)),
    "words": (words, (3,)),
}


def make(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name][0]().double()


def task(name: str, seed: int, n: int = 9, classes: int = 3) -> Batches:
    """Inputs and targets in two batches of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, *MODELS[name][1])
    if name == "transposed":
        inputs = torch.randint(6, shape, generator=generator)
    elif name == "words":
        inputs = torch.randint(5, shape, generator=generator) + 2 * (seed % 3)
    else:
        inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    targets = torch.randint(classes, (n,), generator=generator)
    return [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])]


def move(model: nn.Module, seed: int, scale: float = 0.1) -> None:
    """Change every parameter a little, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def shapes_of(model: nn.Module) -> Shapes:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def place(model: nn.Module, vector: Tensor) -> None:
    """Set every parameter from a flat vector of them all."""
    nn.utils.vector_to_parameters(vector.clone(), model.parameters())


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def unflat(vector: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    parts = vector.split([prod(shape) for shape in shapes.values()])
    return {n: part.reshape(s) for part, (n, s) in zip(parts, shapes.items(), strict=True)}


class Quadratic(NamedTuple):
    """`½ weight (θ - anchor)ᵀ matrix (θ - anchor)`, over the flat parameters of a model."""

    matrix: Tensor
    anchor: Tensor
    weight: float = 1.0

    def value(self, theta: Tensor) -> Tensor:
        delta = theta - self.anchor
        return 0.5 * self.weight * delta @ self.matrix @ delta

    def gradient(self, theta: Tensor) -> Tensor:
        return self.weight * self.matrix @ (theta - self.anchor)

    def proximal(self, theta: Tensor, size: float) -> Tensor:
        """Minimise `½ |θ' - θ|² + size · value(θ')`."""
        system = torch.eye(len(theta)).to(theta) + size * self.weight * self.matrix
        return self.anchor + torch.linalg.solve(system, theta - self.anchor)


def positions(inner: Shapes, outer: Shapes) -> Tensor:
    """Where the entries of leading slices are among the flat parameters of a larger model."""
    starts = dict(zip(outer, accumulate(map(prod, outer.values()), initial=0), strict=False))
    found = []
    for name, shape in inner.items():
        entries = starts[name] + torch.arange(prod(outer[name])).reshape(outer[name])
        found.append(entries[tuple(map(slice, shape))].flatten())
    return torch.cat(found)


def dense_quadratic(
    operator: EKFACLinearOperator, anchor: Mapping[str, Tensor], shapes: Shapes, weight: float = 1.0
) -> Quadratic:
    """Write an operator and its anchor out over all parameters of a model, zero where new."""
    where = positions({n: tuple(s) for n, s in operator.parameter_shapes.items()}, shapes)
    size = sum(map(prod, shapes.values()))
    matrix, centre = torch.zeros(size, size).double(), torch.zeros(size).double()
    dense = dense_operator(operator.blocks, operator.parameter_shapes)
    matrix[where[:, None], where] = dense.double()
    values = torch.cat([anchor[name].flatten() for name in operator.parameter_shapes])
    centre[where] = values.double()
    return Quadratic(matrix, centre, weight)


def consolidated(
    name: str, tasks: int = 1, strength: float = 2.5, loss: nn.Module = CE, **options: Any
) -> tuple[nn.Module, EKFACPenalty]:
    """A model that has moved away from its last anchor, and the penalty."""
    model, penalty = make(name), exact_penalty(strength, seed=3, **options)
    for t in range(tasks):
        penalty.consolidate(model, loss, task(name, t, 9 + t))
        move(model, t)
    return model, penalty


def thinned(penalty: EKFACPenalty, rank: int) -> None:
    """Leave a penalty only so many directions of each side, with the means over the others."""

    def fewer(block: Block) -> Block:
        return cut(block, rank, rank)

    terms = [replace(t, operator=t.operator.map_blocks(fewer)) for t in penalty.terms]
    last = penalty._last_examples, penalty._last_loss_terms
    penalty._replace_terms(terms, penalty.num_tasks, *last)


def nearest(penalty: EKFACPenalty) -> EKFACPenalty:
    """The same penalty, with the orthonormal bases in float64 that are nearest to its own."""

    def polar(basis: Tensor | None) -> Tensor | None:
        if basis is None:
            return None
        left, _, right = torch.linalg.svd(basis.double(), full_matrices=False)
        return left @ right

    made = copy.deepcopy(penalty)
    terms = [
        replace(
            term,
            operator=term.operator.map_blocks(
                lambda block: replace(
                    block,
                    gradient_basis=polar(block.gradient_basis),
                    activation_basis=polar(block.activation_basis),
                )
            ),
        )
        for term in made.terms
    ]
    made._replace_terms(terms, made.num_tasks, made._last_examples, made._last_loss_terms)
    return made


def quadratic(penalty: EKFACPenalty, model: nn.Module, scale: float) -> Quadratic:
    """What a penalty of one term has to be, `scale` times its quadratic form."""
    (term,) = penalty.terms
    return dense_quadratic(term.operator, term.anchor, shapes_of(model), scale)


def estimated(
    model: nn.Module, data: Batches, seed: int, names: Sequence[str] | None = None
) -> EKFACLinearOperator:
    """The Fisher matrix of the mean loss at the model's parameters, apart from any penalty."""
    named = dict(model.named_parameters())
    params = [named[name] for name in (names or named)]
    return EKFACLinearOperator(model, CE, params, data, seed=seed, check_deterministic=False)


def hessian(penalty: EKFACPenalty, model: nn.Module) -> Tensor:
    """Second derivatives of the penalty, by two backward passes."""
    shapes = shapes_of(model)

    def value(theta: Tensor) -> Tensor:
        return penalty(unflat(theta, shapes))

    return torch.autograd.functional.hessian(value, flat(model))
