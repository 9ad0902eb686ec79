"""Run the model once: what used its parameters, and the gradients there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from rotate_ewc._utils.messages import quoted
from rotate_ewc._utils.numerics import without_autocast
from rotate_ewc._utils.warnings import add_note
from rotate_ewc.options import Unsupported
from rotate_ewc.tracing.autograd_graph import reachable_nodes, unsupported_parameters
from rotate_ewc.tracing.forward_advice import advice_for_inputs, advice_for_outputs
from rotate_ewc.tracing.origins import NO_CONSTANTS, Computed, Constants
from rotate_ewc.tracing.program import Program
from rotate_ewc.tracing.recorder import Recorder, Use


@dataclass(frozen=True)
class ForwardPass:
    """The uses of parameters that the outputs depend on, and the gradients at their outputs.

    Attributes:
        outputs: The model's outputs, attached to the autograd graph.
        uses: Every use of a tracked parameter, in the order in which they ran.
        edges: An edge to the output of every use.
        computed: The tensors computed from parameters that uses may name instead of them.
        unsupported: Parameters that have some use without a rule.
        program: What was called.
    """

    outputs: Tensor
    uses: tuple[Use, ...]
    edges: tuple[GradientEdge, ...]
    computed: Mapping[str, Computed]
    unsupported: frozenset[str]
    program: Program

    def sources(self, use: Use) -> frozenset[str]:
        """Return the names of the parameters in a use, or of those that they are computed from."""
        names = [name for name in (use.weight, use.bias) if name is not None]
        found = [self.computed[n].sources if n in self.computed else {n} for n in names]
        return frozenset[str]().union(*found)

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


def record_forward(
    forward: Callable[[Any], Tensor],
    inputs: Any,
    parameters: Mapping[str, Tensor],
    *,
    constants: Constants = NO_CONSTANTS,
    unsupported: Unsupported = Unsupported.ERROR,
) -> ForwardPass:
    """Run a forward pass and record every use of the given parameters.

    Args:
        forward: From a batch's inputs to the model's outputs.
        inputs: The batch's inputs.
        parameters: The tensors to look for, by name; they must require gradients.
        constants: Tensors that do not depend on the data.
        unsupported: What to do about uses that have no rule.

    Raises:
        TypeError: If the outputs are not a floating-point tensor.
        ValueError: If a parameter is used by an operation without a rule, or by one that cannot be
            observed, and `unsupported` says so; or if a layer's input was modified after its use.
    """
    recorder = Recorder(parameters, constants, inputs)
    with torch.enable_grad():
        with recorder:
            outputs = call(forward, inputs)
        outputs = recorder.note_outputs(outputs)
    if recorder.impossible:
        reasons = recorder.impossible.items()
        raise ValueError(
            "; ".join(f"parameter {quoted(sorted(names))}: {why}" for why, names in reasons)
        )
    if not isinstance(outputs, Tensor):
        advice = advice_for_outputs(outputs, inputs, forward)
        raise TypeError(f"model returned {type(outputs).__name__}; expected a tensor: {advice}")
    if not outputs.is_floating_point():
        raise TypeError(f"model returned dtype {outputs.dtype}; expected floating-point")
    nodes = reachable_nodes(outputs.grad_fn)
    without_rule = unsupported_parameters(
        outputs.grad_fn,
        nodes,
        parameters,
        recorder.refusals,
        recorder.data_nodes,
        recorder.hidden,
        unsupported,
    )
    kept = [i for i, edge in enumerate(recorder.edges) if edge.node in nodes]
    uses = tuple(recorder.uses[i] for i in kept)
    changed = sorted({name for use in uses for name in recorder.changed(use)})
    if changed:
        raise ValueError(
            f"what was computed from {quoted(changed)} was modified in place after it was used, so "
            f"its gradient is lost; make that operation out-of-place"
        )
    modified = list(dict.fromkeys(use.name for use in uses if not use.unmodified))
    if modified:
        raise ValueError(
            f"the input of the layer of {quoted(modified)} was modified in place after the layer "
            f"used it, so its activations are lost; make that operation out-of-place"
        )
    edges = tuple(recorder.edges[i] for i in kept)
    return ForwardPass(
        outputs,
        uses,
        edges,
        recorder.computed,
        without_rule,
        recorder.program,
    )


def back_propagate(
    outputs: Tensor,
    to: Sequence[Tensor] | Sequence[GradientEdge],
    vector: Tensor,
    *,
    retain_graph: bool,
) -> list[Tensor | None]:
    """Return the gradients of `outputs · vector` at tensors or edges; None where none gets there.

    Args:
        outputs: The model's outputs, attached to the autograd graph.
        to: Where gradients are wanted.
        vector: Of the outputs' shape.
        retain_graph: Whether another vector will follow.
    """
    if not to:
        return []
    # A backward pass computes in the dtypes of its forward pass; autocast would lower them.
    with without_autocast(outputs.device):
        gradients = torch.autograd.grad(
            outputs,
            to,
            grad_outputs=vector.to(outputs.dtype),
            retain_graph=retain_graph,
            allow_unused=True,
        )
    return [None if gradient is None else gradient.detach() for gradient in gradients]


def call(forward: Callable[[Any], Any], inputs: Any) -> Any:
    """Run a model, and note on its errors that it may not take one argument of several parts."""
    try:
        return forward(inputs)
    except Exception as error:
        # One that takes a pair may fail for other reasons.
        may_be = isinstance(inputs, Mapping) or isinstance(error, TypeError)
        advice = advice_for_inputs(inputs) if may_be else None
        if advice and isinstance(unwrap(forward), nn.Module):
            add_note(error, advice)
        raise
