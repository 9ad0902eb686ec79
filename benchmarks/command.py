"""What several commands do before and after their work."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.configuration import Configuration

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.data import ImageData

LOG_WIDTH = 110


class CommandError(Exception):
    """What prevents a command from running, to be told in one line."""


def make_folder(output: Path) -> None:
    """Make the folder of the results, before anything takes time.

    Raises:
        CommandError: If it cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output: cannot make the folder: {error}") from error


def obstacle(missing: Sequence[str], output: Path | None) -> str | None:
    """Make the folder of the results, if nothing else is in the way.

    Args:
        missing: Packages that are needed and not there.
        output: The folder; None where nothing is written.

    Returns:
        What prevents the command from running; None if nothing does.
    """
    if missing:
        return f"something is missing; it comes with: pip install {' '.join(missing)}"
    if output is None:
        return None
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"--output: cannot make the folder: {error}"
    return None


def complain(name: str, message: str) -> int:
    """Say what prevents a benchmark from running, and return the exit code for it."""
    print(f"benchmarks.{name}: error: {message}", file=sys.stderr)
    return 1


def prepare(configuration: Configuration) -> "tuple[Configuration, ImageData]":
    """Set the number of threads, load the images, and announce them.

    Args:
        configuration: The options.

    Returns:
        The options, with the defaults that fit the data, and the images.
    """
    import torch

    from benchmarks.scenarios import load_data

    if configuration.threads is not None:
        torch.set_num_threads(configuration.threads)
    data = load_data(configuration)
    print(data.announcement, flush=True)
    if data.source == "digits":
        configuration = configuration.for_digits()
        print(
            f"So few images are learned with --epochs {configuration.epochs} "
            f"--batch-size {configuration.batch_size}.",
            flush=True,
        )
    return configuration, data


def make_console() -> "Console":
    """A console as wide as the terminal; a log has no width, and the guess would break lines."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
