"""What a run depends on, and the options of the command line that it is made from.

Nothing here imports PyTorch or Avalanche.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.methods import DEFAULT_STRENGTH, DEFAULT_TEMPERATURE, METHODS, OPTIMIZERS
from benchmarks.option_types import (
    Count,
    Device,
    Folder,
    Positive,
    PositiveOrAuto,
    Seeds,
    StrengthOrAuto,
    Threads,
    default,
    number,
    one_of,
    several,
    whole_number,
)

DATA_ROOT_VARIABLE = "ROTATE_EWC_DATA"
SCHEDULES = ("constant", "linear")
FISHER_TYPES = ("mc", "type2", "empirical")
INCREMENTS = ("task", "domain", "class")
IMAGES = "split_images"

# What differs from permuted MNIST.
SCENARIO_DEFAULTS: dict[str, dict[str, Any]] = {
    "permuted_mnist": {},
    "rotated_mnist": {},
    "split_mnist": {"tasks": 5, "epochs": 4, "batch_size": 128},
    IMAGES: {"tasks": 5, "epochs": 3, "batch_size": 32, "hidden": (128,)},
}
# The digits are a fortieth of MNIST: this makes about as many steps per task.
DIGITS_DEFAULTS: dict[str, Any] = {"epochs": 10, "batch_size": 32}
# Small enough for a check of everything in a few minutes, large enough for methods to differ.
QUICK_DEFAULTS: dict[str, Any] = {
    "training_images": 6_000,
    "epochs": 2,
    "batch_size": 50,
    "fisher_samples": 1_000,
}
QUICK_TASKS = {"permuted_mnist": 3, "rotated_mnist": 3}

MethodNames = Annotated[
    tuple[str, ...],
    several(one_of(METHODS, metavar="METHOD")),
    tyro.conf.arg(help=f"Any of {', '.join(METHODS)}."),
]
Widths = Annotated[tuple[int, ...] | None, several(whole_number(1, metavar="W"), repeated=True)]
DataRoot = Annotated[Folder, default(f"the environment variable {DATA_ROOT_VARIABLE}, else data")]
OptionalCount = Annotated[int | None, whole_number(1)]


def default_data_root() -> Path:
    """The folder named by the environment, or ``data`` in the current one."""
    return Path(os.environ.get(DATA_ROOT_VARIABLE) or "data")


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Options of every loop over tasks; None for what depends on the scenario and the data.

    Attributes:
        tasks: Number of tasks.
        epochs: Passes over the data of each task.
        hidden: Widths of the hidden layers.
        batch_size: Examples per training step.
        learning_rate: Step size of the optimizer.
        optimizer: adam, adamw, rmsprop, or sgd with momentum 0.9; its state is kept from task to
            task. ncl always has the last.
    """

    tasks: Annotated[OptionalCount, default("10; split streams: 5")] = None
    epochs: Annotated[
        OptionalCount, default("2; split MNIST: 4; split images: 3; the digits: 10")
    ] = None
    hidden: Annotated[Widths, default("100 100; split images: 128")] = None
    batch_size: Annotated[
        OptionalCount, default("250; split MNIST: 128; split images and the digits: 32")
    ] = None
    learning_rate: Annotated[Positive, tyro.conf.arg(name="lr")] = 1e-3
    optimizer: Annotated[str, one_of(OPTIMIZERS)] = "adam"


@dataclass(frozen=True, kw_only=True)
class Training(Steps):
    """The options that a run depends on.

    Attributes:
        schedule: constant, or linear: the step size falls to zero in every task.
        warm_up: Part of every task, from 0 to 1, in which the step size rises from zero.
        every: Steps of the optimizer for each tangent plane of rotated-ewc-tangent.
        fisher_samples: Examples per snapshot of the rotated methods, 0 for all.
        fisher_type: Labels in the rotated methods' Fisher matrix: mc samples them from the model,
            type2 is the exact expectation over the model's, empirical takes the data's.
        temperature: What the outputs are divided by in the rotated methods' snapshots, or auto;
            above 1, examples of which the network is sure count too.
        plasticity: The part of the progress on a new task, between 0 and 1, that a strength which
            is auto leaves.
        device: PyTorch device to train on.
    """

    schedule: Annotated[str, one_of(SCHEDULES)] = "constant"
    warm_up: Annotated[float, number(zero=True, largest=1.0)] = 0.0
    every: Count = 10
    fisher_samples: Annotated[int | None, whole_number(0), default("10000; with --quick: 1000")] = (
        None
    )
    fisher_type: Annotated[str, one_of(FISHER_TYPES)] = "mc"
    temperature: PositiveOrAuto = DEFAULT_TEMPERATURE
    plasticity: Annotated[
        float | None, number(zero=False, below=1.0), default("the package's own")
    ] = None
    device: Device = "cpu"


@dataclass(frozen=True, kw_only=True)
class Configuration(Training):
    """All that a run depends on but the method, its strength and the seed.

    Attributes:
        scenario: Key in :data:`SCENARIO_DEFAULTS`.
        increment: What the network is to tell in split streams: ``"task"``, ``"domain"`` or
            ``"class"``.
        training_images: Training images to use, those of all tasks together in split streams; 0 for
            all.
        validate: Whether to test on training images that are held out, rather than on the test
            images.
        replay: Examples in a replay buffer that every method has besides; 0 for none.
        images: Folder of the images of ``"split_images"``, which no result depends on: records and
            files have the name of the data.
    """

    tasks: int = 10
    epochs: int = 2
    hidden: tuple[int, ...] = (100, 100)
    batch_size: int = 250
    fisher_samples: int = 10_000
    scenario: str = "permuted_mnist"
    increment: str = "task"
    training_images: int = 0
    validate: bool = False
    replay: int = 0
    images: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """The options as plain values for JSON, but for the folder of images."""
        plain = dataclasses.asdict(self)
        del plain["images"]
        return {n: list(value) if isinstance(value, tuple) else value for n, value in plain.items()}


@dataclass(frozen=True, kw_only=True)
class StreamOptions(Training):
    """Options of the commands that learn one stream of permuted-MNIST tasks.

    Attributes:
        ewc_lambda: Strength of the rotated methods, or auto, which in the loss is the default.
        validate: Hold out a sixth of the training images and report accuracies on them, rather than
            on the test images: options are chosen by these.
        seeds: Every method is run once with each; a seed determines the permutations, the initial
            weights and the order of examples.
        data_root: Where the data are, or are downloaded to.
        output: Where results go.
        threads: CPU threads of PyTorch.
    """

    ewc_lambda: StrengthOrAuto = DEFAULT_STRENGTH
    validate: bool = False
    seeds: Seeds = (0,)
    data_root: DataRoot = field(default_factory=default_data_root)
    output: Folder = Path("results")
    threads: Threads = None


def settle(
    options: Steps, scenario: str, *, quick: bool = False, digits: bool = False, **others: Any
) -> Configuration:
    """Replace what was not given by the defaults of a scenario; ``others`` come before all."""
    defaults = dict(SCENARIO_DEFAULTS[scenario])
    if quick:
        tasks = {"tasks": QUICK_TASKS[scenario]} if scenario in QUICK_TASKS else {}
        defaults |= QUICK_DEFAULTS | tasks
    if digits:
        defaults |= DIGITS_DEFAULTS
    names = [entry.name for entry in dataclasses.fields(Configuration)]
    given = {name: getattr(options, name, None) for name in names}
    defaults |= {name: value for name, value in given.items() if value is not None}
    return Configuration(**(defaults | others | {"scenario": scenario}))
