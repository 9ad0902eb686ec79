"""Losses with options, and losses of one's own, against Hessians of the loss itself."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from rotate_ewc import EKFACLinearOperator, FisherType, Likelihood, register_likelihood
from tests.helpers.cases import BY_NAME, LOSSES, PLAIN_LOSSES
from tests.helpers.cases.basic import FEATURES_LAST
from tests.helpers.cases.losses import ELEMENT_LOSSES
from tests.helpers.crossing import crossed
from tests.helpers.exactness import (
    EXACT_FISHERS,
    FISHER_TYPES,
    Setting,
    assert_exact_diagonal,
    estimated,
    exact_matrix_of,
)
from tests.helpers.oracles import Fisher, assert_close, dense_fisher, loss_mass, parameter_shapes

OPTIONS = [loss for loss in LOSSES if loss not in PLAIN_LOSSES]
REDUCTIONS = ("mean", "sum")


def settings() -> list[Setting]:
    """Cross losses with the forms of outputs they take: classes first, or features last.

    Every loss meets every form, and every pair of reduction and Fisher type, in turn.
    """
    pairs = list(product(REDUCTIONS, EXACT_FISHERS))
    forms = [
        "tanh-mlp",
        "sequence-outputs",
        "conv2d-sequence-outputs",
        "flattened-sequence-outputs",
    ]
    found = [
        Setting(BY_NAME[name], loss, reduction, fisher, joint=fisher == "empirical")
        for n, loss in enumerate(OPTIONS)
        for name, (reduction, fisher) in zip(forms, pairs[n % 4 :] + pairs[: n % 4], strict=True)
    ]
    found += [
        Setting(FEATURES_LAST, loss, reduction, EXACT_FISHERS[(n + m) % 2])
        for n, loss in enumerate(("mse", "bce", *ELEMENT_LOSSES))
        for m, reduction in enumerate(REDUCTIONS)
    ]
    found += [
        Setting(BY_NAME[name], loss, "mean", EXACT_FISHERS[(n + m) % 2])
        for n, loss in enumerate(("ce-weight-smooth-ignore", "ce-soft-weight", "bce-both-weights"))
        for m, name in enumerate(
            ("gpt-functional-positions", "conv-transpose2d-pixel-outputs", "lstm")
        )
    ]
    return found


@pytest.mark.parametrize("setting", settings(), ids=str)
def test_eigenvalues_are_the_diagonal_in_the_own_basis(setting: Setting) -> None:
    """``eigenvalues == diag(Q^T B Q)``, and the trace, for every loss and form of outputs."""
    assert_exact_diagonal(estimated(setting), exact_matrix_of(setting), setting.shapes())


CASE_NAMES = ("tanh-mlp", "sequence-outputs")
SOME = [  # every loss meets one form of outputs and one Fisher type, in turn
    Setting(BY_NAME[CASE_NAMES[n % 2]], loss, fisher=EXACT_FISHERS[n // 2 % 2])
    for n, loss in enumerate(OPTIONS)
]


@pytest.mark.parametrize("setting", SOME, ids=str)
def test_batches_and_order_do_not_matter(setting: Setting) -> None:
    """Also where all labels of some batch are ignored: of the first one, of two, of the last."""
    expected = setting.dense(estimated(setting))
    n = setting.case.examples
    for sizes, order in (
        ([1] * n, [*range(n)]),
        ([2, n - 2], [0, 3, *(i for i in range(n) if i not in (0, 3))]),
        ([n - 2, 2], [*(i for i in range(n) if i not in (0, 3)), 3, 0]),
    ):
        data = setting.case.data(setting.loss, sizes, order)
        assert_close(setting.dense(setting.estimate(data=data)), expected, 1e-9)


@pytest.mark.parametrize("setting", SOME, ids=str)
def test_memory_budget_does_not_matter(setting: Setting) -> None:
    """Two passes in small chunks are one pass."""
    actual = setting.dense(setting.estimate(memory_budget=1))
    assert_close(actual, setting.dense(estimated(setting)), 1e-9)


@pytest.mark.parametrize(
    ("name", "fisher", "loss"),
    [(CASE_NAMES[n % 2], tuple(FISHER_TYPES)[n % 3], loss) for n, loss in enumerate(LOSSES)],
)
def test_sum_is_mean_times_what_mean_divides_by(name: str, fisher: str, loss: str) -> None:
    """The two reductions differ by what the loss itself divides by."""
    setting = Setting(BY_NAME[name], loss)
    outputs = setting.case.model().eval()(setting.case.inputs()).detach()
    mass = loss_mass(setting.loss_func(), outputs, setting.case.targets(loss))
    summed, mean = (
        setting.dense(replace(setting, reduction=r).estimate(fisher_type=FISHER_TYPES[fisher]))
        for r in ("sum", "mean")
    )
    assert_close(summed, mass * mean, 1e-9)


@pytest.mark.parametrize("loss", OPTIONS[::2])
def test_monte_carlo_expectation(loss: str) -> None:
    """With many samples trace and eigenvalues come near the exact matrix's."""
    setting = Setting(BY_NAME["tanh-mlp"], loss)
    data = setting.case.data(loss, [setting.case.examples])  # one batch, to be drawn for at once
    operator = setting.estimate(fisher_type=FisherType.MC, mc_samples=200, data=data)
    exact = float(exact_matrix_of(setting).trace())
    assert float(operator.trace) == pytest.approx(exact, rel=0.05)
    for sampled, block in zip(operator.blocks, estimated(setting).blocks, strict=True):
        assert float(sampled.trace) == pytest.approx(float(block.trace), rel=0.1)


@pytest.mark.parametrize("setting", SOME[1::2], ids=str)
def test_monte_carlo_draws_are_reproducible(setting: Setting) -> None:
    """The same in both passes and again; another seed gives others."""
    options = {"fisher_type": FisherType.MC, "mc_samples": 2}
    first = setting.dense(setting.estimate(**options, memory_budget=1))
    second = setting.dense(setting.estimate(**options))
    other = setting.dense(setting.estimate(**options, seed=1))
    assert_close(first, second, 1e-9)
    assert (first - other).norm() > 1e-3 * first.norm()


# --------------------------------------------------------------------------- what counts nothing


@pytest.mark.parametrize("fisher", EXACT_FISHERS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_examples_are_as_good_as_absent(reduction: str, fisher: Fisher) -> None:
    """Leaving an entirely ignored example out changes nothing."""
    setting = Setting(BY_NAME["sequence-outputs"], "ce-weight-ignore", reduction, fisher)
    kept = [i for i in range(setting.case.examples) if i not in (0, 3)]
    data = setting.case.data(setting.loss, [1, len(kept) - 1, 2], [*kept, 0, 3])[:2]
    assert len(data) == 2
    # Not the whole matrix: the inputs of ignored examples still have their part in the bases.
    some = setting.estimate(data=data)
    for block, whole in zip(some.blocks, estimated(setting).blocks, strict=True):
        assert_close(block.trace, whole.trace)


@pytest.mark.parametrize("fisher", FISHER_TYPES)
@pytest.mark.parametrize("name", ["tanh-mlp", "sequence-outputs"])
def test_nothing_but_ignored_labels(name: str, fisher: str) -> None:
    """A mean over nothing has no matrix, a sum over nothing is zero."""
    mean = Setting(BY_NAME[name], "ce-ignore")
    data = [(x, torch.full_like(y, -100)) for x, y in mean.case.data("ce-ignore")]
    with pytest.raises(ValueError, match="ignore"):
        mean.estimate(data=data, fisher_type=FISHER_TYPES[fisher])
    summed = replace(mean, reduction="sum")
    with pytest.warns(RuntimeWarning, match="has vanished.*no label counts"):
        operator = summed.estimate(data=data, fisher_type=FISHER_TYPES[fisher])
    assert all((block.eigenvalues == 0).all() for block in operator.blocks)


def test_weight_of_zero_is_as_good_as_ignoring() -> None:
    """A class without weight is one whose labels are ignored."""
    case = BY_NAME["sequence-outputs"]
    weight = torch.tensor([0.0, 1.0, 1.0]).double()
    dense = []
    for loss in (nn.CrossEntropyLoss(weight=weight), nn.CrossEntropyLoss(ignore_index=0)):
        model = case.model()
        params = list(model.parameters())
        operator = EKFACLinearOperator(
            model, loss, params, case.data("ce"), fisher_type=FisherType.TYPE2
        )
        dense.append(Setting(case).dense(operator))
    assert_close(dense[0], dense[1], 1e-9)


BAD: dict[str, nn.Module] = {
    "negative-class-weight": nn.CrossEntropyLoss(weight=torch.tensor([1.0, -1.0, 1.0]).double()),
    "nan-class-weight": nn.CrossEntropyLoss(weight=torch.tensor([1.0, torch.nan, 1]).double()),
    "too-few-class-weights": nn.CrossEntropyLoss(weight=torch.ones(2).double()),
    "no-reduction": nn.CrossEntropyLoss(reduction="none"),
}


@pytest.mark.parametrize("bad", BAD)
def test_losses_without_a_matrix_are_refused(bad: str) -> None:
    """Before any number comes out."""
    case = BY_NAME["tanh-mlp"]
    model = case.model()
    with pytest.raises(ValueError, match="CrossEntropyLoss"):
        EKFACLinearOperator(model, BAD[bad], list(model.parameters()), case.data("ce"))


@pytest.mark.parametrize("option", ["weight", "pos_weight"])
def test_negative_element_weights_are_refused(option: str) -> None:
    """A negative weight may make the Hessian indefinite."""
    case = BY_NAME["tanh-mlp"]
    model = case.model()
    options: dict[str, Any] = {option: torch.tensor([1.0, -0.5, 1.0]).double()}
    loss = nn.BCEWithLogitsLoss(**options)
    with pytest.raises(ValueError, match=option):
        EKFACLinearOperator(model, loss, list(model.parameters()), case.data("bce"))


@pytest.mark.parametrize(
    ("function", "loss"),
    [
        (F.cross_entropy, "ce"),
        (F.mse_loss, "mse"),
        (F.binary_cross_entropy_with_logits, "bce"),
    ],
)
def test_functions_are_their_modules(function: Any, loss: str) -> None:
    """A loss function with default arguments is the module with default arguments."""
    setting = Setting(BY_NAME["tanh-mlp"], loss)
    model = setting.case.model()
    operator = EKFACLinearOperator(
        model,
        function,
        list(model.parameters()),
        setting.case.data(loss),
        fisher_type=FisherType.TYPE2,
    )
    assert_close(setting.dense(operator), setting.dense(estimated(setting)), 1e-9)


# --------------------------------------------------------------------------- losses of one's own


class OwnPoisson(nn.PoissonNLLLoss):
    """Counts with outputs ``log rate``."""


class PoissonLikelihood(Likelihood):
    """The Hessian is the rate; a row of outputs has one term for each element."""

    def exact_vectors(
        self, outputs: Tensor, targets: Tensor, num_examples: int
    ) -> Iterator[Tensor]:
        """Yield the root of the rate, element by element of an example."""
        roots = outputs.div(2).exp().reshape(num_examples, -1)
        for element in range(roots.shape[1]):
            vector = torch.zeros_like(roots)
            vector[:, element] = roots[:, element]
            yield vector.view_as(outputs)

    def sampled_vector(self, outputs: Tensor, targets: Tensor, generator: Generator) -> Tensor:
        """Return the gradient for drawn counts."""
        return outputs.exp() - torch.poisson(outputs.exp(), generator=generator)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient for given counts."""
        return outputs.exp() - targets

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One term for each element."""
        rows = outputs.flatten(1) if outputs.ndim > 1 else outputs[:, None]
        return torch.full_like(rows[:, 0], rows.shape[1])


class Cooled(nn.CrossEntropyLoss):
    """Cross entropy of outputs at another temperature, weighted by the label given."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Divide the outputs by the temperature."""
        return super().forward(input / 2, target)


class CooledLikelihood(Likelihood):
    """Rows are single predictions, weighted by their labels, with which `mean` divides."""

    weights = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)

    def exact_vectors(
        self, outputs: Tensor, targets: Tensor, num_examples: int
    ) -> Iterator[Tensor]:
        """Yield one vector for each class."""
        p = (outputs / 2).softmax(dim=1)
        roots = self.weights[targets].sqrt()[:, None]
        for c in range(outputs.shape[1]):
            one_hot = F.one_hot(torch.tensor(c), outputs.shape[1])
            yield roots * p[:, c : c + 1].sqrt() * (one_hot - p) / 2

    def sampled_vector(self, outputs: Tensor, targets: Tensor, generator: Generator) -> Tensor:
        """Return the gradient for drawn classes."""
        p = (outputs / 2).softmax(dim=1)
        drawn = torch.multinomial(p, 1, generator=generator)[:, 0]
        return self.weights[targets].sqrt()[:, None] * (p - F.one_hot(drawn, p.shape[1])) / 2

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient for given classes."""
        p = (outputs / 2).softmax(dim=1)
        return self.weights[targets][:, None] * (p - F.one_hot(targets, p.shape[1])) / 2

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the weights of the labels."""
        return self.weights[targets]


@pytest.fixture(autouse=True, scope="module")
def _own_losses() -> None:
    register_likelihood(OwnPoisson, lambda loss: PoissonLikelihood("OwnPoisson", loss.reduction))
    register_likelihood(Cooled, lambda loss: CooledLikelihood("Cooled", loss.reduction))


def own_problem(kind: str, reduction: str) -> tuple[Setting, nn.Module, Tensor]:
    """Return a setting, a loss, and all targets."""
    if kind == "cooled":
        setting = Setting(BY_NAME["tanh-mlp"], "ce")
        loss: nn.Module = Cooled(weight=CooledLikelihood.weights, reduction=reduction)
        return setting, loss, setting.case.targets("ce")
    setting = Setting(FEATURES_LAST if kind == "rows" else BY_NAME["tanh-mlp"], "mse")
    counts = setting.case.targets("mse").abs().mul(2).round()
    return setting, OwnPoisson(reduction=reduction), counts


OWN = ("poisson", "rows", "cooled")


@crossed(kind=OWN, reduction=REDUCTIONS, fisher=EXACT_FISHERS)
def test_own_losses_are_exact(kind: str, reduction: str, fisher: Fisher) -> None:
    """A likelihood that is registered gives the matrix of its loss."""
    setting, loss, y = own_problem(kind, reduction)
    case, model = setting.case, setting.case.model()
    x, names = case.inputs(), case.names(model)
    batches = zip(torch.split(x, case.batch_sizes), torch.split(y, case.batch_sizes), strict=True)
    operator = EKFACLinearOperator(
        model, loss, list(model.parameters()), list(batches), fisher_type=FISHER_TYPES[fisher]
    )
    dense = dense_fisher(model, loss, names, x, y, fisher)
    assert_exact_diagonal(operator, dense, parameter_shapes(model, names))


@pytest.mark.parametrize("kind", OWN)
def test_own_losses_can_be_sampled(kind: str) -> None:
    """On average the sampled labels give the exact matrix."""
    setting, loss, y = own_problem(kind, "mean")
    model = setting.case.model()
    traces = [
        float(
            EKFACLinearOperator(
                model,
                loss,
                list(model.parameters()),
                [(setting.case.inputs(), y)],
                fisher_type=kind_of_fisher,
                mc_samples=samples,
            ).trace
        )
        for kind_of_fisher, samples in ((FisherType.MC, 400), (FisherType.TYPE2, 1))
    ]
    assert traces[0] == pytest.approx(traces[1], rel=0.05)


def test_own_loss_function() -> None:
    """A function is registered like a class."""

    def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets) / 2

    class Half(PoissonLikelihood):
        def exact_vectors(
            self, outputs: Tensor, targets: Tensor, num_examples: int
        ) -> Iterator[Tensor]:
            for element in range(outputs.shape[1]):
                vector = torch.zeros_like(outputs)
                vector[:, element] = 1
                yield vector

    setting = Setting(BY_NAME["tanh-mlp"], "mse")
    model = setting.case.model()
    arguments = (list(model.parameters()), setting.case.data("mse"))
    with pytest.raises(TypeError, match="register_likelihood"):
        EKFACLinearOperator(model, half_squared_error, *arguments)
    register_likelihood(half_squared_error, lambda _: Half("half", "mean"))
    operator = EKFACLinearOperator(
        model, half_squared_error, *arguments, fisher_type=FisherType.TYPE2
    )
    expected = 0.5 * setting.dense(estimated(setting))
    assert_close(setting.dense(operator), expected, 1e-9)


def test_a_subclass_is_another_loss() -> None:
    """What a subclass computes is unknown until it is registered."""

    class Sharpened(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(3 * input, target)

    case = BY_NAME["tanh-mlp"]
    model = case.model()
    with pytest.raises(TypeError, match="Sharpened"):
        EKFACLinearOperator(model, Sharpened(), list(model.parameters()), case.data("ce"))
