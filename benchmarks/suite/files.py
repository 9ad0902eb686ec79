"""Files of a report: their names, and figures as bytes."""

import re
from collections.abc import Sequence
from io import BytesIO

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.plots import DOTS_PER_INCH

# Without a fixed salt and with a date, the same records would not make the same file.
SALT = "rotate_ewc.benchmarks"


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
