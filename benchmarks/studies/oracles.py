"""Penalties that differ in what they know of the old tasks, and training under them.

The first is what the package does. The other two are oracles: they keep the old images, as no
method for continual learning may, to show what is lost by not having them.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.optim import Adam

from benchmarks.scenarios import PermutedImages
from benchmarks.speed.networks import perceptron
from benchmarks.studies.causes import Options
from rotate_ewc import EKFACPenalty

SNAPSHOT_BATCH = 500


@dataclass(frozen=True)
class OldTasks:
    """The images of tasks that are over."""

    scenario: PermutedImages  # the stream
    images: Tensor  # training images before permutation ``[N, D]``
    labels: Tensor  # their classes ``[N]``

    def batches(self, task: int, examples: int) -> list[tuple[Tensor, Tensor]]:
        """Random examples of one task, in batches."""
        order = self.scenario.permutations[task]
        drawn = torch.split(torch.randperm(len(self.images))[:examples], SNAPSHOT_BATCH)
        return [(self.images[rows][:, order], self.labels[rows]) for rows in drawn]

    def sample(self, tasks: int, examples: int) -> Tensor:
        """Random images, each of a random one of the first tasks."""
        orders = self.scenario.permutations[torch.randint(tasks, (examples,))]
        return self.images[torch.randint(len(self.images), (examples, 1)), orders]


def exact_penalty(
    model: nn.Module, anchor: Mapping[str, Tensor], images: Tensor, tasks: int
) -> Tensor:
    """Half the Gauss-Newton form of the displacement from an anchor, summed over tasks.

    With J the derivative of the logits at the anchor and H = diag(p) - ppᵀ, that is
    ``½ · tasks · mean of (J Δ)ᵀ H (J Δ)`` over images of all tasks, differentiable in Δ.
    """
    displacement = {name: p - anchor[name] for name, p in model.named_parameters()}

    def logits_at(parameters: dict[str, Tensor]) -> Tensor:
        logits: Tensor = functional_call(model, parameters, (images,))
        return logits

    with warnings.catch_warnings():
        # PyTorch's own rules for forward-mode derivatives are made with what it deprecates.
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
        logits, change, *_ = jvp(logits_at, (dict(anchor),), (displacement,))
    probabilities = logits.detach().softmax(dim=1)
    mean_change = (probabilities * change).sum(dim=1)
    squares = (probabilities * change.square()).sum(dim=1) - mean_change.square()
    mean: Tensor = squares.mean()
    return 0.5 * tasks * mean


class Run:
    """A network, its optimizer and its penalty, task after task."""

    def __init__(
        self, old: OldTasks, options: Options, *, update: str, curvature: str, seed: int
    ) -> None:
        """Start with an untrained network; PyTorch's global random state is set."""
        torch.manual_seed(seed)
        self._old, self._options, self._seed = old, options, seed
        self._attaches, self._curvature = update == "rotated", curvature
        scenario = old.scenario
        self.model = perceptron(scenario.features, *options.hidden, scenario.classes)
        # Snapshots that only lend their basis do not pull.
        self._strength = 0.0 if curvature == "exact" else options.ewc_lambda
        self._penalty = EKFACPenalty(self._strength, seed=seed)
        self._optimizer = self._make_optimizer()
        self._anchor: dict[str, Tensor] = {}

    def learn(self, task: int, tell: Callable[[], object]) -> None:
        """Train on the next task, calling ``tell`` after every step, and look back at it."""
        options, images = self._options, self._old.images
        permuted = images[:, self._old.scenario.permutations[task]]
        orders = [torch.randperm(len(images)) for _ in range(options.epochs)]
        steps = [rows for order in orders for rows in torch.split(order, options.batch_size)]
        for done, rows in enumerate(steps):
            for group in self._optimizer.param_groups:
                group["lr"] = options.learning_rate * (1 - done / len(steps))
            logits = self.model(permuted[rows])
            loss = nn.functional.cross_entropy(logits, self._old.labels[rows])
            self._optimizer.zero_grad()
            torch.autograd.backward(loss + self._penalty_in_loss(task))
            self._optimizer.step()
            tell()
        self._look_back(task)

    def _make_optimizer(self) -> Adam:
        optimizer = Adam(self.model.parameters(), lr=self._options.learning_rate)
        if self._attaches:
            self._penalty.attach(optimizer, self.model)
        return optimizer

    def _penalty_in_loss(self, tasks: int) -> Tensor:
        if tasks == 0:
            return torch.zeros(())
        if self._curvature == "exact":
            images = self._old.sample(tasks, self._options.exact_samples)
            return self._options.ewc_lambda * exact_penalty(self.model, self._anchor, images, tasks)
        return torch.zeros(()) if self._attaches else self._penalty(self.model)

    def _look_back(self, task: int) -> None:
        """Take the snapshots that the curvature asks for."""
        named = self.model.named_parameters()
        self._anchor = {name: parameter.detach().clone() for name, parameter in named}
        examples = self._options.fisher_samples
        if self._curvature == "stored":
            batches = self._old.batches(task, examples)
            self._penalty.consolidate(self.model, nn.CrossEntropyLoss(), batches)
        elif self._curvature == "refreshed" or self._attaches:
            every = [self._old.batches(old, examples) for old in range(task + 1)]
            self._penalty = EKFACPenalty(self._strength, seed=self._seed)
            for batches in every:
                self._penalty.consolidate(self.model, nn.CrossEntropyLoss(), batches)
            if self._attaches:
                self._optimizer = self._make_optimizer()
