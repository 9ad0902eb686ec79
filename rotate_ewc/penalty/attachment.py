"""`Attachment`: a penalty that takes part in the steps of any optimizer, through its hooks.

`EKFACPenalty.attach` makes one. From then on, `optimizer.step()` respects the penalty:

1. **Before** the optimizer's step (after the user's clipping, and after a `GradScaler` that
   unscales) an update of `rotate_ewc.penalty.updates` puts other gradients, and with `"rotated"`
   also other values, in the places of `.grad` and `.data`. Nothing is copied over: the tensors that
   the user knows stay as they are until the step is done.
2. The optimizer steps, with its own options and state.
3. **After** it, and before all other hooks, the update makes of the outcome what it is to be,
   writes that into the parameters in place, and puts the user's gradients back.

If the optimizer or the update raises, what was in these places is put back, and what has begun in
an eigenbasis is forgotten. What the optimizer itself has done meanwhile is not undone: that would
take a copy of its whole state before every step. Until the first task is consolidated nothing is
touched at all.

**What the optimizer's state means.** With `"rotated"` the averages of protected parameters are in
the eigenbasis. A consolidation changes it, so these averages start again (carried over, they were
no better). Which eigenbasis a state is in is noted in the state itself, by number of tasks, and
saved and loaded with it. The state of all other parameters, and with SGD and the other updates of
all, goes on. `detach` forgets averages that are in an eigenbasis.

**The strength** is read in every step, and may change between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from inspect import ismethod, unwrap
from types import TracebackType
from typing import Any, Final, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rotate_ewc._utils.messages import parameters_are, parameters_have
from rotate_ewc._utils.parameters import named_parameters
from rotate_ewc._utils.validation import as_choice, check_positive_integer
from rotate_ewc.distributed.sharding import (
    check_one_axis,
    is_sharded,
    reshard,
)
from rotate_ewc.errors import SnapshotError
from rotate_ewc.penalty.attachable import (
    check_cadence,
    check_model,
    check_names,
    check_optimizer,
    check_view,
    unwrapped_optimizer,
)
from rotate_ewc.penalty.consolidated import ConsolidatedTasks
from rotate_ewc.penalty.hooks import evaluated, guarded
from rotate_ewc.penalty.plasticity import Plasticity
from rotate_ewc.penalty.updates import UpdateKind, make_update
from rotate_ewc.penalty.updates.step import Step, restart_all
from rotate_ewc.penalty.updates.viewed import ViewedUpdate

_KEYS: Final = {"update", "num_tasks", "plasticity", "state"}
Penalty = TypeVar("Penalty", bound=ConsolidatedTasks)
View = Callable[[nn.Module], Mapping[str, Tensor]]


class Attachment(Generic[Penalty]):
    """A penalty in the steps of an optimizer, until it is detached.

    As a context manager, it detaches itself at the end of the `with` block.

    Attributes:
        penalty: The penalty.
        optimizer: The optimizer.
        model: The model.
        update: How the penalty acts on the steps.
        every: Number of steps between evaluations of the penalty itself.
        view: Function from the model to the protected tensors; None is the model's parameters.
    """

    def __init__(
        self,
        penalty: Penalty,
        optimizer: Optimizer,
        model: nn.Module,
        update: UpdateKind | str = UpdateKind.ROTATED,
        every: int = 1,
        *,
        view: View | None = None,
    ) -> None:
        """Take part in every step from now on; see `EKFACPenalty.attach`."""
        self.penalty = penalty
        self.optimizer = unwrapped_optimizer(optimizer)
        self.model = model
        self.update = as_choice("update", update, UpdateKind)
        self.every = every
        check_positive_integer("every", every)
        penalty.check_merged()
        self._sharded_modules = check_model(model, self.optimizer)
        rule = check_optimizer(self.optimizer, self.update)
        if _attached_to(self.optimizer) is not None:
            raise ValueError(
                "the optimizer already has a penalty attached; expected one without: first call "
                "detach() on the handle that attach returned, which is also "
                "Attachment.of(optimizer), or add the other penalty to the loss"
            )
        check_cadence(every, self.update, rule, self.optimizer)
        self.view = view
        if view is None:
            check_names(model, named_parameters(model), penalty.protected_names)
            self._update = make_update(self.update, penalty, rule, every)
        else:
            check_view(view, self.update)
            if penalty.sharded:
                raise ValueError(
                    "the penalty has sharded=True, which does not go with a view; expected a "
                    "penalty with sharded=False"
                )
            penalty.protected(view(model))
            self._update = ViewedUpdate(penalty, partial(view, model))
        penalty.keep_share()
        self._update.take_over()
        penalty.strength_search.is_sought = True
        self._step: Step | None = None
        # A compiled step runs them as they were written.
        disable: Callable[[Any], Any] = torch.compiler.disable
        before, after = disable(self._before), disable(self._after)
        self._hooks: tuple[RemovableHandle, ...] = (
            self.optimizer.register_step_pre_hook(before),
            self.optimizer.register_step_post_hook(after),
        )
        # Before all others, which are to find the parameters as the whole step leaves them.
        hooks: Any = self.optimizer._optimizer_step_post_hooks
        hooks.move_to_end(self._hooks[1].id, last=False)
        # What a scheduler has put there, if one has.
        self._own_step: Callable[..., Any] | None = vars(self.optimizer).get("step")
        self._guard = guarded(self.optimizer, self._undo)
        self.optimizer.step = self._guard  # type: ignore[method-assign]

    @property
    def strength(self) -> float:
        """λ of the next step, shared with the penalty; may be set at any time, also to `"auto"`."""
        return self.penalty.strength

    @strength.setter
    def strength(self, value: float | str) -> None:
        self.penalty.strength = value

    def detach(self) -> None:
        """Detach from the optimizer; its averages in an eigenbasis restart.

        This first applies what `flush` would apply; otherwise parameters and gradients stay as they
        are. A second call does nothing.
        """
        self._detach(flush=True)

    def _detach(self, *, flush: bool) -> None:
        self._undo()
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()
        # A scheduler may have wrapped the guard, which does nothing from now on.
        if vars(self.optimizer).get("step") is self._guard:
            del self.optimizer.step
            if self._own_step is not None:
                self.optimizer.step = self._own_step  # type: ignore[method-assign]
        restart_all(self.optimizer)
        self._update.leave()
        if flush:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        """Apply the part of the penalty that `every` has postponed.

        Call it when training pauses, such as before evaluations and consolidations. With `every=1`
        it does nothing.
        """
        self._undo()
        if self.penalty.num_tasks:
            reshard(self._sharded_modules)
            parameters = named_parameters(self.model)
            groups = {name: group for name, _, group in self._held(parameters)}
            with self.penalty.owners.together():
                step = self._step_of(parameters, {}, groups)
                self._update.flush(step)
                step.spread()

    @staticmethod
    def of(optimizer: Optimizer) -> Attachment[Any]:
        """Return the handle of the penalty that is attached to an optimizer.

        Args:
            optimizer: The optimizer.

        Raises:
            ValueError: If none is attached.
            TypeError: If the argument has the wrong type.
        """
        found = _attached_to(unwrapped_optimizer(optimizer))
        if found is None:
            raise ValueError(
                "the optimizer has no penalty attached; expected one with which "
                "penalty.attach(optimizer, model) was called, not a copy of it"
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to end with the same bits.

        Load it after the states of model, penalty and optimizer. Without it a run can continue too,
        but only up to rounding errors, with `"tangent"` from a new tangent, and with a strength
        that may come out smaller if it is still being found.
        """
        return {
            "update": self.update.value,
            "num_tasks": self.penalty.num_tasks,
            "plasticity": self._update.plasticity.state_dict(),
            "state": self._update.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, after the penalty has loaded its own state.

        Raises:
            SnapshotError: If the state is incomplete, not finite, or of another penalty or update;
                nothing is changed then.
        """
        if not isinstance(state, Mapping) or set(state) != _KEYS:
            raise SnapshotError(
                "this is not the state of a handle; expected a dictionary from its state_dict()"
            )
        if state["update"] != self.update.value:
            raise SnapshotError(
                f"the state of the handle has update {state['update']!r}; expected "
                f"{self.update.value!r}, that of this one"
            )
        if state["num_tasks"] != self.penalty.num_tasks:
            raise SnapshotError(
                f"the state of the handle is of a penalty with {state['num_tasks']} tasks, but "
                f"this one has {self.penalty.num_tasks}; load the penalty's own state first"
            )
        if not isinstance(state["state"], Mapping):
            raise SnapshotError(
                f"the state of the handle has {type(state['state']).__name__} as 'state'; expected "
                f"a dictionary: load an unchanged copy"
            )
        plasticity = Plasticity.from_state_dict(state["plasticity"])
        self._update.load_state_dict(state["state"])
        self._update.resume(plasticity)

    def __enter__(self) -> Attachment[Penalty]:
        """Return the handle itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Detach."""
        # After an error in one of several processes, the others are not there to exchange numbers.
        self._detach(flush=kind is None or not self.penalty.owners.are_several)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied or pickled: the copy would take part in no steps."""
        raise TypeError(
            "a handle cannot be copied or pickled, since copies of optimizers have no hooks; keep "
            "handle.state_dict(), and give it to the handle that penalty.attach returns for the "
            "other optimizer: load_state_dict(state)"
        )

    def __repr__(self) -> str:
        """Show how the penalty takes part, and in whose steps."""
        optimizer, end = type(self.optimizer).__name__, "" if self._hooks else ", detached"
        return f"Attachment({optimizer}, update={self.update.value!r}, every={self.every}{end})"

    @torch.no_grad()
    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Prepare a step: the hook that runs before it."""
        self._undo()
        if not self.penalty.num_tasks:
            return None
        replaced = evaluated(args, kwargs)
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not bool(found_inf):  # else the optimizer will do nothing
            with self.penalty.owners.together():
                step = self._gather()
                self._update.remember()
                # First, so that what an interrupt leaves half done is undone.
                self._step = step
                self._update.before(step)
        return replaced

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finish a step: the hook that runs after it."""
        if self._step is not None:
            with self.penalty.owners.together():
                acts = self._update.acts_after()
                step = self._step.collect() if acts else self._step
                self._update.after(step)
                if acts:
                    step.spread()
            self._step = None

    def _undo(self) -> None:
        """Put back what a step that failed has left in the places of the user's tensors."""
        if self._step is not None:
            self._step = None
            self._update.undo()

    def _gather(self) -> Step:
        """Find what is about to be stepped, and refuse what cannot be."""
        reshard(self._sharded_modules)
        parameters = named_parameters(self.model)
        protected = set(self.penalty.protected_names)
        held, gradients, groups = set(), {}, {}
        for name, parameter, group in self._held(parameters):
            held.add(name)
            if parameter.grad is not None:
                gradients[name], groups[name] = parameter.grad.detach(), group
        if self.view is not None:
            protected = held
        elif not held & protected:
            check_names(self.model, parameters, self.penalty.protected_names, attached=True)
            raise ValueError(
                "the optimizer has none of the model's parameters that the penalty protects, as if "
                "they had been replaced since it was made. Add them with "
                "optimizer.add_param_group, or attach the penalty to a new optimizer"
            )
        sparse = [n for n, g in gradients.items() if n in protected and g.layout != torch.strided]
        if sparse:
            raise ValueError(
                f"{parameters_have(sparse)} a sparse gradient; expected a dense one, as of "
                f"torch.nn.Embedding(..., sparse=False)"
            )
        ordinary = [n for n in groups if n in protected and not is_sharded(parameters[n])]
        if odd := [n for n in ordinary if type(parameters[n].data) is not Tensor]:
            raise ValueError(
                f"{parameters_are(odd)} {type(parameters[odd[0]].data).__name__}; expected "
                f"ordinary tensors{', or those of fully_shard' if self.view is None else ''}"
            )
        return self._step_of(parameters, gradients, groups)

    def _step_of(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        groups: Mapping[str, Mapping[str, Any]],
    ) -> Step:
        """Return a step, with all numbers of what this process owns of its tensors."""
        owners = self.penalty.owners
        names = [name for name in self.penalty.protected_names if name in parameters]
        sharded = {n: parameters[n] for n in names if is_sharded(parameters[n])}
        check_one_axis(sharded)
        if owners.are_several:
            sharded = {name: parameters[name] for name in names}
        whole = owners.gathered({n: gradients[n] for n in sharded if n in gradients})
        step = Step(self.optimizer, parameters, {**gradients, **whole}, groups, sharded, owners)
        return step.collect()

    def _held(
        self, parameters: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Yield names, tensors and options of the model's parameters that the optimizer has."""
        names = {id(parameter): name for name, parameter in parameters.items()}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if (name := names.get(id(parameter))) is not None:
                    yield name, parameter, group


def _attached_to(optimizer: Optimizer) -> Attachment[Any] | None:
    """Return the handle of the penalty that takes part in an optimizer's steps, if one does."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        handle = getattr(unwrap(hook, stop=ismethod), "__self__", None)
        if isinstance(handle, Attachment):
            return handle
    return None
