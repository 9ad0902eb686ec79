"""Whatever a model does with the rows of a batch, their examples are told, or it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from rotate_ewc import EKFACLinearOperator
from rotate_ewc.tracing import forward_pass
from tests.helpers.exactness import assert_exact_diagonal, seeded

CE = nn.CrossEntropyLoss()
Batch = tuple[Any, Tensor]
Use = Callable[["Model", Any], Tensor]


class Model(nn.Module):
    """Some layers, and what is done with them."""

    def __init__(self, use: Use, **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.use = use
        for name, layer in layers.items():
            setattr(self, name, layer)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7, generator=generator)
        self.double()

    def forward(self, inputs: Any) -> Tensor:
        return self.use(self, inputs)


def labels(number: int, classes: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(classes, (number,), generator=torch.Generator().manual_seed(seed))


def owners_of(lengths: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def output_vectors(outputs: Tensor, targets: Tensor, fisher: str) -> Iterator[Tensor]:
    """Yield the output vectors, of one example each, whose outer products make the matrix."""
    for n, p in enumerate(outputs.detach().softmax(dim=1)):
        unit = torch.eye(len(p), dtype=p.dtype)
        exact = [p[c].sqrt() * (unit[c] - p) for c in range(len(p))]
        for vector in exact if fisher == "type2" else [p - unit[targets[n]]]:
            whole = torch.zeros_like(outputs)
            whole[n] = vector
            yield whole


def dense_by_loop(model: nn.Module, batches: Sequence[Batch], fisher: str) -> Tensor:
    """Sum the outer products of gradients, one example after another."""
    parameters = list(model.parameters())
    found = []
    for inputs, targets in batches:
        outputs = model(inputs)
        for vector in output_vectors(outputs, targets, fisher):
            gradients = torch.autograd.grad(
                outputs,
                parameters,
                vector,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    vectors = torch.stack(found)
    return vectors.T @ vectors / sum(len(targets) for _, targets in batches)


def check(model: nn.Module, batches: Sequence[Batch], fisher: str, **options: Any) -> None:
    """Compare an estimate with the loop."""
    operator = EKFACLinearOperator(
        model, CE, dict(model.named_parameters()), batches, fisher_type=fisher, **options
    )
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert_exact_diagonal(operator, dense_by_loop(model, batches, fisher), shapes)


# ------------------------------------------------------------- models that move rows by the data


def graphs(model: Model, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, owners = batch
    sums = torch.zeros(int(owners.max()) + 1, 4, dtype=x.dtype)
    return model.last(sums.index_add(0, owners, model.first(x).tanh()))


def graph_batches() -> list[Batch]:
    lengths = [[3, 3, 3, 3], [5, 1, 2, 4], [1, 2, 2, 3], [3, 3, 3, 3]]
    return [
        ((seeded(sum(of), 3, seed=i), owners_of(of)), labels(4, seed=i))
        for i, of in enumerate(lengths)
    ]


def sorting(model: Model, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    return model.last(model.first(x[order]).tanh())[order.argsort()]


def experts(model: Model, x: Tensor) -> Tensor:
    chosen = x[:, 0] > 0
    return model.last(x).index_put((chosen,), model.last(model.middle(x[chosen]).tanh()))


def best_experts(model: Model, x: Tensor) -> Tensor:
    """Every token goes to the two best of three experts."""
    tokens = x.flatten(0, 1)
    weights, chosen = model.gate(tokens).softmax(dim=1).topk(2)
    found = torch.zeros(len(tokens), 3, dtype=x.dtype)
    for index, expert in enumerate((model.first3, model.second3, model.third3)):
        token, place = (chosen == index).nonzero(as_tuple=True)
        found = found.index_add(0, token, expert(tokens[token]) * weights[token, place, None])
    return model.last(found.view_as(x).mean(dim=1))


def packed(model: Model, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, lengths = batch
    rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    found = rows._replace(data=model.first(rows.data).tanh())
    padded, _ = nn.utils.rnn.pad_packed_sequence(found, batch_first=True)
    return model.last(padded.sum(dim=1))


def masked(model: Model, x: Tensor) -> Tensor:
    kept = x[..., 0] > 0
    found = torch.zeros(*x.shape[:2], 4, dtype=x.dtype)
    found[kept] = model.first(x[kept]).tanh()
    return model.last(found.sum(dim=1))


def windows(model: Model, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, starts = batch
    cut = torch.stack([row[:, s : s + 4] for row, s in zip(x, starts.tolist(), strict=True)])
    places = (starts[:, None] + torch.arange(3)).flatten() % 2
    order = torch.cat([torch.where(places == side)[0] for side in (0, 1)])
    unfolded = cut.unfold(2, 2, 1).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    return model.last(model.first6(unfolded[order])[order.argsort()].view(len(x), -1))


def convolutions(model: Model, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Sequences of a batch, in the order of their lengths, some of them twice."""
    x, lengths = batch
    order = lengths.argsort()
    again = torch.cat([order, order[lengths[order] > 2]])
    features = model.convolution(x[again]).relu().mean(dim=2)
    return model.last(torch.zeros(len(x), 4, dtype=x.dtype).index_add(0, again, features))


def filled(model: Model, x: Tensor) -> Tensor:
    return model.last(x.masked_scatter(x > 0, model.token.expand(len(x), 3)))


def sliced(model: Model, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, lengths = batch
    parts = model.first(x).tanh().split(lengths.tolist())
    return model.last(torch.stack([part.sum(dim=0) for part in parts]))


def swapped(model: Model, x: Tensor) -> Tensor:
    """Examples take the rows of others, if a condition says so: in later batches only."""
    hidden = model.first(x).tanh()
    return model.last(torch.where(x[:1, :1] > 0, hidden, hidden.flip(0)))


def attention(model: Model, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Sequences one after another, each of whose tokens attend to those of the same one."""
    x, owners = batch
    same = owners[:, None] == owners[None]
    features = model.first(x)
    scores = (features @ features.T).masked_fill(~same, -torch.inf)
    bias = torch.where(same, 0.0, -torch.inf).to(x.dtype)
    attended = F.scaled_dot_product_attention(*[features[None]] * 3, attn_mask=bias[None])[0]
    pooled = (owners == torch.arange(int(owners.max()) + 1)[:, None])[:, :, None]
    return model.last((pooled * (scores.softmax(dim=1) @ features + attended)).sum(dim=1))


def layers() -> dict[str, nn.Module | nn.Parameter]:
    return {"first": nn.Linear(3, 4), "last": nn.Linear(4, 2)}


def plain(number: int, *shape: int) -> list[Batch]:
    return [(seeded(5, *shape, 3, seed=i), labels(5, seed=i)) for i in range(number)]


def with_lengths(rows: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            (seeded(5, 3, rows, seed=i), torch.randint(1, 4, (5,), generator=generator)),
            labels(5, seed=i),
        )
        for i in range(3)
    ]


CASES: dict[str, tuple[Use, dict[str, Any], list[Batch], int | None]] = {
    "graphs": (graphs, layers(), graph_batches(), 4),
    "attention": (attention, layers(), graph_batches(), 4),
    "sorting": (sorting, layers(), plain(3), None),
    "experts": (experts, {"middle": nn.Linear(3, 3), "last": nn.Linear(3, 2)}, plain(3), None),
    "best experts": (
        best_experts,
        {"gate": nn.Linear(3, 3), "last": nn.Linear(3, 2)}
        | {f"{name}3": nn.Linear(3, 3) for name in ("first", "second", "third")},
        plain(3, 4),
        None,
    ),
    "packed": (packed, layers(), with_lengths(3), None),
    "masked": (masked, layers(), plain(3, 4), None),
    "windows": (
        windows,
        {"first6": nn.Linear(6, 1), "last": nn.Linear(3, 2)},
        with_lengths(7),
        None,
    ),
    "convolutions": (
        convolutions,
        {"convolution": nn.Conv1d(3, 4, 2), "last": nn.Linear(4, 2)},
        with_lengths(5),
        None,
    ),
    "swapped": (swapped, layers(), [(x + i - 1, y) for i, (x, y) in enumerate(plain(3))], None),
    "split": (
        sliced,
        layers(),
        [
            ((seeded(10, 3, seed=i), torch.tensor(of)), labels(5, seed=i))
            for i, of in enumerate([[2] * 5, [4, 1, 1, 1, 3], [1, 3, 2, 2, 2]])
        ],
        5,
    ),
}


@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["empirical", "type2"])
@pytest.mark.parametrize("case", CASES)
def test_rows_moved_by_the_data(case: str, fisher: str, kfac_approx: str, separate: bool) -> None:
    use, parts, batches, count = CASES[case]
    check(
        Model(use, **parts),
        batches,
        fisher,
        kfac_approx=kfac_approx,
        separate_weight_and_bias=separate,
        batch_size_fn=None if count is None else lambda _: count,
    )


def test_graphs_have_the_right_trace() -> None:
    """Of the same sizes in one batch, and of others in the next of the same shapes."""

    class Graphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4)

        def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, owners = batch
            sums = torch.zeros(int(owners.max()) + 1, 4, dtype=torch.float64)
            return sums.index_add(0, owners, self.a(x).tanh())

    def trace(*batches: Batch) -> float:
        operator = EKFACLinearOperator(
            model,
            CE,
            list(model.parameters()),
            list(batches),
            fisher_type="empirical",
            batch_size_fn=lambda _: 4,
        )
        return float(operator.trace)

    torch.manual_seed(0)
    model = Graphs().double()
    drawn = [(torch.randn(12, 3).double(), torch.randint(4, (4,))) for _ in range(3)]
    sizes = [[3, 4, 2, 3], [3, 3, 3, 3], [5, 1, 2, 4]]
    first, *others = [((x, owners_of(of)), y) for of, (x, y) in zip(sizes, drawn, strict=True)]
    assert trace(first) == pytest.approx(10.9487, abs=1e-4)
    assert trace(*others) == pytest.approx(9.9276, abs=1e-4)
    assert trace(*others) == pytest.approx(
        float(dense_by_loop(model, others, "empirical").trace()), rel=1e-12
    )


# --------------------------------------------------------------------- models that mix examples


def contrastive(model: Model, x: Tensor) -> Tensor:
    hidden = F.normalize(model.first(x).tanh())
    return hidden @ hidden.T


def normalized(model: Model, x: Tensor) -> Tensor:
    hidden = model.first(x).tanh()
    return model.last((hidden - hidden.mean(dim=0)) / (hidden.std(dim=0) + 0.1))


def messages(model: Model, x: Tensor) -> Tensor:
    edges = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])
    hidden = model.first(x).tanh()
    return model.last(hidden.index_add(0, edges[1], hidden[edges[0]]))


@pytest.mark.parametrize("use", [contrastive, normalized, messages])
def test_models_that_mix_examples(use: Use) -> None:
    """They are refused, and what the message advises works."""
    parts = layers() if use is not contrastive else {"first": nn.Linear(3, 4)}
    model, batches = Model(use, **parts), plain(2)
    if use is contrastive:
        batches = [(x, torch.arange(5)) for x, _ in batches]
    with pytest.raises(ValueError, match=r"batch_size_fn=lambda inputs: 1.*'type2'") as refusal:
        EKFACLinearOperator(model, CE, list(model.parameters()), batches)
    assert "'first.weight'" in str(refusal.value)
    check(model, batches, "type2", batch_size_fn=lambda inputs: 1)


@pytest.mark.parametrize("unsupported", ["diagonal", "skip"])
def test_unsupported_covers_rows_of_several_examples(unsupported: str) -> None:
    model, batches = Model(normalized, **layers()), plain(2)
    with pytest.warns(UserWarning, match=r"first\.weight"):
        operator = EKFACLinearOperator(
            model,
            CE,
            dict(model.named_parameters()),
            batches,
            fisher_type="empirical",
            unsupported=unsupported,
        )
    dense = dense_by_loop(model, batches, "empirical")
    places = dict(zip(model.state_dict(), dense.diagonal().split([12, 4, 8, 2]), strict=True))
    found = {name for block in operator.blocks for name in block.parameters}
    skipped = {"first.weight", "first.bias"} if unsupported == "skip" else set()
    assert found == places.keys() - skipped
    for block in operator.blocks:
        exact = sum(float(places[name].sum()) for name in block.parameters)
        assert float(block.eigenvalues.sum()) == pytest.approx(exact, rel=1e-10)


def test_rows_of_a_parameter_filled_in_by_a_mask() -> None:
    """Which of them an example gets depends on those before it."""

    def refusal(seed: int) -> str:
        model = Model(filled, token=nn.Parameter(torch.zeros(3)), last=nn.Linear(3, 2))
        try:
            check(model, [(seeded(3, 3, seed=seed), labels(3))], "empirical")
        except ValueError as error:
            return str(error)
        return ""

    refusals = [refusal(seed) for seed in range(24)]
    assert {*refusals} >= {""}
    assert all("batch_size_fn=lambda inputs: 1" in found for found in refusals if found)
    assert any(refusals)


# ------------------------------------------------------------------------- what it costs


@contextmanager
def counted_backward_passes() -> Iterator[list[int]]:
    """Count the backward passes that estimation makes."""
    counts = [0]
    original = forward_pass.back_propagate

    def counting(*args: Any, **kwargs: Any) -> Any:
        counts[0] += 1
        return original(*args, **kwargs)

    forward_pass.back_propagate = counting
    try:
        yield counts
    finally:
        forward_pass.back_propagate = original


def backward_passes(model: Model, batches: Sequence[Batch], **options: Any) -> int:
    with counted_backward_passes() as counts:
        EKFACLinearOperator(
            model, CE, list(model.parameters()), batches, check_deterministic=False, **options
        )
    return counts[0]


@pytest.mark.parametrize(("fisher", "vectors"), [("empirical", 1), ("mc", 1), ("type2", 1)])
def test_backward_passes(fisher: str, vectors: int) -> None:
    """Two more for the first batch; or one more for each, where the data move rows.

    Two classes have one output vector.
    """
    regular = Model(lambda m, x: m.last(m.first(x).tanh()), **layers())
    few, many = (backward_passes(regular, plain(n), fisher_type=fisher) for n in (1, 4))
    assert few == 2 + vectors
    assert many == 2 + vectors * 4
    moving = Model(sorting, **layers())
    few, many = (backward_passes(moving, plain(n), fisher_type=fisher) for n in (1, 4))
    assert few == vectors + 1
    assert many == (vectors + 1) * 4


def test_sequences_with_time_first_are_regular() -> None:
    def use(model: Model, x: Tensor) -> Tensor:
        return model.last(model.first(x).tanh().mean(dim=0))

    batches = [(x.transpose(0, 1).contiguous(), y) for x, y in plain(4, 7)]
    passes = backward_passes(Model(use, **layers()), batches, fisher_type="empirical")
    assert passes == 2 + 4


def test_attention_with_frozen_keys_is_regular() -> None:
    """Its scores are products of what is trained and of data, for each example by itself."""

    def use(model: Model, x: Tensor) -> Tensor:
        keys = x[..., :2]
        queries = model.first(x)[..., :2]
        weights = torch.where(keys[:, None, :, 0] > 0, queries @ keys.mT, -10.0).softmax(dim=2)
        return model.last((weights @ model.first(x)).sum(dim=1))

    passes = backward_passes(Model(use, **layers()), plain(4, 7), fisher_type="empirical")
    assert passes == 2 + 4
    check(Model(use, **layers()), plain(4, 7), "empirical")


def test_masks_of_the_whole_batch_move_rows() -> None:
    """By arithmetic alone, before a layer and again after it; in later batches, other rows."""

    def use(model: Model, x: Tensor) -> Tensor:
        largest = (x[:, 0] == x[:, 0].max()).to(x)
        step = largest - largest.roll(1)
        order = torch.eye(len(x), dtype=x.dtype) - step[:, None] * step
        hidden = model.first((order[:, :, None] * x).sum(dim=1)).tanh()
        return model.last((order[:, :, None] * hidden).sum(dim=1) * model.first(x))

    batches = [(x.roll(i, 0), y) for i, (x, y) in enumerate(plain(1) * 3)]
    check(Model(use, **layers()), batches, "empirical")


def test_masks_that_let_examples_mix_in_a_later_batch() -> None:
    def use(model: Model, x: Tensor) -> Tensor:
        near = (x[:, None, 0] - x[None, :, 0]).abs() < 1e-3
        hidden = model.first(x)
        scores = (hidden @ hidden.T).masked_fill(~near, -torch.inf)
        return model.last(scores.softmax(dim=1) @ hidden)

    (x, y), (other, z) = plain(2)
    other[1, 0] = other[0, 0]
    with pytest.raises(ValueError, match=r"batch 1 .* depend on other examples' values"):
        backward_passes(Model(use, **layers()), [(x, y), (other, z)], fisher_type="empirical")


def test_masks_of_padding_are_regular() -> None:
    def use(model: Model, x: Tensor) -> Tensor:
        kept = (x[..., 0] > -1)[:, None, None]
        hidden = model.first(x)[:, None]
        attended = F.scaled_dot_product_attention(hidden, hidden, hidden, attn_mask=kept)
        scores = (hidden @ hidden.mT).masked_fill(~kept, -10.0).softmax(dim=3)
        return model.last((attended + scores @ hidden)[:, 0].mean(dim=1))

    assert backward_passes(Model(use, **layers()), plain(4, 10), fisher_type="empirical") == 2 + 4


def test_matrices_of_data_for_the_whole_batch() -> None:
    """They swap two of the examples, in a later batch, before a layer and again after it."""

    def use(model: Model, x: Tensor) -> Tensor:
        swap = (x[:, 0].argmax() == torch.arange(len(x))).to(x)
        order = torch.eye(len(x), dtype=x.dtype) - torch.outer(
            swap - swap.roll(1), swap - swap.roll(1)
        )
        hidden = model.first(order @ x).tanh()
        swapped = torch.matmul(order[None], hidden[None])[0]
        return model.last(swapped * model.first(x))

    batches = [(x.roll(i, 0), y) for i, (x, y) in enumerate(plain(1) * 3)]
    check(Model(use, **layers()), batches, "empirical")


# ------------------------------------------------------------------- how many examples there are


def test_examples_on_the_second_axis_are_counted() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(4, 8, 3).double(), torch.randint(2, (8,))
    operator = EKFACLinearOperator(
        lambda x: model(x.mean(0)),
        CE,
        list(model.parameters()),
        [(x, y)],
        fisher_type="empirical",
    )
    assert operator.num_data == 8
    assert float(operator.trace) == pytest.approx(1.1684, abs=1e-4)


@pytest.mark.parametrize(
    ("inputs", "rows"),
    [((seeded(6, 3), seeded(3, 3)), 6), ((seeded(12, 3), seeded(12, 1)), 4)],
    ids=["two sizes", "ragged"],
)
def test_numbers_of_examples_that_are_not_obvious(inputs: tuple[Tensor, ...], rows: int) -> None:
    """They are refused, and what the message advises works."""
    model = Model(lambda m, pair: m.last(m.first(pair[0][:rows]).tanh()), **layers())
    data = [(inputs, labels(rows))]
    with pytest.raises(ValueError, match=r"not obvious.*pass batch_size_fn"):
        EKFACLinearOperator(model, CE, list(model.parameters()), data)
    check(model, data, "empirical", batch_size_fn=lambda _: rows)
