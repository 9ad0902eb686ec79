"""What the options of a penalty may be, in its constructor and when they are set later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Final

from torch import nn

from rotate_ewc._utils.validation import (
    as_choice,
    as_non_negative_number,
    as_part,
    as_patterns,
    as_positive_number,
    check_boolean,
    unless_auto,
)
from rotate_ewc.options import EstimationSettings, Mode, Weighting

_SETTINGS: Final = frozenset(field.name for field in fields(EstimationSettings))


def checked_option(penalty: nn.Module, name: str, value: Any) -> Any:
    """Return what a penalty is to hold as one of its attributes.

    Args:
        penalty: The penalty.
        name: The attribute, which need not be an option.
        value: What somebody wants it to be.

    Raises:
        ValueError: If an option is out of range, or cannot be changed any more.
        TypeError: If an option has the wrong type, or is one of `penalty.settings`.
    """
    # Classes of the user's own may have attributes of any name.
    if name in _SETTINGS and type(penalty).__module__.startswith("rotate_ewc."):
        raise TypeError(
            f"penalty.{name} cannot be set, because it is a setting of the estimate; expected "
            f"penalty.settings = dataclasses.replace(penalty.settings, {name}={value!r:.99})"
        )
    check = _CHECKS.get(name)
    if check is None:
        return value
    value = check(name, value)
    before = vars(penalty).get(name, value)
    if name in ("mode", "weighting") and value is not before and vars(penalty)["_terms"]:
        raise ValueError(
            f"{name} is {value!r}, but the penalty has consolidated tasks with {before!r}; "
            f"expected that, or a new penalty: EKFACPenalty({name}={value!r})"
        )
    return value


def _decay(name: str, value: object) -> float:
    number = as_non_negative_number(name, value)
    if number > 1:
        raise ValueError(f"{name} is {value}; expected a number from 0 to 1")
    return number


def _temperature(name: str, value: Any) -> Any:
    unless_auto(as_positive_number, name, value)
    return value


def _boolean(name: str, value: object) -> object:
    check_boolean(name, value)
    return value


def _settings(name: str, value: object) -> EstimationSettings:
    if not isinstance(value, EstimationSettings):
        raise TypeError(f"{name} is {type(value).__name__}; expected EstimationSettings")
    return value


_CHECKS: Final[Mapping[str, Callable[[str, Any], Any]]] = {
    "mode": lambda name, value: as_choice(name, value, Mode),
    "weighting": lambda name, value: as_choice(name, value, Weighting),
    "plasticity": as_part,
    "decay": _decay,
    "temperature": _temperature,
    "damping": as_non_negative_number,
    "include": as_patterns,
    "exclude": as_patterns,
    "strict": _boolean,
    "sharded": _boolean,
    "settings": _settings,
}
