"""The examples that a task is remembered by, and how a model sees them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from benchmarks.avalanche_names import avalanche_forward

BATCH_SIZE = 256
DRAWING, LABELLING = 0, 1


@dataclass(frozen=True)
class Batch:
    """Examples without their classes: all methods take those from the model.

    Attributes:
        inputs: ``[n, ...]``.
        task_labels: ``[n]``, or None where the data have none.
    """

    inputs: Tensor
    task_labels: Tensor | None


class Examples:
    """The examples of an experience, or some drawn at random, in batches and always in one order.

    The global random state is not used.
    """

    def __init__(self, strategy: Any, *, samples: int | None, seed: int, task: int) -> None:
        """Draw the examples.

        Args:
            strategy: The Avalanche strategy, whose experience is the task.
            samples: How many; None for all, as for numbers that are larger.
            seed: Seed of the run.
            task: Number of the task, from 0.
        """
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
            yield Batch(batch[0].to(self._device), labels)


def make_generator(seed: int, task: int, stream: int) -> torch.Generator:
    """Make a generator on the CPU for one purpose in one task.

    Args:
        seed: Seed of the run.
        task: Number of the task, from 0.
        stream: ``DRAWING`` or ``LABELLING``.
    """
    return torch.Generator().manual_seed((2 * (seed * 1_000_003 + task) + stream) % 2**63)


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Return a model's outputs ``[n, C]`` for some examples.

    Raises:
        ValueError: If the outputs are not one vector of finite logits for each example.
    """
    outputs = call(model, batch.inputs, batch.task_labels)
    if outputs.ndim != 2 or len(outputs) != len(batch.inputs):
        raise ValueError(f"the model's outputs are {list(outputs.shape)}; expected [examples, C]")
    if not outputs.isfinite().all():
        raise ValueError(
            "the model's outputs are not finite: training has diverged, which a smaller strength "
            "or learning rate may prevent"
        )
    return outputs


def call(model: nn.Module, inputs: Tensor, task_labels: Tensor | None) -> Tensor:
    """Call a model, with the task labels if it takes any."""
    outputs: Tensor = avalanche_forward(model, inputs, task_labels)
    return outputs


def sampled_gradients(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradients of cross-entropy for labels drawn from the model's own predictions.

    Args:
        logits: ``[n, C]``.
        generator: Of the labels; on the CPU, whatever the device, so that it is the same for all.

    Returns:
        ``p - e_y`` for one label ``y`` of each example, ``[n, C]``.
    """
    probabilities = logits.detach().softmax(1)
    labels = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(logits.device)
    return probabilities.scatter_add(1, labels, -torch.ones_like(probabilities[:, :1]))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and leave it and the random state as they were.

    Gradients are computed inside, whether or not they are outside; to leave ``.grad`` alone is up
    to those who compute them.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
