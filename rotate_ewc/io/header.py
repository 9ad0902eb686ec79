"""The formats of snapshots, and how those of older formats are read.

An older snapshot is first rewritten, in memory, into the present format, and then read as if it had
been written today; `tests/data` has a file of every format.

| format | since | what changed |
|---|---|---|
| 1 | 0.1, before its release | |
| 2 | 0.1 | one header, which describes all tensors and how they were made; files have a digest |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor

from rotate_ewc.errors import SnapshotError
from rotate_ewc.version import __version__

HEADER: Final = "header"
LIBRARY: Final = f"rotate_ewc {__version__}"
OPERATOR: Final = "rotate_ewc.operator/2"
PENALTY: Final = "rotate_ewc.penalty/2"

# Of a penalty's header, the shape of a block has the most.
_MOST_LEVELS: Final = 10

_FIRST_OPERATOR: Final = "rotate_ewc.operator/1"
_FIRST_PENALTY: Final = "rotate_ewc.penalty/1"


def read_header(state: Mapping[str, Any], expected: str | None = None) -> dict[str, Any]:
    """Return a snapshot's header as a dictionary.

    Args:
        state: The snapshot.
        expected: The format it must have; None is any.

    Raises:
        SnapshotError: If there is none, or it is of another format.
    """
    if not isinstance(state, Mapping):
        raise SnapshotError(f"snapshot is {type(state).__name__}; expected a dictionary")
    for key in state:
        if not isinstance(key, str):
            raise SnapshotError(f"snapshot has the key {key!r:.99}; expected all to be strings")
    text = state.get(HEADER)
    if not isinstance(text, str):
        raise SnapshotError(
            f"snapshot key {HEADER!r} is {type(text).__name__}; expected a JSON string, as "
            f"state_dict() writes it"
        )
    try:
        header = json.loads(text)
    # Brackets in brackets in brackets end in the second.
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"snapshot key {HEADER!r} is not JSON: {error}") from None
    got = header.get("format") if isinstance(header, dict) else None
    if not isinstance(header, dict) or not isinstance(got, str) or expected not in (None, got):
        raise SnapshotError(f"snapshot format is {got!r:.99}; expected {expected or OPERATOR!r}")
    if _levels(header) > _MOST_LEVELS:
        raise SnapshotError(
            f"snapshot key {HEADER!r} has lists in lists, more than {_MOST_LEVELS} deep; expected "
            f"what state_dict() writes"
        )
    return header


def _levels(value: object) -> int:
    """Count how deep lists and dictionaries are in each other, up to what is too deep."""
    levels, layer = 0, list[Any]([value])
    while layer and levels <= _MOST_LEVELS:
        inside = (v.values() if isinstance(v, dict) else v for v in layer)
        layer = [v for values in inside for v in values if isinstance(v, (dict, list))]
        levels += 1
    return levels


def upgraded(state: Mapping[str, Any], expected: str) -> Mapping[str, Any]:
    """Return a snapshot in the present format.

    Args:
        state: A snapshot of any format.
        expected: The present format of its kind.

    Raises:
        SnapshotError: If its format is not known, perhaps because it is of a later version.
    """
    got = read_header(state)["format"]
    if got == expected:
        return state
    upgrades: dict[str, tuple[str, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
        OPERATOR: (_FIRST_OPERATOR, _operator_of_first),
        PENALTY: (_FIRST_PENALTY, _penalty_of_first),
    }
    older, upgrade = upgrades[expected]
    if got != older:
        raise SnapshotError(
            f"snapshot format is {got!r:.99}; expected {expected!r} or {older!r}: it is of another "
            f"kind, or was written by a later version than {LIBRARY}"
        )
    try:
        return upgrade(state)
    except SnapshotError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SnapshotError(f"snapshot key {HEADER!r} is incomplete: {error}") from None


def _operator_of_first(state: Mapping[str, Any]) -> dict[str, Any]:
    header, tensors = _described_by_first(state)
    return {HEADER: json.dumps({"format": OPERATOR, "library": "", **header}), **tensors}


def _penalty_of_first(state: Mapping[str, Any]) -> dict[str, Any]:
    """The operators of terms had headers of their own."""
    header = read_header(state, _FIRST_PENALTY)
    upgraded_state: dict[str, Any] = {}
    terms = []
    for index, weight in enumerate(header.pop("weights")):
        own = f"{index}/operator/"
        below = {key[len(own) :]: value for key, value in state.items() if key.startswith(own)}
        description, tensors = _described_by_first(below)
        terms.append({"weight": weight, "operator": description})
        upgraded_state.update({own + key: value for key, value in tensors.items()})
    headers = {HEADER, *(f"{index}/operator/{HEADER}" for index in range(len(terms)))}
    others = {k: v for k, v in state.items() if k not in headers and k not in upgraded_state}
    header |= {"format": PENALTY, "library": "", "options": {}, "terms": terms}
    return {HEADER: json.dumps(header), **others, **upgraded_state}


def _described_by_first(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Describe the blocks by the tensors that there are, which was all that there was to go by."""
    header = read_header(state, _FIRST_OPERATOR)
    tensors = {key: value for key, value in state.items() if key != HEADER}
    blocks = []
    for block in header["blocks"]:
        label = "+".join(block["parameters"])
        eigenvalues = tensors.get(f"{label}/eigenvalues")
        if not isinstance(eigenvalues, Tensor):
            raise SnapshotError(f"snapshot key {label + '/eigenvalues'!r} is missing or no tensor")
        bases = [n for n in ("gradient_basis", "activation_basis") if f"{label}/{n}" in tensors]
        description = {
            "shape": list(eigenvalues.shape),
            "dtype": str(eigenvalues.dtype).removeprefix("torch."),
            "bases": bases,
        }
        blocks.append({**block, **description})
    provenance = {**header["provenance"], "settings": {}}
    parameters = header["parameters"]
    return {"parameters": parameters, "blocks": blocks, "provenance": provenance}, tensors
