"""How figures look: made for print, as wide as a page, and readable without colour.

Methods differ in line style and marker as well as in colours that colour-blind readers can tell
apart.
"""

from collections.abc import Iterable, Sequence
from io import BytesIO
from itertools import cycle
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH_INCHES = 7.0
DOTS_PER_INCH = 200
FONT_POINTS = 7.0
OWN_WIDTH = 2.0
BAND_OPACITY = 0.2


class Style(NamedTuple):
    """How a method's line looks."""

    colour: str
    line: str | tuple[int, tuple[int, ...]]
    marker: str
    filled: bool = True
    width: float = 1.1


# Known methods look alike in every figure, whatever else is in it. Those of this package have heavy
# lines in colours of Okabe and Ito; the others are thin, some in colours of Tol's muted scheme.
STYLES = {
    "naive": Style("#E69F00", (0, (1, 1)), "v"),
    "ewc": Style("#56B4E9", (0, (5, 2)), "s"),
    "ewc-online": Style("#332288", (0, (5, 1, 1, 1)), "s", filled=False),
    "si": Style("#999933", (0, (3, 2)), "X"),
    "mas": Style("#777777", (0, (7, 1)), "<"),
    "lwf": Style("#661100", (0, (2, 1)), "*"),
    "r-ewc": Style("#882255", (0, (4, 1, 1, 1, 1, 1)), "p", filled=False),
    "kronecker-laplace": Style("#117733", (0, (9, 2)), "h", filled=False),
    "diagonal-ewc": Style("#44AA99", (0, (1, 2)), ">"),
    "ncl": Style("#AA4499", (0, (6, 1, 1, 1, 1, 1)), "d"),
    "rotated-ewc": Style("#D55E00", "-", "o", width=OWN_WIDTH),
    "rotated-ewc-separate": Style("#0072B2", (0, (6, 2, 1, 2)), "D", filled=False, width=OWN_WIDTH),
    "rotated-ewc-tangent": Style("#56B4E9", (0, (5, 1, 1, 1)), "D", width=OWN_WIDTH),
    "rotated-ewc-gradient": Style("#009E73", (0, (3, 1, 1, 1)), "^", width=OWN_WIDTH),
    "rotated-ewc-loss": Style("#CC79A7", (0, (8, 2)), "P", width=OWN_WIDTH),
    "joint": Style("#000000", (0, (1, 3)), "", width=1.5),
}
OTHER_STYLES = (
    Style("#009E73", (0, (3, 1, 1, 1, 1, 1)), "*"),
    Style("#CC79A7", (0, (5, 1)), "p", filled=False),
    Style("#999999", (0, (2, 2)), "X"),
    Style("#56B4E9", (0, (8, 3)), "<", filled=False),
    Style("#D55E00", (0, (1, 2, 3, 2)), ">", filled=False),
    Style("#0072B2", "-", "d"),
    Style("#000000", (0, (1, 1)), "D", filled=False),
    Style("#E69F00", (0, (6, 1, 1, 1)), "s"),
    Style("#332288", (0, (10, 2)), "v", filled=False),
    Style("#999933", (0, (4, 2)), "h"),
)


def styles_of(labels: Iterable[str]) -> dict[str, Style]:
    """Known methods have looks of their own; replay hollows a filled marker, or fills a hollow."""
    others = cycle(OTHER_STYLES)
    found: dict[str, Style] = {}
    for label in labels:
        style = STYLES.get(label)
        known = STYLES.get(label.partition(" + ")[0])
        if style is None and known is not None:
            style = known._replace(filled=not known.filled)
            style = None if style in found.values() else style
        found[label] = style or next(others)
    return found


def line_looks(style: Style) -> dict[str, Any]:
    """The looks of a line, as keyword arguments of Matplotlib."""
    return {
        "color": style.colour,
        "linestyle": style.line,
        "linewidth": style.width,
        "marker": style.marker,
        "markersize": 5 if style.width >= OWN_WIDTH else 4,
        "markerfacecolor": style.colour if style.filled else "white",
        "zorder": 2.5 if style.width >= OWN_WIDTH else 2.0,
    }


def band_looks(style: Style) -> dict[str, Any]:
    """The looks of the band around a line, as keyword arguments of Matplotlib."""
    return {"color": style.colour, "alpha": BAND_OPACITY, "linewidth": 0}


def new_figure(height: float) -> Figure:
    """A figure as wide as a page, that belongs to no window."""
    return Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_PER_INCH, layout="constrained")


def image_of(figure: Figure) -> bytes:
    """A figure as PNG; the same figure has the same bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def tidy(axes: Axes) -> None:
    """Take away from axes what is not needed, and add a pale grid."""
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def name_rows(axes: Axes, labels: Sequence[str], own: Iterable[bool]) -> None:
    """Name the rows of a panel, the first on top, this package's own in bold."""
    axes.set_yticks(range(len(labels)), labels, fontsize=FONT_POINTS)
    for tick, is_ours in zip(axes.get_yticklabels(), own, strict=True):
        tick.set_fontweight("bold" if is_ours else "normal")
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def task_ticks(axis: Axis, most: int) -> None:
    """Put few ticks on an axis of tasks, at round numbers."""
    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def percent_tick(fraction: float, position: float = 0) -> str:
    """Label of a tick, with no more decimals than it needs."""
    return f"{100 * fraction:.4g}%"
