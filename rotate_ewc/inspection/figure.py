"""The spectra of a snapshot's blocks as a picture."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path

import torch
from matplotlib.figure import Figure

from rotate_ewc.curvature.operator import EKFACLinearOperator
from rotate_ewc.inspection.summary import spectrum

_POINTS = 400
_STYLES = ("-", "--", ":", "-.")


def draw_spectra(operator: EKFACLinearOperator, title: str) -> Figure:
    """Draw the eigenvalues of every block against their rank, on logarithmic axes."""
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    for index, block in enumerate(operator.blocks):
        values, counts = spectrum(block)
        values, ends = values[values > 0], counts[values > 0].cumsum(0)
        if not len(values):
            continue
        count = int(ends[-1])
        steps = [step / (_POINTS - 1) for step in range(_POINTS)]
        ranks = sorted({round(count**step) for step in steps})
        # Those of which there are many, as of a complement, take as many ranks.
        places = torch.searchsorted(ends, torch.tensor(ranks, dtype=ends.dtype))
        style = _STYLES[index // 10 % len(_STYLES)]
        axes.plot(
            ranks,
            values[places].tolist(),
            style,
            marker="o" if count == 1 else None,
            label=f"{block.label} ({count:,} of {prod(block.shape):,})",
        )
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="eigenvalue", title=title)
    axes.grid(alpha=0.3)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            title="block (eigenvalues above 0)",
            fontsize="small",
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )
    return figure


def save_spectra(operator: EKFACLinearOperator, title: str, path: str | os.PathLike[str]) -> None:
    """Draw and write the picture, in the format of the file's ending.

    Raises:
        ValueError: If the ending is of no known format.
    """
    draw_spectra(operator, title).savefig(Path(path), dpi=150)
