"""The table."""

import io

from rich.console import Console

from benchmarks.report import results_table


def rendered(records, width: int = 110) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(results_table(records, "Title [with brackets]"))
    return console.file.getvalue()


def row(text: str, label: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(label)]
    return line.removeprefix(label).split()


def test_one_seed_has_no_deviation(make_record) -> None:
    text = rendered([make_record("naive", [[0.9, 0.1], [0.5, 0.75]])])
    assert row(text, "naive") == ["62.50", "25.00", "-12.50", "12.3", "0.50", "1.50"]
    assert "±" not in text


def test_several_seeds_have_mean_and_sample_deviation(make_record) -> None:
    records = [
        make_record("naive", [[accuracy]], training_seconds=seconds)
        for accuracy, seconds in ((0.8, 1.0), (0.9, 2.0), (1.0, 6.0))
    ]
    cells = row(rendered(records), "naive")
    assert cells[:3] == ["90.00", "±", "10.00"]  # 8.16 would be the population's
    assert cells[-3] == "3.0"


def test_joint_training_has_dashes(make_record) -> None:
    records = [make_record("joint", [[0.9]], forgetting=None, backward_transfer=None)] * 2
    assert row(rendered(records), "joint")[3:5] == ["–", "–"]


def test_brackets_are_shown_and_not_taken_for_styles(make_record) -> None:
    text = rendered([make_record("ewc[rank=3]", [[0.9]])])
    for part in ("Title [with brackets]", "ewc[rank=3]", "[points]", "[ms/step]"):
        assert part in text


def test_one_seed_fits_a_narrow_terminal(make_record) -> None:
    text = rendered([make_record("rotated-ewc", [[0.9]])], width=80)
    assert "…" not in text
    assert row(text, "rotated-ewc") == ["90.00", "25.00", "-12.50", "12.3", "0.50", "1.50"]
