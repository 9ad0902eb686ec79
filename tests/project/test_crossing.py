"""Options of tests that are crossed by pairs."""

from itertools import combinations

from tests.helpers.crossing import crossed


def test_all_pairs_meet_in_few_combinations() -> None:
    factors = {"a": range(5), "b": "xy", "c": [True, False], "d": [None, 1, 2]}
    mark = crossed(**factors).mark
    names, chosen = mark.args
    assert names == tuple(factors)
    for (i, one), (j, other) in combinations(enumerate(factors.values()), 2):
        assert {(c[i], c[j]) for c in chosen} == {(x, y) for x in one for y in other}
    assert len(chosen) < 20  # of 60
