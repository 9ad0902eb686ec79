"""What is in a snapshot file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotate_ewc.curvature.operator import EKFACLinearOperator
from rotate_ewc.io import files
from rotate_ewc.io.header import PENALTY, read_header
from rotate_ewc.penalty.state import PenaltyState


@dataclass(frozen=True)
class Contents:
    """What is in a snapshot file.

    Attributes:
        path: The file.
        file_bytes: Its size.
        kind: `"operator"` or `"penalty"`.
        format: Name and version of its format.
        library: Name and version of the program that wrote it; empty if not known.
        operators: The operator, or those of the penalty's terms.
        options: Those of the penalty; empty for an operator.
        num_tasks: Of the penalty; 1 for an operator.
    """

    path: str
    file_bytes: int
    kind: str
    format: str
    library: str
    operators: tuple[EKFACLinearOperator, ...]
    options: Mapping[str, Any]
    num_tasks: int


def read(path: str | os.PathLike[str]) -> Contents:
    """Read and check a file.

    Raises:
        SnapshotError: If it is no snapshot, naming the file.
        FileNotFoundError: If there is no file.
    """
    with files.loaded(path) as state:
        header = read_header(state)
        found = None
        if header["format"].split("/")[0] == PENALTY.split("/")[0]:
            found = PenaltyState.from_dict(state)
            operators = tuple(term.operator for term in found.terms)
        else:
            operators = (EKFACLinearOperator.from_state_dict(state),)
    return Contents(
        path=os.fspath(path),
        file_bytes=Path(path).stat().st_size,
        kind="penalty" if found else "operator",
        format=header["format"],
        library=str(header.get("library", "")),
        operators=operators,
        options=found.options if found else {},
        num_tasks=found.num_tasks if found else 1,
    )
