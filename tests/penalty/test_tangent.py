"""The penalty's tangent plane, and the implicit step on what it leaves out, in dense matrices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rotate_ewc import EKFACPenalty, TangentPenalty
from rotate_ewc.linalg import kronecker
from tests.helpers import penalties
from tests.helpers.oracles import assert_close
from tests.helpers.penalties import (
    CE,
    MODELS,
    SUMMED,
    Quadratic,
    flat,
    flat_gradient,
    make,
    move,
    quadratic,
    shapes_of,
    task,
    unflat,
)


def consolidated(
    name: str = "plain", tasks: int = 1, loss: nn.Module = CE, **options: Any
) -> tuple[nn.Module, EKFACPenalty, Quadratic]:
    """A model that has moved away from its last anchor, the penalty, and what it must be."""
    model, penalty = penalties.consolidated(name, tasks, loss=loss, **options)
    return model, penalty, quadratic(penalty, model, 2.5 / (8 + tasks))


def plane(form: Quadratic, contact: Tensor, theta: Tensor) -> Tensor:
    """The tangent plane of a quadratic at a point of contact."""
    return form.value(contact) + form.gradient(contact) @ (theta - contact)


def implicit(form: Quadratic, contact: Tensor, theta: Tensor, size: float | Tensor) -> Tensor:
    """The minimum over θ' of `½ |θ' - θ|² / η` plus the quadratic, less its tangent plane."""
    sizes = torch.as_tensor(size, dtype=theta.dtype).expand(len(theta))
    system = torch.eye(len(theta), dtype=theta.dtype) + sizes[:, None] * form.weight * form.matrix
    return contact + torch.linalg.solve(system, theta - contact)


def value_and_gradient(tangent: TangentPenalty, model: nn.Module) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    value = tangent(model)
    value.backward()
    return value.detach(), flat_gradient(model)


def check_plane(
    tangent: TangentPenalty, model: nn.Module, form: Quadratic, contact: Tensor
) -> None:
    value, gradient = value_and_gradient(tangent, model)
    assert_close(value, plane(form, contact, flat(model)))
    assert_close(gradient, form.gradient(contact))


@pytest.mark.parametrize("step_size", [1e-3, 0.5, 40.0])
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_planes_and_steps_are_the_dense_ones(
    name: str, joint: bool, tasks: int, step_size: float
) -> None:
    """Three times: at first, and after each of two steps."""
    model, penalty, form = consolidated(name, tasks, separate_weight_and_bias=not joint)
    tangent, contact = TangentPenalty(penalty), flat(model)
    check_plane(tangent, model, form, contact)
    for seed in (5, 6):
        move(model, seed)
        check_plane(tangent, model, form, contact)
        before = flat(model)
        expected = implicit(form, contact, before, step_size)
        assert tangent.refresh_(model, step_size) is None
        assert_close(flat(model) - before, expected - before)
        contact = expected
        check_plane(tangent, model, form, contact)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_without_autograd(name: str, joint: bool) -> None:
    """On top of what is there; frozen parameters get none, those without get one."""
    model, penalty, form = consolidated(name, separate_weight_and_bias=not joint)
    tangent, expected = TangentPenalty(penalty), form.gradient(flat(model))
    first, *_, last = model.parameters()
    first.grad = torch.ones_like(first)
    last.requires_grad_(False)
    expected[: first.numel()] += 1
    tangent.add_gradient_(model)
    tangent.add_gradient_(model)
    assert last.grad is None
    last.grad = torch.zeros_like(last)
    expected[: first.numel()] -= 0.5
    expected[len(expected) - last.numel() :] = 0
    assert_close(flat_gradient(model), 2 * expected)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.floats(0.0, 1e3), min_size=1, max_size=6),
    strength=st.floats(1e-2, 1e4),
    seed=st.integers(0, 2**16),
)
def test_gradients_do_not_drift(sizes: list[float], strength: float, seed: int) -> None:
    """They are added up from step to step, and are still those at the last point of contact."""
    model, penalty, _ = consolidated()
    penalty.strength = strength
    tangent = TangentPenalty(penalty)
    tangent(model)
    for index, size in enumerate(sizes):
        move(model, seed + index)
        tangent.refresh_(model, size)
    form = quadratic(penalty, model, strength / 9)
    value, gradient = value_and_gradient(tangent, model)
    torch.testing.assert_close(value, form.value(flat(model)), rtol=1e-8, atol=1e-10 * strength)
    expected = form.gradient(flat(model))
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10 * strength)


@pytest.mark.parametrize("part", [0.1, 1.0, 10.0])
def test_rests_where_the_gradients_cancel_whatever_the_step_size(part: float) -> None:
    """Ten steps of gradient descent on `½ |θ - a|²` for each implicit one, of any η."""
    model, penalty, form = consolidated()
    target = flat(model) + 0.3 * torch.randn(
        len(flat(model)), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    identity = torch.eye(len(target), dtype=torch.float64)
    rest = torch.linalg.solve(
        identity + form.weight * form.matrix, target + form.weight * form.matrix @ form.anchor
    )
    tangent, optimizer = TangentPenalty(penalty), torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(1, 1601):
        optimizer.zero_grad()
        theta = torch.cat([p.flatten() for p in model.parameters()])
        (0.5 * (theta - target).square().sum() + tangent(model)).backward()
        optimizer.step()
        if step % 10 == 0:
            tangent.refresh_(model, part * 10 * 0.05)
    torch.testing.assert_close(flat(model), rest, rtol=0, atol=1e-8)
    assert (rest - target).abs().max() > 1e-3


def test_is_stable_where_an_old_gradient_alone_is_not() -> None:
    """At a learning rate a thousand times over the edge."""
    model, penalty, form = consolidated()
    largest = float(torch.linalg.eigvalsh(form.matrix)[-1]) / 9
    penalty.strength = 2000 / (0.05 * largest)
    tangent, start = TangentPenalty(penalty), flat(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    (x, y), _ = task("plain", 7)
    for step in range(1, 401):
        optimizer.zero_grad()
        (CE(model(x), y) + tangent(model)).backward()
        optimizer.step()
        if step % 10 == 0:
            tangent.refresh_(model, 10 * 0.05)
    assert penalty.max_curvature * 0.05 == pytest.approx(2000)
    assert (flat(model) - form.anchor).norm() < 10 * (start - form.anchor).norm()


def test_every_refresh_takes_four_products_and_a_call_none(monkeypatch: Any) -> None:
    model, penalty, _ = consolidated()
    rotations: list[str] = []
    for name in ("to_eigenbasis", "from_eigenbasis"):
        original = getattr(kronecker, name)

        def counted(*args: Any, _name: str = name, _original: Any = original) -> Tensor:
            rotations.append(_name)
            return _original(*args)

        monkeypatch.setattr(kronecker, name, counted)
    tangent = TangentPenalty(penalty)
    tangent(model).backward()
    assert sorted(rotations) == ["from_eigenbasis"] * 4 + ["to_eigenbasis"] * 4
    rotations.clear()
    tangent(model).backward()
    assert rotations == []
    tangent.refresh_(model, 0.1)
    assert sorted(rotations) == ["from_eigenbasis"] * 4 + ["to_eigenbasis"] * 4


@pytest.mark.parametrize("joint", [False, True])
def test_step_sizes_by_name(joint: bool) -> None:
    """A joint block takes the mean of its two."""
    model, penalty, form = consolidated(separate_weight_and_bias=not joint)
    tangent, contact = TangentPenalty(penalty), flat(model)
    tangent(model)
    move(model, 8)
    before = flat(model)
    given_sizes = {"0.weight": 0.1, "0.bias": 0.7, "2.weight": 0, "2.bias": 2.0}
    means = {"0.weight": 0.4, "0.bias": 0.4, "2.weight": 1.0, "2.bias": 1.0}
    meant = means if joint else given_sizes
    sizes = [torch.full_like(p.detach().flatten(), meant[n]) for n, p in model.named_parameters()]
    tangent.refresh_(model, given_sizes)
    expected = implicit(form, contact, before, torch.cat(sizes))
    assert_close(flat(model) - before, expected - before)
    check_plane(tangent, model, form, expected)


def test_strength_and_counts_act_at_once() -> None:
    model, penalty, form = consolidated()
    tangent, contact = TangentPenalty(penalty), flat(model)
    tangent(model)
    move(model, 8)
    penalty.strength, penalty.current_num_data = 5.0, 20
    form = form._replace(weight=5.0 / 20)
    check_plane(tangent, model, form, contact)
    expected = implicit(form, contact, flat(model), 0.5)
    tangent.refresh_(model, 0.5)
    assert_close(flat(model), expected)
    check_plane(tangent, model, form, expected)


def test_summed_losses() -> None:
    model, penalty, form = consolidated(loss=SUMMED)
    check_plane(TangentPenalty(penalty), model, form._replace(weight=2.5), flat(model))


def test_is_taken_anew_after_consolidation_and_when_forgotten() -> None:
    model, penalty, form = consolidated()
    tangent = TangentPenalty(penalty)
    tangent(model)
    move(model, 8)
    tangent.forget()
    check_plane(tangent, model, form, flat(model))
    penalty.consolidate(model, CE, task("plain", 1, 10))
    move(model, 9)
    check_plane(tangent, model, quadratic(penalty, model, 2.5 / 10), flat(model))
    move(model, 10)
    penalty.load_state_dict(copy.deepcopy(penalty.state_dict()))
    check_plane(tangent, model, quadratic(penalty, model, 2.5 / 10), flat(model))


def test_nothing_moves_before_the_first_task_nor_without_a_penalty() -> None:
    model, penalty = make("plain"), EKFACPenalty(1e6)
    tangent, before = TangentPenalty(penalty), flat(model)
    assert tangent(model).item() == 0.0
    tangent.add_gradient_(model)
    assert model[0].weight.grad is None
    tangent.refresh_(model, 1.0)
    penalty.consolidate(model, CE, task("plain", 0))
    assert tangent(model).item() == 0.0
    tangent.refresh_(model, 1.0)
    assert torch.equal(flat(model), before)
    move(model, 0)
    penalty.strength, before = 0.0, flat(model)
    tangent.refresh_(model, 1.0)
    assert torch.equal(flat(model), before)
    assert tangent(model).item() == 0.0


def test_enormous_strengths_are_finite() -> None:
    model, penalty, form = consolidated(fisher_type="type2")
    model.float()
    penalty.float()
    tangent, contact = TangentPenalty(penalty), flat(model)
    tangent(model)
    penalty.strength = 1e300
    move(model, 3)
    before = flat(model)
    tangent.refresh_(model, 1.0)
    spectrum, vectors = torch.linalg.eigh(form.matrix)
    stiff = vectors[:, spectrum > 1e-4 * spectrum[-1]].float()
    assert bool(flat(model).isfinite().all())
    assert (stiff.T @ (before - contact)).abs().max() > 0.1
    assert (stiff.T @ (flat(model) - contact)).abs().max() < 1e-4


def test_new_rows_and_new_parameters_are_free() -> None:
    torch.manual_seed(0)
    old = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    penalty = EKFACPenalty(2.5)
    penalty.consolidate(old, CE, task("plain", 0))
    grown = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 2)).double()
    form = quadratic(penalty, grown, scale=2.5 / 9)
    tangent, contact = TangentPenalty(penalty), flat(grown)
    with pytest.warns(UserWarning, match="has grown, but does not begin with what it was"):
        tangent(grown).backward()
    assert grown[3].weight.grad is None
    gradient = torch.cat([p.grad.flatten() for p in grown[:3].parameters()])
    assert_close(gradient, form.gradient(contact)[: len(gradient)])
    move(grown, 1)
    before = flat(grown)
    tangent.refresh_(grown, 0.5)
    assert_close(flat(grown) - before, implicit(form, contact, before, 0.5) - before)
    new = form.matrix.diagonal() == 0
    assert torch.equal(flat(grown)[new], before[new])
    grown.zero_grad()
    found = tangent.add_gradient_(grown)
    assert found is None
    assert grown[3].weight.grad is None
    assert grown[2].weight.grad[:3].abs().min() > 0
    assert grown[2].weight.grad[3:].abs().max() == 0


def test_half_precision_loses_only_what_is_stored_in_it() -> None:
    """What rounding takes from a step is in the next displacement, not lost for good."""
    model, penalty, _ = consolidated()
    model.bfloat16()
    penalty.float()
    tangent = TangentPenalty(penalty)
    tangent(model)
    for seed in range(8):
        move(model, seed)
        tangent.refresh_(model, 0.5)
    gradients = torch.autograd.grad(tangent(model), list(model.parameters()))
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}
    exact = copy.deepcopy(model).double()
    expected = torch.autograd.grad(penalty.double()(exact), list(exact.parameters()))
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=0.05, atol=2e-2)


def test_not_strict_leaves_parameters_out() -> None:
    model, penalty, form = consolidated(strict=False)
    tensors = unflat(flat(model), shapes_of(model))
    del tensors["0.bias"]
    tangent, contact = TangentPenalty(penalty), flat(model)
    with pytest.warns(UserWarning, match="'0.bias' is missing"):
        tangent(tensors)
    for name, tensor in tensors.items():
        tensor.add_(0.1 if name != "0.bias" else 0.0)
    theta = torch.cat([tensors.get(n, torch.zeros(5)).flatten() for n in shapes_of(model)])
    tangent.refresh_(tensors, 0.5)
    expected = unflat(implicit(form, contact, theta, 0.5), shapes_of(model))
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("step_size", [-1.0, float("nan"), float("inf"), True, "1", None])
@pytest.mark.parametrize("tasks", [0, 1])
def test_bad_step_sizes(tasks: int, step_size: Any) -> None:
    model, penalty = make("plain"), EKFACPenalty(2.5)
    if tasks:
        penalty.consolidate(model, CE, task("plain", 0))
    before = flat(model)
    with pytest.raises((ValueError, TypeError), match=f"step_size is {step_size!r}"):
        TangentPenalty(penalty).refresh_(model, step_size)
    assert torch.equal(flat(model), before)


def test_bad_arguments() -> None:
    model, penalty, _ = consolidated()
    with pytest.raises(TypeError, match="penalty is Sequential; expected an EKFACPenalty"):
        TangentPenalty(model)
    with pytest.raises(ValueError, match="penalty has mode 'separate'; expected 'merged'"):
        TangentPenalty(EKFACPenalty(1.0, "separate"))
    tangent, before = TangentPenalty(penalty), flat(model)
    with pytest.raises(ValueError, match=r"no entry for the parameter '2.bias'"):
        tangent.refresh_(model, {"0.weight": 0.1, "0.bias": 0.7, "2.weight": 1.0})
    without = {name: p for name, p in model.named_parameters() if name != "2.bias"}
    for call in (tangent, lambda tensors: tangent.refresh_(tensors, 0.1)):
        with pytest.raises(ValueError, match=r"'2.bias' is protected by the penalty"):
            call(without)
        with pytest.raises(TypeError, match="model is list"):
            call([])
    with pytest.raises(TypeError, match=r"model is dict; expected a torch.nn.Module"):
        tangent.add_gradient_({})
    assert torch.equal(flat(model), before)


def test_compiled_and_functional_uses() -> None:
    model, penalty, form = consolidated()
    tangent, contact = TangentPenalty(penalty), flat(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tangent(parameters)
    gradients = torch.func.grad(tangent)(parameters)
    flattened = torch.cat([gradient.flatten() for gradient in gradients.values()])
    assert_close(flattened, form.gradient(contact))
    compiled = torch.compile(model, backend="eager")
    assert tangent(compiled).item() == tangent(model).item()


# ------------------------------------------------------------------ the state


def begun(**options: Any) -> tuple[nn.Module, EKFACPenalty, TangentPenalty]:
    """A tangent between two refreshes."""
    model, penalty, _ = consolidated(**options)
    tangent = TangentPenalty(penalty)
    tangent(model)
    move(model, 5)
    tangent.refresh_(model, 0.1)
    move(model, 6)
    return model, penalty, tangent


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
def test_a_tangent_that_was_saved_is_the_same(joint: bool) -> None:
    model, penalty, tangent = begun(separate_weight_and_bias=not joint)
    state = copy.deepcopy(tangent.state_dict())
    resumed = TangentPenalty(penalty)
    resumed.load_state_dict(state)
    for key in state:
        if key != "header":
            # What is loaded is its own.
            state[key].fill_(7.0)
    assert_close(resumed(model), tangent(model))
    assert (penalty(model) - tangent(model)).abs() > 1e-6
    other = copy.deepcopy(model)
    tangent.refresh_(model, 0.2)
    resumed.refresh_(other, 0.2)
    assert_close(flat(other), flat(model))


def test_a_tangent_that_has_not_begun_or_is_over() -> None:
    """There is nothing to save, and after loading it begins anew."""
    model, penalty, tangent = begun()
    empty = TangentPenalty(penalty).state_dict()
    assert list(empty) == ["header"]
    expected = penalty(model)
    assert (tangent(model) - expected).abs() > 1e-6
    tangent.load_state_dict(empty)
    assert_close(tangent(model), expected)
    penalty.consolidate(model, CE, task("plain", 7))
    assert list(tangent.state_dict()) == ["header"]


def change(state: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {k: v for k, v in state.items() if k != key}
    return {**state, key: value}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("header", None, "'header' is NoneType; expected a uint8 tensor"),
        ("header", 3, "'header' is int; expected a uint8 tensor"),
        ("header", "{", "'header' is not JSON"),
        ("header", '{"format": "rotate_ewc.tangent/1"}', "missing required field `tasks`"),
        ("header", '{"format": "x", "tasks": 1}', 'format is "x"; expected'),
        (
            "header",
            '{"format": "rotate_ewc.tangent/1", "tasks": 2}',
            "a penalty with 2 tasks, but this one has 1; load the penalty's own snapshot first",
        ),
        ("contact/0/0.weight", None, "'contact/0/0.weight' is NoneType; expected a tensor"),
        ("gradient/1/0.bias", 3.0, "'gradient/1/0.bias' is float; expected a tensor"),
        ("gradient/1/0.bias", torch.zeros(1, 6).double(), r"\[1, 6\]; expected .* \[1, 5\]"),
        ("gradient/1/0.bias", torch.zeros(1, 5), "is torch.float32 .*; expected .*float64"),
        ("contact/1/0.bias", torch.full((1, 5), torch.nan).double(), "not finite"),
        ("contact/9/0.bias", torch.zeros(1, 5), "unexpected key 'contact/9/0.bias'"),
    ],
)
def test_damaged_states_are_refused(key: str, value: Any, message: str) -> None:
    """By name, and nothing is changed."""
    model, _, tangent = begun()
    before = tangent(model)
    with pytest.raises(ValueError, match=message):
        tangent.load_state_dict(change(tangent.state_dict(), key, value))
    assert torch.equal(tangent(model), before)
