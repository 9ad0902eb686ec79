"""A task's matrix, softened and damped, and what becomes of it beside those of earlier tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator, EKFACPenalty, EstimationSettings
from rotate_ewc.distributed.processes import Ranks
from rotate_ewc.linalg.block import Block
from rotate_ewc.options import Mode, Reduction
from rotate_ewc.penalty.folding import estimate_task, fold_in
from rotate_ewc.penalty.owners import Owners
from rotate_ewc.penalty.terms import Term
from rotate_ewc.provenance import Provenance
from tests.helpers.oracles import assert_close, dense_block, dense_operator
from tests.helpers.thin import thin_block
from tests.helpers.threads import in_threads

INPUTS = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
DATA = [(INPUTS, torch.tensor([1]))]


class Model(nn.Module):
    """Has a layer that it uses, and a parameter that it does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2, bias=False).double()
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x)
        return outputs


def estimated(
    loss: Any = None,
    temperature: float | str = 1.0,
    damping: float = 0.0,
    model: nn.Module | None = None,
    **options: Any,
) -> EKFACLinearOperator:
    model = model or Model()
    return estimate_task(
        model,
        nn.CrossEntropyLoss() if loss is None else loss,
        dict(model.named_parameters()),
        DATA,
        None,
        temperature=temperature,
        damping=damping,
        settings=EstimationSettings(**{"fisher_type": "type2", **options}),
        num_data=40,
        ranks=Ranks(),
    )


# --- estimating ---


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_softened_and_damped_matrix(temperature: float, damping: float) -> None:
    """`(diag(p) - p pᵀ) ⊗ x xᵀ`, whose p is softened, and a part of its means."""
    operator = estimated(temperature=temperature, damping=damping)
    p = (Model()(INPUTS)[0].detach() / temperature).softmax(0)
    of_outputs, of_inputs = torch.diag(p) - torch.outer(p, p), torch.outer(INPUTS[0], INPUTS[0])
    matrix = torch.kron(of_outputs, of_inputs)
    mean = damping * of_outputs.trace() / 2 * torch.eye(2, dtype=torch.float64)
    matrix += torch.kron(mean, of_inputs + of_inputs.trace() / 3 * torch.eye(3).double())
    assert_close(dense_block(operator.block("layer.weight"))[0], matrix)
    # No output depends on it, which is no error where the model is known.
    assert not operator.block("unused").eigenvalues.any()
    told = operator.provenance.settings
    assert (told["temperature"], told["damping"]) == (temperature, damping)
    assert told["num_data_seen"] == 1
    assert operator.num_data == 40


def test_a_temperature_that_is_found() -> None:
    """At which the entropy of two classes is 0.8 of a bit."""
    model = Model()
    with torch.no_grad():
        model.layer.weight.mul_(20)
    told = estimated(temperature="auto", model=model).provenance.settings["temperature"]
    assert isinstance(told, float)
    p = (model(INPUTS)[0].detach() / told).softmax(0)
    assert float(-(p * p.log2()).sum()) == pytest.approx(0.8, abs=1e-5)


def test_losses_of_which_only_gradients_are_known() -> None:
    """They suffice for the empirical matrix, `g gᵀ` of the one example."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] ** 3).mean() + 0.0 * targets.sum()

    operator = estimated(loss, fisher_type="empirical")
    model = Model()
    (gradient,) = torch.autograd.grad(loss(model(INPUTS), DATA[0][1]), [model.layer.weight])
    expected = torch.outer(gradient.flatten(), gradient.flatten())
    assert_close(dense_block(operator.block("layer.weight"))[0], expected)


# --- folding in ---


def term(
    seed: int,
    weight: float = 1.0,
    sizes: tuple[int, int] = (5, 6),
    rank: int = 3,
    reduction: str = "mean",
    names: tuple[str, ...] = ("w", "v"),
) -> Term:
    """Random blocks of some parameters of one size, and anchors."""
    blocks = [
        thin_block((1, *sizes), (rank, rank), seed=seed + number, parameters=(name,))
        for number, name in enumerate(names)
    ]
    anchor = {name: torch.full(sizes, seed + 0.5, dtype=torch.float64) for name in names}
    provenance = Provenance("MSELoss", Reduction(reduction), "type2", 10, 20.0)
    operator = EKFACLinearOperator.from_blocks(blocks, dict.fromkeys(names, sizes), provenance)
    return Term(operator, anchor, weight)


def folded(
    terms: list[Term],
    task: Term,
    mode: Mode = Mode.MERGED,
    *,
    decay: float = 1.0,
    parameters: dict[str, Tensor] | None = None,
    ranks: Ranks | None = None,
    owners: Owners | None = None,
    **options: Any,
) -> list[Term]:
    if parameters is None:
        parameters = {name: torch.zeros(5, 6, dtype=torch.float64) for name in ("w", "v")}
    return fold_in(
        terms,
        task,
        parameters,
        mode=mode,
        decay=decay,
        settings=EstimationSettings(**options),
        ranks=ranks or Ranks(),
        owners=owners or Owners(),
    )


def dense(one: Term) -> Tensor:
    return one.weight * dense_operator(one.operator.blocks, one.operator.parameter_shapes)


def test_separate_tasks_decay() -> None:
    """And the new one does not."""
    first, second, task = term(1, 2.0), term(2, 3.0), term(3, 5.0)
    found = folded([first, second], task, Mode.SEPARATE, decay=0.5)
    assert [one.weight for one in found] == [1.0, 1.5, 5.0]
    assert [one.operator for one in found] == [
        first.operator,
        second.operator,
        task.operator,
    ]
    assert found[2] is task


def test_merged_tasks_are_one_at_the_latest_anchors() -> None:
    """With whole bases, the trace and both partial traces are those of the weighted sum."""
    old = term(1, 2.0, rank=6, sizes=(6, 6), names=("w", "v"))
    task = term(3, 5.0, rank=6, sizes=(6, 6), names=("w",))
    parameters = {name: torch.zeros(6, 6, dtype=torch.float64) for name in ("w", "v")}
    (one,) = folded([old], task, decay=0.5, parameters=parameters)
    assert one.weight == 1.0
    assert one.operator.num_data == 20
    assert one.anchor["w"] is task.anchor["w"]
    assert one.anchor["v"] is old.anchor["v"]
    assert_close(dense_block(one.operator.block("v")), dense_block(old.operator.block("v")))
    exact = dense_block(old.operator.block("w")) + 5.0 * dense_block(task.operator.block("w"))
    found = dense_block(one.operator.block("w"))
    for sum_over in ("gaibi->ab", "gaiaj->ij"):
        split = (found.reshape(1, 6, 6, 6, 6), exact.reshape(1, 6, 6, 6, 6))
        assert_close(*(torch.einsum(sum_over, matrix) for matrix in split))


def test_rank_of_what_is_merged() -> None:
    """One task alone keeps as much as was estimated, whatever later ones are to keep."""
    first = term(1)
    (alone,) = folded([], first, rank=1)
    assert [block.ranks for block in alone.operator.blocks] == [(3, 3)] * 2
    (both,) = folded([first], term(2), rank=1)
    assert [block.ranks for block in both.operator.blocks] == [(1, 1)] * 2
    (whole,) = folded([first], term(2), rank=6)
    assert [block.ranks for block in whole.operator.blocks] == [(5, 6)] * 2


def test_bases_of_what_is_merged_are_stored_as_asked() -> None:
    """Of separate tasks they stay as they are."""
    (merged,) = folded([term(1)], term(2), storage_dtype="bfloat16")
    assert {block.storage_dtype for block in merged.operator.blocks} == {torch.bfloat16}
    separate = folded([term(1)], term(2), Mode.SEPARATE, storage_dtype="bfloat16")
    assert {b.storage_dtype for one in separate for b in one.operator.blocks} == {None}


@pytest.mark.parametrize("mode", list(Mode))
def test_what_does_not_fit_any_more_is_left_out(mode: Mode) -> None:
    old, task = term(1), term(3, names=("v",), sizes=(6, 6))
    parameters = {"w": torch.zeros(4, 6), "v": torch.zeros(6, 6)}
    found = folded([old, term(2, names=("w",))], task, mode, parameters=parameters)
    assert len(found) == (1 if mode is Mode.MERGED else 2)
    assert all(list(one.anchor) == ["v"] for one in found)
    assert all(list(one.operator.parameter_shapes) == ["v"] for one in found)


def test_reductions_that_differ() -> None:
    with pytest.raises(ValueError, match="reduction") as raised:
        folded([term(1), term(2)], term(3, reduction="sum"))
    assert str(raised.value) == (
        "loss_func has reduction 'sum', but earlier tasks had 'mean'; expected the same for all "
        "tasks"
    )
    folded([term(1, reduction="sum")], term(3, reduction="sum"))


# --- where each process keeps only its share ---


def shared(ranks: Ranks, *terms: Term) -> tuple[Owners, list[Term]]:
    """The first process keeps `w`, the second `v`; of the others they have no numbers."""
    owners = Owners(ranks, {"w": 0, "v": 1})
    return owners, [owners.keep(one) for one in terms]


def test_each_process_merges_its_share() -> None:
    """To the bits of one process alone; of the rest it knows the shapes."""
    (alone,) = folded([term(1)], term(2), rank=2)

    def merged(ranks: Ranks) -> Term:
        owners, (old, task) = shared(ranks, term(1), term(2))
        (one,) = folded([old], task, ranks=ranks, owners=owners, rank=2)
        return one

    found = in_threads(2, merged)
    for rank, one in enumerate(found):
        assert isinstance(one, Term), one
        for number, name in enumerate("wv"):
            block, expected = one.operator.block(name), alone.operator.block(name)
            assert isinstance(block, Block)
            assert block.tensors.keys() == expected.tensors.keys()
            for key, tensor in expected.tensors.items():
                assert block.tensors[key].is_meta == (rank != number)
                assert block.tensors[key].shape == tensor.shape
                assert rank != number or torch.equal(block.tensors[key], tensor)
            assert one.anchor[name].is_meta == (rank != number)


@pytest.mark.parametrize("mode", list(Mode))
def test_sums_are_looked_at_where_they_are_kept(mode: Mode) -> None:
    """What is no finite number is an error of the process that has it."""
    task = term(2, 1e308)
    assert all(float(block.trace) > 2 for block in task.operator.blocks)

    def fold(ranks: Ranks) -> list[Term]:
        owners, (old, new) = shared(ranks, term(1), task)
        return folded([old], new, mode, ranks=ranks, owners=owners)

    for name, error in zip("wv", in_threads(2, fold), strict=True):
        assert isinstance(error, ValueError), error
        assert f"the Fisher matrix of {name!r} is not finite" in str(error)
    assert isinstance(in_threads(1, lambda _: folded([], task))[0], ValueError)


class Quantised(nn.Module):
    """A frozen weight of whole numbers, as bitsandbytes holds them, under a layer that learns."""

    def __init__(self) -> None:
        super().__init__()
        numbers = torch.arange(-8, 8, dtype=torch.int8).view(4, 4)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.top = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.top(nn.functional.linear(x, 0.1 * self.weight.to(x.dtype)).tanh())
        return y


@pytest.mark.parametrize("temperature", ["auto", 1.0])
def test_whole_numbers_among_the_parameters(temperature: Any) -> None:
    torch.manual_seed(0)
    model, batch = Quantised().double(), (torch.randn(6, 4).double(), torch.arange(6) % 3)
    penalty = EKFACPenalty(temperature=temperature)
    penalty.consolidate(model, nn.CrossEntropyLoss(), [batch])
    assert penalty.protected_names == ["top.weight", "top.bias"]
    assert not model.weight.requires_grad
