"""What tasks weigh in with: example counts, weights of their own, decay; mean and summed losses.

The formula is `½ λ Σ_t ω_t (θ - θ_t)ᵀ F_t (θ - θ_t)` with `ω_t = w_t decay^(T - t) N_t / N_now`,
for F_t of the mean loss. A summed loss over a task is N_now times the mean loss, and so is the
penalty that belongs to it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACPenalty, SnapshotError
from tests.helpers.crossing import crossed
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import Shapes, assert_close, block_indices, block_matrix, partial_traces
from tests.helpers.penalties import (
    CE,
    SUMMED,
    Quadratic,
    dense_quadratic,
    estimated,
    flat,
    flat_gradient,
    make,
    move,
    shapes_of,
    task,
)

STRENGTH, DECAY, NOW = 2.5, 0.6, 25
WEIGHTS = (1.5, 0.4, 2.0)
# Of the second task, the data are only a sample.
SAMPLES, COUNTS = (9, 7, 8), (9, 70, 8)
LAYOUTS = ((("0.weight",), 2), (("0.bias",), 2), (("3.weight",), 1))


def learn(
    penalty: EKFACPenalty, loss: nn.Module, weights: tuple[float, ...] = WEIGHTS
) -> tuple[nn.Module, list[Quadratic]]:
    """Consolidate three tasks; return the model after them, and the Fisher matrix of each."""
    model, forms = make("grouped"), []
    for t, weight in enumerate(weights):
        data = task("grouped", t, SAMPLES[t])
        penalty.consolidate(
            model, loss, data, weight=weight, num_data=COUNTS[t] if t == 1 else None
        )
        anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
        operator = estimated(model, data, seed=penalty.settings.seed + t)
        forms.append(dense_quadratic(operator, anchor, shapes_of(model)))
        move(model, t)
    return model, forms


def merged(matrices: list[Tensor], shapes: Shapes) -> Tensor:
    """The projection of a sum onto blocks `(U_g ⊗ U_a) Λ (U_g ⊗ U_a)ᵀ`, written out."""
    total = torch.stack(matrices).sum(dim=0)
    result = torch.zeros_like(total)
    for names, groups in LAYOUTS:
        indices = block_indices(shapes, names, groups)
        blocks = block_matrix(total, shapes, names, groups)
        sides = (torch.linalg.eigh(side)[1] for side in partial_traces(blocks, indices.shape[1]))
        for index, block, output_side, input_side in zip(indices, blocks, *sides, strict=True):
            basis = torch.kron(output_side.contiguous(), input_side.contiguous())
            diagonal = (basis.T @ block @ basis).diagonal()
            where = index.flatten()
            result[where[:, None], where] = basis @ torch.diag(diagonal) @ basis.T
    return result


def expected(forms: list[Quadratic], omegas: list[float], mode: str, shapes: Shapes) -> list:
    """The quadratics that the penalty must be the sum of, but for the strength."""
    if mode == "separate":
        return [f._replace(weight=STRENGTH * w) for f, w in zip(forms, omegas, strict=True)]
    folded = omegas[0] * forms[0].matrix
    for form, omega in zip(forms[1:], omegas[1:], strict=True):
        folded = merged([folded, omega * form.matrix], shapes)
    return [Quadratic(folded, forms[-1].anchor, STRENGTH)]


@crossed(
    mode=["merged", "separate"],
    weighting=["examples", "uniform"],
    decay=[1.0, DECAY, 0.0],
    loss=[CE, SUMMED],
)
def test_formula(mode: str, weighting: str, decay: float, loss: nn.Module) -> None:
    penalty = exact_penalty(STRENGTH, mode, weighting=weighting, decay=decay, seed=3)
    model, forms = learn(penalty, loss)
    theta = flat(model)
    for now in (None, NOW):
        penalty.current_num_data = now
        present = now or COUNTS[-1]
        omegas = [w * decay ** (2 - t) for t, w in enumerate(WEIGHTS)]
        if weighting == "examples":
            omegas = [w * n / present for w, n in zip(omegas, COUNTS, strict=True)]
        if loss is SUMMED:
            omegas = [w * present for w in omegas]
        exact = expected(forms, omegas, mode, shapes_of(model))
        model.zero_grad()
        value = penalty(model)
        value.backward()
        assert_close(value.detach(), torch.stack([f.value(theta) for f in exact]).sum())
        assert_close(
            flat_gradient(model), torch.stack([f.gradient(theta) for f in exact]).sum(dim=0)
        )


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_task_of_no_weight_is_not_protected(mode: str) -> None:
    penalty = exact_penalty(STRENGTH, mode, seed=3)
    model, forms = learn(penalty, CE, (0, 1, 0))
    middle = forms[1]._replace(weight=STRENGTH * COUNTS[1] / COUNTS[2])
    if mode == "merged":
        middle = middle._replace(anchor=forms[2].anchor)
        for _ in range(2):  # merged twice more, with nothing: projected onto its own basis
            middle = middle._replace(matrix=merged([middle.matrix], shapes_of(model)))
    assert_close(penalty(model).detach(), middle.value(flat(model)))
    nothing = exact_penalty(STRENGTH, mode)
    learn(nothing, CE, (0, 0, 0))
    assert nothing(model).item() == nothing.max_curvature == 0.0
    assert nothing.num_tasks == 3


def test_number_of_current_examples_does_not_matter_without_counts() -> None:
    penalty = exact_penalty(STRENGTH, weighting="uniform")
    model, _ = learn(penalty, CE)
    before = penalty(model).item()
    penalty.current_num_data = NOW
    assert penalty(model).item() == before > 0


@crossed(mode=["merged", "separate"], weighting=["examples", "uniform"], loss=[CE, SUMMED])
def test_state_keeps_the_weights(mode: str, weighting: str, loss: nn.Module, tmp_path: Any) -> None:
    options = {"mode": mode, "weighting": weighting, "decay": DECAY}
    penalty = exact_penalty(STRENGTH, **options)
    model, _ = learn(penalty, loss)
    torch.save(penalty.state_dict(), tmp_path / "penalty.pt")
    resumed = exact_penalty(STRENGTH, **options)
    resumed.load_state_dict(torch.load(tmp_path / "penalty.pt", weights_only=True))
    assert [t.weight for t in resumed.terms] == [t.weight for t in penalty.terms]
    assert resumed(model).item() == penalty(model).item() > 0
    assert resumed.max_curvature == penalty.max_curvature
    for either in (penalty, resumed):
        either.consolidate(model, loss, task("grouped", 3), weight=0.3)
    move(model, 4)
    assert resumed(model).item() == penalty(model).item() > 0


def test_state_of_another_weighting_is_refused() -> None:
    state = exact_penalty(weighting="uniform").state_dict()
    with pytest.raises(SnapshotError, match="weighting 'uniform'; expected 'examples'"):
        exact_penalty().load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message", "error"),
    [
        ({"weighting": "sizes"}, "weighting is 'sizes'; expected one of 'examples'", ValueError),
        ({"weighting": None}, "weighting is None", ValueError),
        ({"decay": 1.1}, "decay is 1.1; expected a number from 0 to 1", ValueError),
        ({"decay": -0.1}, "decay is -0.1", ValueError),
        ({"decay": float("nan")}, "decay is nan", ValueError),
        ({"decay": True}, "decay is True", TypeError),
        ({"decay": "1"}, "decay is '1'", TypeError),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=message):
        exact_penalty(**arguments)


@pytest.mark.parametrize(
    ("weight", "error"),
    [
        (-1.0, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (True, TypeError),
        ("1", TypeError),
        (None, TypeError),
    ],
)
def test_bad_weights(weight: Any, error: type[Exception]) -> None:
    model, penalty = make("plain"), exact_penalty()
    with pytest.raises(error, match=f"weight is {weight!r}"):
        penalty.consolidate(model, CE, task("plain", 0), weight=weight)
    assert penalty.num_tasks == 0


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_bad_numbers_of_current_examples(value: Any, error: type[Exception]) -> None:
    penalty = exact_penalty()
    with pytest.raises(error, match=f"current_num_data is {value!r}"):
        penalty.current_num_data = value
    assert penalty.current_num_data is None
