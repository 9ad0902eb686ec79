"""Numbers that a dtype cannot hold: what is too large is refused, what is too small is told."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rotate_ewc.block import Block
from rotate_ewc.errors import NotFiniteError
from rotate_ewc.notices import warn_user


def check_finite(total: Tensor, what: str) -> None:
    """Raise unless a sum is finite, as it is only if every number in it is.

    Args:
        total: A scalar tensor.
        what: Squares of what it is the sum of.
    """
    if not bool(torch.isfinite(total)):
        raise NotFiniteError(
            f"the {what} are not finite (NaN, infinity, or overflow when squared in {total.dtype});"
            f" look for such values in the data and the parameters, or has training diverged? "
            f"Finite values that are so large need a model in float64 (model.double())"
        )


def check_trace(trace: Tensor, label: str) -> None:
    """Raise unless the sum of a block's eigenvalues is finite, as it is only if all of them are.

    Args:
        trace: The sum, a scalar tensor.
        label: What to call the block.
    """
    if not bool(torch.isfinite(trace)):
        raise NotFiniteError(
            f"the Fisher matrix of {label!r} is not finite: its eigenvalues, or their sum, are too "
            f"large for {trace.dtype}, or no numbers; has training diverged? Finite values that "
            f"are so large need a model in float64 (model.double()), or smaller weights of the "
            f"tasks"
        )


def is_faint(squares: Tensor | None) -> bool:
    """Whether all of some squares, or sums of them, are below what their dtype holds precisely."""
    if squares is None or not squares.numel():
        return False
    return float(squares.max()) < torch.finfo(squares.dtype).tiny


def warn_of_vanished(used: Sequence[Block], faint: Sequence[Block], num_examples: int) -> None:
    """Warn, once, if the Fisher matrix or a part of it is zero only for want of a wider range.

    Args:
        used: The blocks of all parameters that the outputs depend on.
        faint: Those of them that do get gradients, whose squares are too small though.
        num_examples: Examples seen.
    """
    if used and all(is_faint(block.eigenvalues) for block in used):
        dtype = used[0].eigenvalues.dtype
        warn_user(
            f"the Fisher matrix has vanished: over {num_examples} examples, all of its eigenvalues "
            f"are zero or too small for {dtype}, so that nothing is protected. The model is sure "
            f"of every prediction (or no label counts, or these parameters have no effect). Soften "
            f"the predictions (temperature above 1), take the exact expectation over labels "
            f"(fisher_type='type2') instead of sampled ones, pass more examples, or train for less "
            f"long",
            RuntimeWarning,
        )
    elif faint:
        labels = ", ".join(repr(block.label) for block in faint)
        warn_user(
            f"the Fisher matrix of {labels} has vanished, or lost its precision: gradients do "
            f"reach these parameters, but squares of them, or of layer inputs, are too small for "
            f"{faint[0].eigenvalues.dtype}, so that they are not protected. Use a model in float64 "
            f"(model.double()), or layer inputs and parameters of usual size",
            RuntimeWarning,
        )
