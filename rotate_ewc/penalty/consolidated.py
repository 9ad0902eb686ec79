"""What a penalty has consolidated: kept, looked for in a model, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rotate_ewc._utils.messages import parameters_are
from rotate_ewc._utils.parameters import fits, misfits, protected_slice
from rotate_ewc._utils.warnings import warn_user
from rotate_ewc.options import Mode, Weighting
from rotate_ewc.penalty.state import PenaltyState
from rotate_ewc.penalty.terms import Stack, Term, stack_terms


class ConsolidatedTasks(nn.Module):
    """The quadratic terms of the tasks of the past, and where they are anchored.

    The state is moved and cast with the module, and is in its `state_dict`. Nothing is registered
    as a parameter or buffer: what there is changes in number with every task.
    """

    def __init__(self, mode: Mode, weighting: Weighting, *, strict: bool) -> None:
        """Begin without a task.

        Args:
            mode: Whether the tasks are merged into one term.
            weighting: What the tasks weigh.
            strict: Whether a protected parameter that is missing, or smaller than it was, is an
                error.
        """
        super().__init__()
        self.mode = mode
        self.weighting = weighting
        self.strict = strict
        self._terms: list[Term] = []
        self._stacks: tuple[Stack, ...] = ()
        self._num_tasks = 0
        self._last_examples = 1
        self._left_out: set[str] = set()

    @property
    def num_tasks(self) -> int:
        """Number of consolidated tasks."""
        return self._num_tasks

    @property
    def terms(self) -> tuple[Term, ...]:
        """The quadratic terms: one for each task, or one in all."""
        return tuple(self._terms)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The blocks of all terms with their weights, those of the same form in one."""
        return self._stacks

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are kept: bases, eigenvalues and anchors."""
        return sum(t.nbytes for t in self.state_dict().values() if isinstance(t, Tensor))

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

        Those that are missing, and need not be there (`strict=False`), are left out.

        Raises:
            ValueError: If one is missing, or smaller than it was.
        """
        found: dict[str, Tensor] = {}
        left_out: set[str] = set()
        try:
            for stack in self._stacks:
                for key, name, anchor in stack.members:
                    if self.strict or fits(name, parameters, anchor[0]):
                        found[key] = protected_slice(name, parameters, anchor[0])
                    else:
                        left_out.add(name)
        except ValueError:
            raise ValueError(misfits(self._wanted(parameters), parameters)) from None
        if new := sorted(left_out - self._left_out):
            self._left_out.update(new)
            warn_user(
                f"{parameters_are(new)} missing in the model, or smaller than when "
                f"consolidated, and not protected any more (strict=False)"
            )
        return found

    def _wanted(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the anchors of the parameters that must be there."""
        return {
            name: anchor[0]
            for stack in self._stacks
            for _, name, anchor in stack.members
            if self.strict or fits(name, parameters, anchor[0])
        }

    def _replace_terms(self, terms: Sequence[Term], num_tasks: int, last_examples: int) -> None:
        terms, stacks = stack_terms(terms)
        # In one step, so that not even an interrupt can leave a part of it.
        vars(self).update(
            _terms=terms, _stacks=stacks, _num_tasks=num_tasks, _last_examples=last_examples
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConsolidatedTasks:
        """Move or cast the state, as `nn.Module.to` and its relatives ask for."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        terms = [term.map(fn) for term in self._terms]
        self._replace_terms(terms, self._num_tasks, self._last_examples)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination.update(self._state.to_dict(prefix))

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
        """Check the whole state before anything is replaced."""
        state = PenaltyState.from_dict(state_dict, prefix)
        state.check(mode=self.mode, weighting=self.weighting)
        self._restore(state)

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
        )

    def _restore(self, state: PenaltyState) -> None:
        self._replace_terms(state.terms, state.num_tasks, state.last_examples)
