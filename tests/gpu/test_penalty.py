"""Penalties and their updates on the device of the model, against dense matrices on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from rotate_ewc import (
    EKFACLinearOperator,
    EKFACPenalty,
    merge,
)
from rotate_ewc.penalty.task_progress import by_size
from tests.helpers import dense_steps
from tests.helpers.devices import GPU
from tests.helpers.exact import exact_penalty
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
    nearest,
    shapes_of,
    task,
)

STRENGTH = 2.5


def consolidated(
    device: torch.device, name: str = "plain", tasks: int = 2, mode: str = "merged"
) -> tuple[nn.Module, EKFACPenalty]:
    """A model on a device that has moved away from its last anchor, and the penalty."""
    model, penalty = make(name).to(device), exact_penalty(STRENGTH, mode, seed=3)
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


@pytest.mark.parametrize("rank", [2, "full"])
def test_bases_in_fewer_bits(device: torch.device, rank: int | str) -> None:
    model = make("plain").to(device)
    penalty = EKFACPenalty(STRENGTH, rank=rank, fisher_type="type2", storage_dtype="bfloat16")
    for t in range(2):
        penalty.consolidate(model, CE, task("plain", t))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1).add_(0.01)
    (form,) = quadratics(nearest(penalty), model)
    theta = flat(model).cpu()
    value = penalty(model)
    value.backward()
    assert_close(value.detach().cpu(), form.value(theta), 1e-7)
    assert_close(flat_gradient(model).cpu(), form.gradient(theta), 1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_close(flat(model).cpu(), form.proximal(theta, 0.1), 1e-6)


@pytest.mark.parametrize("device", [GPU], indirect=True)
def test_a_penalty_that_was_left_behind_is_named(device: torch.device) -> None:
    model, penalty = consolidated(torch.device("cpu"))
    model.to(device)
    message = r"(is|are) on cuda:0, but the penalty on cpu; call penalty.to\('cuda:0'\)"
    with pytest.raises(ValueError, match=message):
        penalty(model)
    for update in ("rotated", "tangent", "gradient"):
        optimizer = torch.optim.Adam(model.parameters())
        give(model, 0)
        with penalty.attach(optimizer, model, update), pytest.raises(ValueError, match=message):
            optimizer.step()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_files_know_no_device(
    device: torch.device, mode: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """A penalty that was saved on one device is loaded on the CPU, and can be moved again."""
    model, penalty = consolidated(device, mode=mode)
    penalty.save(tmp_path / "snapshot", storage_dtype=dtype)
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
    other = exact_penalty(STRENGTH, seed=3).to(device)
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


def give(model: nn.Module, seed: int) -> list[Tensor]:
    """Give a model random gradients; return them on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    gradients = [
        torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()
    ]
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient.to(p.device)
    return gradients


CASES = ["sgd-nesterov", "adam", "adam-fused", "adamw", "adam-amsgrad", "nadam", "adagrad"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_attached(device: torch.device, name: str, case: str) -> None:
    model, penalty = consolidated(device, name)
    kind, options = dense_steps.CASES[case]
    home = at_home(penalty)
    assert isinstance(home, EKFACPenalty)
    oracle = dense_steps.dense(home, at_home(model), kind, options)
    optimizer, start = kind(model.parameters(), **options), flat(model).cpu()
    penalty.attach(optimizer, model)
    for seed in range(4):
        expected = dense_steps.advance(oracle, give(model, seed), penalty.scale)
        optimizer.step()
        assert_close(flat(model).cpu() - start, expected - start)


def test_attached_to_a_capturable_optimizer(device: torch.device) -> None:
    """Its number of steps is on the device too."""
    model, penalty = consolidated(device)
    home = at_home(penalty)
    assert isinstance(home, EKFACPenalty)
    oracle = dense_steps.dense(home, at_home(model), torch.optim.Adam, {"lr": 0.1})
    capturable = device.type == "cuda"
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, capturable=capturable)
    penalty.attach(optimizer, model)
    start = flat(model).cpu()
    for seed in range(4):
        expected = dense_steps.advance(oracle, give(model, seed), penalty.scale)
        optimizer.step()
        assert_close(flat(model).cpu() - start, expected - start)


def test_tangent(device: torch.device) -> None:
    """The gradient at a point of contact, and the implicit step on what the plane leaves out."""
    model, penalty = consolidated(device)
    (form,), contact = quadratics(penalty, model), flat(model).cpu()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model, "tangent", 2)
    at = contact
    for seed in range(2):
        gradient = torch.cat([g.flatten() for g in give(model, seed)])
        optimizer.step()
        at = at - 0.1 * (gradient + form.gradient(contact))
    system = torch.eye(len(at)).double() + 0.2 * form.weight * form.matrix
    expected = contact + torch.linalg.solve(system, at - contact)
    assert_close(flat(model).cpu() - contact, expected - contact)


def test_gradient(device: torch.device) -> None:
    model, penalty = consolidated(device)
    (form,), start = quadratics(penalty, model), flat(model).cpu()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model, "gradient")
    gradient = torch.cat([g.flatten() for g in give(model, 0)])
    optimizer.step()
    assert_close(flat(model).cpu() - start, -0.1 * (gradient + form.gradient(start)))


@pytest.mark.parametrize("update", ["rotated", "tangent"])
def test_attached_goes_on_with_its_state(device: torch.device, update: str) -> None:
    """As `torch.optim` does, it moves the state that it loads to the parameters."""
    model, penalty = consolidated(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    handle = penalty.attach(optimizer, model, update)
    give(model, 0)
    optimizer.step()
    states = (optimizer.state_dict(), handle.state_dict())
    saved = tree_map_only(Tensor, lambda tensor: tensor.cpu().clone(), states)
    twin = copy.deepcopy(model)
    other = torch.optim.Adam(twin.parameters(), lr=0.1)
    second = penalty.attach(other, twin, update)
    other.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    for net, stepped in ((model, optimizer), (twin, other)):
        give(net, 1)
        stepped.step()
    assert_close(flat(twin), flat(model))


def test_found_strengths_have_the_same_bits_every_time(device: torch.device) -> None:
    def found() -> tuple[float, Tensor]:
        model, penalty = make("plain").to(device), EKFACPenalty()
        penalty.consolidate(model, CE, task("plain", 0))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        handle = penalty.attach(optimizer, model)
        for step in range(25):
            give(model, step)
            optimizer.step()
        return handle.strength, handle.state_dict()["plasticity"]["progress"]

    (first, progress), (second, again) = found(), found()
    assert first == second != 1.0
    assert torch.equal(progress, again)


def test_progress_is_summed_up_as_on_the_cpu(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    gains, sizes = torch.randn(2, 30, 70, generator=generator)
    sizes = torch.exp(9 * sizes) * (gains > -2)
    expected = by_size(gains, sizes)
    assert_close(by_size(gains.to(device), sizes.to(device)), expected, 1e-6)


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
