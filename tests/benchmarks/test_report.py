"""Tables, figures and the page: what is shown, not how it looks."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from rich.console import Console

from benchmarks.methods import METHODS
from benchmarks.report.accuracy import accuracy_curves, draw, heat_maps
from benchmarks.report.figures import DRAWINGS, strength_curves
from benchmarks.report.page import write_report
from benchmarks.report.style import STYLES, new_figure, styles_of, task_ticks
from benchmarks.report.tables import (
    COLUMNS,
    closing_lines,
    results_table,
    rows_of,
    setting_lines,
    terminal_notes,
    terminal_table,
)
from benchmarks.results import Record
from benchmarks.suite.outcome import Experiment, experiments
from tests.benchmarks.helpers import make_record

MATRIX = [[0.9, 0.1, 0.2], [0.8, 0.6, 0.1], [0.5, 0.4, 0.3]]


def experiment_of(records: list[Record]) -> Experiment:
    (found,) = experiments(("permuted_mnist", record) for record in records)
    return found


def search(label: str, accuracies: dict[float, tuple[float, ...]]) -> list[Record]:
    return [
        make_record(label, [[a, a]] * 2, strength=strength, seed=seed, validate=True)
        for strength, values in accuracies.items()
        for seed, a in enumerate(values)
    ]


@pytest.fixture
def shown() -> Experiment:
    """Naive training, joint training, and EWC searched on one seed and tested on two."""
    ewc = {"estimation_seconds": 1.0, "state_bytes": 3 * 2**19}
    return experiment_of(
        [
            make_record("naive", [[0.9, 0.1], [0.2, 0.8]], training_seconds=4.0, state_bytes=0),
            *search("ewc", {1.0: (0.6,), 10.0: (0.8,), 100.0: (0.78,)}),
            *(
                make_record(
                    "ewc",
                    [[0.9, 0.1], [low, 0.8]],
                    strength=10.0,
                    seed=seed,
                    training_seconds=6.0 + 2 * seed,
                    forgetting=0.9 - low,
                    backward_transfer=low - 0.9,
                    diverged=seed == 1,
                    **ewc,
                )
                for seed, low in enumerate((0.6, 0.7))
            ),
            make_record("ewc", [[0.9, 0.1], [0.45, 0.8]], strength=1.0),
            make_record("rotated-ewc", [[0.9, 0.1], [0.8, 0.8]], strength=1.0),
            make_record("joint", [[0.9, 0.9], [0.9, 0.9]], forgetting=None, backward_transfer=None),
        ]
    )


def rendered(*things: Any, width: int = 120) -> str:
    file = io.StringIO()
    Console(width=width, file=file).print(*things)
    return file.getvalue()


def cells(shown: Experiment, label: str) -> dict[str, str]:
    (row,) = [row for row in rows_of(shown) if row[0].text == label]
    headings = ["method", *(column.heading for column in COLUMNS)]
    return {heading: cell.text for heading, cell in zip(headings, row, strict=True)}


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


# Tables


def test_numbers_are_those_computed_by_hand(shown: Experiment) -> None:
    assert cells(shown, "ewc") == {
        "method": "ewc",
        "chosen λ": "10",
        "accuracy [%]": "72.50 ± 3.54†",  # 70 and 75
        "n": "2",
        "default λ": "1",
        "accuracy at default λ [%]": "62.5",
        "regret [points]": "20.0",  # 80 and 60
        "forgetting [points]": "25.0 ± 7.1",  # 30 and 20
        "backward transfer [points]": "-25.0 ± 7.1",
        "training [s]": "7",
        "training [× naive]": "1.75",
        "estimation [s]": "1.0",
        "state [MiB]": "1.5",
        "search runs": "3",
        "search [s]": "39",  # 3 × (12.34 + 0.5) s
        # From 10^(0.85) below, where 17 of 20 points are crossed, to the edge above.
        "width [decades]": "≥ 1.1",
    }
    naive = cells(shown, "naive")
    absent = {heading for heading, cell in naive.items() if cell == "–"}
    assert absent == {
        *("chosen λ", "default λ", "accuracy at default λ [%]", "regret [points]"),
        *("search runs", "search [s]", "width [decades]"),
    }
    assert naive["accuracy [%]"] == "50.00", "one seed has no deviation"
    assert cells(shown, "joint")["forgetting [points]"] == "–"


def test_the_best_but_joint_training_and_our_names_are_bold(shown: Experiment) -> None:
    bold = {cell.text for row in rows_of(shown) for cell in row if cell.bold}
    assert bold == {"rotated-ewc", "80.00"}


def test_the_terminal_shows_the_same_numbers_in_its_width(shown: Experiment) -> None:
    text = rendered(terminal_table(shown), terminal_notes())
    (line,) = [line for line in text.splitlines() if line.startswith("ewc")]
    numbers = "10 72.50 ± 3.54† 62.5 20.0 25.0 ± 7.1 7 1.0 1.5 ≥ 1.1"
    assert " ".join(line.removeprefix("ewc").split()) == numbers
    assert "† in at least one run" in text
    large = {"training_seconds": 1234.5, "estimation_seconds": 123.4, "state_bytes": 123 * 2**20}
    label = "rotated-ewc-separate + replay 500"
    records = search(label, {1.0: (0.5,), 316.2: (0.6,)})
    records += [make_record(label, [[a, a]] * 2, strength=316.2, **large) for a in (0.4, 0.6)]
    text = rendered(terminal_table(experiment_of(records)))
    assert "…" not in text
    for number in ("316*", "50.00 ± 14.14", "1234", "123.4", "123.0"):
        assert number in text


@pytest.mark.parametrize(
    "half",
    [
        search("ewc", {1.0: (0.5,)}),
        [make_record("ewc", [[0.5]], strength=1.0)],
        [make_record("ewc", [[0.5]], strength=2.0)],
    ],
    ids=["search only", "default only", "test only"],
)
def test_half_a_sweep_makes_tables_and_figures(half: list[Record]) -> None:
    shown = experiment_of(half)
    assert "ewc" in rendered(terminal_table(shown))
    assert "–" in cells(shown, "ewc").values()
    for drawing in DRAWINGS:
        if (figure := drawing.draw(shown)) is not None:
            figure.savefig(io.BytesIO())


def test_records_of_given_strengths(shown: Experiment) -> None:
    records = [
        make_record("ewc[λ=3]", [[accuracy]], training_seconds=seconds)
        for accuracy, seconds in ((0.8, 1.0), (0.9, 2.0), (1.0, 6.0))
    ]
    text = rendered(results_table(records, "Title [with brackets]"), width=100)
    assert "Title [with brackets]" in text
    assert "[points]" in text
    (line,) = [line for line in text.splitlines() if line.startswith("ewc[λ=3]")]
    numbers = "90.00 ± 10.00 25.0 ± 0.0 -12.5 ± 0.0 3 0.5"  # 8.16 would be the population's
    assert " ".join(line.removeprefix("ewc[λ=3]").split()) == numbers


def test_the_last_words_say_how_far_methods_are_from_joint_training() -> None:
    found = {"naive": (0.6, 0.62), "joint": (0.95, 0.96), "rotated-ewc": (0.93, 0.94)}
    records = [
        make_record(
            label, [[a, a], [a, a]], seed=seed, forgetting=None if label == "joint" else 0.25
        )
        for label, accuracies in found.items()
        for seed, a in enumerate(accuracies)
    ]
    assert closing_lines(records) == [
        "After 2 tasks, one after another:",
        "  rotated-ewc keeps 93.5 %, 2.0 points below training on all tasks at once; it forgets "
        "25.0 points.",
        "  plain training keeps 61.0 %, 34.5 points below training on all tasks at once; it "
        "forgets 25.0 points.",
        "What was learned is protected best by rotated-ewc.",
    ]
    ahead = make_record("ewc", [[0.99]])
    assert closing_lines([ahead, make_record("joint", [[0.98]])])[1] == (
        "  ewc keeps 99.0 %, 1.0 points above training on all tasks at once; it forgets 25.0 "
        "points."
    )
    assert closing_lines([ahead]) == [
        "After 1 task, one after another:",
        "  ewc keeps 99.0 %; it forgets 25.0 points.",
    ]
    assert closing_lines([make_record("joint", [[0.98]])]) == []


def test_setting_seeds_machine_and_versions_are_said(shown: Experiment) -> None:
    assert setting_lines(shown) == [
        "Setting: tasks 2, hidden 4, data mnist.",
        "Seeds: 0 1 on the test images; 0 in the search for λ on held-out training images.",
        "Measured with: processor unknown, cores unknown, device unknown, threads 1, parallel runs "
        "1, rotate-ewc unknown, Python 3, PyTorch unknown, Avalanche unknown.",
    ]
    parallel = make_record("ewc", seed=1, configuration={"jobs": 2}, versions={"python": "2"})
    lines = setting_lines(experiment_of([make_record("ewc"), parallel]))
    assert "Python (differs between runs: 2 / 3)" in lines[2]
    assert "parallel runs (differs between runs: 1 / 2)" in lines[2]
    assert lines[3] == "Times were measured while other runs went on, up to 2 at once."


# Figures


@pytest.fixture
def records() -> list[Record]:
    lower = [[value - 0.1 for value in row] for row in MATRIX]
    return [
        make_record("naive", MATRIX),
        make_record("rotated-ewc", MATRIX),
        make_record("joint", [[0.9, 0.8, 0.7]] * 3),
        make_record("naive", lower, seed=1),
    ]


def test_curves_are_means_over_seeds_of_tasks_seen(records: list[Record]) -> None:
    curves = draw(records, "Title").axes[0]
    lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in curves.get_lines()}
    assert list(lines) == ["naive", "rotated-ewc", "joint"]
    np.testing.assert_allclose(lines["rotated-ewc"], [0.9, 0.7, 0.4])
    np.testing.assert_allclose(lines["naive"], [0.85, 0.65, 0.35])
    np.testing.assert_allclose(lines["joint"], 0.8)
    (band,) = curves.collections
    heights = np.asarray(band.get_paths()[0].vertices)[:, 1]
    deviation = 0.1 / np.sqrt(2)  # the sample deviation of two values 0.1 apart
    assert (heights.max(), heights.min()) == (
        pytest.approx(0.85 + deviation),
        pytest.approx(0.35 - deviation),
    )


def test_maps_show_seen_tasks_in_full_and_others_paler(records: list[Record]) -> None:
    _, *maps, bar = draw(records).axes
    drawn = [axes for axes in maps if axes.get_visible()]
    assert [axes.get_title() for axes in drawn] == ["naive", "rotated-ewc", "joint"]
    assert bar.get_ylabel().startswith("accuracy")
    seen = np.tri(3, dtype=bool)
    pale, full = drawn[0].get_images()
    assert pale.get_alpha() < 1
    np.testing.assert_allclose(full.get_array()[seen], (np.array(MATRIX) - 0.05)[seen])
    assert full.get_array().mask.tolist() == (~seen).tolist()
    assert pale.get_array().mask.tolist() == seen.tolist()
    assert not drawn[2].get_images()[1].get_array().mask.any(), "joint training has seen all"
    limits = {image.get_clim() for axes in drawn for image in axes.get_images()}
    assert limits == {(0.2, 1.0)}  # the worst is 0.25, the naive mean on the last task


@pytest.mark.parametrize("methods", [1, 4, 5, 9])
def test_there_is_a_map_for_every_method(methods: int) -> None:
    records = [make_record(f"ewc[λ={number}]", MATRIX) for number in range(methods)]
    titles = [axes.get_title() for axes in draw(records).axes if axes.get_visible()]
    assert [title for title in titles if title] == [record.label for record in records]
    figure = heat_maps(experiment_of(records))
    assert figure is not None
    assert len([axes for axes in figure.axes if axes.get_visible()]) == methods + 1


def test_records_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 2 with \[1, 3\] tasks"):
        draw([make_record("naive", [[0.5]]), make_record("ewc", MATRIX)])
    with pytest.raises(ValueError, match="got 0"):
        draw([])


def test_methods_that_are_far_worse_leave_the_figure() -> None:
    ends = {"naive": 0.2, "ewc": 0.9, "si": 0.85, "rotated-ewc": 0.95}
    records = [make_record(label, [[0.9, 0.1], [2 * e - 0.9, 0.9]]) for label, e in ends.items()]
    figure = accuracy_curves(experiment_of(records))
    assert figure is not None
    bottom, top = figure.axes[0].get_ylim()
    assert 0.2 < bottom < 0.85
    assert top > 0.95
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["rotated-ewc", "ewc", "si", "naive (20.0%) ↓"]


def test_losses_are_relative_to_the_best() -> None:
    records = search("ewc", {1.0: (0.75, 0.85), 10.0: (0.9, 0.9), 100.0: (0.89, 0.89)})
    figure = strength_curves(experiment_of(records))
    assert figure is not None
    above, below = figure.axes
    line = above.get_lines()[0]
    np.testing.assert_allclose(line.get_xdata(), [0.1, 1, 10])
    np.testing.assert_allclose(line.get_ydata(), [-10, 0, -1], atol=1e-9)
    (band,) = above.collections
    heights = np.asarray(band.get_paths()[0].vertices)[:, 1]
    assert heights.min() == pytest.approx(-10 - 10 / np.sqrt(2))
    assert {"≥ 1.3", "▶"} <= set(texts(below))
    assert "◀" not in texts(below)
    np.testing.assert_allclose(below.get_lines()[0].get_xdata(), [10**-0.3, 1, 10])


def test_methods_can_be_told_apart_without_colour() -> None:
    assert set(METHODS) == set(STYLES)
    labels = [*STYLES, *(f"{label} + replay 500" for label in STYLES if label != "joint")]
    labels += [f"ewc[λ={number}]" for number in range(5)]
    styles = styles_of(labels)
    looks = {(style.line, style.marker, style.filled) for style in styles.values()}
    assert len(looks) == len(labels)
    for label in STYLES:
        assert styles[label] == STYLES[label]
        assert label == "joint" or styles[f"{label} + replay 500"].colour == STYLES[label].colour


@pytest.mark.parametrize(
    ("tasks", "most", "expected"),
    [(1, 5, [1]), (5, 5, [1, 2, 3, 4, 5]), (10, 5, [2, 4, 6, 8, 10]), (20, 5, [5, 10, 15, 20])],
)
def test_ticks_are_round_and_few(tasks: int, most: int, expected: list[int]) -> None:
    axes = new_figure(2.0).subplots()
    axes.set_xlim(0.5, tasks + 0.5)
    task_ticks(axes.xaxis, most)
    assert [tick for tick in axes.get_xticks() if 0.5 <= tick <= tasks + 0.5] == expected


# The page


def test_the_page_and_its_files(shown: Experiment, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    paths = write_report([shown, experiment_of(search("ewc", {1.0: (0.5,), 10.0: (0.6,)}))], folder)
    pictures = [f"permuted_mnist-{drawing.name}.png" for drawing in DRAWINGS]
    pictures.append("permuted_mnist-2-strength.png")
    assert [path.name for path in paths] == ["report.md", *pictures]
    assert sorted(folder.iterdir()) == sorted(paths)  # no temporary file is left
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[1:])
    text = paths[0].read_text(encoding="utf-8")
    assert re.findall(r"!\[[^]]+\]\(([^)]*)\)", text) == pictures
    assert text.count("\n## permuted\\_mnist\n") == 2
    assert "| ewc | 10 | 72.50 ± 3.54† | 2 | 1 |" in text
    assert "| **rotated-ewc** | " in text
    assert "| **80.00** |" in text
    assert "\n- Seeds: 0 1 on the test images; " in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1


def test_what_comes_from_records_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('&')</script>*|"
    record = make_record(evil, versions={"python": evil}, configuration={"device": evil})
    paths = write_report(experiments([(f'"{evil}/../../x', record)]), tmp_path)
    assert {path.parent for path in paths} == {tmp_path}
    text = paths[0].read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert('&amp;')&lt;/script&gt;\\*\\|") >= 4
