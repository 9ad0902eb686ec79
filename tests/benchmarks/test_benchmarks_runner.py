"""One run, with a plugin that is watched."""

import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmarks.runner
from benchmarks.avalanche_names import ReplayPlugin
from benchmarks.configuration import Configuration
from benchmarks.data import ImageData
from benchmarks.methods import METHODS, Variant
from benchmarks.records import Record, read_records, write_records
from benchmarks.runner import _train_once, run
from benchmarks.scenarios import PermutedImages, RotatedImages, SplitImages
from benchmarks.versions import versions
from rotate_ewc import RotatedAdam
from rotate_ewc.errors import NotFiniteError

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
    start = time.perf_counter()
    record, _ = watched_run()
    elapsed = time.perf_counter() - start
    assert record.estimation_seconds >= 2 * PAUSE
    assert 0 < record.training_seconds <= elapsed - record.estimation_seconds


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


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_tasks_with_heads_of_their_own(
    learnable_images: ImageData, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    variant = Variant(name, name, METHODS[name].default_strength)
    configuration = replace(CONFIGURATION, learning_rate=1e-2, epochs=5)
    scenario = SplitImages(learnable_images, 2, "task")
    record = run(variant, scenario, configuration, seed=7, data_source="tiny", quiet=True)
    assert record.accuracy_matrix[0][0] > 0.7, "the first task is learned"
    assert min(map(min, record.accuracy_matrix)) >= 0
    assert max(map(max, record.accuracy_matrix)) <= 1
    assert record.average_accuracy == pytest.approx(np.mean(record.accuracy_matrix[-1]))
    assert record.average_accuracy > 0.55
    assert not record.diverged
    has_strength = METHODS[name].default_strength is not None
    assert (record.state_bytes > 0) == (record.estimation_seconds > 0) == has_strength
    assert record.configuration["strength"] == record.strength == variant.strength
    assert capsys.readouterr() == ("", ""), "it was to be quiet"


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if method.default_strength is not None]
)
def test_every_strength_makes_a_difference(learnable_images: ImageData, name: str) -> None:
    configuration = replace(CONFIGURATION, learning_rate=1e-2, epochs=10)
    networks = []
    for strength in (0.0, 10.0):
        weights: list[torch.Tensor] = []
        scenario = SplitImages(learnable_images, 2, "domain")
        variant = Variant(name, name, strength)
        run(
            *(variant, scenario, configuration),
            seed=7,
            data_source="tiny",
            quiet=True,
            extra_plugins=[Last(weights)],
        )
        networks.append(torch.cat(weights))
    assert not torch.allclose(networks[0], networks[1])


class Last:
    """Keeps the weights at the end of the last task."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        self.weights = weights

    def after_training_exp(self, strategy, **keywords) -> None:
        self.weights[:] = [p.detach().flatten().clone() for p in strategy.model.parameters()]


def run_with(plugin: object, images: ImageData, monkeypatch: pytest.MonkeyPatch) -> Record:
    monkeypatch.setattr(benchmarks.runner, "make_plugin", lambda *_, **__: plugin)
    monkeypatch.setattr(benchmarks.runner, "penalty_milliseconds", lambda *_: 0.0)
    scenario = PermutedImages(images, tasks=2, seed=7)
    variant = Variant("ewc", "ewc", 1.0)
    return run(variant, scenario, CONFIGURATION, seed=7, data_source="tiny", quiet=True)


class Complains:
    """Refuses to take a snapshot, with a network as it is or spoiled."""

    def __init__(self, value: float | None, error: Exception) -> None:
        self.value = value
        self.error = error

    def after_training_exp(self, strategy, **keywords) -> None:
        if self.value is not None:
            with torch.no_grad():
                next(strategy.model.parameters())[0, 0] = self.value
        raise self.error


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_network_that_diverges_ends_in_a_record(
    learnable_images: ImageData, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    plugin = Complains(value, ValueError("not finite"))
    record = run_with(plugin, learnable_images, monkeypatch)
    assert record.diverged
    assert 0 <= record.average_accuracy <= 1


@pytest.mark.parametrize(
    ("value", "error"), [(None, ValueError("other")), (float("nan"), TypeError("other"))]
)
def test_other_errors_are_not_taken_for_divergence(
    learnable_images: ImageData, monkeypatch: pytest.MonkeyPatch, value, error: Exception
) -> None:
    with pytest.raises(type(error), match="other"):
        run_with(Complains(value, error), learnable_images, monkeypatch)


@pytest.mark.filterwarnings("ignore:the Fisher matrix:RuntimeWarning")
@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if method.default_strength is not None]
)
def test_a_strength_that_is_far_too_large_ends_in_a_record_that_can_be_written(
    learnable_images: ImageData, tmp_path: Path, name: str
) -> None:
    scenario = SplitImages(learnable_images, 2, "domain")
    configuration = replace(CONFIGURATION, optimizer="sgd", learning_rate=1.0)
    variant = Variant(name, name, 1e30)
    record = run(variant, scenario, configuration, seed=7, data_source="tiny", quiet=True)
    write_records(tmp_path / "results.json", "scenario", [record])
    assert read_records(tmp_path / "results.json")[1] == [record]


@pytest.mark.parametrize("make", [PermutedImages, RotatedImages])
def test_a_replay_buffer_is_filled_and_used(
    learnable_images: ImageData, monkeypatch: pytest.MonkeyPatch, make
) -> None:
    strategies = []
    original = benchmarks.runner.make_strategy

    def spy(*arguments):
        strategies.append(original(*arguments))
        return strategies[-1]

    monkeypatch.setattr(benchmarks.runner, "make_strategy", spy)
    kept = []
    for replay in (0, 60):
        configuration = replace(CONFIGURATION, learning_rate=1e-2, epochs=10, replay=replay)
        scenario = make(learnable_images, tasks=2, seed=7)
        variant = Variant("naive", "naive", None)
        record = run(variant, scenario, configuration, seed=7, data_source="tiny", quiet=True)
        kept.append(record.accuracy_matrix[1][0])
        buffers = [p for p in strategies[-1].plugins if isinstance(p, ReplayPlugin)]
        assert [len(buffer.storage_policy.buffer) for buffer in buffers] == [60] * (replay > 0)
    assert kept[1] > kept[0]


def test_a_run_with_replay_is_repeatable(learnable_images: ImageData) -> None:
    matrices = []
    for _ in range(2):
        scenario = SplitImages(learnable_images, 2, "task")
        configuration = replace(CONFIGURATION, replay=30)
        variant = Variant("ewc", "ewc", 1.0)
        record = run(variant, scenario, configuration, seed=7, data_source="tiny", quiet=True)
        matrices.append(record.accuracy_matrix)
    assert matrices[0] == matrices[1]


@pytest.mark.parametrize(
    ("error", "weight", "reached"),
    [(None, 1.0, True), (NotFiniteError(), 1.0, False), (ValueError(), float("nan"), False)],
)
def test_a_network_that_cannot_be_consolidated(
    error: Exception | None, weight: float, reached: bool
) -> None:
    """It may have diverged, or be about to: its squares overflow though its parameters do not."""
    assert _train_once(Strategy(error, weight), None) is reached


def test_other_refusals_are_errors() -> None:
    with pytest.raises(ValueError, match="anything else"):
        _train_once(Strategy(ValueError("anything else"), 1.0), None)


class Strategy:
    """Ends its training with an error, and parameters of some value."""

    def __init__(self, error: Exception | None, weight: float) -> None:
        self.error, self.model = error, torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.model.weight, weight)

    def train(self, _: None) -> None:
        if self.error is not None:
            raise self.error
