"""One tiny estimation problem: a model, a loss and data, the same for every package."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers.models import Layers

Fisher = Literal["type2", "empirical"]
Targets = Literal["classes", "some ignored", "probabilities", "numbers", "bits"]
Batch = tuple[Any, Tensor]

DTYPE = torch.float64


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything that defines an exact Fisher matrix, and how the data are cut into batches."""

    # Makes the layers of the model, with an activation function; called under a fixed seed.
    layers: Layers
    input_shape: tuple[int, ...]  # shape of one input
    label: str = ""  # what sets the problem apart from the others of its row
    vocabulary: int | None = None  # if given, inputs are whole numbers below it
    # Makes what the model takes of inputs ``[B, *]``.
    form: Callable[[Tensor], Any] = field(default=lambda inputs: inputs)
    output_shape: tuple[int, ...] = (3,)  # shape of one row of the outputs, classes first
    rows: int = 1  # consecutive rows of outputs and targets that belong to one example
    # Makes the loss from its reduction.
    loss: Callable[[str], nn.Module] = field(
        default=lambda reduction: nn.CrossEntropyLoss(reduction=reduction)
    )
    reduction: str = "mean"  # reduction of the loss for the exact Fisher matrix
    targets: Targets = "classes"  # what the targets are
    examples: int = 6  # number of examples
    batch_size: int = 3  # examples per batch
    drop_last: bool = False  # whether the last batch is left out where it is not full
    one_shot: bool = False  # whether the data can be gone through only once
    # Whether the model is handed over in training mode; the exact matrix is that of evaluation
    # mode all the same.
    training: bool = False
    left_out: tuple[str, ...] = ()  # parameters that are not estimated
    shared: bool = False  # whether one module is called more than once in a forward pass
    # Whether the Kronecker product of two factors is exact once the activation is linear and all
    # inputs are the same.
    separable: bool = False
    linear: bool = False  # whether the activation is the identity instead of tanh
    repeated: bool = False  # whether all examples have the input of the first
    # Further keyword arguments for a package's estimate, by package.
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def for_kronecker(self) -> "Problem":
        """The same with a linear activation and one input over and over."""
        return dataclasses.replace(self, linear=True, repeated=True)

    def loss_for(self, fisher: Fisher) -> Any:
        """The loss; always summed for the empirical Fisher matrix.

        Packages agree on the empirical matrix of a sum, the sum of the outer products of every
        example's gradient. That of a mean has several definitions once examples weigh differently.
        """
        return self.loss("sum" if fisher == "empirical" else self.reduction)

    @property
    def loss_terms(self) -> int:
        """Predictions per example."""
        return self.rows * torch.Size(self.output_shape[1:]).numel()

    def model(self) -> nn.Module:
        """Make the model in evaluation mode, always with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            activation = nn.Identity if self.linear else nn.Tanh
            model = nn.Sequential(*self.layers(activation)).to(DTYPE)
            # Scales of 1 and shifts of 0, as norms begin with, would hide mistakes.
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        for name in self.left_out:
            model.get_parameter(name).requires_grad_(False)
        return model.eval()

    def names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that are estimated, in the model's order."""
        return [name for name, _ in model.named_parameters() if name not in self.left_out]

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters that are estimated."""
        return [model.get_parameter(name) for name in self.names(model)]

    def data(self) -> tuple[Tensor, Tensor]:
        """All inputs ``[N, *]`` and targets ``[N, rows, *]``, whether or not a batch has them."""
        generator = torch.Generator().manual_seed(2)
        shape = (self.examples, *self.input_shape)
        if self.vocabulary is None:
            inputs = torch.randn(shape, generator=generator, dtype=DTYPE)
        else:
            inputs = torch.randint(self.vocabulary, shape, generator=generator)
        if self.repeated:
            inputs = inputs[:1].expand(shape).clone()
        return inputs, self._targets(generator)

    def _targets(self, generator: torch.Generator) -> Tensor:
        """Targets ``[N, rows, *]`` of the kind that the loss wants."""
        leading = (self.examples, self.rows)
        classes, *positions = self.output_shape
        if self.targets in ("classes", "some ignored"):
            labels = torch.randint(classes, (*leading, *positions), generator=generator)
            if self.targets == "some ignored":
                labels.view(-1)[1::3] = -100
            return labels
        shape = (*leading, *self.output_shape)
        if self.targets == "bits":
            return torch.randint(2, shape, generator=generator).to(DTYPE)
        numbers = torch.randn(shape, generator=generator, dtype=DTYPE)
        return numbers.softmax(2) if self.targets == "probabilities" else numbers

    def seen(self) -> list[Batch]:
        """Single examples: formed inputs ``[1, *]`` and targets ``[rows, *]`` that batches have."""
        inputs, targets = self.data()
        kept = self.examples - (self.examples % self.batch_size if self.drop_last else 0)
        return [(self.form(inputs[n : n + 1]), targets[n]) for n in range(kept)]

    def loader(self, collate: Callable[..., Any] | None = None) -> "DataLoader[Any]":
        """The batches: formed inputs ``[B, *]`` and targets ``[B * rows, *]``, in a fixed order."""
        return DataLoader(
            TensorDataset(*self.data()),
            batch_size=self.batch_size,
            drop_last=self.drop_last,
            collate_fn=collate or self.collate,
        )

    def batches(self) -> "DataLoader[Any] | Iterator[Batch]":
        """The loader, or an iterator over it that is used up after one pass."""
        return iter(list(self.loader())) if self.one_shot else self.loader()

    def collate(self, examples: list[Batch]) -> Batch:
        """Stack and form inputs, and join the rows of all targets."""
        inputs, targets = zip(*examples, strict=True)
        return self.form(torch.stack(inputs)), torch.cat(targets)
