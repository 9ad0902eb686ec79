"""The processes that do the work: each waits for its turn and times itself.

Only one works at any time, since whoever asks waits for the answer.
"""

import gc
import math
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

SPAWN = multiprocessing.get_context("spawn")
PRODUCTS, EIGH = "products", "eigh"
TINY = 2  # examples of the first batch, which brings libraries into memory
SECONDS_TO_END = 5.0


@dataclass(frozen=True)
class Job:
    """What a process is there for.

    Attributes:
        case: The case.
        fisher: The Fisher type.
        contender: Whose work it does.
        fraction: Part of the examples.
        quick: Whether to take a few examples only.
        threads: CPU threads of PyTorch.
    """

    case: str
    fisher: str
    contender: str
    fraction: float
    quick: bool
    threads: int


@dataclass(frozen=True)
class Reply:
    """What a process says of one piece of work.

    Attributes:
        seconds: Time that it took.
        trace: Trace of the Fisher matrix, if there is one.
        memory: Bytes by which it raised the peak; None where that was not measured.
        problem: Why it was not done; None if it was.
    """

    seconds: float = 0.0
    trace: float | None = None
    memory: int | None = None
    problem: str | None = None


class Worker:
    """A process as its owner sees it."""

    def __init__(self, target: Callable[[Connection, Any], None], job: Any) -> None:
        """Start the process.

        Args:
            target: What it runs, with its end of the line and the job.
            job: Anything that can be pickled.
        """
        self._line, other = SPAWN.Pipe()
        self._process = SPAWN.Process(target=target, args=(other, job), daemon=True)
        self._process.start()
        other.close()

    def answer(self) -> Any:
        """Wait for what it says next.

        Raises:
            RuntimeError: If it has died.
        """
        try:
            return self._line.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(SECONDS_TO_END)
            raise RuntimeError(
                f"the process died with exit code {self._process.exitcode}"
            ) from None

    def ask(self, message: Any) -> Any:
        """Have it do something, and wait for the answer.

        Raises:
            RuntimeError: If it has died.
        """
        # Of what it died is found when it does not answer.
        with suppress(BrokenPipeError, ConnectionResetError):
            self._line.send(message)
        return self.answer()

    def close(self) -> None:
        """Let the process end by itself, or end it if it is busy."""
        self._line.close()
        self._process.join(SECONDS_TO_END)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _settle(threads: int) -> None:
    """Set up a process; only its owner reacts to an interruption, and ends it."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)


def _messages(line: Connection) -> Iterator[Any]:
    """Messages until the other end is closed."""
    while True:
        try:
            yield line.recv()
        except EOFError:
            return


def serve_estimations(line: Connection, job: Job) -> None:
    """Estimate once for the memory that it takes, and then whenever a seed comes.

    Args:
        line: Gets a :class:`Reply` for the first time, and for every seed.
        job: What to estimate.
    """
    try:
        _settle(job.threads)
        estimate, first = _first_estimation(job)
        line.send(first)
        for seed in _messages(line):
            gc.collect()
            start = perf_counter()
            trace = estimate(seed)
            seconds = perf_counter() - start
            line.send(Reply(seconds, finite(trace)))
    # Whatever a package raises is its answer.
    except Exception as error:
        line.send(Reply(problem=in_one_line(error)))


def _first_estimation(job: Job) -> tuple[Callable[[int], float | None], Reply]:
    """Prepare, and measure the memory of the estimation that does not count."""
    from benchmarks.speed.cases import build
    from benchmarks.speed.contenders import BY_NAME
    from benchmarks.speed.memory import peak_growth

    contender = BY_NAME[job.contender]
    contender.prepare(build(job.case, quick=True).beginning(TINY), job.fisher)(0)
    problem = build(job.case, fraction=job.fraction, quick=job.quick)
    estimate = contender.prepare(problem, job.fisher)
    trace, memory = peak_growth(lambda: estimate(0))
    return estimate, Reply(trace=finite(trace), memory=memory)


def finite(trace: float | None) -> float | None:
    """A trace that can be compared.

    Raises:
        ValueError: If it is infinite or no number.
    """
    if trace is not None and not math.isfinite(trace):
        raise ValueError(f"the trace is {trace}")
    return trace


def in_one_line(error: BaseException) -> str:
    """The name of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@dataclass(frozen=True)
class MachineJob:
    """What the process is told that measures the machine.

    Attributes:
        sizes: Sizes of the matrices for ``eigh``.
        threads: CPU threads of PyTorch.
        quick: Whether to measure everything once.
    """

    sizes: Sequence[int]
    threads: int
    quick: bool


def serve_calibrations(line: Connection, job: MachineJob) -> None:
    """Measure the machine whenever :data:`PRODUCTS` or :data:`EIGH` comes."""
    from benchmarks.speed.machine import eigh_times, product_rates

    _settle(job.threads)
    for message in _messages(line):
        if message == PRODUCTS:
            line.send(product_rates(quick=job.quick))
        else:
            line.send(eigh_times(job.sizes, quick=job.quick))
