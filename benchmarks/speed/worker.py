"""A process for each contender, which works when it is asked, and times itself.

Only one works at any time, since whoever asks waits for the answer.
"""

import gc
import math
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from time import perf_counter
from typing import Any, NamedTuple

from benchmarks.speed.cases import Estimate, build
from benchmarks.speed.contenders import BY_NAME, Contender
from benchmarks.speed.measuring import peak_growth
from benchmarks.speed.names import Combination

SPAWN = multiprocessing.get_context("spawn")
TINY = 2  # examples of the first batch, which brings libraries into memory
EXIT_INTERRUPTED = 130


class Reply(NamedTuple):
    """What a process says of one estimation."""

    seconds: float = 0.0  # 0 for the first, which does not count
    trace: float | None = None  # trace of the Fisher matrix, if there is one
    memory: int | None = None  # bytes by which the first raised the peak
    problem: str | None = None  # why it was not done; None if it was


def new_process(threads: int) -> ProcessPoolExecutor:
    """A process that starts with the first call, with so many threads of PyTorch."""
    return ProcessPoolExecutor(1, SPAWN, initializer=_settle, initargs=(threads,))


def _settle(threads: int) -> None:
    """Set up a process, which ends without a word when the user interrupts."""
    import torch

    signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)


class Entry:
    """A contender in the running, with the replies of its process."""

    def __init__(self, contender: Contender, process: ProcessPoolExecutor) -> None:
        """Nothing is asked yet."""
        self.contender, self.process = contender, process
        self.replies: list[Reply] = []

    @property
    def problem(self) -> str | None:
        """Why it is out; None while it is in."""
        return self.replies[-1].problem if self.replies else None

    def ask(self, function: Callable[..., Reply], *arguments: Any) -> None:
        """Have the process call a function; whoever has failed is out, and not asked again."""
        if self.problem is not None:
            return
        try:
            self.replies.append(self.process.submit(answer, function, *arguments).result())
        except BrokenProcessPool as error:
            self.replies.append(Reply(problem=in_one_line(error)))
        if self.problem is not None:
            self.process.shutdown()


# What this process was started for.
_estimation: Estimate


def answer(work: Callable[..., Reply], *arguments: Any) -> Reply:
    """Do some work; whatever a package raises is its answer."""
    try:
        return work(*arguments)
    except Exception as error:
        return Reply(problem=in_one_line(error))


def start(name: str, combination: Combination, fraction: float, quick: bool) -> Reply:
    """In the contender's process: prepare, and measure the memory of an estimation."""
    global _estimation
    contender, (case, fisher) = BY_NAME[name], combination
    contender.prepare(build(case, quick=True).beginning(TINY), fisher)(0)
    _estimation = contender.prepare(build(case, fraction=fraction, quick=quick), fisher)
    trace, memory = peak_growth(lambda: _estimation(0))
    return Reply(trace=finite(trace), memory=memory)


def estimate(seed: int) -> Reply:
    """In the contender's process: measure the time of an estimation."""
    gc.collect()
    start = perf_counter()
    trace = _estimation(seed)
    seconds = perf_counter() - start
    return Reply(seconds, finite(trace))


def finite(trace: float | None) -> float | None:
    """A trace that can be compared; ValueError if it is infinite or no number."""
    if trace is not None and not math.isfinite(trace):
        raise ValueError(f"the trace is {trace}")
    return trace


def in_one_line(error: BaseException) -> str:
    """The name of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
