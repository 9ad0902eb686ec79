"""Types of options, with what tyro needs to read their values from a command line.

A value that is refused raises ``ValueError`` with what was expected and what was got; tyro puts the
name of the option in front.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from benchmarks.methods import AUTO

Spec = PrimitiveConstructorSpec[Any]

LARGEST_SEED = 2**32 - 1


def _spec(
    convert: Callable[[str], Any],
    metavar: str,
    expected: str,
    accepts: Callable[[Any], bool] = lambda value: True,
) -> Spec:
    """An option of one value, which ``convert`` makes or refuses, and ``accepts`` looks at."""

    def read(words: Sequence[str]) -> Any:
        try:
            value = convert(words[0])
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise ValueError(f"expected {expected}, got {words[0]!r}")
        return value

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [f"{value:g}" if type(value) is float else str(value)],
    )


def whole_number(smallest: int, largest: int | None = None, *, metavar: str = "N") -> Spec:
    """Whole numbers from ``smallest`` to ``largest``, both included."""
    expected = f"a whole number ≥ {smallest}" + (f" and ≤ {largest}" if largest else "")
    return _spec(int, metavar, expected, lambda n: smallest <= n <= (largest or math.inf))


def number(
    *, zero: bool, largest: float = math.inf, below: float = math.inf, auto: bool = False
) -> Spec:
    """Finite numbers above zero, or from zero, up to a largest or below a bound; or ``"auto"``."""
    expected = f"a finite number {'≥' if zero else '>'} 0"
    expected += f" and ≤ {largest:g}" * math.isfinite(largest)
    expected += f" and < {below:g}" * math.isfinite(below) + ", or auto" * auto
    smallest = 0.0 if zero else math.ulp(0.0)

    def convert(word: str) -> float | str:
        return AUTO if auto and word == AUTO else float(word)

    return _spec(
        convert, "X", expected, lambda x: x == AUTO or (smallest <= x <= largest and x < below)
    )


def one_of(names: Iterable[str], *, metavar: str = "NAME") -> Spec:
    """One of some names."""
    accepted = tuple(names)
    return _spec(str, metavar, f"one of {', '.join(accepted)}", accepted.__contains__)


def several(one: Spec, *, repeated: bool = False) -> Spec:
    """One or more values with spaces between them, each once unless ``repeated`` says otherwise."""

    def convert(words: Sequence[str]) -> tuple[Any, ...]:
        if not words:
            raise ValueError("expected at least one value, got none")
        values = tuple(one.instance_from_str([word]) for word in words)
        twice = [value for value in values if values.count(value) > 1]
        if twice and not repeated:
            raise ValueError(f"expected every value once, got {twice[0]} more than once")
        return values

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"{one.metavar} ...",
        instance_from_str=convert,
        is_instance=lambda value: True,
        str_from_instance=lambda values: [one.str_from_instance(v)[0] for v in values or ()],
    )


def some_of(names: Iterable[str]) -> Spec:
    """An option of some of several names."""
    return several(one_of(names))


def _usable(device: str) -> bool:
    """Whether a tensor can be made on a device of PyTorch here."""
    import torch

    try:
        torch.empty(1, device=device)
    except Exception:  # no driver, a build without CUDA and a mistyped name raise different errors
        return False
    return True


def default(text: str) -> object:
    """What ``--help`` says about a default that is not one value."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")


Count = Annotated[int, whole_number(1)]
CountOrZero = Annotated[int, whole_number(0)]
Positive = Annotated[float, number(zero=False)]
PositiveOrAuto = Annotated[float | str, number(zero=False, auto=True)]
StrengthOrAuto = Annotated[float | str, number(zero=True, auto=True)]
_seeds = several(whole_number(0, LARGEST_SEED, metavar="SEED"))
Seeds = Annotated[tuple[int, ...], _seeds]
OptionalSeeds = Annotated[tuple[int, ...] | None, _seeds]
Threads = Annotated[int | None, whole_number(1), default("PyTorch's choice")]
_folder = _spec(Path, "FOLDER", "a folder", lambda path: path.is_dir() or not path.exists())
Folder = Annotated[Path, _folder]
OptionalFolder = Annotated[Path | None, _folder]
Device = Annotated[
    str, _spec(str, "DEVICE", "a device that PyTorch can use here, as cpu or cuda:0", _usable)
]
