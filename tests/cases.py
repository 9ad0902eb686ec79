"""The models that the library is checked on, kept as data.

Every case is tiny, seeded and in float64, so that its dense Fisher matrix is cheap. Together they
cover what layers and uses of layers may look like: shared positions, strides, dilation, groups,
padding of every kind, layers called twice, tied weights, in-place activations and parameters that
are left out.

No case has a factor with repeated eigenvalues by construction (a circular convolution whose kernel
spans its input has), since an operator is then only one of many equally good ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.oracles import Loss

LOSSES: dict[str, type[Loss]] = {
    "ce": nn.CrossEntropyLoss,
    "mse": nn.MSELoss,
    "bce": nn.BCEWithLogitsLoss,
}


class MeanOver(nn.Module):
    """Average over the axes between the batch axis and the last (or after the second)."""

    def __init__(self, *axes: int) -> None:
        """Remember the axes."""
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """Average."""
        return x.mean(dim=self.axes)


class ChannelsFirst(nn.Module):
    """Turn ``[N, T, C]`` into ``[N, C, T]``, the layout of sequence losses."""

    def forward(self, x: Tensor) -> Tensor:
        """Swap the last two axes."""
        return x.transpose(1, 2)


class SwapFirst(nn.Module):
    """Turn ``[N, T, d]`` into ``[T, N, d]``, as time-first models do."""

    def forward(self, x: Tensor) -> Tensor:
        """Swap the first two axes."""
        return x.transpose(0, 1)


class First(nn.Module):
    """Keep the first entry of the first axis, as classifiers on a leading token do."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop the others."""
        return x[0]


class Twice(nn.Module):
    """Call one layer twice, with a nonlinearity between."""

    def __init__(self, layer: nn.Module) -> None:
        """Keep the layer."""
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, the nonlinearity and the layer again."""
        return torch.tanh(self.layer(torch.tanh(self.layer(x))))


class Residual(nn.Module):
    """Add a layer's output to its input, which is therefore used twice."""

    def __init__(self, layer: nn.Module) -> None:
        """Keep the layer."""
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer beside the identity."""
        return x + torch.tanh(self.layer(x))


@dataclass(frozen=True)
class Case:
    """A model, the shape of its data, and what is to be estimated.

    Attributes:
        name: Readable identifier.
        build: Makes the model; called under a fixed seed.
        input_shape: Shape of one input.
        output_shape: Shape of one output, classes first.
        rows: Consecutive rows of outputs and targets that belong to one example.
        shared: Whether a weight is used at more than one position per example.
        frozen: Parameters that neither require gradients nor are estimated.
        left_out: Parameters that require gradients but are not estimated.
        batch_sizes: How the examples are cut into batches.
    """

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...] = (3,)
    rows: int = 1
    shared: bool = False
    frozen: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = (3, 1, 2)

    def __str__(self) -> str:
        """Return the name, which makes a readable test identifier."""
        return self.name

    @property
    def examples(self) -> int:
        """Number of examples."""
        return sum(self.batch_sizes)

    def model(self) -> nn.Module:
        """Make the model, always with the same weights and without touching the global RNG."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = self.build().double()
        for name in self.frozen:
            model.get_parameter(name).requires_grad_(False)
        return model

    def names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that are estimated."""
        out = {*self.frozen, *self.left_out}
        return [name for name, _ in model.named_parameters() if name not in out]

    def inputs(self) -> Tensor:
        """Return all inputs, ``[N, *input_shape]``."""
        generator = torch.Generator().manual_seed(2)
        shape = (self.examples, *self.input_shape)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def targets(self, loss: str) -> Tensor:
        """Return all targets in the form that a loss wants, ``[N * rows, *]``."""
        generator = torch.Generator().manual_seed(3)
        classes, *positions = self.output_shape
        if loss == "ce":
            return torch.randint(
                classes, (self.examples * self.rows, *positions), generator=generator
            )
        shape = (self.examples * self.rows, *self.output_shape)
        if loss == "mse":
            return torch.randn(shape, generator=generator, dtype=torch.float64)
        return torch.randint(2, shape, generator=generator).double()

    def data(
        self,
        loss: str,
        batch_sizes: Sequence[int] | None = None,
        order: Sequence[int] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the examples in batches, optionally in another order or cut in another way."""
        x, y = self.inputs(), self.targets(loss)
        y = y.reshape(self.examples, self.rows, *y.shape[1:])
        if order is not None:
            x, y = x[list(order)], y[list(order)]
        sizes = list(self.batch_sizes if batch_sizes is None else batch_sizes)
        pairs = zip(torch.split(x, sizes), torch.split(y, sizes), strict=True)
        return [(inputs, targets.flatten(0, 1)) for inputs, targets in pairs]


def sequential(*modules: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Put off making a Sequential until the seed is set."""
    return lambda: nn.Sequential(*(module() for module in modules))


def linear(d_in: int, d_out: int, bias: bool = True) -> Callable[[], nn.Module]:
    """Put off making a Linear."""
    return lambda: nn.Linear(d_in, d_out, bias=bias)


def conv(
    kind: type[nn.Module], *args: int | tuple[int, ...], **options: object
) -> Callable[[], nn.Module]:
    """Put off making a convolution."""
    return lambda: kind(*args, **options)


def tied() -> nn.Module:
    """Two Linear modules that own the same weight."""
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Linear(4, 3))


def batch_norm_net() -> nn.Module:
    """A small network with BatchNorm and Dropout, with statistics worth having."""
    norm = nn.BatchNorm2d(3)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    nn.init.uniform_(norm.running_mean, -1, 0)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.uniform_(norm.weight, 0.5, 2)
    return nn.Sequential(
        nn.Conv2d(2, 3, 2),
        norm,
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


CASES: tuple[Case, ...] = (
    # fully connected
    Case("single-linear", sequential(linear(4, 3)), (4,)),
    Case("tanh-mlp", sequential(linear(5, 4), nn.Tanh, linear(4, 3)), (5,), batch_sizes=(2, 4, 1)),
    Case(
        "inplace-relu-mlp",
        sequential(
            linear(4, 6),
            lambda: nn.ReLU(inplace=True),
            linear(6, 5),
            lambda: nn.ReLU(inplace=True),
            linear(5, 3),
        ),
        (4,),
    ),
    Case("deep-linear", sequential(linear(4, 5), linear(5, 4), linear(4, 3)), (4,)),
    Case(
        "no-bias-mlp",
        sequential(linear(5, 6, False), nn.Tanh, linear(6, 3, False)),
        (5,),
        batch_sizes=(4, 1),
    ),
    Case(
        "residual-mlp",
        sequential(linear(4, 5), lambda: Residual(nn.Linear(5, 5)), linear(5, 2)),
        (4,),
        (2,),
    ),
    Case(
        "subset-of-parameters",
        sequential(
            linear(4, 4), nn.Tanh, linear(4, 5), nn.Tanh, linear(5, 4), nn.Tanh, linear(4, 3)
        ),
        (4,),
        frozen=("0.weight", "0.bias", "4.weight"),
        left_out=("2.bias",),
    ),
    # shared positions
    Case(
        "pooled-tokens",
        sequential(linear(4, 5), nn.Tanh, linear(5, 3), lambda: MeanOver(1)),
        (3, 4),
        shared=True,
    ),
    Case(
        "pooled-grid",
        sequential(linear(3, 4), nn.Tanh, linear(4, 3), lambda: MeanOver(1, 2)),
        (2, 3, 3),
        shared=True,
    ),
    Case(
        "pooled-linear",
        sequential(linear(4, 5), linear(5, 3), lambda: MeanOver(1)),
        (3, 4),
        shared=True,
    ),
    Case(
        "sequence-outputs",
        sequential(linear(4, 5), nn.Tanh, linear(5, 3), ChannelsFirst),
        (2, 4),
        (3, 2),
        shared=True,
    ),
    Case(
        "sequence-linear",
        sequential(linear(4, 5), linear(5, 3), ChannelsFirst),
        (3, 4),
        (3, 3),
        shared=True,
    ),
    Case(
        "wide-few-positions",
        sequential(linear(12, 12), nn.Tanh, lambda: MeanOver(1), linear(12, 3)),
        (2, 12),
        shared=True,
    ),
    Case(
        "flattened-sequence-outputs",
        sequential(linear(4, 5), nn.Tanh, linear(5, 3), lambda: nn.Flatten(0, 1)),
        (2, 4),
        rows=2,
        shared=True,
    ),
    Case(
        "merged-rows",
        sequential(
            lambda: nn.Flatten(0, 1),
            linear(4, 5),
            lambda: nn.ReLU(inplace=True),
            lambda: nn.Unflatten(0, (-1, 3)),
            lambda: MeanOver(1),
            linear(5, 3),
        ),
        (3, 4),
        shared=True,
    ),
    Case(
        "time-first-mean",
        sequential(SwapFirst, linear(4, 5), nn.Tanh, linear(5, 3), lambda: MeanOver(0)),
        (3, 4),
        shared=True,
    ),
    Case(
        "time-first-leading-token",
        sequential(SwapFirst, linear(4, 5), nn.Tanh, First, linear(5, 3)),
        (3, 4),
        shared=True,
    ),
    # one weight, several uses
    Case(
        "linear-twice",
        sequential(lambda: Twice(nn.Linear(5, 5)), linear(5, 3)),
        (5,),
        shared=True,
    ),
    Case(
        "conv-twice",
        sequential(
            lambda: Twice(nn.Conv2d(2, 2, 3, padding=1)), lambda: MeanOver(2, 3), linear(2, 3)
        ),
        (2, 3, 3),
        shared=True,
    ),
    Case("tied-weights", tied, (4,), shared=True),
    # convolutions
    Case(
        "conv1d-stride-dilation",
        sequential(
            conv(nn.Conv1d, 2, 4, 3, stride=2, dilation=2, padding=2),
            nn.Tanh,
            nn.Flatten,
            linear(16, 3),
        ),
        (2, 7),
        shared=True,
    ),
    Case(
        "conv1d-groups-reflect",
        sequential(
            conv(nn.Conv1d, 4, 6, 3, groups=2, padding=2, padding_mode="reflect"),
            nn.Tanh,
            lambda: MeanOver(2),
            linear(6, 3),
        ),
        (4, 4),
        shared=True,
    ),
    Case(
        "conv2d-stride-groups",
        sequential(
            conv(nn.Conv2d, 2, 4, 3, stride=2, padding=1, groups=2),
            nn.Tanh,
            nn.Flatten,
            linear(36, 3),
        ),
        (2, 5, 5),
        shared=True,
        batch_sizes=(2, 2, 1),
    ),
    Case(
        "conv2d-depthwise",
        sequential(
            conv(nn.Conv2d, 3, 6, 2, groups=3, bias=False),
            nn.Tanh,
            conv(nn.Conv2d, 6, 4, 1),
            nn.Tanh,
            lambda: MeanOver(2, 3),
            linear(4, 3),
        ),
        (3, 3, 3),
        shared=True,
    ),
    Case(
        "conv2d-same-even-kernel",
        sequential(
            conv(nn.Conv2d, 2, 3, (2, 4), padding="same"),
            nn.Tanh,
            lambda: MeanOver(2, 3),
            linear(3, 3),
        ),
        (2, 4, 5),
        shared=True,
    ),
    Case(
        "conv2d-same-even-kernel-circular",
        sequential(
            conv(nn.Conv2d, 2, 3, (4, 2), padding="same", padding_mode="circular"),
            nn.Tanh,
            conv(nn.Conv2d, 3, 2, 2, padding="same", dilation=2),
            nn.Tanh,
            nn.Flatten,
            linear(30, 3),
        ),
        (2, 5, 3),
        shared=True,
    ),
    *(
        Case(
            f"conv2d-{mode}",
            sequential(
                conv(nn.Conv2d, 2, 3, (3, 2), padding=(2, 1), stride=(1, 2), padding_mode=mode),
                nn.Tanh,
                nn.Flatten,
                linear(30, 3),
            ),
            (2, 3, 3),
            shared=True,
        )
        for mode in ("zeros", "circular", "reflect", "replicate")
    ),
    Case(
        "conv2d-one-position",
        sequential(conv(nn.Conv2d, 2, 4, 3), nn.Tanh, nn.Flatten, linear(4, 3)),
        (2, 3, 3),
    ),
    Case(
        "conv2d-sequence-outputs",
        sequential(conv(nn.Conv2d, 2, 3, 2), nn.Tanh, conv(nn.Conv2d, 3, 2, 1)),
        (2, 3, 3),
        (2, 2, 2),
        shared=True,
        batch_sizes=(4, 2),
    ),
    Case(
        "conv3d",
        sequential(
            conv(nn.Conv3d, 2, 2, 2, stride=(1, 1, 2), groups=2, padding=(0, 0, 1)),
            nn.Tanh,
            nn.Flatten,
            linear(16, 3),
        ),
        (2, 3, 3, 2),
        shared=True,
    ),
    Case(
        "batch-norm-and-dropout",
        batch_norm_net,
        (2, 3, 3),
        shared=True,
        left_out=("1.weight", "1.bias"),
    ),
)

BY_NAME: dict[str, Case] = {case.name: case for case in CASES}
CONVOLUTIONS: tuple[Case, ...] = tuple(case for case in CASES if case.name.startswith("conv"))
UNSHARED: tuple[Case, ...] = tuple(case for case in CASES if not case.shared)
