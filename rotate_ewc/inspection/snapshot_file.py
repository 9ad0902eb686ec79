"""A snapshot file as the command line shows it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotate_ewc._utils.validation import AUTO
from rotate_ewc.curvature.operator import EKFACLinearOperator
from rotate_ewc.io import files
from rotate_ewc.io.header import HEADER, read_any_header
from rotate_ewc.io.layout import OPERATOR, PENALTY, PenaltyHeader
from rotate_ewc.io.snapshot import restore
from rotate_ewc.penalty.state import PenaltyState


@dataclass(frozen=True)
class SnapshotFile:
    """A snapshot file and what is in it.

    Attributes:
        path: The file.
        file_bytes: Its size.
        format: Name and version of its format.
        library: Name and version of the library that wrote it.
        operators: The operator, or those of the penalty's terms.
        options: Options of the penalty; empty for an operator.
        num_tasks: Tasks of the penalty; None for an operator.
    """

    path: str
    file_bytes: int
    format: str
    library: str
    operators: tuple[EKFACLinearOperator, ...]
    options: Mapping[str, Any]
    num_tasks: int | None


def read(path: str | os.PathLike[str]) -> SnapshotFile:
    """Read and check the snapshot file of an operator or a penalty.

    Raises:
        SnapshotError: If it is neither, naming the file.
        FileNotFoundError: If there is no file.
    """
    options: dict[str, Any] = {}
    num_tasks = None
    with files.loaded(path) as state:
        header = read_any_header(state)
        if isinstance(header, PenaltyHeader):
            penalty = PenaltyState.restore(header, state)
            options, num_tasks = dict(penalty.options), penalty.num_tasks
            if options.get("strength") == AUTO:
                options["strength"] = f"{AUTO} ({penalty.found})"
            operators = tuple(term.operator for term in penalty.terms)
        else:
            tensors = {key: value for key, value in state.items() if key != HEADER}
            operators = (EKFACLinearOperator.from_blocks(*restore(header, tensors)),)
    return SnapshotFile(
        path=os.fspath(path),
        file_bytes=Path(path).stat().st_size,
        format=OPERATOR if num_tasks is None else PENALTY,
        library=header.library,
        operators=operators,
        options=options,
        num_tasks=num_tasks,
    )
