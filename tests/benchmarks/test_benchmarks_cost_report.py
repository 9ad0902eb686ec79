"""Medians, ratios and their table, from times made up."""

import io

import pytest
from rich.console import Console

from benchmarks.contenders import PENALTY, ROTATED_STEP, TRAINING_STEP, Contender
from benchmarks.cost_report import Cost, cost_table, summarise

MEDIANS = {
    Contender(TRAINING_STEP, None, 0): [1.0, 2.0, 4.0],
    Contender(PENALTY, "merged", 2): [10.0, 20.0, 1.0],
    Contender(PENALTY, "merged", 50): [30.0, 10.0, 2.0],
    Contender(ROTATED_STEP, "merged", 2): [1.0, 1.0, 1.0],
    Contender(ROTATED_STEP, "merged", 50): [1.0, 1.5, 1.0],
    Contender(PENALTY, "separate", 2): [10.0, 10.0, 10.0],
    Contender(PENALTY, "separate", 50): [250.0, 260.0, 240.0],
}
SIZES = {
    ("merged", 2): 2**20,
    ("merged", 50): 2**20,
    ("separate", 2): 2**21,
    ("separate", 50): 50 * 2**20,
}


@pytest.fixture
def costs() -> list[Cost]:
    return summarise(MEDIANS, SIZES, reference=2)


def test_there_is_a_cost_for_plain_training_and_every_penalty(costs: list[Cost]) -> None:
    assert [(cost.mode, cost.tasks) for cost in costs] == [(None, 0), *SIZES]
    assert [cost.state_bytes for cost in costs] == [0, *SIZES.values()]


def test_times_are_medians_over_rounds(costs: list[Cost]) -> None:
    assert [cost.milliseconds.get(PENALTY) for cost in costs] == [None, 10, 10, 10, 250]
    assert costs[0].milliseconds == {TRAINING_STEP: 2.0}
    assert costs[2].rounds == {PENALTY: [30, 10, 2], ROTATED_STEP: [1, 1.5, 1]}


def test_ratios_are_to_two_tasks_of_the_same_mode_in_the_same_round(costs: list[Cost]) -> None:
    assert [cost.ratios.get(PENALTY) for cost in costs] == [None, 1, 2, 1, 25]
    assert [cost.ratios.get(ROTATED_STEP) for cost in costs] == [None, 1, 1, None, None]
    assert costs[0].ratios == {}
    assert [cost.state_ratio for cost in costs] == [None, 1, 1, 1, 25]


def test_the_table_shows_them_with_dashes_where_there_is_nothing(costs: list[Cost]) -> None:
    console = Console(width=90, file=io.StringIO())
    console.print(cost_table(costs, "Title [with brackets]"))
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("Title [with brackets]")
    rows = [line.split() for line in lines[4:]]
    assert rows == [
        ["no", "penalty", *"–––", "2.00", *"–––––"],
        ["merged", "2", "10.00", "1.00", "–", "–", "1.00", "1.00", "1.00", "1.00"],
        ["merged", "50", "10.00", "2.00", "–", "–", "1.00", "1.00", "1.00", "1.00"],
        ["separate", "2", "10.00", "1.00", "–", "–", "–", "–", "2.00", "1.00"],
        ["separate", "50", "250.00", "25.00", "–", "–", "–", "–", "50.00", "25.00"],
    ]
