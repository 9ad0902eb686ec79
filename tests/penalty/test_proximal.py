"""Proximal steps against the dense solution of what they minimise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACPenalty
from tests.helpers.oracles import assert_close
from tests.helpers.penalties import (
    CE,
    MODELS,
    SUMMED,
    Quadratic,
    consolidated,
    flat,
    flat_gradient,
    make,
    move,
    quadratic,
    shapes_of,
    task,
    unflat,
)


def solution(form: Quadratic, theta: Tensor, step_size: float | Tensor) -> Tensor:
    """The minimum over θ' of `½ |θ' - θ|² / η + penalty(θ')`."""
    sizes = torch.as_tensor(step_size, dtype=theta.dtype).expand(len(theta))
    system = torch.eye(len(theta), dtype=theta.dtype) + sizes[:, None] * form.weight * form.matrix
    return form.anchor + torch.linalg.solve(system, theta - form.anchor)


@pytest.mark.parametrize("step_size", [1e-3, 0.5, 40.0])
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_is_the_dense_solution(name: str, joint: bool, tasks: int, step_size: float) -> None:
    model, penalty = consolidated(name, tasks, separate_weight_and_bias=not joint)
    form = quadratic(penalty, model, scale=2.5 / (8 + tasks))
    before = flat(model)
    penalty(model).backward()
    assert_close(flat_gradient(model), form.gradient(before))
    expected = solution(form, before, step_size)
    assert penalty.proximal_step_(model, step_size) is None
    assert_close(flat(model) - before, expected - before)


@pytest.mark.parametrize("loss", [CE, SUMMED])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_scale_is_that_of_the_penalty(weighting: str, loss: nn.Module) -> None:
    model, penalty = consolidated("plain", 2, loss=loss, weighting=weighting, decay=0.7)
    penalty.current_num_data = 25
    form = quadratic(penalty, model, scale=1.0)
    before = flat(model)
    penalty(model).backward()
    gradient = flat_gradient(model)
    scale = float(gradient @ form.gradient(before) / form.gradient(before).square().sum())
    form = form._replace(weight=scale)
    assert_close(gradient, form.gradient(before))
    penalty.proximal_step_(model, 0.3)
    assert_close(flat(model) - before, solution(form, before, 0.3) - before)


@pytest.mark.parametrize("joint", [False, True])
def test_step_sizes_by_name(joint: bool) -> None:
    """A joint block takes the mean of its two."""
    model, penalty = consolidated("plain", 2, separate_weight_and_bias=not joint)
    form, before = quadratic(penalty, model, scale=2.5 / 10), flat(model)
    given = {"0.weight": 0.1, "0.bias": 0.7, "2.weight": 0, "2.bias": 2.0, "elsewhere": 9.0}
    means = {"0.weight": 0.4, "0.bias": 0.4, "2.weight": 1.0, "2.bias": 1.0}
    meant = means if joint else given
    sizes = [torch.full_like(p.detach().flatten(), meant[n]) for n, p in model.named_parameters()]
    penalty.proximal_step_(model, given)
    expected = solution(form, before, torch.cat(sizes))
    assert_close(flat(model) - before, expected - before)


@pytest.mark.filterwarnings("ignore:.*has grown, but does not begin with:UserWarning")
def test_new_rows_and_new_parameters_do_not_move() -> None:
    torch.manual_seed(0)
    old = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    penalty = EKFACPenalty(2.5)
    penalty.consolidate(old, CE, task("plain", 0))
    grown = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 2)).double()
    form, before = quadratic(penalty, grown, scale=2.5 / 9), flat(grown)
    version = grown[3].weight._version
    penalty.proximal_step_(grown, 0.5)
    assert_close(flat(grown) - before, solution(form, before, 0.5) - before)
    new = form.matrix.diagonal() == 0
    assert new.sum() == 5 + 1 + 8 + 2
    assert torch.equal(flat(grown)[new], before[new])
    assert grown[3].weight._version == version

    penalty.consolidate(grown[:3], CE, task("plain", 1, classes=4))
    move(grown, 1)
    form, before = quadratic(penalty, grown, scale=2.5 / 9), flat(grown)
    penalty.proximal_step_(grown, 0.5)
    assert_close(flat(grown) - before, solution(form, before, 0.5) - before)


def test_parameters_that_are_not_protected_do_not_move() -> None:
    model, penalty = consolidated("plain", exclude=["0.weight", "2.bias"])
    form, before = quadratic(penalty, model, scale=2.5 / 9), flat(model)
    versions = {name: p._version for name, p in model.named_parameters()}
    penalty.proximal_step_(model, 0.5)
    assert_close(flat(model) - before, solution(form, before, 0.5) - before)
    unchanged = [n for n, p in model.named_parameters() if p._version == versions[n]]
    assert unchanged == ["0.weight", "2.bias"]


def test_moves_tensors_of_a_mapping() -> None:
    model, penalty = consolidated("grouped")
    form, before = quadratic(penalty, model, scale=2.5 / 9), flat(model)
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    penalty.proximal_step_(tensors, 0.5)
    after = torch.cat([tensor.flatten() for tensor in tensors.values()])
    assert_close(after - before, solution(form, before, 0.5) - before)
    assert torch.equal(flat(model), before)


def test_autograd_sees_a_change_in_place_and_nothing_else() -> None:
    model, penalty = consolidated("plain")
    loss = CE(model(task("plain", 5)[0][0]), task("plain", 5)[0][1])
    loss.backward(retain_graph=True)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    values = {name: p.grad.clone() for name, p in model.named_parameters()}
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    versions = {name: p._version for name, p in model.named_parameters()}
    model[0].bias.requires_grad_(False)
    penalty.proximal_step_(model, 0.5)
    for name, p in model.named_parameters():
        assert p.grad is gradients[name]
        assert torch.equal(p.grad, values[name])
        assert p.data_ptr() == pointers[name]
        assert p._version > versions[name]
        assert p.is_leaf
        assert p.grad_fn is None
        assert p.requires_grad == (name != "0.bias")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_moves_before_the_first_task_nor_at_the_anchor() -> None:
    model, penalty = make("plain"), EKFACPenalty(1e6)
    before = flat(model)
    penalty.proximal_step_(model, 1.0)
    assert torch.equal(flat(model), before)
    penalty.consolidate(model, CE, task("plain", 0))
    penalty.proximal_step_(model, 1.0)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("step_size", [-1.0, float("nan"), float("inf"), True, "1", None])
@pytest.mark.parametrize("tasks", [0, 1])
def test_bad_step_sizes(tasks: int, step_size: Any) -> None:
    """Also before the first task, when there is nothing to do yet."""
    model, penalty = consolidated("plain", tasks)
    before = flat(model)
    with pytest.raises((ValueError, TypeError), match=f"step_size is {step_size!r}"):
        penalty.proximal_step_(model, step_size)
    assert torch.equal(flat(model), before)


def test_bad_entries_of_step_sizes() -> None:
    model, penalty = consolidated("plain")
    before = flat(model)
    sizes: dict[str, Any] = {"0.weight": 0.1, "0.bias": 0.7, "2.weight": 1.0}
    with pytest.raises(ValueError, match=r"step_size has no entry for the parameter '2.bias'"):
        penalty.proximal_step_(model, sizes)
    for value in (-1.0, float("nan"), False):
        with pytest.raises((ValueError, TypeError), match=r"step_size\['2.bias'\] is"):
            penalty.proximal_step_(model, {**sizes, "2.bias": value})
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("tasks", [0, 1])
def test_separate_mode_is_refused(tasks: int) -> None:
    model, penalty = consolidated("plain", tasks, mode="separate")
    with pytest.raises(ValueError, match=r"penalty has mode 'separate'; expected 'merged'"):
        penalty.proximal_step_(model, 0.1)


def test_missing_and_shrunk_parameters_are_named() -> None:
    model, penalty = consolidated("plain")
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = flat(model)
    without = {name: tensor for name, tensor in tensors.items() if name != "2.bias"}
    with pytest.raises(ValueError, match=r"'2.bias' is protected by the penalty, but the model"):
        penalty.proximal_step_(without, 0.1)
    with pytest.raises(ValueError, match=r"'2.weight' has shape \[2, 5\], but the penalty"):
        penalty.proximal_step_({**tensors, "2.weight": tensors["2.weight"][:2]}, 0.1)
    assert torch.equal(torch.cat([t.flatten() for t in tensors.values()]), before)
    with pytest.raises(TypeError, match="model is list"):
        penalty.proximal_step_([], 0.1)


def test_not_strict_leaves_them_out_with_one_warning_each() -> None:
    model, penalty = consolidated("plain", strict=False)
    form, before = quadratic(penalty, model, scale=2.5 / 9), flat(model)
    tensors = unflat(before.clone(), shapes_of(model))
    tensors["2.weight"] = tensors["2.weight"][:2].clone()
    del tensors["0.bias"]
    kept = tensors["2.weight"].clone()
    with pytest.warns(UserWarning, match="not protected any more") as caught:
        penalty.proximal_step_(tensors, 0.5)
    told = sorted(str(warning.message).split("'")[1] for warning in caught)
    assert told == ["0.bias", "2.weight"]
    assert torch.equal(tensors["2.weight"], kept)
    expected = unflat(solution(form, before, 0.5), shapes_of(model))
    for name in ("0.weight", "2.bias"):
        torch.testing.assert_close(tensors[name], expected[name], rtol=1e-10, atol=1e-12)
    penalty.proximal_step_(tensors, 0.5)  # says nothing again


@pytest.mark.parametrize("tasks", [1, 2])
def test_left_out_half_of_a_joint_block(tasks: int) -> None:
    """A missing bias counts as one that has not moved."""
    model, penalty = consolidated("plain", tasks, strict=False, separate_weight_and_bias=False)
    form = quadratic(penalty, model, scale=2.5 / (8 + tasks))
    tensors = unflat(flat(model), shapes_of(model))
    tensors["2.bias"] = penalty.terms[0].anchor["2.bias"]
    theta = torch.cat([tensor.flatten() for tensor in tensors.values()])
    expected = unflat(solution(form, theta, 0.5), shapes_of(model))
    del tensors["2.bias"]
    with pytest.warns(UserWarning, match="'2.bias' is missing"):
        penalty.proximal_step_(tensors, 0.5)
    torch.testing.assert_close(tensors["2.weight"], expected["2.weight"], rtol=1e-10, atol=1e-12)
