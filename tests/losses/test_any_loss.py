"""Losses of which nothing is known: the empirical matrix, against loops over the examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotate_ewc import EKFACLinearOperator, EKFACPenalty, EmpiricalLoss, ModelLoss
from tests.helpers.any_loss import example_gradients, outer_products
from tests.helpers.exactness import assert_exact_diagonal, seeded
from tests.helpers.oracles import assert_close, dense_operator, parameter_shapes

N, POSITIONS = 6, 3
EMPIRICAL = {"fisher_type": "empirical", "check_deterministic": False}


class Net(nn.Module):
    """Three outputs for each example, or at each of three positions, of a dictionary if asked."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.body = nn.Linear(5, 4).double()
            self.top = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.top(torch.tanh(self.body(x)))
        return outputs


def inputs(positions: bool = False) -> Tensor:
    return seeded(N, POSITIONS, 5) if positions else seeded(N, 5)


def real(positions: bool = False) -> Tensor:
    return seeded(*((N, POSITIONS, 3) if positions else (N, 3)), seed=6)


def labels() -> Tensor:
    found = torch.randint(3, (N, POSITIONS), generator=torch.Generator().manual_seed(5))
    found[0], found[2, 1] = -100, -100
    return found


def batches(x: Tensor, y: Any, lengths: tuple[int, ...] = (3, 1, 2)) -> list[Any]:
    return list(zip(x.split(lengths), y.split(lengths), strict=True))


def dense(operator: EKFACLinearOperator) -> Tensor:
    return dense_operator(operator.blocks, operator.parameter_shapes)


SHAPES = parameter_shapes(Net(), [name for name, _ in Net().named_parameters()])


def check(
    loss: Any,
    data: list[Any],
    of_example: Callable[[Any, int], Tensor],
    divisor: float,
    forward: Callable[[nn.Module], Callable[[Any], Any]] = lambda model: model,
    x: Tensor | None = None,
) -> EKFACLinearOperator:
    """The operator is `Σ_n ∇L_n ∇L_nᵀ / M` for the summed losses of examples given."""
    model = Net()
    x = inputs(data[0][0].ndim == 3) if x is None else x
    operator = EKFACLinearOperator(
        forward(model), loss, dict(model.named_parameters()), data, **EMPIRICAL
    )
    matrix = outer_products(example_gradients(model, of_example, x)) / divisor
    assert_exact_diagonal(operator, matrix, SHAPES)
    return operator


def absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    """A smooth absolute error, unreduced."""
    return (1 + (outputs - targets).square()).sqrt()


REDUCED: dict[str, tuple[Any, float, float, str]] = {
    # The loss; factor of L_n, the sum of an example's elements; what that is divided by; reduction.
    "each-example": (lambda f, y: absolute(f, y).sum(1), 1, N, "mean"),
    "each-element": (absolute, 1, 3 * N, "mean"),
    "mean": (lambda f, y: absolute(f, y).mean(), 1 / 3, N, "mean"),
    "sum": (lambda f, y: absolute(f, y).sum(), 1, 1, "sum"),
    "loop": (lambda f, y: sum(absolute(f[i], y[i]).sum() for i in range(len(f))), 1, 1, "sum"),
    "no-vmap": (lambda f, y: absolute(f, y).sum() * float(f.sum().item() < 1e9), 1, 1, "sum"),
    "module": (type("M", (nn.Module,), {"forward": lambda _, f, y: absolute(f, y).mean()})(),
               1 / 3, N, "mean"),
    "summed": (EmpiricalLoss(absolute, reduction="sum"), 1, 1, "sum"),
    "terms": (
        EmpiricalLoss(lambda f, y: absolute(f, y).mean(), terms=lambda f, y: torch.ones_like(f)),
        1, 3 * N, "mean",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lengths", [(3, 1, 2), (6,), (1,) * 6])
@pytest.mark.parametrize("name", REDUCED)
def test_any_reduction_is_exact(name: str, lengths: tuple[int, ...]) -> None:
    """However the examples are batched; whether it is a mean or a sum is measured."""
    loss, factor, divisor, reduction = REDUCED[name]
    x, y = inputs(), real()
    operator = check(
        loss,
        batches(x, y, lengths),
        lambda f, n: factor * absolute(f, y[n : n + 1]).sum(),
        divisor,
    )
    assert operator.provenance.reduction == reduction
    assert operator.provenance.num_loss_terms == (divisor if reduction == "mean" else {
        "sum": N, "loop": N, "no-vmap": N, "summed": 3 * N}[name])  # fmt: skip


@pytest.mark.parametrize("positions", [False, True])
def test_known_losses_written_as_functions_are_the_same(positions: bool) -> None:
    """The mean over tokens with the options of the built-in loss, class weights and all."""
    x, weight = inputs(positions), torch.tensor([0.5, 1.0, 2.0]).double()
    y = labels() if positions else labels()[:, 0].clamp_min(-1).abs()
    axes = (lambda f: f.transpose(1, 2)) if positions else (lambda f: f)
    known = nn.CrossEntropyLoss(weight=weight)

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f, y, weight)

    def terms(f: Tensor, y: Tensor) -> Tensor:
        return torch.where(y == -100, 0, weight[y.clamp_min(0)])

    found = []
    for loss_func in (known, EmpiricalLoss(loss, terms=terms)):
        model = Net()
        operator = EKFACLinearOperator(
            lambda x, model=model: axes(model(x)),
            loss_func,
            dict(model.named_parameters()),
            batches(x, y),
            **EMPIRICAL,
        )
        found.append(operator)
    assert_close(dense(found[1]), dense(found[0]), 1e-9)
    terms_of = [operator.provenance.num_loss_terms for operator in found]
    assert terms_of[1] == pytest.approx(terms_of[0])


def test_rows_of_outputs_are_terms_of_a_mean() -> None:
    """As in the usual mean over the tokens of flattened outputs."""
    x, y = inputs(True), real(True)
    check(
        lambda f, y: absolute(f, y).mean(),
        [(a, b.flatten(0, 1)) for a, b in batches(x, y)],
        lambda f, n: absolute(f, y[n]).sum() / 3,
        N * POSITIONS,
        lambda model: lambda x: model(x).flatten(0, 1),
    )


def test_targets_may_be_anything() -> None:
    x, y = inputs(), real()
    weights = torch.tensor([1.0, 2.0, 3.0]).double()

    def loss(f: Any, targets: Any) -> Tensor:
        found: Tensor = (absolute(f, targets["y"][0]) * targets["w"][:, None] * weights).sum(1)
        return found if targets["kind"] == "good" else -found

    w = torch.arange(1.0, N + 1).double()
    data = [(x[a:b], {"y": [y[a:b]], "w": w[a:b], "kind": "good"}) for a, b in ((0, 4), (4, 6))]
    check(loss, data, lambda f, n: (absolute(f, y[n]) * w[n] * weights).sum(), N)


def test_outputs_may_be_anything() -> None:
    x, y = inputs(), real()
    check(
        lambda outputs, y: absolute(outputs["two"][0] * outputs["scale"], y).sum(1)
        + outputs["one"].squeeze(1),
        batches(x, y),
        lambda f, n: absolute(f * 2, y[n : n + 1]).sum() + f[0, 0] ** 2,
        N,
        lambda model: lambda x: {
            "one": (f := model(x))[:, :1].square(), "two": (f,), "scale": 2, "names": ["a"]
        },
    )  # fmt: skip


def test_targets_are_not_needed() -> None:
    """A function of outputs alone takes batches as inputs; and targets may be None."""
    x = inputs()
    for loss, data in (
        (lambda f: f.square().sum(1), list(x.split(2))),
        (
            lambda f, y: f.square().sum(1) if y is None else f.sum(1),
            [(p, None) for p in x.split(2)],
        ),
    ):
        check(loss, data, lambda f, n: f.square().sum(), N, x=x)


# --------------------------------------------------------------------------- models' own losses


def own(model: Any, batch: Any) -> Tensor:
    """A mean over the tokens that have labels."""
    outputs = model(batch["x"]).flatten(0, 1)
    loss: Tensor = F.cross_entropy(outputs, batch["labels"].flatten())
    return loss


def own_batches(lengths: tuple[int, ...], y: Tensor) -> list[Any]:
    parts = batches(inputs(True), y, lengths)
    return [{"x": a, "labels": b, "name": "batch"} for a, b in parts]


def kept(batch: Any) -> Tensor:
    found: Tensor = (batch["labels"] != -100).sum(dim=1)
    return found


OWN: dict[str, tuple[ModelLoss, Tensor, float, float]] = {
    "mean": (ModelLoss(own), labels().clamp_min(0), 1 / POSITIONS, N),
    "tokens": (ModelLoss(own, terms=kept), labels(), 1, float((labels() != -100).sum())),
    "sum": (ModelLoss(lambda m, b: own(m, b) * b["x"].shape[0]), labels().clamp_min(0),
            1 / POSITIONS, 1),
    "each": (
        ModelLoss(
            lambda m, b: F.cross_entropy(m(b["x"]).transpose(1, 2), b["labels"], reduction="none")
        ),
        labels(), 1, N * POSITIONS,
    ),
    "each-summed": (
        ModelLoss(
            lambda m, b: F.cross_entropy(
                m(b["x"]).transpose(1, 2), b["labels"], reduction="none"
            ).sum(dim=1),
            reduction="sum",
        ),
        labels(), 1, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("lengths", [(3, 1, 2), (6,), (1,) * 6])
@pytest.mark.parametrize("name", OWN)
def test_losses_of_model_and_batch_are_exact(name: str, lengths: tuple[int, ...]) -> None:
    loss, y, factor, divisor = OWN[name]
    model = Net()
    arguments = (loss, list(model.parameters()), own_batches(lengths, y))
    for budget in (2**30, 1):
        operator = EKFACLinearOperator(model, *arguments, **EMPIRICAL, memory_budget=budget)
        matrix = outer_products(
            example_gradients(
                model,
                lambda f, n: factor * F.cross_entropy(f[0], y[n], reduction="sum"),
                inputs(True),
            )
        )
        assert_exact_diagonal(operator, matrix / divisor, SHAPES)


def test_a_penalty_takes_losses_of_model_and_batch() -> None:
    model = Net()
    penalty = EKFACPenalty(1.0, fisher_type="empirical")
    penalty.consolidate(model, ModelLoss(own, terms=kept), own_batches((3, 3), labels()))
    (term,) = penalty.terms
    assert term.operator.provenance.settings["temperature"] == 1.0
    assert term.operator.provenance.loss == "ModelLoss(own)"
    assert term.operator.provenance.num_loss_terms == float((labels() != -100).sum())


# --------------------------------------------------------------------------- what is refused


def contrastive(f: Tensor, y: Tensor) -> Tensor:
    """Every example against all others of its batch."""
    return F.cross_entropy(f @ f.mT, torch.arange(len(f)), reduction="none")


REFUSED: dict[str, tuple[Any, str]] = {
    "contrastive": (contrastive, "contrastive.*depend on each other.*whole group"),
    "contrastive-mean": (lambda f, y: contrastive(f, y).mean(), "neither|depend on each other"),
    "weighted": (
        lambda f, y: (absolute(f, y).sum(1) * y[:, 0].abs()).sum() / y[:, 0].abs().sum(),
        r"count differently.*EmpiricalLoss\(loss, terms=",
    ),
    "wrong-terms": (
        EmpiricalLoss(lambda f, y: absolute(f, y).mean(), terms=lambda f, y: y[:, 0].abs()),
        "count differently",
    ),
    "wrong-reduction": (
        EmpiricalLoss(lambda f, y: absolute(f, y).mean(), reduction="sum"), "'sum', as it was given"
    ),
    "random": (lambda f, y: (f * torch.rand_like(f)).sum(1), "random"),
    "batch-statistics": (lambda f, y: (f - f.mean(0)).square().sum(), "depend on each other"),
    "constant": (lambda f, y: y.sum(), "does not depend on the outputs.*ModelLoss"),
    "detached": (lambda f, y: f.detach().sum(), "does not depend on the outputs"),
    "no-tensor": (lambda f, y: 1.0, "returned float; expected a float tensor"),
    "wrong-shape": (lambda f, y: f.sum(0)[:2], r"returned shape \[2\] for 3 examples"),
    "terms-scalar": (
        EmpiricalLoss(lambda f, y: f.sum(), terms=lambda f, y: 3), "terms of loss_func.*int"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_sum_over_examples_is_refused(name: str) -> None:
    loss, message = REFUSED[name]
    model = Net()
    with pytest.raises((TypeError, ValueError), match=f"batch 0 of data: .*({message})"):
        EKFACLinearOperator(
            model, loss, list(model.parameters()), batches(inputs(), real()), **EMPIRICAL
        )


def test_the_advice_on_weighted_means_helps() -> None:
    y = real()
    w = y[:, 0].abs()
    loss = EmpiricalLoss(REFUSED["weighted"][0], terms=lambda f, y: y[:, 0].abs())
    check(
        loss,
        batches(inputs(), y),
        lambda f, n: w[n] * absolute(f, y[n : n + 1]).sum(),
        float(w.sum()),
    )


def test_a_mean_over_other_lengths_needs_its_terms() -> None:
    x = inputs(True)
    data = [(x[:3], real(True)[:3]), (x[3:, :2], real(True)[3:, :2])]
    model = Net()
    params = list(model.parameters())

    def mean(f: Tensor, y: Tensor) -> Tensor:
        return absolute(f, y).mean()

    with pytest.raises(ValueError, match=r"batch 1 of data: .*other shapes in other batches"):
        EKFACLinearOperator(model, mean, params, data, **EMPIRICAL)
    counted = EmpiricalLoss(mean, terms=lambda f, y: torch.ones_like(f))
    found = EKFACLinearOperator(model, counted, params, data, **EMPIRICAL)
    each = EKFACLinearOperator(model, absolute, params, data, **EMPIRICAL)
    assert_close(dense(found), dense(each), 1e-9)


def test_reductions_must_agree_between_batches() -> None:
    def loss(f: Tensor, targets: Any) -> Tensor:
        y, kind = targets
        return absolute(f, y).mean() if kind == "mean" else absolute(f, y).sum()

    model, x, y = Net(), inputs(), real()
    data = [(x[:3], (y[:3], "mean")), (x[3:], (y[3:], "sum"))]
    with pytest.raises(ValueError, match=r"batch 1 of data: .*'mean', as it was given or in"):
        EKFACLinearOperator(model, loss, list(model.parameters()), data, **EMPIRICAL)


@pytest.mark.parametrize("fisher", ["mc", "type2"])
@pytest.mark.parametrize("loss", [absolute, EmpiricalLoss(absolute), ModelLoss(own)])
def test_other_fisher_types_need_a_distribution(loss: Any, fisher: str) -> None:
    model = Net()
    with pytest.raises(TypeError, match=r"fisher_type='(mc|type2)'.*Pass fisher_type='empirical'"):
        EKFACLinearOperator(
            model, loss, list(model.parameters()), batches(inputs(), real()), fisher_type=fisher
        )


def test_there_is_nothing_to_soften() -> None:
    model = Net()
    penalty = EKFACPenalty(1.0, fisher_type="empirical", temperature=2.0)
    with pytest.raises(ValueError, match=r"temperature is 2.0, but absolute"):
        penalty.consolidate(model, absolute, batches(inputs(), real()))
    penalty.temperature = "auto"
    penalty.consolidate(model, absolute, batches(inputs(), real()))
    assert penalty.num_tasks == 1


MIXED: dict[str, tuple[ModelLoss, str]] = {
    "tokens": (ModelLoss(own), r"is nan; .*terms="),
    "length": (
        ModelLoss(lambda m, b: (m(b["x"]) * b["x"][:, :1, :1]).sum() / b["x"][:, 0, 0].sum()),
        r"the mean .* and the sum .*terms=",
    ),
    "contrastive": (ModelLoss(lambda m, b: contrastive(m(b["x"])[:, 0], b).mean()), "terms="),
    "no-tensor": (ModelLoss(lambda m, b: 3), "returned int"),
}


@pytest.mark.parametrize("name", MIXED)
def test_model_losses_that_are_no_mean_are_refused(name: str) -> None:
    loss, message = MIXED[name]
    model = Net()
    with pytest.raises((TypeError, ValueError), match=f"batch 0 of data: ModelLoss.*{message}"):
        EKFACLinearOperator(
            model, loss, list(model.parameters()), own_batches((3, 3), labels()), **EMPIRICAL
        )


def test_functions_of_a_model_are_told_apart() -> None:
    model = Net()
    for loss in (own, lambda model, batch: own(model, batch)):
        with pytest.raises(TypeError, match=r"a function of a model; .*ModelLoss\(loss_func\)"):
            EKFACLinearOperator(
                model, loss, list(model.parameters()), own_batches((3, 3), labels()), **EMPIRICAL
            )


@pytest.mark.parametrize("kind", [EmpiricalLoss, ModelLoss])
def test_bad_arguments_are_named(kind: Any) -> None:
    for arguments, options, error, message in (
        ((3,), {}, TypeError, "function is 3"),
        ((own,), {"terms": 3}, TypeError, "terms is 3"),
        ((own,), {"reduction": "none"}, ValueError, "reduction is 'none'"),
    ):
        with pytest.raises(error, match=message):
            kind(*arguments, **options)


def test_modules_of_a_loss_are_in_eval_mode() -> None:
    """And in their own mode afterwards."""
    critic = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).double()
    model = Net()
    EKFACLinearOperator(
        model,
        lambda f: critic(f).sum(1),
        list(model.parameters()),
        list(inputs().split(2)),
        fisher_type="empirical",
    )
    assert critic.training
