"""Three penalties that differ in what they know of the old tasks.

The first is what the package does. The other two are oracles: they keep the old images, as no
method for continual learning may, to show what is lost by not having them.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from benchmarks.scenarios import PermutedImages
from rotate_ewc import EKFACPenalty

SNAPSHOT_BATCH = 500
CURVATURES = {
    "stored": "snapshots taken when their tasks ended, and merged",
    "refreshed": "snapshots of all tasks taken anew, at the latest parameters, after every task",
    "exact": "the Gauss-Newton matrix of the whole network at the latest parameters, without "
    "blocks or Kronecker products, from a new sample of old images in every step",
}


@dataclass(frozen=True)
class OldTasks:
    """The images of tasks that are over.

    Attributes:
        scenario: The stream.
        images: Training images before permutation ``[N, D]``.
        labels: Their classes ``[N]``.
    """

    scenario: PermutedImages
    images: Tensor
    labels: Tensor

    def batches(self, task: int, examples: int) -> list[tuple[Tensor, Tensor]]:
        """Random examples of one task, in batches."""
        order = self.scenario.permutations[task]
        drawn = torch.split(torch.randperm(len(self.images))[:examples], SNAPSHOT_BATCH)
        return [(self.images[rows][:, order], self.labels[rows]) for rows in drawn]

    def sample(self, tasks: int, examples: int) -> Tensor:
        """Random images, each of a random one of the first tasks."""
        orders = self.scenario.permutations[torch.randint(tasks, (examples,))]
        return self.images[torch.randint(len(self.images), (examples, 1)), orders]


def snapshot_penalty(
    strength: float, seed: int, model: nn.Module, batches: Sequence[list[tuple[Tensor, Tensor]]]
) -> EKFACPenalty:
    """A penalty that has consolidated tasks at the parameters which the model has now."""
    penalty = EKFACPenalty(strength, seed=seed)
    for of_one_task in batches:
        penalty.consolidate(model, nn.CrossEntropyLoss(), of_one_task)
    return penalty


def exact_penalty(
    model: nn.Module, anchor: Mapping[str, Tensor], images: Tensor, tasks: int
) -> Tensor:
    """Half the Gauss-Newton form of the displacement from an anchor, summed over tasks.

    With J the derivative of the logits at the anchor and H = diag(p) - ppᵀ, that is
    ``½ · tasks · mean of (J Δ)ᵀ H (J Δ)`` over images of all tasks, differentiable in Δ.

    Args:
        model: The network.
        anchor: Its parameters after the last task, by name.
        images: Images of old tasks ``[n, D]``.
        tasks: Number of old tasks.

    Returns:
        A scalar.
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
