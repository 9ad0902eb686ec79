"""What the options of several commands have in common; nothing here imports anything heavy."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FEWEST_ROUNDS = 5
QUICK_ROUNDS = 2
QUICK_WARNING = "A smoke test: a few examples, whose figures mean nothing."


@dataclass(frozen=True, kw_only=True)
class MeasuringOptions:
    """Options of every command that measures times.

    Attributes:
        rounds: Number of rounds.
        threads: CPU threads of PyTorch (None: PyTorch's choice).
        output: Folder of the results.
    """

    rounds: int = FEWEST_ROUNDS
    threads: int | None = None
    output: Path = Path("results")

    def check_measuring(self, *, quick: bool = False) -> None:
        """Check these values; a smoke test takes no more rounds than two."""
        check_number("rounds", self.rounds, 1 if quick else FEWEST_ROUNDS)
        if quick:
            object.__setattr__(self, "rounds", min(self.rounds, QUICK_ROUNDS))
        if self.threads is not None:
            check_number("threads", self.threads, 1)
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"--output: expected a folder, got the file {str(self.output)!r}")


def check_number(name: str, value: int, smallest: int) -> None:
    """Refuse a number that is too small."""
    if value < smallest:
        raise ValueError(f"--{name}: expected a whole number ≥ {smallest}, got {value}")


def check_numbers(name: str, values: Sequence[int], smallest: int = 1) -> None:
    """Refuse numbers that are too small, or none."""
    _check_any(name, values)
    for value in values:
        check_number(name, value, smallest)


def check_names(name: str, values: Sequence[str], accepted: Collection[str]) -> None:
    """Refuse unknown names, names given twice, or none."""
    _check_any(name, values)
    for value in values:
        if value not in accepted:
            raise ValueError(f"--{name}: expected one of {', '.join(accepted)}, got {value!r}")
        if values.count(value) > 1:
            raise ValueError(f"--{name}: expected every value once, got {value} more than once")


def _check_any(name: str, values: Sequence[Any]) -> None:
    if not values:
        raise ValueError(f"--{name}: expected at least one value, got none")
