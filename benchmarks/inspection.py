"""What a method keeps for the next task, looked at from outside."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from rotate_ewc import EKFACPenalty
from rotate_ewc.integrations.avalanche import RotatedEWCPlugin


def state_bytes(plugin: Any | None, model: nn.Module) -> int:
    """Bytes of all tensors that a plugin holds but the network's own; shared memory counts once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in _tensors(plugin, set())
    }
    return sum(size for place, size in kept.items() if place not in known)


def penalty_of(strategy: Any) -> EKFACPenalty:
    """The penalty of the rotated method among a strategy's plugins."""
    (plugin,) = (found for found in strategy.plugins if isinstance(found, RotatedEWCPlugin))
    penalty: EKFACPenalty = plugin.penalty
    return penalty


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that can be reached from a value through containers and attributes."""
    if id(value) in seen or value is None or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from _tensors(part, seen)
