"""When gradient descent on the penalty diverges, and saying so before it does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rotate_ewc._utils.warnings import warn_user
from rotate_ewc.penalty.terms import Stack


def largest_curvature(stacks: Sequence[Stack]) -> float:
    """Return the largest eigenvalue of the terms' sum, or a bound of it where there are several."""
    # A parameter that has grown is in several stacks, whose curvatures add.
    bounds: dict[str, float] = {}
    for stack in stacks:
        by_term = stack.block.eigenvalues.reshape(len(stack.anchors[0]), -1)
        largest = float(by_term.amax(dim=1).sum())
        for name in stack.names:
            bounds[name] = bounds.get(name, 0.0) + largest
    return max(bounds.values(), default=0.0)


def plain_rate(group: Mapping[str, Any]) -> float:
    """Return the learning rate of gradient descent that is as stable; heavy balls roll no worse.

    Args:
        group: The options of a parameter group of SGD.
    """
    rate, momentum = float(group["lr"]), float(group["momentum"])
    return rate * (1 + 2 * momentum) / (1 + momentum) if group["nesterov"] else rate


def warn_if_divergent(learning_rate: float, curvature: float, strength: float) -> bool:
    """Warn if gradient descent diverges on a quadratic function of some curvature.

    Returns:
        Whether it converges.
    """
    product = learning_rate * curvature
    if product <= 2:
        return True
    warn_user(
        f"the penalty will diverge under gradient descent: learning rate {learning_rate:g} × its "
        f"largest curvature {curvature:.4g} (strength {strength:g}) is {product:.3g}, more than 2; "
        f"lower the learning rate to {_rounded_down(2 / curvature)} or the strength to "
        f"{_rounded_down(strength * 2 / product)}, or leave the loss without it and call "
        f"penalty.attach(optimizer, model) (in the Avalanche plugin update='rotated'), which is "
        f"stable at any strength"
    )
    return False


def _rounded_down(value: float) -> str:
    """Return two significant digits of a positive number, so that they are less than it."""
    # On the very border, rounding errors would decide whether the advice is any good.
    value *= 1 - 1e-9
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.floor(value / unit) * unit:.2g}"
