"""Turns and medians, without a look at the clock."""

from collections.abc import Iterator

import pytest

from benchmarks.rounds import WARM_UPS, median_ratio, time_in_rounds


def test_contenders_take_turns_and_every_other_round_is_backwards() -> None:
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    medians = time_in_rounds(contenders, rounds=3, repetitions=2)
    turns = [calls[index] for index in range(0, len(calls), WARM_UPS + 2)]
    assert turns == list("abc" + "cba" + "abc")
    assert calls == [name for name in turns for _ in range(WARM_UPS + 2)]
    assert list(medians) == list("abc")
    assert all(len(times) == 3 and min(times) > 0 for times in medians.values())


def test_a_round_is_the_median_of_its_turn_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: Iterator[list[float]] = iter([[0.5, 0.1, 0.2], [1.0, 9.0, 1.0]])
    monkeypatch.setattr("benchmarks.rounds.timeit.repeat", lambda *_, **__: next(turns))
    medians = time_in_rounds({"work": lambda: None}, rounds=2, repetitions=3)
    assert medians == {"work": [200.0, 1000.0]}


def test_ratios_are_taken_within_rounds() -> None:
    # The ratio of the medians would be 10 / 10.
    assert median_ratio([30.0, 10.0, 2.0], [10.0, 20.0, 1.0]) == 2.0


def test_nothing_is_printed_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    time_in_rounds({"work": lambda: None}, rounds=2, repetitions=1)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
