"""One forward pass → every use of every parameter, and the gradients at its output.

Not module hooks: a `TorchFunctionMode` sees the operations themselves, so it is right where hooks
are not (padding modes, in-place activations, layers that run twice, functional use), and a use that
it has no rule for is seen too, and refused by name instead of being silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from rotate_ewc.layers import SUPPORTED
from rotate_ewc.options import Unsupported
from rotate_ewc.tracing.recorder import Computed, Recorder, Refusal, Use


@dataclass(frozen=True)
class Trace:
    """The uses of parameters that the outputs depend on, and the gradients at their outputs.

    Attributes:
        outputs: The model's outputs, attached to the autograd graph.
        uses: Every use of a tracked parameter, in the order in which they ran.
        edges: An edge to the output of every use.
        computed: The tensors computed from parameters that uses may name instead of them.
        unsupported: Parameters that have some use without a rule.
    """

    outputs: Tensor
    uses: tuple[Use, ...]
    edges: tuple[GradientEdge, ...]
    computed: Mapping[str, Computed]
    unsupported: frozenset[str]

    def gradients(self, vector: Tensor, *, last: bool) -> list[Tensor]:
        """Back-propagate one output vector.

        Args:
            vector: Of the outputs' shape.
            last: Whether the graph can be freed.

        Returns:
            For every use, the gradient at its output; zeros where the outputs do not depend on it.
        """
        gradients = back_propagate(self.outputs, self.edges, vector, retain_graph=not last)
        return [
            self.outputs.detach().new_zeros(use.output_shape)
            if gradient is None
            else gradient.reshape(use.output_shape)
            for gradient, use in zip(gradients, self.uses, strict=True)
        ]

    def check_inputs_unmodified(self) -> None:
        """Raise if a layer's input was changed in place after the layer used it."""
        for use in self.uses:
            if not use.unmodified:
                raise ValueError(
                    f"the input of the layer of {use.name!r} was modified in place after the layer "
                    f"used it, so its activations are lost; make that operation out-of-place"
                )


def back_propagate(
    outputs: Tensor,
    to: Sequence[Tensor] | Sequence[GradientEdge],
    vector: Tensor,
    *,
    retain_graph: bool,
) -> list[Tensor | None]:
    """Return the gradients at tensors or edges; None where none gets there."""
    if not to:
        return []
    # A backward pass computes in the dtypes of its forward pass; autocast would lower them.
    with torch.autocast(outputs.device.type, enabled=False):
        gradients = torch.autograd.grad(
            outputs,
            to,
            grad_outputs=vector.to(outputs.dtype),
            retain_graph=retain_graph,
            allow_unused=True,
        )
    return [None if gradient is None else gradient.detach() for gradient in gradients]


def trace(
    forward: Callable[[], Tensor],
    parameters: Mapping[str, Tensor],
    *,
    constants: Iterable[Tensor] = (),
    unsupported: Unsupported = Unsupported.ERROR,
) -> Trace:
    """Run a forward pass and record every use of the given parameters.

    Args:
        forward: Runs the model and returns its outputs.
        parameters: The tensors to look for, by name; they must require gradients.
        constants: Tensors that do not depend on the data, such as buffers.
        unsupported: What to do about uses that have no rule.

    Raises:
        TypeError: If the outputs are not a floating-point tensor.
        ValueError: If a parameter is used by an operation without a rule, or by one that cannot be
            observed, and `unsupported` says so.
    """
    recorder = Recorder(parameters, constants)
    with torch.enable_grad(), recorder:
        outputs = forward()
    if not isinstance(outputs, Tensor):
        raise TypeError(f"model returned {type(outputs).__name__}; expected a tensor")
    if not outputs.is_floating_point():
        raise TypeError(f"model returned dtype {outputs.dtype}; expected floating-point")
    nodes = _reachable_nodes(outputs, {})
    hidden = _hidden(recorder, parameters, nodes)
    if hidden and unsupported is not Unsupported.SKIP:
        raise ValueError(_hidden_message(hidden))
    refused = _refused(recorder, parameters, outputs, nodes)
    if refused and unsupported is Unsupported.ERROR:
        raise ValueError(_refusal_message(*next(iter(refused.items()))))
    kept = [i for i, edge in enumerate(recorder.edges) if edge.node in nodes]
    result = Trace(
        outputs,
        tuple(recorder.uses[i] for i in kept),
        tuple(recorder.edges[i] for i in kept),
        recorder.computed,
        frozenset(name for names in refused for name in names) | hidden,
    )
    result.check_inputs_unmodified()
    return result


def _refused(
    recorder: Recorder, parameters: Mapping[str, Tensor], outputs: Tensor, nodes: set[Any]
) -> dict[frozenset[str], str]:
    """Return the parameters that the outputs depend on through uses without a rule, and these.

    A use that was not seen is found in the autograd graph: from the outputs, past every operation
    that was seen only to the data it used, no parameter can be reached but through such a use.
    """
    reached: list[Refusal] = [r for r in recorder.refusals if r.edge.node in nodes]
    refused = {refusal.names: refusal.operation for refusal in reached}
    around = _reachable_nodes(outputs, recorder.data_nodes)
    unseen = _reached(parameters, around)
    unseen -= {name for names in refused for name in names}
    if unseen:
        refused[frozenset(unseen)] = (
            "an operation that cannot be observed, such as scripted code or an autograd.Function "
            "of its own"
        )
    return refused


def _hidden(
    recorder: Recorder, parameters: Mapping[str, Tensor], nodes: set[Any]
) -> frozenset[str]:
    """Return the parameters that the outputs may depend on, but not as far as autograd knows.

    The forward pass of an `autograd.Function` runs without gradients, and its backward pass may
    find those of parameters that are no arguments of it, as that of reentrant checkpoints does.
    """
    if not any(isinstance(node, BackwardCFunction) for node in nodes):
        return frozenset()
    return frozenset(recorder.hidden & parameters.keys()) - _reached(parameters, nodes)


def _reached(parameters: Mapping[str, Tensor], nodes: set[Any]) -> set[str]:
    """Return the names of the parameters to which nodes of an autograd graph lead."""
    variables = {id(node.variable) for node in nodes if hasattr(node, "variable")}
    return {name for name, tensor in parameters.items() if id(tensor) in variables}


def _hidden_message(names: frozenset[str]) -> str:
    listed = ", ".join(repr(name) for name in sorted(names))
    return (
        f"parameter {listed} is used while gradients are off, perhaps by an autograd.Function that "
        f"finds its gradient by itself, as torch.utils.checkpoint does with use_reentrant=True; "
        f"pass use_reentrant=False there, unsupported='skip' to protect only the others, or leave "
        f"it out (params, or exclude={sorted(names)})"
    )


def _refusal_message(names: frozenset[str], used_by: str) -> str:
    listed = ", ".join(repr(name) for name in sorted(names))
    return (
        f"parameter {listed} is used by {used_by}, for which there is no rule; supported are "
        f"{SUPPORTED}. Pass unsupported='diagonal' for an exact diagonal of such parameters (which "
        f"is slow), unsupported='skip' to protect only the others, or leave them out (params, or "
        f"exclude={sorted(names)})"
    )


def _reachable_nodes(outputs: Tensor, instead: Mapping[Any, Sequence[Any]]) -> set[Any]:
    """Return the nodes of the outputs' autograd graph.

    Args:
        outputs: Where to begin.
        instead: Where to go on from some nodes, instead of to all that they depend on.
    """
    nodes: set[Any] = set()
    pending = [outputs.grad_fn] if outputs.grad_fn is not None else []
    while pending:
        node = pending.pop()
        if node in nodes:
            continue
        nodes.add(node)
        if node in instead:
            pending.extend(instead[node])
        else:
            pending.extend(parent for parent, _ in node.next_functions if parent is not None)
    return nodes
