"""The layers of a model as their products see them, found by running it once."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from benchmarks.speed.cases import Problem


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution, as products of matrices.

    Attributes:
        positions: Shared positions ``S`` of one example: tokens, or pixels of the output.
        d_in: Inputs at one position, the kernel's pixels included.
        d_out: Outputs at one position.
        bias: Whether there is a bias.
        backward: Whether the gradient at its input is needed, for layers before it.
    """

    positions: int
    d_in: int
    d_out: int
    bias: bool
    backward: bool


def describe_layers(problem: Problem) -> list[Layer]:
    """Run a problem's model on an example, and look at its linear layers and convolutions.

    Args:
        problem: The problem; parameters whose gradients are not wanted must be frozen.

    Returns:
        The layers in the order in which they run.
    """
    found: list[Layer] = []

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        found.append(_describe(module, inputs[0], output))

    handles = [layer.register_forward_hook(look) for layer in problem.known_layers]
    try:
        problem.model(problem.beginning(1).batches[0][0])
    finally:
        for handle in handles:
            handle.remove()
    return found


def _describe(module: nn.Module, inputs: Tensor, output: Tensor) -> Layer:
    """What one call of a layer shows, for a batch of one example."""
    weight = module.get_parameter("weight")
    d_out = weight.shape[0]
    return Layer(
        positions=output.numel() // d_out,
        d_in=weight[0].numel(),
        d_out=d_out,
        bias=getattr(module, "bias", None) is not None,
        backward=inputs.requires_grad,
    )
