"""Penalties in files: what they learned, and the options they were made with."""

from __future__ import annotations

import copy
import inspect
import stat
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACPenalty, EstimationSettings, SnapshotError
from tests.helpers.exact import exact_penalty

CE = nn.CrossEntropyLoss()
OPTIONS: dict[str, Any] = {
    "strength": 2.5,
    "mode": "separate",
    "plasticity": 0.8,
    "weighting": "uniform",
    "decay": 0.5,
    "temperature": 1.5,
    "damping": 0.1,
    "include": ("*",),
    "exclude": ("*.bias",),
    "strict": False,
    "sharded": True,
    "fisher_type": "mc",
    "mc_samples": 2,
    "kfac_approx": "reduce",
    "rank": {"0.*": 4, "*": 0.9},
    "diagonal": ("2.weight",),
    "storage_dtype": torch.bfloat16,
    "separate_weight_and_bias": False,
    "seed": 3,
    "memory_budget": 2**20,
    "progressbar": False,
    "num_per_example_loss_terms": 1,
    "unsupported": "skip",
}


def task(number: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(30, 6, generator=generator)
    return [(inputs, torch.randint(3, (30,), generator=generator))]


def learned(**options: Any) -> tuple[nn.Module, EKFACPenalty]:
    torch.manual_seed(0)
    model, penalty = (
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
        exact_penalty(**options),
    )
    for number in range(2):
        penalty.consolidate(model, CE, task(number))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, penalty


@pytest.mark.parametrize(
    "options", [{}, OPTIONS, {"mode": "separate"}, {"fisher_type": "type2"}], ids=str
)
def test_what_was_learned_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    model, penalty = learned(**options)
    penalty.save(tmp_path / "penalty.safetensors")
    loaded = EKFACPenalty.load(tmp_path / "penalty.safetensors")
    assert torch.equal(loaded(model), penalty(model))
    assert loaded.num_tasks == 2
    for each in (penalty, loaded):
        each.consolidate(copy.deepcopy(model), CE, task(2))
    with torch.no_grad():
        next(iter(model.parameters())).add_(0.1)
    assert torch.equal(loaded(model), penalty(model))
    first, second = penalty.state_dict(), loaded.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_all_options_are_saved(tmp_path: Path) -> None:
    """Every argument of the constructor, with a value that is not its default."""
    arguments = inspect.signature(EKFACPenalty).parameters
    # A function cannot be saved, and the settings are saved one by one.
    assert set(OPTIONS) == set(arguments) - {"batch_size_fn", "settings"}
    same = {"include", "fisher_type"}  # others sample no labels, of which there are two
    assert all(OPTIONS[name] != arguments[name].default for name in set(OPTIONS) - same)
    penalty = exact_penalty(**OPTIONS)
    penalty.save(tmp_path / "empty")
    loaded = EKFACPenalty.load(tmp_path / "empty")
    assert loaded.settings == penalty.settings
    own = set(arguments) - {field.name for field in fields(EstimationSettings)} - {"settings"}
    for name in own:
        assert getattr(loaded, name) == OPTIONS[name]


def test_options_can_be_changed_on_the_way_in(tmp_path: Path) -> None:
    model, penalty = learned()
    penalty.save(tmp_path / "penalty")
    loaded = EKFACPenalty.load(tmp_path / "penalty", strength=10.0, decay=0.9)
    assert (loaded.strength, loaded.decay) == (10.0, 0.9)
    assert loaded.settings == penalty.settings
    assert loaded(model).item() == pytest.approx(10 * penalty(model).item(), rel=1e-6)


def test_options_that_are_not_given_are_those_that_were_saved(tmp_path: Path) -> None:
    penalty = exact_penalty(2.0, decay=0.5, seed=3, mc_samples=4)
    penalty.save(tmp_path / "penalty")
    loaded = EKFACPenalty.load(tmp_path / "penalty", strength=10.0, mc_samples=5)
    assert loaded.settings == EstimationSettings(seed=3, mc_samples=5)
    assert (loaded.strength, loaded.decay) == (10.0, 0.5)


def test_settings_given_as_a_whole_replace_those_that_were_saved(tmp_path: Path) -> None:
    exact_penalty(2.0, decay=0.5, seed=3, mc_samples=4).save(tmp_path / "penalty")
    settings = EstimationSettings(seed=8, fisher_type="type2")
    loaded = EKFACPenalty.load(tmp_path / "penalty", settings=settings, memory_budget=1000)
    assert loaded.settings == EstimationSettings(seed=8, fisher_type="type2", memory_budget=1000)
    assert (loaded.strength, loaded.decay) == (2.0, 0.5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "separate"}, SnapshotError, "mode 'merged'; expected 'separate'"),
        ({"weighting": "uniform"}, SnapshotError, "weighting 'examples'; expected 'uniform'"),
        ({"strength": -1}, ValueError, "strength is -1"),
        ({"lambda_": 1}, TypeError, "EKFACPenalty has no argument 'lambda_'"),
    ],
)
def test_options_that_do_not_fit(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    exact_penalty().save(tmp_path / "penalty")
    with pytest.raises(error, match=message):
        EKFACPenalty.load(tmp_path / "penalty", **options)


def test_a_file_can_be_put_into_a_penalty_of_other_options(tmp_path: Path) -> None:
    """As with `load_state_dict` of optimizers and modules, options are those of the object."""
    model, penalty = learned(strength=1.0)
    other = exact_penalty(2.0)
    other.load_state_dict(penalty.state_dict())
    assert other.strength == 2.0
    assert other(model).item() == pytest.approx(2 * penalty(model).item(), rel=1e-6)


def test_permissions_are_those_of_other_files(tmp_path: Path) -> None:
    path = tmp_path / "penalty"
    exact_penalty().save(path)
    (tmp_path / "other").touch()
    mode = stat.S_IMODE((tmp_path / "other").stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    path.chmod(0o640)
    exact_penalty().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_saving_and_loading_leave_the_model_alone(tmp_path: Path) -> None:
    model, penalty = learned()
    before = copy.deepcopy(model.state_dict())
    penalty.save(tmp_path / "penalty")
    EKFACPenalty.load(tmp_path / "penalty")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
