"""The order that methods are expected to have."""

import pytest

from benchmarks.suite.orderings import orderings
from tests.benchmarks.suite_records import experiment, flat, result


def reached(*accuracies: tuple[str, float], scenario: str = "permuted_mnist"):
    """An experiment with what some methods reached."""
    results = [result(label, tested=[flat(label, value)]) for label, value in accuracies]
    return experiment(*results, scenario=scenario)


def test_neighbours_are_compared_from_the_best_to_the_worst() -> None:
    found = orderings([reached(("naive", 0.5), ("ewc", 0.7), ("rotated-adam", 0.9))])
    assert [(one.better, one.worse) for one in found] == [
        ("rotated-adam", "ewc"),
        ("ewc", "naive"),
    ]
    assert all(one.holds for one in found)
    assert str(found[0]) == "permuted_mnist: rotated-adam 90.00% > ewc 70.00%"


@pytest.mark.parametrize("better", [0.5, 0.4])
def test_a_draw_or_worse_is_not_so(better: float) -> None:
    (found,) = orderings([reached(("naive", 0.5), ("ewc", better))])
    assert not found.holds
    assert str(found).endswith("NOT SO")


def test_methods_that_are_missing_are_skipped() -> None:
    (found,) = orderings([reached(("naive", 0.5), ("si", 0.6), ("rotated-adam", 0.7))])
    assert (found.better, found.worse) == ("rotated-adam", "naive")
    assert orderings([reached(("ewc", 0.5))]) == []
    assert orderings([experiment(result("naive"), result("ewc"))]) == []


def test_the_mean_over_seeds_is_compared() -> None:
    runs = [flat("ewc", accuracy, seed=seed) for seed, accuracy in enumerate((0.9, 0.2))]
    naive = result("naive", tested=[flat("naive", 0.5)])
    (found,) = orderings([experiment(naive, result("ewc", tested=runs))])
    assert found.accuracies == pytest.approx((0.55, 0.5))


def test_class_incremental_streams_are_not_asked() -> None:
    accuracies = (("naive", 0.5), ("ewc", 0.4))
    names = [f"split_mnist_{kind}" for kind in ("class", "domain", "task")]
    found = orderings([reached(*accuracies, scenario=name) for name in names])
    assert [one.scenario for one in found] == names[1:]
