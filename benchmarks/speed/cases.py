"""A model, a loss and data for each case; the data are noise, as costs depend on shapes alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.speed import names
from benchmarks.speed.networks import (
    CLASSES,
    Transformer,
    convolutional,
    group_norm,
    perceptron,
    residual,
)

Batch = tuple[Tensor, Tensor]

SEED = 0
QUICK_EXAMPLES = 4
IMAGE = (3, 32, 32)
WIDTH, BLOCKS, HEADS, LENGTH, VOCABULARY = 256, 4, 4, 128, 64


@dataclass(frozen=True)
class Attention:
    """The attention of a model, which is more than its layers' products.

    Attributes:
        blocks: How often there is attention.
        length: Number of tokens.
        width: Numbers for each token, over all heads.
    """

    blocks: int
    length: int
    width: int


@dataclass(frozen=True)
class Case:
    """What a problem is made from.

    Attributes:
        network: Makes the model.
        shape: Shape of one input; for tokens, the length of a sequence.
        examples: Number of examples.
        batch: Examples in a batch.
        classes: Number of classes.
        attention: The model's attention, if it has any; then the inputs are tokens, and every
            token has a label.
    """

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    examples: int
    batch: int
    classes: int = CLASSES
    attention: Attention | None = None


@dataclass(frozen=True)
class Problem:
    """A model, a loss and data.

    Attributes:
        case: What it was made from.
        model: The network, in eval mode.
        criterion: The loss, a mean over examples or tokens.
        batches: The data.
    """

    case: Case
    model: nn.Module
    criterion: nn.CrossEntropyLoss
    batches: list[Batch]

    @property
    def examples(self) -> int:
        """Number of examples."""
        return sum(len(inputs) for inputs, _ in self.batches)

    @property
    def labels_per_example(self) -> int:
        """Number of labels of one example: 1, or its number of tokens."""
        return self.batches[0][1][0].numel()

    @property
    def known_layers(self) -> list[nn.Module]:
        """The layers that every contender knows: linear ones and convolutions."""
        return [m for m in self.model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]

    @property
    def known_parameters(self) -> list[nn.Parameter]:
        """The parameters of these layers."""
        return [p for layer in self.known_layers for p in layer.parameters()]

    def freeze_other_parameters(self) -> None:
        """Let only the parameters that every contender knows have gradients."""
        known = {id(parameter) for parameter in self.known_parameters}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in known)

    def beginning(self, examples: int) -> "Problem":
        """The same model with a single batch of the first few examples."""
        inputs, targets = self.batches[0]
        return replace(self, batches=[(inputs[:examples].clone(), targets[:examples].clone())])


CASES = {
    names.SMALL_MLP: Case(lambda: perceptron(784, 400, 400, CLASSES), (784,), 10_000, 500),
    names.LARGE_MLP: Case(lambda: perceptron(784, 1000, 1000, CLASSES), (784,), 10_000, 500),
    names.CNN: Case(convolutional, IMAGE, 2_000, 250),
    names.GROUP_NORM: Case(lambda: residual(group_norm), IMAGE, 512, 64),
    names.BATCH_NORM: Case(lambda: residual(nn.BatchNorm2d), IMAGE, 512, 64),
    names.TRANSFORMER: Case(
        lambda: Transformer(WIDTH, BLOCKS, HEADS, LENGTH, VOCABULARY),
        (LENGTH,),
        256,
        16,
        classes=VOCABULARY,
        attention=Attention(BLOCKS, LENGTH, WIDTH),
    ),
}


def build(name: str, *, fraction: float = 1.0, quick: bool = False) -> Problem:
    """Make a problem, the same whenever it is called.

    Args:
        name: One of the cases.
        fraction: The part of the examples to take, in whole batches and at least one.
        quick: Whether to take only a few examples.

    Returns:
        The problem.
    """
    return build_case(CASES[name], fraction=fraction, quick=quick)


def build_case(case: Case, *, fraction: float = 1.0, quick: bool = False) -> Problem:
    """Make a problem, the same whenever it is called.

    Args:
        case: What it is made from.
        fraction: The part of the examples to take, in whole batches and at least one.
        quick: Whether to take only a few examples.

    Returns:
        The problem.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = case.network().eval()
        batch = QUICK_EXAMPLES if quick else case.batch
        count = 1 if quick else max(1, round(fraction * case.examples / case.batch))
        batches = [random_batch(case, batch) for _ in range(count)]
    return Problem(case, model, nn.CrossEntropyLoss(), batches)


def random_batch(case: Case, examples: int) -> Batch:
    """Noise, and labels that have nothing to do with it.

    Args:
        case: What says the shapes.
        examples: Number of examples.

    Returns:
        Inputs and labels.
    """
    if case.attention is None:
        inputs = torch.randn(examples, *case.shape)
        return inputs, torch.randint(case.classes, (examples,))
    tokens = torch.randint(case.classes, (2, examples, *case.shape))
    return tokens[0], tokens[1]
