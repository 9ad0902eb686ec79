"""Tasks whose examples have several loss terms, in Avalanche: tokens, ignored labels, elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import make_avalanche_dataset
from avalanche.core import SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from rotate_ewc import EKFACPenalty
from rotate_ewc.integrations.avalanche import RotatedEWCPlugin
from tests.helpers.avalanche_training import flat
from tests.helpers.exact import exact_penalty
from tests.helpers.exact_plugin import exact_plugin

LAMBDA, EXAMPLES, SIZE = 3.0, 20, 4
SUMMED = nn.CrossEntropyLoss(reduction="sum")


class Tokens(nn.Module):
    """Classes second, as cross-entropy has them."""

    def __init__(self) -> None:
        """Make its one layer."""
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Classify the tokens of `[N, T, 4]`."""
        return self.layer(x).mT


def task(seed: int, tokens: int, ignored: float = 0.0) -> tuple[Tensor, Tensor]:
    """Sequences with labels of which a part is ignored, never those of the first tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(EXAMPLES, tokens, 4, generator=generator)
    y = torch.randint(3, (EXAMPLES, tokens), generator=generator)
    y[:, 1:][torch.rand(y[:, 1:].shape, generator=generator) < ignored] = -100
    return x, y


class Watch(SupervisedPlugin):
    """Notes how many terms the penalty takes the present task to have, in every step."""

    def __init__(self, penalty: EKFACPenalty) -> None:
        """Watch a penalty."""
        super().__init__()
        self.penalty = penalty
        self.seen: list[float] = []

    def before_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Note it."""
        self.seen.append(self.penalty.current_num_loss_terms)


def train(
    tasks: list[tuple[Tensor, Tensor]],
    loss: nn.Module,
    model: nn.Module,
    epochs: int = 2,
    **options: Any,
) -> tuple[RotatedEWCPlugin, list[float]]:
    """Train on tasks in a row; return the plugin, and the numbers of terms seen in the last."""
    data = [make_avalanche_dataset(TensorDataset(*each)) for each in tasks]
    plugin = exact_plugin(LAMBDA, **options)
    watch = Watch(plugin.penalty)
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01), criterion=loss,
        train_mb_size=SIZE, train_epochs=epochs, plugins=[plugin, watch], evaluator=None,
    )  # fmt: skip
    for experience in benchmark_from_datasets(train=data, test=data).train_stream:
        watch.seen.clear()
        strategy.train(experience, shuffle=False)
    return plugin, watch.seen


@pytest.mark.parametrize("update", ["rotated", "tangent", "gradient", "loss"])
def test_terms_of_the_present_task_are_counted(update: str) -> None:
    """Sequences of another length than before, parts of which are ignored."""
    second = task(1, 6, ignored=0.5)
    _, seen = train([task(0, 50), second], nn.CrossEntropyLoss(), Tokens(), update=update)
    counts = [int((y >= 0).sum()) for y in second[1].split(SIZE)]
    # Known of 1, 2, 4 minibatches, and of all five after the first epoch.
    means = [sum(counts[:k]) / (k * SIZE) for k in (1, 2, 2, 4, 4)]
    assert seen == pytest.approx([EXAMPLES * m for m in means] + [sum(counts)] * 5, rel=1e-6)
    assert len(set(seen)) > 2


def test_tasks_weigh_the_same_under_mean_and_sum() -> None:
    """40 and 2 tokens: the summed loss has the numbers inside, the mean has them beside."""
    traces = {}
    for reduction in ("mean", "sum"):
        loss, model = nn.CrossEntropyLoss(reduction=reduction), Tokens()
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        # Without training both are at the same place.
        plugin, _ = train(
            [task(0, 40), task(1, 2)], loss, model, epochs=0, mode="separate", update="loss",
            fisher_type="type2",
        )  # fmt: skip
        terms = plugin.penalty.terms
        traces[reduction] = [t.weight * float(t.operator.trace) for t in terms]
    assert traces["mean"] == pytest.approx(traces["sum"], rel=1e-5)
    assert traces["mean"][0] / traces["mean"][1] == pytest.approx(20, rel=0.2)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss()], ids=["mse", "bce"])
def test_elements_of_outputs_are_terms(loss: nn.Module) -> None:
    """As many for every example, so that it is known from the first minibatch on."""
    generator = torch.Generator().manual_seed(0)
    tasks = [
        (
            torch.randn(EXAMPLES, 5, 4, generator=generator),
            torch.rand(EXAMPLES, 3, 5, generator=generator),
        )
        for _ in range(2)
    ]
    plugin, seen = train(tasks, loss, Tokens())
    assert seen == [EXAMPLES * 15] * 10
    assert plugin.penalty.current_num_data == EXAMPLES


def test_minibatches_of_which_nothing_counts() -> None:
    """Until something does, examples are taken to be like those of the task before."""
    x, y = task(1, 6)
    y[: 2 * SIZE] = -100
    _, seen = train([task(0, 3), (x, y)], SUMMED, Tokens())
    kept = int((y >= 0).sum())
    after_four = EXAMPLES * int((y[: 4 * SIZE] >= 0).sum()) / (4 * SIZE)
    assert seen == pytest.approx([EXAMPLES * 3] * 3 + [after_four] * 2 + [kept] * 5)


def test_is_the_same_as_by_hand() -> None:
    """With the number of terms set by hand, step by step."""
    tasks = [task(0, 7), task(1, 2, ignored=0.3)]
    loss, trained = nn.CrossEntropyLoss(), Tokens()
    _, seen = train(tasks, loss, trained, update="loss", seed=5)
    model, penalty = Tokens(), exact_penalty(LAMBDA, seed=5)
    for number, (x, y) in enumerate(tasks):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(10):
            rows = slice(step % 5 * SIZE, (step % 5 + 1) * SIZE)
            if number:
                penalty.current_num_loss_terms = seen[step]
            optimizer.zero_grad()
            (loss(model(x[rows]), y[rows]) + penalty(model)).backward()
            optimizer.step()
        penalty.consolidate(model, loss, list(zip(x.split(SIZE), y.split(SIZE), strict=True)))
    assert torch.equal(flat(trained), flat(model))


def test_counting_ends_with_the_first_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not done before there is a penalty."""
    from rotate_ewc.integrations.avalanche.loss_terms import LossTerms

    calls = []
    count = LossTerms.add
    monkeypatch.setattr(LossTerms, "add", lambda *arguments: calls.append(1) or count(*arguments))
    train([task(0, 3), task(1, 2)], nn.CrossEntropyLoss(), Tokens(), epochs=4)
    assert len(calls) == 5
