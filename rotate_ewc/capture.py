"""One forward pass → every use of every parameter, and the gradients at its output.

Not module hooks: a `TorchFunctionMode` sees the operations themselves, so it is right where hooks
are not (padding modes, in-place activations, layers that run twice, functional use), and a use that
it has no rule for is seen too, and refused by name instead of being silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode, resolve_name

from rotate_ewc.layers import RULES, SUPPORTED, LayerCall
from rotate_ewc.nested import tensors_in


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
    def unmodified(self) -> bool:
        """Whether the input still is what the layer saw."""
        return self.call.input._version == self.input_version

    @property
    def name(self) -> str:
        """A name for messages: that of the weight, or else of the bias."""
        return self.weight or self.bias or "?"


class Trace:
    """The uses of parameters that the outputs depend on, and the gradients at their outputs.

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
        # A backward pass computes in the dtypes of its forward pass; autocast would lower them.
        with torch.autocast(self.outputs.device.type, enabled=False):
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
            if not use.unmodified:
                raise ValueError(
                    f"the input of the layer of {use.name!r} was modified in place after the layer "
                    f"used it, so its activations are lost; make that operation out-of-place"
                )


def trace(forward: Callable[[], Tensor], parameters: Mapping[str, Tensor]) -> Trace:
    """Run a forward pass and record every use of the given parameters.

    Args:
        forward: Runs the model and returns its outputs.
        parameters: The tensors to look for, by name; they must require gradients.

    Raises:
        TypeError: If the outputs are not a floating-point tensor.
        ValueError: If a parameter is used by an operation without a rule, or by one that cannot be
            observed.
    """
    recorder = _Recorder(parameters)
    with torch.enable_grad(), recorder:
        outputs = forward()
    if not isinstance(outputs, Tensor):
        raise TypeError(f"model returned {type(outputs).__name__}; expected a tensor")
    if not outputs.is_floating_point():
        raise TypeError(f"model returned dtype {outputs.dtype}; expected floating-point")
    nodes = _reachable_nodes(outputs)
    _check_all_observed(recorder, parameters, nodes)
    kept = [i for i, edge in enumerate(recorder.edges) if edge.node in nodes]
    result = Trace(outputs, [recorder.uses[i] for i in kept], [recorder.edges[i] for i in kept])
    result.check_inputs_unmodified()
    return result


def find_batch_axes(
    recorded: Trace, num_examples: int, generator: Generator
) -> tuple[list[int], bool]:
    """Find the axis that holds the examples in every use, and prove that examples are independent.

    One example's outputs are back-propagated: in a layer whose axis of examples is found right, and
    which does not mix examples, only that example's rows can receive a gradient. Two examples are
    tried, the first and the last, because a model that reads only one position of a sequence can
    make another axis look right for one of them. Where a layer's shape leaves a choice and an
    example's gradient vanishes, which proves nothing, others are tried in its place.

    Returns:
        The axis for every use, and whether it is certain for all of them.

    Raises:
        ValueError: If no axis passes, naming the layer.
    """
    fitting = [_fitting_axes(use, num_examples) for use in recorded.uses]
    undecided = [index for index, axes in enumerate(fitting) if len(axes) > 1]
    evidence = dict.fromkeys(undecided, 0)
    examples = dict.fromkeys([0, num_examples - 1, *range(1, num_examples - 1)])
    for tried, example in enumerate(examples):
        if tried >= 2 and all(count >= 2 for count in evidence.values()):
            break
        gradients = _probe(recorded, example, num_examples, generator)
        for index, (use, gradient) in enumerate(zip(recorded.uses, gradients, strict=True)):
            fitting[index] = _passing_axes(use, gradient, fitting[index], example, num_examples)
        for index in undecided:
            evidence[index] += int(bool(gradients[index].count_nonzero()))
    certain = all(count >= 2 for count in evidence.values())
    return [axes[0] for axes in fitting], certain


def _fitting_axes(use: Use, num_examples: int) -> list[int]:
    """Return the axes of a use's input that could hold the examples."""
    shape = use.call.input.shape
    axes = [axis for axis in use.call.batch_axes if shape[axis] % num_examples == 0]
    if not axes:
        raise ValueError(
            f"the layer of {use.name!r} got an input of shape {list(shape)}, in which no axis can "
            f"hold the batch's {num_examples} examples; expected them on the first axis (if the "
            f"inputs' first axis is not the number of examples, pass batch_size_fn)"
        )
    return axes


def _probe(recorded: Trace, example: int, num_examples: int, generator: Generator) -> list[Tensor]:
    """Return the gradients at every use of a random combination of one example's outputs."""
    outputs = recorded.outputs.detach()
    rows = outputs.shape[0] // num_examples
    vector = torch.zeros_like(outputs)
    part = vector[example * rows : (example + 1) * rows]
    part.copy_(torch.randn(part.shape, generator=generator, device=part.device))
    return recorded.gradients(vector, last=False)


def _passing_axes(
    use: Use, gradient: Tensor, axes: Sequence[int], example: int, num_examples: int
) -> list[int]:
    """Return the axes along which one example's gradient is in its own rows alone."""
    if not bool(torch.isfinite(gradient).all()):
        raise ValueError(f"the output gradients of {use.name!r} are not finite (NaN or infinity)")
    passing = []
    for axis in axes:
        rows = gradient.shape[axis] // num_examples
        own = gradient.narrow(axis, example * rows, rows)
        if int(gradient.count_nonzero()) == int(own.count_nonzero()):
            passing.append(axis)
    if not passing:
        raise ValueError(
            f"the outputs of one example depend on other examples' values in the layer of "
            f"{use.name!r} (input shape {list(use.call.input.shape)}); expected independent "
            f"examples: use BatchNorm in eval mode with running statistics, and keep the examples "
            f"on the first axis"
        )
    return passing


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
            for tensor in tensors_in((args, kwargs))
            if id(tensor) in self._names
        }
        result = func(*args, **kwargs)
        if touched and any(t.requires_grad and not t.is_leaf for t in tensors_in(result)):
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


def _check_all_observed(
    recorder: _Recorder, parameters: Mapping[str, Tensor], nodes: set[Any]
) -> None:
    """Raise if the outputs depend on a parameter whose use was not seen."""
    used = {name for use in recorder.uses for name in (use.weight, use.bias)}
    reached = {id(node.variable) for node in nodes if hasattr(node, "variable")}
    unseen = [n for n, tensor in parameters.items() if id(tensor) in reached and n not in used]
    if unseen:
        raise ValueError(
            _refusal(
                unseen,
                "an operation that cannot be observed, such as scripted code or an "
                "autograd.Function of its own",
            )
        )


def _refusal(names: Sequence[str], used_by: str) -> str:
    listed = ", ".join(repr(name) for name in names)
    return (
        f"parameter {listed} is used by {used_by}, for which there is no rule; supported are "
        f"{SUPPORTED}. Leave it out (params, or exclude={list(names)}) to protect only the others"
    )


def _reachable_nodes(outputs: Tensor) -> set[Any]:
    """Return every node of the outputs' autograd graph."""
    nodes: set[Any] = set()
    pending = [outputs.grad_fn] if outputs.grad_fn is not None else []
    while pending:
        node = pending.pop()
        if node not in nodes:
            nodes.add(node)
            pending.extend(parent for parent, _ in node.next_functions if parent is not None)
    return nodes
