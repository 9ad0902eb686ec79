"""Runs that are killed between experiences and resumed end as those that never were, bit for bit.

On both roads: Avalanche's own checkpoints, which pickle the whole strategy, and state dictionaries
in a file that holds no code.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import dill
import pytest
import torch
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.models.utils import avalanche_model_adaptation
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.supervised import Naive

from rotate_ewc import SnapshotError
from rotate_ewc.integrations.avalanche import RotatedEWC
from tests.helpers.avalanche_cases import (
    Case,
    build,
    differences,
    experiences_of,
    main,
    outcome,
    plugin_of,
    train,
)
from tests.helpers.avalanche_training import domain_benchmark, net

# dill looks for torch.optim.SGD where it is not, says so, and finds it all the same.
pytestmark = pytest.mark.filterwarnings("ignore:Cannot locate reference:dill.PicklingWarning")

CASES = [
    Case(),
    Case("loss", mode="separate"),
    Case(optimizer="adam"),
    Case("loss", "adam", mode="separate"),
    Case("tangent"),
    Case("tangent", every=4),
    Case("tangent", "adam", model="incremental", every=2),
    Case("gradient", "adam"),
    Case(every=4),
    Case("loss"),
    Case("loss", "adam"),
    Case(model="incremental"),
    Case("loss", mode="separate", model="incremental"),
    Case("gradient", "adam", model="incremental"),
    Case(optimizer="adam", model="incremental"),
    Case("loss", "adam", model="multi_head"),
    Case(optimizer="adam", model="multi_head"),
]
# Each case is killed after its first and its second experience, on one road each, and all kinds of
# update and model after the last one, too.
AFTER_ONE_OR_TWO = [(case, 1 + number % 2) for number, case in enumerate(CASES)]
AFTER_THE_OTHER = [(case, 3 - stop) for case, stop in AFTER_ONE_OR_TWO]
AFTER_ALL = [(case, 3) for case in CASES[::8]]
ONLINE = [("loss",), ("rotated", "adam"), ("tangent", "adam"), ("rotated", "sgd")]
# After each part of two tasks, on both roads.
ONE_ROAD = [(words, stop) for n, words in enumerate(ONLINE) for stop in range(1 + n, 6, 4)]
THE_OTHER = [(words, stop) for n, words in enumerate(ONLINE) for stop in range(4 - n, 6, 4)]


@pytest.fixture(scope="module")
def wholes() -> dict[Case, dict[str, Any]]:
    """What the runs lead to that are not interrupted."""
    return {}


@pytest.fixture
def by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """How dill must be told to pickle classes; by value it fails in Avalanche's own."""
    monkeypatch.setitem(dill.settings, "byref", True)


def whole_run(case: Case, wholes: dict[Case, dict[str, Any]]) -> dict[str, Any]:
    if case not in wholes:
        wholes[case] = outcome(train(build(case), experiences_of(case)))
    return wholes[case]


def disturb() -> None:
    """Whatever another process does to its random generators before it resumes."""
    RNGManager.set_random_seeds(987)


# --------------------------------------------------------------------------- whole strategies


@pytest.mark.usefixtures("by_reference")
@pytest.mark.parametrize(("case", "stop"), AFTER_ONE_OR_TWO + AFTER_ALL, ids=str)
def test_avalanches_checkpoints(
    case: Case, stop: int, tmp_path: Path, wholes: dict[Case, dict[str, Any]]
) -> None:
    expected, experiences = whole_run(case, wholes), experiences_of(case)
    save_checkpoint(train(build(case), experiences[:stop]), tmp_path / "checkpoint.pt")
    disturb()
    strategy, start = maybe_load_checkpoint(build(case), tmp_path / "checkpoint.pt")
    assert start == stop
    assert plugin_of(strategy).penalty.num_tasks == stop
    assert differences(outcome(train(strategy, experiences[start:])), expected) == []


@pytest.mark.usefixtures("by_reference")
def test_killed_after_every_experience(tmp_path: Path, wholes: dict[Case, dict[str, Any]]) -> None:
    """A checkpoint of a checkpoint."""
    case = Case(optimizer="adam")
    for stop in (1, 2, 3):
        disturb()
        main(str(case), str(tmp_path), str(stop))
    found = torch.load(tmp_path / "outcome.pt", weights_only=True)
    assert differences(found, whole_run(case, wholes)) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(optimizer="adam", model="incremental")], ids=str)
def test_in_other_processes(case: Case, tmp_path: Path, wholes: dict[Case, dict[str, Any]]) -> None:
    for stop in (2, 3):
        arguments = [str(case), str(tmp_path), str(stop)]
        module = [sys.executable, "-W", "ignore", "-m", "tests.helpers.avalanche_cases"]
        root = Path(__file__).parents[3]
        result = subprocess.run([*module, *arguments], cwd=root, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "outcome.pt", weights_only=True)
    assert differences(found, whole_run(case, wholes)) == []


@pytest.mark.usefixtures("by_reference")
def test_what_belongs_together_is_together_again(tmp_path: Path) -> None:
    """The handle knows optimizer, model and penalty of today, and none of those before the load."""
    case = Case(optimizer="adam", model="online")
    parts = experiences_of(case)
    before = train(build(case), parts[:1])
    save_checkpoint(before, tmp_path / "checkpoint.pt")
    strategy, _ = maybe_load_checkpoint(build(case), tmp_path / "checkpoint.pt")
    plugin = plugin_of(strategy)
    assert plugin.attachment is None
    assert not strategy.optimizer._optimizer_step_pre_hooks
    train(strategy, parts[1:2])
    assert plugin.attachment is not None
    assert plugin.attachment.optimizer is strategy.optimizer
    assert plugin.attachment.model is strategy.model
    assert plugin.attachment.penalty is plugin.penalty
    assert strategy.optimizer is not before.optimizer
    known = {id(p) for group in strategy.optimizer.param_groups for p in group["params"]}
    assert known == {id(p) for p in strategy.model.parameters()}


@pytest.mark.usefixtures("by_reference")
def test_ready_strategy_finds_its_plugin_again(tmp_path: Path) -> None:
    def make() -> RotatedEWC:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        return RotatedEWC(
            model=model, optimizer=optimizer, ewc_lambda=3.0, train_mb_size=8, evaluator=None
        )

    strategy = make()
    strategy.train(domain_benchmark(1).train_stream[0])
    save_checkpoint(strategy, tmp_path / "checkpoint.pt")
    resumed, _ = maybe_load_checkpoint(make(), tmp_path / "checkpoint.pt")
    assert resumed.rotated_ewc is plugin_of(resumed)
    assert resumed.rotated_ewc is not strategy.rotated_ewc
    assert resumed.rotated_ewc.penalty.num_tasks == 1


@pytest.mark.usefixtures("by_reference")
@pytest.mark.parametrize(("words", "stop"), ONE_ROAD)
def test_in_the_middle_of_an_online_task(
    words: tuple[str, ...], stop: int, tmp_path: Path, wholes: dict[Case, dict[str, Any]]
) -> None:
    case = Case(*words, model="online")
    expected, parts = whole_run(case, wholes), experiences_of(case)
    save_checkpoint(train(build(case), parts[:stop]), tmp_path / "checkpoint.pt")
    disturb()
    strategy, start = maybe_load_checkpoint(build(case), tmp_path / "checkpoint.pt")
    assert start == stop
    assert differences(outcome(train(strategy, parts[start:])), expected) == []
    assert plugin_of(strategy).penalty.num_tasks == 2


# --------------------------------------------------------------------------- state dictionaries


def save_states(strategy: Naive, path: Path) -> None:
    """As little as goes on bit for bit, and no code."""
    states = {
        "model": strategy.model.state_dict(),
        "optimizer": strategy.optimizer.state_dict(),
        "plugin": plugin_of(strategy).state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(states, path)


def load_states(strategy: Naive, path: Path, seen: list[Any], *, keep_state: bool = True) -> None:
    """The model is grown as far as it was; its optimizer is made for what it has grown to."""
    states = torch.load(path, weights_only=True)
    for experience in seen:
        avalanche_model_adaptation(strategy.model, experience)
    strategy.optimizer.param_groups[0]["params"] = list(strategy.model.parameters())
    strategy.model.load_state_dict(states["model"])
    strategy.optimizer.load_state_dict(states["optimizer"])
    plugin_of(strategy).load_state_dict(states["plugin"])
    if keep_state:
        # Without this Avalanche takes the optimizer for a new one, and empties its state.
        strategy.optimized_param_id = dict(strategy.model.named_parameters())
    torch.set_rng_state(states["random"])


@pytest.mark.parametrize(("case", "stop"), AFTER_THE_OTHER + AFTER_ALL, ids=str)
def test_state_dictionaries(
    case: Case, stop: int, tmp_path: Path, wholes: dict[Case, dict[str, Any]]
) -> None:
    expected, experiences = whole_run(case, wholes), experiences_of(case)
    save_states(train(build(case), experiences[:stop]), tmp_path / "states.pt")
    disturb()
    strategy = build(case)
    load_states(strategy, tmp_path / "states.pt", experiences[:stop])
    assert differences(outcome(train(strategy, experiences[stop:])), expected) == []


@pytest.mark.parametrize(("words", "stop"), THE_OTHER)
def test_state_dictionaries_in_the_middle_of_an_online_task(
    words: tuple[str, ...], stop: int, tmp_path: Path, wholes: dict[Case, dict[str, Any]]
) -> None:
    case = Case(*words, model="online")
    expected, parts = whole_run(case, wholes), experiences_of(case)
    save_states(train(build(case), parts[:stop]), tmp_path / "states.pt")
    strategy = build(case)
    load_states(strategy, tmp_path / "states.pt", [])
    assert differences(outcome(train(strategy, parts[stop:])), expected) == []


@pytest.mark.parametrize("model", ["net", "incremental", "multi_head"])
def test_averages_in_an_eigenbasis_are_not_needed_between_tasks(
    model: str, tmp_path: Path, wholes: dict[Case, dict[str, Any]]
) -> None:
    """That Avalanche empties the state of a new strategy's optimizer does no harm to them."""
    case = Case(optimizer="adam", model=model)
    experiences = experiences_of(case)
    save_states(train(build(case), experiences[:2]), tmp_path / "states.pt")
    strategy = build(case)
    load_states(strategy, tmp_path / "states.pt", experiences[:2], keep_state=False)
    found = outcome(train(strategy, experiences[2:]))
    # Those of heads that are not trained any more are kept, and never used.
    left = [k for k in differences(found, whole_run(case, wholes)) if "optimizer/" not in k]
    assert left == []


def test_states_of_another_update(tmp_path: Path) -> None:
    """Snapshots do not depend on how they are used, so a run may go on in another way."""
    first, second = Case(), Case("tangent", "adam")
    experiences = experiences_of(first)
    before = train(build(first), experiences[:1])
    strategy = build(second)
    strategy.model.load_state_dict(before.model.state_dict())
    plugin_of(strategy).load_state_dict(plugin_of(before).state_dict())
    assert plugin_of(strategy).penalty(net()) == plugin_of(before).penalty(net()) > 0
    train(strategy, experiences[1:])
    assert plugin_of(strategy).penalty.num_tasks == 3


@pytest.mark.parametrize("update", ["tangent", "loss"])
def test_states_of_another_update_in_the_middle_of_a_task_are_refused(update: str) -> None:
    case = Case(optimizer="adam", model="online")
    state = plugin_of(train(build(case), experiences_of(case)[:4])).state_dict()
    other = plugin_of(build(Case(update, "adam", model="online")))
    with pytest.raises(SnapshotError, match=f"update 'rotated', in the .* expected '{update}'"):
        other.load_state_dict(state)
    for damaged in (update, {}, 3):
        with pytest.raises(SnapshotError, match="key 'attachment' has update None"):
            other.load_state_dict({**state, "attachment": damaged})
    assert other.penalty.num_tasks == 0


def test_damaged_states_of_the_handle_are_refused() -> None:
    """Before the next experience is trained."""
    case = Case(optimizer="adam", model="online")
    parts = experiences_of(case)
    strategy = train(build(case), parts[:4])
    state = plugin_of(strategy).state_dict()
    state["attachment"]["state"]["coordinates/0/0.weight"] = torch.zeros(3)
    plugin_of(strategy).load_state_dict(state)
    before = outcome(strategy)
    with pytest.raises(SnapshotError, match="coordinates"):
        strategy.train(parts[4])
    assert differences(outcome(strategy), {**before, "next": None}) == ["next"]


def test_states_of_another_mode_are_refused() -> None:
    strategy = train(build(Case()), experiences_of(Case())[:1])
    other = build(Case("loss", mode="separate"))
    with pytest.raises(ValueError, match="mode 'merged'; expected 'separate'"):
        plugin_of(other).load_state_dict(plugin_of(strategy).state_dict())
    assert plugin_of(other).penalty.num_tasks == 0
