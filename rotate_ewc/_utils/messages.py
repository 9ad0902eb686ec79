"""Name several things in one message, shortened where there are many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

_MOST: Final = 10


def listed(items: Iterable[str]) -> str:
    """Return what a message says of several things: the first ten, and how many more there are."""
    shown = list(items)
    more = len(shown) - _MOST
    return ", ".join(shown) if more <= 0 else f"{', '.join(shown[:_MOST])} and {more} more"


def quoted(names: Iterable[str]) -> str:
    """Return names as messages list them."""
    return listed(map(repr, names))


def parameters_are(names: Iterable[str]) -> str:
    """Return the subject of a sentence on parameters, and its verb."""
    return _about(list(names), "is", "are")


def parameters_have(names: Iterable[str]) -> str:
    """Return the subject of another sentence on parameters, and its verb."""
    return _about(list(names), "has", "have")


def _about(names: Sequence[str], verb: str, plural: str) -> str:
    one = len(names) == 1
    return f"parameter{'' if one else 's'} {quoted(names)} {verb if one else plural}"


def left_out(names: Iterable[str]) -> str:
    """Return the advice to leave parameters out, ready to paste where they are few."""
    named = list(names)
    exclude = f"exclude={named}" if len(named) <= _MOST else "exclude"
    return f"leave {'it' if len(named) == 1 else 'them'} out (params, or {exclude})"
