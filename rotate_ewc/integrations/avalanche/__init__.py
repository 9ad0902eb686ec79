"""Avalanche: the plugin, its metrics, and a ready strategy around it.

`RotatedEWCPlugin` does for Avalanche's training loop what a loop of your own does with
`EKFACPenalty`: it applies the penalty in training, and consolidates when a task ends.
"""

try:
    import avalanche as _avalanche  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"rotate_ewc.integrations.avalanche needs Avalanche ({error}); "
        f"install it with: pip install 'rotate-ewc[avalanche]'"
    ) from error

from rotate_ewc.integrations.avalanche.metrics import rotated_ewc_metrics
from rotate_ewc.integrations.avalanche.plugin import RotatedEWCPlugin, Update
from rotate_ewc.integrations.avalanche.strategy import RotatedEWC

__all__ = ["RotatedEWC", "RotatedEWCPlugin", "Update", "rotated_ewc_metrics"]
