"""What is to be run, for every method the same search, then the test; and how it is run.

The search has two stages. The first tries powers of ten around a middle that is fixed for each
method in :data:`benchmarks.methods.METHODS`, a hundred times that in split streams; the second goes
half a power of ten to either side of the best. A method that finds its strength by itself is also
run so in the first, to tell how much it loses thereby.
"""

import dataclasses
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from joblib import Parallel, delayed
from tqdm import tqdm

from benchmarks.configuration import Configuration
from benchmarks.methods import METHODS, Variant
from benchmarks.results import Job, Record, load, save
from benchmarks.suite.outcome import best_strength, by_strength

# Where a task lacks most classes, a penalty must hold much more. The same factor for every method.
STRONGER_IN_SPLIT_STREAMS = 100.0


@dataclass(frozen=True)
class Search:
    """How strengths are chosen."""

    values: int = 5  # powers of ten to try first, an odd number; 0 for no search
    refine: bool = True  # whether to try half a power of ten to either side of the best
    seeds: tuple[int, ...] = (0,)  # every strength is tried with each


@dataclass(frozen=True)
class Sweep:
    """All runs of one experiment."""

    configuration: Configuration
    methods: Sequence[str]
    seeds: Sequence[int]  # every method is tested with each
    search: Search
    scenario: str  # name of the results
    data_source: str  # where the images are from

    def run(self, execute: Callable[[Sequence[Job]], list[Record]]) -> list[Record]:
        """Search, refine and test, each stage for all methods at once."""
        found = execute(self.first_search()) if self.search.values else []
        if self.search.values and self.search.refine:
            found += execute(self.second_search(found))
        return found + execute(self.tests(found))

    def first_search(self) -> list[Job]:
        """Powers of ten around the middle of each method's range, and what finds its own."""
        half = self.search.values // 2
        factor = STRONGER_IN_SPLIT_STREAMS if self.scenario.startswith("split") else 1.0
        found = [
            (name, default)
            for name in self._searched_methods()
            if isinstance(default := METHODS[name].default_strength, str)
        ]
        powers = [
            (name, factor * METHODS[name].centre * 10.0**power)
            for name in self._searched_methods()
            for power in range(-half, half + 1)
        ]
        return self._searches([*powers, *found])

    def second_search(self, found: Sequence[Record]) -> list[Job]:
        """Half a power of ten to either side of each method's best in the first search."""
        return self._searches(
            (name, best * factor)
            for name in self._searched_methods()
            if (best := _best(name, found)) is not None
            for factor in (10.0**-0.5, 10.0**0.5)
        )

    def tests(self, found: Sequence[Record]) -> list[Job]:
        """Every method at its default strength and at the best of the search, often the same."""
        strengths = {name: METHODS[name].default_strength for name in self.methods}
        return [
            self._job(name, strength, seed, validate=False)
            for seed in self.seeds
            for name, default in strengths.items()
            for strength in dict.fromkeys((default, _best(name, found) or default))
        ]

    def _searches(self, strengths: Iterable[tuple[str, float | str]]) -> list[Job]:
        """Jobs on held-out training images, with strengths as people write them."""
        chosen = [
            (name, strength if isinstance(strength, str) else float(f"{strength:.3g}"))
            for name, strength in strengths
        ]
        return [
            self._job(name, strength, seed, validate=True)
            for seed in self.search.seeds
            for name, strength in chosen
        ]

    def _job(self, name: str, strength: float | str | None, seed: int, *, validate: bool) -> Job:
        """One run. Joint training has all examples anyway, and needs no buffer of them."""
        replay = 0 if METHODS[name].trained_jointly else self.configuration.replay
        variant = Variant(name, strength, f" + replay {replay}" if replay else "")
        configuration = dataclasses.replace(self.configuration, validate=validate, replay=replay)
        return Job(variant, seed, configuration, self.scenario, self.data_source)

    def _searched_methods(self) -> list[str]:
        """The methods that have a strength."""
        return [name for name in self.methods if METHODS[name].default_strength is not None]


def _best(name: str, found: Iterable[Record]) -> float | None:
    """The best strength of a method so far; None where nothing was searched."""
    groups = by_strength(record for record in found if record.method == name)
    return best_strength(groups)


@dataclass
class Pool:
    """Workers that do jobs."""

    output: Path  # folder of the results
    data_root: Path  # folder of the data sets
    workers: int = 1  # number of processes; with 1, this one does the work
    threads: int | None = None  # of PyTorch, for each; None shares out its choice
    failures: dict[str, str] = field(default_factory=dict)  # what went wrong, by job

    def __post_init__(self) -> None:
        """Share out the threads."""
        import torch

        self.threads = self.threads or max(1, torch.get_num_threads() // self.workers)

    def execute(self, jobs: Sequence[Job]) -> list[Record]:
        """Do the jobs that have no record yet; return all records but of those that failed."""
        waiting = [job for job in jobs if load(job, self.output) is None]
        outcomes = Parallel(self.workers, return_as="generator_unordered")(
            delayed(_work)(job, self.output, self.data_root, self.threads, self.workers)
            for job in waiting
        )
        # disable=None: no bar unless standard error is a terminal
        with tqdm(total=len(jobs), initial=len(jobs) - len(waiting), disable=None) as bar:
            for job, outcome in outcomes:
                if isinstance(outcome, str):
                    self.failures[str(job)] = outcome
                    print(f"{job}: failed: {outcome.strip().splitlines()[-1]}", flush=True)
                elif bar.disable:
                    print(f"{job}: {outcome:.2%}", flush=True)
                bar.set_description(str(job))
                bar.update()
        records = [load(job, self.output) for job in jobs]
        return [record for record in records if record is not None]


def _work(
    job: Job, output: Path, data_root: Path, threads: int, workers: int
) -> tuple[Job, float | str]:
    """Do a job and keep its record; return the accuracy, or the traceback if it failed."""
    try:
        record = _run(job, data_root, threads)
    except Exception:  # others go on
        return job, traceback.format_exc()
    configuration = {**record.configuration, "jobs": workers}
    save(dataclasses.replace(record, configuration=configuration), job, output)
    return job, record.average_accuracy


def _run(job: Job, data_root: Path, threads: int) -> Record:
    """Train and test."""
    import torch

    from benchmarks import experiment
    from benchmarks.scenarios import load_data, make_scenario

    torch.set_num_threads(threads)
    data = load_data(job.configuration, data_root)
    scenario = make_scenario(job.configuration, data, job.seed)
    return experiment.run(job.variant, scenario, job.configuration, seed=job.seed, quiet=True)
