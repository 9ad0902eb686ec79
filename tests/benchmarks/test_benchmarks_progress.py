"""Progress on a terminal and in a log."""

import io
import sys

import pytest

from benchmarks.progress import ProgressPlugin


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def work() -> None:
    with ProgressPlugin("naive, seed 0", ["task 1/2", "task 2/2"], steps=6) as progress:
        for accuracy in (0.5, 0.25):
            for _ in range(3):
                progress.after_training_iteration(strategy=None)
            progress.finish_experience(accuracy)


def test_a_terminal_has_a_bar_and_no_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    work()
    shown = [text for text in terminal.getvalue().split("\r") if text.strip()]
    assert "naive, seed 0, task 1/2:   0%" in shown[1]
    assert "naive, seed 0, task 2/2: 100%" in shown[-1]
    assert "6/6" in shown[-1]
    assert "average accuracy 25.00%" in shown[-1]
    assert capsys.readouterr().out == ""


def test_a_log_has_a_line_per_task_and_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    work()
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "naive, seed 0, task 1/2: average accuracy 50.00%",
        "naive, seed 0, task 2/2: average accuracy 25.00%",
    ]
    assert captured.err == ""
