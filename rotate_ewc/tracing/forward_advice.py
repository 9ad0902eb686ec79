"""Lines of code for whose data or outputs are not what is expected: how to write `forward=`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import unwrap
from typing import Any, Final

from torch import Tensor, nn

_FUNCTION: Final = "(for an operator, as model_func)"
_USUAL_TARGETS: Final = ("labels", "label", "targets", "target", "y")


def advice_for_outputs(outputs: Any, inputs: Any, forward: Callable[[Any], Any]) -> str:
    """Return what to do about outputs that are no tensor, with a line that takes one of them.

    Args:
        outputs: What the model returned.
        inputs: The batch's inputs.
        forward: What was called with them.
    """
    accessor = _accessor(outputs)
    if accessor is None:
        return f"pass forward=, a function from a batch's inputs to a tensor {_FUNCTION}"
    unpacked = isinstance(inputs, Mapping) and not isinstance(unwrap(forward), nn.Module)
    call = "model(**batch)" if unpacked else "model(batch)"
    return f"pass forward=lambda batch: {call}{accessor} {_FUNCTION}"


def advice_for_inputs(inputs: Any) -> str | None:
    """Return what to do where the model fails for inputs that may have to be unpacked."""
    if not isinstance(inputs, Mapping):
        return None
    return (
        f"the batch's inputs are a {type(inputs).__name__} with {list(inputs)}, and were given to "
        f"the model as one argument; to unpack them, pass forward=lambda batch: "
        f"model(**batch).logits {_FUNCTION}"
    )


def advice_for_batch(batch: Mapping[Any, Any]) -> str:
    """Return how to cut a dictionary into inputs and targets."""
    target = next((name for name in _USUAL_TARGETS if name in batch), next(iter(batch), "labels"))
    return (
        f"take data=[({{k: v for k, v in batch.items() if k != {target!r}}}, batch[{target!r}]) "
        f"for batch in data], and forward=lambda batch: model(**batch).logits {_FUNCTION}"
    )


def _accessor(outputs: Any) -> str | None:
    """Return the code that takes the (first) floating-point tensor of outputs."""
    if _is_output(getattr(outputs, "logits", None)):
        return ".logits"
    if isinstance(outputs, Mapping):
        return next((f"[{k!r}]" for k, v in outputs.items() if _is_output(v)), None)
    if isinstance(outputs, (tuple, list)):
        return next((f"[{i}]" for i, v in enumerate(outputs) if _is_output(v)), None)
    fields = getattr(outputs, "__dict__", {})
    return next((f".{k}" for k, v in fields.items() if _is_output(v)), None)


def _is_output(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0
