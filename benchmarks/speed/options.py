"""The options of the command; nothing here imports anything heavy."""

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.configuration import Configuration, check_output, flatten
from benchmarks.option_types import number, one_of, several, whole_number
from benchmarks.speed import names

NAME = "speed"
FEWEST_ROUNDS = 5
QUICK_ROUNDS = 2
DESCRIPTION = """\
Time the estimation of Fisher matrices in EKFAC form: this package, its peers, and for scale a
forward and backward pass of the same data. The models are

  a             MLP 784-400-400-10, 10,000 examples
  b             MLP 784-1000-1000-10, 10,000 examples
  c             CNN with four convolutions and two linear layers, 2,000 images of 32 x 32 pixels
  d-groupnorm   ResNet-18 of width 16 with GroupNorm, 512 images
  d-batchnorm   the same with BatchNorm, frozen
  e             Transformer of four blocks of width 256, 256 sequences of 128 tokens

each with sampled labels (mc) and with the exact Fisher matrix (type2). Everybody estimates the
weights and biases of linear layers and convolutions, which all packages know. The data are noise:
cost depends on shapes alone.

Each contender has a process of its own; they take turns, and only one works at any time. Every
other round is backwards, and times are medians over rounds. Who has another trace than this
package is marked as wrong, and not compared. The floor is what the necessary products and `eigh`
take, at the rates that this machine shows for large ones in the same rounds.

Writes speed.json and speed.png after every case. Results of earlier calls with as many threads
stay in them; those of the same case, Fisher type and fraction are replaced. Wants a machine with
nothing else to do, and takes an hour or more. Lists are separated by spaces or commas.
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """All options of one call.

    Attributes:
        cases: Cases; None for all.
        fisher: Fisher types; None for those that each case has by default.
        contenders: Who is measured; None for the default.
        rounds: Number of rounds.
        threads: CPU threads of PyTorch; None leaves its own choice.
        fraction: Part of every case's examples, in whole batches.
        quick: Whether to run a smoke test with a few examples.
        output: Folder of the results.
    """

    cases: tuple[str, ...] | None = None
    fisher: tuple[str, ...] | None = None
    contenders: tuple[str, ...] | None = None
    rounds: int = FEWEST_ROUNDS
    threads: int | None = None
    fraction: float = 1.0
    quick: bool = False
    output: Path = Configuration.output


def parse_options(arguments: Sequence[str] | None) -> Options:
    """Turn a command line into options, or leave with a message that says what is wrong.

    Args:
        arguments: Words of the command line; None for those of the process.

    Returns:
        The options.

    Raises:
        SystemExit: With code 2 after a message on standard error, or code 0 after ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    _add_choices(parser)
    _add_settings(parser, Options())
    given = vars(parser.parse_args(arguments))
    for name in ("cases", "fisher", "contenders"):
        if name in given:
            given[name] = flatten(name, given[name], parser)
    check_output(given.get("output"), parser)
    quick = given.get("quick", False)
    given.setdefault("rounds", QUICK_ROUNDS if quick else FEWEST_ROUNDS)
    if given["rounds"] < FEWEST_ROUNDS and not quick:
        parser.error(
            f"argument --rounds: expected a whole number ≥ {FEWEST_ROUNDS} without --quick, "
            f"got '{given['rounds']}'"
        )
    return Options(**given)


def _add_choices(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose what is measured; those that are not given leave no trace."""
    _add_choice(parser, "--cases", "CASE", names.CASES, "all")
    _add_choice(
        parser,
        "--fisher",
        "TYPE",
        names.FISHERS,
        f"all, but for {names.TRANSFORMER}, where only mc is measured: the exact matrix takes a "
        "backward pass for each of 64 classes of each of 128 tokens",
    )
    _add_choice(
        parser,
        "--contenders",
        "NAME",
        names.CONTENDERS,
        f"all but {names.KRONFLUENCE}, which takes most of an hour; names with blanks are written "
        "in quotes",
    )


def _add_choice(
    parser: argparse.ArgumentParser, option: str, word: str, accepted: Iterable[str], default: str
) -> None:
    """Add an option that takes some of several names."""
    parser.add_argument(
        option,
        type=several(one_of(accepted)),
        nargs="+",
        metavar=word,
        help=f"any of {', '.join(accepted)} (default: {default})",
    )


def _add_settings(parser: argparse.ArgumentParser, defaults: Options) -> None:
    """Add the options that say how it is measured; those that are not given leave no trace."""
    parser.add_argument(
        "--rounds",
        type=whole_number(1),
        metavar="R",
        help=f"rounds, at least {FEWEST_ROUNDS} without --quick (default: {defaults.rounds})",
    )
    parser.add_argument(
        "--threads",
        type=whole_number(1),
        metavar="N",
        help="CPU threads of PyTorch (default: PyTorch's choice)",
    )
    parser.add_argument(
        "--fraction",
        type=number(zero=False, largest=1.0),
        metavar="F",
        help="part of every case's examples, in whole batches and at least one (default: 1)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a smoke test with a few examples and {QUICK_ROUNDS} rounds, whose figures mean "
        "nothing",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"where speed.json and speed.png go (default: {defaults.output})",
    )
