"""How other packages compute ½ dᵀ F d, differentiably, for the matrix of one task."""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.speed import names as speed
from benchmarks.speed.adapters.curvlinops import OneRowPerToken
from benchmarks.speed.adapters.data import loader
from benchmarks.speed.adapters.nngeometry import settings_for
from benchmarks.speed.cases import Problem

# From displacements of the parameters that every contender knows, in their order, to a scalar.
Form = Callable[[Sequence[Tensor]], Tensor]


def nngeometry_form(problem: Problem) -> Form:
    """``PMatEKFAC.vTMv``; each weight is in one block with its bias.

    Args:
        problem: The model at its anchor; what is not known gets frozen.

    Returns:
        The quadratic form, of a mean over examples of the summed loss of each.
    """
    problem.freeze_other_parameters()
    metrics = import_module("nngeometry.metrics")
    objects = import_module("nngeometry.object")
    settings, data = settings_for(problem, speed.MC), loader(problem)
    matrix = metrics.FIM_MonteCarlo(problem.model, data, objects.PMatEKFAC, **settings)
    matrix.update_diag(data)
    layers = settings["layer_collection"]
    sizes = {name: 1 + bool(layer.bias) for name, layer in layers.layers.items()}

    def form(deltas: Sequence[Tensor]) -> Tensor:
        rest = iter(deltas)
        parts = {name: tuple(next(rest) for _ in range(size)) for name, size in sizes.items()}
        vector = objects.PVector(layer_collection=layers, dict_repr=parts)
        value: Tensor = 0.5 * matrix.vTMv(vector)
        return value

    return form


def curvlinops_form(problem: Problem) -> Form:
    """A product with ``EKFACLinearOperator``, through which autograd goes, and a scalar product.

    Args:
        problem: The model at its anchor; what is not known gets frozen.

    Returns:
        The quadratic form.
    """
    problem.freeze_other_parameters()
    package = import_module("curvlinops")
    model, batches = problem.model, problem.batches
    if problem.labels_per_example > 1:
        model = OneRowPerToken(model)
        batches = [(inputs, targets.flatten()) for inputs, targets in batches]
    operator = package.EKFACLinearOperator(
        model,
        problem.criterion,
        problem.known_parameters,
        batches,
        fisher_type=package.FisherType.MC,
        check_deterministic=False,
        num_data=problem.examples,
        num_per_example_loss_terms=problem.labels_per_example,
    )
    # It is estimated by the first product.
    _ = operator @ [torch.zeros_like(parameter) for parameter in problem.known_parameters]

    def form(deltas: Sequence[Tensor]) -> Tensor:
        products = operator @ list(deltas)
        terms = [
            torch.dot(delta.flatten(), product.flatten())
            for delta, product in zip(deltas, products, strict=True)
        ]
        return 0.5 * torch.stack(terms).sum()

    return form


FORMS: dict[str, Callable[[Problem], Form]] = {
    speed.NNGEOMETRY: nngeometry_form,
    speed.CURVLINOPS: curvlinops_form,
}


def installed(peer: str) -> bool:
    """Whether a peer's package is there."""
    return find_spec(peer) is not None
