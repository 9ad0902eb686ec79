"""The figure: what is drawn, not how it looks."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import AxesImage

from benchmarks.methods import METHODS
from benchmarks.plots import OTHER_STYLES, STYLES, draw, task_ticks

MATRIX = [[0.9, 0.1, 0.2], [0.8, 0.6, 0.1], [0.5, 0.4, 0.3]]


@pytest.fixture
def records(make_record):
    lower = [[value - 0.1 for value in row] for row in MATRIX]
    return [
        make_record("naive", MATRIX, seed=0),
        make_record("rotated-ewc", MATRIX, seed=0),
        make_record("joint", [[0.9, 0.8, 0.7]] * 3, trained_jointly=True, seed=0),
        make_record("naive", lower, seed=1),
    ]


def test_panels_and_their_labels(records) -> None:
    curves, *maps, bar = draw(records, "Title").axes
    assert curves.get_xlabel() == "number of tasks learned"
    assert curves.get_ylabel() == "average accuracy on tasks seen"
    drawn = [axes for axes in maps if axes.get_visible()]
    assert [axes.get_title() for axes in drawn] == ["naive", "rotated-ewc", "joint"]
    assert {axes.get_xlabel() for axes in drawn} == {"accuracy on task"}
    assert drawn[0].get_ylabel() == "after task"
    assert bar.get_ylabel().startswith("accuracy")


def test_curves_are_means_over_seeds_of_tasks_seen(records) -> None:
    curves = draw(records).axes[0]
    lines = {line.get_label(): line for line in curves.get_lines()}
    assert list(lines) == ["naive", "rotated-ewc", "joint"]
    np.testing.assert_allclose(lines["naive"].get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(lines["rotated-ewc"].get_ydata(), [0.9, 0.7, 0.4])
    np.testing.assert_allclose(lines["naive"].get_ydata(), [0.85, 0.65, 0.35])
    np.testing.assert_allclose(lines["joint"].get_ydata(), 0.8)


def test_only_methods_with_several_seeds_have_a_band(records) -> None:
    (band,) = draw(records).axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    deviation = 0.1 / np.sqrt(2)  # the sample deviation of two values 0.1 apart
    assert heights.max() == pytest.approx(0.85 + deviation)
    assert heights.min() == pytest.approx(0.35 - deviation)


def test_maps_show_seen_tasks_in_full_and_others_paler(records) -> None:
    naive = draw(records).axes[1]
    pale, full = naive.get_images()
    assert isinstance(full, AxesImage)
    assert pale.get_alpha() < 1
    assert full.get_alpha() is None
    mean = np.array(MATRIX) - 0.05
    np.testing.assert_allclose(full.get_array()[np.tri(3, dtype=bool)], mean[np.tri(3, dtype=bool)])
    assert full.get_array().mask.tolist() == (~np.tri(3, dtype=bool)).tolist()
    assert pale.get_array().mask.tolist() == np.tri(3, dtype=bool).tolist()


def test_joint_training_has_seen_every_task(records) -> None:
    pale, full = draw(records).axes[3].get_images()
    assert not full.get_array().mask.any()
    assert pale.get_array().mask.all()


def test_all_maps_share_a_scale_that_holds_all_seen_tasks(records) -> None:
    figure = draw(records)
    limits = {image.get_clim() for axes in figure.axes[1:3] for image in axes.get_images()}
    assert limits == {(0.2, 1.0)}  # the worst is 0.25, the naive mean on the last task


@pytest.mark.parametrize("methods", [1, 4, 5, 9])
def test_there_is_a_map_for_every_method(make_record, methods: int) -> None:
    records = [make_record(f"ewc[λ={number}]", MATRIX) for number in range(methods)]
    titles = [axes.get_title() for axes in draw(records).axes if axes.get_visible()]
    assert [title for title in titles if title] == [record.label for record in records]


def test_lines_can_be_told_apart_without_colour(make_record) -> None:
    looks = {(style.line, style.marker) for style in STYLES.values()}
    assert len(looks) == len(STYLES)
    assert set(METHODS) <= set(STYLES)
    records = [make_record(f"ewc[λ={number}]", MATRIX) for number in range(5)]
    lines = draw(records).axes[0].get_lines()
    assert len({line.get_marker() for line in lines}) == 5


def test_known_methods_keep_their_looks_whatever_else_is_drawn(make_record) -> None:
    others = [make_record(f"ewc[λ={number}]", MATRIX) for number in range(len(OTHER_STYLES))]
    lines = draw([*others, make_record("rotated-adam", MATRIX)]).axes[0].get_lines()
    style = STYLES["rotated-adam"]
    assert lines[-1].get_label() == "rotated-adam"
    assert (lines[-1].get_color(), lines[-1].get_marker()) == (style.colour, style.marker)
    looks = [(line.get_linestyle(), line.get_marker()) for line in lines]
    assert len(set(looks)) == len(looks)
    known = {(style.line, style.marker) for style in STYLES.values()}
    assert not known & {(style.line, style.marker) for style in OTHER_STYLES}


@pytest.mark.parametrize("jointly", [False, True])
def test_a_single_task_and_a_single_method_can_be_saved(make_record, tmp_path, jointly) -> None:
    path: Path = tmp_path / "figure.png"
    draw([make_record("joint", [[0.5]], trained_jointly=jointly)]).savefig(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_records_of_different_length_are_refused(make_record) -> None:
    with pytest.raises(ValueError, match=r"got 2 with \[1, 3\] tasks"):
        draw([make_record("naive", [[0.5]]), make_record("ewc", MATRIX)])
    with pytest.raises(ValueError, match="got 0"):
        draw([])


@pytest.mark.parametrize(
    ("tasks", "most", "expected"),
    [
        (1, 5, [1]),
        (5, 5, [1, 2, 3, 4, 5]),
        (10, 5, [2, 4, 6, 8, 10]),
        (20, 5, [5, 10, 15, 20]),
        (50, 20, [5, 10, 15, 20, 25, 30, 35, 40, 45, 50]),
    ],
)
def test_ticks_are_round_and_few(tasks: int, most: int, expected: list[int]) -> None:
    assert task_ticks(tasks, most) == expected
