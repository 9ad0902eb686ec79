"""The plugin beside others: the order in which they are listed must not matter."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import permutations
from typing import Any

import pytest
import torch
from avalanche.benchmarks import dataset_benchmark
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import (
    EarlyStoppingPlugin,
    EvaluationPlugin,
    EWCPlugin,
    LRSchedulerPlugin,
    LwFPlugin,
    MASPlugin,
    ReplayPlugin,
)
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import TensorDataset

from tests.helpers.avalanche_cases import plugin_of
from tests.helpers.avalanche_training import CE, dataset, domain_benchmark, flat, net
from tests.helpers.exact import exact_penalty
from tests.helpers.exact_plugin import exact_plugin

TASKS, EPOCHS, NORM, LR, GAMMA, LAMBDA = 3, 2, 0.4, 0.05, 0.5, 8.0
UPDATES = ["rotated", "tangent", "gradient", "loss"]

pytestmark = pytest.mark.filterwarnings("ignore:Metric Top1_Acc_Stream used by the EarlyStopping")


class ClipPlugin(SupervisedPlugin):
    """Gradient clipping, as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.clipped = 0

    def before_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        norm = clip_grad_norm_(strategy.model.parameters(), NORM)
        self.clipped += int(norm > NORM)


def optimizer_for(update: str, model: nn.Module, every: int = 1) -> Optimizer:
    """One with averages where they are in an eigenbasis."""
    if update == "rotated" and every == 1:
        return Adam(model.parameters(), lr=LR)
    return SGD(model.parameters(), lr=LR, momentum=0.5)


class Run:
    """A strategy with plugins by name, in the order given."""

    def __init__(
        self,
        names: Sequence[str],
        update: str,
        epochs: int = EPOCHS,
        tasks: int = TASKS,
        **options: Any,
    ) -> None:
        self.tasks = tasks
        self.model = net(dropout=0.0).double()
        optimizer = optimizer_for(update, self.model, options.get("every", 1))
        self.plugins: dict[str, Any] = {
            "ewc": exact_plugin(LAMBDA, update=update, seed=5, **options),
            "clip": ClipPlugin(),
            "schedule": LRSchedulerPlugin(ExponentialLR(optimizer, GAMMA)),
            "lwf": LwFPlugin(alpha=1.0),
            "replay": ReplayPlugin(mem_size=8),
            "stop": EarlyStoppingPlugin(1, "test_stream"),
            "theirs": EWCPlugin(0.5),
            "mas": MASPlugin(),
        }
        watch = "stop" in names
        evaluator = EvaluationPlugin(accuracy_metrics(stream=True)) if watch else None
        self.strategy = Naive(
            model=self.model, optimizer=optimizer, criterion=CE, train_mb_size=8, eval_mb_size=24,
            train_epochs=epochs, plugins=[self.plugins[name] for name in names],
            evaluator=evaluator, eval_every=1 if watch else -1,
        )  # fmt: skip

    def __iter__(self) -> Iterator[int]:
        """Train on task after task."""
        benchmark = double_benchmark()
        torch.manual_seed(9)
        for t, experience in enumerate(benchmark.train_stream[: self.tasks]):
            self.strategy.train(experience, eval_streams=[benchmark.test_stream])
            yield t

    def weights(self) -> Tensor:
        assert len(list(self)) == self.tasks
        return flat(self.model)


def double_dataset(seed: int) -> TensorDataset:
    x, y = dataset(seed).tensors
    data = TensorDataset(x.double(), y)
    data.targets = y.tolist()
    return data


def double_benchmark() -> Any:
    """With task labels, which `LwFPlugin` wants to see; they are all 0."""
    streams = [double_dataset(seed) for seed in range(TASKS)]
    return dataset_benchmark(streams, streams)


def orders(names: Sequence[str], start: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Both directions from a start: any two in both orders."""
    order = (*names[start:], *names[:start])
    return order, order[::-1]


@cache
def alone(update: str) -> Tensor:
    return Run(["ewc"], update).weights()


def spread(names: Sequence[str], update: str, **options: Any) -> float:
    """How far the parameters of two orders are from each other; starts go round among updates."""
    start = UPDATES.index(update) % len(names)
    one, two = (Run(order, update, tasks=2, **options).weights() for order in orders(names, start))
    return float((one - two).abs().max())


# --------------------------------------------------------------------------- every order


@pytest.mark.parametrize(
    ("update", "others"),
    [
        ("loss", ["lwf", "clip", "schedule"]),
        ("tangent", ["lwf", "replay"]),
        ("rotated", ["lwf", "clip", "schedule"]),
    ],
)
def test_order_of_plugins_does_not_matter(update: str, others: list[str]) -> None:
    """Loss terms are added in other orders, which rounds differently; nothing else differs."""
    assert spread(["ewc", *others], update) < 1e-12


@pytest.mark.parametrize(
    ("names", "update"),
    [
        *((["clip", "schedule"], update) for update in UPDATES),
        (["replay", "clip"], "loss"),
        *((["replay", "stop"], update) for update in ("tangent", "gradient")),
    ],
)
def test_order_does_not_matter_bit_for_bit(names: list[str], update: str) -> None:
    """Without a third term in the loss there is but one way to round."""
    assert spread(["ewc", *names], update) == 0.0


@pytest.mark.parametrize("update", UPDATES)
def test_order_beside_early_stopping(update: str) -> None:
    assert spread(["ewc", "stop", "lwf"], update, epochs=6) < 1e-12


@pytest.mark.parametrize(
    ("names", "update"),
    [(["lwf", "stop"], "tangent"), (["theirs"], "rotated"), (["mas"], "tangent")],
)
def test_order_with_steps_that_are_left_over(names: list[str], update: str) -> None:
    """Three steps an epoch, after each of which they are flushed."""
    assert spread(["ewc", *names], update, every=4) < 1e-12


@pytest.mark.parametrize("update", ["loss", "rotated"])
def test_other_regularizers(update: str) -> None:
    """Theirs estimate in `after_training_exp` too, and change gradients and modes there."""
    assert spread(["ewc", "theirs", "mas"], update) < 1e-12


@pytest.mark.parametrize(
    ("name", "update"),
    list(
        zip(
            ["clip", "schedule", "lwf", "replay", "theirs", "mas"],
            itertools.cycle(UPDATES),
            strict=False,
        )
    ),
)
def test_every_plugin_has_an_effect(name: str, update: str) -> None:
    """Guards the tests above against plugins that do nothing."""
    assert (Run(["ewc", name], update).weights() - alone(update)).abs().max() > 1e-4


# --------------------------------------------------------------------------- by hand


@cache
def by_hand(update: str, *, clip_penalty: bool = False) -> nn.Module:
    """A plain loop with a schedule, clipping and the penalty."""
    model, penalty = net(dropout=0.0), exact_penalty(LAMBDA, seed=5)
    optimizer = optimizer_for(update, model)
    if update != "loss":
        penalty.attach(optimizer, model, update)
    for t in range(TASKS):
        x, y = dataset(t).tensors
        penalty.current_num_data, parts = len(x), torch.arange(24).split(8)
        for epoch in range(EPOCHS):
            optimizer.param_groups[0]["lr"] = LR * GAMMA**epoch
            for rows in parts:
                optimizer.zero_grad()
                loss = CE(model(x[rows]), y[rows])
                (loss + penalty(model) if clip_penalty else loss).backward()
                clip_grad_norm_(model.parameters(), NORM)
                if update == "loss" and not clip_penalty and penalty.num_tasks > 0:
                    penalty(model).backward()
                optimizer.step()
        penalty.consolidate(model, CE, [(x[rows], y[rows]) for rows in parts])
    return model


@pytest.mark.parametrize(
    ("update", "order"),
    [
        (update, order)
        for n, update in enumerate(UPDATES)
        for order in list(permutations(["ewc", "clip", "schedule"]))[n % 3 :: 3]
    ],
)
def test_is_the_same_as_a_loop_written_by_hand(update: str, order: tuple[str, ...]) -> None:
    """Bit for bit: what is clipped is the gradient of the loss, with the penalty if it is there."""
    run = Run(order, update)
    run.model.float()
    for experience in domain_benchmark(TASKS).train_stream:
        run.strategy.train(experience, shuffle=False)
    expected = by_hand(update, clip_penalty=update == "loss")
    assert torch.equal(flat(run.model), flat(expected))
    assert run.plugins["clip"].clipped > 0


def test_clipping_the_loss_alone_is_something_else() -> None:
    """Guards the test above."""
    difference = flat(by_hand("loss")) - flat(by_hand("loss", clip_penalty=True))
    assert difference.abs().max() > 1e-4


# --------------------------------------------------------------------------- the snapshot


@pytest.mark.parametrize(
    ("update", "order"),
    [
        (update, order)
        for n, update in enumerate(UPDATES)
        for order in list(permutations(["ewc", "stop", "lwf"]))[n % 3 :: 3]
    ],
)
def test_snapshot_is_taken_at_the_restored_weights(update: str, order: tuple[str, ...]) -> None:
    """Early stopping goes back to the best epoch; anchor and teacher are those weights."""
    run = Run(order, update, epochs=20)
    for t in run:
        penalty, best = run.plugins["ewc"].penalty, _restored(run, t)
        assert _equal(best, penalty.terms[-1].anchor)
        assert _equal(best, run.plugins["lwf"].lwf.prev_model.state_dict())
        assert penalty(run.model).item() == 0.0


def _restored(run: Run, t: int) -> dict[str, Tensor]:
    """The weights that early stopping has gone back to, before the last of all epochs."""
    assert run.strategy.clock.train_iterations < 3 * run.strategy.train_epochs * (t + 1)
    best: dict[str, Tensor] = run.plugins["stop"].best_state
    assert _equal(run.model.state_dict(), best)
    return best


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("update", "every", "order"),
    [
        ("tangent", 4, ["ewc", "stop"]),
        ("tangent", 5, ["stop", "ewc"]),
        ("rotated", 4, ["stop", "ewc"]),
        ("rotated", 5, ["ewc", "stop"]),
    ],
)
def test_steps_do_not_move_restored_weights(update: str, every: int, order: list[str]) -> None:
    """The steps for which one is left over have been taken back."""
    run = Run(order, update, epochs=20, every=every)
    for t in run:
        assert _equal(_restored(run, t), run.plugins["ewc"].penalty.terms[-1].anchor)


@pytest.mark.parametrize(
    "order", list(permutations(["ewc", "replay", "theirs"]))[::2], ids="-".join
)
def test_snapshot_is_of_the_experience_alone(order: tuple[str, ...]) -> None:
    """Not of what is replayed, and not in the order in which it was trained."""
    run = Run(order, "loss", mode="separate")
    for t in run:
        x, y = double_dataset(t).tensors
        penalty = exact_penalty(LAMBDA, "separate", seed=5 + t)
        penalty.consolidate(
            run.model, CE, [(x[rows], y[rows]) for rows in torch.arange(24).split(8)]
        )
        found = plugin_of(run.strategy).penalty.terms[t].operator
        assert found.num_data == 24
        expected = penalty.terms[0].operator
        for one, other in zip(found.blocks, expected.blocks, strict=True):
            torch.testing.assert_close(one.eigenvalues, other.eigenvalues, rtol=1e-12, atol=0)


# --------------------------------------------------------------------------- two of ours


def test_two_plugins_share_a_strength() -> None:
    """λ/2 and λ/2 are λ, bit for bit but for rounding."""
    runs = [Run(["ewc"], "gradient"), Run([], "gradient")]
    halves = [exact_plugin(LAMBDA / 2, update=u, seed=5) for u in ("gradient", "loss")]
    runs[1].strategy.plugins[:0] = halves
    one, two = (run.weights() for run in runs)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_two_plugins_share_a_model() -> None:
    """One protects the first layer, the other the last, and each knows its own."""
    whole = Run(["ewc"], "gradient")
    parts = Run([], "gradient")
    patterns = {"gradient": ["0.*"], "loss": ["3.*"]}
    parts.strategy.plugins[:0] = [
        exact_plugin(LAMBDA, update=u, seed=5, include=p) for u, p in patterns.items()
    ]
    torch.testing.assert_close(whole.weights(), parts.weights(), rtol=0, atol=1e-12)


def test_two_plugins_in_one_optimizer_are_refused() -> None:
    run = Run(["ewc"], "rotated")
    run.strategy.plugins.insert(0, exact_plugin(LAMBDA))
    with pytest.raises(ValueError, match=r"already has a penalty attached; .* penalty to the loss"):
        run.weights()


@pytest.mark.parametrize("update", UPDATES)
def test_plugin_goes_on_in_another_strategy(update: str) -> None:
    """With the same model it is the same run."""
    first, whole = Run(["ewc"], update), Run(["ewc"], update)
    experiences = double_benchmark().train_stream
    for experience in experiences:
        whole.strategy.train(experience, shuffle=False, reset_optimizer_state=True)
    for experience in experiences:
        optimizer = optimizer_for(update, first.model)
        strategy = Naive(
            model=first.model, optimizer=optimizer, criterion=CE, train_mb_size=8,
            train_epochs=EPOCHS, plugins=[first.plugins["ewc"]], evaluator=None,
        )  # fmt: skip
        strategy.train(experience, shuffle=False)
    assert torch.equal(flat(first.model), flat(whole.model))


@pytest.mark.parametrize("update", UPDATES)
def test_plugin_in_a_strategy_with_another_model(update: str) -> None:
    """A model whose parameters are not those that were consolidated is refused by name."""
    run = Run(["ewc"], update)
    run.weights()
    other = nn.Sequential(nn.Linear(6, 4)).double()
    optimizer = optimizer_for(update, other)
    before = copy.deepcopy(plugin_of(run.strategy).state_dict())
    strategy = Naive(
        model=other, optimizer=optimizer, criterion=CE, train_mb_size=8,
        plugins=[plugin_of(run.strategy)], evaluator=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"'(0|3)\.(weight|bias)'"):
        strategy.train(double_benchmark().train_stream[0])
    after = plugin_of(run.strategy).state_dict()
    assert [k for k, v in before.items() if isinstance(v, Tensor) and not v.equal(after[k])] == []


@pytest.mark.parametrize("granularity", ["epoch", "iteration"])
@pytest.mark.parametrize("every", [1, 4])
def test_schedules_by_iteration(every: int, granularity: Any) -> None:
    """Every step counts with the rate it was made with, wherever the plugins stand."""
    runs = []
    for order in permutations(["ewc", "schedule"]):
        run = Run([], "rotated", every=every)
        plugins = {
            "ewc": exact_plugin(LAMBDA, every=every, seed=5),
            "schedule": LRSchedulerPlugin(
                ExponentialLR(run.strategy.optimizer, 0.8), step_granularity=granularity
            ),
        }
        run.strategy.plugins[:0] = [plugins[name] for name in order]
        runs.append(run.weights())
    assert torch.equal(*runs)
