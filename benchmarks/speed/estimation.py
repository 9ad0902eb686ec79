"""One case with one Fisher type: all contenders take turns, each in a process of its own.

A process works when it is asked, and times itself. Only one works at any time, since whoever asks
waits for the answer.
"""

import gc
import math
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from benchmarks.command import versions
from benchmarks.peers.verdict import in_one_line
from benchmarks.speed import names
from benchmarks.speed.cases import Estimate, build
from benchmarks.speed.contenders import BY_NAME, Contender, Kind
from benchmarks.speed.floor import necessary
from benchmarks.speed.measuring import eigh_times, median_ratio, peak_growth, product_rates, turns
from benchmarks.speed.names import Combination
from benchmarks.speed.results import MEASURED, MISSING, REFUSED, WRONG, Estimation, Result

if TYPE_CHECKING:  # no process needs what reads options
    from benchmarks.speed.command import Options

SPAWN = multiprocessing.get_context("spawn")
TINY = 2  # examples of the first batch, which brings libraries into memory
EXIT_INTERRUPTED = 130
TOLERANCES = {names.MC: 1e-2, names.TYPE2: 1e-4}
# Few sampled labels have traces that differ much.
QUICK_TOLERANCES = {names.MC: 0.5, names.TYPE2: 1e-4}
# Thin bases have the same labels, and the exact trace.
THIN_TOLERANCE = 1e-4
COMPARED = (Kind.SAME, Kind.THIN)
Times = dict[str, list[float]]


def measure(combination: Combination, options: "Options", threads: int) -> Estimation:
    """Measure everybody in one case."""
    case, fisher = combination
    workload = build(case, fraction=options.fraction, quick=options.quick)
    workload.freeze_other_parameters()
    needed = necessary(workload, fisher)
    chosen = [BY_NAME[name] for name in names.contenders_of(case, options.contenders)]
    with ExitStack() as stack:
        entries = {
            one.name: Entry(one, stack.enter_context(new_process(threads)))
            for one in chosen
            if one.adapter.installed()
        }
        machine = stack.enter_context(new_process(threads))
        rates, eigh = _take_turns([*entries.values()], machine, combination, needed.sizes, options)
    results = [result_of(one, entries.get(one.name)) for one in chosen]
    tolerance = (QUICK_TOLERANCES if options.quick else TOLERANCES)[fisher]
    return Estimation(
        case=case,
        fisher=fisher,
        fraction=options.fraction,
        examples=workload.examples,
        batch=workload.batch_size,
        rounds=options.rounds,
        tolerance=tolerance,
        rates=rates,
        eigh=eigh,
        gigaflop=needed.gigaflop,
        floor_seconds=needed.seconds(rates, eigh),
        results=compare(results, tolerance),
        versions=versions(),
    )


def _take_turns(
    entries: Sequence["Entry"],
    machine: ProcessPoolExecutor,
    combination: Combination,
    sizes: Sequence[int],
    options: "Options",
) -> tuple[Times, Times]:
    """Run all rounds; returns rates of products by shape, and seconds of ``eigh`` by size."""
    rates: Times = {}
    eigh: Times = {}
    quick = options.quick

    def decompose() -> None:
        for size, times in machine.submit(eigh_times, sizes, quick=quick).result().items():
            eigh.setdefault(size, []).extend(times)

    total = (options.rounds + 1) * (len(entries) + 1)
    with tqdm(total=total, desc=" ".join(combination), unit="turn", disable=None) as bar:
        decompose()
        bar.update()
        for entry in entries:
            bar.set_postfix_str(entry.contender.name)
            entry.ask(start, entry.contender.name, combination, options.fraction, quick)
            bar.update()
        for number, turn in turns([None, *entries], options.rounds):
            bar.set_postfix_str("machine" if turn is None else turn.contender.name)
            if turn is not None:
                turn.ask(estimate, number)
            else:
                for shape, rate in machine.submit(product_rates, quick=quick).result().items():
                    rates.setdefault(shape, []).append(rate)
            bar.update()
        decompose()
    return rates, eigh


def result_of(contender: Contender, entry: "Entry | None") -> Result:
    """What was measured of a contender, not compared with anything yet."""
    kind, version = contender.kind, contender.adapter.version()
    if entry is None:
        return Result(contender.name, MISSING, kind=kind)
    if entry.problem is not None:
        return Result(contender.name, REFUSED, entry.problem, version=version, kind=kind)
    traces = [reply.trace for reply in entry.replies if reply.trace is not None]
    return Result(
        contender.name,
        MEASURED,
        contender.remark,
        seconds=[reply.seconds for reply in entry.replies[1:]],
        values=traces if kind in (Kind.SAME, Kind.THIN, Kind.MORE) else [],
        version=version,
        kind=kind,
        memory=entry.replies[0].memory,
    )


def compare(results: list[Result], tolerance: float) -> list[Result]:
    """Check the traces of all that compute what this package computes, and add ratios of times.

    A fast wrong answer does not count. Traces are means over all estimations: with sampled labels,
    each has its own seed. Nothing is compared where this package was not measured.
    """
    measured = {one.name: one for one in results if one.status == MEASURED}
    ours = measured.get(names.OURS)
    for one in measured.values():
        if ours is None or one.kind not in COMPARED:
            continue
        allowed = THIN_TOLERANCE if one.kind == Kind.THIN else tolerance
        factor = one.value / ours.value if one.value is not None and ours.value else None
        if factor is None:
            one.status, one.message = WRONG, "wrong: no trace"
        elif abs(factor - 1) > allowed:
            one.status, one.message = WRONG, f"wrong ×{factor:.4g}"
        else:
            one.ratio = median_ratio(one.seconds, ours.seconds)
    return results


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
