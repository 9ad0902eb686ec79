"""What a method keeps for the next task, looked at from outside."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rotate_ewc import EKFACPenalty
from rotate_ewc.integrations.avalanche import RotatedEWCPlugin

RANKS_PER_BLOCK = 40

Spectra = dict[str, dict[str, list[float]]]


def state_bytes(plugin: Any | None, model: nn.Module) -> int:
    """Bytes of all tensors that a plugin holds, those of the network in training not included.

    Args:
        plugin: An Avalanche plugin, if any.
        model: The network.

    Returns:
        Anchors, importances, copies of networks, whatever there is; memory that several tensors
        share counts once.
    """
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


def spectra(plugin: Any | None) -> Spectra:
    """Eigenvalues of a rotated method's merged snapshot, block by block.

    Args:
        plugin: An Avalanche plugin, if any.

    Returns:
        For each block its largest eigenvalues at evenly spaced logarithms of the rank::

            {"0.weight": {"ranks": [1, 2, ...], "eigenvalues": [...], "dimension": [78400]}}

        Empty for methods that have no snapshot of that kind.
    """
    terms: Sequence[Any] = getattr(getattr(plugin, "penalty", None), "terms", ())
    if len(terms) != 1:
        return {}
    return {block.label: _at_ranks(block.eigenvalues) for block in terms[0].operator.blocks}


def _at_ranks(eigenvalues: Tensor) -> dict[str, list[float]]:
    """A selection of eigenvalues in descending order."""
    values: list[float] = sorted(eigenvalues.reshape(-1).tolist(), reverse=True)
    steps = RANKS_PER_BLOCK - 1
    ranks = sorted({round(len(values) ** (step / steps)) for step in range(steps + 1)})
    return {
        "ranks": [float(rank) for rank in ranks],
        "eigenvalues": [values[rank - 1] for rank in ranks],
        "dimension": [float(len(values))],
    }
