"""The tables as Markdown, and the document that they are part of."""

import re
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.peers.adapters import Adapter
from benchmarks.peers.measure import Record
from benchmarks.peers.row import Note, Row, Section
from benchmarks.peers.verdict import Status

BEGIN = "<!-- peers: begin -->"
END = "<!-- peers: end -->"
LONGEST = 120
SAID = (Status.REFUSED, Status.FAILS, Status.NOT_OFFERED)
# With a trace this close to the exact one, it is the eigenvalues that tell of the error.
NEARLY_RIGHT_TRACE = 0.05


def markdown(
    sections: Sequence[Section],
    adapters: Sequence[Adapter],
    records: Sequence[Record],
    versions: Mapping[str, str],
) -> str:
    """Everything between the markers: tables, notes and messages."""
    numbers: dict[Note, int] = {}
    parts = []
    for section in sections:
        titles = [f"{a.title} {versions.get(a.package, '')}".strip() for a in adapters]
        lines = [f"### {section.title}", "", _line(["", *titles, "tests"])]
        lines.append("|---" * (len(adapters) + 2) + "|")
        for row in section.rows:
            cells = [_cell_of(records, row, adapter, numbers) for adapter in adapters]
            lines.append(_line([row.title, *cells, _tests(row)]))
        parts.append("\n".join(lines))
    notes = [f"{number}. {_sentence(note.text)}" for note, number in numbers.items()]
    parts.append("\n".join(["### Notes", "", *notes]))
    parts.append("\n".join(["### What was said", "", *_messages(adapters, records)]))
    return "\n\n".join(parts)


def _cell_of(
    records: Sequence[Record], row: Row, adapter: Adapter, numbers: dict[Note, int]
) -> str:
    """One cell with its footnote; notes are numbered in the order in which they are needed."""
    mine = [r for r in records if r.row == row.name and r.package == adapter.package]
    note = row.notes.get(adapter.package)
    text = cell(mine, by_definition=note is not None and note.by_definition)
    if note is None or text in (Status.NOT_INSTALLED, "not measured"):
        return text
    return f"{text} [{numbers.setdefault(note, len(numbers) + 1)}]"


def replace_between_markers(text: str, content: str) -> str:
    """Put new content between the two markers of a document."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one line {BEGIN} and after it one line {END}")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def _line(cells: Sequence[str]) -> str:
    """A line of a table; a bar inside a cell would end it."""
    return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"


def _tests(row: Row) -> str:
    """The tests of a row, as links to their files."""
    return ", ".join(
        f"[{name}](../tests/{file})" for file, names in row.tests.items() for name in names
    )


def _messages(adapters: Sequence[Adapter], records: Sequence[Record]) -> list[str]:
    """What each package said where it refused or failed, and in which rows."""
    rows: dict[str, dict[str, None]] = {}
    for adapter in adapters:
        for record in records:
            if record.package == adapter.package and record.status in SAID and not record.fallback:
                rows.setdefault(f"{adapter.title} {_said(record)}", {})[record.row] = None
    return [f"* {said} ({', '.join(names)})" for said, names in rows.items()]


def _said(record: Record) -> str:
    """What happened, and the message; that of a feature not offered is our own explanation."""
    if record.status == Status.NOT_OFFERED:
        return f"{record.status}: {record.message}"
    # Without the arguments of the layer that it is about.
    message = re.sub(r"\b[A-Z]\w+\(.*", "…", record.message).replace("`", "'")
    shortened = message if len(message) <= LONGEST else message[:LONGEST].rstrip() + " …"
    return f"{record.status}: `{shortened}`"


def _sentence(text: str) -> str:
    """Begin with a capital and end with a full stop."""
    return text[:1].upper() + text[1:].rstrip(".") + "."


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
