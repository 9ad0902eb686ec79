"""One cell of the table: many measurements in a few words."""

from collections.abc import Iterable, Sequence

from benchmarks.peers.measure import Record
from benchmarks.peers.verdict import Status

# With a trace this close to the exact one, it is the eigenvalues that tell of the error.
NEARLY_RIGHT_TRACE = 0.05


def cell(records: Sequence[Record], *, by_definition: bool = False) -> str:
    """Describe the measurements of one package in one row.

    Equal results are joined; what a result belongs to is said only where there are several.
    """
    shown = [record for record in records if _worth_showing(record, records)]
    groups: dict[str, list[Record]] = {}
    for record in shown:
        groups.setdefault(_kind(record, by_definition), []).append(record)
    texts = []
    for kind, group in groups.items():
        text = kind + _numbers(group)
        qualifier = _qualifier(group, shown) if len(groups) > 1 else ""
        texts.append(f"{qualifier}: {text}" if qualifier else text)
    return "; ".join(texts) if texts else "not measured"


def _worth_showing(record: Record, records: Sequence[Record]) -> bool:
    """Whether it is no fall-back, or one that is right where nothing else is."""
    if not record.fallback:
        return True
    others = [one.status for one in records if one.problem == record.problem and not one.fallback]
    return record.status == Status.RIGHT and Status.RIGHT not in others


def _kind(record: Record, by_definition: bool) -> str:
    """The word for a result, without its numbers."""
    if record.status != Status.WRONG:
        return record.status
    if record.trace_ratio is None and record.message:
        return record.message
    return "differs" if by_definition else "wrong"


def _numbers(group: Sequence[Record]) -> str:
    """By how much a group of results is wrong."""
    ratios = sorted(record.trace_ratio for record in group if record.trace_ratio is not None)
    if group[0].status != Status.WRONG or not ratios:
        return ""
    if all(abs(ratio - 1) < NEARLY_RIGHT_TRACE for ratio in ratios):
        errors = [record.error for record in group if record.error is not None]
        return f", eigenvalues off by {100 * max(errors, default=0):.0f} %"
    first, last = f"×{ratios[0]:.2f}", f"×{ratios[-1]:.2f}"
    return f" {first}" if first == last else f" {first} to {last}"


def _qualifier(group: Sequence[Record], shown: Sequence[Record]) -> str:
    """Which of the measurements shown a group consists of, as briefly as possible."""
    problems = _unique(record.problem for record in group)
    modes = _unique(record.mode for record in group)
    if any(problems) and len(group) == sum(record.problem in problems for record in shown):
        return ", ".join(problems)
    everywhere = {(record.problem, mode) for record in shown for mode in modes}
    if {(record.problem, record.mode) for record in group} == everywhere:
        return _modes(group, shown)
    words = []
    for problem in problems:
        here = [record for record in group if record.problem == problem]
        available = [record for record in shown if record.problem == problem]
        mode = _modes(here, available) if len(here) < len(available) else ""
        words.append(f"{problem} {mode}".strip())
    return ", ".join(words)


def _modes(group: Sequence[Record], shown: Sequence[Record]) -> str:
    """The modes of a group; all but the fall-backs are those of the package's EKFAC."""
    modes = _unique(record.mode for record in group)
    main = _unique(record.mode for record in shown if not record.fallback)
    return "EKFAC" if len(main) > 1 and modes == main else ", ".join(modes)


def _unique(words: Iterable[str]) -> list[str]:
    """The words without repetitions, in their order."""
    return list(dict.fromkeys(words))
