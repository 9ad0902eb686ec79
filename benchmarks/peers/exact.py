"""The exact matrices, from plain automatic differentiation of one example at a time.

No closed form of a layer or loss is used, and nothing of any package that is measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev

from benchmarks.peers.problem import Fisher, Problem


@dataclass(frozen=True)
class DenseMatrix:
    """A dense matrix over named parameters."""

    matrix: Tensor  # ``[D, D]``; every parameter flattened row-major, in the order of ``shapes``
    shapes: Mapping[str, torch.Size]  # parameter shapes by name

    def block(self, names: Sequence[str]) -> Tensor:
        """The part of the matrix that belongs to some parameters, in the order of the names."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        ranges = dict(zip(self.shapes, torch.split(torch.arange(sum(sizes)), sizes), strict=True))
        positions = torch.cat([ranges[name] for name in names])
        return self.matrix[positions][:, positions]


def exact_matrix(problem: Problem, fisher: Fisher) -> DenseMatrix:
    """Assemble the matrix that a problem asks for.

    ``type2`` is the generalised Gauss-Newton matrix of the loss under its own reduction over all
    examples; ``empirical`` the sum of the outer products of the examples' gradients.
    """
    model = problem.model()
    parameters = problem.parameters(model)
    shapes = {name: model.get_parameter(name).shape for name in problem.names(model)}
    size = sum(shape.numel() for shape in shapes.values())
    matrix = torch.zeros(size, size, dtype=parameters[0].dtype)
    summed = problem.loss("sum")
    for x, y in problem.seen():
        output = model(x)
        if fisher == "empirical":
            gradient = flat_gradients(summed(output, y)[None], parameters)
            matrix += gradient.T @ gradient
        else:
            jacobian = flat_gradients(output.flatten(), parameters)
            matrix += jacobian.T @ output_hessian(summed, output.detach(), y) @ jacobian
    if fisher == "type2" and problem.reduction == "mean":
        matrix /= mean_divisor(problem)
    return DenseMatrix(matrix, shapes)


def mean_divisor(problem: Problem) -> float:
    """What the reduction ``mean`` divides by over all examples: asked of the loss itself."""
    model = problem.model()
    with torch.no_grad():
        outputs = torch.cat([model(x) for x, _ in problem.seen()])
    targets = torch.cat([y for _, y in problem.seen()])
    losses = [problem.loss(reduction)(outputs, targets) for reduction in ("sum", "mean")]
    return float(losses[0] / losses[1])


def flat_gradients(values: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Gradients ``[M, D]`` of values ``[M]``; a parameter that is not used has zeros."""

    def row(value: Tensor) -> Tensor:
        gradients = torch.autograd.grad(
            value, list(parameters), retain_graph=True, materialize_grads=True
        )
        return torch.cat([gradient.flatten() for gradient in gradients])

    return torch.stack([row(value) for value in values]).detach()


def output_hessian(summed: Any, output: Tensor, target: Tensor) -> Tensor:
    """Second derivative ``[M, M]`` of the summed loss by the M numbers of one example's output."""
    second = jacrev(jacrev(lambda flat: summed(flat.reshape(output.shape), target)))
    hessian: Tensor = second(output.flatten())
    return hessian
