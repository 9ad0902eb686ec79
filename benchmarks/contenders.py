"""What is timed to see the cost of a penalty: it and all that it is part of.

Costs depend on shapes alone, so the images are noise, and training a task is a small random move.
"""

import copy
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam
from tqdm import tqdm

from benchmarks.models import multilayer_perceptron
from rotate_ewc import EKFACPenalty, RotatedAdam

FEATURES = 784
CLASSES = 10
BATCH_SIZE = 250
MOVE = 0.01

MODES = ("merged", "separate")
PENALTY, TRAINING_STEP, ROTATED_STEP = "penalty", "training step", "RotatedAdam step"
QUANTITIES = (PENALTY, TRAINING_STEP, ROTATED_STEP)

CRITERION = nn.CrossEntropyLoss()

Batch = tuple[Tensor, Tensor]


class Contender(NamedTuple):
    """One thing that is timed.

    Attributes:
        quantity: One of :data:`QUANTITIES`.
        mode: One of :data:`MODES`; None without a penalty.
        tasks: Number of consolidated tasks.
    """

    quantity: str
    mode: str | None
    tasks: int


def random_batch() -> Batch:
    """Noise in place of images ``[B, D]``, and random classes ``[B]``."""
    return torch.randn(BATCH_SIZE, FEATURES), torch.randint(CLASSES, (BATCH_SIZE,))


def network(hidden: tuple[int, ...]) -> nn.Sequential:
    """The network that is trained."""
    return multilayer_perceptron(FEATURES, hidden, CLASSES)


def penalties(model: nn.Module, mode: str, tasks: Collection[int]) -> dict[int, EKFACPenalty]:
    """Consolidate random tasks, one after the other.

    Args:
        model: The network, whose parameters are moved after each task.
        mode: One of :data:`MODES`.
        tasks: Numbers of tasks.

    Returns:
        For each number, a copy of the penalty after so many tasks.
    """
    penalty = EKFACPenalty(mode=mode)
    kept = {}
    for done in tqdm(range(1, max(tasks) + 1), desc=mode, unit="task", disable=None):
        penalty.consolidate(model, CRITERION, [random_batch()])
        move(model)
        if done in tasks:
            kept[done] = copy.deepcopy(penalty)
    return kept


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Change all parameters a little."""
    for parameter in model.parameters():
        parameter.add_(MOVE * torch.randn_like(parameter))


def contenders(
    model: nn.Module, found: Iterable[EKFACPenalty]
) -> dict[Contender, Callable[[], object]]:
    """Make all that is timed of some penalties, and plain training.

    Args:
        model: The network; every contender has a copy of its own.
        found: Penalties of any mode and number of tasks.

    Returns:
        Functions that do the work once, those of the same quantity and mode together.
    """
    batch = random_batch()
    works: dict[Contender, Callable[[], object]] = {
        Contender(TRAINING_STEP, None, 0): _training_step(copy.deepcopy(model), None, batch)
    }
    for penalty in found:
        mode, tasks = penalty.mode, penalty.num_tasks
        own = [copy.deepcopy(model) for _ in QUANTITIES]
        works[Contender(PENALTY, mode, tasks)] = _value_and_gradient(own[0], penalty)
        works[Contender(TRAINING_STEP, mode, tasks)] = _training_step(own[1], penalty, batch)
        if mode == "merged":
            works[Contender(ROTATED_STEP, mode, tasks)] = _rotated_step(own[2], penalty, batch)
    return dict(sorted(works.items(), key=lambda item: (item[0].quantity, item[0].mode or "")))


def _value_and_gradient(model: nn.Module, penalty: EKFACPenalty) -> Callable[[], object]:
    """The penalty forward and backward."""
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(penalty(model), parameters)


def _training_step(
    model: nn.Module, penalty: EKFACPenalty | None, batch: Batch
) -> Callable[[], object]:
    """A whole step of Adam on the loss of a batch, with the penalty added to it if there is one."""
    optimizer = Adam(model.parameters())
    inputs, targets = batch

    def step() -> None:
        optimizer.zero_grad()
        loss = CRITERION(model(inputs), targets)
        if penalty is not None:
            loss = loss + penalty(model)
        loss.backward()
        optimizer.step()

    return step


def _rotated_step(model: nn.Module, penalty: EKFACPenalty, batch: Batch) -> Callable[[], object]:
    """The step of the optimizer that obeys the penalty; the gradient is there already."""
    inputs, targets = batch
    CRITERION(model(inputs), targets).backward()
    optimizer = RotatedAdam(model, penalty)
    return lambda: optimizer.step()
