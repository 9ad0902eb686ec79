"""Options that are crossed, so that all pairs of values meet and not all combinations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations, product
from typing import Any

import pytest

Choice = tuple[int, ...]


def crossed(**factors: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test with few combinations, in which any two values of two factors meet.

    Args:
        **factors: The values of each argument of the test.
    """
    values = [list(factor) for factor in factors.values()]
    chosen = [
        tuple(factor[place] for factor, place in zip(values, choice, strict=True))
        for choice in _choices([len(factor) for factor in values])
    ]
    return pytest.mark.parametrize(tuple(factors), chosen)


def _choices(sizes: list[int]) -> Iterator[Choice]:
    """Yield, again and again, the combination in which most pairs are new."""
    every = list(product(*map(range, sizes)))
    left = {pair for choice in every for pair in _pairs(choice)}
    while left:
        best = max(every, key=lambda choice: len(left & _pairs(choice)))
        left -= _pairs(best)
        yield best


def _pairs(choice: Choice) -> set[tuple[tuple[int, int], ...]]:
    return set(combinations(enumerate(choice), 2))
