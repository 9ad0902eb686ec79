"""`EKFACPenalty`: what keeps a network from forgetting, for any training loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from rotate_ewc._utils.keywords import forwards_keywords
from rotate_ewc._utils.parameters import (
    Parameters,
    name_parameters,
    parameters_of,
    select_parameters,
    unwrapped,
)
from rotate_ewc._utils.storage_dtype import OF_FILES, as_storage_dtype
from rotate_ewc._utils.validation import (
    AUTO,
    as_non_negative_number,
    check_positive_integer,
)
from rotate_ewc.distributed.processes import Group, Ranks
from rotate_ewc.distributed.sharding import whole
from rotate_ewc.errors import SnapshotError
from rotate_ewc.io import files
from rotate_ewc.linalg.quadratic import quadratic_form
from rotate_ewc.options import EstimationOptions, EstimationSettings, Mode, Weighting
from rotate_ewc.penalty.attachment import Attachment
from rotate_ewc.penalty.consolidated import ConsolidatedTasks
from rotate_ewc.penalty.folding import check_dtypes, estimate_task, fold_in
from rotate_ewc.penalty.own_loss import own_loss_of
from rotate_ewc.penalty.owners import Owners
from rotate_ewc.penalty.replicas import Replicas
from rotate_ewc.penalty.shared_form import shared_quadratic_form
from rotate_ewc.penalty.stability import warn_if_divergent
from rotate_ewc.penalty.state import PenaltyState
from rotate_ewc.penalty.terms import Term
from rotate_ewc.penalty.updates import UpdateKind
from rotate_ewc.penalty.weighting import kept_weight

# What `_replace_terms` takes.
Folded = tuple[list[Term], int, int, float, Owners]


class EKFACPenalty(ConsolidatedTasks):
    """Elastic weight consolidation in a rotated basis.

    After each task, `consolidate` estimates the Fisher matrix F_t at the solution θ*_t. Later tasks
    are learned under the penalty

        ½ · strength · Σ_t ω_t (θ - θ*_t)ᵀ F_t (θ - θ*_t)
        with ω_t = w_t · decay^(T - t) · M_t / M_now

    for the T tasks of the past. With a mean loss and nothing else given (w_t = decay = 1), strength
    1 is Bayes' rule: M_t are the numbers of loss terms of the past tasks (what the mean divides by:
    examples, tokens, or elements of the outputs), M_now that of the task being trained (Huszár
    2018, "Note on the quadratic penalties in elastic weight consolidation"). `weighting="uniform"`
    leaves these numbers out; w_t is an argument of `consolidate`. Larger strengths protect more. By
    default the strength is found during the steps of an optimizer that the penalty is attached to.

    In mode `"merged"` the operators of all tasks are merged into one, anchored at the latest
    solution: time and memory do not depend on the number of tasks. In mode `"separate"` every task
    keeps its operator and its own anchor.

    `attach` makes any optimizer respect the penalty in its steps; by default this is stable at
    every strength. Alternatively, add `penalty(model)` to the loss, with a strength that you choose
    (1 until one is found); then large strengths need small learning rates.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from rotate_ewc import EKFACPenalty
        >>> _ = torch.manual_seed(0)
        >>> model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
        >>> old_task = [(torch.randn(16, 4), torch.randint(3, (16,)))]
        >>> new_task = [(torch.randn(16, 4), torch.randint(3, (16,)))]
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        >>> penalty = EKFACPenalty()
        >>> handle = penalty.attach(optimizer, model)
        >>> for task in (old_task, new_task):
        ...     for x, y in task:
        ...         optimizer.zero_grad()
        ...         criterion(model(x), y).backward()
        ...         optimizer.step()
        ...     penalty.consolidate(model, criterion, task)
        >>> penalty.num_tasks, penalty.strength > 0
        (2, True)
    """

    @forwards_keywords(EstimationSettings)
    def __init__(
        self,
        strength: float | str = AUTO,
        mode: Mode | str = Mode.MERGED,
        *,
        plasticity: float = 0.95,
        weighting: Weighting | str = Weighting.EXAMPLES,
        decay: float = 1.0,
        temperature: float | str = AUTO,
        damping: float = 0.03,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        strict: bool = True,
        sharded: bool = False,
        settings: EstimationSettings | None = None,
        **options: Unpack[EstimationOptions],
    ) -> None:
        """Make a penalty that is zero until the first task is consolidated.

        Args:
            strength: λ, at least 0. `"auto"` finds it in the steps of an optimizer that the penalty
                is attached to, while the first task after a consolidation is learned.
            mode: `"merged"` (constant cost) or `"separate"`.
            plasticity: With strength `"auto"`, the share of the optimizer's progress on a new task
                that the penalty leaves in a step, between 0 and 1; more where the tasks hardly
                overlap, and with `"rotated"` (but for SGD) of the whole task at least `1 - 7 (1 -
                plasticity)` (see `rotate_ewc.penalty.plasticity`). A smaller value protects more.
            weighting: `"examples"` (tasks count by their numbers of loss terms, as in one loss over
                the data of all tasks) or `"uniform"`.
            decay: Factor on the weights of earlier tasks at each consolidation, from 0 to 1 (the γ
                of online EWC, Schwarz et al. 2018).
            temperature: More than 0. The Fisher matrix is that of the outputs divided by the
                temperature, times its square to keep the scale. Above 1 the predictions are
                softened, so that examples of which the model is certain count too. `"auto"`
                chooses, for each snapshot, a temperature at which the mean entropy of the
                predictions is 0.8 of the maximum.
            damping: How much is added to the eigenvalues `Λ_ij` of output i and input j of a block,
                `damping · (mean_i Λ_ij + mean_ij Λ)`. The first mean holds on to what a layer
                computes for old inputs even where nothing depends on it now, because it may
                later; the second keeps an optimizer from moving far in directions that only
                seem free.
            include: Patterns such as `"encoder.*"` for the names of the parameters to protect.
            exclude: Patterns for names to leave out, such as those of unsupported layers.
            strict: Whether a protected parameter that is missing, or smaller than it was, is an
                error; otherwise it is left out, with a warning.
            sharded: Whether each of several processes keeps only its share of the snapshots. The
                penalty, `save` and `state_dict` are then to be called in all processes. See
                `docs/distributed.md`.
            settings: How Fisher matrices are estimated; None is all defaults.
            **options: Single fields of `EstimationSettings`, where they are explained, such as
                `fisher_type="type2"`; they replace those of `settings`.

        Raises:
            ValueError: If a value is out of range, naming the argument.
            TypeError: If a value has the wrong type, or there is no such option.
        """
        super().__init__(mode, weighting, strength=strength, plasticity=plasticity, strict=strict)
        self.decay = decay
        self.temperature = temperature
        self.damping = damping
        self.include = include
        self.exclude = exclude
        self.sharded = sharded
        self.settings = EstimationSettings.gather(settings, options)

    def consolidate(
        self,
        model: nn.Module,
        loss_func: Callable[..., Any] | None = None,
        data: Iterable[Any] | None = None,
        *,
        params: Parameters | None = None,
        forward: Callable[[Any], Any] | None = None,
        num_data: int | None = None,
        weight: float = 1.0,
        group: Group = AUTO,
    ) -> None:
        """Remember a task: estimate its Fisher matrix at the current solution and add it.

        The model, its gradients and modes, and the random states are left as they were. If anything
        fails, the penalty is unchanged too.

        Args:
            model: The model at the end of the task.
            loss_func: The task's loss, with reduction `mean` or `sum`: one that is built in or
                registered, or with `fisher_type="empirical"` any differentiable function of outputs
                and targets. None is the model's own loss, which models of transformers have.
            data: The task's data, as re-iterable batches (inputs, targets); or inputs alone, if the
                loss, or the Fisher type, needs no targets; or for a model's own loss as the model
                takes them. A few thousand examples are enough for most models.
            params: The parameters to protect, which keep the names they have in the model; None is
                all that require gradients and that `include` and `exclude` choose.
            forward: Maps a batch's inputs to the outputs that the loss takes, if these are not
                `model(inputs)`. Modules that it reaches are put into eval mode, as the model is.
            num_data: The task's number of examples, if `data` is only a sample of them.
            weight: w_t, the weight of this task relative to the others, at least 0.
            group: The processes that consolidate together, each with data of its own: `"auto"` (the
                default group, where `torch.distributed` is initialised), a `ProcessGroup`, a
                `DeviceMesh` of one dimension, or None (this process alone). All of them must call
                this; all get the same bits which, up to rounding, are those of one process with all
                the data. See `docs/distributed.md`.

        Raises:
            ValueError: If a parameter, layer, loss or batch cannot be handled, naming it.
            TypeError: If an argument has the wrong type.
        """
        ranks = Ranks.of(group)
        with ranks.together():
            folded = self._consolidated(
                model, loss_func, data, params, forward, num_data, weight, ranks
            )
        self._replicas = Replicas.of(folded[0][-1].operator.blocks, ranks)
        # At the very end, so that an interrupt leaves all of it or nothing.
        self._replace_terms(*folded)

    def _consolidated(
        self,
        model: nn.Module,
        loss_func: Callable[..., Any] | None,
        data: Iterable[Any] | None,
        params: Parameters | None,
        forward: Callable[[Any], Any] | None,
        num_data: int | None,
        weight: float,
        ranks: Ranks,
    ) -> Folded:
        """Return what `consolidate` makes of the penalty, which stays as it is."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
        check_positive_integer("num_data", num_data, optional=True)
        weight = as_non_negative_number("weight", weight)
        if loss_func is not None and not callable(loss_func):
            raise TypeError(
                f"loss_func is {type(loss_func).__name__}; expected consolidate(model, loss_func, "
                f"data), or data=loader by name for a model that has its own loss"
            )
        if data is None:
            raise TypeError("data is missing; expected the task's batches: data=loader")
        model = unwrapped(model)
        if ranks.size > 1:
            told = {"number of tasks": self._num_tasks, "weight": weight, "mode": self.mode.value}
            told |= {"temperature": self.temperature, "damping": self.damping}
            ranks.check_same({**told, "weighting": self.weighting.value, "decay": self.decay})
        with whole(model, params) as params:
            if loss_func is None:
                if forward is not None:
                    raise ValueError(
                        "forward is given, but loss_func is not; expected both, or neither for a "
                        "model that has its own loss"
                    )
                loss_func, data, forward = own_loss_of(model, data)
            if params is None:
                params = select_parameters(model, self.include, self.exclude)
            # Whatever names they were given, the penalty will look for them by those in the model.
            chosen = name_parameters(params, model)
            named = name_parameters(list(chosen.values()), model)
            self.protected(parameters_of(model))
            if self.mode is Mode.MERGED:
                check_dtypes(self._terms, named)
            operator = estimate_task(
                model,
                loss_func,
                named,
                data,
                forward,
                temperature=self.temperature,
                damping=self.damping,
                settings=replace(self.settings, seed=self.settings.seed + self._num_tasks),
                num_data=num_data,
                ranks=ranks,
            )
            anchor = {name: named[name].detach().clone() for name in operator.parameter_shapes}
            provenance = operator.provenance
            num_loss_terms, reduction = provenance.num_loss_terms, provenance.reduction
            weight = kept_weight(weight, num_loss_terms, self.weighting, reduction)
            old, owners = self._terms_among(ranks)
            kept = [block for term in old for block in term.operator.blocks]
            owners = owners.including([*kept, *operator.blocks])
            terms = fold_in(
                old,
                Term(operator, anchor, weight),
                parameters_of(model),
                mode=self.mode,
                decay=self.decay,
                settings=self.settings,
                ranks=ranks,
                owners=owners,
            )
        # A task of which nothing counts is not what the next one will be like.
        last = (operator.num_data, num_loss_terms)
        if not num_loss_terms:
            last = (self._last_examples, self._last_loss_terms)
        return terms, self._num_tasks + 1, *last, owners

    def _terms_among(self, ranks: Ranks) -> tuple[Sequence[Term], Owners]:
        """Return the terms as these processes are to keep them, and the owners of their blocks."""
        wanted = ranks if self.sharded else Ranks()
        if self.owners.are_of(wanted):
            return self._terms, self.owners
        return self.owners.completed(self._terms), Owners(wanted)

    def forward(self, model: nn.Module | Mapping[str, Tensor]) -> Tensor:
        """Return the penalty, a scalar tensor; zero before the first task.

        Args:
            model: The model, or its parameters by name. Parameters that are new since a task, or
                the new rows of one that has grown, are free.

        Raises:
            ValueError: If a protected parameter is missing or has lost its shape, naming it.
            TypeError: If `model` is neither a module nor a mapping.
        """
        parameters = parameters_of(model)
        if not self._terms:
            like = next(iter(parameters.values()), torch.zeros(()))
            return like.new_zeros(())
        if self.owners.are_several:
            return 0.5 * self.scale * shared_quadratic_form(self, parameters)
        deltas = self.deltas(parameters)
        value = quadratic_form([stack.block for stack in self._stacks], deltas)
        if value.requires_grad and not torch.compiler.is_compiling():
            self.strength_search.warn_unless_sought(self._num_tasks)
        return 0.5 * self.scale * value

    def attach(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        update: UpdateKind | str = UpdateKind.ROTATED,
        every: int = 1,
        *,
        view: Callable[[nn.Module], Mapping[str, Tensor]] | None = None,
    ) -> Attachment[EKFACPenalty]:
        """Make an optimizer respect the penalty in all later steps; the loss does not contain it.

        Args:
            optimizer: An optimizer of the model's parameters.
            model: The model.
            update: `"rotated"`: the optimizer steps in the eigenbasis, and the exact proximal step
                follows. `"tangent"`: a constant gradient is added, and renewed every few steps;
                cheap. `"gradient"`: the penalty's gradient is added, for any optimizer that
                evaluates the loss once in a step.
            every: Number of steps after which the tangent is renewed or, for SGD, the proximal
                step is taken. Call `flush` of the handle before you evaluate or consolidate.
            view: Function from the model to the protected tensors, by the names they had when they
                were consolidated; gradients must reach the model's parameters through them. It
                needs update `"gradient"`. An example is
                `rotate_ewc.integrations.peft.effective_parameters`, for adapters. None is the
                model's own parameters.

        Returns:
            A handle, with `detach`, `flush`, `strength`, `state_dict` and `load_state_dict`; also
            `Attachment.of(optimizer)`.

        Raises:
            ValueError: If the optimizer has none of the model's parameters, or the model none of
                the protected ones, by name; the optimizer's step size is unknown (see
                `register_step_size`), it already has a penalty, or the mode is not `"merged"`.
            TypeError: If an argument has the wrong type.
        """
        return Attachment(self, optimizer, model, update, every, view=view)

    def check_learning_rate(self, learning_rate: float) -> bool:
        """Return whether gradient descent on the penalty converges at a rate, and warn if not."""
        learning_rate = as_non_negative_number("learning_rate", learning_rate)
        return warn_if_divergent(learning_rate, self.max_curvature, self.strength)

    def save(
        self, path: str | os.PathLike[str], *, storage_dtype: torch.dtype | str | None = None
    ) -> None:
        """Write what was learned, and the options, to a safetensors file: whole or not at all.

        With `sharded=True`, all processes must call this, and the first one writes the file.

        Args:
            path: The file; an older one is replaced.
            storage_dtype: Dtype of the stored bases and eigenvalues, such as `torch.bfloat16` for
                about half the size; anchors keep their own. None keeps all as they are.

        Raises:
            FileNotFoundError: If the folder does not exist.
            ValueError: If snapshots cannot be stored in that dtype.
        """
        dtype = as_storage_dtype(storage_dtype, OF_FILES)
        state = self._whole_state.to_dict(dtype=dtype)
        with self.owners.together():
            if self.owners.ranks.rank == 0:
                files.save(state, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **options: Any) -> EKFACPenalty:
        """Read a penalty from a file that `save` wrote.

        Args:
            path: The file.
            **options: Arguments of the constructor, which replace those it was saved with; not
                `mode` and `weighting`. With a `storage_dtype` the bases are kept in it.

        Raises:
            SnapshotError: If the file is damaged or is not a penalty's, naming it and the key.
            FileNotFoundError: If there is no file.
            TypeError: If there is no such option.
            ValueError: If an option is out of range.
        """
        with files.loaded(path) as state:
            found = PenaltyState.from_dict(state)
            penalty = cls._with_options(found.options, options)
            found.check(mode=penalty.mode, weighting=penalty.weighting)
        penalty._restore(found.stored_in(penalty.settings.storage_dtype))
        return penalty

    @classmethod
    def _with_options(cls, saved: Mapping[str, Any], given: Mapping[str, Any]) -> EKFACPenalty:
        """Return a penalty with saved options, or others in their place."""
        cls(**given)  # what is wrong with these is not the file's fault
        try:
            return cls(**_overridden(saved, given))
        except (TypeError, ValueError) as error:
            wrong = error
        try:
            cls(**saved)
        except (TypeError, ValueError) as error:
            raise SnapshotError(f"snapshot's 'options' cannot be used: {error}") from None
        raise wrong  # they do not go together

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that make a penalty like this one, in a form that JSON can hold."""
        return {
            "strength": AUTO if self.strength_search.given is None else self.strength_search.given,
            "mode": self.mode.value,
            "plasticity": self.plasticity,
            "weighting": self.weighting.value,
            "decay": self.decay,
            "temperature": self.temperature,
            "damping": self.damping,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "strict": self.strict,
            "sharded": self.sharded,
            **self.settings.to_json(),
        }

    def extra_repr(self) -> str:
        """Show strength, mode and tasks."""
        return f"strength={self.strength_search}, mode={self.mode!r}, tasks={self._num_tasks}"


def _overridden(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved arguments of the constructor with others in their place.

    Settings that are given as a whole replace all that were saved one by one.
    """
    names = {field.name for field in fields(EstimationSettings)} if "settings" in given else set()
    return {**{name: saved[name] for name in saved if name not in names}, **given}
