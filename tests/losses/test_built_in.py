"""Further losses that are built in, with their options, against Hessians written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotate_ewc import EKFACLinearOperator
from rotate_ewc.losses import likelihood_of
from tests.helpers.any_loss import example_gradients, gauss_newton, outer_products
from tests.helpers.cases import BY_NAME
from tests.helpers.crossing import crossed
from tests.helpers.exactness import assert_exact_diagonal, seeded
from tests.helpers.oracles import assert_close, dense_ggn, dense_operator, parameter_shapes

N, CLASSES, POSITIONS = 6, 3, 4
Make = Callable[[str], nn.Module]


class Net(nn.Module):
    """Outputs `[N, 3]`, or `[N, 3, 4]`, through an activation of the outputs."""

    def __init__(self, last: Callable[[Tensor], Tensor], positions: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.first = nn.Linear(5, 4).double()
            self.second = nn.Linear(4, CLASSES).double()
        self.last, self.positions = last, positions

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.second(torch.tanh(self.first(x)))
        return self.last(outputs.transpose(1, 2) if self.positions else outputs)


def inputs(positions: bool) -> Tensor:
    return seeded(N, POSITIONS, 5) if positions else seeded(N, 5)


def labels(positions: bool, ignored: int = -100) -> Tensor:
    shape = (N, POSITIONS) if positions else (N,)
    found = torch.randint(CLASSES, shape, generator=torch.Generator().manual_seed(5))
    found[1] = ignored
    return found


def element_shape(positions: bool) -> tuple[int, ...]:
    return (N, CLASSES, POSITIONS) if positions else (N, CLASSES)


def counts(positions: bool) -> Tensor:
    return seeded(*element_shape(positions), seed=6).abs().mul(2).round()


def binary(positions: bool) -> Tensor:
    return (seeded(*element_shape(positions), seed=7) > 0).double()


def real(positions: bool) -> Tensor:
    return seeded(*element_shape(positions), seed=8)


def identity(outputs: Tensor) -> Tensor:
    return outputs


def log_softmax(outputs: Tensor) -> Tensor:
    return outputs.log_softmax(1)


WEIGHTS = torch.linspace(0.3, 2.1, CLASSES).double()


class Spec:
    """A loss: how it is made, its targets, the last activation, and a twin before that."""

    def __init__(
        self,
        make: Make,
        targets: Callable[[bool], Tensor],
        last: Callable[[Tensor], Tensor] = identity,
        twin: Make | None = None,
        divisor: Callable[[Tensor], float] = lambda y: float(y.numel()),
    ) -> None:
        self.make, self.targets, self.last = make, targets, last
        self.twin, self.divisor = twin or make, divisor


def labels_that_count(weights: Tensor | None, ignored: int = -100) -> Callable[[Tensor], float]:
    def count(y: Tensor) -> float:
        kept = y[y != ignored]
        return float(len(kept) if weights is None else weights[kept].sum())

    return count


SPECS: dict[str, Spec] = {
    "nll": Spec(
        lambda r: nn.NLLLoss(reduction=r),
        labels,
        log_softmax,
        lambda r: nn.CrossEntropyLoss(reduction=r),
        labels_that_count(None),
    ),
    "nll-weight-ignore": Spec(
        lambda r: nn.NLLLoss(reduction=r, weight=WEIGHTS, ignore_index=2),
        lambda positions: labels(positions, 2),
        log_softmax,
        lambda r: nn.CrossEntropyLoss(reduction=r, weight=WEIGHTS, ignore_index=2),
        labels_that_count(WEIGHTS, 2),
    ),
    "bce": Spec(
        lambda r: nn.BCELoss(reduction=r),
        binary,
        torch.sigmoid,
        lambda r: nn.BCEWithLogitsLoss(reduction=r),
    ),
    "bce-weight": Spec(
        lambda r: nn.BCELoss(reduction=r, weight=WEIGHTS[:1]),
        binary,
        torch.sigmoid,
        lambda r: nn.BCEWithLogitsLoss(reduction=r, weight=WEIGHTS[:1]),
    ),
    "poisson": Spec(lambda r: nn.PoissonNLLLoss(reduction=r), counts),
    "poisson-full": Spec(lambda r: nn.PoissonNLLLoss(reduction=r, full=True), counts),
    "huber": Spec(lambda r: nn.HuberLoss(reduction=r), real),
    "huber-delta": Spec(lambda r: nn.HuberLoss(reduction=r, delta=0.7), real),
    "smooth-l1": Spec(lambda r: nn.SmoothL1Loss(reduction=r), real),
    "smooth-l1-beta": Spec(lambda r: nn.SmoothL1Loss(reduction=r, beta=0.6), real),
}


def batches(x: Any, y: Any, sizes: tuple[int, ...] = (3, 1, 2)) -> list[tuple[Any, Any]]:
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def expected(spec: Spec, reduction: str, fisher: str, positions: bool) -> Tensor:
    """The matrix of the whole data set; that of a twin before the last activation for type2."""
    x, y = inputs(positions), spec.targets(positions)
    if fisher == "empirical":
        model, loss = Net(spec.last, positions), spec.make("sum")
        total = outer_products(example_gradients(model, lambda f, n: loss(f, y[n : n + 1]), x))
    else:
        twin = spec.twin("sum")
        last = identity if spec.last in (log_softmax, torch.sigmoid) else spec.last
        total = gauss_newton(Net(last, positions), lambda f, n: twin(f, y[n : n + 1]), x)
    return total / spec.divisor(y) if reduction == "mean" else total


def estimated(
    spec: Spec, reduction: str, positions: bool, data: Any = None, **options: Any
) -> tuple[EKFACLinearOperator, nn.Module]:
    model = Net(spec.last, positions)
    data = data or batches(inputs(positions), spec.targets(positions))
    loss = spec.make(reduction)
    found = EKFACLinearOperator(
        model, loss, list(model.parameters()), data, check_deterministic=False, **options
    )
    return found, model


@crossed(
    name=SPECS, reduction=["mean", "sum"], fisher=["type2", "empirical"], positions=[False, True]
)
def test_eigenvalues_are_exact(name: str, reduction: str, fisher: str, positions: bool) -> None:
    spec = SPECS[name]
    operator, model = estimated(spec, reduction, positions, fisher_type=fisher)
    names = [name for name, _ in model.named_parameters()]
    matrix = expected(spec, reduction, fisher, positions)
    assert_exact_diagonal(operator, matrix, parameter_shapes(model, names))


@pytest.mark.parametrize(
    ("name", "fisher"), list(zip(SPECS, cycle(["type2", "empirical"]), strict=False))
)
def test_batches_do_not_matter(name: str, fisher: str) -> None:
    spec = SPECS[name]
    x, y = inputs(True), spec.targets(True)
    dense = []
    for sizes in ((3, 1, 2), (6,), (1,) * 6):
        operator, _ = estimated(spec, "mean", True, batches(x, y, sizes), fisher_type=fisher)
        dense.append(dense_operator(operator.blocks, operator.parameter_shapes))
    assert_close(dense[1], dense[0], 1e-9)
    assert_close(dense[2], dense[0], 1e-9)


@pytest.mark.parametrize("name", [*SPECS, "poisson-rates"])
def test_sampled_vectors_have_the_exact_mean(name: str) -> None:
    """Mean of `v vᵀ` over many draws, entry by entry, within five standard errors."""
    spec = SPECS.get(name) or RATES
    y = spec.targets(False)[:2]
    outputs = spec.last(seeded(2, CLASSES, seed=9))
    likelihood = likelihood_of(spec.make("sum"))
    draws, generator = 4000, torch.Generator().manual_seed(0)
    vectors = likelihood.sampled_vector(
        outputs.repeat(draws, 1), y.repeat(draws, *[1] * (y.ndim - 1)), generator
    ).view(draws, 2, CLASSES)
    products = vectors[..., :, None] * vectors[..., None, :]
    exact = sum(v[..., :, None] * v[..., None, :] for v in likelihood.exact_vectors(outputs, y, 2))
    error = products.std(dim=0) / math.sqrt(draws)
    assert ((products.mean(dim=0) - exact).abs() <= 5 * error + 1e-9).all()


RATES = Spec(
    lambda r: nn.PoissonNLLLoss(reduction=r, log_input=False, eps=0.1),
    counts,
    lambda f: torch.exp(f / 2),
)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_poisson_of_rates_takes_the_expectation_over_counts(reduction: str) -> None:
    """The Hessian is linear in the counts: that at the mean counts is the mean Hessian."""
    x = inputs(False)
    model = Net(RATES.last, False)
    mean = model(x).detach()
    loss = RATES.make("sum")
    total = gauss_newton(model, lambda f, n: loss(f, mean[n : n + 1]), x)
    matrix = total / mean.numel() if reduction == "mean" else total
    operator, _ = estimated(RATES, reduction, False, fisher_type="type2")
    names = [name for name, _ in model.named_parameters()]
    assert_exact_diagonal(operator, matrix, parameter_shapes(model, names))
    empirical, _ = estimated(RATES, reduction, False, fisher_type="empirical")
    assert_exact_diagonal(
        empirical, expected(RATES, reduction, "empirical", False), parameter_shapes(model, names)
    )


@pytest.mark.parametrize("name", ["nll", "bce"])
def test_unlabelled_data_are_labelled_by_the_model(name: str) -> None:
    """Inputs alone, or with None, where the exact matrix does not depend on the labels."""
    spec = SPECS[name]
    x = inputs(False)
    y = torch.zeros(N, dtype=torch.long) if name == "nll" else binary(False)
    labelled, _ = estimated(spec, "mean", False, batches(x, y), fisher_type="type2")
    wanted = dense_operator(labelled.blocks, labelled.parameter_shapes)
    for data in (list(x.split(2)), [(part, None) for part in x.split(2)]):
        found, _ = estimated(spec, "mean", False, data, fisher_type="type2")
        assert_close(dense_operator(found.blocks, found.parameter_shapes), wanted, 1e-9)
    with pytest.raises(ValueError, match="batch 0 of data: the batch has no targets"):
        estimated(spec, "mean", False, list(x.split(2)), fisher_type="empirical")


# --------------------------------------------------------------------------- what is recognised


class Mine(nn.CrossEntropyLoss):
    """Changes nothing."""


RECOGNIZED: dict[str, tuple[Any, nn.Module]] = {
    "cross_entropy": (
        partial(F.cross_entropy, label_smoothing=0.2, ignore_index=2),
        nn.CrossEntropyLoss(label_smoothing=0.2, ignore_index=2),
    ),
    "nested": (
        partial(partial(F.huber_loss, delta=0.5), reduction="sum"),
        nn.HuberLoss(delta=0.5, reduction="sum"),
    ),
    "nll_loss": (F.nll_loss, nn.NLLLoss()),
    "binary_cross_entropy": (F.binary_cross_entropy, nn.BCELoss()),
    "smooth_l1": (partial(F.smooth_l1_loss, beta=0.3), nn.SmoothL1Loss(beta=0.3)),
    "poisson": (
        partial(F.poisson_nll_loss, log_input=False, eps=1e-3),
        nn.PoissonNLLLoss(log_input=False, eps=1e-3),
    ),
    "gaussian": (partial(F.gaussian_nll_loss, eps=1e-3), nn.GaussianNLLLoss(eps=1e-3)),
    "subclass": (Mine(ignore_index=1), nn.CrossEntropyLoss(ignore_index=1)),
}


@pytest.mark.parametrize("name", RECOGNIZED)
def test_functions_partials_and_subclasses_are_recognized(name: str) -> None:
    given, module = RECOGNIZED[name]
    found, wanted = likelihood_of(given), likelihood_of(module)
    assert type(found) is type(wanted)
    ours, theirs = vars(found).copy(), vars(wanted).copy()
    for values in (ours, theirs):
        values.pop("last", None)
    assert ours == theirs


def test_options_that_there_are_not_are_named() -> None:
    with pytest.raises(TypeError, match=r"partial\(mse_loss.*\['beta'\].*torch.nn.MSELoss"):
        likelihood_of(partial(F.mse_loss, beta=1.0))


def test_what_changes_the_loss_is_another_loss() -> None:
    loss = nn.MSELoss()
    loss.forward = lambda f, y: (f - y).abs().mean()  # type: ignore[method-assign]
    for changed in (loss, nn.L1Loss(), partial(F.mse_loss, torch.zeros(1)), [F.mse_loss].pop):
        with pytest.raises(TypeError, match=r"Pass fisher_type='empirical'.*register_likelihood"):
            likelihood_of(changed)
    with pytest.raises(TypeError, match="loss_func is int 3; expected a loss"):
        likelihood_of(3)  # type: ignore[arg-type]


BAD: dict[str, tuple[str, Any, Any, str]] = {
    "logits": ("nll", identity, None, "log_softmax.*CrossEntropyLoss"),
    "no-probabilities": ("bce", identity, None, "from 0 to 1.*BCEWithLogitsLoss"),
    "soft-targets": ("nll", log_softmax, binary(False), "targets have dtype torch.float64"),
    "labels": ("poisson", identity, labels(False), "floating-point"),
}


@pytest.mark.parametrize("name", BAD)
def test_outputs_and_targets_that_do_not_fit_are_refused(name: str) -> None:
    loss, last, targets, message = BAD[name]
    spec = SPECS[loss]
    model = Net(last, False)
    data = [(inputs(False), spec.targets(False) if targets is None else targets)]
    with pytest.raises((TypeError, ValueError), match=f"batch 0 of data: .*{message}"):
        EKFACLinearOperator(model, spec.make("mean"), list(model.parameters()), data)


def test_absolute_error_has_no_curvature() -> None:
    spec = Spec(lambda r: nn.SmoothL1Loss(reduction=r, beta=0.0), real)
    for fisher in ("type2", "mc"):
        with pytest.raises(ValueError, match=r"beta=0.*fisher_type='empirical'"):
            estimated(spec, "mean", False, fisher_type=fisher)
    operator, model = estimated(spec, "mean", False, fisher_type="empirical")
    names = [name for name, _ in model.named_parameters()]
    matrix = expected(spec, "mean", "empirical", False)
    assert_exact_diagonal(operator, matrix, parameter_shapes(model, names))


def test_helpers_know_the_usual_losses() -> None:
    """The dense matrix of this file is that of the older oracle."""
    case = BY_NAME["tanh-mlp"]
    model, x, y = case.model(), case.inputs(), case.targets("ce")
    loss = nn.CrossEntropyLoss(reduction="sum")
    found = gauss_newton(model, lambda f, n: loss(f, y[n : n + 1]), x)
    assert_close(found, dense_ggn(model, loss, case.names(model), x, y))
