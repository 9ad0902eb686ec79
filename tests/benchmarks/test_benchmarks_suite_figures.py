"""The figures of an experiment: what is drawn, not how it looks."""

import io

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from suite_records import (
    LIKELY,
    SPECTRA,
    experiment,
    flat,
    likely_experiment,
    make_record,
    result,
    searched,
)

from benchmarks.plots import STYLES, styles_of
from benchmarks.suite.figures import (
    DRAWINGS,
    accuracy_curves,
    cost_bars,
    forgetting_bars,
    heat_maps,
    spectra,
    strength_curves,
)
from benchmarks.suite.labels import spread


@pytest.fixture(scope="module")
def full():
    return likely_experiment()


def named_lines(axes):
    return {
        line.get_label(): line
        for line in axes.get_lines()
        if not str(line.get_label()).startswith("_")
    }


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def two_seeds(label: str, *ends: float):
    return [
        make_record(label, [[0.9, 0.1], [end, 0.8]], seed=seed) for seed, end in enumerate(ends)
    ]


def test_curves_are_means_over_seeds_of_tasks_seen() -> None:
    joint = flat("joint", 0.95)
    shown = experiment(
        result("ewc", tested=two_seeds("ewc", 0.6, 0.7)), result("joint", tested=[joint])
    )
    axes = accuracy_curves(shown).axes[0]
    lines = named_lines(axes)
    assert list(lines) == ["ewc", "joint"]
    np.testing.assert_allclose(lines["ewc"].get_ydata(), [0.9, 0.725])
    np.testing.assert_allclose(lines["joint"].get_ydata(), 0.95)
    (band,) = axes.collections
    lowest = band.get_paths()[0].vertices[:, 1].min()
    assert lowest == pytest.approx(0.725 - 0.05 / np.sqrt(2))


def test_every_line_is_named_at_its_end(full) -> None:
    axes = accuracy_curves(full).axes[0]
    bottom, top = axes.get_ylim()
    ends = {label: line.get_ydata()[-1] for label, line in named_lines(axes).items()}
    below = {label for label, end in ends.items() if end < bottom}
    assert below == {"naive", "lwf"}
    assert top > max(ends.values())
    names = texts(axes)
    assert {name.split(" ")[0] for name in names} == set(LIKELY)
    assert {name.split(" ")[0] for name in names if name.endswith("%) ↓")} == below
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert min(np.diff(heights)) > 0.04
    order = sorted(axes.texts, key=lambda text: text.get_position()[1])
    ranks = [max(ends[text.get_text().split(" ")[0]], bottom) for text in order]
    assert ranks == sorted(ranks)


def test_methods_are_not_cut_off_where_they_are_many() -> None:
    low = [result(f"{name}", tested=[flat(name, 0.2)]) for name in ("naive", "ewc", "si")]
    high = [result(name, tested=[flat(name, 0.9)]) for name in ("rotated-ewc", "mas")]
    axes = accuracy_curves(experiment(*low, *high)).axes[0]
    assert axes.get_ylim()[0] < 0.2
    assert not any("↓" in text for text in texts(axes))


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([], []),
        ([0.5], [0.5]),
        ([0.2, 0.8], [0.2, 0.8]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.52, 0.48], [0.55, 0.45]),
        ([0.0, 0.0], [0.0, 0.1]),
        ([1.0, 1.0, 0.99], [0.9, 1.0, 0.8]),
    ],
)
def test_labels_are_moved_apart_as_little_as_possible(heights, expected) -> None:
    assert spread(heights, 0.1) == pytest.approx(expected)


def test_more_labels_than_fit_are_as_far_apart_as_there_is_room() -> None:
    assert spread([0.5] * 5, 0.9) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])


def test_there_is_a_heat_map_for_every_tested_method(full) -> None:
    drawn = [axes for axes in heat_maps(full).axes if axes.get_visible() and axes.get_images()]
    assert [axes.get_title().replace("\n", "") for axes in drawn] == list(LIKELY)
    tested = full.results[1].tested
    mean = np.mean([record.accuracy_matrix for record in tested], axis=0)
    seen = np.tri(len(mean), dtype=bool)
    np.testing.assert_allclose(drawn[1].get_images()[1].get_array()[seen], mean[seen])
    # Those below which there is no other map have an axis label, in an incomplete row too.
    assert sum(axes.get_xlabel() != "" for axes in drawn) == 5


def test_losses_are_relative_to_the_best() -> None:
    ewc = result("ewc", search=searched("ewc", {1.0: 0.8, 10.0: 0.9, 100.0: 0.89}), strength=10.0)
    above, below = strength_curves(experiment(ewc)).axes
    line = named_lines(above)["ewc"]
    np.testing.assert_allclose(line.get_xdata(), [0.1, 1, 10])
    np.testing.assert_allclose(line.get_ydata(), [-10, 0, -1], atol=1e-9)
    assert any(np.allclose(other.get_ydata(), -3) for other in above.get_lines())
    assert not above.collections
    assert "≥ 1.3" in texts(below)
    assert "▶" in texts(below)
    assert "◀" not in texts(below)
    np.testing.assert_allclose(below.get_lines()[0].get_xdata(), [10**-0.3, 1, 10])


def test_a_search_with_several_seeds_has_a_band() -> None:
    ewc = result("ewc", search=searched("ewc", {1.0: (0.7, 0.8), 10.0: (0.9, 0.9)}), strength=10.0)
    above, _ = strength_curves(experiment(ewc)).axes
    (band,) = above.collections
    deviation = 10 / np.sqrt(2)
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(-15 - deviation)


def test_bars_are_means_in_percent() -> None:
    shown = experiment(result("rotated-ewc", tested=two_seeds("rotated-ewc", 0.6, 0.7)))
    accuracy, drop = forgetting_bars(shown).axes
    assert accuracy.patches[0].get_width() == pytest.approx(72.5)
    assert texts(accuracy) == ["72.5 ± 3.5"]
    assert texts(drop) == ["25.0 ± 7.1"]
    assert [tick.get_text() for tick in accuracy.get_yticklabels()] == ["rotated-ewc"]
    assert accuracy.get_xticks().max() == 100


def test_joint_training_has_no_forgetting() -> None:
    _, drop = forgetting_bars(experiment(result("joint", tested=[flat("joint", 0.9)]))).axes
    assert texts(drop) == ["–"]
    assert not drop.patches


def test_costs_are_relative_to_naive_training() -> None:
    naive = result("naive", tested=[flat("naive", 0.5, training_seconds=5.0, state_bytes=0)])
    ewc = result("ewc", tested=[flat("ewc", 0.5, training_seconds=8.0, state_bytes=3 * 2**20)])
    training, estimation, state = cost_bars(experiment(naive, ewc)).axes
    assert texts(training) == ["1.00", "1.60"]
    assert texts(estimation) == ["0.5", "0.5"]
    assert texts(state) == ["0", "3"]
    alone, *_ = cost_bars(experiment(ewc)).axes
    assert (alone.get_xlabel(), texts(alone)) == ("training [s]", ["8"])


def test_spectra_leave_out_zeros_and_say_so() -> None:
    plain = result("rotated-adam", tested=[flat("rotated-adam", 0.5)])
    tested = [flat("rotated-ewc", 0.5, spectra=SPECTRA)]
    figure = spectra(experiment(plain, result("rotated-ewc", tested=tested)))
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    first, second = axes.get_lines()
    np.testing.assert_allclose(first.get_xdata(), [1, 2, 4, 8])
    np.testing.assert_allclose(first.get_ydata(), [1, 0.1, 0.01, 1e-4])
    assert first.get_label() == "0.weight (dimension 20), zero from rank 16"
    assert len(second.get_xdata()) == 0
    (legend,) = figure.legends
    assert legend.get_title().get_text() == "rotated-ewc, seed 0"


def test_spectra_of_rounding_errors_do_not_stretch_the_axis() -> None:
    tiny = {"a": {"ranks": [1.0, 2.0], "eigenvalues": [1.0, 1e-40], "dimension": [2.0]}}
    tested = [flat("rotated-ewc", 0.5, spectra=tiny)]
    (axes,) = spectra(experiment(result("rotated-ewc", tested=tested))).axes
    assert axes.get_ylim()[0] == pytest.approx(1e-12)


def test_only_zeros_can_be_drawn() -> None:
    zeros = {"a": {"ranks": [1.0], "eigenvalues": [0.0], "dimension": [1.0]}}
    tested = [flat("rotated-ewc", 0.5, spectra=zeros)]
    spectra(experiment(result("rotated-ewc", tested=tested))).savefig(io.BytesIO())


@pytest.mark.parametrize("drawing", DRAWINGS, ids=lambda drawing: drawing.name)
def test_nothing_to_show_is_no_figure(drawing) -> None:
    assert drawing.draw(experiment()) is None
    assert drawing.draw(experiment(result("ewc"))) is None


@pytest.mark.parametrize("drawing", DRAWINGS, ids=lambda drawing: drawing.name)
def test_half_a_sweep_can_be_drawn(drawing) -> None:
    tested = [flat("rotated-ewc", 0.5, spectra=SPECTRA)]
    halves = experiment(
        result("ewc", search=searched("ewc", {1.0: 0.5, 10.0: 0.6}), strength=10.0),
        result("rotated-ewc", tested=tested, strength=3.0),
        result("rotated-adam"),
    )
    drawing.draw(halves).savefig(io.BytesIO())


def test_a_single_task_can_be_drawn() -> None:
    single = likely_experiment(("naive", "rotated-ewc", "joint"), tasks=1, seeds=1)
    for drawing in DRAWINGS:
        drawing.draw(single).savefig(io.BytesIO())


def test_methods_can_be_told_apart_without_colour() -> None:
    labels = [*STYLES, *(f"{label} + replay 500" for label in STYLES if label != "joint")]
    styles = styles_of(labels)
    assert len({(style.line, style.marker, style.filled) for style in styles.values()}) == len(
        labels
    )
    for label in STYLES:
        assert label == "joint" or styles[f"{label} + replay 500"].colour == styles[label].colour
    for style in styles.values():
        luminance = np.dot([0.299, 0.587, 0.114], to_rgb(style.colour))
        assert luminance < 0.75, f"{style.colour} is too pale on white paper"


def test_own_methods_have_heavier_lines() -> None:
    own = {style.width for label, style in STYLES.items() if label.startswith("rotated-")}
    others = {style.width for label, style in STYLES.items() if not label.startswith("rotated-")}
    assert min(own) > max(others)
