"""Many processes estimate what one does with all of their data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator, EKFACPenalty, SumOfLosses
from rotate_ewc.estimation import rounds
from rotate_ewc.estimation.factors import decompose
from rotate_ewc.linalg import leading
from rotate_ewc.linalg.outer_products import OuterProducts
from rotate_ewc.linalg.truncation import Truncation
from tests.helpers.cases import BY_NAME, Case
from tests.helpers.penalties import Batches
from tests.helpers.processes import distributed_test, gather, here

# Convolutions, embeddings, tied weights, norms, attention, and parameters without a rule.
NAMES = (
    "tanh-mlp",
    "conv2d-stride-groups",
    "conv1d-groups-reflect",
    "embedding-pooled",
    "embedding-tied-token-outputs",
    "tied-weights",
    "batch-norm-and-dropout",
    "layer-norm-token-outputs",
    "attention-batch-first",
    "learned-positions",
    "weight-norm",
    "low-rank",
    "wide-few-positions",
    "lstm",
    "subset-of-parameters",
)
TOLERANCE = 1e-12


def estimate(case: Case, data: Batches, group: Any, **options: Any) -> EKFACLinearOperator:
    model = here(case.model())
    parameters = dict(model.named_parameters())
    with pytest.warns() if case.unsupported != "error" else _nothing():
        return EKFACLinearOperator(
            model,
            case.loss_func("ce"),
            [parameters[name] for name in case.names(model)],
            here(data),
            group=group,
            unsupported=case.unsupported,
            **{"check_deterministic": False, **options},
        )


class _nothing:  # noqa: N801
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def shard(case: Case, split: str) -> Batches:
    """This process's part of a case's examples, in batches."""
    rank, size = dist.get_rank(), dist.get_world_size()
    n = case.examples
    own: Sequence[int] = range(rank, n, size)
    if split == "uneven":
        own = [i for i in range(n) if min(i, size - 1) == rank]
    if split == "one has all":
        own = range(n) if rank == size - 1 else ()
    batches = case.data("ce", [1] * n)
    chosen = [batches[i] for i in own]
    if split == "strided" and chosen:  # in one batch, and elsewhere in many
        return [(torch.cat([x for x, _ in chosen]), torch.cat([y for _, y in chosen]))]
    return chosen


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def assert_same_bits(operator: EKFACLinearOperator) -> None:
    """All processes hold the same tensors, in the same layouts, and say the same of them."""
    tensors = [t for block in operator.blocks for t in block.tensors.values()]
    own = [(t.cpu().contiguous(), t.stride()) for t in tensors]
    (first, provenance), *others = gather((own, operator.provenance))
    for other, told in others:
        assert told == provenance
        for (one, strides), (two, theirs) in zip(first, other, strict=True):
            assert torch.equal(one, two)
            assert strides == theirs


def assert_union(case: Case, split: str, **options: Any) -> None:
    together = estimate(case, shard(case, split), "auto", **options)
    assert_same_bits(together)
    if dist.get_rank() == 0:
        alone = estimate(case, case.data("ce"), None, **options)
        label = f"{case.name}, {split}, {options}"
        assert relative(together.to_dense(), alone.to_dense()) < TOLERANCE, label
        assert together.provenance == alone.provenance, label


@distributed_test((1, 3))
def test_layers() -> None:
    for name in NAMES[:3]:
        assert_union(BY_NAME[name], "strided", fisher_type="type2")


@distributed_test((2,))
def test_every_kind_of_layer() -> None:
    for name in NAMES[3:]:
        assert_union(BY_NAME[name], "strided", fisher_type="type2")


@distributed_test((3,))
def test_any_split() -> None:
    for name in ("tanh-mlp", "tied-weights"):
        for split in ("uneven", "one has all"):
            assert_union(BY_NAME[name], split, fisher_type="type2")
            assert_union(BY_NAME[name], split, fisher_type="empirical", memory_budget=1)


@distributed_test((2,))
def test_joint_blocks_reduced_factors_and_sampled_labels() -> None:
    # Of few examples, reduced factors leave a part of the basis open where positions are shared.
    assert_union(BY_NAME["tanh-mlp"], "strided", fisher_type="type2", kfac_approx="reduce")
    for name in ("tanh-mlp", "conv2d-stride-groups"):
        case = BY_NAME[name]
        assert_union(case, "strided", fisher_type="type2", separate_weight_and_bias=False)
        assert_union(case, "strided", fisher_type="mc", mc_samples=2, check_deterministic=True)
        assert_union(case, "strided", fisher_type="mc", memory_budget=1)


class _TwoOrders(nn.Module):
    """Layers that data use in the one order or in the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(5, 4).double(), nn.Linear(5, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        layers = [self.one, self.other] if bool(x[0, 0] > 0) else [self.other, self.one]
        first, second = (torch.tanh(layer(x)) for layer in layers)
        return first * 2.0 + second * 2.0


@distributed_test((3,))
def test_the_same_rounds_whatever_comes_first() -> None:
    """Of two ranks each has room for another layer first; the third has no data."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    x[:, 0] = torch.tensor([1.0] * 4 + [-1.0] * 4)
    y = torch.arange(8) % 4
    parts = list(zip(x.split(4), y.split(4), strict=True))

    def estimated(batches: Batches, group: Any, budget: int) -> EKFACLinearOperator:
        options = {"fisher_type": "type2", "check_deterministic": False, "memory_budget": budget}
        parameters = list(model.parameters())
        loss, shown = nn.CrossEntropyLoss(), here(batches)
        return EKFACLinearOperator(model, loss, parameters, shown, group=group, **options)

    model, decomposed = here(_TwoOrders()), []

    def noted(factors: Any, *others: Any) -> Any:
        decomposed.append({key.label for key in factors})
        return decompose(factors, *others)

    with mock.patch.object(rounds, "decompose", noted):
        together = estimated(parts[dist.get_rank() :][:1], "auto", 1)
    # There is nothing that both have room for; then what the first had, and then the rest.
    layers = [{f"{name}.weight", f"{name}.bias"} for name in ("one", "other")]
    assert decomposed == [set(), *layers]
    assert_same_bits(together)
    alone = estimated(parts, None, 2**30)
    assert relative(together.to_dense(), alone.to_dense()) < TOLERANCE


@distributed_test((2,))
def test_bases_kept_in_fewer_bits() -> None:
    """Every process has the same ones, of the sum of all factors, also after a merge."""
    case = BY_NAME["tanh-mlp"]
    options = {"fisher_type": "type2", "damping": 0.0}
    penalties = []
    for group, dtype in (("auto", torch.bfloat16), (None, None)):
        model = here(case.model())
        penalty = EKFACPenalty(1.0, storage_dtype=dtype, **options)
        for _ in range(2):
            data = shard(case, "uneven") if group else case.data("ce")
            penalty.consolidate(model, case.loss_func("ce"), here(data), group=group)
        penalties.append(penalty)
    together, alone = (penalty.terms[0].operator for penalty in penalties)
    assert_same_bits(together)
    assert {block.storage_dtype for block in together.blocks} == {torch.bfloat16}
    assert relative(together.to_dense(), alone.to_dense()) < 0.02
    torch.testing.assert_close(together.trace, alone.trace, rtol=1e-10, atol=0.0)


class Heads(nn.Module):
    """Two heads, of which each example uses one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        head = self.first if x[0, 0] > 0 else self.second
        outputs: Tensor = head(torch.tanh(self.body(x)))
        return outputs


@distributed_test((3,))
def test_parameters_that_some_processes_do_not_use() -> None:
    """One head's data are all on one process, and a bias follows its weight on one only."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    x[:, 0] = torch.tensor([1.0, 1, 1, -1, -1, -1])
    batches = [(x[i : i + 1], torch.tensor([i % 3])) for i in range(6)]
    own = batches[:3] if dist.get_rank() == 0 else batches[3:] if dist.get_rank() == 1 else []
    operators = []
    for data, group in ((own, "auto"), (batches, None)):
        model = here(Heads())
        parameters = dict(model.named_parameters())
        operators.append(
            EKFACLinearOperator(
                model,
                nn.CrossEntropyLoss(),
                parameters,
                here(data),
                group=group,
                fisher_type="type2",
            )
        )
    assert relative(operators[0].to_dense(), operators[1].to_dense()) < TOLERANCE
    assert operators[0].provenance == operators[1].provenance
    assert_same_bits(operators[0])


@distributed_test((2,))
def test_token_losses_with_ignored_labels() -> None:
    """What the mean divides by is counted over all processes."""
    case = BY_NAME["embedding-token-outputs"]
    ((x, y),) = case.data("ce", [case.examples])
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = len(y) // len(x)
    y = y.view(len(x), rows, *y.shape[1:]).clone()
    y[1:3] = -100
    own = slice(rank, None, size)
    found = []
    for inputs, targets, group in ((x[own], y[own], "auto"), (x, y, None)):
        model = here(case.model())
        found.append(
            EKFACLinearOperator(
                model,
                case.loss_func("ce"),
                list(model.parameters()),
                here([(inputs, targets.flatten(0, 1))]),
                group=group,
                fisher_type="type2",
                num_data=1000,
            )
        )
    assert relative(found[0].to_dense(), found[1].to_dense()) < TOLERANCE
    assert found[0].provenance == found[1].provenance
    assert found[0].num_data == 1000


def estimate_both(
    make: Callable[[], nn.Module], loss: Callable[[], Any], data: Sequence[Any], **options: Any
) -> tuple[EKFACLinearOperator, EKFACLinearOperator]:
    """The operator of all processes, each with its part of the batches, and that of one."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found = []
    for batches, group in ((data[rank::size], "auto"), (data, None)):
        model = here(make())
        parameters = dict(model.named_parameters())
        found.append(
            EKFACLinearOperator(model, loss(), parameters, here(batches), group=group, **options)
        )
    return found[0], found[1]


def held_by_inputs(width: int, data: Batches) -> str:
    """What is held of the inputs of the first layer in one process."""
    total = OuterProducts(1, width, torch.zeros(0, dtype=torch.float64), Truncation(4))
    for x, _ in data:
        total.add(x[None, :, None])
    return total.held.kind


def wide(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def wide_data(width: int, count: int) -> Batches:
    generator = torch.Generator().manual_seed(1)
    # Of decaying size, so that the leading directions are well separated.
    scale = 0.9 ** torch.arange(width, dtype=torch.float64)
    x = torch.randn(count, width, dtype=torch.float64, generator=generator) * scale
    return [(x[i : i + 6], torch.arange(6) % 3) for i in range(0, count, 6)]


@distributed_test((3,))
def test_thin_bases() -> None:
    """Of few vectors, of a sum that is decomposed whole or by its range, and of a sketch."""
    limits = leading.LONGEST_SQUARE, leading._SMALL_PART, leading._FEWEST_COLUMNS
    # Width, examples, and what is held of them by the first layer's inputs.
    cases = ((40, 12, "vectors"), (40, 60, "matrix"), (300, 180, "matrix"), (40, 60, "sketch"))
    for width, count, kind in cases:
        if kind == "sketch":
            leading.LONGEST_SQUARE, leading._SMALL_PART, leading._FEWEST_COLUMNS = 30, 0.5, 20
        data = wide_data(width, count)
        try:
            assert held_by_inputs(width, data) == kind
            together, alone = estimate_both(
                partial(wide, width),
                nn.CrossEntropyLoss,
                data,
                fisher_type="type2",
                rank=4,
                check_deterministic=False,
            )
        finally:
            leading.LONGEST_SQUARE, leading._SMALL_PART, leading._FEWEST_COLUMNS = limits
        label = f"{width}, {count}, {kind}"
        assert alone.blocks[0].ranks == (4, 4), label
        # A sketch is as exact as the square root of its smallest eigenvalues.
        tolerance = 1e-7 if kind == "sketch" else 1e-11
        assert relative(together.to_dense(), alone.to_dense()) < tolerance, label
        assert together.provenance == alone.provenance, label
        assert_same_bits(together)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.kind, self.place = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = torch.tanh(self.body(x))
        return {"kind": self.kind(features), "place": self.place(features)}


@distributed_test((2,))
def test_sums_of_losses() -> None:
    """What each loss's mean divides by is counted over all processes; some have no data."""
    generator = torch.Generator().manual_seed(2)
    data = [
        (
            torch.randn(1, 4, dtype=torch.float64, generator=generator),
            {
                "kind": torch.tensor([label]),
                "place": torch.randn(1, 2, dtype=torch.float64, generator=generator),
            },
        )
        for label in (-100, 1, 2, -100, 1)
    ]
    losses = {"kind": nn.CrossEntropyLoss(), "place": nn.MSELoss()}
    loss = partial(SumOfLosses, losses, {"place": 0.3})
    for fisher_type in ("type2", "mc", "empirical"):
        for batches in (data, data[1:2]):
            together, alone = estimate_both(TwoOutputs, loss, batches, fisher_type=fisher_type)
            assert relative(together.to_dense(), alone.to_dense()) < TOLERANCE, fisher_type
            terms = alone.provenance.num_loss_terms
            assert together.provenance.num_loss_terms == pytest.approx(terms, rel=1e-12)
            assert_same_bits(together)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


@distributed_test((3,))
def test_labels_that_are_drawn() -> None:
    """They depend on the place of the example alone, whatever the distribution."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    y = torch.rand(6, 3, dtype=torch.float64, generator=generator)
    data = [(x[i : i + 1], y[i : i + 1]) for i in range(6)]
    given = [(x, (y, torch.ones_like(y))) for x, y in data]
    cases = (
        (nn.MSELoss, linear, data),
        (nn.HuberLoss, linear, data),
        (nn.PoissonNLLLoss, linear, data),
        (nn.GaussianNLLLoss, linear, given),
        (nn.BCEWithLogitsLoss, linear, data),
        (nn.BCELoss, lambda: nn.Sequential(linear(), nn.Sigmoid()), data),
    )
    for loss, make, batches in cases:
        together, alone = estimate_both(make, loss, batches, fisher_type="mc", mc_samples=2)
        assert relative(together.to_dense(), alone.to_dense()) < TOLERANCE, loss


def absolute_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().sum()


def absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().mean()


@distributed_test((2,))
def test_reductions_that_are_measured() -> None:
    """A process that has no data, or none that count, takes the reduction of the others."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 4, dtype=torch.float64, generator=generator)
    y = torch.randn(4, 3, dtype=torch.float64, generator=generator)

    for loss, reduction in ((absolute_errors, "sum"), (absolute_error, "mean")):
        together, alone = estimate_both(
            linear, lambda loss=loss: loss, [(x, y)], fisher_type="empirical"
        )
        assert together.provenance.reduction == reduction
        assert relative(together.to_dense(), alone.to_dense()) < TOLERANCE
        assert together.provenance == alone.provenance

    def of_rank(outputs: Tensor, targets: Tensor) -> Tensor:
        return (absolute_error if dist.get_rank() else absolute_errors)(outputs, targets)

    model = here(linear())
    parameters = list(model.parameters())
    with pytest.raises(ValueError, match="has reduction 'sum' on rank 0, but 'mean' on rank 1"):
        EKFACLinearOperator(model, of_rank, parameters, here([(x, y)]), fisher_type="empirical")


class BiasedTwice(nn.Module):
    """Of some batches, the bias is used a second time, away from its weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = nn.Linear(100, 800), nn.Linear(800, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        if x[0, 0] > 0:
            hidden = hidden + self.layer.bias
        outputs: Tensor = self.last(torch.tanh(hidden))
        return outputs


@distributed_test((2,))
def test_biases_that_keep_less_than_their_weights() -> None:
    """What processes hold of a factor cannot be summed if it is a matrix here, a sketch there."""
    generator = torch.Generator().manual_seed(5)
    x = 0.1 * torch.randn(840, 100, dtype=torch.float64, generator=generator)
    x[:420, 0], x[420:, 0] = -1.0, 1.0
    y = torch.randn(840, 3, dtype=torch.float64, generator=generator)
    data = [(x[:420], y[:420]), (x[420:], y[420:])]
    found = []
    for rank in ("auto", {"layer.bias": 16}):
        for own, group in (([data[dist.get_rank()]], "auto"), (data, None)):
            model = here(BiasedTwice())
            parameters = [*model.layer.parameters()]
            arguments = (model, nn.MSELoss(), parameters, here(own))
            options = {"rank": rank, "group": group, "fisher_type": "empirical"}
            if rank == "auto" and group == "auto":
                with pytest.raises(ValueError, match=r"rank=\{'layer.bias': 16\}"):
                    EKFACLinearOperator(*arguments, **options)
            elif rank != "auto":
                found.append(EKFACLinearOperator(*arguments, **options))
    for together, alone in zip(found[0].blocks, found[1].blocks, strict=True):
        assert together.ranks == alone.ranks
        assert relative(together.eigenvalues, alone.eigenvalues) < 1e-7


@distributed_test((2,))
def test_merged_thin_bases() -> None:
    """Of the second task on, each thin block is merged in one process, and shared."""
    rank, size = dist.get_rank(), dist.get_world_size()
    values, kept = [], []
    for group in ("auto", None):
        penalty = EKFACPenalty(strength=1.0, rank=4, fisher_type="type2", temperature=1.0)
        model = here(wide(40))
        for count in (36, 60):
            data = wide_data(40, count)
            own = data if group is None else data[rank::size]
            penalty.consolidate(model, nn.CrossEntropyLoss(), here(own), group=group)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)
        values.append(float(penalty(model)))
        kept.append([block.ranks for block in penalty._terms[0].operator.blocks])
        if group == "auto":
            assert_same_bits(penalty._terms[0].operator)
    assert kept[0] == kept[1]
    assert kept[0][0] == (4, 4)
    assert values[0] == pytest.approx(values[1], rel=1e-10)
