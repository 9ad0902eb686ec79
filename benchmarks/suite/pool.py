"""Runs many jobs, in this process or in several, and keeps each record when it is there."""

import dataclasses
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from benchmarks.configuration import Configuration
from benchmarks.results import Job, Record, load, save

if TYPE_CHECKING:
    from benchmarks.data import ImageData


@dataclass
class Pool:
    """Workers that do jobs; a context, at the end of which they are gone.

    Attributes:
        output: Folder of the results.
        data_root: Folder of the data sets.
        workers: Number of processes; with 1, this one does the work.
        threads: CPU threads of PyTorch for each; None shares out those that one process would use.
        failures: What went wrong, by job.
    """

    output: Path
    data_root: Path
    workers: int = 1
    threads: int | None = None
    failures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Start no worker yet."""
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Pool":
        """Start the workers, if there are several."""
        if self.workers > 1:
            # A fork of a process in which PyTorch has threads may hang.
            context = get_context("spawn")
            self._executor = ProcessPoolExecutor(
                self.workers, mp_context=context, initializer=_begin_worker
            )
        return self

    def __exit__(self, *error: object) -> None:
        """Stop: runs that have not begun are dropped, those under way are ended."""
        if self._executor is None:
            return
        if error[0] is not None:
            for worker in active_children():
                worker.terminate()
                worker.join()
        self._executor.shutdown(cancel_futures=True)

    def execute(self, jobs: Sequence[Job]) -> list[Record]:
        """Do the jobs that have no record yet; return all records but of those that failed."""
        waiting = [job for job in jobs if load(job, self.output) is None]
        # disable=None: no bar unless standard error is a terminal
        with tqdm(total=len(jobs), initial=len(jobs) - len(waiting), disable=None) as bar:
            for job, outcome in self._outcomes(waiting):
                if isinstance(outcome, str):
                    self.failures[str(job)] = outcome
                    print(f"{job}: failed: {outcome.strip().splitlines()[-1]}", flush=True)
                elif bar.disable:
                    print(f"{job}: {outcome:.2%}", flush=True)
                bar.set_description(str(job))
                bar.update()
        records = [load(job, self.output) for job in jobs]
        return [record for record in records if record is not None]

    def _outcomes(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, float | str]]:
        """Do jobs, and yield each with its accuracy or with what went wrong."""
        settings = (self.output, self.data_root, self.threads, self.workers)
        if self._executor is None:
            for job in jobs:
                yield job, work(job, *settings)
            return
        futures = {self._executor.submit(work, job, *settings): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _begin_worker() -> None:
    """Leave interruptions to the parent, and end with it, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Wait for a process to end, and end this one at once: nobody waits for its result."""
    wait([sentinel])
    os._exit(1)


def work(job: Job, output: Path, data_root: Path, threads: int | None, workers: int) -> float | str:
    """Do a job and keep its record; return the accuracy, or the traceback if it failed."""
    try:
        record = _run(job, data_root, threads or _share(workers))
    except Exception:
        return traceback.format_exc()
    configuration = {**record.configuration, "jobs": workers}
    save(dataclasses.replace(record, configuration=configuration), job, output)
    return record.average_accuracy


def _run(job: Job, data_root: Path, threads: int) -> Record:
    """Train and test."""
    import torch

    from benchmarks import experiment
    from benchmarks.scenarios import make_scenario

    torch.set_num_threads(threads)
    # The images are those of all runs with these options, whatever else differs.
    kept = ("scenario", "training_images", "validate")
    options = {name: getattr(job.configuration, name) for name in kept}
    data = _images(Configuration(**options), data_root)
    scenario = make_scenario(job.configuration, data, job.seed)
    return experiment.run(
        job.variant,
        scenario,
        job.configuration,
        seed=job.seed,
        quiet=True,
    )


@lru_cache(maxsize=1)
def _share(workers: int) -> int:
    """How many threads of PyTorch's own choice, when this process began, one of several gets."""
    import torch

    return max(1, torch.get_num_threads() // workers)


@lru_cache(maxsize=1)
def _images(configuration: Configuration, data_root: Path) -> "ImageData":
    """The images of the last run, which are mostly those of the next."""
    from benchmarks.scenarios import load_data

    return load_data(configuration, data_root)
