"""One run, with a plugin that is watched."""

import time
from dataclasses import replace
from importlib import metadata

import pytest
import torch

import benchmarks.runner
from benchmarks.configuration import Configuration
from benchmarks.data import ImageData
from benchmarks.methods import Variant
from benchmarks.records import Record
from benchmarks.runner import run
from benchmarks.scenarios import PermutedImages
from benchmarks.versions import versions
from rotate_ewc import RotatedAdam

PAUSE = 0.3
CONFIGURATION = Configuration(tasks=2, epochs=3, hidden=(4,), batch_size=8)


class SlowPlugin:
    """Rests at the end of every task, and counts what it is called for."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.steps = 0

    def before_backward(self, strategy, **keywords) -> None:
        if not self.steps:
            self.weights = [p.detach().clone() for p in strategy.model.parameters()]
        self.steps += 1

    def after_training_exp(self, strategy, **keywords) -> None:
        time.sleep(PAUSE)


@pytest.fixture
def watched_run(tiny_images: ImageData, monkeypatch: pytest.MonkeyPatch):
    """A function that runs with a slow plugin, and returns the record and the plugin."""

    def go(name: str = "naive") -> tuple[Record, SlowPlugin]:
        plugin = SlowPlugin()
        monkeypatch.setattr(benchmarks.runner, "make_plugin", lambda *_, **__: plugin)
        monkeypatch.setattr(benchmarks.runner, "penalty_milliseconds", lambda *_: 0.0)
        scenario = PermutedImages(tiny_images, tasks=2, seed=7)
        record = run(Variant(name, name, None), scenario, CONFIGURATION, seed=7, data_source="tiny")
        return record, plugin

    return go


def test_snapshots_do_not_count_as_training(watched_run) -> None:
    record, _ = watched_run()
    assert record.estimation_seconds >= 2 * PAUSE
    assert 0 < record.training_seconds < PAUSE


@pytest.mark.parametrize("name", ["naive", "joint"])
def test_every_example_of_every_task_is_used_in_every_epoch(watched_run, name: str) -> None:
    _, plugin = watched_run(name)
    batches = {"naive": 2 * 3, "joint": 5}[name]  # 20 examples in 8s twice, or 40
    assert plugin.steps == 3 * batches


def test_the_initial_weights_depend_on_the_seed_alone(watched_run) -> None:
    torch.manual_seed(1)
    first = watched_run()[1].weights
    torch.manual_seed(2)
    second = watched_run("joint")[1].weights
    assert len(first) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("naive", ["task 1/2: average accuracy 50.00%", "task 2/2: average accuracy 37.50%"]),
        ("joint", ["all 2 tasks: average accuracy 37.50%"]),
    ],
)
def test_logs_tell_the_accuracy_on_tasks_seen(
    watched_run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name, lines
) -> None:
    monkeypatch.setattr(benchmarks.runner, "accuracies", lambda *_: [0.5, 0.25])
    watched_run(name)
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [f"{name}, seed 7, {line}" for line in lines]
    assert captured.err == ""


def test_extra_plugins_see_the_end_of_a_task_before_the_method_does(
    tiny_images: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def after_training_exp(self, strategy, **keywords) -> None:
            calls.append(self.name)

    monkeypatch.setattr(benchmarks.runner, "make_plugin", lambda *_, **__: Named("own"))
    monkeypatch.setattr(benchmarks.runner, "penalty_milliseconds", lambda *_: 0.0)
    scenario = PermutedImages(tiny_images, tasks=2, seed=7)
    extra = [Named("first"), Named("second")]
    variant = Variant("naive", "naive", None)
    run(variant, scenario, CONFIGURATION, seed=7, data_source="tiny", extra_plugins=extra)
    assert calls == ["first", "second", "own"] * 2


def test_rotated_adam_obeys_the_penalty_of_its_plugin(
    learnable_images: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategies = []
    make = benchmarks.runner.make_strategy

    def spy(*arguments):
        strategies.append(make(*arguments))
        return strategies[-1]

    monkeypatch.setattr(benchmarks.runner, "make_strategy", spy)
    scenario = PermutedImages(learnable_images, tasks=2, seed=7)
    configuration = replace(CONFIGURATION, learning_rate=1e-2, epochs=10)
    learned = []
    for strength in (0.0, 1e6):
        variant = Variant("rotated-adam", "rotated-adam", strength)
        record = run(variant, scenario, configuration, seed=7, data_source="tiny")
        learned.append(record.accuracy_matrix[1][1])
        assert record.penalty_ms_per_step == 0.0, "it is no part of the loss"
        optimizer = strategies[-1].optimizer
        assert isinstance(optimizer, RotatedAdam)
        assert (optimizer.penalty.num_tasks, optimizer.penalty.strength) == (2, strength)
    assert learned[0] > learned[1] + 0.2, "with such a strength nothing new is learned"


def test_versions_are_looked_up_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions()["torch"] == torch.__version__
    assert versions()["avalanche"] == metadata.version("avalanche-lib")

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert versions()["rotate_ewc"] == "unknown"
