"""One case with one Fisher type: all contenders take turns, each in a process of its own."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack

from tqdm import tqdm

from benchmarks.speed import names
from benchmarks.speed.cases import build
from benchmarks.speed.command import Options
from benchmarks.speed.contenders import BY_NAME, Contender, Kind
from benchmarks.speed.floor import necessary
from benchmarks.speed.machine import eigh_times, product_rates
from benchmarks.speed.names import Combination
from benchmarks.speed.results import MEASURED, MISSING, REFUSED, WRONG, Estimation, Result
from benchmarks.speed.rounds import median_ratio, turns
from benchmarks.speed.worker import Entry, new_process
from benchmarks.versions import versions

TOLERANCES = {names.MC: 1e-2, names.TYPE2: 1e-4}
# Few sampled labels have traces that differ much.
QUICK_TOLERANCES = {names.MC: 0.5, names.TYPE2: 1e-4}


def measure(combination: Combination, options: Options, threads: int) -> Estimation:
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
        rates, eigh = _take_turns(
            list(entries.values()), machine, combination, needed.sizes, options
        )
    results = [_result(one, entries.get(one.name)) for one in chosen]
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
    entries: Sequence[Entry],
    machine: ProcessPoolExecutor,
    combination: Combination,
    sizes: Sequence[int],
    options: Options,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Prepare everybody and run all rounds, in which the machine has turns as well."""
    rates: dict[str, list[float]] = {}
    eigh: dict[str, list[float]] = {}
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
            entry.prepare(combination, options.fraction, quick=quick)
            bar.update()
        for number, turn in turns([None, *entries], options.rounds):
            bar.set_postfix_str("machine" if turn is None else turn.contender.name)
            if turn is not None:
                turn.run(number)
            else:
                for shape, rate in machine.submit(product_rates, quick=quick).result().items():
                    rates.setdefault(shape, []).append(rate)
            bar.update()
        decompose()
    return rates, eigh


def _result(contender: Contender, entry: Entry | None) -> Result:
    """What was measured of a contender, not compared with anything yet."""
    found = Result(contender.name, MEASURED, contender.remark, kind=contender.kind.value)
    if entry is None:
        return dataclasses.replace(found, status=MISSING, message="")
    found = dataclasses.replace(found, version=contender.adapter.version())
    if entry.problem is not None:
        return dataclasses.replace(found, status=REFUSED, message=entry.problem)
    traces = [reply.trace for reply in entry.replies if reply.trace is not None]
    return dataclasses.replace(
        found,
        seconds=[reply.seconds for reply in entry.replies[1:]],
        values=traces if contender.kind in (Kind.SAME, Kind.MORE) else [],
        memory=entry.replies[0].memory,
    )


def compare(results: Sequence[Result], tolerance: float) -> list[Result]:
    """Check the traces of all that compute what this package computes, and take ratios of times.

    A fast wrong answer does not count. Traces are means over all estimations: with sampled labels,
    each has its own seed. Nothing is compared where this package was not measured.
    """
    measured = {result.name: result for result in results if result.status == MEASURED}
    ours = measured.get(names.OURS)
    return list(results) if ours is None else [_compared(one, ours, tolerance) for one in results]


def _compared(result: Result, ours: Result, tolerance: float) -> Result:
    """One result with its ratio, or marked as wrong."""
    if result.status != MEASURED or result.kind != Kind.SAME.value:
        return result
    if result.value is None or not ours.value:
        return dataclasses.replace(result, status=WRONG, message="wrong: no trace")
    factor = result.value / ours.value
    if abs(factor - 1) > tolerance:
        return dataclasses.replace(result, status=WRONG, message=f"wrong ×{factor:.4g}")
    return dataclasses.replace(result, ratio=median_ratio(result.seconds, ours.seconds))
