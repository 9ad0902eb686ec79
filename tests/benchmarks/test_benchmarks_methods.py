"""Which runs a configuration asks for, and the strategies they are made with."""

import math
from typing import Any

import pytest
import torch

from benchmarks.configuration import Configuration
from benchmarks.methods import (
    DEFAULT_METHODS,
    METHODS,
    Variant,
    make_optimizer,
    make_plugin,
    make_strategy,
    variants,
)
from benchmarks.models import multilayer_perceptron
from rotate_ewc import RotatedAdam


def labels(configuration: Configuration) -> list[str]:
    return [variant.label for variant in variants(configuration)]


def test_every_default_method_is_run_once() -> None:
    assert labels(Configuration()) == list(DEFAULT_METHODS)
    rotated = ("rotated-ewc", "rotated-ewc-separate", "rotated-adam")
    assert ("naive", "ewc", *rotated, "joint") == DEFAULT_METHODS


def test_any_method_can_be_asked_for() -> None:
    assert labels(Configuration(methods=tuple(METHODS))) == list(METHODS)


def strength_of(plugin: Any) -> float:
    """λ of a plugin, under the name that its author gave it."""
    names = ("ewc_lambda", "si_lambda", "_lambda", "strength")
    (found,) = [getattr(plugin, name) for name in names if hasattr(plugin, name)] or [
        plugin.lwf.alpha
    ]
    return found


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if method.default_strength is not None]
)
def test_the_strength_of_a_variant_reaches_its_plugin(name: str) -> None:
    plugin = make_plugin(Variant(name, name, 7.0), Configuration(), seed=1, examples=50)
    assert strength_of(plugin) == 7.0


def test_searches_are_around_powers_of_ten() -> None:
    for method in METHODS.values():
        assert math.log10(method.centre).is_integer()


def test_online_ewc_adds_importances_up_and_ewc_keeps_them_apart() -> None:
    online, separate = (
        make_plugin(Variant(name, name, 1.0), Configuration(), seed=1, examples=50)
        for name in ("ewc-online", "ewc")
    )
    assert (online.mode, online.decay_factor) == ("online", 1.0)
    assert (separate.mode, separate.decay_factor) == ("separate", None)


def test_several_strengths_are_told_apart() -> None:
    configuration = Configuration(methods=("ewc", "naive"), baseline_ewc_lambda=(0.5, 100.0))
    assert labels(configuration) == ["ewc[λ=0.5]", "ewc[λ=100]", "naive"]
    assert [variant.name for variant in variants(configuration)] == ["ewc", "ewc", "naive"]
    assert [variant.strength for variant in variants(configuration)] == [0.5, 100.0, None]


def test_only_joint_training_is_joint() -> None:
    assert [name for name, method in METHODS.items() if method.trained_jointly] == ["joint"]


def test_each_strength_reaches_its_plugin() -> None:
    configuration = Configuration(baseline_ewc_lambda=(7.0,), ewc_lambda=4.0)
    found = {
        variant.name: make_plugin(variant, configuration, seed=1, examples=50)
        for variant in variants(configuration)
    }
    assert found["naive"] is None
    assert found["joint"] is None
    assert found["ewc"].ewc_lambda == 7.0
    assert found["ewc"].mode == "separate"
    assert found["rotated-ewc"].ewc_lambda == 4.0
    assert found["rotated-ewc-separate"].ewc_lambda == 4.0


def test_the_rotated_methods_differ_in_their_mode() -> None:
    configuration = Configuration(methods=("rotated-ewc", "rotated-ewc-separate"))
    modes = [
        make_plugin(variant, configuration, seed=1, examples=50).penalty.mode
        for variant in variants(configuration)
    ]
    assert modes == ["merged", "separate"]


@pytest.mark.parametrize(
    ("samples", "examples", "expected"), [(0, 50, None), (10, 50, 10), (50, 50, None)]
)
def test_a_sample_is_drawn_only_from_more_examples(samples, examples, expected) -> None:
    configuration = Configuration(methods=("rotated-ewc",), fisher_samples=samples)
    (variant,) = variants(configuration)
    plugin = make_plugin(variant, configuration, seed=1, examples=examples)
    assert plugin.num_samples == expected


@pytest.mark.parametrize(
    ("name", "kind", "momentum"), [("adam", torch.optim.Adam, None), ("sgd", torch.optim.SGD, 0.9)]
)
def test_the_optimizer_is_the_one_asked_for(name, kind, momentum) -> None:
    configuration = Configuration(optimizer=name, learning_rate=0.25)
    model = multilayer_perceptron(6, (4,), 10)
    optimizer = make_optimizer(model, configuration, METHODS["rotated-ewc"])
    strategy = make_strategy(model, configuration, optimizer, [])
    (group,) = strategy.optimizer.param_groups
    assert type(strategy.optimizer) is kind
    assert group["lr"] == 0.25
    assert group.get("momentum") == momentum
    assert group["weight_decay"] == 0


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_rotated_adam_has_an_optimizer_of_its_own(name: str) -> None:
    configuration = Configuration(methods=("rotated-adam",), optimizer=name, learning_rate=0.25)
    (variant,) = variants(configuration)
    plugin = make_plugin(variant, configuration, seed=1, examples=50)
    assert (plugin.update, plugin.penalty.mode, plugin.ewc_lambda) == ("optimizer", "merged", 3.0)
    model = multilayer_perceptron(6, (4,), 10)
    optimizer = make_optimizer(model, configuration, variant.method)
    assert isinstance(optimizer, RotatedAdam)
    assert optimizer.model is model
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert len(optimizer.param_groups[0]["params"]) == 4


def test_no_other_method_has_an_optimizer_of_its_own() -> None:
    model = multilayer_perceptron(6, (4,), 10)
    for name, method in METHODS.items():
        optimizer = make_optimizer(model, Configuration(), method)
        assert isinstance(optimizer, RotatedAdam) == (name == "rotated-adam")
