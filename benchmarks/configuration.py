"""The options of a benchmark: one frozen object, and the command line that makes it.

Nothing here imports PyTorch or Avalanche before the command line has been found well formed.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.methods import DEFAULT_METHODS, METHODS
from benchmarks.option_types import (
    LARGEST_SEED,
    device,
    number,
    one_of,
    several,
    whole_number,
)

DATA_ROOT_VARIABLE = "ROTATE_EWC_DATA"
OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("constant", "linear")
FISHER_TYPES = ("mc", "type2", "empirical")

# Fields that mean something else to a scenario than to permuted MNIST.
SCENARIO_DEFAULTS: dict[str, dict[str, Any]] = {
    "permuted_mnist": {},
    "rotated_mnist": {},
    "split_mnist": {"tasks": 5, "epochs": 4, "batch_size": 128},
    "split_cifar10": {"tasks": 5, "epochs": 10, "batch_size": 128, "hidden": (256,)},
    "split_cifar100": {"tasks": 10, "epochs": 20, "batch_size": 128, "hidden": (256,)},
}
INCREMENTS = ("task", "domain", "class")

# The digits are a fortieth of MNIST: this makes about as many steps per task.
DIGITS_DEFAULTS: dict[str, Any] = {"epochs": 10, "batch_size": 32}


def default_data_root() -> Path:
    """The folder named by the environment, or ``data`` in the current one."""
    return Path(os.environ.get(DATA_ROOT_VARIABLE) or "data")


@dataclass(frozen=True)
class Configuration:
    """All options of one call.

    Attributes:
        scenario: Key in :data:`SCENARIO_DEFAULTS`.
        increment: What the network is to tell in split streams: ``"task"``, ``"domain"`` or
            ``"class"``.
        training_images: Training images to use, those of all tasks together in split streams; 0 for
            all.
        tasks: Number of tasks ``T``.
        epochs: Passes over the data of each task.
        hidden: Widths of the hidden layers.
        batch_size: Examples per training step.
        learning_rate: Step size of the optimizer.
        optimizer: ``"adam"`` or ``"sgd"``.
        schedule: ``"constant"``, or ``"linear"``: the step size falls to zero in every task.
        warm_up: Part of every task, from 0 to 1, in which the step size rises from zero.
        ewc_lambda: Strength of the rotated methods.
        baseline_ewc_lambda: Strengths of Avalanche's EWC; one run for each.
        validate: Whether to test on training images that are held out, rather than on the test
            images.
        proximal_every: Steps of the optimizer for each proximal step or tangent plane.
        fisher_samples: Examples per snapshot of the rotated methods; 0 for all.
        fisher_type: ``"mc"``, ``"type2"`` or ``"empirical"``.
        temperature: What the outputs are divided by in the rotated methods' snapshots.
        methods: Names of the methods to run, keys of :data:`benchmarks.methods.METHODS`.
        replay: Examples in a replay buffer beside every method; 0 for none.
        seeds: Every method is run once with each.
        data_root: Folder of the data sets.
        output: Folder of the results.
        device: PyTorch device to train on.
        threads: CPU threads for PyTorch; None leaves its own choice.
        chosen: Names of the fields that the user gave, which no other default may replace.
    """

    scenario: str = "permuted_mnist"
    increment: str = "task"
    training_images: int = 0
    tasks: int = 10
    epochs: int = 2
    hidden: tuple[int, ...] = (100, 100)
    batch_size: int = 250
    learning_rate: float = 1e-3
    optimizer: str = "adam"
    schedule: str = "constant"
    warm_up: float = 0.0
    ewc_lambda: float = 3.0
    baseline_ewc_lambda: tuple[float, ...] = (100.0,)
    validate: bool = False
    proximal_every: int = 10
    fisher_samples: int = 10_000
    fisher_type: str = "mc"
    temperature: float = 1.0
    replay: int = 0
    methods: tuple[str, ...] = DEFAULT_METHODS
    seeds: tuple[int, ...] = (0,)
    data_root: Path = field(default_factory=default_data_root)
    output: Path = Path("results")
    device: str = "cpu"
    threads: int | None = None
    chosen: frozenset[str] = frozenset()

    def for_digits(self) -> "Configuration":
        """Replace the defaults that are meant for MNIST by :data:`DIGITS_DEFAULTS`."""
        return self.with_defaults(DIGITS_DEFAULTS)

    def with_defaults(self, defaults: Mapping[str, Any]) -> "Configuration":
        """Replace some defaults by others.

        Args:
            defaults: Values by field.

        Returns:
            A configuration in which options the user gave are as the user gave them.
        """
        return dataclasses.replace(
            self,
            **{name: value for name, value in defaults.items() if name not in self.chosen},
        )

    def as_dict(self) -> dict[str, Any]:
        """The options that can influence results, as plain values for JSON.

        Folders are left out: they say nothing about an experiment, and published results should
        not tell how somebody's disk is laid out.
        """
        plain = dataclasses.asdict(self)
        for name in ("data_root", "output", "chosen"):
            del plain[name]
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in plain.items()
        }


def parse_configuration(
    arguments: Sequence[str] | None, *, program: str, description: str
) -> Configuration:
    """Turn a command line into a configuration, or leave with a message that says what is wrong.

    Args:
        arguments: Words of the command line; None for those of the process.
        program: How the program is called, for the usage line.
        description: What the program does, for ``--help``.

    Returns:
        The configuration.

    Raises:
        SystemExit: With code 2 after a message on standard error, or code 0 after ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return configuration_from(parser.parse_args(arguments), parser)


def add_arguments(
    parser: argparse.ArgumentParser,
    defaults: Configuration | None = None,
    *,
    methods: Sequence[str] = tuple(METHODS),
    leave_out: Collection[str] = (),
) -> None:
    """Add all options to a parser, so that other commands can have them too.

    Options that are not given leave no trace in the namespace: their defaults are those of
    :class:`Configuration`, some of which depend on the data.

    Args:
        parser: The parser.
        defaults: What ``--help`` says about defaults; None for those of :class:`Configuration`.
        methods: What ``--methods`` accepts.
        leave_out: Options that make no sense in the other command, such as ``"--tasks"``.
    """
    defaults = defaults or Configuration()
    _add_training_arguments(parser, defaults, leave_out)
    _add_method_arguments(parser, defaults, leave_out, methods)
    _add_environment_arguments(parser, defaults, leave_out)


def _adder(
    parser: argparse.ArgumentParser, title: str, leave_out: Collection[str]
) -> Callable[..., None]:
    """A function that adds an option to a new group, one that is absent when it is not given."""
    group = parser.add_argument_group(title)

    def add(option: str, **settings: Any) -> None:
        if option not in leave_out:
            group.add_argument(option, default=argparse.SUPPRESS, **settings)

    return add


def _add_training_arguments(
    parser: argparse.ArgumentParser, defaults: Configuration, leave_out: Collection[str]
) -> None:
    """Options of the tasks, the network and its training."""
    add = _adder(parser, "tasks and training", leave_out)
    on_digits = {name: f"; {value} on the digits" for name, value in DIGITS_DEFAULTS.items()}
    add(
        "--tasks",
        type=whole_number(1),
        metavar="T",
        help=f"number of tasks (default: {defaults.tasks})",
    )
    add(
        "--epochs",
        type=whole_number(1),
        metavar="E",
        help=f"passes over the data of each task (default: {defaults.epochs}{on_digits['epochs']})",
    )
    add(
        "--hidden",
        type=several(whole_number(1)),
        nargs="+",
        metavar="WIDTH",
        help=f"widths of the hidden layers (default: {_words(defaults.hidden)})",
    )
    add(
        "--batch-size",
        type=whole_number(1),
        metavar="B",
        help="examples per training step "
        f"(default: {defaults.batch_size}{on_digits['batch_size']})",
    )
    add(
        "--lr",
        dest="learning_rate",
        type=number(zero=False),
        metavar="RATE",
        help=f"step size of the optimizer (default: {defaults.learning_rate})",
    )
    add(
        "--optimizer",
        type=one_of(OPTIMIZERS),
        metavar="NAME",
        help=f"adam, or sgd with momentum 0.9 (default: {defaults.optimizer}); its state is "
        "kept from task to task. rotated-adam has its own",
    )
    add(
        "--schedule",
        type=one_of(SCHEDULES),
        metavar="NAME",
        help="constant, or linear: the step size falls to zero in every task "
        f"(default: {defaults.schedule})",
    )
    add(
        "--warm-up",
        type=number(zero=True, largest=1.0),
        metavar="PART",
        help="part of every task in which the step size rises from zero "
        f"(default: {defaults.warm_up:g})",
    )
    add(
        "--validate",
        action="store_true",
        help="hold out a sixth of the training images and report accuracies on them, rather than "
        "on the test images: options are chosen by these",
    )


def _add_method_arguments(
    parser: argparse.ArgumentParser,
    defaults: Configuration,
    leave_out: Collection[str],
    methods: Sequence[str],
) -> None:
    """Options of the methods that are compared."""
    add = _adder(parser, "methods", leave_out)
    add(
        "--methods",
        type=several(one_of(methods)),
        nargs="+",
        metavar="METHOD",
        help=f"any of {_words(methods)} (default: {_words(defaults.methods)})",
    )
    add(
        "--ewc-lambda",
        type=number(zero=True),
        metavar="λ",
        help=f"strength of the rotated methods (default: {defaults.ewc_lambda:g})",
    )
    add(
        "--baseline-ewc-lambda",
        type=several(number(zero=True)),
        nargs="+",
        metavar="λ",
        help="strength of Avalanche's EWC; with several values, one run for each "
        f"(default: {_words(f'{value:g}' for value in defaults.baseline_ewc_lambda)})",
    )
    add(
        "--proximal-every",
        type=whole_number(1),
        metavar="K",
        help="steps of the optimizer for each proximal step of rotated-ewc-proximal, and for each "
        f"tangent plane of rotated-ewc-tangent (default: {defaults.proximal_every})",
    )
    add(
        "--fisher-samples",
        type=whole_number(0),
        metavar="N",
        help="examples per snapshot of the rotated methods, 0 for all "
        f"(default: {defaults.fisher_samples})",
    )
    add(
        "--fisher-type",
        type=one_of(FISHER_TYPES),
        metavar="TYPE",
        help="labels in the rotated methods' Fisher matrix: mc samples them from the model, type2 "
        "is the exact expectation over the model's, empirical takes the data's "
        f"(default: {defaults.fisher_type})",
    )
    add(
        "--temperature",
        type=number(zero=False),
        metavar="T",
        help="what the outputs are divided by in the rotated methods' snapshots; above 1, examples "
        f"of which the network is sure count too (default: {defaults.temperature:g})",
    )
    add(
        "--seeds",
        type=several(whole_number(0, LARGEST_SEED)),
        nargs="+",
        metavar="SEED",
        help="every method is run once with each; a seed determines the permutations, the "
        f"initial weights and the order of examples (default: {_words(defaults.seeds)})",
    )


def _add_environment_arguments(
    parser: argparse.ArgumentParser, defaults: Configuration, leave_out: Collection[str]
) -> None:
    """Options of files and hardware."""
    add = _adder(parser, "files and hardware", leave_out)
    add(
        "--data-root",
        type=Path,
        metavar="FOLDER",
        help="where MNIST is, or is downloaded to "
        f"(default: the environment variable {DATA_ROOT_VARIABLE}, else data)",
    )
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"where results go (default: {defaults.output})",
    )
    add(
        "--device",
        type=device,
        metavar="DEVICE",
        help=f"PyTorch device to train on (default: {defaults.device})",
    )
    add(
        "--threads",
        type=whole_number(1),
        metavar="N",
        help="CPU threads of PyTorch (default: PyTorch's choice)",
    )


def _words(values: Iterable[object]) -> str:
    """Values as they would be typed on a command line."""
    return " ".join(str(value) for value in values)


def configuration_from(
    namespace: argparse.Namespace,
    parser: argparse.ArgumentParser,
    defaults: Configuration | None = None,
) -> Configuration:
    """Turn parsed options into a configuration.

    Args:
        namespace: What a parser made by :func:`add_arguments` returned.
        parser: That parser, to report errors.
        defaults: For options that were not given; None for those of :class:`Configuration`.

    Returns:
        The configuration.
    """
    names = {entry.name for entry in dataclasses.fields(Configuration)}
    given = {name: value for name, value in vars(namespace).items() if name in names}
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = flatten(name, value, parser)
    check_output(given.get("output"), parser)
    return dataclasses.replace(defaults or Configuration(), **given, chosen=frozenset(given))


def check_output(output: Path | None, parser: argparse.ArgumentParser) -> None:
    """Report an ``--output`` that is a file."""
    if output is not None and output.exists() and not output.is_dir():
        parser.error(f"argument --output: expected a folder, got the file '{output}'")


def flatten(name: str, groups: list[list[Any]], parser: argparse.ArgumentParser) -> tuple[Any, ...]:
    """Join the values of ``--option a,b c``, where the order and, but for widths, each counts."""
    values = tuple(value for group in groups for value in group)
    option = "--" + name.replace("_", "-")
    if not values:
        parser.error(f"argument {option}: expected at least one value, got none")
    repeated = [value for value in values if values.count(value) > 1]
    if repeated and name != "hidden":
        parser.error(
            f"argument {option}: expected every value once, got {repeated[0]} more than once"
        )
    return values
