"""One forward pass → every use of every parameter, and the gradients at its output.

Not module hooks: a `TorchFunctionMode` sees the operations themselves, so it is right where hooks
are not (padding modes, in-place activations, layers that run twice, functional use), and a use that
it has no rule for is seen too, and refused by name instead of being silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode, resolve_name

from rotate_ewc.layers import RULES, SUPPORTED, LayerCall


@dataclass(frozen=True)
class Use:
    """One use of parameters.

    Attributes:
        weight: Name of the weight, None if it is not among the tracked parameters.
        bias: Name of the bias, likewise.
        call: The operation's arguments, its input detached from the autograd graph.
        input_version: How often the input had been modified in place when it was used.
    """

    weight: str | None
    bias: str | None
    call: LayerCall
    input_version: int

    @property
    def name(self) -> str:
        """A name for messages: that of the weight, or else of the bias."""
        return self.weight or self.bias or "?"


class Trace:
    """The uses of parameters in one forward pass, and the gradients at their outputs.

    Attributes:
        outputs: The model's outputs, attached to the autograd graph.
        uses: Every use of a tracked parameter, in the order in which they ran.
    """

    def __init__(self, outputs: Tensor, uses: Sequence[Use], edges: Sequence[GradientEdge]) -> None:
        """Hold the outputs and uses of one forward pass, and an edge to every use's output."""
        self.outputs = outputs
        self.uses = tuple(uses)
        self._edges = tuple(edges)

    def gradients(self, vector: Tensor, *, last: bool) -> list[Tensor]:
        """Back-propagate one output vector.

        Args:
            vector: Of the outputs' shape.
            last: Whether the graph can be freed.

        Returns:
            For every use, the gradient at its output; zeros where the outputs do not depend on it.
        """
        if not self.uses:
            return []
        gradients = torch.autograd.grad(
            self.outputs,
            self._edges,
            grad_outputs=vector.to(self.outputs.dtype),
            retain_graph=not last,
            allow_unused=True,
            materialize_grads=True,
        )
        return [gradient.detach() for gradient in gradients]

    def check_inputs_unmodified(self) -> None:
        """Raise if a layer's input was changed in place after the layer used it."""
        for use in self.uses:
            if use.call.input._version != use.input_version:
                raise ValueError(
                    f"the input of the layer of {use.name!r} was modified in place after the layer "
                    f"used it, so its activations are lost; make that operation out-of-place"
                )


def trace(
    forward: Callable[[], Tensor], parameters: Mapping[str, Tensor], *, model_name: str = "model"
) -> Trace:
    """Run a forward pass and record every use of the given parameters.

    Args:
        forward: Runs the model and returns its outputs.
        parameters: The tensors to look for, by name; they must require gradients.
        model_name: What to call the model in messages.

    Raises:
        TypeError: If the outputs are not a floating-point tensor.
        ValueError: If a parameter is used by an operation without a rule, or by one that cannot be
            observed.
    """
    recorder = _Recorder(parameters)
    with torch.enable_grad(), recorder:
        outputs = forward()
    if not isinstance(outputs, Tensor):
        raise TypeError(f"{model_name} returned {type(outputs).__name__}; expected a tensor")
    if not outputs.is_floating_point():
        raise TypeError(f"{model_name} returned dtype {outputs.dtype}; expected floating-point")
    result = Trace(outputs, recorder.uses, recorder.edges)
    _check_all_observed(result, parameters)
    result.check_inputs_unmodified()
    return result


def find_batch_axes(recorded: Trace, num_examples: int, generator: Generator) -> list[int]:
    """Find the axis that holds the examples in every use, and prove that examples are independent.

    One example's outputs are back-propagated: in a layer whose axis is found right, and which does
    not mix examples, only that example's rows can receive a gradient.

    Raises:
        ValueError: If no axis passes, naming the layer.
    """
    outputs = recorded.outputs.detach()
    vector = torch.zeros_like(outputs)
    rows = outputs.shape[0] // num_examples
    vector[:rows] = torch.randn(
        vector[:rows].shape, generator=generator, device=vector.device, dtype=torch.float32
    ).to(vector.dtype)
    gradients = recorded.gradients(vector, last=False)
    return [
        _batch_axis(use, gradient, num_examples)
        for use, gradient in zip(recorded.uses, gradients, strict=True)
    ]


def _batch_axis(use: Use, gradient: Tensor, num_examples: int) -> int:
    if not bool(torch.isfinite(gradient).all()):
        raise ValueError(f"the output gradients of {use.name!r} are not finite (NaN or infinity)")
    fitting = [
        axis for axis in use.call.batch_axes if use.call.input.shape[axis] % num_examples == 0
    ]
    for axis in fitting:
        rows = gradient.shape[axis] // num_examples
        others = gradient.narrow(axis, rows, gradient.shape[axis] - rows)
        if not bool(others.count_nonzero()):
            return axis
    shape = list(use.call.input.shape)
    if not fitting:
        raise ValueError(
            f"the layer of {use.name!r} got an input of shape {shape}, in which no axis can hold "
            f"the batch's {num_examples} examples; expected them on the first axis (if the inputs' "
            f"first axis is not the number of examples, pass batch_size_fn)"
        )
    raise ValueError(
        f"the outputs of the batch's first example depend on other examples' values in the layer "
        f"of {use.name!r} (input shape {shape}); expected independent examples: use BatchNorm in "
        f"eval mode with running statistics, and keep the examples on the first axis"
    )


class _Recorder(TorchFunctionMode):
    """Sees every torch function called, and keeps those that use a tracked parameter."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self.uses: list[Use] = []
        self.edges: list[GradientEdge] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        touched = {
            self._names[id(tensor)]
            for tensor in _tensors((args, kwargs))
            if id(tensor) in self._names
        }
        result = func(*args, **kwargs)
        if touched and any(t.requires_grad and not t.is_leaf for t in _tensors(result)):
            self.uses.append(self._read(func, args, kwargs, touched))
            self.edges.append(get_gradient_edge(result))
        return result

    def _read(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        touched: set[str],
    ) -> Use:
        rule = RULES.get(func)
        if rule is not None:
            call = rule(*args, **kwargs)
            weight, bias = self._names.get(id(call.weight)), self._names.get(id(call.bias))
            if touched == {weight, bias} - {None} and id(call.input) not in self._names:
                detached = replace(call, input=call.input.detach())
                return Use(weight, bias, detached, call.input._version)
        operation = resolve_name(func) or getattr(func, "__name__", repr(func))
        raise ValueError(_refusal(sorted(touched), f"the operation {operation}"))


def _check_all_observed(recorded: Trace, parameters: Mapping[str, Tensor]) -> None:
    """Raise if the outputs depend on a parameter whose use was not seen."""
    used = {name for use in recorded.uses for name in (use.weight, use.bias)}
    reached = set(_reachable_leaves(recorded.outputs))
    unseen = [n for n, tensor in parameters.items() if id(tensor) in reached and n not in used]
    if unseen:
        raise ValueError(
            _refusal(unseen, "an operation that cannot be observed, as in scripted models")
        )


def _refusal(names: Sequence[str], used_by: str) -> str:
    listed = ", ".join(repr(name) for name in names)
    return (
        f"parameter {listed} is used by {used_by}, for which there is no rule; supported are "
        f"{SUPPORTED}. Leave the parameter out to protect only the others"
    )


def _reachable_leaves(outputs: Tensor) -> Iterator[int]:
    """Yield the id of every leaf tensor that the outputs' autograd graph ends in."""
    pending, seen = [outputs.grad_fn], {outputs.grad_fn}
    while pending:
        node = pending.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            yield id(node.variable)
        fresh = {parent for parent, _ in node.next_functions} - seen
        seen |= fresh
        pending.extend(fresh)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
