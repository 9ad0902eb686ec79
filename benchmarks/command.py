"""What several commands do before and after their work; results are never written by halves."""

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.configuration import Configuration, Steps, StreamOptions
    from benchmarks.data import ImageData
    from benchmarks.scenarios import PermutedImages

LOG_WIDTH = 120

Result = TypeVar("Result")


class CommandError(Exception):
    """What prevents a command from running, to be told in one line."""


def make_folder(output: Path) -> None:
    """Make the folder of the results before anything takes time, or raise ``CommandError``."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output: cannot make the folder: {error}") from error


def start(
    options: "StreamOptions",
) -> "tuple[Configuration, str, Iterator[tuple[int, PermutedImages]]]":
    """Settle the options; return them, the title of the results, and a stream for every seed."""
    from benchmarks.scenarios import PermutedImages

    make_folder(options.output)
    use_threads(options.threads)
    configuration, data = load(options, "permuted_mnist", options.data_root)
    title = "Permuted MNIST" if data.source == "mnist" else "Permuted digits (not MNIST)"
    tasks = configuration.tasks
    return configuration, title, ((s, PermutedImages(data, tasks, s)) for s in options.seeds)


def load(
    options: "Steps", scenario: str, data_root: Path, **others: Any
) -> "tuple[Configuration, ImageData]":
    """Load and announce the images of a scenario, and settle the options to fit them."""
    from benchmarks.configuration import DIGITS_DEFAULTS, settle
    from benchmarks.scenarios import load_data

    data = load_data(settle(options, scenario, **others), data_root)
    print(data.announcement, flush=True)
    digits = data.source == "digits"
    if digits:
        defaults = ", ".join(f"{name} {value}" for name, value in DIGITS_DEFAULTS.items())
        print(f"Defaults for so few images: {defaults.replace('_', ' ')}.", flush=True)
    return settle(options, scenario, digits=digits, **others), data


def use_threads(threads: int | None) -> None:
    """Set the number of PyTorch's CPU threads; None leaves its own choice."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def keep(results: Iterable[Result], path: Path, document: Mapping[str, Any]) -> list[Result]:
    """Collect dataclass instances, and write all to a file after each: interruptions lose none."""
    found: list[Result] = []
    for result in results:
        found.append(result)
        plain = [dataclasses.asdict(one) for one in found]  # type: ignore[call-overload]
        write_document(path, {**document, "records": plain})
    return found


def replace_file(path: Path, content: bytes | str) -> Path:
    """Write bytes or UTF-8 to a file that is, at every moment, the old one or the new one."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    # A rename is atomic only within one file system, hence the temporary file next to the target.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON, as :func:`replace_file` does; ``ValueError`` if a number is not finite."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    replace_file(path, f"{text}\n")


def print_table(
    title: str, names: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """Print a table with headings of columns of names and of numbers."""
    from benchmarks.report.tables import make_table

    make_console().print(make_table(title, names, numbers, rows))


def make_console() -> "Console":
    """A console as wide as the terminal; a log has no width, and the guess would break lines."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH)


def versions() -> dict[str, Any]:
    """Versions of the software, and the processor: what results depend on besides options."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "avalanche": version_of("avalanche-lib") or "unknown",
        "rotate_ewc": version_of("rotate-ewc") or "unknown",
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
    }


def version_of(distribution: str) -> str | None:
    """Version of a distribution; None where it is not installed, or run from its sources."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
