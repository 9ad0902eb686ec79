"""A model, a loss and data for each case; the data are noise, as costs depend on shapes alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.speed import names
from benchmarks.speed.networks import CLASSES, Transformer, convolutional, perceptron, residual

Batch = tuple[Tensor, Tensor]
# Does the work once with a seed for sampled labels, and returns the trace of the Fisher matrix of
# the mean loss, or None where there is no such thing.
Estimate = Callable[[int], float | None]
# From displacements of the parameters that every contender knows, in their order, to ½ dᵀ F d.
Form = Callable[[Sequence[Tensor]], Tensor]

SEED = 0
QUICK_EXAMPLES = 4
STEP_BATCH = 250
FEATURES = 784
IMAGE, GROUPS = (3, 32, 32), 8
WIDTH, BLOCKS, HEADS, LENGTH, VOCABULARY = 256, 4, 4, 128, 64
GPT_WIDTH, GPT_HEADS, GPT_VOCABULARY = 768, 12, 50_257


@dataclass(frozen=True)
class Attention:
    """The attention of a model, which is more than its layers' products."""

    blocks: int  # how often there is attention
    length: int  # number of tokens
    width: int  # numbers for each token, over all heads


@dataclass(frozen=True)
class Case:
    """What a workload is made from."""

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one input; for tokens, the length of a sequence
    examples: int
    batch: int
    classes: int = CLASSES
    attention: Attention | None = None  # with it, inputs are tokens, and all have a label
    left_out: tuple[str, ...] = ()  # modules that nobody is to estimate, by name

    def random_batch(self, examples: int) -> Batch:
        """Noise, and labels that have nothing to do with it."""
        if self.attention is None:
            inputs = torch.randn(examples, *self.shape)
            return inputs, torch.randint(self.classes, (examples,))
        tokens = torch.randint(self.classes, (2, examples, *self.shape))
        return tokens[0], tokens[1]


class InMemory(TensorDataset):
    """Tensors of which whole batches are taken at once, without collating single examples."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """A batch; a ``DataLoader`` calls this where it is there."""
        return tuple(tensor[indices] for tensor in self.tensors)

    @staticmethod
    def collate_fn(batch: Any) -> Any:
        """What is a batch already stays as it is."""
        return batch


@dataclass(frozen=True)
class Workload:
    """A model, a loss and data."""

    case: Case
    model: nn.Module
    criterion: nn.CrossEntropyLoss  # a mean over examples or tokens
    batches: list[Batch]

    @property
    def examples(self) -> int:
        """Number of examples."""
        return sum(len(inputs) for inputs, _ in self.batches)

    @property
    def batch_size(self) -> int:
        """Examples in a batch."""
        return len(self.batches[0][0])

    @property
    def labels_per_example(self) -> int:
        """Number of labels of one example: 1, or its number of tokens."""
        return self.batches[0][1][0].numel()

    @property
    def layers(self) -> list[nn.Module]:
        """All linear layers and convolutions."""
        return [m for m in self.model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]

    @property
    def known_layers(self) -> list[nn.Module]:
        """Those of them that every contender can estimate."""
        left_out = [self.model.get_submodule(name) for name in self.case.left_out]
        return [layer for layer in self.layers if layer not in left_out]

    @property
    def known_parameters(self) -> list[nn.Parameter]:
        """The parameters of these layers."""
        return [p for layer in self.known_layers for p in layer.parameters()]

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that are not frozen."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def freeze_other_parameters(self) -> None:
        """Let only the parameters that every contender knows have gradients."""
        self.model.requires_grad_(False)
        for parameter in self.known_parameters:
            parameter.requires_grad_(True)

    def beginning(self, examples: int) -> "Workload":
        """The same model with a single batch of the first few examples."""
        inputs, targets = self.batches[0]
        return replace(self, batches=[(inputs[:examples].clone(), targets[:examples].clone())])

    def dataset(self) -> InMemory:
        """All examples."""
        inputs, targets = zip(*self.batches, strict=True)
        return InMemory(torch.cat(inputs), torch.cat(targets))

    def loader(self) -> DataLoader[Any]:
        """The batches, in their order, for packages that want a ``DataLoader``."""
        dataset = self.dataset()
        return DataLoader(dataset, batch_size=self.batch_size, collate_fn=dataset.collate_fn)


def _mlp(*hidden: int) -> Case:
    return Case(partial(perceptron, FEATURES, *hidden, CLASSES), (FEATURES,), 10_000, 500)


CASES = {
    names.TINY_MLP: _mlp(100, 100),
    names.SMALL_MLP: _mlp(400, 400),
    names.LARGE_MLP: _mlp(1000, 1000),
    names.CNN: Case(convolutional, IMAGE, 2_000, 250),
    names.GROUP_NORM: Case(partial(residual, partial(nn.GroupNorm, GROUPS)), IMAGE, 512, 64),
    names.BATCH_NORM: Case(partial(residual, nn.BatchNorm2d), IMAGE, 512, 64),
    names.TRANSFORMER: Case(
        partial(Transformer, WIDTH, BLOCKS, HEADS, LENGTH, VOCABULARY),
        (LENGTH,),
        256,
        16,
        classes=VOCABULARY,
        attention=Attention(BLOCKS, LENGTH, WIDTH),
    ),
    names.LANGUAGE_MODEL: Case(
        partial(Transformer, GPT_WIDTH, BLOCKS, GPT_HEADS, LENGTH, GPT_VOCABULARY, tied=True),
        (LENGTH,),
        16,
        4,
        classes=GPT_VOCABULARY,
        attention=Attention(BLOCKS, LENGTH, GPT_WIDTH),
        # Its factor would have as many rows and columns as there are words.
        left_out=("head",),
    ),
}


def build(name: str, *, fraction: float = 1.0, quick: bool = False) -> Workload:
    """Make the workload of an estimation, its model in evaluation mode; always the same.

    ``fraction`` takes a part of the examples, in whole batches and at least one; ``quick`` takes
    only a few examples.
    """
    case = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = case.network().eval()
        batch = QUICK_EXAMPLES if quick else case.batch
        count = 1 if quick else max(1, round(fraction * case.examples / case.batch))
        batches = [case.random_batch(batch) for _ in range(count)]
    return Workload(case, model, nn.CrossEntropyLoss(), batches)


def build_step(name: str, *, quick: bool = False) -> Workload:
    """Make the workload of a training step: one batch, and the model in training mode."""
    workload = build(name, fraction=0.0, quick=quick).beginning(STEP_BATCH)
    workload.model.train()
    return workload
