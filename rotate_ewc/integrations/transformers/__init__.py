"""Hugging Face transformers: models that bring their loss, and a callback for `Trainer`.

With models of transformers `penalty.consolidate(model, data=loader)` needs nothing else: batches
are dictionaries, and the loss is the model's own. `RotatedEWCCallback` does for `Trainer` what a
loop of your own does with `EKFACPenalty`.
"""

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"rotate_ewc.integrations.transformers needs transformers ({error}); "
        f"install it with: pip install 'rotate-ewc[transformers]'"
    ) from error

from rotate_ewc.integrations.transformers.callback import RotatedEWCCallback
from rotate_ewc.integrations.transformers.own_loss import own_loss
from rotate_ewc.penalty.own_loss import OwnLoss, register_own_loss

register_own_loss("transformers", own_loss)
register_own_loss("peft", own_loss)

__all__ = ["OwnLoss", "RotatedEWCCallback", "own_loss"]
