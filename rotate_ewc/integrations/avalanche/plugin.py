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
from rotate_ewc._utils.validation import as_choice, as_non_negative_number, check_positive_integer
from rotate_ewc.errors import SnapshotError
from rotate_ewc.integrations.avalanche.batches import (
    Batches,
    forward_batch,
    inputs_of,
    whole_task,
)
from rotate_ewc.integrations.avalanche.loss_terms import LossTerms
from rotate_ewc.losses import likelihood_of
from rotate_ewc.options import Choice, Mode, PenaltyOptions
from rotate_ewc.penalty.penalty import EKFACPenalty
from rotate_ewc.penalty.rotated_adam import RotatedAdam
from rotate_ewc.penalty.step_size import StepSizes, check_optimizer, learning_rate_of, step_sizes_of
from rotate_ewc.penalty.tangent import TangentPenalty
from rotate_ewc.tracing.counting import ExampleCounter

PROGRESS: Final = "progress"


class Update(Choice):
    """How the penalty acts on the parameters in training.

    `PENALTY`: it is added to every loss. `TANGENT`: the gradient of its tangent plane is added to
    every gradient of the loss, and the plane is renewed by an implicit step (`TangentPenalty`).
    `PROXIMAL`: the parameters are moved after the optimizer's step (`EKFACPenalty.proximal_step_`),
    which is stable for every strength. `OPTIMIZER`: the strategy's optimizer is a
    `RotatedAdam(model, lr=...)`, which gets the plugin's penalty.
    """

    PENALTY = "penalty"
    TANGENT = "tangent"
    PROXIMAL = "proximal"
    OPTIMIZER = "optimizer"

    @property
    def implicit(self) -> bool:
        """Whether it moves the parameters after every so many steps of the optimizer."""
        return self in (Update.TANGENT, Update.PROXIMAL)


class RotatedEWCPlugin(SupervisedPlugin):
    """Elastic weight consolidation in a rotated basis, as a plugin for any supervised strategy.

    After each experience the Fisher matrix is estimated on the experience's data, with its
    evaluation transforms. Later experiences are trained under the penalty

        ½ · ewc_lambda · Σ_t (M_t / M_now) (θ - θ*)ᵀ F_t (θ - θ*)

    with M the numbers of loss terms, such as examples or tokens. Where examples have several, or
    none, M_now is known after the first epoch; until then it is that of the minibatches so far.
    (Avalanche's `EWCPlugin` has no ½ and no such numbers: for the same Fisher matrix its
    `ewc_lambda` is half of this one.) Nothing is registered on the model or the optimizer.

    Attributes:
        penalty: The `EKFACPenalty` at work.
        penalty_in_loss: What was added to the last loss.
        consolidation_seconds: How long the consolidation of the last experience took; None if it
            did not end a task.

    Example:
        strategy = Naive(model=model, optimizer=optimizer, criterion=CrossEntropyLoss(),
                         plugins=[RotatedEWCPlugin(ewc_lambda=3.0)])
    """

    @forwards_keywords(EKFACPenalty, without=("strength",))
    def __init__(
        self,
        ewc_lambda: float = 1.0,
        mode: Mode | str = Mode.MERGED,
        *,
        update: Update | str = Update.PENALTY,
        every: int = 1,
        step_size: float | None = None,
        num_samples: int | None = None,
        estimation_mb_size: int | None = None,
        **penalty_options: Unpack[PenaltyOptions],
    ) -> None:
        """Make a plugin that does nothing until the first experience has ended.

        Args:
            ewc_lambda: Strength of the penalty, at least 0. With a mean loss, 1 is Bayes' rule and
                3 a good practical value.
            mode: `"merged"`: one penalty for all experiences, at constant time and memory; or
                `"separate"`: one for each experience.
            update: `"penalty"`, `"tangent"`, `"proximal"` or `"optimizer"`: how the penalty acts,
                see `Update`. The last three need mode `"merged"`.
            every: After how many steps of the optimizer an implicit or proximal step is taken, of
                so many times its size; the cost is divided by it. What is left over when an epoch
                ends is taken then.
            step_size: That of the implicit or proximal step; None takes the optimizer's own, which
                must then be SGD, Adam or AdamW with one learning rate.
            num_samples: Examples to draw from each experience for its estimate; None takes all. A
                few thousand are usually as good.
            estimation_mb_size: Mini-batch size of the estimate, which changes its speed but not its
                result; None takes the strategy's `train_mb_size`.
            **penalty_options: Other arguments of `EKFACPenalty`, those for `EstimationSettings`
                among them. The seed is also that of the drawn examples; a `batch_size_fn` gets
                pairs of Avalanche's inputs and task labels.

        Raises:
            ValueError: If a value is out of range, naming the argument.
            TypeError: If a value has the wrong type, or there is no such argument.
        """
        super().__init__()
        check_positive_integer("num_samples", num_samples, optional=True)
        check_positive_integer("estimation_mb_size", estimation_mb_size, optional=True)
        check_positive_integer("every", every)
        update, mode = as_choice("update", update, Update), as_choice("mode", mode, Mode)
        if update is not Update.PENALTY and mode is not Mode.MERGED:
            raise ValueError(f"update is {update!r} and mode {mode!r}; expected mode 'merged'")
        if step_size is not None:
            step_size = as_non_negative_number("step_size", step_size)
        if not update.implicit and (every != 1 or step_size is not None):
            raise ValueError(
                f"every is {every} and step_size {step_size}, but update {update!r}; expected them "
                f"with update 'tangent' or 'proximal' only"
            )
        strength = as_non_negative_number("ewc_lambda", ewc_lambda)
        self.penalty = EKFACPenalty(strength, mode, **penalty_options)
        self.update = update
        self.every = every
        self.step_size = step_size
        self.num_samples = num_samples
        self.estimation_mb_size = estimation_mb_size
        self.penalty_in_loss: Tensor | float = 0.0
        self.consolidation_seconds: float | None = None
        self._tangent = TangentPenalty(self.penalty) if update is Update.TANGENT else None
        self._sub_experiences = 0
        self._waiting, self._waiting_updates = 0.0, 0
        self._learning_rate_checked = False
        self._loss_terms: LossTerms | None = None

    @property
    def ewc_lambda(self) -> float:
        """Strength of the penalty."""
        return self.penalty.strength

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Tell the penalty how many examples the task at hand has."""
        self.penalty.current_num_data = len(whole_task(strategy.experience).dataset)
        self._learning_rate_checked = False
        self._loss_terms = None
        if self.penalty.num_tasks > 0:
            self._loss_terms = LossTerms(likelihood_of(strategy._criterion))
        if self.update.implicit and self.step_size is None:
            check_optimizer(strategy.optimizer)
        if self._tangent is not None:
            # Weights may have been loaded, and a run that is resumed has no tangent either.
            self._tangent.forget()
        self._connect(strategy.optimizer)
        # A model that does not fit is refused before anything is learned.
        self.penalty.protected(parameters_of(strategy.model))

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Add the penalty to the loss."""
        self._count_loss_terms(strategy)
        if self.update is Update.PENALTY and self.penalty.num_tasks > 0:
            self._check_learning_rate(strategy.optimizer)
            penalty = self.penalty(strategy.model)
            self.penalty_in_loss = penalty.detach()
            strategy.loss = strategy.loss + penalty

    def after_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Add the gradient of the tangent plane, before others clip in `before_update`."""
        if self._tangent is not None:
            self._tangent.add_gradient_(strategy.model)

    def after_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Take an implicit or proximal step, after every so many steps of the optimizer."""
        if not self.update.implicit or self.penalty.num_tasks == 0:
            return
        own = self.step_size is None
        self._waiting += learning_rate_of(strategy.optimizer) if own else self.step_size or 0.0
        self._waiting_updates += 1
        if self._waiting_updates == self.every:
            self._implicit_step(strategy)

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Take the step for the updates that are left over.

        Not at the end of the experience: there other plugins have gone back to the best weights,
        or are looking at them, before this one or after it.
        """
        self._implicit_step(strategy)
        self._tell_loss_terms()
        self._loss_terms = None

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Consolidate, at the end of a task."""
        self.consolidation_seconds = None
        if not self._ends_task(strategy.experience):
            return
        start = time.perf_counter()
        dataset = whole_task(strategy.experience).dataset
        settings = self.penalty.settings
        if settings.progressbar is None:
            shown = _shows_progress(strategy)
            self.penalty.settings = replace(settings, progressbar=shown)
        try:
            self.penalty.consolidate(
                strategy.model,
                strategy._criterion,
                self._batches(dataset.eval(), strategy),
                forward=partial(forward_batch, strategy.model),
                num_data=len(dataset),
            )
        finally:
            self.penalty.settings = settings
        self.consolidation_seconds = time.perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshot of the penalty: a flat dictionary of tensors and a JSON string.

        To be saved between experiences, or between the parts into which an online stream cuts them.
        """
        progress = {"sub_experiences": self._sub_experiences}
        return {**self.penalty.state_dict(), PROGRESS: json.dumps(progress)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; the model's weights are not touched.

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
        self.penalty.load_state_dict({k: v for k, v in state.items() if k != PROGRESS})
        self._sub_experiences = int(sub_experiences)

    def _connect(self, optimizer: Optimizer) -> None:
        """Give the penalty to a `RotatedAdam`, which must not obey it unknown to this plugin."""
        rotated = isinstance(optimizer, RotatedAdam)
        if rotated != (self.update is Update.OPTIMIZER):
            raise ValueError(
                f"update is {self.update!r} and the optimizer {type(optimizer).__name__}; expected "
                f"update 'optimizer' with RotatedAdam, and only with it"
            )
        if isinstance(optimizer, RotatedAdam):
            optimizer.penalty = self.penalty

    def _count_loss_terms(self, strategy: Any) -> None:
        """Count the loss terms of a minibatch of the first epoch."""
        if self._loss_terms is None:
            return
        # Without a model, that counting does not run one in the middle of training.
        counter = ExampleCounter(None, self.penalty.settings.batch_size_fn)
        outputs, targets = strategy.mb_output, strategy.mb_y
        count = counter.count(inputs_of(strategy.mbatch), outputs, targets)
        if self._loss_terms.add(outputs, targets, count):
            self._tell_loss_terms()

    def _tell_loss_terms(self) -> None:
        """Tell the penalty how many loss terms the task has, as far as is known."""
        mean = 0.0 if self._loss_terms is None else self._loss_terms.per_example()
        if mean > 0 and self.penalty.current_num_data is not None:
            self.penalty.current_num_loss_terms = self.penalty.current_num_data * mean

    def _implicit_step(self, strategy: Any) -> None:
        """Take the step for all updates since the last one."""
        if self._waiting_updates:
            parameters = parameters_of(strategy.model)
            sizes: StepSizes = self._waiting
            if self.step_size is None:
                sizes = step_sizes_of(strategy.optimizer, parameters, self._waiting)
            if self._tangent is None:
                self.penalty.proximal_step_(parameters, sizes)
            else:
                self._tangent.refresh_(parameters, sizes)
        self._waiting, self._waiting_updates = 0.0, 0

    def _check_learning_rate(self, optimizer: Optimizer) -> None:
        """Warn once for each task if plain gradient descent will diverge.

        Adaptive optimizers take steps of bounded size, and are not checked.
        """
        if not self._learning_rate_checked and isinstance(optimizer, SGD):
            self.penalty.check_learning_rate(max(map(_plain_rate, optimizer.param_groups)))
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

    def _batches(self, dataset: Any, strategy: Any) -> Batches:
        collate = getattr(dataset, "collate_fn", None)
        if self.num_samples is not None and self.num_samples < len(dataset):
            generator = torch.Generator().manual_seed(
                self.penalty.settings.seed + self.penalty.num_tasks
            )
            # Class-incremental data come ordered by class, so the first ones would not do.
            drawn = torch.randperm(len(dataset), generator=generator)[: self.num_samples]
            dataset = Subset(dataset, drawn.tolist())
        size = self.estimation_mb_size or strategy.train_mb_size
        return Batches(DataLoader(dataset, batch_size=size, collate_fn=collate))


def _plain_rate(group: Mapping[str, Any]) -> float:
    """Return the learning rate that is as stable without momentum; heavy balls roll no worse."""
    rate, momentum = float(group["lr"]), float(group["momentum"])
    return rate * (1 + 2 * momentum) / (1 + momentum) if group["nesterov"] else rate


def _shows_progress(strategy: Any) -> bool:
    """Return whether any of a strategy's loggers is the one that draws progress bars."""
    loggers = getattr(getattr(strategy, "evaluator", None), "loggers", ())
    return any(isinstance(logger, InteractiveLogger) for logger in loggers)
