"""Lightning: a callback that has a penalty take part in the training of a `LightningModule`."""

try:
    import lightning.pytorch as _lightning  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"rotate_ewc.integrations.lightning needs Lightning ({error}); "
        f"install it with: pip install 'rotate-ewc[lightning]'"
    ) from error

from rotate_ewc.integrations.lightning.callback import RotatedEWCCallback

__all__ = ["RotatedEWCCallback"]
