"""Nested values of a loader's batches."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch

from rotate_ewc._utils.tree import same

Pair = namedtuple("Pair", "x y")


class Incomparable:
    """What raises when it is compared, as arrays of several entries do."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("the truth value is ambiguous")

    __hash__ = None  # type: ignore[assignment]


def ones(*shape: int, **options: Any) -> torch.Tensor:
    return torch.ones(*shape, **options)


THING = Incomparable()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ones(2), ones(2)),
        ((ones(2), [ones(3), 1]), (ones(2), [ones(3), 1])),
        ({"a": ones(2), "b": "text"}, {"a": ones(2), "b": "text"}),
        (Pair(ones(2), None), Pair(ones(2), None)),
        (THING, THING),
        ([], []),
    ],
)
def test_the_same(one: Any, other: Any) -> None:
    assert same(one, other)
    assert same(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ones(2), ones(3)),
        (ones(2), ones(2, 1)),
        (ones(2), 2 * ones(2)),
        (ones(2), ones(2, dtype=torch.float64)),
        (ones(2), ones(2, device="meta")),
        (ones(2, device="meta"), ones(2, device="meta")),
        (ones(2), 1),
        (ones(2), torch.nn.Parameter(ones(2))),
        ((ones(2),), [ones(2)]),
        ((ones(2),), (ones(2), ones(2))),
        ([ones(2), 1], [ones(2), 2]),
        ({"a": ones(2)}, {"b": ones(2)}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (Pair(ones(2), 0), (ones(2), 0)),
        (Incomparable(), Incomparable()),
        (float("nan"), float("nan")),
    ],
)
def test_not_the_same(one: Any, other: Any) -> None:
    assert not same(one, other)
    assert not same(other, one)
