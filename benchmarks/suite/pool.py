"""Runs many jobs, in this process or in several, and keeps each record when it is there."""

import dataclasses
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from joblib import Parallel, delayed
from tqdm import tqdm

from benchmarks.results import Job, Record, load, save


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
