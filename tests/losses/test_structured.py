"""Losses of several outputs, as dictionaries, tuples and dataclasses, against dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator, EKFACPenalty, SumOfLosses
from tests.helpers.any_loss import example_gradients, gauss_newton, outer_products
from tests.helpers.crossing import crossed
from tests.helpers.exact import exact_penalty
from tests.helpers.exactness import assert_exact_diagonal, seeded
from tests.helpers.oracles import assert_close, dense_operator, parameter_shapes

N, POSITIONS = 6, 3
Kind = str


@dataclass(frozen=True)
class Outputs:
    """What a model with two heads returns."""

    word: Tensor
    size: Tensor
    note: str = "kept"


class TwoHeads(nn.Module):
    """Three class scores at every position, and two numbers for each example."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.body = nn.Linear(5, 4).double()
            self.word = nn.Linear(4, 3).double()
            self.size = nn.Linear(4, 2).double()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.body(x))
        word, size = self.word(hidden).flatten(0, 1), self.size(hidden.mean(dim=1))
        if self.kind == "tuple":
            return word, size
        if self.kind == "dict":
            return {"size": size, "unused": hidden.sum(), "word": word}
        return Outputs(word, size)


def inputs() -> Tensor:
    return seeded(N, POSITIONS, 5)


def labels() -> Tensor:
    found = torch.randint(3, (N, POSITIONS), generator=torch.Generator().manual_seed(5))
    found[0], found[2, 1] = -100, -100
    return found


def sizes() -> Tensor:
    return seeded(N, 2, seed=6)


def keys(kind: Kind) -> tuple[Any, Any]:
    return (0, 1) if kind == "tuple" else ("word", "size")


def loss_of(kind: Kind, reduction: str, second: Callable[..., nn.Module]) -> SumOfLosses:
    word, size = keys(kind)
    losses = {word: nn.CrossEntropyLoss(reduction=reduction), size: second(reduction=reduction)}
    return SumOfLosses(losses, weights={size: 0.3})


def targets(kind: Kind, part: slice) -> Any:
    word, size = labels()[part].flatten(), sizes()[part]
    if kind == "tuple":
        return word, size
    return {"word": word, "size": size} if kind == "dict" else Outputs(word, size)


def batches(kind: Kind, lengths: tuple[int, ...] = (3, 1, 2)) -> list[Any]:
    found, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        found.append((inputs()[part], targets(kind, part)))
        start += length
    return found


def joined(outputs: Any) -> Tensor:
    """Both heads as one tensor, words first."""
    return torch.cat([outputs["word"].flatten(), outputs["size"].flatten()])


def expected(reduction: str, fisher: str, second: Callable[..., nn.Module]) -> Tensor:
    """With c the factor of each head's summed loss, all over M."""
    words, numbers = float((labels() != -100).sum()), float(sizes().numel())
    factors, divisor = (1.0, 0.3), 1.0
    if reduction == "mean":
        divisor = (words + 0.3 * numbers) / 1.3
        factors = (divisor / words, 0.3 * divisor / numbers)
    word, size = nn.CrossEntropyLoss(reduction="sum"), second(reduction="sum")
    y, z = labels(), sizes()

    def loss(outputs: Any, n: int) -> Tensor:
        found = factors[0] * word(outputs["word"], y[n]) + factors[1] * size(
            outputs["size"], z[n : n + 1]
        )
        return found

    model = TwoHeads("dict")
    if fisher == "empirical":
        return outer_products(example_gradients(model, loss, inputs())) / divisor

    def of_joined(flat: Tensor, n: int) -> Tensor:
        return loss({"word": flat[:9].view(3, 3), "size": flat[9:].view(1, 2)}, n)

    return gauss_newton(model, of_joined, inputs(), joined) / divisor


def estimate(kind: Kind, loss: Any, data: Any, **options: Any) -> EKFACLinearOperator:
    model = TwoHeads(kind)
    arguments = (list(model.parameters()), data)
    return EKFACLinearOperator(model, loss, *arguments, check_deterministic=False, **options)


def dense(operator: EKFACLinearOperator) -> Tensor:
    return dense_operator(operator.blocks, operator.parameter_shapes)


SHAPES = parameter_shapes(TwoHeads("dict"), [n for n, _ in TwoHeads("dict").named_parameters()])


@crossed(
    kind=["tuple", "dict", "dataclass"], reduction=["mean", "sum"], fisher=["type2", "empirical"]
)
def test_sum_of_losses_is_exact(kind: Kind, reduction: str, fisher: str) -> None:
    """With ignored labels in one head, several positions, and other numbers of terms."""
    loss = loss_of(kind, reduction, nn.MSELoss)
    operator = estimate(kind, loss, batches(kind), fisher_type=fisher)
    assert_exact_diagonal(operator, expected(reduction, fisher, nn.MSELoss), SHAPES)


@pytest.mark.parametrize("fisher", ["type2", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_do_not_matter(reduction: str, fisher: str) -> None:
    """Also where no label of a batch counts."""
    found = [
        dense(
            estimate(
                "dict",
                loss_of("dict", reduction, nn.HuberLoss),
                batches("dict", lengths),
                fisher_type=fisher,
                memory_budget=budget,
            )
        )
        for lengths, budget in (((6,), 2**30), ((1, 2, 3), 2**30), ((1,) * 6, 1))
    ]
    assert_close(found[1], found[0], 1e-9)
    assert_close(found[2], found[0], 1e-9)


def test_sampled_labels_give_the_exact_matrix_on_average() -> None:
    loss = loss_of("dict", "mean", nn.MSELoss)
    sampled = estimate("dict", loss, batches("dict"), fisher_type="mc", mc_samples=200)
    exact = estimate("dict", loss, batches("dict"), fisher_type="type2")
    for one, other in zip(sampled.blocks, exact.blocks, strict=True):
        assert float(one.trace) == pytest.approx(float(other.trace), rel=0.1)


def test_one_head_is_its_loss() -> None:
    single, model = nn.CrossEntropyLoss(), TwoHeads("tuple")
    data = [(x, y[0]) for x, y in batches("tuple")]
    params = {n: p for n, p in model.named_parameters() if "size" not in n}
    for fisher in ("type2", "empirical"):
        found = EKFACLinearOperator(
            model, SumOfLosses({0: single}), params, batches("tuple"), fisher_type=fisher
        )
        wanted = EKFACLinearOperator(
            lambda x: model(x)[0], single, params, data, fisher_type=fisher
        )
        assert_close(dense(found), dense(wanted), 1e-9)
        assert found.provenance.num_loss_terms == float((labels() != -100).sum())


def test_it_is_the_loss_it_says() -> None:
    loss = loss_of("dataclass", "mean", nn.MSELoss)
    outputs = TwoHeads("dataclass")(inputs())
    found = loss(outputs, targets("dataclass", slice(0, N)))
    word = nn.functional.cross_entropy(outputs.word, labels().flatten())
    assert_close(found, word + 0.3 * nn.functional.mse_loss(outputs.size, sizes()))


@pytest.mark.parametrize("temperature", [3.0, "auto"])
def test_only_what_has_an_entropy_is_softened(temperature: Any) -> None:
    """The words are, as alone; the sizes are not."""
    model = TwoHeads("dict")
    with torch.no_grad():
        model.word.weight.mul_(9)
    word, size = nn.CrossEntropyLoss(), nn.MSELoss()
    both = SumOfLosses({"word": word, "size": size})
    blocks = []
    for loss, forward, data in (
        (both, None, batches("dict")),
        (word, lambda x: model(x)["word"], [(x, y["word"]) for x, y in batches("dict")]),
        (size, lambda x: model(x)["size"], [(x, y["size"]) for x, y in batches("dict")]),
    ):
        penalty = EKFACPenalty(
            1.0, temperature=temperature, damping=0.0, fisher_type="type2", weighting="uniform"
        )
        penalty.consolidate(model, loss, data, forward=forward)
        (term,) = penalty.terms
        blocks.append({b.label: b for b in term.operator.blocks})
        found = term.operator.provenance.settings["temperature"]
        assert found == 1.0 if loss is size else found > 2
    for name, alone in (("word.bias", 1), ("size.bias", 2)):
        assert_close(blocks[0][name].trace, blocks[alone][name].trace)


# --------------------------------------------------------------------------- Gaussian with variance


class Spread(nn.Module):
    """A mean, and a variance for each of its elements, for all, or none."""

    def __init__(self, variances: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.body = nn.Linear(5, 4).double()
            self.mean = nn.Linear(4, 2).double()
            self.variance = nn.Linear(4, max(1, variances)).double()
        self.variances = variances

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.body(x))
        if not self.variances:
            return self.mean(hidden)
        return self.mean(hidden), nn.functional.softplus(self.variance(hidden)) + 0.1


def gaussian_data(variances: int, lengths: tuple[int, ...] = (3, 1, 2)) -> list[Any]:
    x, y, v = seeded(N, 5), sizes(), seeded(N, 2, seed=3).abs() + 0.1
    parts = zip(x.split(lengths), y.split(lengths), v.split(lengths), strict=True)
    return [(a, b if variances else (b, c)) for a, b, c in parts]


def gaussian_expected(variances: int, fisher: str, eps: float) -> Tensor:
    """Expectations over targets by Gauss-Hermite quadrature, exact for squares of residuals."""
    model, loss = Spread(variances), nn.GaussianNLLLoss(reduction="sum", eps=eps)
    y, v = sizes(), seeded(N, 2, seed=3).abs() + 0.1

    def value(f: Tensor, target: Tensor, n: int) -> Tensor:
        if variances:
            return loss(f[:, :2], target, f[:, 2:])
        return loss(f, target, v[n : n + 1])

    def flat(outputs: Any) -> Tensor:
        return torch.cat(outputs, dim=1) if variances else outputs

    if fisher == "empirical":
        gradients = example_gradients(
            model, lambda o, n: value(flat(o), y[n : n + 1], n), seeded(N, 5)
        )
        return outer_products(gradients) / (2 * N)
    total = torch.zeros(())
    for signs in ((a, b) for a in (-1, 1) for b in (-1, 1)):

        def at_node(f: Tensor, n: int, signs: tuple[int, int] = signs) -> Tensor:
            spread = f[:, 2:] if variances else v[n : n + 1]
            noise = spread.clamp_min(eps).sqrt() * torch.tensor(signs, dtype=f.dtype)
            return value(f, (f[:, :2] + noise).detach(), n)

        # Two nodes at one deviation are exact up to cubes.
        total = total + gauss_newton(model, at_node, seeded(N, 5), flat) / 4
    return total / (2 * N)


@crossed(variances=[0, 1, 2], fisher=["type2", "empirical"], eps=[1e-6, 0.8])
def test_gaussian_is_exact(variances: int, fisher: str, eps: float) -> None:
    """Also where the least variance counts instead."""
    model, loss = Spread(variances), nn.GaussianNLLLoss(eps=eps)
    names = [name for name, _ in model.named_parameters() if variances or "variance" not in name]
    params = {name: model.get_parameter(name) for name in names}
    operator = EKFACLinearOperator(
        model, loss, params, gaussian_data(variances), fisher_type=fisher
    )
    matrix = gaussian_expected(variances, fisher, eps)
    assert_exact_diagonal(
        operator,
        matrix[: (n := 24 + 10), :n] if not variances else matrix,
        parameter_shapes(model, names),
    )


def test_gaussian_can_be_sampled_without_targets() -> None:
    model = Spread(1)
    arguments = (model, nn.GaussianNLLLoss(), list(model.parameters()))
    data = [(x, None) for x, _ in gaussian_data(1)]
    sampled = EKFACLinearOperator(*arguments, data, fisher_type="mc", mc_samples=200)
    exact = EKFACLinearOperator(*arguments, gaussian_data(1), fisher_type="type2")
    for one, other in zip(sampled.blocks, exact.blocks, strict=True):
        assert float(one.trace) == pytest.approx(float(other.trace), rel=0.1)


# --------------------------------------------------------------------------- bad input


def test_what_does_not_fit_is_named() -> None:
    both = loss_of("dict", "mean", nn.MSELoss)
    with pytest.raises(ValueError, match=r"loss for 'word', but the outputs are tuple"):
        estimate("tuple", both, batches("tuple"))
    with pytest.raises(ValueError, match=r"loss for 'size', but the targets are \['word'\]"):
        estimate("dict", both, [(x, {"word": y["word"]}) for x, y in batches("dict")])
    data = [(x, {"word": y["word"], "size": y["size"].long()}) for x, y in batches("dict")]
    with pytest.raises(TypeError, match=r"batch 0 of data: output 'size' of SumOfLosses: MSELoss"):
        estimate("dict", both, data)
    data = [(x, {**y, "word": torch.full_like(y["word"], -100)}) for x, y in batches("dict")]
    with pytest.raises(ValueError, match=r"no target in the data counts for the output 'word'"):
        estimate("dict", both, data)
    mixed = SumOfLosses({0: nn.MSELoss(), 1: nn.MSELoss(reduction="sum")})
    with pytest.raises(ValueError, match=r"reductions \{0: 'mean', 1: 'sum'\}"):
        estimate("tuple", mixed, batches("tuple"))
    with pytest.raises(TypeError, match=r"SumOfLosses.*fisher_type='empirical'"):
        estimate("tuple", SumOfLosses({0: nn.MSELoss(), 1: nn.L1Loss()}), batches("tuple"))
    with pytest.raises(TypeError, match=r"expected a tuple \(mean, variance\)"):
        estimate("dict", nn.GaussianNLLLoss(), batches("dict"))
    model = Spread(0)
    data = [(x, y) for x, (y, _) in gaussian_data(0)]
    with pytest.raises(TypeError, match=r"no variances among the outputs"):
        EKFACLinearOperator(model, nn.GaussianNLLLoss(), list(model.parameters()), data)


@pytest.mark.parametrize(
    ("losses", "weights", "error"),
    [
        ({}, None, ValueError),
        ({"a": nn.MSELoss()}, {"b": 1.0}, ValueError),
        ({"a": nn.MSELoss()}, {"a": -1.0}, ValueError),
        ({"a": 3}, None, TypeError),
        ([nn.MSELoss()], None, TypeError),
    ],
)
def test_bad_sums_are_refused(losses: Any, weights: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"losses|weights"):
        SumOfLosses(losses, weights)


def test_a_penalty_protects_all_heads() -> None:
    model = TwoHeads("dataclass")
    penalty = exact_penalty()
    penalty.consolidate(model, loss_of("dataclass", "mean", nn.MSELoss), batches("dataclass"))
    with torch.no_grad():
        model.size.bias.add_(1)
    size_moved = float(penalty(model).detach())
    with torch.no_grad():
        model.size.bias.sub_(1)
        model.word.bias.add_(torch.tensor([1.0, 0, 0]).double())
    assert size_moved > 0
    assert float(penalty(model).detach()) > 0


class Recurrent(TwoHeads):
    """The same after a layer that has no rule."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.body = nn.LSTM(5, 4, batch_first=True).double()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Any:
        """Return both heads."""
        hidden = self.body(x)[0]
        word, size = self.word(hidden).flatten(0, 1), self.size(hidden.mean(dim=1))
        return {"word": word, "size": size}


@pytest.mark.parametrize("fisher", ["type2", "empirical"])
def test_layers_without_a_rule_have_exact_diagonals(fisher: str) -> None:
    """One example after another, whose outputs are packed as the batch's are."""
    model, loss = Recurrent("dict"), loss_of("dict", "sum", nn.MSELoss)
    with pytest.warns(UserWarning, match="exact diagonal"):
        operator = EKFACLinearOperator(
            model,
            loss,
            list(model.parameters()),
            batches("dict"),
            fisher_type=fisher,
            unsupported="diagonal",
        )
    y, z = labels(), sizes()

    def joint(outputs: Any, n: int) -> Tensor:
        word = nn.functional.cross_entropy(outputs["word"], y[n], reduction="sum")
        return word + 0.3 * (outputs["size"] - z[n : n + 1]).square().sum()

    def of_joined(flat: Tensor, n: int) -> Tensor:
        return joint({"word": flat[:9].view(3, 3), "size": flat[9:].view(1, 2)}, n)

    if fisher == "empirical":
        matrix = outer_products(example_gradients(model, joint, inputs()))
    else:
        matrix = gauss_newton(model, of_joined, inputs(), joined)
    diagonal, start = matrix.diagonal(), 0
    blocks = {block.label: block for block in operator.blocks}
    for name, parameter in model.named_parameters():
        if name.startswith("body"):
            own = diagonal[start : start + parameter.numel()]
            assert_close(blocks[name].eigenvalues.flatten(), own, 1e-9)
        start += parameter.numel()
