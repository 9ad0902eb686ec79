"""The Markdown tables, and the document that they are part of."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.peers.adapters.adapter import Adapter
from benchmarks.peers.cells import cell
from benchmarks.peers.measure import Record
from benchmarks.peers.notes import NOTES, Note
from benchmarks.peers.row import Row, Section
from benchmarks.peers.tested_by import TESTED_BY
from benchmarks.peers.verdict import Status

BEGIN = "<!-- peers: begin -->"
END = "<!-- peers: end -->"
LONGEST = 120
SAID = (Status.REFUSED.value, Status.FAILS.value, Status.NOT_OFFERED.value)


class Footnotes:
    """Numbers for notes, in the order in which they are first needed."""

    def __init__(self) -> None:
        """Begin without any."""
        self._numbers: dict[Note, int] = {}

    def mark(self, row: str, package: str) -> str:
        """The mark to put behind a cell, empty where there is nothing to add."""
        note = NOTES.get((row, package))
        if note is None:
            return ""
        number = self._numbers.setdefault(note, len(self._numbers) + 1)
        return f" [{number}]"

    def lines(self) -> list[str]:
        """All notes that were marked, as a list."""
        return [f"{number}. {_sentence(note.text)}" for note, number in self._numbers.items()]


def cell_of(records: Sequence[Record], row: Row, adapter: Adapter, footnotes: Footnotes) -> str:
    """One cell with its footnote."""
    mine = [r for r in records if r.row == row.name and r.package == adapter.package]
    note = NOTES.get((row.name, adapter.package))
    text = cell(mine, by_definition=note is not None and note.by_definition)
    plain = text in (Status.NOT_INSTALLED.value, "not measured")
    return text if plain else text + footnotes.mark(row.name, adapter.package)


def markdown(
    sections: Sequence[Section],
    adapters: Sequence[Adapter],
    records: Sequence[Record],
    versions: Mapping[str, str],
) -> str:
    """Everything between the markers."""
    footnotes = Footnotes()
    parts = []
    for section in sections:
        titles = [_title(adapter, versions) for adapter in adapters]
        lines = [f"### {section.title}", "", _line(["", *titles, "tests"])]
        lines.append("|---" * (len(adapters) + 2) + "|")
        for row in section.rows:
            cells = [cell_of(records, row, adapter, footnotes) for adapter in adapters]
            lines.append(_line([row.title, *cells, _tests(row)]))
        parts.append("\n".join(lines))
    parts.append("\n".join(["### Notes", "", *footnotes.lines()]))
    parts.append("\n".join(["### What was said", "", *_messages(adapters, records)]))
    return "\n\n".join(parts)


def replace_between_markers(text: str, content: str) -> str:
    """Put new content between the two markers of a document.

    Raises:
        ValueError: If the markers are not there once each, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one line {BEGIN} and after it one line {END}")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def write_document(path: Path, content: str) -> None:
    """Replace what lies between the markers of a file."""
    text = path.read_text(encoding="utf-8")
    path.write_text(replace_between_markers(text, content), encoding="utf-8")


def _line(cells: Sequence[str]) -> str:
    """A line of a table; a bar inside a cell would end it."""
    return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"


def _title(adapter: Adapter, versions: Mapping[str, str]) -> str:
    """A package and its version, where it is installed."""
    return f"{adapter.title} {versions.get(adapter.package, '')}".strip()


def _tests(row: Row) -> str:
    """The tests of a row, as links to their files."""
    links = []
    for reference in TESTED_BY.get(row.name, ()):
        file, _, name = reference.partition("::")
        links.append(f"[{name}](../tests/{file})")
    return ", ".join(links)


def _messages(adapters: Sequence[Adapter], records: Sequence[Record]) -> list[str]:
    """What each package said where it refused or failed, and in which rows."""
    lines = []
    for adapter in adapters:
        rows: dict[str, list[str]] = {}
        for record in records:
            if record.package == adapter.package and record.status in SAID and not record.fallback:
                names = rows.setdefault(_said(record), [])
                if record.row not in names:
                    names.append(record.row)
        lines += [f"* {adapter.title} {said} ({', '.join(names)})" for said, names in rows.items()]
    return lines


def _said(record: Record) -> str:
    """What happened, and the message; that of a feature not offered is our own explanation."""
    if record.status == Status.NOT_OFFERED.value:
        return f"{record.status}: {record.message}"
    # Without the arguments of the layer that it is about.
    message = re.sub(r"\b[A-Z]\w+\(.*", "…", record.message).replace("`", "'")
    shortened = message if len(message) <= LONGEST else message[:LONGEST].rstrip() + " …"
    return f"{record.status}: `{shortened}`"


def _sentence(text: str) -> str:
    """Begin with a capital and end with a full stop."""
    return text[:1].upper() + text[1:].rstrip(".") + "."
