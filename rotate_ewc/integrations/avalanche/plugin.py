"""`RotatedEWCPlugin`: the penalty at the right places of Avalanche's training loop."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from avalanche.core import SupervisedPlugin
from avalanche.logging import InteractiveLogger
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, Subset
from typing_extensions import Unpack

from rotate_ewc._utils.keywords import forwards_keywords
from rotate_ewc._utils.parameters import parameters_of
from rotate_ewc._utils.validation import (
    AUTO,
    as_choice,
    as_non_negative_number,
    check_positive_integer,
    unless_auto,
)
from rotate_ewc.distributed.processes import Group, Ranks
from rotate_ewc.errors import SnapshotError
from rotate_ewc.integrations.avalanche.batches import (
    Minibatches,
    check_steps,
    loss_arguments,
    outputs_for,
    preserved,
    whole_task,
)
from rotate_ewc.integrations.avalanche.loss_terms import LossTerms
from rotate_ewc.integrations.rehearsal import rehearse
from rotate_ewc.losses import likelihood_of
from rotate_ewc.options import Choice, Mode, PenaltyOptions
from rotate_ewc.penalty.attachment import Attachment
from rotate_ewc.penalty.penalty import EKFACPenalty
from rotate_ewc.penalty.stability import plain_rate
from rotate_ewc.tracing.counting import ExampleCounter

PROGRESS: Final = "progress"
ATTACHMENT: Final = "attachment"


class Update(Choice):
    """How the penalty acts on the parameters in training.

    `ROTATED`, `TANGENT` and `GRADIENT`: it acts on the steps of the strategy's optimizer, as
    `EKFACPenalty.attach` explains. `LOSS`: it is added to every loss, for mode `"separate"` and for
    optimizers that no penalty can be attached to.
    """

    ROTATED = "rotated"
    TANGENT = "tangent"
    GRADIENT = "gradient"
    LOSS = "loss"


class RotatedEWCPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Elastic weight consolidation in a rotated basis, as a plugin for any supervised strategy.

    After each experience the Fisher matrix is estimated on the experience's data, with its
    evaluation transforms, through the strategy's own `_unpack_minibatch`, `forward` and
    `criterion`. Later experiences are trained under the penalty

        ½ · ewc_lambda · Σ_t (M_t / M_now) (θ - θ*)ᵀ F_t (θ - θ*)

    with M the numbers of loss terms, such as examples or tokens. Where examples have several, or
    none, M_now is known after the first epoch; until then it is that of the minibatches so far.
    (Avalanche's `EWCPlugin` has no ½ and no such numbers: for the same Fisher matrix its
    `ewc_lambda` is half of this one.) The penalty is attached to the strategy's optimizer while a
    task is trained; between tasks the optimizer steps by itself, and the model is never touched.

    Attributes:
        penalty: The `EKFACPenalty` in use.
        attachment: The handle of the penalty in the optimizer's steps; None between tasks.
        penalty_in_loss: What was added to the last loss; 0 if the penalty is attached.
        consolidation_seconds: How long the consolidation of the last experience took; None if it
            did not end a task.

    Examples:
        ```python
        strategy = Naive(model=model, optimizer=optimizer, criterion=CrossEntropyLoss(),
                         plugins=[RotatedEWCPlugin()])
        ```
    """

    @forwards_keywords(EKFACPenalty, without=("strength",))
    def __init__(
        self,
        ewc_lambda: float | str = AUTO,
        mode: Mode | str = Mode.MERGED,
        *,
        update: Update | str = Update.ROTATED,
        every: int = 1,
        num_samples: int | None = None,
        estimation_mb_size: int | None = None,
        group: Group = AUTO,
        **penalty_options: Unpack[PenaltyOptions],
    ) -> None:
        """Make a plugin that does nothing until the first experience has ended.

        Args:
            ewc_lambda: Strength of the penalty, at least 0; `"auto"` finds it in the optimizer's
                steps while the second experience is learned. With a mean loss, 1 is Bayes' rule.
            mode: `"merged"`: one penalty for all experiences, at constant time and memory; or
                `"separate"`: one for each experience.
            update: `"rotated"`: the optimizer steps in the eigenbasis, and the exact proximal step
                follows. `"tangent"`: a constant gradient is added, and renewed every few steps;
                cheap. `"gradient"`: the penalty's gradient is added, for any optimizer that
                evaluates the loss once in a step. `"loss"`: the penalty is added to the loss, as is
                needed with mode `"separate"`, with a number as `ewc_lambda`.
            every: Number of steps after which the tangent is renewed or, for SGD, the proximal
                step is taken; it divides the cost. The rest is applied when an epoch ends.
            num_samples: Examples to draw from each experience for its estimate; None takes all. A
                few thousand are usually as good.
            estimation_mb_size: Mini-batch size of the estimate, which changes its speed but not its
                result; None takes the strategy's `train_mb_size`.
            group: The processes that consolidate together, as `EKFACPenalty.consolidate` takes
                them. All of them have the whole experience; each looks at its part of it.
            **penalty_options: Other arguments of `EKFACPenalty`, those for `EstimationSettings`
                among them. The seed is also that of the drawn examples; a `batch_size_fn` gets
                the minibatches that the strategy has unpacked.

        Raises:
            ValueError: If a value is out of range, naming the argument.
            TypeError: If a value has the wrong type, or there is no such argument.
        """
        super().__init__()
        check_positive_integer("num_samples", num_samples, optional=True)
        check_positive_integer("estimation_mb_size", estimation_mb_size, optional=True)
        check_positive_integer("every", every)
        update, mode = as_choice("update", update, Update), as_choice("mode", mode, Mode)
        if update is not Update.LOSS and mode is not Mode.MERGED:
            raise ValueError(
                f"mode is {mode!r} and update {update!r}, which needs one eigenbasis for all "
                f"experiences; expected mode='merged', or update='loss'"
            )
        if update is Update.LOSS and every != 1:
            raise ValueError(
                f"every is {every}, but with update='loss' the penalty is in every loss; expected "
                f"1, or another update"
            )
        strength = unless_auto(as_non_negative_number, "ewc_lambda", ewc_lambda)
        if strength is None and update is Update.LOSS:
            raise ValueError(
                "ewc_lambda is 'auto', which is found in an optimizer's steps, and update 'loss'; "
                "expected a number such as ewc_lambda=1.0, or another update"
            )
        self.penalty = EKFACPenalty(AUTO if strength is None else strength, mode, **penalty_options)
        self.update = update
        self.every = every
        self.num_samples = num_samples
        self.estimation_mb_size = estimation_mb_size
        Ranks.of(group)  # what is no group is refused at once
        self.group = group
        self.penalty_in_loss: Tensor | float = 0.0
        self.consolidation_seconds: float | None = None
        self.attachment: Attachment[EKFACPenalty] | None = None
        self._optimizer: Optimizer | None = None
        # A saved attachment's state, until there is an optimizer to attach to.
        self._saved_attachment: Mapping[str, Any] | None = None
        self._sub_experiences = 0
        self._learning_rate_checked = False
        self._loss_terms: LossTerms | None = None

    @property
    def ewc_lambda(self) -> float:
        """Strength of the penalty, as it was given or found."""
        return self.penalty.strength

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Attach the penalty to the optimizer, and tell it how many examples the task has."""
        dataset = whole_task(strategy.experience).dataset
        self.penalty.current_num_data = len(dataset)
        self._learning_rate_checked = False
        self._loss_terms = None
        fisher_type = self.penalty.settings.fisher_type
        if self.penalty.num_tasks > 0:
            self._loss_terms = LossTerms(likelihood_of(strategy._criterion, fisher_type))
        # What will not do is refused before anything is learned.
        self.penalty.protected(parameters_of(strategy.model))
        minibatches = self._minibatches(dataset.eval(), strategy)
        check_steps(strategy, minibatches, fisher_type)
        if getattr(strategy.experience.logging(), "is_first_subexp", True):
            with preserved(strategy):
                forward = partial(outputs_for, strategy)
                criterion = strategy._criterion
                rehearse(
                    self.penalty, strategy.model, criterion, minibatches, forward, group=self.group
                )
        if self.update is not Update.LOSS:
            self._attach(strategy)

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Add the penalty to the loss, if it is not attached to the optimizer."""
        self._count_loss_terms(strategy)
        if self.penalty.num_tasks == 0:
            return
        if self.update is Update.LOSS:
            self._check_learning_rate(strategy.optimizer)
            penalty = self.penalty(strategy.model)
            self.penalty_in_loss = penalty.detach()
            strategy.loss = strategy.loss + penalty

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Apply the part of the penalty that `every` has postponed.

        This must not wait until the end of the experience, where other plugins restore or evaluate
        the best weights, before this one or after it.
        """
        if self.attachment is not None:
            self.attachment.flush()
        self._tell_loss_terms()
        self._loss_terms = None

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Detach from the optimizer and consolidate, at the end of a task."""
        self.consolidation_seconds = None
        if not self._ends_task(strategy.experience):
            return
        # Averages in the eigenbasis would start again in the next one.
        self._detach()
        start = time.perf_counter()
        dataset, ranks = whole_task(strategy.experience).dataset, Ranks.of(self.group)
        # All of it is counted as it is seen: a minibatch may have more examples than were drawn.
        is_part = self.num_samples is not None or ranks.size > 1
        settings = self.penalty.settings
        if settings.progressbar is None:
            shown = _shows_progress(strategy)
            self.penalty.settings = replace(settings, progressbar=shown)
        try:
            with preserved(strategy):
                self.penalty.consolidate(
                    strategy.model,
                    strategy._criterion,
                    self._minibatches(dataset.eval(), strategy, ranks),
                    forward=partial(outputs_for, strategy),
                    num_data=len(dataset) if is_part else None,
                    group=self.group,
                )
        finally:
            self.penalty.settings = settings
        self.consolidation_seconds = time.perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshot of the penalty, with the plugin's position in the stream.

        Save it between experiences, or between the parts into which an online stream splits them.
        """
        progress = {"sub_experiences": self._sub_experiences}
        state = {**self.penalty.state_dict(), PROGRESS: json.dumps(progress)}
        attachment = self._attachment_state()
        return state if attachment is None else {**state, ATTACHMENT: attachment}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; the model's weights are not touched.

        The state of the penalty's part in an optimizer's steps is read as the next experience
        begins.

        Raises:
            ValueError: If the state is not whole or not consistent, naming the key.
        """
        try:
            sub_experiences = json.loads(state[PROGRESS])["sub_experiences"]
            if isinstance(sub_experiences, bool) or sub_experiences < 0:
                raise ValueError(f"sub_experiences is {sub_experiences}")
        except (KeyError, TypeError, ValueError) as error:
            raise SnapshotError(
                f"snapshot key {PROGRESS!r} is missing or damaged ({error}); expected the state of "
                f"a RotatedEWCPlugin"
            ) from None
        attachment = state.get(ATTACHMENT)
        saved = attachment.get("update") if isinstance(attachment, Mapping) else None
        if attachment is not None and saved != self.update.value:
            raise SnapshotError(
                f"snapshot key {ATTACHMENT!r} has update {saved!r}, in the middle of a task; "
                f"expected {self.update.value!r}, that of this plugin"
            )
        own = (PROGRESS, ATTACHMENT)
        self.penalty.load_state_dict({k: v for k, v in state.items() if k not in own})
        self._sub_experiences = int(sub_experiences)
        self._saved_attachment = attachment

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles have, whose optimizers have no hooks.

        They attach themselves again when the next experience begins.
        """
        saved = self._attachment_state()
        return {**vars(self), "attachment": None, "_optimizer": None, "_saved_attachment": saved}

    def _attach(self, strategy: Any) -> None:
        """Attach the penalty to a strategy's optimizer, if it is not attached to it already."""
        attached = self.attachment
        if attached is not None and (
            self._optimizer is not strategy.optimizer or attached.model is not strategy.model
        ):
            self._detach()
        if self.attachment is None:
            self.attachment = self.penalty.attach(
                strategy.optimizer, strategy.model, self.update.value, self.every
            )
            self._optimizer = strategy.optimizer
        if self._saved_attachment is not None:
            self.attachment.load_state_dict(self._saved_attachment)
            self._saved_attachment = None

    def _detach(self) -> None:
        attached, self.attachment, self._optimizer = self.attachment, None, None
        if attached is not None:
            attached.detach()

    def _attachment_state(self) -> Mapping[str, Any] | None:
        """Return the state of the attachment; one that is still to be loaded comes first."""
        if self._saved_attachment is not None or self.attachment is None:
            return self._saved_attachment
        return self.attachment.state_dict()

    def _count_loss_terms(self, strategy: Any) -> None:
        """Count the loss terms of a minibatch of the first epoch."""
        if self._loss_terms is None:
            return
        # Without a model, that counting does not run one in the middle of training.
        counter = ExampleCounter(None, self.penalty.settings.batch_size_fn)
        outputs, targets = loss_arguments(strategy)
        count = counter.count(strategy.mbatch, outputs, targets)
        if self._loss_terms.add(outputs, targets, count):
            self._tell_loss_terms()

    def _tell_loss_terms(self) -> None:
        """Tell the penalty how many loss terms the task has, if that is known."""
        mean = 0.0 if self._loss_terms is None else self._loss_terms.per_example()
        if mean > 0 and self.penalty.current_num_data is not None:
            self.penalty.current_num_loss_terms = self.penalty.current_num_data * mean

    def _check_learning_rate(self, optimizer: Optimizer) -> None:
        """Warn once for each task if plain gradient descent will diverge.

        Adaptive optimizers take steps of bounded size, and are not checked.
        """
        if not self._learning_rate_checked and isinstance(optimizer, SGD):
            self.penalty.check_learning_rate(max(map(plain_rate, optimizer.param_groups)))
        self._learning_rate_checked = True

    def _ends_task(self, experience: Any) -> bool:
        """Whether a task ends here; online streams cut each task into many experiences.

        Avalanche does not mark the last part of a task that it could cut evenly, so they are
        counted too.
        """
        part = experience.logging()
        if not hasattr(part, "is_last_subexp"):
            return True
        self._sub_experiences = 1 if part.is_first_subexp else self._sub_experiences + 1
        return bool(part.is_last_subexp) or self._sub_experiences == part.sub_stream_length

    def _minibatches(self, dataset: Any, strategy: Any, ranks: Ranks | None = None) -> Minibatches:
        """Return the minibatches of an estimate; of several processes, those of this one."""
        collate = getattr(dataset, "collate_fn", None)
        if self.num_samples is not None and self.num_samples < len(dataset):
            generator = torch.Generator().manual_seed(
                self.penalty.settings.seed + self.penalty.num_tasks
            )
            # Class-incremental data come ordered by class, so the first ones would not do.
            drawn = torch.randperm(len(dataset), generator=generator)[: self.num_samples]
            dataset = Subset(dataset, drawn.tolist())
        if ranks is not None and ranks.size > 1:
            dataset = Subset(dataset, range(ranks.rank, len(dataset), ranks.size))
        size = self.estimation_mb_size or strategy.train_mb_size
        return Minibatches(DataLoader(dataset, batch_size=size, collate_fn=collate), strategy)


def _shows_progress(strategy: Any) -> bool:
    """Return whether any of a strategy's loggers is the one that draws progress bars."""
    loggers = getattr(getattr(strategy, "evaluator", None), "loggers", ())
    return any(isinstance(logger, InteractiveLogger) for logger in loggers)
