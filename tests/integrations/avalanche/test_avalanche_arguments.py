"""The arguments of the plugin and of the ready strategy."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.supervised import EWC, Naive
from torch import nn
from torch.optim import SGD

from rotate_ewc.integrations.avalanche import RotatedEWC, RotatedEWCPlugin
from rotate_ewc.options import (
    EstimationSettings,
    FisherType,
    KFACType,
    PenaltyOptions,
    Unsupported,
)
from tests.helpers.avalanche_training import domain_benchmark, net
from tests.helpers.exact_plugin import exact_plugin

PLUGIN = inspect.signature(RotatedEWCPlugin).parameters
STRATEGY = inspect.signature(RotatedEWC).parameters


def ready(**options: Any) -> RotatedEWC:
    model = net()
    defaults = {"model": model, "optimizer": SGD(model.parameters(), lr=0.05), "evaluator": None}
    return RotatedEWC(**{**defaults, **options})


def settings_of(plugin: RotatedEWCPlugin) -> dict[str, Any]:
    """All that a plugin was told, by the names of its arguments."""
    penalty = plugin.penalty
    found = {name: getattr(penalty.settings, name, None) for name in PLUGIN}
    of_penalty = ("mode", "plasticity", "weighting", "decay", "temperature", "damping")
    for name in (*of_penalty, "include", "exclude", "strict", "sharded"):
        found[name] = getattr(penalty, name)
    told = ("ewc_lambda", "update", "every", "num_samples", "estimation_mb_size", "group")
    for name in told:
        found[name] = getattr(plugin, name)
    return found


# --------------------------------------------------------------------------- what they are

OTHERS: dict[str, tuple[Any, Any]] = {
    "ewc_lambda": (7, 7.0),
    "mode": ("separate", "separate"),
    "update": ("loss", "loss"),
    "every": (3, 3),
    "weighting": ("uniform", "uniform"),
    "decay": (0.5, 0.5),
    "plasticity": (0.8, 0.8),
    "damping": (0.1, 0.1),
    "temperature": (2, 2.0),
    "include": (["0.*"], ("0.*",)),
    "exclude": (["3.*"], ("3.*",)),
    "strict": (False, False),
    "sharded": (True, True),
    "num_samples": (10, 10),
    "estimation_mb_size": (4, 4),
    "fisher_type": ("type2", FisherType.TYPE2),
    "mc_samples": (2, 2),
    "kfac_approx": ("reduce", KFACType.REDUCE),
    "separate_weight_and_bias": (False, False),
    "seed": (12, 12),
    "rank": (5, 5),
    "diagonal": (["3.*"], ("3.*",)),
    "storage_dtype": ("bfloat16", torch.bfloat16),
    "group": (None, None),
    "memory_budget": (2**20, 2**20),
    "num_per_example_loss_terms": (1, 1),
    "batch_size_fn": (len, len),
    "unsupported": ("skip", Unsupported.SKIP),
    "progressbar": (True, True),
}


def test_all_arguments_are_known_here() -> None:
    assert set(OTHERS) == set(PLUGIN) - {"settings"}


def test_typed_options_are_those_of_the_signature() -> None:
    own = ("ewc_lambda", "mode", "update", "every", "num_samples", "group")
    typed = PenaltyOptions.__optional_keys__
    assert set(PLUGIN) == {*own, "estimation_mb_size", *typed}
    assert PenaltyOptions.__required_keys__ == set()


@pytest.mark.parametrize("make", [RotatedEWCPlugin, lambda **o: ready(**o).rotated_ewc])
def test_settings_as_a_whole(make: Any) -> None:
    settings = EstimationSettings(seed=3, mc_samples=2)
    plugin = make(settings=settings, mc_samples=4, decay=0.5)
    assert plugin.penalty.settings == EstimationSettings(seed=3, mc_samples=4)
    assert plugin.penalty.decay == 0.5


@pytest.mark.parametrize("name", OTHERS)
def test_plugin_takes_every_argument(name: str) -> None:
    """And it arrives where it acts, with nothing else changed."""
    given, expected = OTHERS[name]
    needed: dict[str, Any] = {"update": "loss"} if name == "mode" else {}
    before = settings_of(exact_plugin(**needed))
    after = settings_of(exact_plugin(**{**needed, name: given}))
    assert before[name] != expected
    assert after == {**before, name: expected}


@pytest.mark.parametrize("name", OTHERS)
def test_strategy_hands_on_every_argument(name: str) -> None:
    given, expected = OTHERS[name]
    # In the loss no strength is found.
    needed = {"update": "loss", "ewc_lambda": 1.0} if name == "mode" else {}
    needed = {"ewc_lambda": 1.0} if name == "update" else needed
    before, after = ready(**needed), ready(**{**needed, name: given})
    assert settings_of(after.rotated_ewc) == {**settings_of(before.rotated_ewc), name: expected}


@pytest.mark.parametrize("name", PLUGIN)
def test_strategy_has_the_defaults_of_the_plugin(name: str) -> None:
    assert name in STRATEGY
    assert STRATEGY[name].default == PLUGIN[name].default
    assert STRATEGY[name].annotation == PLUGIN[name].annotation


def test_arguments_are_keywords() -> None:
    """But λ and the mode of the plugin."""
    positional = [n for n, p in PLUGIN.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["ewc_lambda", "mode"]
    with pytest.raises(TypeError, match="positional arguments"):
        exact_plugin(1.0, "merged", "loss")
    assert all(p.kind is p.KEYWORD_ONLY for p in STRATEGY.values())


@pytest.mark.parametrize("owner", [RotatedEWCPlugin, RotatedEWC])
def test_own_arguments_are_described(owner: type) -> None:
    """The others are described where they belong."""
    description = (owner.__init__.__doc__ or "").split("Raises:")[0]
    described = re.findall(r"^ +\*{0,2}(\w+): ", description, flags=re.MULTILINE)
    written = inspect.signature(inspect.unwrap(owner.__init__)).parameters
    assert described == list(written)[1:]


def test_strategy_takes_what_avalanches_own_takes() -> None:
    """All of it but what only the other penalty has."""
    theirs = set(inspect.signature(EWC).parameters)
    assert theirs - set(STRATEGY) <= {"decay_factor", "keep_importance_data", "base_kwargs"}


def test_strategy_hands_on_what_every_strategy_takes() -> None:
    strategy = ready(
        train_mb_size=5, train_epochs=3, eval_mb_size=7, device="cpu", eval_every=2,
        peval_mode="iteration", criterion=nn.CrossEntropyLoss(label_smoothing=0.1),
    )  # fmt: skip
    assert (strategy.train_mb_size, strategy.train_epochs, strategy.eval_mb_size) == (5, 3, 7)
    assert strategy.device == torch.device("cpu")
    assert (strategy.eval_every, strategy.plugins[-2].peval_mode) == (2, "iteration")
    assert strategy._criterion.label_smoothing == 0.1
    assert isinstance(ready()._criterion, nn.CrossEntropyLoss)


@pytest.mark.parametrize("name", ["ewc_lamda", "lambda_", "decay_factor"])
def test_unknown_arguments_are_named(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        exact_plugin(**{name: 1.0})
    with pytest.raises(TypeError, match=name):
        ready(**{name: 1.0})


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("ewc_lambda", -1.0, ValueError),
        ("ewc_lambda", float("nan"), ValueError),
        ("ewc_lambda", float("inf"), ValueError),
        ("ewc_lambda", "1", TypeError),
        ("ewc_lambda", True, TypeError),
        ("mode", "online", ValueError),
        ("mode", None, ValueError),
        ("update", None, ValueError),
        ("every", -1, ValueError),
        ("weighting", None, ValueError),
        ("decay", -0.5, ValueError),
        ("decay", None, TypeError),
        ("temperature", 0.0, ValueError),
        ("temperature", -1.0, ValueError),
        ("temperature", float("inf"), ValueError),
        ("temperature", "2", TypeError),
        ("include", "0.*", TypeError),
        ("exclude", "0.*", TypeError),
        ("exclude", [0], TypeError),
        ("num_samples", -3, ValueError),
        ("num_samples", 2.0, TypeError),
        ("estimation_mb_size", 0, ValueError),
        ("fisher_type", "fisher", ValueError),
        ("mc_samples", 0, ValueError),
        ("mc_samples", 1.5, TypeError),
        ("kfac_approx", "expanded", ValueError),
        ("separate_weight_and_bias", "no", TypeError),
        ("seed", 1.5, TypeError),
        ("memory_budget", 0, ValueError),
        ("memory_budget", 1e9, TypeError),
        ("unsupported", "ignore", ValueError),
        ("progressbar", "yes", TypeError),
    ],
)
def test_bad_values_are_named(name: str, value: Any, error: type[Exception]) -> None:
    """Where the plugin is made, not hours later at the end of the first task."""
    with pytest.raises(error, match=rf"^{name}(\[0\])? is .*expected"):
        exact_plugin(**{name: value})


@pytest.mark.parametrize("name", ["ewc_lambda", "num_samples", "memory_budget"])
def test_bad_values_are_named_by_the_strategy(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is -1"):
        ready(**{name: -1})


# --------------------------------------------------------------------------- lists of plugins


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_of_plugins_are_left_alone(kind: type) -> None:
    """And those that are in one come first, in the same order."""
    replays = [ReplayPlugin(mem_size=4) for _ in range(2)]
    given = kind(replays)
    strategy = ready(plugins=given)
    strategy.train(domain_benchmark(1).train_stream[0])
    assert given == kind(replays)
    assert strategy.plugins[:3] == [*replays, strategy.rotated_ewc]
    assert strategy.plugins is not given


def test_strategies_share_nothing() -> None:
    """Two of them, made with the same list, have a plugin each."""
    plugins: list[Any] = []
    first, second = ready(plugins=plugins), ready(plugins=plugins)
    first.train(domain_benchmark(1).train_stream[0])
    assert plugins == []
    assert first.rotated_ewc is not second.rotated_ewc
    assert first.rotated_ewc.penalty.num_tasks == 1
    assert second.rotated_ewc.penalty.num_tasks == 0


def test_lists_of_patterns_are_copied() -> None:
    patterns = ["0.*"]
    plugin = exact_plugin(include=patterns)
    patterns.append("3.*")
    model = net()
    strategy = Naive(
        model=model, optimizer=SGD(model.parameters(), lr=0.05), criterion=nn.CrossEntropyLoss(),
        train_mb_size=8, plugins=[plugin], evaluator=None,
    )  # fmt: skip
    strategy.train(domain_benchmark(1).train_stream[0])
    assert sorted(plugin.penalty.terms[0].anchor) == ["0.bias", "0.weight"]
    assert patterns == ["0.*", "3.*"]
