"""A penalty as a sub-module: whatever is done to modules and their states leaves it right."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rotate_ewc import EKFACPenalty, SnapshotError
from tests.helpers.exact import exact_penalty

CE = nn.CrossEntropyLoss()


class Learner(nn.Module):
    """A network that holds its penalty, and adds it to what it returns."""

    def __init__(self, mode: str = "merged", *, seed: int = 0, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network = nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 3)
        )
        self.penalty = exact_penalty(2.0, mode, fisher_type="empirical")

    def forward(self, x: Tensor) -> Any:
        return self.network(x).sum() + self.penalty(self.network)


def task(seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator))]


def move(learner: nn.Module, amount: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(amount)


def learned(mode: str = "merged", tasks: int = 2) -> Learner:
    learner = Learner(mode)
    for t in range(tasks):
        learner.penalty.consolidate(learner.network, CE, task(t))
        move(learner)
    return learner


def by_hand(learner: Learner, network: nn.Module | None = None) -> float:
    """½ λ Σ w dᵀ F d / N by dense matrices."""
    penalty, found = learner.penalty, 0.0
    parameters = dict((network or learner.network).named_parameters())
    for term in penalty.terms:
        names = list(term.operator.parameter_shapes)
        delta = torch.cat([(parameters[n] - term.anchor[n]).detach().flatten() for n in names])
        found += term.weight * (delta @ term.operator.to_dense() @ delta).item()
    return 0.5 * penalty.scale * found


def check(learner: Learner, like: Learner) -> None:
    assert learner.penalty.num_tasks == like.penalty.num_tasks
    value = learner.penalty(like.network).item()
    assert value > 0
    assert value == pytest.approx(by_hand(like), rel=1e-4)
    assert value == like.penalty(like.network).item()


@pytest.fixture(params=["merged", "separate"])
def learner(request: pytest.FixtureRequest) -> Learner:
    return learned(request.param)


def test_state_is_tensors_alone_and_nothing_is_registered(learner: Learner) -> None:
    state = learner.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    assert all("." not in key.removeprefix("penalty.") for key in state if "penalty" in key)
    assert state["penalty.header"].dtype is torch.uint8
    names = [name for name, _ in (*learner.named_parameters(), *learner.named_buffers())]
    assert not any("penalty" in name for name in names)
    assert sum(p.numel() for p in learner.parameters()) == 4 * 5 + 5 + 10 + 15 + 3


def test_a_state_without_its_keys_is_reported_as_missing(learner: Learner) -> None:
    value = learner.penalty(learner.network).item()
    state = {k: v for k, v in learner.state_dict().items() if not k.startswith("penalty.")}
    result = learner.load_state_dict(state, strict=False)
    assert result.missing_keys == ["penalty.header"]
    assert result.unexpected_keys == []
    assert learner.penalty(learner.network).item() == value
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "penalty.header"'):
        learner.load_state_dict(state)
    assert learner.penalty(learner.network).item() == value


def test_a_state_without_header_is_damaged_and_not_missing(learner: Learner) -> None:
    state = learner.state_dict()
    del state["penalty.header"]
    with pytest.raises(SnapshotError, match="'header' is NoneType; expected a uint8 tensor"):
        learner.load_state_dict(state, strict=False)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_copies_unless_tensors_are_assigned(learner: Learner, assign: bool) -> None:
    state = learner.state_dict()
    other = Learner(learner.penalty.mode, seed=1)
    other.load_state_dict(state, assign=assign)
    check(other, learner)
    eigenvalues = [b.eigenvalues for t in other.penalty.terms for b in t.operator.blocks]
    places = {tensor.data_ptr() for tensor in state.values()}
    assert all((e.data_ptr() in places) == assign for e in eigenvalues)


def test_writing_into_a_state_changes_nothing(learner: Learner) -> None:
    value = learner.penalty(learner.network).item()
    for key, tensor in learner.state_dict().items():
        if key.startswith("penalty."):
            tensor.zero_()
    assert learner.penalty(learner.network).item() == value
    check(learner, learner)


def test_names_with_dots_and_percent_signs_come_back() -> None:
    layer = nn.ModuleDict({"x%2Ey": nn.Linear(4, 3), "x": nn.ModuleDict({"y": nn.Linear(3, 3)})})
    penalty = exact_penalty()
    penalty.consolidate(layer, CE, task(0), forward=lambda x: layer["x"]["y"](layer["x%2Ey"](x)))
    other = exact_penalty()
    other.load_state_dict(penalty.state_dict())
    assert set(other.terms[0].anchor) == {name for name, _ in layer.named_parameters()}


def test_safetensors(learner: Learner, tmp_path: Path) -> None:
    safetensors.torch.save_model(learner, str(tmp_path / "model"))
    other = Learner(learner.penalty.mode, seed=1)
    safetensors.torch.load_model(other, str(tmp_path / "model"))
    check(other, learner)


def test_torch_save(learner: Learner, tmp_path: Path) -> None:
    torch.save(learner.state_dict(), tmp_path / "model")
    other = Learner(learner.penalty.mode, seed=1)
    other.load_state_dict(torch.load(tmp_path / "model", weights_only=True))
    check(other, learner)


@pytest.mark.filterwarnings("ignore")
def test_distributed_checkpoints(learner: Learner, tmp_path: Path) -> None:
    dcp.save(learner.state_dict(), checkpoint_id=tmp_path / "folder")
    same = copy.deepcopy(learner)
    move(same, 0.3)
    state = same.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "folder")
    same.load_state_dict(state)
    check(same, learner)
    # A new learner's state has not the tensors to load into.
    dcp_to_torch_save(tmp_path / "folder", tmp_path / "model")
    other = Learner(learner.penalty.mode, seed=1)
    other.load_state_dict(torch.load(tmp_path / "model", weights_only=True))
    check(other, learner)


@pytest.mark.filterwarnings("ignore")
def test_states_of_distributed_models(learner: Learner) -> None:
    state = get_model_state_dict(learner)
    assert set(state) == set(learner.state_dict())
    other = Learner(learner.penalty.mode, seed=1)
    set_model_state_dict(other, state)
    check(other, learner)


@pytest.mark.parametrize("in_place", [True, False])
def test_average_of_states(learner: Learner, in_place: bool) -> None:
    """As loops over `state_dict()` do it, also those that know nothing of integers."""
    averaged = copy.deepcopy(learner)
    for _ in range(20):
        move(learner, 0.01)
        pairs = zip(averaged.state_dict().items(), learner.state_dict().values(), strict=True)
        mixed = {}
        for (key, old), new in pairs:
            mixed[key] = 0.9 * old + (1 - 0.9) * new
            if in_place:
                old.copy_(mixed[key])
        if not in_place:
            averaged.load_state_dict(mixed)
    assert averaged.penalty(learner.network).item() == pytest.approx(by_hand(learner), rel=1e-4)


def test_an_average_of_different_tasks_is_refused() -> None:
    learner, other = learned(), learned(tasks=1).penalty
    one = learner.penalty
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    mixed = {}
    for (key, old), new in pairs:
        shared = min(len(old), len(new))
        mixed[key] = 0.5 * old[:shared] + 0.5 * new[:shared]
    before = one(learner.network).item()
    with pytest.raises(SnapshotError, match="average only models whose penalties hold the same"):
        one.load_state_dict(mixed)
    assert one(learner.network).item() == before


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_models(learner: Learner, use_buffers: bool) -> None:
    average = AveragedModel(
        learner, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers
    )
    plain = AveragedModel(learner, use_buffers=use_buffers)
    for model in (average, plain):
        for _ in range(3):
            move(learner, 0.01)
            model.update_parameters(learner)
        check(model.module, learner)
    # What is consolidated later stays out of the averages, and does not stop them.
    learner.penalty.consolidate(learner.network, CE, task(5))
    move(learner)
    average.update_parameters(learner)
    assert average.module.penalty.num_tasks == 2


@pytest.mark.parametrize("state", ["named", "state_dict"])
def test_functional_call_with_the_full_state(learner: Learner, state: str) -> None:
    learner.eval()
    if state == "named":
        full: dict[str, Any] = {**dict(learner.named_parameters()), **dict(learner.named_buffers())}
    else:
        full = dict(learner.state_dict())
    x = task(7)[0][0]
    attributes = set(vars(learner.penalty))
    found = torch.func.functional_call(learner, full, (x,))
    expected = learner.network(x).sum().item() + by_hand(learner)
    assert found.item() == pytest.approx(expected, rel=1e-4)
    assert set(vars(learner.penalty)) == attributes


def test_gradients_through_functional_call(learner: Learner) -> None:
    learner.eval()
    x = task(7)[0][0]
    parameters = dict(learner.named_parameters())

    def value(given: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(learner, given, (x,))

    found = torch.func.grad(value)(parameters)
    learner(x).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent(learner: Learner, how: str) -> None:
    made = copy.deepcopy(learner) if how == "deepcopy" else pickle.loads(pickle.dumps(learner))
    check(made, learner)
    made.penalty.consolidate(made.network, CE, task(5))
    assert (made.penalty.num_tasks, learner.penalty.num_tasks) == (3, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_casts(learner: Learner, dtype: torch.dtype) -> None:
    expected = by_hand(learner)
    learner.to(dtype)
    value = learner.penalty(learner.network)
    assert value.dtype == dtype
    tolerance = 1e-5 if dtype is torch.float64 else 0.2
    assert math.isclose(value.item(), expected, rel_tol=tolerance)
    other = Learner(learner.penalty.mode, seed=1).to(dtype)
    other.load_state_dict(learner.state_dict())
    assert torch.equal(other.penalty(learner.network), value)


@pytest.mark.distributed
def test_distributed_data_parallel(learner: Learner, tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        learner.eval()
        parallel = nn.parallel.DistributedDataParallel(learner)
        x = task(7)[0][0]
        expected = learner.network(x).sum().item() + by_hand(learner)
        loss = parallel(x)
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        loss.backward()
        other = nn.parallel.DistributedDataParallel(Learner(learner.penalty.mode, seed=1))
        other.load_state_dict(parallel.state_dict())
        check(other.module, learner)
    finally:
        torch.distributed.destroy_process_group()


# --- states of other models ---


def test_a_fresh_penalty_loads_whatever_fits_and_one_with_tasks_goes_back() -> None:
    learner = learned(tasks=1)
    state = learner.penalty.state_dict()
    first = by_hand(learner)
    learner.penalty.consolidate(learner.network, CE, task(3))
    learner.penalty.load_state_dict(state)
    assert learner.penalty.num_tasks == 1
    assert learner.penalty(learner.network).item() == pytest.approx(first, rel=1e-4)
    learner.penalty.load_state_dict(exact_penalty().state_dict())
    assert learner.penalty.num_tasks == 0


def of_other(what: str) -> EKFACPenalty:
    model: nn.Module = Learner(width=5).network
    loss = CE
    if what == "shape":
        model = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
        model[0] = nn.Linear(4, 7)
    elif what == "names":
        model = nn.ModuleDict({"other": model})
    elif what == "reduction":
        loss = nn.CrossEntropyLoss(reduction="sum")
    elif what == "incomparable":
        model = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    made = exact_penalty(2.0)
    width = 3 if what == "incomparable" else 4
    data = [(x[:, :width], y) for x, y in task(0)]
    forward = model["other"] if what == "names" else model  # type: ignore[index]
    made.consolidate(model, loss, data, forward=forward)
    return made


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("names", r"has parameters \['other.*but this penalty has \['0.weight'"),
        ("reduction", "reduction 'sum', but the tasks that this penalty holds have 'mean'"),
        ("incomparable", r"'0.weight' with shape \[7, 3\], but this penalty has it with \[5, 4\]"),
    ],
)
def test_states_of_other_models_are_refused_by_penalties_with_tasks(
    what: str, message: str
) -> None:
    learner, other = learned(), of_other(what)
    before = copy.deepcopy(learner.penalty.state_dict())
    with pytest.raises(SnapshotError, match=message + r".*(EKFACPenalty.load or|…)"):
        learner.penalty.load_state_dict(other.state_dict())
    after = learner.penalty.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    exact_penalty().load_state_dict(other.state_dict())


def test_states_of_grown_and_smaller_models_fit() -> None:
    learner = learned()
    learner.penalty.load_state_dict(of_other("shape").state_dict())
    learner.penalty.load_state_dict(of_other("").state_dict())
    assert learner.penalty.num_tasks == 1
