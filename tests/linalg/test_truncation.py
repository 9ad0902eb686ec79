"""Which eigenvectors are kept, by numbers that are written out."""

from __future__ import annotations

import pytest
import torch

from rotate_ewc.linalg.truncation import Truncation, truncation_of

ALL = 10_000


def count(
    truncation: Truncation, *groups: list[float], dtype: torch.dtype = torch.float64, size: int = 0
) -> int:
    """How many are kept of eigenvalues, which are given in descending order."""
    values = torch.tensor(groups, dtype=dtype).flip(1)
    return truncation.count(values, values.sum(dim=1), size or values.shape[1])


def test_not_more_than_are_wanted() -> None:
    values = [5.0, 4.0, 3.0, 2.0, 1.0]
    for most in range(1, 6):
        assert count(Truncation(most), values) == most
    assert count(Truncation(ALL), values) == 5


def test_what_is_numerically_zero_counts_nothing() -> None:
    """Ten units in the last place of the largest; as many as the root of the size, if it is more.

    The group with the most counts; one is kept in any case.
    """
    eps = 2.0**-52
    assert count(Truncation(ALL), [2.0, 21 * eps, 19 * eps, 0.0]) == 2
    assert count(Truncation(ALL), [2.0, 20 * eps, 19 * eps, 0.0]) == 1
    assert count(Truncation(ALL), [2.0, 201 * eps, 199 * eps, 0.0], size=ALL) == 2
    assert count(Truncation(ALL), [2.0, 21 * eps, 0.0], size=100) == 2
    assert count(Truncation(ALL), [2.0, 23 * eps, 21 * eps], size=121) == 2
    single = 2.0**-23
    assert count(Truncation(ALL), [1.0, 11 * single, 9 * single], dtype=torch.float32) == 2
    assert count(Truncation(ALL), [2e-30, 21e-30 * eps, 19e-30 * eps]) == 2
    assert count(Truncation(ALL), [1.0, 0.0, 0.0], [1.0, 0.5, 0.0]) == 2
    assert count(Truncation(ALL), [0.0, 0.0, 0.0]) == 1
    assert count(Truncation(ALL), [-1.0, -2.0, -3.0]) == 1


def test_a_part_of_the_trace() -> None:
    """The fewest that make it up, in every group; never more than are wanted."""
    values = [5.0, 3.0, 1.0, 1.0]
    for part, expected in ((0.4, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (0.9, 3), (0.95, 4)):
        assert count(Truncation(ALL, part), values) == expected
    assert count(Truncation(ALL, 0.5), values, [1.0, 1.0, 1.0, 1.0]) == 2
    assert count(Truncation(ALL, 0.51), values, [1.0, 1.0, 1.0, 1.0]) == 3
    assert count(Truncation(1, 0.8), values) == 1
    assert count(Truncation(3, 1.0), values) == 3
    assert count(Truncation(ALL, 1.0), values) == 4
    # All that counts is all of the trace, whatever its rounding errors.
    ascending = torch.tensor([[1.0, 1.0, 3.0, 5.0]])
    assert Truncation(ALL, 1.0).count(ascending, torch.tensor([8.0]), 4) == 4
    # Of a trace to which directions add that are not among the eigenvalues.
    found = torch.tensor([[1.0, 3.0]])
    assert Truncation(ALL, 0.5).count(found, torch.tensor([6.0]), 9) == 1
    assert Truncation(ALL, 0.6).count(found, torch.tensor([6.0]), 9) == 2


def test_all_where_otherwise_more_than_half() -> None:
    values = [5.0, 4.0, 3.0, 2.0]
    assert count(Truncation(2, all_or_half=True), values) == 2
    assert count(Truncation(3, all_or_half=True), values) == 4
    assert count(Truncation(3), values) == 3
    assert count(Truncation(2, all_or_half=True), values, size=3) == 3
    assert count(Truncation(2, all_or_half=True), values, size=5) == 2


@pytest.mark.parametrize(
    ("rank", "size", "other", "expected"),
    [
        ("full", 5000, 10, None),
        (3, 5000, 10, Truncation(3)),
        (3, 2, 10, Truncation(2)),
        (0.9, 50, 10, Truncation(50, 0.9)),
        (1.0, 50, 10, Truncation(50, 1.0)),
        # Short sides, against eight times the other one, from 128 to 1024.
        ("auto", 128, 2, None),
        ("auto", 129, 2, Truncation(16, all_or_half=True)),
        ("auto", 160, 20, None),
        ("auto", 161, 20, Truncation(20, all_or_half=True)),
        ("auto", 1024, 500, None),
        ("auto", 1025, 500, Truncation(500, all_or_half=True)),
        # Biases.
        ("auto", 512, 1, None),
        ("auto", 513, 1, Truncation(16, all_or_half=True)),
        # No more entries than the parameter, unless it is nearly square.
        ("auto", 2000, 16, Truncation(16, all_or_half=True)),
        ("auto", 2000, 17, Truncation(17, all_or_half=True)),
        ("auto", 2000, 1000, Truncation(1000, all_or_half=True)),
        ("auto", 2000, 1001, Truncation(2000, all_or_half=True)),
    ],
)
def test_what_a_rank_means(
    rank: int | float | str, size: int, other: int, expected: Truncation | None
) -> None:
    assert truncation_of(rank, size, other) == expected
