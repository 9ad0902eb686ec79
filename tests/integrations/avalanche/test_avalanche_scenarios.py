"""The plugin on every kind of stream that Avalanche has, beside plain loops."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, nc_benchmark, split_online_stream
from avalanche.benchmarks.scenarios.online import split_continuous_linear_decay_stream
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.models.utils import avalanche_forward, avalanche_model_adaptation
from avalanche.training.plugins import EWCPlugin, ReplayPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from rotate_ewc import EKFACPenalty
from rotate_ewc.integrations.avalanche import RotatedEWCPlugin
from tests.helpers.avalanche_training import (
    CE,
    Incremental,
    MultiHead,
    dataset,
    domain_benchmark,
    flat,
    net,
)
from tests.helpers.exact import exact_penalty
from tests.helpers.exact_plugin import exact_plugin

LR, LAMBDA = 0.05, 3.0
UPDATES = ["loss", "rotated", "tangent"]


def plain(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=LR)


def optimizer_for(update: str, model: nn.Module) -> Optimizer:
    return Adam(model.parameters(), lr=LR) if update == "rotated" else plain(model)


def naive(model: nn.Module, plugins: list[Any], optimizer: Optimizer | None = None) -> Naive:
    return Naive(
        model=model, optimizer=optimizer or plain(model), criterion=CE, train_mb_size=8,
        train_epochs=2, eval_mb_size=24, plugins=plugins, evaluator=None,
    )  # fmt: skip


def benchmark_of(*sizes: int) -> Any:
    data = [as_classification_dataset(dataset(seed, n)) for seed, n in enumerate(sizes)]
    return benchmark_from_datasets(train=data, test=data)


def class_stream(task_labels: bool) -> Any:
    """Three tasks of two classes."""
    data = dataset(0, 48, classes=6)
    return nc_benchmark(
        data, data, n_experiences=3, task_labels=task_labels, seed=0, shuffle=False,
        class_ids_from_zero_in_each_exp=task_labels,
    )  # fmt: skip


Batch = tuple[Tensor, Tensor | None, Tensor]


def batches_of(data: Any, size: int = 8) -> list[Batch]:
    """Inputs, task labels and targets, in the order of the data."""
    rows = [data[index] for index in range(len(data))]
    x, y = torch.stack([row[0] for row in rows]), torch.tensor([int(row[1]) for row in rows])
    t = torch.tensor([int(row[2]) if len(row) > 2 else 0 for row in rows])
    return list(zip(x.split(size), t.split(size), y.split(size), strict=True))


def learn_by_hand(
    model: nn.Module, penalty: EKFACPenalty, batches: list[Batch], update: str, epochs: int = 2
) -> None:
    """With a new optimizer for whatever parameters there are."""
    optimizer = optimizer_for(update, model)
    if update not in ("loss", "none"):
        penalty.attach(optimizer, model, update)
    model.train()
    for x, t, y in batches * epochs:
        optimizer.zero_grad()
        loss = CE(avalanche_forward(model, x, t), y)
        (loss + penalty(model) if update == "loss" else loss).backward()
        optimizer.step()


def consolidate_by_hand(model: nn.Module, penalty: EKFACPenalty, batches: list[Batch]) -> None:
    data = [((x, t), y) for x, t, y in batches]
    penalty.consolidate(model, CE, data, forward=lambda inputs: avalanche_forward(model, *inputs))


def by_hand(model: nn.Module, stream: Any, update: str, mode: str) -> EKFACPenalty:
    penalty = exact_penalty(LAMBDA, mode, seed=5)
    for experience in stream:
        torch.manual_seed(1)  # new rows are drawn
        avalanche_model_adaptation(model, experience)
        batches = batches_of(experience.dataset)
        penalty.current_num_data = len(experience.dataset)
        learn_by_hand(model, penalty, batches, update)
        consolidate_by_hand(model, penalty, batches)
    return penalty


# --------------------------------------------------------------------------- heads that grow


@pytest.mark.parametrize(
    ("make", "update", "mode"),
    [
        (Incremental, "loss", "merged"),
        (MultiHead, "loss", "separate"),
        (Incremental, "rotated", "merged"),
        (MultiHead, "rotated", "merged"),
        (MultiHead, "tangent", "merged"),
        (Incremental, "gradient", "merged"),
    ],
)
def test_growing_heads_are_the_same_as_by_hand(
    make: Callable[[], nn.Module], update: str, mode: str
) -> None:
    """Bit for bit, with task labels for several heads and without for one that grows."""
    stream = class_stream(task_labels=make is MultiHead).train_stream
    model, plugin = make(), exact_plugin(LAMBDA, mode, update=update, seed=5)
    strategy = naive(model, [plugin], optimizer_for(update, model))
    for experience in stream:
        torch.manual_seed(1)
        strategy.train(experience, shuffle=False)
    expected = make()
    penalty = by_hand(expected, stream, update, mode)
    assert torch.equal(flat(model), flat(expected))
    assert plugin.penalty(model) == penalty(model)
    free = make()
    by_hand(free, stream, "none", mode)
    assert (flat(model) - flat(free)).abs().max() > 1e-4


@pytest.mark.parametrize("update", UPDATES)
def test_rows_that_grew_in_an_evaluation_are_free(update: str) -> None:
    """Evaluating on what is yet to come grows the classifier; the old rows alone are held."""
    benchmark = class_stream(task_labels=False)
    model, plugin = Incremental(), exact_plugin(LAMBDA, update=update, seed=5)
    strategy = naive(model, [plugin], optimizer_for(update, model))
    strategy.train(benchmark.train_stream[0])
    strategy.eval(benchmark.test_stream)
    weight = model.classifier.classifier.weight
    assert weight.shape == (6, 8)
    value = plugin.penalty(model).item()
    with torch.no_grad():
        weight[2:] += 1.0
    assert plugin.penalty(model).item() == value
    with torch.no_grad():
        weight[0] += 1.0
    assert plugin.penalty(model).item() > value + 1e-3
    strategy.train(benchmark.train_stream[1])
    assert plugin.penalty.terms[-1].anchor["classifier.classifier.weight"].shape == (6, 8)
    assert plugin.penalty.num_tasks == 2


@pytest.mark.parametrize("update", UPDATES)
def test_head_that_was_made_in_an_evaluation_is_free(update: str) -> None:
    benchmark = class_stream(task_labels=True)
    model, plugin = MultiHead(), exact_plugin(LAMBDA, update=update, seed=5)
    strategy = naive(model, [plugin], optimizer_for(update, model))
    strategy.train(benchmark.train_stream[0])
    strategy.eval(benchmark.test_stream)
    heads = model.classifier.classifiers
    assert list(heads) == ["0", "1", "2"]
    assert not [name for name in plugin.penalty.terms[0].anchor if ".classifiers.1" in name]
    old = heads["0"].classifier.weight.detach().clone()
    value = plugin.penalty(model).item()
    with torch.no_grad():
        heads["2"].classifier.weight += 1.0
    assert plugin.penalty(model).item() == value
    strategy.train(benchmark.train_stream[2])
    assert plugin.penalty.num_tasks == 2
    blocks = {block.label: block for block in plugin.penalty.terms[0].operator.blocks}
    assert blocks["classifier.classifiers.2.classifier.weight"].trace > 0
    assert torch.equal(heads["0"].classifier.weight, old)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("make", [Incremental, MultiHead])
def test_heads_that_grow_in_the_middle_of_a_task(
    make: Callable[[], nn.Module], update: str
) -> None:
    """As they do where the whole test stream is evaluated after every epoch."""
    benchmark = class_stream(task_labels=make is MultiHead)
    model, plugin = make(), exact_plugin(LAMBDA, update=update, seed=5)
    strategy = Naive(
        model=model, optimizer=optimizer_for(update, model), criterion=CE, train_mb_size=8,
        train_epochs=2, eval_mb_size=24, plugins=[plugin], evaluator=None, eval_every=1,
    )  # fmt: skip
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[benchmark.test_stream])
        for name, anchor in plugin.penalty.terms[-1].anchor.items():
            assert torch.equal(model.get_parameter(name), anchor), name
        assert plugin.penalty(model).item() == 0.0
    assert plugin.penalty.num_tasks == 3


# --------------------------------------------------------------------------- other layers


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def other_layer(kind: str) -> nn.Module:
    torch.manual_seed(2)
    if kind == "larger":
        return nn.Linear(8, 6)
    return nn.Linear(8, 4, bias=kind == "same")


@pytest.mark.parametrize("kind", ["same", "larger"])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.filterwarnings("ignore:.*ha(s|ve) grown, but not from the values:UserWarning")
def test_layer_that_is_replaced(update: str, kind: str) -> None:
    """Another layer by the same name is held to where the first was, as by hand."""
    stream = domain_benchmark(2).train_stream
    model, plugin = two_layers(), exact_plugin(LAMBDA, update=update, seed=5)
    expected, penalty = two_layers(), exact_penalty(LAMBDA, seed=5)
    strategy = naive(model, [plugin], optimizer_for(update, model))
    for experience in stream:
        if plugin.penalty.num_tasks == 1:
            model[2], expected[2] = other_layer(kind), other_layer(kind)
        strategy.train(experience, shuffle=False)
        batches = batches_of(experience.dataset)
        learn_by_hand(expected, penalty, batches, update)
        consolidate_by_hand(expected, penalty, batches)
    assert torch.equal(flat(model), flat(expected))
    assert plugin.penalty.terms[0].anchor["2.weight"].shape == model[2].weight.shape


@pytest.mark.parametrize("update", UPDATES)
def test_layer_that_is_missing_is_named(update: str) -> None:
    """Before anything is learned or remembered."""
    stream, model = domain_benchmark(2).train_stream, two_layers()
    plugin = exact_plugin(LAMBDA, update=update)
    strategy = naive(model, [plugin], optimizer_for(update, model))
    strategy.train(stream[0])
    model[2] = other_layer("without bias")
    before = flat(model)
    with pytest.raises(ValueError, match=r"parameter '2\.bias' is protected by the penalty"):
        strategy.train(stream[1])
    assert torch.equal(flat(model), before)
    assert plugin.penalty.num_tasks == 1


# --------------------------------------------------------------------------- online streams


@pytest.mark.parametrize(
    ("size", "boundaries", "options"),
    [
        (1, False, {}),
        (5, True, {}),
        (5, False, {"drop_last": True}),
        (8, False, {}),
        (8, True, {"drop_last": True}),
    ],
)
def test_online_streams_are_the_same_as_by_hand(
    size: int, boundaries: bool, options: dict[str, bool]
) -> None:
    """Bit for bit: snapshots are of the whole task, which is also what N_now counts."""
    originals = benchmark_of(16, 24).train_stream

    def stream() -> Any:
        return split_online_stream(
            originals, size, access_task_boundaries=boundaries, seed=4, **options
        )

    model, plugin = net(dropout=0.0), exact_plugin(LAMBDA, update="loss", seed=5)
    strategy, taken = naive(model, [plugin]), []
    for part in stream():
        strategy.train(part, shuffle=False)
        taken.append(plugin.penalty.num_tasks)
    expected, penalty = net(dropout=0.0), exact_penalty(LAMBDA, seed=5)
    for part, tasks in zip(stream(), taken, strict=True):
        whole = part.logging().origin_experience
        penalty.current_num_data = len(whole.dataset)
        learn_by_hand(expected, penalty, batches_of(part.dataset), "loss")
        if tasks > penalty.num_tasks:
            consolidate_by_hand(expected, penalty, batches_of(whole.dataset))
    parts = [n // size if options else -(-n // size) for n in (16, 24)]
    assert taken == [0] * (parts[0] - 1) + [1] * parts[1] + [2]
    assert torch.equal(flat(model), flat(expected))
    assert plugin.penalty.terms[0].operator.num_data == 40


def test_streams_without_tasks() -> None:
    """Tasks that pass into one another have no boundary but the end of the stream."""
    torch.manual_seed(0)
    stream = split_continuous_linear_decay_stream(
        domain_benchmark(2).train_stream, experience_size=6, iters_per_virtual_epoch=4, beta=4,
        shuffle=True,
    )  # fmt: skip
    plugin, taken = exact_plugin(LAMBDA), []
    strategy = naive(net(), [plugin])
    for part in stream:
        strategy.train(part)
        taken.append(plugin.penalty.num_tasks)
    assert taken == [0] * 7 + [1]


# --------------------------------------------------------------------------- small and odd sizes


def eigenvalues(plugin: RotatedEWCPlugin) -> list[Tensor]:
    return [block.eigenvalues for block in plugin.penalty.terms[0].operator.blocks]


@pytest.mark.parametrize(
    ("sizes", "fisher_type"), [((25, 25), "mc"), ((1, 1), "type2"), ((25, 1), "empirical")]
)
def test_last_batches_of_one(sizes: tuple[int, int], fisher_type: str) -> None:
    """The mini-batch size of the snapshot does not change its result."""
    found = []
    for size in (1, 8, 24, 100):
        model = net(dropout=0.0).double()
        plugin = exact_plugin(0.5, estimation_mb_size=size, fisher_type=fisher_type, seed=5)
        strategy = naive(model, [plugin])
        for seed, n in enumerate(sizes):
            x, y = dataset(seed, n).tensors
            data = torch.utils.data.TensorDataset(x.double(), y)
            data.targets = y.tolist()
            benchmark = benchmark_from_datasets(train=[as_classification_dataset(data)])
            strategy.train(benchmark.train_stream[0], shuffle=False)
        assert plugin.penalty.terms[0].operator.num_data == sum(sizes)
        found.append(eigenvalues(plugin))
    assert sum(float(values.sum()) for values in found[0]) > 0
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def normalized() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4)
    )


def test_batch_normalization_and_a_last_batch_of_one() -> None:
    """Nothing to normalize with in training; in a snapshot there is no need to."""
    model, plugin = normalized(), exact_plugin(LAMBDA)
    strategy = naive(model, [plugin])
    for experience in benchmark_of(9, 9).train_stream:
        strategy.train(experience, drop_last=True)
    assert plugin.penalty.num_tasks == 2
    assert int(model[1].num_batches_tracked) == 4


# --------------------------------------------------------------------------- nothing else changes


class FreezePlugin(SupervisedPlugin):
    """Layers in evaluation mode while others train, as users freeze them."""

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        strategy.model[1].eval()
        strategy.model[3].eval()


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("first", [True, False])
def test_frozen_layers_stay_frozen(first: bool, update: str) -> None:
    model, plugin = normalized(), exact_plugin(LAMBDA, update=update)
    plugins = [FreezePlugin(), plugin]
    strategy = naive(model, plugins if first else plugins[::-1], optimizer_for(update, model))
    model[1].eval()
    for experience in domain_benchmark(2).train_stream:
        strategy.train(experience)
        modes = [module.training for module in model]
        assert modes == [True, False, True, False, True]
    assert torch.equal(model[1].running_mean, torch.zeros(8))
    assert int(model[1].num_batches_tracked) == 0


def states() -> tuple[Any, ...]:
    """Of all random generators."""
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def seed_all() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


class Noise:
    """A transform that draws from all generators."""

    def __call__(self, x: Tensor) -> Tensor:
        x = torch.as_tensor(x)
        return x + 0.1 * torch.randn(x.shape) + 0.1 * random.random() + 0.1 * np.random.rand()


def noisy_benchmark() -> Any:
    """Random transforms in training and in evaluation."""
    data = [
        as_classification_dataset(dataset(seed), transform_groups={"train": group, "eval": group})
        for seed in range(2)
        for group in [(Noise(), None)]
    ]
    return benchmark_from_datasets(train=data, test=data)


def trained(noisy: bool, *plugins: Any) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    """The model after two tasks, and the states of the random generators."""
    benchmark, model = noisy_benchmark() if noisy else domain_benchmark(2), normalized()
    strategy = naive(model, [ReplayPlugin(mem_size=8), *plugins])
    seed_all()
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)
    return model.state_dict(), states()


trained_freely = cache(trained)


@pytest.mark.parametrize(
    ("noisy", "options"),
    [
        (True, {"update": "loss"}),
        (False, {"update": "loss", "mode": "separate"}),
        (True, {"update": "gradient", "mc_samples": 3, "num_samples": 16}),
        (False, {"update": "gradient", "fisher_type": "type2"}),
        (True, {"update": "loss", "fisher_type": "empirical"}),
        (True, {}),
        (False, {"every": 4}),
    ],
)
def test_a_strength_of_zero_changes_nothing(options: dict[str, Any], noisy: bool) -> None:
    """Dropout, batches, buffers and random generators, as without the plugin.

    Bit for bit, but that a proximal step of nothing goes to the eigenbasis and back.
    """
    free, drawn = trained_freely(noisy)
    held, drawn_too = trained(noisy, exact_plugin(0.0, **options))
    assert drawn == drawn_too
    tolerance = 0.0 if "update" in options else 1e-5
    for name, value in free.items():
        torch.testing.assert_close(held[name], value, rtol=0.0, atol=tolerance)


def shifted(x: Tensor) -> Tensor:
    return torch.as_tensor(x) + 2.0


def test_snapshot_is_of_the_evaluation_transforms() -> None:
    """Training sees other inputs, as it does with augmentation."""
    groups = {"train": (shifted, None), "eval": (None, None)}
    data = as_classification_dataset(dataset(0), transform_groups=groups)
    benchmark = benchmark_from_datasets(train=[data])
    model, plugin = net(dropout=0.0), exact_plugin(LAMBDA, seed=5)
    naive(model, [plugin]).train(benchmark.train_stream[0])
    seen, other = (exact_penalty(LAMBDA, seed=5) for _ in range(2))
    consolidate_by_hand(model, seen, batches_of(dataset(0)))
    consolidate_by_hand(model, other, [(shifted(x), t, y) for x, t, y in batches_of(dataset(0))])
    traces = [p.terms[0].operator.trace for p in (plugin.penalty, seen, other)]
    assert float(traces[0]) == float(traces[1]) != float(traces[2])


# --------------------------------------------------------------------------- Avalanche's own


class Chain(nn.Module):
    """Layers with one input and one output: their Fisher matrices have only a diagonal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        logit = self.layers(x)
        return torch.cat([torch.zeros_like(logit), logit], dim=1)


def scalar_stream(tasks: int = 3) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(tasks):
        x = torch.randn(10, 1, generator=generator, dtype=torch.float64)
        data = torch.utils.data.TensorDataset(x, (x[:, 0] + 0.3 > 0).long())
        data.targets = data.tensors[1].tolist()
        yield benchmark_from_datasets(train=[as_classification_dataset(data)]).train_stream[0]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"mode": "separate", "update": "loss"}, {"mode": "separate"}),
        ({"update": "loss"}, {"mode": "online", "decay_factor": 1.0}),
        ({"update": "gradient", "decay": 0.5}, {"mode": "online", "decay_factor": 0.5}),
    ],
)
def test_is_avalanches_own_where_that_is_exact(
    ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """With batches of one example theirs is the empirical Fisher matrix; and λ is twice theirs."""
    plugins = [
        exact_plugin(6.0, fisher_type="empirical", **ours),
        EWCPlugin(3.0, **theirs),
        EWCPlugin(6.0, **theirs),
    ]
    found = []
    for plugin in plugins:
        model = Chain()
        strategy = Naive(
            model=model, optimizer=SGD(model.parameters(), lr=0.1), criterion=CE, train_mb_size=1,
            train_epochs=3, plugins=[plugin], evaluator=None,
        )  # fmt: skip
        for experience in scalar_stream():
            strategy.train(experience, shuffle=False)
        found.append(flat(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)
    assert (found[0] - found[2]).abs().max() > 1e-3
