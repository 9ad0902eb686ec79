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

Spec = PrimitiveConstructorSpec[Any]

LARGEST_SEED = 2**32 - 1


def _spec(convert: Callable[[str], Any], metavar: str) -> Spec:
    """An option of one value."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: convert(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [f"{value:g}" if type(value) is float else str(value)],
    )


def _refuse(expected: str, word: str) -> ValueError:
    return ValueError(f"expected {expected}, got {word!r}")


def whole_number(smallest: int, largest: int | None = None, *, metavar: str = "N") -> Spec:
    """Whole numbers from ``smallest`` to ``largest``, both included."""
    expected = f"a whole number ≥ {smallest}" + (f" and ≤ {largest}" if largest else "")

    def convert(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            raise _refuse(expected, word) from None
        if value < smallest or (largest is not None and value > largest):
            raise _refuse(expected, word)
        return value

    return _spec(convert, metavar)


def number(*, zero: bool, largest: float = math.inf, metavar: str = "X") -> Spec:
    """Finite numbers above zero, and zero too where ``zero`` says so, up to a largest."""
    expected = f"a finite number {'≥' if zero else '>'} 0"
    if math.isfinite(largest):
        expected += f" and ≤ {largest:g}"

    def convert(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            raise _refuse(expected, word) from None
        outside = value < 0 or value > largest or (value == 0 and not zero)
        if not math.isfinite(value) or outside:
            raise _refuse(expected, word)
        return value

    return _spec(convert, metavar)


def one_of(names: Iterable[str], *, metavar: str = "NAME") -> Spec:
    """One of some names."""
    accepted = tuple(names)

    def convert(word: str) -> str:
        if word not in accepted:
            raise _refuse(f"one of {', '.join(accepted)}", word)
        return word

    return _spec(convert, metavar)


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
        str_from_instance=lambda values: [
            one.str_from_instance(value)[0] for value in values or ()
        ],
    )


def _folder(word: str) -> Path:
    path = Path(word)
    if path.exists() and not path.is_dir():
        raise ValueError(f"expected a folder, got the file '{path}'")
    return path


def _device(word: str) -> str:
    """Accept the name of a PyTorch device on which a tensor can be made here."""
    import torch

    try:
        torch.empty(1, device=word)
    # A missing driver, a build without CUDA and a mistyped name raise different errors.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        expected = "a device that PyTorch can use here, such as cpu or cuda:0"
        raise ValueError(f"expected {expected}, got {word!r} ({reason})") from None
    return word


def default(text: str) -> object:
    """What ``--help`` says about a default that is not one value."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")


def described(beginning: str, names: Iterable[str]) -> object:
    """Help that lists what there is."""
    return tyro.conf.arg(help=f"{beginning} of {', '.join(names)}.")


def renamed(name: str) -> object:
    """Another name on the command line than that of the field."""
    return tyro.conf.arg(name=name)


Count = Annotated[int, whole_number(1)]
CountOrZero = Annotated[int, whole_number(0)]
Positive = Annotated[float, number(zero=False)]
PositiveOrZero = Annotated[float, number(zero=True)]
_seeds = several(whole_number(0, LARGEST_SEED, metavar="SEED"))
Seeds = Annotated[tuple[int, ...], _seeds]
OptionalSeeds = Annotated[tuple[int, ...] | None, _seeds]
Threads = Annotated[int | None, whole_number(1), default("PyTorch's choice")]
Folder = Annotated[Path, _spec(_folder, "FOLDER")]
Device = Annotated[str, _spec(_device, "DEVICE")]
