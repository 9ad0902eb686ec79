"""Penalties and their updates on the device of the model, against dense matrices on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import (
    EKFACLinearOperator,
    EKFACPenalty,
    RotatedAdam,
    TangentPenalty,
    calibrated_strength,
    merge,
)
from tests.helpers.dense_adam import advance, dense
from tests.helpers.devices import GPU, on
from tests.helpers.exactness import assert_exact_diagonal
from tests.helpers.oracles import assert_close, dense_operator
from tests.helpers.penalties import (
    CE,
    MODELS,
    Batches,
    Quadratic,
    dense_quadratic,
    estimated,
    flat,
    flat_gradient,
    make,
    shapes_of,
    task,
)

STRENGTH = 2.5


def consolidated(
    device: torch.device, name: str = "plain", tasks: int = 2, mode: str = "merged"
) -> tuple[nn.Module, EKFACPenalty]:
    """A model on a device that has moved away from its last anchor, and the penalty."""
    model, penalty = make(name).to(device), EKFACPenalty(STRENGTH, mode, seed=3)
    for t in range(tasks):
        penalty.consolidate(model, CE, task(name, t))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1).add_(0.01)
    return model, penalty


def at_home(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).cpu()


def total(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([*tensors]).sum(dim=0)


def climb(model: nn.Module, data: Batches) -> None:
    """Go up the gradient of the loss."""
    for x, y in data:
        CE(model(x), y).backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.add_(p.grad)


def quadratics(penalty: EKFACPenalty, model: nn.Module) -> list[Quadratic]:
    """The terms as dense matrices on the CPU."""
    terms = [term.map(Tensor.cpu) for term in penalty.terms]
    shapes = shapes_of(model)
    # Merged operators have the weights of their tasks inside.
    weights = [t.weight if penalty.mode == "separate" else 1.0 for t in terms]
    return [
        dense_quadratic(t.operator, t.anchor, shapes, penalty.scale * weight)
        for t, weight in zip(terms, weights, strict=True)
    ]


@pytest.mark.parametrize("mode", ["merged", "separate"])
@pytest.mark.parametrize("name", MODELS)
def test_value_and_gradient(device: torch.device, name: str, mode: str) -> None:
    model, penalty = consolidated(device, name, mode=mode)
    forms, theta = quadratics(penalty, model), flat(model).cpu()
    value = penalty(model)
    value.backward()
    assert value.device == device
    assert_close(value.detach().cpu(), total(form.value(theta) for form in forms))
    assert_close(flat_gradient(model).cpu(), total(form.gradient(theta) for form in forms))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_value_under_autocast_is_in_full_precision(
    device: torch.device, dtype: torch.dtype
) -> None:
    model, penalty = consolidated(device)
    (form,) = quadratics(penalty, model)
    expected = form.value(flat(model).cpu())
    with torch.autocast(device.type, dtype):
        value = penalty(model)
    assert value.dtype == torch.float64
    assert_close(value.detach().cpu(), expected)


def test_consolidated_on_the_cpu_and_moved(device: torch.device) -> None:
    model, penalty = consolidated(torch.device("cpu"))
    (form,) = quadratics(penalty, model)
    expected = form.value(flat(model))
    value = penalty.to(device)(model.to(device))
    assert value.device == device
    assert_close(value.detach().cpu(), expected)
    penalty.consolidate(model, CE, task("plain", 5))
    assert penalty.terms[0].operator.device == device


@pytest.mark.parametrize("device", [GPU], indirect=True)
def test_a_penalty_that_was_left_behind_is_named(device: torch.device) -> None:
    model, penalty = consolidated(torch.device("cpu"))
    model.to(device)
    message = r"(is|are) on cuda:0, but the penalty on cpu; call penalty.to\('cuda:0'\)"
    with pytest.raises(ValueError, match=message):
        penalty(model)
    with pytest.raises(ValueError, match=message):
        penalty.proximal_step_(model, 0.1)
    with pytest.raises(ValueError, match=message):
        TangentPenalty(penalty)(model)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_files_know_no_device(
    device: torch.device, mode: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """A penalty that was saved on one device is loaded on the CPU, and can be moved again."""
    model, penalty = consolidated(device, mode=mode)
    penalty.save(tmp_path / "snapshot", dtype=dtype)
    loaded = EKFACPenalty.load(tmp_path / "snapshot")
    assert {t.device.type for term in loaded.terms for t in term.anchor.values()} == {"cpu"}
    assert {term.operator.device.type for term in loaded.terms} == {"cpu"}
    theta = flat(model).cpu()
    expected = total(form.value(theta) for form in quadratics(penalty, model))
    value = loaded.to(device)(model).detach().cpu()
    assert_close(value, expected, 1e-10 if dtype is None else 0.02)


def test_states_are_loaded_across_devices(device: torch.device) -> None:
    model, penalty = consolidated(torch.device("cpu"))
    (form,) = quadratics(penalty, model)
    other = EKFACPenalty(STRENGTH, seed=3).to(device)
    other.load_state_dict(penalty.state_dict())
    value = other.to(device)(model.to(device)).detach()
    assert_close(value.cpu(), form.value(flat(model).cpu()))


def test_operators_are_saved_and_loaded(device: torch.device, tmp_path: Path) -> None:
    model = make("grouped").to(device)
    operator = estimated(model, task("grouped", 0), 3)
    operator.save(tmp_path / "snapshot")
    loaded = EKFACLinearOperator.load(tmp_path / "snapshot")
    assert loaded.device.type == "cpu"
    for block, other in zip(operator.blocks, loaded.blocks, strict=True):
        assert all(torch.equal(t.cpu(), other.tensors[n]) for n, t in block.tensors.items())


@pytest.mark.parametrize("name", MODELS)
def test_merged(device: torch.device, name: str) -> None:
    """Eigenvalues are the diagonal of the weighted sum in whatever basis came out."""
    model = make(name).to(device)
    operators = [estimated(model, task(name, seed), seed) for seed in range(2)]
    weights, shapes = [0.5, 3.0], shapes_of(model)
    exact = total(
        weight * dense_operator(operator.to("cpu").blocks, shapes)
        for weight, operator in zip(weights, operators, strict=True)
    )
    merged = merge(operators, weights)
    assert merged.device == device
    assert_exact_diagonal(merged.to("cpu"), exact, shapes)


def test_merged_with_one_that_has_grown(device: torch.device) -> None:
    torch.manual_seed(0)
    small, large = (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, n)).double().to(device)
        for n in (3, 4)
    )
    operators = [estimated(model, task("plain", 0), 3) for model in (small, large)]
    anchor = {name: torch.zeros(p.shape) for name, p in small.named_parameters()}
    shapes = shapes_of(large)
    exact = dense_quadratic(operators[0].to("cpu"), anchor, shapes).matrix
    exact = exact + dense_operator(operators[1].to("cpu").blocks, shapes)
    assert_exact_diagonal(merge(operators).to("cpu"), exact, shapes)


@pytest.mark.parametrize("name", MODELS)
def test_proximal_step(device: torch.device, name: str) -> None:
    model, penalty = consolidated(device, name)
    (form,), before = quadratics(penalty, model), flat(model).cpu()
    penalty.proximal_step_(model, 0.5)
    system = torch.eye(len(before)).double() + 0.5 * form.weight * form.matrix
    expected = form.anchor + torch.linalg.solve(system, before - form.anchor)
    assert_close(flat(model).cpu() - before, expected - before)


def test_tangent(device: torch.device) -> None:
    """The plane at a point of contact, and the implicit step on what it leaves out."""
    model, penalty = consolidated(device)
    (form,), contact = quadratics(penalty, model), flat(model).cpu()
    tangent = TangentPenalty(penalty)
    tangent(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)
    before = flat(model).cpu()
    value = tangent(model)
    value.backward()
    plane = form.value(contact) + form.gradient(contact) @ (before - contact)
    assert_close(value.detach().cpu(), plane)
    assert_close(flat_gradient(model).cpu(), form.gradient(contact))
    tangent.refresh_(model, 0.5)
    system = torch.eye(len(before)).double() + 0.5 * form.weight * form.matrix
    expected = contact + torch.linalg.solve(system, before - contact)
    assert_close(flat(model).cpu() - before, expected - before)


@pytest.mark.parametrize("name", MODELS)
def test_rotated_adam(device: torch.device, name: str) -> None:
    model, penalty = consolidated(device, name)
    optimizer = RotatedAdam(model, penalty, lr=0.1)
    home = at_home(penalty)
    assert isinstance(home, EKFACPenalty)
    oracle, start = dense(home, at_home(model), lr=0.1), flat(model).cpu()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        gradients = [
            torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()
        ]
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient.to(device)
        expected = advance(oracle, gradients, penalty.scale)
        optimizer.step()
        assert_close(flat(model).cpu() - start, expected - start)


def test_rotated_adam_goes_on_with_its_state(device: torch.device) -> None:
    """As `torch.optim` does, it moves the state that it loads to the parameters."""
    model, penalty = consolidated(device)
    optimizer = RotatedAdam(model, penalty, lr=0.1)
    ((x, y), _) = on(device, task("plain", 0))
    CE(model(x), y).backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"] = {
        index: {
            key: value.cpu() if isinstance(value, Tensor) else value for key, value in s.items()
        }
        for index, s in state["state"].items()
    }
    other = RotatedAdam(model, penalty, lr=0.1)
    other.load_state_dict(state)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    expected = flat(model)
    with torch.no_grad():
        for p, value in zip(model.parameters(), before, strict=True):
            p.copy_(value)
    other.step()
    assert_close(flat(model), expected)


def test_calibrated_strength(device: torch.device) -> None:
    """The growth of the loss over that of the quadratic, by a plain loop."""
    model, penalty = make("plain").to(device), EKFACPenalty(seed=3)
    data = task("plain", 0)
    before = copy.deepcopy(model)
    penalty.consolidate(model, CE, data)
    climb(model, on(device, data))
    with torch.no_grad():
        losses = [
            sum(float(CE(m(x), y)) * len(x) for x, y in data) / 9
            for m in (at_home(before), at_home(model))
        ]
    (term,) = (term.map(Tensor.cpu) for term in penalty.terms)
    form = dense_quadratic(term.operator, term.anchor, shapes_of(model))
    expected = (losses[1] - losses[0]) / (float(form.value(flat(model).cpu())) / 9)
    assert calibrated_strength(penalty, model, CE, data) == pytest.approx(expected, rel=1e-9)


def test_largest_curvature(device: torch.device) -> None:
    model, penalty = consolidated(device)
    (form,) = quadratics(penalty, model)
    largest = float(torch.linalg.eigvalsh(form.matrix)[-1]) * form.weight
    assert penalty.max_curvature == pytest.approx(largest, rel=1e-9)


def test_samples(device: torch.device) -> None:
    """Drawn on the device; their covariance is the inverse."""
    model = make("plain").to(device)
    operator = estimated(model, task("plain", 0), 3)
    generator = torch.Generator(device).manual_seed(0)
    draws = operator.sample(20_000, damping=0.5, generator=generator)
    assert {draw.device for draw in draws} == {device}
    rows = torch.cat([draw.flatten(end_dim=-2) for draw in draws]).cpu()
    dense_inverse = torch.linalg.inv(
        dense_operator(operator.to("cpu").blocks, shapes_of(model))
        + 0.5 * torch.eye(len(rows)).double()
    )
    error = torch.cov(rows) - dense_inverse
    assert torch.linalg.matrix_norm(error) < 0.1 * torch.linalg.matrix_norm(dense_inverse)
