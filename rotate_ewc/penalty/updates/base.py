"""What all updates share: how they take part in a step, and how they find the strength in it."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import Tensor

from rotate_ewc.errors import SnapshotError
from rotate_ewc.penalty.consolidated import ConsolidatedTasks
from rotate_ewc.penalty.plasticity import Plasticity, Progress
from rotate_ewc.penalty.strength import FoundStrength, StrengthSearch
from rotate_ewc.penalty.updates.step import StandIns, Step

# From the first look at the steps of a task to the second.
_FIRST_STEPS: Final = 10


class Update(ABC):
    """What an attached penalty does before and after each step of an optimizer.

    Until something is consolidated it is not asked.

    Attributes:
        steps_between_looks: From one step in which the strength is found, or bounded, to the next.
        bounds_strength: Whether it bounds the strength in later tasks.
    """

    steps_between_looks = _FIRST_STEPS
    bounds_strength = True

    def __init__(self, penalty: ConsolidatedTasks) -> None:
        """Take part in no step yet."""
        self.penalty = penalty
        self.stand_ins = StandIns()
        self._plasticity = Plasticity()
        self._looked_for = -1
        # What failed steps must not change.
        self._known: tuple[Plasticity, FoundStrength] | None = None

    def remember(self) -> None:
        """Remember what `undo` restores, before a step."""
        self._known = copy.copy(self.plasticity), copy.copy(self.search.found)

    @abstractmethod
    def before(self, step: Step) -> None:
        """Change what the optimizer will see; whatever can be refused is, before any change."""

    def acts_after(self) -> bool:
        """Return whether `after` needs, or changes, the parameters that the step leaves."""
        return True

    def after(self, step: Step) -> None:
        """Make of what the optimizer did what it is to be."""
        self.stand_ins.take_back()

    def undo(self) -> None:
        """Give model and optimizer back what they had before a step that failed."""
        self.stand_ins.undo()
        if self._known is not None:
            plasticity, self.search.found = self._known
            self.resume(plasticity)

    def give(self, step: Step, own: Mapping[str, Mapping[str, Tensor]]) -> set[str]:
        """Give the optimizers of all processes other gradients, and perhaps other data.

        Args:
            step: The step.
            own: `"gradient"`, and perhaps `"data"`, for the parameters that this process owns.

        Returns:
            The names of all parameters that have got any, in any process.
        """
        names = set()
        for name, found in self.penalty.owners.handed_out("gradients", own):
            self.stand_ins.put(step.held(name), found["gradient"], found.get("data"))
            names.add(name)
        return names

    def looks(self) -> bool:
        """Count a step, and return whether the strength is to be found, or bounded, in it."""
        if self.search.is_to_begin(self.penalty.num_tasks):  # perhaps it was a number until now
            self.plasticity.wait = min(self.plasticity.wait, _FIRST_STEPS)
        return self.wait < math.inf and self.plasticity.is_due()

    @property
    def wait(self) -> float:
        """How many steps there are before the next look; infinite where the strength is given."""
        bounds = self.bounds_strength and self.search.is_bounded(self.penalty.num_tasks)
        return self.plasticity.wait if bounds or self.finds_strength else math.inf

    @property
    def finds_strength(self) -> bool:
        """Whether the strength is being found, in the steps of the task at hand."""
        return self.search.is_on(self.penalty.num_tasks)

    @property
    def search(self) -> StrengthSearch:
        """The penalty's strength, and how far it has been found."""
        return self.penalty.strength_search

    @property
    def plasticity(self) -> Plasticity:
        """What was seen of the task at hand; nothing where another has just been consolidated."""
        if self._looked_for != self.penalty.num_tasks:
            self.resume(Plasticity())
        return self._plasticity

    def resume(self, plasticity: Plasticity) -> None:
        """Go on with what was seen of the task at hand."""
        self._looked_for, self._plasticity = self.penalty.num_tasks, plasticity

    def leave(self) -> None:
        """Leave what was seen of the task at hand to the next update of the penalty."""
        if self._looked_for == self.penalty.num_tasks:
            self.search.leave(self._looked_for, self._plasticity)

    def take_over(self) -> None:
        """Go on with what an earlier update of the penalty has left of the task at hand."""
        left = self.search.take_over(self.penalty.num_tasks)
        if left is not None:
            self.resume(left)

    def find_strength(self, seen: Sequence[Progress], step: Step) -> None:
        """Find the strength in what a step is about to do to every block.

        Args:
            seen: What that is.
            step: The step.
        """
        penalty = self.penalty
        later = self.search.is_bounded(penalty.num_tasks)
        found = self.plasticity.look(
            seen, penalty.plasticity, penalty.strength, later=later, total=penalty.owners.total
        )
        if found is not None:
            is_first = self.plasticity.looks == 1
            rate = step.rate(penalty.protected_names)
            self.search.found.add(found, rate, penalty.num_tasks, is_first=is_first)
            self.plasticity.wait = (_FIRST_STEPS if is_first else self.steps_between_looks) - 1

    def limit_strength(self, done: Sequence[Progress]) -> bool:
        """Limit the strength by what a step has done to every block; return whether that is told.

        Args:
            done: What it has done; nothing of blocks without a gradient to tell it.
        """
        penalty = self.penalty
        before = self.plasticity.largest_strength
        found = self.plasticity.limit(done, penalty.plasticity, penalty.owners.total)
        if found is not None:
            self.search.found.limit_to(found, before)
        return found is not None

    def flush(self, step: Step) -> None:  # noqa: B027
        """Take what was put off since the penalty was last looked at; `step` has no gradients."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and numbers that a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, or raise `SnapshotError`."""
        check_nothing_left(state)


def take_count(state: dict[str, Any], key: str) -> int:
    """Take a number of steps out of a state, 0 where it is missing, or raise `SnapshotError`."""
    value = state.pop(key, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise SnapshotError(
            f"the state of the handle has {value!r:.99} as {key!r}; expected an integer, at least "
            f"0: load an unchanged copy"
        )
    return value


def check_nothing_left(state: Mapping[str, Any]) -> None:
    """Raise `SnapshotError` unless a state was read to the end."""
    if state:
        raise SnapshotError(
            f"the state of the handle has the unexpected key {min(state)!r}; expected that of a "
            f"handle of this penalty, with the same update"
        )
