"""Files of a report: their names, and how they are written."""

import os
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.plots import DOTS_PER_INCH

# Without a fixed salt and with a date, the same records would not make the same file.
SALT = "rotate_ewc.benchmarks"


def replace_file(path: Path, content: bytes | str) -> Path:
    """Write a file that is, at every moment, the old one or the new one.

    Args:
        path: The file; its folder must exist.
        content: Bytes, or text that is to be encoded in UTF-8.

    Returns:
        The path.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    # A rename is atomic only within one file system, hence the temporary file next to the target.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def unique_names(scenarios: Sequence[str]) -> list[str]:
    """Make names for files and anchors, one for each experiment.

    Args:
        scenarios: Names of the experiments' scenarios, any of them several times.

    Returns:
        In the same order, names of letters, digits, ``_``, ``-`` and ``.`` alone, which no two
        experiments share, not even where upper and lower case are the same.
    """
    names: list[str] = []
    for scenario in scenarios:
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", scenario).strip("-.") or "experiment"
        name, number = plain, 1
        while name.lower() in {other.lower() for other in names}:
            number += 1
            name = f"{plain}-{number}"
        names.append(name)
    return names


def png_of(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def svg_of(figure: Figure) -> bytes:
    """A figure as SVG."""
    buffer = BytesIO()
    with mpl.rc_context({"svg.hashsalt": SALT}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
