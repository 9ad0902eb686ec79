"""Checks of single option values, for ``argparse`` to call on the words of a command line.

Each returns a function from a word to its value that raises ``argparse.ArgumentTypeError`` with
what was expected and what it got; ``argparse`` puts the name of the option in front.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from typing import TypeVar

Value = TypeVar("Value")

LARGEST_SEED = 2**32 - 1


def _refuse(expected: str, word: str) -> argparse.ArgumentTypeError:
    """The error of every check, so that all messages read alike."""
    return argparse.ArgumentTypeError(f"expected {expected}, got {word!r}")


def whole_number(smallest: int, largest: int | None = None) -> Callable[[str], int]:
    """Accept whole numbers from ``smallest`` to ``largest``, both included."""
    expected = f"a whole number ≥ {smallest}" + (f" and ≤ {largest}" if largest else "")

    def convert(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            raise _refuse(expected, word) from None
        if value < smallest or (largest is not None and value > largest):
            raise _refuse(expected, word)
        return value

    return convert


def number(*, zero: bool, largest: float = math.inf) -> Callable[[str], float]:
    """Accept finite numbers above zero, and zero too where ``zero`` says so, up to a largest."""
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

    return convert


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """Accept one of some names."""
    accepted = tuple(names)

    def convert(word: str) -> str:
        if word not in accepted:
            raise _refuse(f"one of {', '.join(accepted)}", word)
        return word

    return convert


def several(convert_one: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """Accept values joined by commas; each word of the command line becomes a list."""

    def convert(word: str) -> list[Value]:
        return [convert_one(part) for part in word.split(",") if part.strip()]

    return convert


def device(word: str) -> str:
    """Accept the name of a PyTorch device on which a tensor can be made here."""
    import torch

    try:
        torch.empty(1, device=word)
    # A missing driver, a build without CUDA and a mistyped name raise different errors.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise argparse.ArgumentTypeError(
            f"expected a device that PyTorch can use here, such as cpu or cuda:0, "
            f"got {word!r} ({reason})"
        ) from None
    return word
