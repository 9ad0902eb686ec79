"""The lines above a table that say what it is about: options, seeds, machine and versions."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.records import Record
from benchmarks.suite.protocol import Experiment
from benchmarks.suite.summary import records_of

UNKNOWN = "unknown"

# What is said about options, in this order. Those not named here follow as "name value".
PHRASES: dict[str, Callable[[Any], str]] = {
    "tasks": lambda value: f"{value} tasks",
    "increment": lambda value: f"{value}-incremental",
    "data": lambda value: f"data {value}",
    "training_images": lambda value: f"{value or 'all'} training images",
    "hidden": lambda value: f"hidden layers {'-'.join(map(str, value)) or 'none'}",
    "epochs": lambda value: f"{value} epoch{'' if value == 1 else 's'} per task",
    "batch_size": lambda value: f"batches of {value}",
    "optimizer": lambda value: f"optimizer {value}",
    "learning_rate": lambda value: f"learning rate {value:g}",
    "schedule": lambda value: f"{value} schedule",
    "warm_up": lambda value: f"warm-up {value:g}",
    "fisher_samples": lambda value: f"Fisher matrix from {value or 'all'} examples",
    "fisher_type": lambda value: f"of type {value}",
    "temperature": lambda value: f"at temperature {value:g}",
}
# Options that are told elsewhere, or that the protocol varies.
NOT_SAID = frozenset({"scenario", "replay", "threads", "jobs", "device"})
SOFTWARE = {
    "rotate_ewc": "rotate-ewc",
    "python": "Python",
    "torch": "PyTorch",
    "avalanche": "Avalanche",
}


def setting_lines(experiment: Experiment) -> list[str]:
    """Say what an experiment's numbers were measured with.

    Args:
        experiment: Records sorted by the protocol.

    Returns:
        Sentences without markup: the options, the seeds, machine and versions, and a warning where
        times are not comparable. What differs between records is said to differ.
    """
    records = records_of(experiment.results)
    lines = [_options(experiment), _seeds(records)]
    if records:
        lines += [_machine(records), *_warning(records)]
    return lines


def _options(experiment: Experiment) -> str:
    setting = experiment.setting
    names = [name for name in PHRASES if name in setting]
    names += [name for name in setting if name not in PHRASES and name not in NOT_SAID]
    if not experiment.scenario.startswith("split"):
        names = [name for name in names if name != "increment"]
    return "Setting: " + ", ".join(_phrase(name, setting[name]) for name in names) + "."


def _phrase(name: str, value: Any) -> str:
    """Say an option; a value of a kind that nobody foresaw is shown as it is."""
    try:
        return PHRASES[name](value)
    except (KeyError, TypeError, ValueError):
        return f"{name.replace('_', ' ')} {value}"


def _seeds(records: Sequence[Record]) -> str:
    tested = sorted({record.seed for record in records if not record.for_validation})
    searched = sorted({record.seed for record in records if record.for_validation})
    return (
        f"Seeds: {_listed(tested) or 'none yet'} on the test images; "
        f"{_listed(searched) or 'none'} in the search for λ on held-out training images."
    )


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in values)


def _machine(records: Sequence[Record]) -> str:
    versions = [record.versions for record in records]
    options = [record.configuration for record in records]
    parts = [
        _one_or_several("processor", (one.get("processor", UNKNOWN) for one in versions)),
        _one_or_several("cores", (one.get("cpu_count", UNKNOWN) for one in versions)),
        _one_or_several("device", (one.get("device", "cpu") for one in options)),
        _one_or_several("threads", (one.get("threads") or UNKNOWN for one in options)),
        _one_or_several("parallel runs", (one.get("jobs", 1) for one in options)),
    ]
    parts += [
        _one_or_several(name, (one.get(key, UNKNOWN) for one in versions))
        for key, name in SOFTWARE.items()
    ]
    return "Measured with: " + ", ".join(parts) + "."


def _one_or_several(name: str, values: Iterable[Any]) -> str:
    """Say a value, or that it differs between runs and what it can be."""
    distinct = sorted({str(value) for value in values})
    differs = f" (differs between runs: {' / '.join(distinct)})"
    return f"{name} {distinct[0]}" if len(distinct) == 1 else name + differs


def _warning(records: Sequence[Record]) -> list[str]:
    most = max(record.configuration.get("jobs") or 1 for record in records)
    if most == 1:
        return []
    return [f"Times were measured while other runs ran beside, up to {most} at once."]
