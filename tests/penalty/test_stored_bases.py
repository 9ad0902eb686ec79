"""Penalties whose bases are kept in bfloat16: what they are worth, in steps, files and merges."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from rotate_ewc import EKFACPenalty, EstimationSettings
from rotate_ewc.errors import SnapshotError
from rotate_ewc.inspection.comparison import compare
from tests.helpers.dense_steps import advance, dense
from tests.helpers.penalties import (
    CE,
    flat,
    flat_gradient,
    make,
    move,
    nearest,
    quadratic,
    shapes_of,
    task,
    unflat,
)

RANKS = [2, "full"]


def learned(
    tasks: int = 2, rank: Any = "full", name: str = "plain", **options: Any
) -> tuple[nn.Module, EKFACPenalty]:
    """A model that has moved away from its last anchor, and the penalty."""
    options = {"storage_dtype": torch.bfloat16, "damping": 0.1, **options}
    model, penalty = make(name), EKFACPenalty(2.5, rank=rank, fisher_type="type2", **options)
    for number in range(tasks):
        penalty.consolidate(model, CE, task(name, number))
        move(model, number)
    return model, penalty


def storage(penalty: EKFACPenalty) -> set[torch.dtype | None]:
    blocks = [block for term in penalty.terms for block in term.operator.blocks]
    return {block.storage_dtype for block in blocks if set(block.tensors) > {"eigenvalues"}}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", ["plain", "grouped", "transposed"])
def test_value_and_gradient_are_those_of_the_nearest_bases(name: str, rank: Any) -> None:
    model, penalty = learned(rank=rank, name=name)
    assert storage(penalty) == {torch.bfloat16}
    expected = quadratic(nearest(penalty), model, penalty.scale)
    value = penalty(model)
    value.backward()
    theta = flat(model)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected.value(theta).item(), rel=1e-7)
    torch.testing.assert_close(flat_gradient(model), expected.gradient(theta), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rank", RANKS)
def test_memory_traces_and_anchors(rank: Any) -> None:
    """Traces, damping and anchors are those of whole bases, and merges near to them."""
    (model, low), (_, whole) = learned(1, rank), learned(1, rank, storage_dtype=None)
    for one, other in zip(
        low.terms[0].operator.blocks, whole.terms[0].operator.blocks, strict=True
    ):
        assert torch.equal(one.eigenvalues, other.eigenvalues)
    assert all(torch.equal(a, whole.terms[0].anchor[n]) for n, a in low.terms[0].anchor.items())
    bases = sum(
        tensor.nbytes
        for block in whole.terms[0].operator.blocks
        for name, tensor in block.tensors.items()
        if name != "eigenvalues"
    )
    assert whole.nbytes - low.nbytes == bases * 3 // 4
    move(model, 7)
    assert low(model).item() == pytest.approx(whole(model).item(), rel=2e-2)
    assert low(model).item() != whole(model).item()
    (_, low), (_, whole) = learned(3, rank), learned(3, rank, storage_dtype=None)
    for one, other in zip(
        low.terms[0].operator.blocks, whole.terms[0].operator.blocks, strict=True
    ):
        assert float(one.trace) == pytest.approx(float(other.trace), rel=1e-8)
        assert bool((one.eigenvalues >= 0).all())


@pytest.mark.parametrize("rank", RANKS)
def test_steps_are_those_of_the_nearest_bases(rank: Any) -> None:
    model, penalty = learned(rank=rank)
    options = {"lr": 0.05, "eps": 1e-4}
    oracle = dense(nearest(penalty), model, Adam, options)
    optimizer = Adam(model.parameters(), **options)
    penalty.attach(optimizer, model)
    for number in range(4):
        optimizer.zero_grad()
        CE(model(task("plain", number)[0][0]), task("plain", number)[0][1]).backward()
        expected = advance(oracle, [p.grad for p in model.parameters()], penalty.scale)
        optimizer.step()
        torch.testing.assert_close(flat(model), expected, rtol=0.0, atol=1e-6)


def test_added_gradients_are_those_of_the_nearest_bases() -> None:
    model, penalty = learned(rank=2)
    expected = quadratic(nearest(penalty), model, penalty.scale)
    optimizer = SGD(model.parameters(), lr=0.01)
    penalty.attach(optimizer, model, "gradient")
    before = flat(model)
    _step_without_loss(model, optimizer)
    moved = before - 0.01 * expected.gradient(before)
    torch.testing.assert_close(flat(model), moved, rtol=0.0, atol=1e-8)


def test_tangent_planes_are_those_of_the_nearest_bases() -> None:
    model, penalty = learned(rank=2)
    expected = quadratic(nearest(penalty), model, penalty.scale)
    optimizer = SGD(model.parameters(), lr=0.01)
    penalty.attach(optimizer, model, "tangent", 2)
    start = flat(model)
    for _ in range(2):
        _step_without_loss(model, optimizer)
    # Two steps on the plane, and the implicit one for what it leaves out.
    went, hessian = -0.02 * expected.gradient(start), expected.weight * expected.matrix
    system = torch.eye(len(start), dtype=torch.float64) + 0.02 * hessian
    moved = start + went - 0.02 * hessian @ torch.linalg.solve(system, went)
    torch.testing.assert_close(flat(model), moved, rtol=0.0, atol=1e-8)


def test_the_proximal_step_is_that_of_the_nearest_bases() -> None:
    model, penalty = learned(rank=2)
    expected = quadratic(nearest(penalty), model, penalty.scale)
    optimizer = SGD(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model)
    before = flat(model)
    _step_without_loss(model, optimizer)
    torch.testing.assert_close(flat(model), expected.proximal(before, 0.1), rtol=0.0, atol=1e-7)


def _step_without_loss(model: nn.Module, optimizer: SGD) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def test_separate_tasks() -> None:
    model, penalty = learned(3, 2, mode="separate")
    assert storage(penalty) == {torch.bfloat16}
    one_by_one = sum(
        0.5 * float(quadratic(alone, model, 1.0).value(flat(model))) * 2 * alone.scale * term.weight
        for term in nearest(penalty).terms
        for alone in [_of_one(penalty, term)]
    )
    assert penalty(model).item() == pytest.approx(one_by_one, rel=1e-7)


def _of_one(penalty: EKFACPenalty, term: Any) -> EKFACPenalty:
    alone = copy.deepcopy(penalty)
    last = penalty._last_examples, penalty._last_loss_terms
    alone._replace_terms([term], penalty.num_tasks, *last)
    return alone


@pytest.mark.parametrize("rank", RANKS)
def test_files_and_states_keep_it(rank: Any, tmp_path: Path) -> None:
    model, penalty = learned(rank=rank)
    path = tmp_path / "penalty"
    penalty.save(path)
    loaded, stated = EKFACPenalty.load(path), learned(0, rank)[1]
    stated.load_state_dict(penalty.state_dict())
    for other in (loaded, stated, copy.deepcopy(penalty)):
        assert other.settings.storage_dtype == torch.bfloat16
        assert storage(other) == {torch.bfloat16}
        assert other.nbytes == penalty.nbytes
        assert torch.equal(other(model), penalty(model))
    # What is loaded stays as it is, unless something else is asked for.
    plain = EKFACPenalty.load(path, storage_dtype=None)
    assert storage(plain) == {torch.bfloat16}
    restored = EKFACPenalty.load(path, storage_dtype="float32")
    assert storage(restored) == {torch.float32}
    assert restored(model).item() == pytest.approx(penalty(model).item(), rel=1e-6)
    whole = learned(rank=rank, storage_dtype=None)[1]
    whole.save(path)
    low = EKFACPenalty.load(path, settings=EstimationSettings(storage_dtype=torch.float16))
    assert storage(low) == {torch.float16}
    assert low.nbytes < whole.nbytes
    penalty.save(path, storage_dtype="bfloat16")
    assert torch.equal(
        EKFACPenalty.load(path).terms[0].operator.blocks[0].gradient_basis.float(),
        penalty.terms[0].operator.blocks[0].gradient_basis.float(),
    )


def test_other_dtypes_of_the_model() -> None:
    model, penalty = learned(rank=2)
    value = penalty(model).item()
    penalty.float()
    assert storage(penalty) == {torch.bfloat16}
    assert penalty(model.float()).item() == pytest.approx(value, rel=1e-4)
    penalty.double()
    assert storage(penalty) == {torch.bfloat16}
    assert penalty(model.double()).item() == pytest.approx(value, rel=1e-4)


def test_under_transforms_and_in_inference() -> None:
    model, penalty = learned(rank=2)
    shapes = shapes_of(model)
    expected = quadratic(nearest(penalty), model, penalty.scale)
    theta = flat(model)
    with torch.inference_mode():
        assert penalty(model).item() == pytest.approx(expected.value(theta).item(), rel=1e-7)
    several = torch.stack([theta, theta + 0.1])
    gradients = torch.func.vmap(torch.func.grad(lambda t: penalty(unflat(t, shapes))))(several)
    for row, gradient in zip(several, gradients, strict=True):
        torch.testing.assert_close(gradient, expected.gradient(row), rtol=1e-6, atol=1e-8)
    with torch.autocast("cpu", torch.bfloat16):
        assert penalty(model).item() == pytest.approx(expected.value(theta).item(), rel=1e-7)


def test_reports_know_the_bases() -> None:
    _, penalty = learned(rank=2)
    (term,), (exact,) = penalty.terms, nearest(penalty).terms
    for block in compare(term.operator, exact.operator).blocks:
        assert block.cosine == pytest.approx(1.0, abs=1e-7)
        assert block.trace_ratio == pytest.approx(1.0, abs=1e-9)


def test_bad_values(tmp_path: Path) -> None:
    for value in (torch.int8, "half", 16, torch.float64):
        with pytest.raises(ValueError, match=r"^storage_dtype is .*; expected one of float32, b"):
            EKFACPenalty(storage_dtype=value)
    _, penalty = learned(rank=2)
    state = penalty.terms[0].operator.state_dict()
    text = bytes(state["header"].numpy()).decode()
    worse = text.replace('"storage_dtype":"bfloat16"', '"storage_dtype":"float64"')
    worse = worse.replace('"dtype":"float64"', '"dtype":"float32"')
    assert worse != text
    state["header"] = torch.frombuffer(bytearray(worse.encode()), dtype=torch.uint8)
    with pytest.raises(SnapshotError, match=r"'storage_dtype' is torch\.float64; expected none"):
        type(penalty.terms[0].operator).from_state_dict(state)


class _SharedInput(nn.Module):
    """Two layers of one input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.one(x) * torch.tanh(self.other(x))
        return found


def test_layers_of_one_input_have_one_basis(tmp_path: Path) -> None:
    penalty, x = EKFACPenalty(1.0, storage_dtype="bfloat16"), torch.randn(9, 6)
    penalty.consolidate(_SharedInput(), CE, [(x, torch.arange(9) % 4)])
    penalty.save(tmp_path / "penalty")
    loaded = EKFACPenalty.load(tmp_path / "penalty")
    restored = EKFACPenalty.load(tmp_path / "penalty", storage_dtype="float32")
    for one in (penalty, loaded, restored):
        first, second = (block.activation_basis for block in one.terms[0].operator.blocks)
        assert first.data_ptr() == second.data_ptr()


# Restored bases are found in the product, which ends the compiled graph; torch warns of that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("name", ["plain", "words"])
def test_in_a_compiled_loss(name: str) -> None:
    model, penalty = learned(rank=2, name=name)
    expected = quadratic(nearest(penalty), model, penalty.scale)

    @torch.compile(backend="eager")
    def loss() -> Tensor:
        return penalty(model)

    value = loss()
    value.backward()
    theta = flat(model)
    assert value.item() == pytest.approx(expected.value(theta).item(), rel=1e-7)
    torch.testing.assert_close(flat_gradient(model), expected.gradient(theta), rtol=1e-6, atol=1e-8)
