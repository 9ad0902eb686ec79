"""Separate tasks: one set of products for all of them, and still the sum of their quadratics."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rotate_ewc import EKFACPenalty
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import assert_close, dense_operator
from tests.helpers.penalties import (
    CE,
    MODELS,
    Quadratic,
    dense_quadratic,
    estimated,
    flat,
    flat_gradient,
    hessian,
    make,
    move,
    shapes_of,
    task,
    unflat,
)

STRENGTH, NOW = 2.5, 25


def check(penalty: EKFACPenalty, model: nn.Module, forms: list[Quadratic]) -> None:
    """Value, gradient and second derivative are those of a sum of dense quadratics."""
    theta = flat(model)
    model.zero_grad()
    value = penalty(model)
    value.backward()
    assert_close(value.detach(), torch.stack([form.value(theta) for form in forms]).sum())
    gradient = torch.stack([form.gradient(theta) for form in forms]).sum(dim=0)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    assert_close(torch.cat([g.flatten() for g in found]), gradient)
    second = torch.stack([form.weight * form.matrix for form in forms]).sum(dim=0)
    assert_close(hessian(penalty, model), second)


def consolidate(
    penalty: EKFACPenalty, model: nn.Module, data: Any, names: list[str] | None = None
) -> Callable[[nn.Module], Quadratic]:
    """Consolidate a task; return what its quadratic is over the parameters of a later model."""
    seed, parameters = penalty.settings.seed + penalty.num_tasks, dict(model.named_parameters())
    operator = estimated(model, data, seed, names)
    anchor = {name: p.detach().clone() for name, p in parameters.items()}
    chosen = None if names is None else {name: parameters[name] for name in names}
    penalty.consolidate(model, CE, data, params=chosen)
    weight = STRENGTH * sum(len(targets) for _, targets in data) / NOW
    return lambda later: dense_quadratic(operator, anchor, shapes_of(later), weight)


def separate(**options: Any) -> EKFACPenalty:
    penalty = exact_penalty(STRENGTH, "separate", seed=3, **options)
    penalty.current_num_data = NOW
    return penalty


def bases(penalty: EKFACPenalty) -> list[Tensor]:
    blocks = [block for term in penalty.terms for block in term.operator.blocks]
    return [b for x in blocks for b in (x.gradient_basis, x.activation_basis) if b is not None]


@pytest.mark.parametrize("tasks", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_is_the_sum_of_quadratics(name: str, tasks: int) -> None:
    model, penalty, forms = make(name), separate(), []
    for t in range(tasks):
        forms.append(consolidate(penalty, model, task(name, t, 9 + t)))
        move(model, t)
    check(penalty, model, [form(model) for form in forms])
    assert len(penalty.terms) == tasks


@pytest.mark.parametrize("name", MODELS)
def test_joint_blocks(name: str) -> None:
    """The operators are the penalty's own here, written out."""
    model, penalty = make(name), separate(separate_weight_and_bias=False)
    for t in range(3):
        penalty.consolidate(model, CE, task(name, t, 9 + t))
        move(model, t)
    forms = [
        dense_quadratic(term.operator, term.anchor, shapes_of(model), STRENGTH * (9 + t) / NOW)
        for t, term in enumerate(penalty.terms)
    ]
    check(penalty, model, forms)


def grow(old: nn.Module, inputs: int, outputs: int) -> nn.Module:
    """A larger model that contains the old one."""
    new = nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    with torch.no_grad():
        for name, p in old.named_parameters():
            new.get_parameter(name)[tuple(map(slice, p.shape))] = p
    return new


def test_growth_between_tasks() -> None:
    """More classes, then more inputs, then neither: three sizes, four tasks."""
    torch.manual_seed(0)
    penalty, forms = separate(), []
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for t, (inputs, outputs) in enumerate([(4, 3), (4, 4), (6, 4), (6, 4)]):
        model = grow(model, inputs, outputs)
        data = [
            (torch.cat([x, x], dim=1)[:, :inputs], y)
            for x, y in task("plain", t, 9 + t, classes=outputs)
        ]
        forms.append(consolidate(penalty, model, data))
        move(model, t)
        check(penalty, model, [form(model) for form in forms])
    shapes = [tuple(term.anchor["0.weight"].shape) for term in penalty.terms]
    assert shapes == [(5, 4), (5, 4), (5, 6), (5, 6)]


def test_another_dtype_between_tasks() -> None:
    """The terms stay in the dtypes they were estimated in, and can be multiplied with."""
    model = make("plain").float()
    penalty = exact_penalty(STRENGTH, "separate", fisher_type="type2")
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        data = [(inputs.to(dtype), targets) for inputs, targets in task("plain", 1)]
        penalty.consolidate(model, CE, data)
        move(model, 2)
    total = 0.0
    for term, dtype in zip(penalty.terms, (torch.float32, torch.float64), strict=True):
        tensors = [t for block in term.operator.blocks for t in block.tensors.values()]
        assert {t.dtype for t in tensors} == {dtype}
        delta = torch.cat([(p - term.anchor[n]).flatten() for n, p in model.named_parameters()])
        blocks = [block.map(lambda tensor: tensor.double()) for block in term.operator.blocks]
        matrix = dense_operator(blocks, shapes_of(model))
        total += 0.5 * penalty.scale * term.weight * (delta @ matrix @ delta).item()
        torch.testing.assert_close(term.operator.to_dense().double(), matrix)
    assert penalty(model).item() == pytest.approx(total, rel=1e-5)


def test_other_parameters_in_other_tasks() -> None:
    model, penalty, forms = make("plain"), separate(), []
    chosen = [["0.weight", "2.bias"], ["2.weight", "0.weight"], None, ["2.bias"]]
    for t, names in enumerate(chosen):
        forms.append(consolidate(penalty, model, task("plain", t), names))
        move(model, t)
    check(penalty, model, [form(model) for form in forms])
    assert [list(term.anchor) for term in penalty.terms] == [
        names or list(shapes_of(model)) for names in chosen
    ]


class Count(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(penalty: EKFACPenalty, model: nn.Module) -> Counter[str]:
    """What value and gradient take."""
    model.zero_grad()
    with Count() as count:
        penalty(model).backward()
    assert count.calls["bmm"] + count.calls["mm"] > 0
    return count.calls


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_number_of_operations_does_not_grow(name: str, joint: bool) -> None:
    # Tasks that keep other numbers of directions are in different stacks.
    options: dict[str, Any] = {"separate_weight_and_bias": not joint, "rank": "full"}
    model, penalty, counts = make(name), separate(**options), []
    for t in range(6):
        penalty.consolidate(model, CE, task(name, t))
        counts.append(operations(penalty, model))
    assert counts[1] == counts[2] == counts[5]
    # A single task has nothing to sum over.
    assert counts[0].total() <= counts[1].total()


@pytest.mark.parametrize("name", MODELS)
def test_merged_tasks_cost_as_much_as_one(name: str) -> None:
    model, penalty = make(name), exact_penalty(STRENGTH)
    counts, sizes = {}, {}
    for t in range(12):
        penalty.consolidate(model, CE, task(name, t))
        counts[t + 1] = operations(penalty, model)
        tensors = [v for k, v in penalty.state_dict().items() if k != "header"]
        sizes[t + 1] = sum(tensor.nbytes for tensor in tensors)
        move(model, t, scale=0.01)
    assert counts[1] == counts[2] == counts[12]
    assert sizes[1] == sizes[2] == sizes[12]
    assert penalty.num_tasks == 12
    assert len(penalty.terms) == 1


def stacked(name: str, tasks: int = 3) -> tuple[nn.Module, EKFACPenalty]:
    model, penalty = make(name), separate()
    for t in range(tasks):
        penalty.consolidate(model, CE, task(name, t))
        move(model, t)
    return model, penalty


def check_shared(penalty: EKFACPenalty, tasks: int = 3) -> None:
    """The bases of all terms lie in as many storages as one term has, without any gap."""
    storages = {b.untyped_storage().data_ptr(): b.untyped_storage() for b in bases(penalty)}
    assert len(storages) * tasks == len(bases(penalty))
    assert sum(s.nbytes() for s in storages.values()) == sum(b.nbytes for b in bases(penalty))
    # The penalty itself multiplies with these very storages.
    seen: set[int] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm):
                seen.update(tensor.untyped_storage().data_ptr() for tensor in args)
            return func(*args, **(kwargs or {}))

    anchor = {name: value.clone() for name, value in penalty.terms[0].anchor.items()}
    with Watch():
        penalty(anchor)
    assert set(storages) <= seen


@pytest.mark.parametrize("name", MODELS)
def test_bases_are_stored_once(name: str) -> None:
    _, penalty = stacked(name)
    check_shared(penalty)
    check_shared(penalty.to(torch.float32))
    resumed = separate()
    resumed.load_state_dict(penalty.state_dict())
    check_shared(resumed)


@pytest.mark.parametrize("name", MODELS)
def test_casting_and_back(name: str) -> None:
    model, penalty = stacked(name)
    theta, shapes = flat(model), shapes_of(model)
    assert penalty.to(torch.float32) is penalty
    stored = [value for term in penalty.terms for value in term.anchor.values()]
    assert {tensor.dtype for tensor in (*stored, *bases(penalty))} == {torch.float32}
    single = penalty(unflat(theta.float(), shapes))
    assert single.dtype == torch.float32
    penalty.double()
    weight = STRENGTH * 9 / NOW
    forms = [dense_quadratic(t.operator, t.anchor, shapes, weight) for t in penalty.terms]
    check(penalty, model, forms)
    expected = torch.stack([form.value(theta) for form in forms]).sum()
    assert_close(single.double(), expected, tolerance=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_state_and_copies(name: str, tmp_path: Any) -> None:
    model, penalty = stacked(name)
    value = penalty(model)
    value.backward()
    gradient = flat_gradient(model)
    torch.save(penalty.state_dict(), tmp_path / "penalty.pt")
    resumed = separate()
    resumed.load_state_dict(torch.load(tmp_path / "penalty.pt", weights_only=True))
    for other in (resumed, copy.deepcopy(penalty)):
        model.zero_grad()
        again = other(model)
        again.backward()
        assert torch.equal(again, value)
        assert torch.equal(flat_gradient(model), gradient)
    operator = penalty.terms[1].operator
    operator.save(tmp_path / "task.safetensors")
    loaded = type(operator).load(tmp_path / "task.safetensors")
    shapes, anchor = shapes_of(model), penalty.terms[1].anchor
    first, second = (dense_quadratic(o, anchor, shapes).matrix for o in (operator, loaded))
    assert torch.equal(first, second)


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_consolidating_a_shrunk_model_where_not_strict(mode: str) -> None:
    """The penalty goes on with what is left; nothing is broken for later."""
    torch.manual_seed(0)
    penalty = exact_penalty(STRENGTH, mode, strict=False)
    wide = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    narrow = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    penalty.consolidate(wide, CE, task("plain", 0))
    with pytest.warns(UserWarning, match="not protected any more"):
        penalty.consolidate(narrow, CE, task("plain", 1))
    with torch.no_grad():
        narrow[0].weight += 0.1
    value = penalty(narrow)
    value.backward()
    assert value.item() > 0
    assert narrow[0].weight.grad.abs().sum() > 0
    resumed = exact_penalty(STRENGTH, mode, strict=False)
    resumed.load_state_dict(penalty.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert resumed(narrow).item() == value.item()
