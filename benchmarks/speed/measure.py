"""One case with one Fisher type: all contenders take turns, each in a process of its own."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.speed import names
from benchmarks.speed.agreement import compare, tolerance_for
from benchmarks.speed.cases import Problem, build
from benchmarks.speed.contenders import BY_NAME, Contender, Kind
from benchmarks.speed.floor import (
    bias_factors,
    count,
    factors,
    label_vectors,
    least_time,
)
from benchmarks.speed.layers import describe_layers
from benchmarks.speed.names import Combination
from benchmarks.speed.options import Options
from benchmarks.speed.results import MEASURED, MISSING, REFUSED, Cell, Result
from benchmarks.speed.worker import (
    EIGH,
    PRODUCTS,
    Job,
    MachineJob,
    Reply,
    Worker,
    serve_calibrations,
    serve_estimations,
)
from benchmarks.versions import versions


@dataclass
class Entry:
    """A contender in the running.

    Attributes:
        contender: Who it is.
        worker: Its process; None before it starts and after it has failed.
        replies: What it said, the first time without a time.
        problem: Why it is out.
    """

    contender: Contender
    worker: Worker | None = None
    replies: list[Reply] = field(default_factory=list)
    problem: str | None = None

    def start(self, job: Job) -> None:
        """Start its process, and have it estimate once for its memory."""
        self.worker = Worker(serve_estimations, job)
        self._note(self.worker.answer)

    def run(self, seed: int) -> None:
        """Have it estimate once for its time, if it still can."""
        worker = self.worker
        if worker is not None:
            self._note(lambda: worker.ask(seed))

    def _note(self, ask: Any) -> None:
        """Keep an answer; whoever has failed is out."""
        try:
            reply: Reply = ask()
        except RuntimeError as error:
            reply = Reply(problem=str(error))
        if reply.problem is None:
            self.replies.append(reply)
        else:
            self.problem = reply.problem
            self.close()

    def close(self) -> None:
        """End its process."""
        if self.worker is not None:
            self.worker.close()
            self.worker = None


@dataclass
class Calibration:
    """How fast the machine was.

    Attributes:
        rates: Billions of operations per second, by the shape of a product.
        eigh: Seconds of every repetition, by size.
    """

    rates: dict[str, list[float]] = field(default_factory=dict)
    eigh: dict[str, list[float]] = field(default_factory=dict)

    def add_rates(self, found: dict[str, float]) -> None:
        """Add the rates of one round."""
        for shape, rate in found.items():
            self.rates.setdefault(shape, []).append(rate)

    def add_eigh(self, found: dict[int, list[float]]) -> None:
        """Add the times before the rounds, or after them."""
        for size, times in found.items():
            self.eigh.setdefault(str(size), []).extend(times)

    @property
    def best_rate(self) -> float:
        """The rate of the shape that suits the machine best, median over rounds."""
        return max(median(rates) for rates in self.rates.values())

    @property
    def eigh_seconds(self) -> dict[int, float]:
        """Median time by size."""
        return {int(size): median(times) for size, times in self.eigh.items()}


def measure(combination: Combination, options: Options, threads: int) -> Cell:
    """Measure everybody in one case.

    Args:
        combination: The case and the Fisher type.
        options: How.
        threads: CPU threads of PyTorch in each process.

    Returns:
        What was measured.
    """
    problem = build(combination.case, fraction=options.fraction, quick=options.quick)
    problem.freeze_other_parameters()
    layers = describe_layers(problem)
    vectors = _label_vectors(problem, combination.fisher)
    counts = count(layers, problem.case.attention, vectors, problem.examples)
    of_weights = factors(layers, vectors, problem.examples)
    of_biases = bias_factors(layers, vectors, problem.examples)
    sizes = tuple(factor.rows for factor in (*of_weights, *of_biases))
    chosen = contenders_in(combination, options)
    entries = [Entry(contender) for contender in chosen if contender.installed]
    with ExitStack() as stack:
        machine = Worker(serve_calibrations, MachineJob(sizes, threads, options.quick))
        stack.enter_context(closing(machine))
        for entry in entries:
            stack.enter_context(closing(entry))
        calibration = _take_turns(entries, machine, combination, options, threads)
    by_name = {entry.contender.name: entry for entry in entries}
    results = [_result(contender, by_name.get(contender.name)) for contender in chosen]
    tolerance = tolerance_for(combination.fisher, quick=options.quick)
    floor = least_time(
        counts, of_weights, of_biases, calibration.best_rate, calibration.eigh_seconds
    )
    return Cell(
        case=combination.case,
        fisher=combination.fisher,
        fraction=options.fraction,
        examples=problem.examples,
        batch=len(problem.batches[0][0]),
        rounds=options.rounds,
        tolerance=tolerance,
        rates=calibration.rates,
        eigh=calibration.eigh,
        gigaflop=floor.gigaflop,
        floor_seconds=floor.seconds,
        results=compare(results, tolerance),
        versions=versions(),
    )


def contenders_in(combination: Combination, options: Options) -> list[Contender]:
    """Those who take part, installed or not."""
    return [BY_NAME[name] for name in names.contenders_of(combination, options.contenders)]


def _label_vectors(problem: Problem, fisher: str) -> int:
    """Number of vectors that must be sent backwards for one example."""
    vectors = label_vectors(fisher, problem.case.classes)
    return vectors * problem.labels_per_example if fisher == names.TYPE2 else vectors


def _take_turns(
    entries: Sequence[Entry],
    machine: Worker,
    combination: Combination,
    options: Options,
    threads: int,
) -> Calibration:
    """Start everybody and run all rounds; every other one is backwards, against steady drifts."""
    calibration = Calibration()
    label = f"{combination.case} {combination.fisher}"
    total = (options.rounds + 1) * (len(entries) + 1) + 1
    with tqdm(total=total, desc=label, unit="turn", disable=None) as bar:
        calibration.add_eigh(machine.ask(EIGH))
        bar.update()
        for entry in entries:
            name = entry.contender.name
            bar.set_postfix_str(name)
            entry.start(Job(*combination, name, options.fraction, options.quick, threads))
            bar.update()
        for number, turn in _turns(entries, options.rounds):
            bar.set_postfix_str(turn.contender.name if turn else names.MACHINE)
            if turn is None:
                calibration.add_rates(machine.ask(PRODUCTS))
            else:
                turn.run(number)
            bar.update()
        calibration.add_eigh(machine.ask(EIGH))
        bar.update()
    return calibration


def _turns(entries: Sequence[Entry], rounds: int) -> Iterator[tuple[int, Entry | None]]:
    """Whose turn it is in which round, from 1; None is the machine's."""
    order: list[Entry | None] = [None, *entries]
    for number in range(1, rounds + 1):
        for entry in order if number % 2 else reversed(order):
            yield number, entry


def _result(contender: Contender, entry: Entry | None) -> Result:
    """What was measured of a contender."""
    if entry is None:
        return Result(contender.name, contender.kind.value, "", MISSING)
    known: tuple[str, str, str] = (contender.name, contender.kind.value, contender.version)
    if entry.problem is not None:
        return Result(*known, REFUSED, entry.problem)
    traces = [reply.trace for reply in entry.replies if reply.trace is not None]
    return Result(
        *known,
        MEASURED,
        contender.remark,
        seconds=[reply.seconds for reply in entry.replies[1:]],
        traces=traces if contender.kind in (Kind.SAME, Kind.MORE) else [],
        memory=entry.replies[0].memory,
    )
