"""Settings and choices: strings and members, defaults, and what types say of them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import re
from typing import Any, get_type_hints

import pytest

from rotate_ewc import (
    EKFACLinearOperator,
    EKFACPenalty,
    EstimationOptions,
    EstimationSettings,
    FisherType,
    KFACType,
    Mode,
    PenaltyOptions,
    Reduction,
    Unsupported,
    Weighting,
)
from rotate_ewc.options import Choice

CHOICES = [FisherType, KFACType, Mode, Reduction, Unsupported, Weighting]
FIELDS = {field.name: field for field in dataclasses.fields(EstimationSettings)}
OTHERS: dict[str, Any] = {
    "fisher_type": "empirical",
    "mc_samples": 3,
    "kfac_approx": "reduce",
    "separate_weight_and_bias": False,
    "seed": 5,
    "memory_budget": 1000,
    "num_per_example_loss_terms": 7,
    "batch_size_fn": len,
    "unsupported": "skip",
    "progressbar": True,
}


@pytest.mark.parametrize("kind", CHOICES)
def test_members_are_their_strings(kind: type[Choice]) -> None:
    for member in kind:
        text = member.value
        assert member == text
        assert (str(member), repr(member), f"{member}") == (text, repr(text), text)
        assert json.dumps({"x": member}) == json.dumps({"x": text})
        assert kind(text) is member
        assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member


def test_strings_become_members() -> None:
    settings = EstimationSettings(fisher_type="TYPE2", kfac_approx="reduce", unsupported="skip")
    assert settings.fisher_type is FisherType.TYPE2
    assert settings.kfac_approx is KFACType.REDUCE
    assert settings.unsupported is Unsupported.SKIP
    penalty = EKFACPenalty(mode="separate", weighting="Uniform")
    assert penalty.mode is Mode.SEPARATE
    assert penalty.weighting is Weighting.UNIFORM


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EstimationSettings().seed = 3


def test_single_options_replace_those_of_the_settings() -> None:
    assert set(OTHERS) == set(FIELDS)
    settings = EstimationSettings(**OTHERS)
    assert EstimationSettings.gather(None, OTHERS) == settings
    assert EstimationSettings.gather(None, {}) == EstimationSettings()
    assert EstimationSettings.gather(settings, {}) == settings
    assert EstimationSettings.gather(EstimationSettings(seed=9), OTHERS) == settings
    changed = EstimationSettings.gather(settings, {"seed": 9})
    assert changed == EstimationSettings(**{**OTHERS, "seed": 9})


@pytest.mark.parametrize("name", OTHERS)
def test_penalty_takes_every_setting(name: str) -> None:
    value = OTHERS[name]
    assert getattr(EstimationSettings(), name) != value
    expected = EstimationSettings(**{name: value})
    assert EKFACPenalty(**{name: value}).settings == expected
    assert EKFACPenalty(settings=expected).settings == expected
    assert EKFACPenalty(settings=EstimationSettings(**OTHERS), **{name: value}).settings == (
        EstimationSettings(**OTHERS)
    )


def test_types_of_options_are_those_of_the_settings() -> None:
    assert list(EstimationOptions.__annotations__) == list(FIELDS)
    assert not EstimationOptions.__total__
    options, settings = get_type_hints(EstimationOptions), get_type_hints(EstimationSettings)
    for name, kind in settings.items():
        is_choice = inspect.isclass(kind) and issubclass(kind, Choice)
        assert options[name] == (kind | str if is_choice else kind), name


def test_types_of_penalty_options_are_those_of_the_constructor() -> None:
    """All but what the plugin calls otherwise, or takes itself."""
    parameters = inspect.signature(EKFACPenalty).parameters
    assert set(PenaltyOptions.__annotations__) == set(parameters) - {"strength", "mode"}
    hints = get_type_hints(EKFACPenalty.__init__)
    for name, kind in get_type_hints(PenaltyOptions).items():
        assert kind == hints.get(name, get_type_hints(EstimationOptions).get(name)), name


@pytest.mark.parametrize("owner", [EKFACLinearOperator, EKFACPenalty])
def test_signatures_show_every_setting(owner: type) -> None:
    parameters = inspect.signature(owner).parameters
    for name, field in FIELDS.items():
        assert parameters[name].default == field.default
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_every_setting_is_described_once() -> None:
    attributes = (EstimationSettings.__doc__ or "").split("Raises:")[0]
    described = re.findall(r"^ +(\w+): ", attributes, flags=re.MULTILINE)
    assert described == list(FIELDS)
    for owner in (EKFACLinearOperator, EKFACPenalty):
        text = owner.__init__.__doc__ or ""
        assert "EstimationSettings" in text
        assert not any(re.search(rf"^ +{name}: ", text, flags=re.MULTILINE) for name in FIELDS)


def test_json_holds_all_but_the_function() -> None:
    told = EstimationSettings(**OTHERS).to_json()
    assert set(told) == set(FIELDS) - {"batch_size_fn"}
    again = EstimationSettings(**json.loads(json.dumps(told)), batch_size_fn=len)
    assert again == EstimationSettings(**OTHERS)
