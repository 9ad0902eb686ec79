"""Lines of code for whose data or outputs are not what is expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import unwrap
from typing import Any, Final

from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

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
    if isinstance(inputs, Mapping):
        kind, stars = f"{type(inputs).__name__} with {list(inputs)}", "**"
    elif isinstance(inputs, (tuple, list)):
        kind, stars = f"{type(inputs).__name__} of {len(inputs)} items", "*"
    else:
        return None
    return (
        f"the batch's inputs are a {kind}, and were given to the model as one argument; to unpack "
        f"them, pass forward=lambda batch: model({stars}batch) {_FUNCTION}"
    )


def advice_for_data(data: object) -> str | None:
    """Return what is wrong with data that are no batches, and what to pass; None if they may be."""
    kind = type(data).__name__
    is_examples = isinstance(data, Dataset) and not isinstance(data, IterableDataset)
    # Those of Hugging Face are no data sets of torch.
    if is_examples or (type(data).__module__.startswith("datasets.") and hasattr(data, "select")):
        return (
            f"{kind}, a data set of single examples; expected batches: pass "
            f"torch.utils.data.DataLoader(data, batch_size=100), with the collate_fn of training "
            f"(or batch_size=None, if each item is a batch)"
        )
    if isinstance(data, Mapping):
        return f"{kind} with {list(data)}, as one batch is; expected a list of batches: pass [data]"
    if not isinstance(data, (tuple, list)) or len(data) != 2 or not isinstance(data[1], Tensor):
        return None
    inputs, targets = data
    is_batch = isinstance(inputs, Mapping) or (
        isinstance(inputs, Tensor)
        and (
            isinstance(data, tuple) or (inputs.dtype, inputs.ndim) != (targets.dtype, targets.ndim)
        )
    )
    if not is_batch:
        return None
    return (
        f"a {kind} of inputs and targets, as one batch is; expected a list of batches: pass [data] "
        f"(or a list of tensors, if these are two batches of inputs alone)"
    )


def advice_for_batch(batch: Any) -> str:
    """Return how to make inputs and targets of a batch that has another form."""
    if isinstance(batch, (tuple, list)):
        return _advice_for_items(len(batch))
    if not isinstance(batch, Mapping):
        return ""
    target = next((name for name in _USUAL_TARGETS if name in batch), None)
    known = "" if target else f", where 'TARGET' is the one of {list(batch)} that is the target"
    target = target or "TARGET"
    return (
        f": take data=[({{k: v for k, v in batch.items() if k != {target!r}}}, batch[{target!r}]) "
        f"for batch in data]{known}, and forward=lambda batch: model(**batch) {_FUNCTION}"
    )


def _advice_for_items(count: int) -> str:
    """Return how to take inputs and targets from a number of items."""
    if count == 1:
        return (
            ": if they are inputs alone, and the loss or fisher_type needs no targets, take "
            "data=[x for (x,) in data]"
        )
    if not count:
        return ""
    return (
        f": if the model needs only the first item, and the second is the target, take "
        f"data=[(x, y) for x, y, *_ in data]; if it needs the others too, take "
        f"data=[((x, *rest), y) for x, y, *rest in data] and forward=lambda batch: model(*batch) "
        f"{_FUNCTION}; if the target is the last item, take the same forward, and "
        f"data=[(tuple(rest), y) for *rest, y in data]"
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
