"""What takes time outside training: loading a snapshot, and importing the package."""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.speed import names
from benchmarks.speed.cases import build
from benchmarks.speed.measuring import time_in_rounds
from rotate_ewc import EKFACLinearOperator

EXAMPLES = 64
REPETITIONS = 3
PROCESSES = 5
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
    """The times of something outside training, and of something else, in all rounds."""

    label: str
    seconds: list[float]
    other_label: str
    other_seconds: list[float]


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
        works = (lambda: EKFACLinearOperator.load(path), lambda: torch.linalg.eigh(factor))
        repetitions = 1 if quick else REPETITIONS
        seconds = time_in_rounds(dict(enumerate(works)), rounds=rounds, repetitions=repetitions)
    label = f"loading a snapshot of {names.CASES[names.LARGE_MLP]}"
    return Duration(label, seconds[0], f"one eigh of {size} × {size}", seconds[1])


def time_imports(*, quick: bool = False) -> Duration:
    """Import PyTorch and then this package, in fresh processes; only once if that is quick."""
    command = [sys.executable, "-c", IMPORTS]
    pairs = []
    for _ in range(1 if quick else PROCESSES):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        pairs.append([float(word) for word in done.stdout.split()])
    others, ours = map(list, zip(*pairs, strict=True))
    return Duration("importing rotate_ewc", ours, "importing torch before", others)
