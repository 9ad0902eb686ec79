"""The table of an experiment, and the numbers in it."""

import io
from dataclasses import replace

import pytest
from rich.console import Console
from suite_records import (
    LIKELY,
    experiment,
    flat,
    likely_experiment,
    make_record,
    result,
    searched,
)

from benchmarks.suite.setting import setting_lines
from benchmarks.suite.summary import Statistic, summary_rows
from benchmarks.suite.tables import headings, markdown_table, terminal_notes, terminal_table
from benchmarks.suite.widths import Width, interval_within, width_within

MATRIX = [[0.9, 0.1], [0.6, 0.8]]


def rendered(shown, width: int = 110) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(terminal_table(shown))
    console.print(terminal_notes())
    return console.file.getvalue()


def markdown_row(shown, label: str) -> dict[str, str]:
    lines = markdown_table(shown).splitlines()
    (line,) = [line for line in lines if line.lstrip("|* ").startswith(label + " ")]
    cells = [cell.strip() for cell in line.strip("|").split(" | ")]
    return dict(zip(headings(), cells, strict=True))


@pytest.fixture
def two_methods():
    """Naive training, and EWC searched on one seed and tested on two."""
    naive = [flat("naive", 0.5, training_seconds=4.0)]
    tested = [
        make_record(
            "ewc",
            [[0.9, 0.1], [low, 0.8]],
            strength=10.0,
            seed=seed,
            training_seconds=6.0 + 2 * seed,
            estimation_seconds=1.0,
            penalty_ms_per_step=0.25,
            state_bytes=3 * 2**19,
        )
        for seed, low in enumerate((0.6, 0.7))
    ]
    ewc = result(
        "ewc",
        search=searched("ewc", {1.0: 0.6, 10.0: 0.8, 100.0: 0.78}),
        tested=tested,
        at_default=[flat("ewc", 0.625, strength=1.0)],
        strength=10.0,
        default=1.0,
    )
    return experiment(result("naive", tested=naive, at_default=naive), ewc)


def test_numbers_are_those_computed_by_hand(two_methods) -> None:
    assert markdown_row(two_methods, "ewc") == {
        "method": "ewc",
        "chosen λ": "10",
        "accuracy [%]": "**72.50 ± 3.54**",  # 70 and 75
        "n": "2",
        "default λ": "1",
        "accuracy at default λ [%]": "62.5",
        "forgetting [points]": "25.0 ± 7.1",  # 30 and 20
        "backward transfer [points]": "-25.0 ± 7.1",
        "training [s]": "7",
        "training [× naive]": "1.75",
        "estimation [s]": "1.0",
        "penalty [ms/step]": "0.25",
        "state [MiB]": "1.5",
        "search runs": "3",
        "search [s]": "32",  # 3 × (10 + 0.5) s, rounded to even
        # From 10^(0.85) below, where 17 of 20 points are crossed, to the edge above.
        "width [decades]": "≥ 1.1",
    }


def test_the_terminal_shows_the_same_numbers(two_methods) -> None:
    (line,) = [line for line in rendered(two_methods).splitlines() if line.startswith("ewc")]
    numbers = "10 72.50 ± 3.54 2 1 62.5 25.0 ± 7.1 7 1.0 0.25 1.5 3:32 ≥ 1.1"
    assert " ".join(line.removeprefix("ewc").split()) == numbers


def test_runs_that_diverged_are_marked() -> None:
    tested = [flat("ewc", 0.1, diverged=True), flat("ewc", 0.9, seed=1)]
    shown = experiment(result("ewc", tested=tested))
    assert markdown_row(shown, "ewc")["accuracy [%]"] == "**50.00 ± 56.57†**"
    assert "† in at least one run" in rendered(shown)


def test_what_a_method_has_not_is_a_dash(two_methods) -> None:
    row = markdown_row(two_methods, "naive")
    absent = {heading for heading, cell in row.items() if cell == "–"}
    assert absent == {
        "chosen λ",
        "default λ",
        "accuracy at default λ [%]",
        "search runs",
        "search [s]",
        "width [decades]",
    }
    assert row["accuracy [%]"] == "50.00"  # one seed, no deviation


def test_the_best_method_but_joint_training_is_bold() -> None:
    rows = summary_rows(likely_experiment())
    assert [row.label for row in rows if row.best] == ["rotated-ewc-proximal"]
    assert [row.label for row in rows if row.joint] == ["joint"]
    assert [row.label for row in rows if row.own] == [name for name in LIKELY if "rotated" in name]
    text = markdown_table(likely_experiment())
    assert text.count("**") == 2 * (4 + 1)  # four names and one accuracy


def test_a_strength_at_the_edge_of_the_search_is_marked() -> None:
    edge = result("ewc", search=searched("ewc", {1.0: 0.5, 1000.0: 0.6}), strength=1000.0)
    assert markdown_row(experiment(edge), "ewc")["chosen λ"] == "1e3\\*"
    assert "1e3* " in rendered(experiment(edge))


@pytest.mark.parametrize(
    "half",
    [
        result("ewc"),
        result("ewc", search=searched("ewc", {1.0: 0.5}), strength=1.0, default=3.0),
        result("ewc", tested=[flat("ewc", 0.5)], strength=1.0),
        result("ewc", at_default=[flat("ewc", 0.5)], strength=2.0, default=1.0),
    ],
    ids=["nothing", "search only", "test only", "default only"],
)
def test_half_a_sweep_makes_a_table(half) -> None:
    assert "ewc" in rendered(experiment(half))
    assert "–" in markdown_row(experiment(half), "ewc").values()


def test_an_experiment_without_methods_makes_a_table() -> None:
    assert "none yet" in rendered(experiment())
    assert summary_rows(experiment()) == []


def test_a_full_sweep_fits_the_terminal_and_is_not_abbreviated() -> None:
    text = rendered(likely_experiment())
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 110
    for label in LIKELY:
        assert [line for line in text.splitlines() if line.startswith(f"{label} ")]


def test_large_numbers_and_long_names_fit_the_terminal() -> None:
    label = "rotated-ewc-separate + replay 500"
    large = {
        "training_seconds": 1234.5,
        "estimation_seconds": 123.4,
        "penalty_ms_per_step": 12.34,
        "state_bytes": 123 * 2**20,
        "strength": 316.2,
    }
    tested = [flat(label, accuracy, seed=seed, **large) for seed, accuracy in enumerate((0.4, 0.6))]
    search = searched(label, {1.0: 0.5, 316.2: 0.6})
    shown = result(
        label, search=search, tested=tested, at_default=tested, strength=316.2, default=316.2
    )
    text = rendered(experiment(shown))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 110
    for number in ("316*", "50.00 ± 14.14", "1234", "123.4", "12.34", "123.0", "2:21"):
        assert number in text


def test_brackets_and_pipes_of_labels_are_shown_as_they_are() -> None:
    strange = experiment(result("ewc[bold]|<b>*", tested=[flat("ewc", 0.5)]))
    assert "ewc[bold]|<b>*" in rendered(strange)
    assert "ewc\\[bold\\]\\|&lt;b&gt;\\*" in markdown_table(strange)


def test_a_missing_value_of_one_seed_is_a_dash_and_not_a_mean_of_the_others() -> None:
    tested = [flat("ewc", 0.5), flat("ewc", 0.5, seed=1, forgetting=None)]
    (row,) = summary_rows(experiment(result("ewc", tested=tested)))
    assert row.forgetting is None
    assert row.accuracy == Statistic(0.5, 0.0, 2)


def test_setting_seeds_machine_and_versions_are_said(two_methods) -> None:
    setting, seeds, machine = setting_lines(two_methods)
    assert setting == (
        "Setting: 10 tasks, data mnist, hidden layers 100-100, 2 epochs per task, batches of 250, "
        "optimizer adam, learning rate 0.001, constant schedule, Fisher matrix from 10000 examples,"
        " of type mc, at temperature 1."
    )
    assert seeds == (
        "Seeds: 0, 1 on the test images; 0 in the search for λ on held-out training images."
    )
    assert machine == (
        "Measured with: processor x86_64, cores 2, device cpu, threads 1, parallel runs 1, "
        "rotate-ewc 0.1, Python 3.12.1, PyTorch 2.9.0, Avalanche 0.6.0."
    )


def test_what_differs_between_records_is_said_to_differ() -> None:
    parallel = flat("ewc", 0.5, seed=1, configuration={"jobs": 2}, versions={"torch": "2.8.0"})
    lines = setting_lines(experiment(result("ewc", tested=[flat("ewc", 0.5), parallel])))
    assert "PyTorch (differs between runs: 2.8.0 / 2.9.0)" in lines[2]
    assert "parallel runs (differs between runs: 1 / 2)" in lines[2]
    assert "processor (differs between runs: unknown / x86_64)" in lines[2]
    assert lines[3] == "Times were measured while other runs ran beside, up to 2 at once."


def test_options_of_old_or_unforeseen_kinds_are_shown() -> None:
    strange = replace(
        experiment(), setting={"tasks": 3, "hidden": None, "fancy_option": 7, "learning_rate": "x"}
    )
    assert setting_lines(strange)[0] == (
        "Setting: 3 tasks, hidden None, learning rate x, fancy option 7."
    )


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ({1.0: 0.5}, Width(0.0, True)),
        ({1.0: 0.80, 10.0: 0.90, 100.0: 0.80}, Width(0.6, False)),
        ({1.0: 0.84, 10.0: 0.90, 100.0: 0.87}, Width(1.5, True)),  # three points are allowed
        ({1.0: 0.89, 10.0: 0.90, 100.0: 0.70}, Width(1.15, True)),
        ({1.0: 0.90, 10.0: 0.80}, Width(0.3, True)),  # best at the edge
        # Another crossing, further out, does not count.
        ({0.1: 0.90, 1.0: 0.80, 10.0: 0.91, 100.0: 0.85, 1e3: 0.90}, Width(3 / 11 + 0.5, False)),
        ({1.0: (0.7, 0.9), 100.0: (0.9, 0.9), 1e4: (0.5, 0.9)}, Width(0.6 + 0.3, False)),
        ({0.0: 0.9, 1.0: 0.8, 10.0: 0.7}, Width(0.3, True)),  # zero has no logarithm
        ({}, None),
    ],
)
def test_width_of_the_optimum(accuracies, expected) -> None:
    width = width_within(searched("ewc", accuracies))
    if expected is None:
        assert width is None
    else:
        assert width.decades == pytest.approx(expected.decades)
        assert width.lower_bound == expected.lower_bound


def test_width_follows_the_points_and_not_the_unit_of_strength() -> None:
    accuracies = {1.0: 0.80, 10.0: 0.90, 100.0: 0.80}
    assert width_within(searched("ewc", accuracies), points=5).decades == pytest.approx(1.0)
    scaled = {1e-3 * strength: accuracy for strength, accuracy in accuracies.items()}
    assert width_within(searched("ewc", scaled)).decades == pytest.approx(0.6)


def test_an_interval_has_ends_of_its_own() -> None:
    interval = interval_within(searched("ewc", {1.0: 0.80, 10.0: 0.90, 100.0: 0.89}))
    assert interval.low == pytest.approx(-0.3)
    assert interval.high == pytest.approx(1.0)
    assert (interval.open_low, interval.open_high) == (False, True)
