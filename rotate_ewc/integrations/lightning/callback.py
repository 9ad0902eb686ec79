"""`RotatedEWCCallback`: the penalty at the right places of Lightning's `Trainer`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from rotate_ewc._utils.messages import quoted
from rotate_ewc._utils.parameters import parameters_of
from rotate_ewc._utils.preserve_state import undisturbed
from rotate_ewc._utils.validation import AUTO
from rotate_ewc._utils.warnings import warn_user
from rotate_ewc.distributed.processes import Group, Ranks
from rotate_ewc.integrations.attaching import AttachesPenalty
from rotate_ewc.integrations.lightning.data import (
    FitBatches,
    batches_of_fit,
    examples_of_fit,
    forward_context,
    in_precision,
)
from rotate_ewc.integrations.rehearsal import rehearse
from rotate_ewc.losses import BatchForm, likelihood_of
from rotate_ewc.penalty.attachment import View
from rotate_ewc.penalty.own_loss import OwnLoss, own_loss_of
from rotate_ewc.penalty.penalty import EKFACPenalty
from rotate_ewc.penalty.updates import UpdateKind


class RotatedEWCCallback(AttachesPenalty, Callback):
    """Elastic weight consolidation in a rotated basis, as a callback of Lightning's `Trainer`.

    During `fit` the penalty is attached to the module's optimizer, with automatic and with manual
    optimization; losses are without it. At the end of `fit`, after other callbacks, the task is
    consolidated on its training data. Checkpoints contain the penalty and the state of its
    attachment; a run that is resumed from one ends with the same bits. `rotated_ewc_penalty` and
    `rotated_ewc_strength` are logged after every epoch.

    Attributes:
        penalty: The penalty.
        attachment: The handle of the penalty in the optimizer's steps; None unless `fit` runs.
        consolidation_seconds: How long the last consolidation took.

    Examples:
        ```python
        callback = RotatedEWCCallback(penalty, nn.CrossEntropyLoss())
        trainer = lightning.Trainer(max_epochs=3, callbacks=[callback])
        trainer.fit(module, loader)
        ```
    """

    def __init__(
        self,
        penalty: EKFACPenalty,
        loss_func: Callable[..., Any] | None = None,
        consolidate_at_end: bool = True,
        *,
        forward: Callable[[Any], Any] | None = None,
        submodule: str = "",
        data: Iterable[Any] | None = None,
        optimizer: int = 0,
        update: UpdateKind | str = UpdateKind.ROTATED,
        every: int = 1,
        view: View | None = None,
        group: Group = AUTO,
    ) -> None:
        """Make a callback for one penalty and any number of calls of `fit`.

        Args:
            penalty: The penalty; tasks that it already has are protected from the start.
            loss_func: The loss of outputs and targets that the module trains with; None for models
                that have their own.
            consolidate_at_end: Whether to consolidate the task at the end of `fit`.
            forward: Function from a batch's inputs to outputs, if that is not the model's
                `forward`.
            submodule: Name of the part of the module that is the model to protect, such as the
                attribute that holds a model of transformers; parameters have the names they have
                there. By default the whole module.
            data: The task's data for the estimate, as `consolidate` takes them, and without the
                hooks of batch transfer; None is the training data of `fit`, with these hooks.
            optimizer: Which of the module's optimizers has the parameters to protect.
            update: As in `EKFACPenalty.attach`.
            every: Likewise; the rest is applied before validations and when an epoch ends.
            view: As in `EKFACPenalty.attach`.
            group: The processes that consolidate together, as `EKFACPenalty.consolidate` takes
                them; each with its own part of the data, as Lightning splits those of `fit`.

        Raises:
            TypeError: If `penalty` is not one penalty, or another argument has the wrong type.
            ValueError: If an argument is out of range.
        """
        super().__init__()
        self._take(
            penalty,
            consolidate_at_end=consolidate_at_end,
            update=update,
            every=every,
            view=view,
            group=group,
        )
        if isinstance(optimizer, bool) or not isinstance(optimizer, int) or optimizer < 0:
            raise ValueError(f"optimizer is {optimizer!r}; expected its index, from 0 on")
        if forward is not None and loss_func is None:
            raise ValueError(
                "forward is given, but loss_func is not; expected both, or neither for a model "
                "that has its own loss"
            )
        self.loss_func = loss_func
        self.forward = forward
        self.submodule = submodule
        self.data = data
        self.optimizer = optimizer
        self._data: FitBatches | None = None
        self._saved_attachment: Mapping[str, Any] | None = None
        # Whether the task at hand is in the penalty already, as in a checkpoint of the last moment.
        self._consolidated = False
        # Whether a checkpoint was read, and no training has begun since.
        self._resumed = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the penalty to the optimizer."""
        self._detach()
        self._resumed = False
        count = len(trainer.optimizers)
        if self.optimizer >= count:
            raise ValueError(
                f"optimizer is {self.optimizer}, but the module has {count}; expected a lower index"
            )
        model = self._model(pl_module)
        self._data = self._rehearsed(trainer, pl_module) if self.consolidate_at_end else None
        self.penalty.to(next(model.parameters()).device)
        attachment = self._attach(trainer.optimizers[self.optimizer], model)
        if (examples := examples_of_fit(trainer)) is not None:
            self.penalty.current_num_data = examples
        if self._saved_attachment is not None:
            attachment.load_state_dict(self._saved_attachment)
            self._saved_attachment = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note that there is something new to consolidate."""
        self._consolidated = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take what is left over from `every`."""
        self._flush()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take what is left over from `every`, and log the penalty and its strength."""
        self._flush()
        model = self._model(pl_module)
        with torch.no_grad():
            value = self.penalty(model if self.view is None else self.view(model))
        # Lightning wants a size where a step takes the iterator of batches; these are means of one.
        pl_module.log("rotated_ewc_penalty", float(value), batch_size=1)
        pl_module.log("rotated_ewc_strength", float(self.penalty.strength), batch_size=1)

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Have something at the end of the callbacks that consolidates when they have ended."""
        self._leave(trainer)
        if stage == "fit":
            savers = [c for c in trainer.callbacks if isinstance(c, Checkpoint)]
            others = [c for c in trainer.callbacks if not isinstance(c, Checkpoint)]
            # Another list, because this one is being gone through.
            trainer.callbacks = [*others, _AfterOthers(self), *savers]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach from the optimizer; the task is consolidated after other callbacks' ends."""
        self._detach()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Consolidate what a checkpoint has left to be, or warn of weights that changed since."""
        resumed, self._resumed = self._resumed, False
        if resumed and self.consolidate_at_end and not self._consolidated:
            self._consolidate_resumed(trainer, pl_module)
        if not self._consolidated or not is_overridden("on_train_end", pl_module):
            return
        found = parameters_of(self._model(pl_module))
        anchor = self.penalty.terms[-1].anchor
        if not all(torch.equal(found[name].cpu(), value.cpu()) for name, value in anchor.items()):
            warn_user(
                "on_train_end of the module has changed weights after they were consolidated, and "
                "the penalty keeps them as they were before; change them in on_train_end of a "
                "callback, or pass consolidate_at_end=False and consolidate after fit"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the callbacks as they were."""
        self._leave(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Detach from the optimizer."""
        self._detach()
        self._leave(trainer)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to resume from a checkpoint in which there is no penalty."""
        if self.state_key not in checkpoint.get("callbacks", {}):
            raise ValueError(
                "the checkpoint has no state of this callback, as if written without it; expected "
                "one with a penalty. To train on from its weights alone: "
                "module.load_state_dict(torch.load(path)['state_dict']), and fit without ckpt_path"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the penalty's snapshot, and the state of its part in the optimizer's steps."""
        attachment = self._saved_attachment
        if self.attachment is not None:
            attachment = self.attachment.state_dict()
        return {
            "penalty": self.penalty.state_dict(),
            "attachment": attachment,
            "consolidated": self._consolidated,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned; the handle's state is read when `fit` begins.

        Raises:
            SnapshotError: If the penalty's state is damaged, or of other tasks.
        """
        self.penalty.load_state_dict(state_dict["penalty"])
        self._saved_attachment = state_dict["attachment"]
        self._consolidated = state_dict["consolidated"]
        self._resumed = True

    def _model(self, pl_module: LightningModule) -> nn.Module:
        try:
            model: nn.Module = pl_module.get_submodule(self.submodule)
        except AttributeError:
            names = [name for name, _ in pl_module.named_children()]
            raise ValueError(
                f"submodule is {self.submodule!r}, but {type(pl_module).__name__} has no module of "
                f"this name; expected one of {quoted(names)}, or a part of these"
            ) from None
        return model

    def _rehearsed(self, trainer: Trainer, pl_module: LightningModule) -> FitBatches:
        """Return the data of the task; what will not do is refused here."""
        mappings = self.loss_func is None or (
            likelihood_of(self.loss_func, self.penalty.settings.fisher_type).batch_form
            is BatchForm.INPUTS
        )
        data = batches_of_fit(trainer, self.data, mappings=mappings)
        shown = data.first(given=self.data is not None)
        model = self._model(pl_module)
        with undisturbed(pl_module.modules(), ()):
            own = self._own_loss(trainer, model, [] if shown is None else shown)
            shown_pairs = None if shown is None else own.data
            rehearse(self.penalty, model, own.loss_func, shown_pairs, own.forward, group=self.group)
        return data

    def _own_loss(self, trainer: Trainer, model: nn.Module, data: Iterable[Any]) -> OwnLoss:
        """Return loss, batches and forward of the task; without `loss_func`, those of the model."""
        if self.forward is None and not _has_forward(model):
            names = [name for name, _ in model.named_children()]
            raise ValueError(
                f"{type(model).__name__} has no forward; expected submodule= the one of its "
                f"modules {quoted(names)} that maps inputs to outputs, or forward=, a function "
                f"that does"
            )
        loss_func, forward = self.loss_func, self.forward or model
        if loss_func is None:
            with Ranks.of(self.group).together(), forward_context(trainer):
                loss_func, data, forward = own_loss_of(model, data)
        return OwnLoss(loss_func, data, in_precision(trainer, forward))

    def _consolidate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Consolidate the task, unless that is done."""
        data, self._data = self._data, None
        if data is None or self._consolidated:
            return
        start = time.perf_counter()
        model = self._model(pl_module)
        # The hooks may use other parts of the module, which are left as they are too.
        with undisturbed(pl_module.modules(), ()):
            own = self._own_loss(trainer, model, data)
            self.penalty.consolidate(
                model, own.loss_func, own.data, forward=own.forward, group=self.group
            )
        self._consolidated = True
        self.consolidation_seconds = time.perf_counter() - start

    def _consolidate_resumed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Consolidate at the end of a `fit` that had nothing to train, and called no hooks of it.

        Lightning has taken the model from its device by then.
        """
        device = next(pl_module.parameters()).device
        pl_module.to(trainer.strategy.root_device)
        try:
            self.penalty.to(next(self._model(pl_module).parameters()).device)
            self._data = self._rehearsed(trainer, pl_module)
            self._consolidate(trainer, pl_module)
        finally:
            pl_module.to(device)

    def _leave(self, trainer: Any) -> None:
        """Take what was added to the callbacks away."""
        own = [c for c in trainer.callbacks if isinstance(c, _AfterOthers) and c.owner is self]
        if own:
            trainer.callbacks = [c for c in trainer.callbacks if c not in own]


class _AfterOthers(Callback):
    """Consolidates after the other callbacks, which may change weights, and before checkpoints."""

    def __init__(self, owner: RotatedEWCCallback) -> None:
        """Make one that acts for another callback."""
        super().__init__()
        self.owner = owner

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Consolidate the task."""
        self.owner._consolidate(trainer, pl_module)


def _has_forward(model: nn.Module) -> bool:
    """Whether a model can be called: a `LightningModule` need not, if its steps do not call it."""
    own = "forward" in vars(model) or type(model).forward is not LightningModule.forward
    return own or type(model).__call__ is not nn.Module.__call__
