"""Records of runs, a line of JSON each, so that a call which is repeated goes on where it was."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Records:
    """The lines of a file, and runs that are not in it yet."""

    def __init__(self, path: Path) -> None:
        """Read what there is; a last line that was cut off counts as not there."""
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole, _, _ = text.rpartition("\n")
        if text != f"{whole}\n" and text:
            path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
        self._found: dict[str, Record] = {}
        for line in whole.splitlines():
            record = json.loads(line)
            self._found[_name(record["run"])] = record

    def get(self, run: Mapping[str, Any], work: Callable[[], Mapping[str, Any]]) -> Record:
        """Return the record of a run, doing the work if there is none."""
        name = _name(run)
        if name not in self._found:
            record = {"run": dict(run), **work()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._found[name] = record
        return self._found[name]


def _name(run: Mapping[str, Any]) -> str:
    return json.dumps(run, sort_keys=True)
