"""What the options of several commands have in common; nothing here imports anything heavy."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.option_types import Count, Folder, Threads

FEWEST_ROUNDS, QUICK_ROUNDS = 5, 2
QUICK_WARNING = "A smoke test: a few examples, whose figures mean nothing."


@dataclass(frozen=True, kw_only=True)
class MeasuringOptions:
    """Options of every command that measures times.

    Attributes:
        rounds: Number of rounds.
        threads: CPU threads of PyTorch.
        output: Folder of the results.
    """

    rounds: Count = FEWEST_ROUNDS
    threads: Threads = None
    output: Folder = Path("results")

    def settle_rounds(self, *, quick: bool = False) -> None:
        """Refuse few rounds, of which a smoke test takes no more than two."""
        if quick:
            object.__setattr__(self, "rounds", min(self.rounds, QUICK_ROUNDS))
        elif self.rounds < FEWEST_ROUNDS:
            raise ValueError(
                f"--rounds: expected a whole number ≥ {FEWEST_ROUNDS}, got {self.rounds}"
            )
