"""What takes time outside training: loading a snapshot, and importing the package."""

import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.speed import names
from benchmarks.speed.cases import build
from benchmarks.speed.rounds import time_in_rounds
from rotate_ewc import EKFACLinearOperator

EXAMPLES = 64
REPETITIONS = 3
PROCESSES = 5
IMPORT_SECONDS = 0.2
IMPORTS = """\
from time import perf_counter
start = perf_counter()
import torch
middle = perf_counter()
import rotate_ewc
print(middle - start, perf_counter() - middle)
"""


@dataclass(frozen=True)
class Duration:
    """Something outside training that is to be short, beside something else."""

    label: str  # what it is
    seconds: list[float]  # times in all rounds
    other_label: str  # what is beside it
    other_seconds: list[float]  # times of that
    # What the median is to be below, in seconds; None for less than the other.
    target: float | None = None

    @property
    def median(self) -> float:
        """Median time."""
        return statistics.median(self.seconds)

    @property
    def other_median(self) -> float:
        """Median time of what is beside it."""
        return statistics.median(self.other_seconds)

    @property
    def limit(self) -> float:
        """What the median is to be below."""
        return self.other_median if self.target is None else self.target


def time_loading(rounds: int, *, quick: bool = False) -> Duration:
    """Load a snapshot, and decompose its largest factor: loading never does that."""
    workload = build(names.LARGE_MLP, quick=quick).beginning(EXAMPLES)
    operator = EKFACLinearOperator(
        workload.model,
        workload.criterion,
        workload.trained_parameters,
        workload.batches,
        check_deterministic=False,
    )
    size = max(max(block.eigenvalues.shape) for block in operator.blocks)
    noise = torch.randn(2 * size, size).relu()
    factor = noise.T @ noise / len(noise)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "snapshot.safetensors"
        operator.save(path)
        seconds = time_in_rounds(
            {
                "load": lambda: EKFACLinearOperator.load(path),
                "eigh": lambda: torch.linalg.eigh(factor),
            },
            rounds=rounds,
            repetitions=1 if quick else REPETITIONS,
        )
    label = f"loading a snapshot of {names.CASES[names.LARGE_MLP]}"
    return Duration(label, seconds["load"], f"one eigh of {size} × {size}", seconds["eigh"])


def time_imports(*, quick: bool = False) -> Duration:
    """Import PyTorch and then this package, in fresh processes; only once if that is quick."""
    ours, others = [], []
    for _ in range(1 if quick else PROCESSES):
        done = subprocess.run(
            [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True
        )
        other, own = map(float, done.stdout.split())
        ours.append(own)
        others.append(other)
    return Duration("importing rotate_ewc", ours, "importing torch before", others, IMPORT_SECONDS)
