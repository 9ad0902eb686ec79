"""What a penalty has consolidated: kept, looked for in a model, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from rotate_ewc._utils.validation import (
    AUTO,
    as_choice,
    as_positive_number,
    check_positive_integer,
)
from rotate_ewc.distributed.processes import Ranks
from rotate_ewc.io.header import HEADER
from rotate_ewc.options import Mode, Weighting
from rotate_ewc.penalty.checked_options import checked_option
from rotate_ewc.penalty.owners import Owners
from rotate_ewc.penalty.protection import Protection
from rotate_ewc.penalty.replicas import Replicas, digests_of
from rotate_ewc.penalty.stability import largest_curvature
from rotate_ewc.penalty.state import PenaltyState
from rotate_ewc.penalty.strength import StrengthSearch
from rotate_ewc.penalty.terms import Stack, Term, stack_terms
from rotate_ewc.penalty.weighting import scale_of_penalty


class _Places:
    """Has a place for every key of a penalty's state.

    `torch.distributed.checkpoint.state_dict` follows the keys of states through attributes, and
    asks a module of another form (`_fqn_modifiers`) through which attribute a key goes on.
    """

    def get(self, key: str) -> str | None:
        """Return the name of the attribute that has a place for a key of the state."""
        return "_places" if key == HEADER or "/" in key else None

    def values(self) -> tuple[str, ...]:
        """Return the names of sub-modules that keys leave out: none."""
        return ()

    def __getattr__(self, name: str) -> None:
        """Have a place."""
        if name != HEADER and "/" not in name:
            raise AttributeError(name)


class ConsolidatedTasks(nn.Module):
    """The quadratic terms of the tasks of the past, and where they are anchored.

    The state is moved and cast with the module, and is in its `state_dict`, as tensors alone.
    Nothing is registered as a parameter or buffer: what there is changes in number with every task,
    which wrappers that broadcast or average buffers do not expect, and an average of eigenvectors
    means nothing. The keys in the `state_dict` have no dots, since torch takes these for paths of
    submodules: a parameter's `layer.weight` is `layer%2Eweight` there.
    """

    _places: Final = _Places()
    mode: Mode
    weighting: Weighting
    # Whether each of several processes keeps only its share of the terms.
    sharded = False

    def __init__(
        self,
        mode: Mode | str,
        weighting: Weighting | str,
        *,
        strength: float | str,
        plasticity: float,
        strict: bool,
    ) -> None:
        """Begin without a task.

        Args:
            mode: Whether the tasks are merged into one term.
            weighting: What the tasks weigh.
            strength: λ, at least 0; or `"auto"`.
            plasticity: What is kept of a new task's progress, if the strength is found.
            strict: Whether a protected parameter that is missing, or smaller than it was, is an
                error.
        """
        super().__init__()
        self.mode = as_choice("mode", mode, Mode)
        self.weighting = as_choice("weighting", weighting, Weighting)
        self.strength_search = StrengthSearch(strength)
        self.plasticity = plasticity
        self.strict = strict
        self._terms: list[Term] = []
        # Another list after each consolidation, even where this process keeps nothing.
        self._stacks: list[Stack] = []
        # The processes that share the penalty; this one alone, unless `sharded=True`.
        self.owners = Owners()
        self._num_tasks = 0
        self._last_examples, self._last_loss_terms = 1, 1.0
        self._current_num_data: int | None = None
        self._current_num_loss_terms: float | None = None
        self._protection = Protection()
        # Until it is known whether all processes have consolidated the same.
        self._replicas: Replicas | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; options are checked as in the constructor."""
        super().__setattr__(name, checked_option(self, name, value))

    @property
    def strength(self) -> float:
        """λ; may be set at any time, to a number (as along a schedule) or to `"auto"`.

        `"auto"` finds it again, in the steps of an optimizer that the penalty is attached to; until
        then it is 1, which is Bayes' rule.
        """
        return self.strength_search.value

    @strength.setter
    def strength(self, value: float | str) -> None:
        # Another object, since a shallow copy of the penalty has the same.
        self.strength_search = self.strength_search.begun_again(value)

    @property
    def scale(self) -> float:
        """The factor from what `stacks` hold to the second derivatives of the penalty."""
        return self.strength * self.scale_of_one

    @property
    def scale_of_one(self) -> float:
        """That factor at strength 1."""
        if not self._terms:
            return 1.0
        reduction = self._terms[0].operator.provenance.reduction
        return scale_of_penalty(1.0, self.current_num_loss_terms, self.weighting, reduction)

    @property
    def max_curvature(self) -> float:
        """Largest second derivative of the penalty, or a bound of it where tasks are separate.

        Gradient descent on the penalty diverges when the learning rate is more than two over this.
        """
        return self.scale * self.largest_eigenvalue

    @property
    def largest_eigenvalue(self) -> float:
        """Largest eigenvalue of what `stacks` hold in all processes, or a bound of it."""
        with self.owners.together():
            largest = self.owners.ranks.gather("curvature", largest_curvature(self._stacks))
        return float(max(largest))

    @property
    def num_tasks(self) -> int:
        """Number of consolidated tasks."""
        return self._num_tasks

    @property
    def terms(self) -> tuple[Term, ...]:
        """The quadratic terms: one for each task, or one in all.

        With `sharded=True`, blocks of other processes consist of meta tensors, without numbers.
        """
        return tuple(self._terms)

    @property
    def stacks(self) -> Sequence[Stack]:
        """The blocks that this process keeps, of all terms; those of the same form in one."""
        return self._stacks

    @property
    def protected_names(self) -> list[str]:
        """The names of all protected parameters, whichever process keeps them."""
        return list(dict.fromkeys(name for term in self._terms for name in term.anchor))

    @property
    def current_num_data(self) -> int | None:
        """Number of examples of the task being trained; None takes the last consolidated task's.

        They are taken to have as many loss terms each as those of the last consolidated task;
        where they have not (sequences of other lengths), set `current_num_loss_terms` afterwards.
        """
        return self._current_num_data

    @current_num_data.setter
    def current_num_data(self, value: int | None) -> None:
        check_positive_integer("current_num_data", value, optional=True)
        self._current_num_data, self._current_num_loss_terms = value, None

    @property
    def current_num_loss_terms(self) -> float:
        """M_now, what the mean loss over all data of the task being trained divides by.

        Examples, tokens that count, elements of the outputs (squared errors, binary cross-entropy),
        or the sum of their class weights. What is set holds until `current_num_data` is set again;
        None goes back to following from that. Set it before the task's first step: a strength that
        is being found is one for the number it was found with.
        """
        if self._current_num_loss_terms is not None:
            return self._current_num_loss_terms
        if self.current_num_data is None:
            return self._last_loss_terms
        return self.current_num_data * (self._last_loss_terms / self._last_examples)

    @current_num_loss_terms.setter
    def current_num_loss_terms(self, value: float | None) -> None:
        if value is not None:
            value = as_positive_number("current_num_loss_terms", value)
        self._current_num_loss_terms = value

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that this process keeps: bases, eigenvalues and anchors."""
        return sum(t.nbytes for t in self._state.tensors.values() if not t.is_meta)

    def check_merged(self) -> None:
        """Raise `ValueError` unless there is one eigenbasis for all tasks."""
        if self.mode is not Mode.MERGED:
            raise ValueError(
                f"penalty has mode {self.mode!r}; expected 'merged': the terms of separate tasks "
                f"have no common eigenbasis in which to take a step"
            )

    def deltas(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `θ - θ*` by the stacks' own names for parameters, `[T, *shape]`.

        Those of parameters that are missing, and need not be there (`strict=False`), are zero.
        """
        deltas = {}
        found = self.protected(parameters)
        for stack in self._stacks:
            for key, _, anchor in stack.members:
                # In half precision a difference would be known less well than its terms.
                start = anchor.to(stack.block.eigenvalues.dtype)
                # With an axis for the terms, autograd has nothing to sum over where there is one.
                deltas[key] = found[key][None] - start if key in found else torch.zeros_like(start)
        return deltas

    def protected(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is protected of each parameter, by the stacks' own names for parameters.

        Those that are missing, and need not be there (`strict=False`), are left out. Of those that
        are spread over processes, all numbers are gathered.

        Raises:
            ValueError: If one is missing, or smaller than it was.
        """
        if self._replicas is not None and self._replicas.are_compared():
            self._replicas = None
        return self._protection.find(self._stacks, parameters, strict=self.strict)

    def keep_share(self) -> None:
        """Keep this process's share of what all processes of the default group have loaded.

        Raises:
            ValueError: If they do not have the same snapshots, naming a parameter.
        """
        ranks = Ranks.of(AUTO)
        if self.sharded and self._terms and ranks.size > 1 and not self.owners.are_several:
            with ranks.together():
                ranks.check_same(digests_of(self._terms))
            counts = self._num_tasks, self._last_examples, self._last_loss_terms
            self._replace_terms(self._terms, *counts, Owners(ranks))

    def _replace_terms(
        self,
        terms: Sequence[Term],
        num_tasks: int,
        last_examples: int,
        last_loss_terms: float,
        owners: Owners | None = None,
    ) -> None:
        owners = self.owners if owners is None else owners
        owners = owners.including(block for term in terms for block in term.operator.blocks)
        terms, stacks = stack_terms([owners.keep(term) for term in terms], owners.has)
        # In one step, so that not even an interrupt can leave a part of it.
        vars(self).update(
            _terms=terms,
            _stacks=stacks,
            owners=owners,
            _num_tasks=num_tasks,
            _last_examples=last_examples,
            _last_loss_terms=last_loss_terms,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles have, which no other process knows of."""
        return {**vars(self), "_replicas": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConsolidatedTasks:
        """Move or cast the state, as `nn.Module.to` and its relatives ask for."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        terms, owners = self.owners.map(fn, self._terms), self.owners.moved(fn)
        counts = self._num_tasks, self._last_examples, self._last_loss_terms
        self._replace_terms(terms, *counts, owners)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        # Copies: the state of an averaged model may be written to, and bases are shared by terms
        # and stacks.
        state = self._whole_state.to_dict()
        destination.update({prefix + _without_dots(k): t.clone() for k, t in state.items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Check the whole state before anything is replaced; without any, report it missing."""
        given = {
            _with_dots(key[len(prefix) :]) if isinstance(key, str) else key: value
            for key, value in state_dict.items()
            if not isinstance(key, str) or key.startswith(prefix)
        }
        if not given:
            missing_keys.append(prefix + HEADER)
            return
        state = PenaltyState.from_dict(given)
        state.check(mode=self.mode, weighting=self.weighting)
        state.check_continues(self._state)
        if not local_metadata.get("assign_to_params_buffers", False):
            state = state.map(torch.clone)
        self._restore(state)

    def _fqn_modifiers(self) -> _Places:
        """Tell torch's distributed checkpoints where to look for the keys of the state."""
        return self._places

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that make a penalty like this one, as JSON can hold them."""
        return {}

    @property
    def _state(self) -> PenaltyState:
        return PenaltyState(
            self.options,
            self.mode,
            self.weighting,
            tuple(self._terms),
            self._num_tasks,
            self._last_examples,
            self._last_loss_terms,
            replace(self.strength_search.found),
        )

    @property
    def _whole_state(self) -> PenaltyState:
        """The state with the blocks of all processes, to be asked for by all of them."""
        return replace(self._state, terms=tuple(self.owners.completed(self._terms)))

    def _restore(self, state: PenaltyState) -> None:
        self._replace_terms(
            state.terms, state.num_tasks, state.last_examples, state.last_loss_terms
        )
        self.strength_search.restore(state.found)


def _without_dots(key: str) -> str:
    return key.replace("%", "%25").replace(".", "%2E")


def _with_dots(key: str) -> str:
    return key.replace("%2E", ".").replace("%25", "%")
