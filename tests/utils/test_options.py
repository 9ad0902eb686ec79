"""Settings and choices: strings and members, defaults, and what types say of them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import re
from enum import Enum
from typing import Any, get_type_hints

import pytest
import torch

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
from rotate_ewc._utils.validation import as_choice
from rotate_ewc.options import Choice
from tests.helpers.exact import exact_penalty

CHOICES = [FisherType, KFACType, Mode, Reduction, Unsupported, Weighting]
FIELDS = {field.name: field for field in dataclasses.fields(EstimationSettings)}
# All but the number of samples, of which the empirical Fisher matrix has none.
OTHERS: dict[str, Any] = {
    "fisher_type": "empirical",
    "kfac_approx": "reduce",
    "rank": 8,
    "diagonal": ("*.bias",),
    "storage_dtype": torch.bfloat16,
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
    penalty = exact_penalty(mode="separate", weighting="Uniform")
    assert penalty.mode is Mode.SEPARATE
    assert penalty.weighting is Weighting.UNIFORM


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EstimationSettings().seed = 3


def test_single_options_replace_those_of_the_settings() -> None:
    assert set(OTHERS) == set(FIELDS) - {"mc_samples"}
    settings = EstimationSettings(**OTHERS)
    assert EstimationSettings.gather(None, OTHERS) == settings
    assert EstimationSettings.gather(None, {}) == EstimationSettings()
    assert EstimationSettings.gather(settings, {}) == settings
    assert EstimationSettings.gather(EstimationSettings(seed=9), OTHERS) == settings
    changed = EstimationSettings.gather(settings, {"seed": 9})
    assert changed == EstimationSettings(**{**OTHERS, "seed": 9})


@pytest.mark.parametrize(("name", "value"), [*OTHERS.items(), ("mc_samples", 3)])
def test_penalty_takes_every_setting(name: str, value: object) -> None:
    assert getattr(EstimationSettings(), name) != value
    expected = EstimationSettings(**{name: value})
    assert exact_penalty(**{name: value}).settings == expected
    assert exact_penalty(settings=expected).settings == expected
    settings = EstimationSettings(**{**OTHERS, "fisher_type": "mc", name: value})
    assert exact_penalty(settings=settings, **{name: value}).settings == settings


def test_types_of_options_are_those_of_the_settings() -> None:
    assert list(EstimationOptions.__annotations__) == list(FIELDS)
    assert not EstimationOptions.__total__
    options, settings = get_type_hints(EstimationOptions), get_type_hints(EstimationSettings)
    for name, kind in settings.items():
        has_names = kind == torch.dtype | None or (
            inspect.isclass(kind) and issubclass(kind, Choice)
        )
        assert options[name] == (kind | str if has_names else kind), name


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


@pytest.mark.parametrize(
    ("spelling", "member"),
    [
        ("type-2", FisherType.TYPE2),
        ("type_2", FisherType.TYPE2),
        ("TYPE2", FisherType.TYPE2),
        ("Type-2", FisherType.TYPE2),
        ("exact", FisherType.TYPE2),
        ("ggn", FisherType.TYPE2),
        ("GGN_exact", FisherType.TYPE2),
        ("fisher_exact", FisherType.TYPE2),
        ("MC", FisherType.MC),
        ("monte_carlo", FisherType.MC),
        ("fisher_mc", FisherType.MC),
        ("fisher_gradients", FisherType.MC),
        ("Empirical", FisherType.EMPIRICAL),
        ("fisher_emp", FisherType.EMPIRICAL),
        ("fisher_empirical", FisherType.EMPIRICAL),
        ("EXPAND", KFACType.EXPAND),
        ("kfac-reduce", KFACType.REDUCE),
        ("MEAN", Reduction.MEAN),
        ("Separate", Mode.SEPARATE),
    ],
)
def test_other_spellings_are_understood(spelling: str, member: Choice) -> None:
    """As strings, and as members of another package's enumeration."""
    kind = type(member)
    assert kind(spelling) is member
    theirs = Enum("Theirs", {"MEMBER": spelling}, type=str)
    assert kind(theirs.MEMBER) is member


def test_fisher_types_in_all_spellings_are_settings() -> None:
    assert EstimationSettings(fisher_type="type-2").fisher_type is FisherType.TYPE2
    assert exact_penalty(fisher_type="Type_2").settings.fisher_type is FisherType.TYPE2


@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("value", ["forward-only", "type22", "", "mean\n", 2, None, [], b"mc"])
def test_unknown_choices_are_refused_with_those_there_are(
    kind: type[Choice], value: object
) -> None:
    with pytest.raises(ValueError, match="is not a valid"):
        kind(value)
    listed = ", ".join(repr(member.value) for member in kind)
    with pytest.raises(ValueError, match=re.escape(f"x is {value!r}; expected one of {listed}")):
        as_choice("x", value, kind)


@pytest.mark.parametrize("fisher_type", ["type2", "empirical"])
def test_samples_without_sampling_are_refused(fisher_type: str) -> None:
    message = f"mc_samples is 5, but fisher_type '{fisher_type}' samples no labels"
    with pytest.raises(ValueError, match=message):
        EstimationSettings(fisher_type=fisher_type, mc_samples=5)
    with pytest.raises(ValueError, match=message):
        exact_penalty(settings=EstimationSettings(mc_samples=5), fisher_type=fisher_type)
    # What the message advises:
    assert EstimationSettings(fisher_type="mc", mc_samples=5).mc_samples == 5
    assert EstimationSettings(fisher_type=fisher_type, mc_samples=1).mc_samples == 1
    many = EstimationSettings(mc_samples=5)
    assert exact_penalty(settings=many, fisher_type=fisher_type, mc_samples=1).num_tasks == 0
