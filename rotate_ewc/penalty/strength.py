"""The strength λ of a penalty: a number, or what is found while new tasks are learned.

How a step tells it is the matter of `plasticity.py`; here is what becomes of all that was found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from rotate_ewc._utils.validation import AUTO, as_non_negative_number, unless_auto
from rotate_ewc._utils.warnings import warn_user
from rotate_ewc.penalty.plasticity import NO_LIMIT, Plasticity


class GeometricMean(NamedTuple):
    """The geometric mean of what was found while one task was learned, at its largest rate.

    The first step of a task has a single gradient behind it, so what is found there is only used
    until there is something else: the second number counts twice, and the first no more.

    Attributes:
        looks: How many numbers were found.
        sum_of_logs: Of the logarithms of the numbers times the learning rates of their steps.
        num_tasks: How many old tasks there were then.
        largest_rate: The largest learning rate.
    """

    looks: int = 0
    sum_of_logs: float = 0.0
    num_tasks: int = 0
    largest_rate: float = 0.0

    @property
    def logarithm(self) -> float:
        """Logarithm of the mean; infinite before any was found, as of what bounds nothing."""
        if not self.looks:
            return math.inf
        return self.sum_of_logs / self.looks - math.log(self.largest_rate)

    def including(self, number: float, rate: float, num_tasks: int) -> GeometricMean:
        """Return the mean with one more number, which is the first where the task is another."""
        old = self if num_tasks == self.num_tasks else GeometricMean()
        logarithm = math.log(number) + math.log(rate)  # their product may underflow
        total = 2 * logarithm if old.looks == 1 else old.sum_of_logs + logarithm
        return GeometricMean(old.looks + 1, total, num_tasks, max(old.largest_rate, rate))


_NOTHING_FOUND: Final = GeometricMean()


@dataclass
class FoundStrength:
    """The mean of the strengths found in one task, and what bounds it there and in a later task.

    Attributes:
        strengths: Those found in the first task that was learned under the penalty.
        limit: What leaves enough of that task as a whole; 1e20 where any strength does.
        bounds: Those found in the latest task that had any.
    """

    strengths: GeometricMean = _NOTHING_FOUND
    limit: float = NO_LIMIT
    bounds: GeometricMean = _NOTHING_FOUND

    def __str__(self) -> str:
        """Show λ, and whether it is no more than a start."""
        return f"{self.value:.3g}" if self.strengths.looks else "none found yet, 1"

    @property
    def value(self) -> float:
        """λ; 1, which is Bayes' rule, before any was found."""
        if not self.strengths.looks:
            return 1.0
        return min(math.exp(min(self.strengths.logarithm, self.bounds.logarithm)), self.limit)

    def limit_to(self, limit: float, before: float) -> None:
        """Take a limit, unless a smaller one is not its finder's own.

        Several optimizers may have parts of a model, each with a limit of its own; and one that is
        new, or does not know what it has seen, must not raise what was found earlier.

        Args:
            limit: The largest strength that one of them finds.
            before: What the same has found before; 1e20 if nothing.
        """
        others = self.limit if self.limit < before else NO_LIMIT
        self.limit = min(limit, others)

    def is_open(self, num_tasks: int) -> bool:
        """Return whether a task with so many before it is that in which λ is found."""
        return num_tasks > 0 and self.strengths.num_tasks in (0, num_tasks)

    def add(self, strength: float, rate: float, num_tasks: int, *, is_first: bool = False) -> None:
        """Take one more into the mean; in a later task, into that of its bounds.

        Args:
            strength: λ, or a bound of it.
            rate: The learning rate of the step in which it was found.
            num_tasks: How many old tasks there are.
            is_first: Whether it has a single gradient behind it, so that it is not taken where
                there is another in this task.
        """
        is_open = self.is_open(num_tasks)
        mean = self.strengths if is_open else self.bounds
        if is_first and mean.num_tasks == num_tasks:
            return
        mean = mean.including(strength, rate, num_tasks)
        if is_open:
            self.strengths = mean
        else:
            self.bounds = mean


class StrengthSearch:
    """λ of a penalty, and how far it has been found.

    Attributes:
        given: λ, if it is a number; None if it is found.
        found: What was found.
        is_sought: Whether a handle seeks it, or did.
    """

    def __init__(self, strength: float | str) -> None:
        """Begin with λ, at least 0, or with `"auto"`.

        Raises:
            ValueError: If it is neither.
            TypeError: Likewise.
        """
        self.given = unless_auto(as_non_negative_number, "strength", strength)
        self.found = FoundStrength()
        self.is_sought = False
        # What handles have seen of a task, by number of tasks, that were detached during it.
        self._left: list[tuple[int, Plasticity]] = []

    def begun_again(self, strength: float | str) -> StrengthSearch:
        """Return one with another λ, or which finds it again, by the same handles."""
        new = StrengthSearch(strength)
        new.is_sought, new._left = self.is_sought, self._left
        return new

    def __str__(self) -> str:
        """Show λ, and whether it was found."""
        return f"{AUTO} ({self.found})" if self.given is None else str(self.given)

    @property
    def value(self) -> float:
        """λ as it is now."""
        return self.found.value if self.given is None else self.given

    def is_on(self, num_tasks: int) -> bool:
        """Return whether λ is being found, in the steps of the task with so many before it."""
        return self.given is None and self.found.is_open(num_tasks)

    def is_to_begin(self, num_tasks: int) -> bool:
        """Return whether λ is to be found in that task, and was not in any step so far."""
        return self.is_on(num_tasks) and not self.found.strengths.looks

    def is_bounded(self, num_tasks: int) -> bool:
        """Return whether λ was found, and is to be no larger than that task can bear."""
        return self.given is None and num_tasks > 0 and not self.is_on(num_tasks)

    def warn_unless_sought(self, num_tasks: int) -> None:
        """Warn once if λ is to be found, but the penalty takes part in no optimizer's steps."""
        if self.is_to_begin(num_tasks) and not self.is_sought:
            self.is_sought = True
            warn_user(
                "the penalty in the loss has strength 'auto', which is found only in the steps of "
                "an optimizer, and is 1 until then; call penalty.attach(optimizer, model) instead "
                "of adding it to the loss, or give it a strength: EKFACPenalty(strength=100.0), say"
            )

    def leave(self, num_tasks: int, seen: Plasticity) -> None:
        """Keep what a handle has seen of that task, for one that goes on after it."""
        self._left.append((num_tasks, seen))

    def take_over(self, num_tasks: int) -> Plasticity | None:
        """Return what a handle has left that saw that task; None if there is none."""
        self._left = [(task, seen) for task, seen in self._left if task == num_tasks]
        return self._left.pop(0)[1] if self._left else None

    def restore(self, found: FoundStrength) -> None:
        """Go on from what a snapshot holds."""
        self.found, self._left = replace(found), []
