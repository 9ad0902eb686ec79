"""What takes time outside training: loading a snapshot, and importing the package."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.rounds import time_in_rounds
from benchmarks.speed import names as speed
from benchmarks.speed.cases import build
from benchmarks.speed.penalty.results import Duration
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


def time_loading(rounds: int, *, quick: bool = False) -> Duration:
    """Load a snapshot, and decompose its largest factor: loading never does that.

    Args:
        rounds: Number of rounds.
        quick: Whether to take only a few examples, and each time only once.

    Returns:
        Both times.
    """
    problem = build(speed.LARGE_MLP, quick=quick).beginning(EXAMPLES)
    parameters = list(problem.model.parameters())
    operator = EKFACLinearOperator(
        problem.model, problem.criterion, parameters, problem.batches, check_deterministic=False
    )
    size = max(max(block.eigenvalues.shape) for block in operator.blocks)
    noise = torch.randn(2 * size, size).relu()
    factor = noise.T @ noise / len(noise)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "snapshot.safetensors"
        operator.save(path)
        milliseconds = time_in_rounds(
            {
                "load": lambda: EKFACLinearOperator.load(path),
                "eigh": lambda: torch.linalg.eigh(factor),
            },
            rounds=rounds,
            repetitions=1 if quick else REPETITIONS,
        )
    seconds = {name: [t / 1_000 for t in times] for name, times in milliseconds.items()}
    label = f"loading a snapshot of {speed.CASES[speed.LARGE_MLP]}"
    return Duration(label, seconds["load"], f"one eigh of {size} × {size}", seconds["eigh"])


def time_imports(*, quick: bool = False) -> Duration:
    """Import PyTorch and then this package, in fresh processes.

    Args:
        quick: Whether to do it only once.

    Returns:
        Both times.
    """
    ours, others = [], []
    for _ in range(1 if quick else PROCESSES):
        done = subprocess.run(
            [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True
        )
        other, own = map(float, done.stdout.split())
        ours.append(own)
        others.append(other)
    return Duration("importing rotate_ewc", ours, "importing torch before", others, IMPORT_SECONDS)
