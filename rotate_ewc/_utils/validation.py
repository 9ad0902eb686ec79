"""Checks of a user's arguments; their errors say what was got and what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Final, TypeVar

EnumType = TypeVar("EnumType", bound=Enum)

AUTO: Final = "auto"
FULL: Final = "full"

Rank = int | float | str
"""How many directions of a side are kept; see `EstimationSettings`."""


def as_choice(name: str, value: object, choices: type[EnumType]) -> EnumType:
    """Turn a member of `choices`, or what stands for it, into the member.

    Raises:
        ValueError: If `value` is neither, naming the argument and the accepted values.
    """
    try:
        return choices(value)
    except ValueError:
        accepted = ", ".join(repr(choice.value) for choice in choices)
        raise ValueError(f"{name} is {value!r}; expected one of {accepted}") from None


def check_positive_integer(name: str, value: object, *, optional: bool = False) -> None:
    """Raise unless `value` is a positive integer (or None, where that is allowed)."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; expected a positive integer")
    if value < 1:
        raise ValueError(f"{name} is {value}; expected a positive integer")


def check_boolean(name: str, value: object) -> None:
    """Raise unless `value` is True or False; other values would count as one or the other."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected True or False")


def as_non_negative_number(name: str, value: object) -> float:
    """Return `value` as a float, or raise unless it is a finite number of at least zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; expected a number of at least 0")
    try:
        number = float(value)
    except OverflowError:
        # An integer, which may also be too long to be written out.
        raise ValueError(f"{name} is too large; expected a finite number of at least 0") from None
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} is {value}; expected a finite number of at least 0")
    return number


def as_positive_number(name: str, value: object) -> float:
    """Return `value` as a float, or raise unless it is a finite number of more than zero."""
    number = as_non_negative_number(name, value)
    if number == 0:
        raise ValueError(f"{name} is {value}; expected more than 0")
    return number


def as_part(name: str, value: object) -> float:
    """Return `value` as a float, or raise unless it is a number between zero and one."""
    number = as_non_negative_number(name, value)
    if not 0 < number < 1:
        raise ValueError(f"{name} is {value}; expected more than 0 and less than 1")
    return number


def unless_auto(check: Callable[[str, object], float], name: str, value: object) -> float | None:
    """Return the checked `value`, or None for `"auto"`, which errors mention as a choice."""
    if isinstance(value, str) and value == AUTO:
        return None
    try:
        return check(name, value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}, or {AUTO!r}") from None


def as_patterns(name: str, value: object) -> tuple[str, ...]:
    """Return name patterns as a tuple, or raise unless `value` is a sequence of strings."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} is {value!r}; expected a list of name patterns")
    if not all(isinstance(pattern, str) for pattern in value):
        raise TypeError(f"{name} is {value!r}; expected every pattern to be a string")
    return tuple(value)


def as_rank(name: str, value: object) -> Rank | dict[str, Rank]:
    """Return a rank, or a dictionary of ranks by name patterns, or raise unless it is one.

    Raises:
        ValueError: If a number or a string is none of those that there are, or there is no pattern.
        TypeError: If the value has the wrong type.
    """
    if not isinstance(value, Mapping):
        return _one_rank(name, value)
    if not value:
        raise ValueError(f"{name} is empty; expected at least one pattern, such as {{'*': 64}}")
    if strange := [key for key in value if not isinstance(key, str)]:
        raise TypeError(f"{name} has the keys {strange}; expected name patterns")
    return {key: _one_rank(f"{name}[{key!r}]", rank) for key, rank in value.items()}


def _one_rank(name: str, value: object) -> Rank:
    expected = (
        f"expected a positive integer, a part of the trace (more than 0, at most 1.0), {AUTO!r} or "
        f"{FULL!r}"
    )
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"{name} is {value!r}; {expected}, or a mapping from patterns to these")
    if isinstance(value, str):
        valid = value in (AUTO, FULL)
    else:
        valid = value >= 1 if isinstance(value, int) else 0 < value <= 1
    if not valid:
        raise ValueError(f"{name} is {value!r}; {expected}")
    return value
