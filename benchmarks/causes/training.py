"""One run: a stream of permuted tasks, learned with one optimizer under one curvature."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from benchmarks.causes.curvatures import OldTasks, exact_penalty, snapshot_penalty
from benchmarks.evaluation import accuracy
from benchmarks.models import multilayer_perceptron
from rotate_ewc import EKFACPenalty, RotatedAdam

OPTIMIZERS = {
    "adam": "Adam, with the penalty in the loss",
    "rotated-adam": "Adam in the eigenbasis of the snapshots, with their proximal step (where the "
    "curvature is exact, its penalty is in the loss, and the snapshots lend the basis only)",
}


@dataclass(frozen=True)
class Settings:
    """What all runs have in common.

    Attributes:
        epochs: Passes over the images of each task.
        batch_size: Images per training step.
        learning_rate: At the beginning of each task; it falls to zero in a straight line.
        hidden: Widths of the hidden layers.
        strength: λ.
        snapshot_examples: Images for each snapshot.
        exact_examples: Old images for each step under the exact curvature.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    hidden: tuple[int, ...]
    strength: float
    snapshot_examples: int
    exact_examples: int


class Run:
    """A network, its optimizer and its penalty, task after task."""

    def __init__(
        self, old: OldTasks, settings: Settings, *, optimizer: str, curvature: str, seed: int
    ) -> None:
        """Start with an untrained network.

        Args:
            old: The stream and its images.
            settings: The rest.
            optimizer: A key of :data:`OPTIMIZERS`.
            curvature: A key of :data:`benchmarks.causes.curvatures.CURVATURES`.
            seed: Seed of PyTorch's global random state, which is set.
        """
        torch.manual_seed(seed)
        self._old, self._settings, self._seed = old, settings, seed
        self._rotates, self._curvature = optimizer == "rotated-adam", curvature
        scenario = old.scenario
        self.model = multilayer_perceptron(scenario.features, settings.hidden, scenario.classes)
        self._penalty = EKFACPenalty(self._snapshot_strength, seed=seed)
        self._optimizer = self._make_optimizer()
        self._anchor: dict[str, Tensor] = {}

    def learn(self, task: int, tell: Callable[[], object]) -> None:
        """Train on a task, and look back at it.

        Args:
            task: Its number, from 0; tasks come in order.
            tell: Called after every step.
        """
        settings, images = self._settings, self._old.images
        permuted = images[:, self._old.scenario.permutations[task]]
        orders = [torch.randperm(len(images)) for _ in range(settings.epochs)]
        steps = [rows for order in orders for rows in torch.split(order, settings.batch_size)]
        for done, rows in enumerate(steps):
            for group in self._optimizer.param_groups:
                group["lr"] = settings.learning_rate * (1 - done / len(steps))
            logits = self.model(permuted[rows])
            loss = nn.functional.cross_entropy(logits, self._old.labels[rows])
            self._optimizer.zero_grad()
            torch.autograd.backward(loss + self._penalty_in_loss(task))
            self._optimizer.step()
            tell()
        self._look_back(task)

    def accuracies(self, tasks: int) -> list[float]:
        """Accuracy on the held-out images of the first tasks."""
        scenario = self._old.scenario
        cpu = torch.device("cpu")
        return [accuracy(self.model, *scenario.test_set(task), cpu) for task in range(tasks)]

    @property
    def _snapshot_strength(self) -> float:
        """Snapshots that only lend their basis do not pull."""
        return 0.0 if self._curvature == "exact" else self._settings.strength

    def _make_optimizer(self) -> Optimizer:
        rate = self._settings.learning_rate
        if self._rotates:
            return RotatedAdam(self.model, self._penalty, lr=rate)
        return Adam(self.model.parameters(), lr=rate)

    def _penalty_in_loss(self, tasks: int) -> Tensor:
        if tasks == 0:
            return torch.zeros(())
        if self._curvature == "exact":
            images = self._old.sample(tasks, self._settings.exact_examples)
            return self._settings.strength * exact_penalty(self.model, self._anchor, images, tasks)
        return torch.zeros(()) if self._rotates else self._penalty(self.model)

    def _look_back(self, task: int) -> None:
        """Take the snapshots that the curvature asks for."""
        named = self.model.named_parameters()
        self._anchor = {name: parameter.detach().clone() for name, parameter in named}
        examples = self._settings.snapshot_examples
        if self._curvature == "stored":
            batches = self._old.batches(task, examples)
            self._penalty.consolidate(self.model, nn.CrossEntropyLoss(), batches)
        elif self._curvature == "refreshed" or self._rotates:
            every = [self._old.batches(old, examples) for old in range(task + 1)]
            strength = self._snapshot_strength
            self._penalty = snapshot_penalty(strength, self._seed, self.model, every)
            if self._rotates:
                self._optimizer = self._make_optimizer()
