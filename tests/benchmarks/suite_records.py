"""Made-up experiments, for the tests of what presents them."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.metrics import backward_transfer, forgetting
from benchmarks.records import Record
from benchmarks.suite.protocol import Experiment, MethodResult

# For each method: the accuracy at the end, and how sharp its optimum is.
LIKELY = {
    "naive": (0.45, None),
    "ewc": (0.80, 2.0),
    "ewc-online": (0.79, 2.2),
    "si": (0.82, 3.5),
    "mas": (0.81, 3.0),
    "lwf": (0.70, 1.2),
    "r-ewc": (0.83, 2.5),
    "kronecker-laplace": (0.91, 1.2),
    "diagonal-ewc": (0.80, 2.1),
    "rotated-ewc": (0.925, 0.9),
    "rotated-ewc-separate": (0.928, 0.8),
    "rotated-ewc-proximal": (0.94, 0.4),
    "rotated-adam": (0.935, 0.5),
    "joint": (0.97, None),
}
STRENGTHS = tuple(10.0**power for power in range(-2, 5))
CONFIGURATION: Mapping[str, Any] = {
    "data": "mnist",
    "tasks": 10,
    "epochs": 2,
    "hidden": [100, 100],
    "batch_size": 250,
    "learning_rate": 0.001,
    "optimizer": "adam",
    "schedule": "constant",
    "fisher_samples": 10_000,
    "fisher_type": "mc",
    "temperature": 1.0,
    "replay": 0,
    "threads": 1,
    "jobs": 1,
}
VERSIONS: Mapping[str, Any] = {
    "python": "3.12.1",
    "torch": "2.9.0",
    "avalanche": "0.6.0",
    "rotate_ewc": "0.1",
    "processor": "x86_64",
    "cpu_count": 2,
}
SPECTRA = {
    "0.weight": {
        "ranks": [1.0, 2.0, 4.0, 8.0, 16.0],
        "eigenvalues": [1.0, 0.1, 0.01, 1e-4, 0.0],
        "dimension": [20.0],
    },
    "2.weight": {"ranks": [1.0, 2.0], "eigenvalues": [0.0, 0.0], "dimension": [2.0]},
}


def make_record(
    label: str,
    matrix: Sequence[Sequence[float]],
    *,
    strength: float | None = None,
    validate: bool = False,
    configuration: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Record:
    """Make a record from a label, an accuracy matrix and changes."""
    jointly = label.startswith("joint")
    fields: dict[str, Any] = {
        "method": label.partition(" + ")[0].partition("[")[0],
        "label": label,
        "seed": 0,
        "average_accuracy": fmean(matrix[-1]),
        "forgetting": None if jointly else forgetting(matrix),
        "backward_transfer": None if jointly else backward_transfer(matrix),
        "accuracy_matrix": [list(row) for row in matrix],
        "training_seconds": 10.0,
        "estimation_seconds": 0.5,
        "penalty_ms_per_step": 1.5,
        "state_bytes": 2**20,
        "spectra": {},
        "trained_jointly": jointly,
        "configuration": {
            **CONFIGURATION,
            "tasks": len(matrix),
            "strength": strength,
            "validate": validate,
            **(configuration or {}),
        },
        "versions": dict(VERSIONS),
    }
    return Record(**(fields | changes))


def flat(label: str, accuracy: float, **changes: Any) -> Record:
    """A record of two tasks with the same accuracy throughout."""
    return make_record(label, [[accuracy, accuracy]] * 2, **changes)


def searched(
    label: str, accuracies: Mapping[float, float | Sequence[float]]
) -> dict[float, list[Record]]:
    """A search from accuracies by strength, one for each seed."""
    return {
        strength: [
            flat(label, accuracy, strength=strength, seed=seed, validate=True)
            for seed, accuracy in enumerate([values] if isinstance(values, float) else list(values))
        ]
        for strength, values in accuracies.items()
    }


def result(label: str, **changes: Any) -> MethodResult:
    """A result with nothing in it but what is given."""
    fields: dict[str, Any] = {
        "search": {},
        "tested": [],
        "at_default": [],
        "strength": None,
        "default": None,
    }
    return MethodResult(label=label, **(fields | changes))


def experiment(*results: MethodResult, scenario: str = "permuted_mnist") -> Experiment:
    """An experiment with some results."""
    return Experiment(scenario, dict(CONFIGURATION), results)


def likely_experiment(
    labels: Iterable[str] = tuple(LIKELY), *, tasks: int = 10, seeds: int = 3
) -> Experiment:
    """An experiment as a full sweep leaves it behind: a search of seven strengths, three seeds."""
    generator = np.random.default_rng(0)
    return experiment(*(_likely_result(label, tasks, seeds, generator) for label in labels))


def _likely_result(
    label: str, tasks: int, seeds: int, generator: np.random.Generator
) -> MethodResult:
    sharpness = LIKELY[label][1]
    if sharpness is None:
        runs = [_run(label, None, 0.0, tasks, seed, generator) for seed in range(seeds)]
        return result(label, tested=runs, at_default=runs)
    best = int(generator.integers(2, 6))
    search = {
        strength: [
            _run(label, strength, sharpness * (place - best) ** 2, tasks, 0, generator, True)
        ]
        for place, strength in enumerate(STRENGTHS)
    }
    loss = sharpness * (3 - best) ** 2
    return result(
        label,
        search=search,
        strength=STRENGTHS[best],
        default=STRENGTHS[3],
        tested=[_run(label, STRENGTHS[best], 0.0, tasks, n, generator) for n in range(seeds)],
        at_default=[_run(label, STRENGTHS[3], loss, tasks, n, generator) for n in range(seeds)],
    )


def _run(
    label: str,
    strength: float | None,
    loss: float,
    tasks: int,
    seed: int,
    generator: np.random.Generator,
    validate: bool = False,
) -> Record:
    """A run whose average accuracy is near what :data:`LIKELY` says, less some points."""
    end = LIKELY[label][0]
    age = np.arange(tasks)[:, None] - np.arange(tasks)[None]
    drop = (0.975 - max(end - loss / 100, 0.1)) * 2 / tasks
    matrix = np.where(age < 0, 0.1, 0.975 - drop * np.maximum(age, 0))
    matrix += generator.normal(0, 0.004, matrix.shape) + generator.normal(0, 0.003)
    if label == "joint":
        matrix = np.repeat(matrix.clip(0.97, 0.98)[-1:], tasks, axis=0)
    own = label.startswith("rotated")
    ranks = [float(rank) for rank in 2 ** np.linspace(0, 10, 40)]
    spectra = {
        name: {
            "ranks": ranks,
            "eigenvalues": [scale * rank**-power if rank < cut else 0.0 for rank in ranks],
            "dimension": [float(dimension)],
        }
        for name, scale, power, cut, dimension in (
            ("0.weight, 0.bias", 1e-2, 1.3, 1e9, 78500),
            ("2.weight, 2.bias", 5e-2, 1.1, 1e9, 10100),
            ("classifier.weight, classifier.bias", 2e-1, 1.6, 200, 1010),
        )
    }
    return make_record(
        label,
        matrix.clip(0, 1).tolist(),
        strength=strength,
        validate=validate,
        seed=seed,
        training_seconds=30 * float(1 + 0.05 * generator.random()) * (1.6 if own else 1.1),
        estimation_seconds=2.5 if own else 0.4 * (label not in ("naive", "joint")),
        penalty_ms_per_step=0.6 if own else 0.2,
        state_bytes=int(2**20 * (3.4 if own else 0.7) * (label not in ("naive", "joint"))),
        spectra=spectra if own and "adam" not in label else {},
    )
