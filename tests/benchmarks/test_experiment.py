"""One run, with plugins that are watched."""

import itertools
import math
from dataclasses import asdict, replace
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import experiment
from benchmarks.command import versions
from benchmarks.configuration import Configuration
from benchmarks.data import ImageData
from benchmarks.experiment import (
    EVALUATION_BATCH_SIZE,
    Schedule,
    _train_once,
    accuracies,
    accuracy,
    run,
    state_bytes,
)
from benchmarks.methods import (
    AUTO,
    METHODS,
    OPTIMIZERS,
    SGD_FACTOR,
    Variant,
    make_optimizer,
    make_plugin,
    make_strategy,
)
from benchmarks.results import Record
from benchmarks.scenarios import PermutedImages, RotatedImages, SplitImages
from benchmarks.speed.networks import perceptron
from rotate_ewc.errors import NotFiniteError
from rotate_ewc.integrations import avalanche
from rotate_ewc.integrations.avalanche import RotatedEWCPlugin

CONFIGURATION = Configuration(tasks=2, epochs=3, hidden=(4,), batch_size=8)
WITH_STRENGTH = [name for name, method in METHODS.items() if method.default_strength is not None]
ATTACHED = [name for name, method in METHODS.items() if method.attached]
CPU = torch.device("cpu")


class Watcher:
    """Counts steps, and keeps the weights at the first step and at the end."""

    def __init__(self) -> None:
        self.first: list[torch.Tensor] = []
        self.last: list[torch.Tensor] = []
        self.steps = 0
        self.strategy: Any = None

    def before_backward(self, strategy: Any, **keywords: Any) -> None:
        if not self.steps:
            self.first = [p.detach().clone() for p in strategy.model.parameters()]
        self.steps += 1
        self.strategy = strategy

    def after_training_exp(self, strategy: Any, **keywords: Any) -> None:
        self.last = [p.detach().clone() for p in strategy.model.parameters()]


def watched(
    name: str, images: ImageData, strength: float | None = None, **options: Any
) -> tuple[Record, Watcher]:
    """Run a method on two permuted tasks."""
    watcher = Watcher()
    record = run(
        Variant(name, strength),
        PermutedImages(images, tasks=2, seed=7),
        replace(CONFIGURATION, **options),
        seed=7,
        extra_plugins=[watcher],
        quiet=True,
    )
    return record, watcher


@pytest.mark.parametrize(("name", "batches"), [("naive", 2 * 3), ("joint", 5)])
def test_every_example_of_every_task_is_used_in_every_epoch(
    tiny_images: ImageData, name: str, batches: int
) -> None:
    """20 examples in eights twice, or 40."""
    assert watched(name, tiny_images)[1].steps == 3 * batches


def test_the_initial_weights_depend_on_the_seed_alone(tiny_images: ImageData) -> None:
    torch.manual_seed(1)
    first = watched("naive", tiny_images)[1].first
    torch.manual_seed(2)
    second = watched("joint", tiny_images)[1].first
    assert len(first) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "naive",
            [
                "task 1 of 2 tasks: average accuracy 50.00%",
                "task 2 of 2 tasks: average accuracy 37.50%",
            ],
        ),
        ("joint", ["all 2 tasks: average accuracy 37.50%"]),
    ],
)
def test_logs_tell_the_accuracy_on_tasks_seen(
    tiny_images: ImageData,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    lines: list[str],
) -> None:
    monkeypatch.setattr(experiment, "accuracies", lambda *_: [0.5, 0.25])
    scenario = PermutedImages(tiny_images, tasks=2, seed=7)
    run(Variant(name, None), scenario, CONFIGURATION, seed=7)
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [f"{name}, seed 7, {line}" for line in lines]
    assert captured.err == ""


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_tasks_with_heads_of_their_own(
    learnable_images: ImageData, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    variant = Variant(name, METHODS[name].default_strength)
    configuration = replace(CONFIGURATION, learning_rate=2e-2, epochs=3)
    scenario = SplitImages(learnable_images, 2, "task")
    record = run(variant, scenario, configuration, seed=7, quiet=True)
    assert record.accuracy_matrix[0][0] > 0.7, "the first task is learned"
    assert record.average_accuracy == pytest.approx(np.mean(record.accuracy_matrix[-1]))
    assert 0.55 < record.average_accuracy <= 1
    assert not record.diverged
    has_strength = METHODS[name].default_strength is not None
    assert (record.state_bytes > 0) == (record.estimation_seconds > 0) == has_strength
    assert record.configuration["strength"] == record.strength == variant.strength
    assert capsys.readouterr() == ("", ""), "it was to be quiet"


@pytest.mark.parametrize("name", WITH_STRENGTH)
def test_every_strength_makes_a_difference(learnable_images: ImageData, name: str) -> None:
    ends = [
        watched(name, learnable_images, strength, learning_rate=1e-2, epochs=1)[1].last
        for strength in (0.0, 10.0)
    ]
    assert any(not torch.allclose(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:the penalty will diverge")
@pytest.mark.parametrize("name", WITH_STRENGTH)
def test_a_strength_that_is_far_too_large_ends_in_a_record(
    learnable_images: ImageData, name: str
) -> None:
    options = {"optimizer": "sgd", "learning_rate": 1.0, "epochs": 1}
    record, _ = watched(name, learnable_images, 1e30, **options)
    numbers = [v for v in asdict(record).values() if isinstance(v, float)]
    assert all(map(math.isfinite, numbers)), "or else it could not be written"


class Complains:
    """Refuses to take a snapshot, with a network as it is or spoiled."""

    def __init__(self, value: float | None, error: Exception) -> None:
        self.value = value
        self.error = error

    def after_training_exp(self, strategy: Any, **keywords: Any) -> None:
        if self.value is not None:
            with torch.no_grad():
                next(strategy.model.parameters())[0, 0] = self.value
        raise self.error


def run_with(plugin: object, images: ImageData, monkeypatch: pytest.MonkeyPatch) -> Record:
    monkeypatch.setattr(experiment, "make_plugin", lambda *_, **__: plugin)
    return watched("ewc", images, 1.0)[0]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
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
    learnable_images: ImageData,
    monkeypatch: pytest.MonkeyPatch,
    value: float | None,
    error: Exception,
) -> None:
    with pytest.raises(type(error), match="other"):
        run_with(Complains(value, error), learnable_images, monkeypatch)


@pytest.mark.parametrize(
    ("error", "weight", "reached"),
    [(None, 1.0, True), (NotFiniteError(), 1.0, False), (ValueError(), float("nan"), False)],
)
def test_a_network_that_cannot_be_consolidated(
    error: Exception | None, weight: float, reached: bool
) -> None:
    """It may have diverged, or be about to: its squares overflow though its parameters do not."""
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, weight)

    def train(_: None) -> None:
        if error is not None:
            raise error

    assert _train_once(SimpleNamespace(model=model, train=train), None) is reached


@pytest.mark.parametrize("make", [PermutedImages, RotatedImages])
def test_a_replay_buffer_is_filled_and_used(learnable_images: ImageData, make: Any) -> None:
    kept = []
    for replay in (0, 60):
        configuration = replace(CONFIGURATION, learning_rate=2e-2, epochs=4, replay=replay)
        watcher = Watcher()
        record = run(
            Variant("naive", None),
            make(learnable_images, tasks=2, seed=7),
            configuration,
            seed=7,
            extra_plugins=[watcher],
            quiet=True,
        )
        kept.append(record.accuracy_matrix[1][0])
        policies = [getattr(p, "storage_policy", None) for p in watcher.strategy.plugins]
        assert [len(policy.buffer) for policy in policies if policy] == [60] * (replay > 0)
    assert kept[1] > kept[0]


@pytest.mark.parametrize(
    ("name", "optimizer"),
    list(zip(itertools.cycle(ATTACHED), OPTIMIZERS, strict=False)),
)
def test_an_attached_penalty_is_obeyed_by_every_optimizer(
    learnable_images: ImageData, name: str, optimizer: str
) -> None:
    stable = name != "rotated-ewc-gradient"
    learned = []
    for strength in (0.0, 1e6 if stable else 3.0):
        options: dict[str, Any] = {"learning_rate": 2e-2, "epochs": 3, "optimizer": optimizer}
        record, watcher = watched(name, learnable_images, strength, **options)
        learned.append(record.accuracy_matrix[1])
        (plugin,) = [one for one in watcher.strategy.plugins if isinstance(one, RotatedEWCPlugin)]
        assert (plugin.penalty.num_tasks, plugin.penalty.strength) == (2, strength)
        assert plugin.update == (name.removeprefix("rotated-ewc").strip("-") or "rotated")
    (old, new), (kept, hardly) = learned
    assert kept >= old, "the first task is protected"
    if stable:
        assert new > hardly + 0.15, "with such a strength nothing new is learned"


def test_versions_are_looked_up_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions()["torch"] == torch.__version__
    assert versions()["avalanche"] == metadata.version("avalanche-lib")

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert versions()["rotate_ewc"] == "unknown"


# Methods


def strength_of(plugin: Any) -> float:
    """λ of a plugin, under the name that its author gave it."""
    names = ("ewc_lambda", "si_lambda", "_lambda", "strength")
    found = [getattr(plugin, name) for name in names if hasattr(plugin, name)]
    (strength,) = found or [plugin.lwf.alpha]
    return float(strength)


@pytest.mark.parametrize("name", WITH_STRENGTH)
def test_the_strength_of_a_variant_reaches_its_plugin(name: str) -> None:
    plugin = make_plugin(Variant(name, 7.0), Configuration(), seed=1, examples=50)
    assert strength_of(plugin) == 7.0
    assert math.log10(METHODS[name].centre).is_integer()


def test_variants_of_ewc_differ_in_their_mode() -> None:
    names = ("ewc", "ewc-online", "rotated-ewc", "rotated-ewc-separate")
    ewc, online, merged, separate = (
        make_plugin(Variant(name, 1.0), Configuration(), seed=1, examples=50) for name in names
    )
    assert (ewc.mode, ewc.decay_factor) == ("separate", None)
    assert (online.mode, online.decay_factor) == ("online", 1.0)
    assert (merged.penalty.mode, separate.penalty.mode) == ("merged", "separate")


@pytest.mark.parametrize(
    ("samples", "examples", "expected"), [(0, 50, None), (10, 50, 10), (50, 50, None)]
)
def test_a_sample_is_drawn_only_from_more_examples(
    samples: int, examples: int, expected: int | None
) -> None:
    configuration = Configuration(fisher_samples=samples)
    variant = Variant("rotated-ewc", 1.0)
    plugin: Any = make_plugin(variant, configuration, seed=1, examples=examples)
    assert plugin.num_samples == expected


@pytest.mark.parametrize("name", ["naive", "rotated-ewc", "ncl"])
@pytest.mark.parametrize(
    ("optimizer", "kind", "momentum"),
    [
        ("adam", torch.optim.Adam, None),
        ("adamw", torch.optim.AdamW, None),
        ("rmsprop", torch.optim.RMSprop, 0),
        ("sgd", torch.optim.SGD, 0.9),
    ],
)
def test_the_optimizer_is_the_one_asked_for_but_one_method_needs_sgd(
    name: str, optimizer: str, kind: type, momentum: float | None
) -> None:
    rate = 0.25
    configuration = Configuration(optimizer=optimizer, learning_rate=rate)
    if name == "ncl" and optimizer != "sgd":
        kind, momentum, rate = torch.optim.SGD, 0.9, SGD_FACTOR * rate
    model = perceptron(6, 4, 10)
    made = make_optimizer(model, configuration, METHODS[name])
    (group,) = made.param_groups
    assert group["lr"] == rate
    assert len(group["params"]) == 4
    assert type(make_strategy(model, configuration, made, []).optimizer) is kind
    assert group.get("momentum") == momentum


def test_what_the_package_is_to_find_reaches_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(avalanche, "RotatedEWCPlugin", lambda **options: made.append(options))
    for plasticity in (None, 0.5):
        configuration = Configuration(temperature=AUTO, plasticity=plasticity)
        make_plugin(Variant("rotated-ewc", AUTO), configuration, seed=1, examples=50)
    first, second = made
    assert first["ewc_lambda"] == first["temperature"] == AUTO
    assert "plasticity" not in first
    assert second == first | {"plasticity": 0.5}


@pytest.mark.parametrize(
    ("decays", "warm_up", "expected"),
    [
        (True, 0.0, [1.0, 0.75, 0.5, 0.25]),
        (False, 0.5, [0.0, 0.5, 1.0, 1.0]),
        (True, 0.5, [0.0, 0.375, 0.5, 0.25]),
    ],
)
def test_rates_of_every_task(decays: bool, warm_up: float, expected: list[float]) -> None:
    """Four steps a task: two epochs of two batches, the last of which is not full."""
    group = {"lr": 0.1}
    strategy = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=[group]),
        experience=SimpleNamespace(dataset=range(7)),
        train_mb_size=4,
        train_epochs=2,
    )
    schedule = Schedule(decays, warm_up)
    for _ in range(2):
        schedule.before_training_exp(strategy)
        rates = []
        for _ in range(4):
            schedule.before_training_iteration(strategy)
            rates.append(group["lr"] / 0.1)
        assert rates == pytest.approx(expected)


# Accuracy and memory


def test_accuracy_is_the_fraction_of_right_answers_over_all_batches() -> None:
    size = EVALUATION_BATCH_SIZE + 3  # an uneven second batch
    inputs = torch.eye(4)[torch.arange(size) % 4]
    labels = torch.arange(size) % 4
    labels[:5] = 3 - labels[:5]  # five wrong
    assert accuracy(nn.Identity(), inputs, labels, CPU) == (size - 5) / size


def test_accuracy_is_measured_in_evaluation_mode_which_is_left_again() -> None:
    model = nn.Sequential(nn.Identity(), nn.Dropout(p=1.0))
    assert accuracy(model, torch.eye(4), torch.arange(4), CPU) == 1.0
    assert model.training


def test_every_task_is_tested_with_its_own_permutation(tiny_images: ImageData) -> None:
    scenario = PermutedImages(tiny_images, tasks=3, seed=0)

    class Tell(nn.Module):
        """Right if the pixels are in the order of task 1, else wrong."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            right = bool((x[0] == scenario.test_set(1)[0][0]).all())
            return torch.eye(10)[torch.arange(len(x)) + (0 if right else 1)]

    assert accuracies(Tell(), scenario, CPU) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "copies"),
    [
        ("naive", 0),
        ("ewc", 2 * 2),  # an anchor and importances for every task
        ("ewc-online", 2),
        ("si", 4),  # the path so far, its start, the weights before a step, importances
        ("mas", 2),
        ("lwf", 1),  # the last network
    ],
)
def test_methods_keep_so_many_copies_of_the_parameters(
    learnable_images: ImageData, name: str, copies: int
) -> None:
    record, watcher = watched(name, learnable_images, 1.0)
    parameters = sum(p.numel() for p in watcher.strategy.model.parameters())
    assert record.state_bytes == copies * parameters * 4


def test_every_tensor_counts_once_however_it_is_kept() -> None:
    model = nn.Linear(3, 2)
    shared = torch.zeros(10)
    plugin = SimpleNamespace(
        one={"a": shared, "b": [shared[:4], (torch.zeros(2, dtype=torch.float64),)]},
        two=SimpleNamespace(inner=shared, network=nn.Linear(3, 2)),
        live=[model.weight, model, model.bias.data],
        other=(1, "text", None, int),
    )
    plugin.itself = plugin
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    plugin.optimizer = optimizer
    assert state_bytes(plugin, model, optimizer) == 10 * 4 + 2 * 8 + 8 * 4
    assert state_bytes(None, model, optimizer) == 0
