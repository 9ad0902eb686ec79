"""`RotatedEWCCallback`: the penalty at the right places of `Trainer`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rotate_ewc._utils.preserve_state import kept, random_states
from rotate_ewc._utils.validation import AUTO, check_positive_integer
from rotate_ewc.distributed.processes import Group, Ranks
from rotate_ewc.integrations.attaching import AttachesPenalty
from rotate_ewc.integrations.loaders import FirstOfStream, check_stream, number_of_examples
from rotate_ewc.integrations.rehearsal import rehearse
from rotate_ewc.integrations.transformers.checkpoints import (
    checkpoint_to_resume,
    folder_of,
    load_attachment,
    load_penalty,
    save_both,
)
from rotate_ewc.integrations.transformers.own_loss import LabelledBatches, own_loss
from rotate_ewc.penalty.attachment import View
from rotate_ewc.penalty.own_loss import OwnLoss
from rotate_ewc.penalty.penalty import EKFACPenalty
from rotate_ewc.penalty.updates import UpdateKind


class RotatedEWCCallback(AttachesPenalty, TrainerCallback):
    """Elastic weight consolidation in a rotated basis, as a callback of `Trainer`.

    During training the penalty is attached to the optimizer of `Trainer`; losses, `eval_loss`
    included, are without it. When training ends, the task is consolidated on its training data, by
    the model's own loss, at the final weights (the best ones with `load_best_model_at_end`). Each
    checkpoint contains the penalty and the state of its attachment; a run that is resumed from it
    ends with the same bits.

    The penalty, its strength and its share of loss plus penalty are logged with each training loss.

    Attributes:
        penalty: The penalty.
        attachment: The handle of the penalty in the optimizer's steps; None unless training runs.
        consolidation_seconds: How long the last consolidation took.

    Examples:
        ```python
        trainer = Trainer(model, args, train_dataset=data, callbacks=[RotatedEWCCallback(penalty)])
        trainer.train()
        penalty.save("penalty.safetensors")
        ```
    """

    def __init__(
        self,
        penalty: EKFACPenalty,
        consolidate_at_end: bool = True,
        *,
        update: UpdateKind | str = UpdateKind.ROTATED,
        every: int = 1,
        num_samples: int | None = None,
        view: View | None = None,
        group: Group = AUTO,
    ) -> None:
        """Make a callback for one penalty and any number of training runs.

        Args:
            penalty: The penalty; tasks that it already has are protected from the start.
            consolidate_at_end: Whether to consolidate the task when training ends. Where `Trainer`
                is given a loss (`compute_loss_func`, or a `compute_loss` of your own), do it
                yourself, with that loss.
            update: As in `EKFACPenalty.attach`.
            every: Likewise; the rest is applied before evaluations and checkpoints.
            num_samples: Examples to draw from the training data for the estimate, or the first ones
                of a stream without length, which needs this; None takes all. A few thousand are
                usually as good.
            view: As in `EKFACPenalty.attach`; `rotate_ewc.integrations.peft` has one for adapters.
            group: The processes that consolidate together, as `EKFACPenalty.consolidate` takes
                them.

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
        check_positive_integer("num_samples", num_samples, optional=True)
        self.num_samples = num_samples
        self._own: OwnLoss | None = None
        self._num_data: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the penalty to the optimizer; in a resumed run, with what was saved."""
        model, train_dataloader = kwargs["model"], kwargs["train_dataloader"]
        self._detach()
        if self.consolidate_at_end and state.is_hyper_param_search:
            raise ValueError(
                "consolidate_at_end is True in a hyper-parameter search, where every trial would "
                "count as a task; expected consolidate_at_end=False"
            )
        folder = checkpoint_to_resume(args, state) if state.global_step else None
        if folder is not None:
            load_penalty(self.penalty, folder)
        # Trainer has moved the model, and may have done so after the penalty was made.
        self.penalty.to(next(model.parameters()).device)
        self._num_data = number_of_examples(train_dataloader)
        if self._num_data is None and state.max_steps > 0:
            # What is read of a stream.
            each = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            self._num_data = state.max_steps * each
        self._own = None
        if self.consolidate_at_end:
            data = self._sampled(train_dataloader, args)
            self._own = own_loss(model, data, label_smoothing=args.label_smoothing_factor)
            loss_func, data, forward = self._own
            rehearse(self.penalty, model, loss_func, data, forward, group=self.group)
        attachment = self._attach(kwargs["optimizer"], model)
        if folder is not None:
            try:
                load_attachment(attachment, folder)
            except Exception:
                self._detach()
                raise
        self._count_loss_terms()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Apply what `every` has postponed, if the weights are about to be evaluated or saved."""
        if control.should_evaluate or control.should_save or control.should_training_stop:
            self._flush()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take what is left over from `every`."""
        self._flush()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the penalty, its strength and its share to what is logged with a training loss."""
        model, logs = kwargs["model"], kwargs["logs"]
        if self.attachment is None or "loss" not in logs:
            return
        with torch.no_grad():
            seen = model if self.view is None else self.view(model)
            penalty = float(self.penalty(seen))
        total = logs["loss"] + penalty
        values = {
            "rotated_ewc_penalty": penalty,
            "rotated_ewc_share": penalty / total if total > 0 else 0.0,
            "rotated_ewc_strength": self.penalty.strength,
        }
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the penalty, and the state of its attachment, into the checkpoint."""
        if self.attachment is not None and state.is_world_process_zero:
            save_both(self.attachment, folder_of(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach from the optimizer, and consolidate the task."""
        self._detach()
        own, self._own = self._own, None
        if own is not None:
            start = time.perf_counter()
            data, ranks = own.data, Ranks.of(self.group)
            if ranks.size > 1 and isinstance(data, LabelledBatches):
                part = slice(ranks.rank, None, ranks.size)
                data = replace(data, data=self._sampled(kwargs["train_dataloader"], args, part))
            # All of it is counted as it is seen, for a collator may make several examples of one.
            is_part = self.num_samples is not None or ranks.size > 1
            self.penalty.consolidate(
                kwargs["model"],
                own.loss_func,
                data,
                forward=own.forward,
                num_data=self._num_data if is_part else None,
                group=self.group,
            )
            self.consolidation_seconds = time.perf_counter() - start

    def _sampled(
        self, loader: Any, args: TrainingArguments, part: slice = slice(None)
    ) -> Iterable[Any]:
        """Return the training data in a fixed order, or as many of them as are wanted.

        Args:
            loader: What `Trainer` trains with.
            args: Its arguments.
            part: Which of these, where each of several processes has a part.
        """
        size = args.per_device_train_batch_size
        if number_of_examples(loader) is None:
            stream = loader.dataset
            while isinstance(stream, IterableDatasetShard):
                stream = stream.dataset
            check_stream(stream)
            first = FirstOfStream(stream, self._taken_of_stream(), part)
            return DataLoader(first, batch_size=size, collate_fn=loader.collate_fn)
        count = len(loader.dataset)
        indices = torch.arange(count)
        if self.num_samples is not None and self.num_samples < count:
            generator = torch.Generator().manual_seed(self.penalty.settings.seed)
            indices = torch.randperm(count, generator=generator)[: self.num_samples]
        return DataLoader(
            Subset(loader.dataset, indices[part].tolist()),
            batch_size=size,
            collate_fn=loader.collate_fn,
        )

    def _taken_of_stream(self) -> int:
        """Return how many examples of a stream the estimate takes: none that are not trained on.

        Raises:
            ValueError: If `num_samples` is not given; the stream might have no end.
        """
        if self.num_samples is None:
            raise ValueError(
                "the training data have no length, and may have no end, which an estimate could "
                "not wait for; expected num_samples, the number of examples to take from their "
                "beginning, such as RotatedEWCCallback(penalty, num_samples=2000)"
            )
        return min(self.num_samples, self._num_data or self.num_samples)

    def _count_loss_terms(self) -> None:
        """Tell the penalty how many loss terms the task has that is about to be trained."""
        if not self.penalty.num_tasks or self._num_data is None:
            return
        self.penalty.current_num_data = self._num_data
        if self._own is None or not isinstance(self._own.data, LabelledBatches):
            return
        with kept(random_states([])):
            terms, examples = self._own.data.num_terms()
        self.penalty.current_num_loss_terms = terms * (self._num_data / max(1, examples)) or None
