"""From records to results, with records that are made up."""

from itertools import permutations

import pytest

from benchmarks.methods import METHODS
from benchmarks.records import Record
from benchmarks.suite.protocol import best_strength, experiments, results_of
from tests.benchmarks.suite_records import flat, searched


def search(label: str, accuracies: dict[float, float]) -> list[Record]:
    return [record for group in searched(label, accuracies).values() for record in group]


def on_test_images(
    label: str, accuracies: dict[float | None, float], seeds: int = 1
) -> list[Record]:
    return [
        flat(label, accuracy, strength=strength, seed=seed)
        for strength, accuracy in accuracies.items()
        for seed in range(seeds)
    ]


def test_the_strength_is_chosen_on_held_out_images_alone() -> None:
    records = search("ewc", {1.0: 0.5, 10.0: 0.9, 100.0: 0.6})
    records += on_test_images("ewc", {1.0: 0.99, 10.0: 0.1}, seeds=2)
    (found,) = results_of(records)
    assert (found.strength, found.default) == (10.0, 1.0)
    assert [record.strength for record in found.tested] == [10.0, 10.0]
    assert [record.strength for record in found.at_default] == [1.0, 1.0]
    assert [record.seed for record in found.tested] == [0, 1]
    assert list(found.search) == [1.0, 10.0, 100.0]
    assert found.search_runs == 3
    assert found.search_seconds == pytest.approx(3 * 10.5)


def test_the_mean_over_seeds_decides_and_of_equals_the_smallest() -> None:
    groups = searched("ewc", {10.0: [0.9, 0.1], 1.0: [0.5, 0.5], 0.1: [0.4, 0.6]})
    assert best_strength(dict(sorted(groups.items()))) == 0.1
    records = [record for group in groups.values() for record in group]
    for order in list(permutations(records))[::101]:
        assert results_of(order)[0].strength == 0.1


@pytest.mark.parametrize(
    ("best", "at_edge"), [(0.1, True), (1.0, False), (10.0, False), (100.0, True)]
)
def test_a_choice_at_the_edge_is_told(best: float, at_edge: bool) -> None:
    accuracies = dict.fromkeys((0.1, 1.0, 10.0, 100.0), 0.5) | {best: 0.6}
    assert results_of(search("ewc", accuracies))[0].at_edge == at_edge


def test_a_single_value_has_no_edge() -> None:
    assert not results_of(search("ewc", {1.0: 0.5}))[0].at_edge
    assert not results_of(on_test_images("ewc", {1.0: 0.5}))[0].at_edge


def test_a_chosen_strength_that_was_not_tested_yet_has_no_result() -> None:
    (found,) = results_of(search("ewc", {1.0: 0.5, 10.0: 0.9}) + on_test_images("ewc", {1.0: 0.7}))
    assert found.strength == 10.0
    assert found.tested == []
    assert len(found.at_default) == 1


def test_methods_without_a_strength() -> None:
    (found,) = results_of(on_test_images("naive", {None: 0.5}, seeds=2))
    assert (found.strength, found.default) == (None, None)
    assert found.tested == found.at_default
    assert len(found.tested) == 2
    assert found.search == {}


def test_methods_are_in_their_order_with_replay_beside() -> None:
    labels = ["joint", "rotated-adam", "ewc + replay 20", "ewc", "naive"]
    records = [
        flat(label, 0.5, strength=None if label in "naive joint" else 1.0) for label in labels
    ]
    found = [result.label for result in results_of(records)]
    assert found == ["naive", "ewc", "ewc + replay 20", "rotated-adam", "joint"]
    assert list(METHODS)[-1] == "joint"


def test_experiments_are_told_apart_by_their_setting() -> None:
    records = [
        ("a", flat("naive", 0.5)),
        ("a", flat("naive", 0.5, configuration={"epochs": 7})),
        ("a", flat("naive", 0.5, configuration={"data": "digits"})),
        ("b", flat("naive", 0.5)),
    ]
    found = experiments(records)
    assert [experiment.scenario for experiment in found] == ["a", "a", "a", "b"]
    assert sorted(experiment.setting["epochs"] for experiment in found) == [2, 2, 2, 7]


@pytest.mark.parametrize(
    "changes",
    [
        {"methods": ["naive"]},
        {"seeds": [3, 4]},
        {"ewc_lambda": 7.0},
        {"baseline_ewc_lambda": [7.0]},
        {"threads": 7},
        {"device": "cuda"},
        {"jobs": 2},
        {"replay": 20},
    ],
)
def test_other_options_are_not_of_the_setting(changes: dict[str, object]) -> None:
    records = [("a", flat("naive", 0.5)), ("a", flat("ewc", 0.5, configuration=changes))]
    (found,) = experiments(records)
    assert [result.label for result in found.results] == ["naive", "ewc"]


def test_searches_and_tests_are_of_one_experiment() -> None:
    records = search("ewc", {1.0: 0.5}) + on_test_images("ewc", {1.0: 0.6})
    (found,) = experiments(("a", record) for record in records)
    assert found.results[0].search_runs == len(found.results[0].tested) == 1


def test_methods_that_are_no_longer_known_come_last() -> None:
    records = [flat("forgotten", 0.5, strength=2.0), flat("joint", 0.5)]
    known, forgotten = results_of(records)
    assert (known.label, forgotten.label) == ("joint", "forgotten")
    assert (forgotten.strength, forgotten.default) == (2.0, None)
