"""What the baselines have in common: something quadratic that is estimated after every task."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from benchmarks.avalanche_names import SupervisedPlugin, avalanche_forward
from benchmarks.baselines.capture import Layer, Outer, pull_back, watched

BATCH_SIZE = 256
DRAWING, LABELLING = 0, 1


class EstimatingPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[misc, call-arg]
    """Looks at the examples of every task when it ends.

    Attributes:
        strength: What is searched.
        tasks: Number of tasks that are protected.
    """

    def __init__(self, strength: float, *, samples: int | None = None, seed: int = 0) -> None:
        """Take a strength ≥ 0, how many examples of a task to look at (None for all), a seed."""
        super().__init__()
        if not strength >= 0:
            raise ValueError(f"strength: got {strength}, expected at least 0")
        if samples is not None and samples < 1:
            raise ValueError(f"samples: got {samples}, expected at least 1, or None for all")
        self.strength = strength
        self.tasks = 0
        self._samples = samples
        self._seed = seed

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Protect the task that has been learned."""
        examples = Examples(strategy, samples=self._samples, seed=self._seed, task=self.tasks)
        self.consolidate(strategy, examples)
        self.tasks += 1

    @abstractmethod
    def consolidate(self, strategy: Any, examples: "Examples") -> None:
        """Estimate on the examples of a task, and anchor the weights of ``strategy.model``."""


class QuadraticPlugin(EstimatingPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Adds a penalty to the loss from the second task on, times λ, its strength."""

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Add the penalty to the loss."""
        if self.tasks > 0:
            strategy.loss = strategy.loss + self.penalty(strategy.model)

    @abstractmethod
    def penalty(self, model: nn.Module) -> Tensor:
        """Return the penalty, a scalar with a gradient."""


# Inputs ``[n, ...]``, and task labels ``[n]`` if the data have any; classes are the model's.
Batch = tuple[Tensor, Tensor | None]


class Examples:
    """The examples of an experience, or some drawn at random, in batches and always in one order.

    The global random state is not used.
    """

    def __init__(self, strategy: Any, *, samples: int | None, seed: int, task: int) -> None:
        """Draw so many examples of the strategy's experience; None for all."""
        dataset = strategy.experience.dataset.eval()
        self._collate = getattr(dataset, "collate_fn", None)
        if samples is not None and samples < len(dataset):
            generator = make_generator(seed, task, DRAWING)
            drawn = torch.randperm(len(dataset), generator=generator)[:samples]
            dataset = Subset(dataset, drawn.tolist())
        self._dataset = dataset
        self._device = strategy.device

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._dataset)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches, on the strategy's device."""
        loader: DataLoader[Any] = DataLoader(
            self._dataset,
            batch_size=BATCH_SIZE,
            collate_fn=self._collate,
            generator=torch.Generator(),  # or else the loader draws from the global one
        )
        for batch in loader:
            labels = batch[-1].to(self._device) if len(batch) > 2 else None
            yield batch[0].to(self._device), labels


def make_generator(seed: int, task: int, stream: int) -> torch.Generator:
    """Make a generator on the CPU for one task, ``DRAWING`` or ``LABELLING``."""
    return torch.Generator().manual_seed((2 * (seed * 1_000_003 + task) + stream) % 2**63)


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Return a model's outputs ``[n, C]``; ``ValueError`` if they are not finite."""
    outputs: Tensor = avalanche_forward(model, *batch)
    if not outputs.isfinite().all():
        raise ValueError(
            "the model's outputs are not finite: training has diverged, which a smaller strength "
            "or learning rate may prevent"
        )
    return outputs


def sampled_gradients(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``p - e_y``, ``[n, C]``, with a label ``y`` of each example drawn from ``p``."""
    probabilities = logits.detach().softmax(1)
    # On the CPU, so that labels are the same on all devices.
    labels = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(logits.device)
    return probabilities.scatter_add(1, labels, -torch.ones_like(probabilities[:, :1]))


def sampled_passes(
    model: nn.Module, layers: dict[str, Layer], examples: Examples, generator: torch.Generator
) -> Iterator[dict[str, Outer]]:
    """Yield the layers' inputs and gradients for each batch, with labels drawn from the model."""
    for batch in examples:
        with evaluating(model):
            with watched(layers) as calls:
                logits = forward(model, batch)
            outers = pull_back(layers, calls, logits, sampled_gradients(logits, generator))
        yield outers


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, with gradients, and back into the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(was_training)
