"""One case: all contenders take turns within one process."""

from benchmarks.rounds import WARM_UPS, time_in_rounds
from benchmarks.speed.penalty import names
from benchmarks.speed.penalty.cases import build, repetitions
from benchmarks.speed.penalty.comparisons import compare
from benchmarks.speed.penalty.contenders import Field, enter
from benchmarks.speed.penalty.history import live
from benchmarks.speed.penalty.options import Options
from benchmarks.speed.penalty.results import Record


def measure(case: str, options: Options) -> Record:
    """Consolidate tasks, and time everything that is there then.

    Args:
        case: The case.
        options: How it is measured.

    Returns:
        What was measured.
    """
    problem = build(case, quick=options.quick)
    separate = options.separate_tasks if case in names.WITH_SEPARATE else 0
    found = enter(case, live(problem, options.tasks, separate))
    number = repetitions(case, quick=options.quick)
    rounds = _per_step(
        found,
        time_in_rounds(
            found.works,
            rounds=options.rounds,
            repetitions=number,
            # What is slow needs little warming up.
            warm_ups=WARM_UPS if number > WARM_UPS else 1,
        ),
    )
    comparable = {name: times for name, times in rounds.items() if name not in found.remarks}
    return Record(
        case=case,
        parameters=sum(parameter.numel() for parameter in problem.model.parameters()),
        batch=problem.examples,
        repetitions=number,
        rounds=rounds,
        statuses={name: status for name, (status, _) in found.remarks.items()},
        messages={name: message for name, (_, message) in found.remarks.items() if message},
        values=found.values,
        comparisons=compare(case, comparable, options.tasks, options.separate_tasks),
    )


def _per_step(found: Field, rounds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Divide the times of calls that are several steps."""
    return {name: [t / found.calls.get(name, 1) for t in times] for name, times in rounds.items()}
