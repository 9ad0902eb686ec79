"""The tables on the terminal."""

from collections.abc import Iterator, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from benchmarks.peers.adapters.adapter import Adapter
from benchmarks.peers.document import Footnotes, cell_of
from benchmarks.peers.measure import Record
from benchmarks.peers.row import Section


def tables(
    sections: Sequence[Section],
    adapters: Sequence[Adapter],
    records: Sequence[Record],
    versions: Mapping[str, str],
) -> Iterator[Table | str]:
    """A table for every section, then the notes.

    Args:
        sections: The rows.
        adapters: The columns.
        records: All measurements.
        versions: Of the packages that are installed.

    Yields:
        What ``rich`` can print.
    """
    footnotes = Footnotes()
    for section in sections:
        table = Table(
            title=escape(section.title),
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
        )
        table.add_column("", overflow="fold", ratio=2)
        for adapter in adapters:
            heading = f"{adapter.title}\n{versions.get(adapter.package, '')}"
            table.add_column(escape(heading), overflow="fold", ratio=2)
        for row in section.rows:
            cells = [cell_of(records, row, adapter, footnotes) for adapter in adapters]
            table.add_row(*(escape(text.replace("`", "")) for text in (row.title, *cells)))
        yield table
    yield escape("\n".join(footnotes.lines()))
