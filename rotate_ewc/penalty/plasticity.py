"""How strong a penalty should be, found while a new task is learned; no old data are needed.

**What is kept of the progress.** In the eigenbasis an optimizer wants to move a coordinate by
`s = η m`, with m its average of gradients and η its step size there. To first order that lowers the
new loss by `η m² = s² / η`, of which the proximal step leaves a part `1 / (1 + η λ Λ)`, and of the
whole step

    ρ(λ) = Σ (s² / η) / (1 + η λ Λ)  /  Σ s² / η

over the protected coordinates, which falls from 1 to 0 as λ grows. A λ that is found by ρ depends
neither on the scale of the Fisher matrix nor on that of the loss (compare natural continual
learning, Kao et al. 2021: a trust region in the metric of the old tasks).

**What it may cost.** How much to give up depends on whether the tasks get into each other's way.
The overlap of the new task with the old ones is

    c = Σ (s² / η) Λ / Λ̄  /  Σ s² / η,    Λ̄ = Σ Λ^{3/2} / Σ Λ^{1/2} in each block

the curvature that the progress meets, over that which the old tasks' own progress met: their
gradients are as √Λ, and so is what an optimizer such as Adam makes of them. It is 1 for a task like
the old ones, near 0 for one that uses other directions, such as other pixels. λ is then where

    ρ(λ) = 1 - (1 - plasticity) c^{1.4}

with the sums of c over all looks at the task, so that looks count by their progress: what a task
does after it has been learned is mostly noise. Tasks that do not meet are penalised little, so that
there is room for many of them.

**When.** Every ten steps of the first task that is learned under the penalty (less often where it
costs more, see `updates/watching.py`); λ is the geometric mean of all values found so far. From
then on it stays, as in Bayes' rule: what the penalty gains with every task is what there is to
lose. What ρ depends on is ηλ, so a learning rate that falls would raise λ without limit, though
where a task comes to rest does not depend on η: every value is therefore what it would be at the
largest rate of the task.

**What a whole task keeps.** A step is not a task: n small steps are held back as one that is n
times as long. So λ is at most what leaves `1 - 7 (1 - plasticity)` of the task. By how much a step
has lowered the loss is told by the gradient g' of the *next* batch, `p = -s g'`; a gradient that
had a part in the step would mostly tell the noise of its own batch. In n steps that drive a
coordinate on alike, loss and penalty come to rest at about `1 / (1 + n η λ Λ)` of the way, so the
penalty leaves

    Σ p / (1 + n η λ Λ)  /  Σ p

over all steps of the task, where n is how many it takes at the highest speed, `Σ √P / max √P` with
P the progress of a step: distances are as the square roots of progress. There is no limit where
most of the progress is noise, where nothing need be left, and for SGD and the updates that do not
rotate, which look at too few steps.

**What many tasks leave.** Where many tasks meet in the same directions, their matrices add up until
nothing more is learned. So later tasks have a bound: λ is at most the geometric mean of what leaves
`1 - 3 (1 - plasticity)` of their own steps' progress, whatever their overlap, except under SGD.
`docs/results.md` tells how these choices were made, on held-out images of streams of many kinds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from rotate_ewc.errors import SnapshotError
from rotate_ewc.penalty.task_progress import TaskProgress, by_size

# Sums each of several numbers over all processes; `list` where there is one process.
Total = Callable[[Sequence[float]], list[float]]

# Of the overlap; see docs/results.md.
_POWER: Final = 1.4
# How many times as much of its progress a step in a later task may lose, and the whole task in
# which λ is found.
_MORE_IN_LATER_TASKS: Final = 3.0
_MORE_IN_A_WHOLE_TASK: Final = 7.0
# No strength that is found is larger.
NO_LIMIT: Final = 1e20
_SMALLEST, _LARGEST = math.log(1e-20), math.log(NO_LIMIT)
# To a part in a hundred, far less than by what it changes from look to look.
_TOLERANCE: Final = 1e-2
_MOST_ITERATIONS: Final = 60


class Progress(NamedTuple):
    """What a step does to one block; all three have an entry for each coordinate.

    Attributes:
        gains: By how much it lowers the new loss to first order: `s² / η`, or afterwards `-s g'`.
        stiffnesses: `η Λ`, with Λ the second derivatives of the penalty at strength 1.
        eigenvalues: Λ, in any unit.
    """

    gains: Tensor
    stiffnesses: Tensor
    eigenvalues: Tensor


class Plasticity:
    """Looks at steps to find the strength of the penalty that takes part in them.

    Attributes:
        wait: How many steps to let pass before the next look; negative if one is overdue.
        looks: How many steps were looked at.
        largest_strength: The limit that was found last; 1e20 before there was any.
    """

    def __init__(self) -> None:
        """Look at the first step."""
        self.wait = self.looks = 0
        self.largest_strength = NO_LIMIT
        self._gain, self._overlapping = 0.0, 0.0
        self._task = TaskProgress()

    def __copy__(self) -> Plasticity:
        """Return one that goes on from here by itself."""
        new = Plasticity.__new__(Plasticity)  # without sums to begin with, in every step
        vars(new).update(vars(self), _task=copy.copy(self._task))
        return new

    def is_due(self) -> bool:
        """Count a step, and return whether to look at it."""
        self.wait -= 1
        self._task.steps += 1
        return self.wait < 0

    def look(
        self,
        seen: Sequence[Progress],
        plasticity: float,
        start: float,
        *,
        later: bool = False,
        total: Total = list,
    ) -> float | None:
        """Return the strength that suits a step.

        Args:
            seen: What the step is about to do to every block.
            plasticity: The part of its progress that a task like the old ones is to keep.
            start: The current strength.
            later: Whether the step is of a later task than the one in which λ is found; the result
                is then an upper bound.
            total: Sums numbers over all processes, where each looks at blocks of its own.

        Returns:
            λ; None if the step goes nowhere, in which case the caller should try the next step.
        """
        endless = sum(not bool(torch.isfinite(part.sum())) for p in seen for part in p)
        if any(total([endless])):
            return None
        if not later:
            self._add(seen, total)
        share = _MORE_IN_LATER_TASKS if later else self.overlap**_POWER
        part = 1.0 - (1.0 - plasticity) * share
        progress = [(p.gains, p.stiffnesses) for p in seen]
        found = strength_keeping(part, progress, start, total)
        self.looks += found is not None
        return found

    def limit(
        self, done: Sequence[Progress], plasticity: float, total: Total = list
    ) -> float | None:
        """Return the largest strength that leaves enough of the task, as far as it has been seen.

        Args:
            done: What a step that was looked at has done to every block, with gains `-s g'`.
            plasticity: The part of its progress that a step like those of the old tasks is to keep.
            total: Sums numbers over all processes, where each looks at blocks of its own.

        Returns:
            λ; 1e20 where any strength leaves enough, or what was seen is mostly noise. None if the
            step has no progress, or no finite one.
        """
        nothing = by_size(torch.zeros(0), torch.zeros(0))
        own = sum((by_size(p.gains, p.stiffnesses) for p in done), nothing)
        progress = own.new_tensor(total(own.tolist()))
        if not bool(progress.any()) or not bool(progress.isfinite().all()):
            return None
        self._task.add(progress)
        part = 1.0 - _MORE_IN_A_WHOLE_TASK * (1.0 - plasticity)
        found = None
        if part > 0.0 and self._task.is_clear:
            found = strength_keeping(part, [self._task.gains_and_stiffnesses])
        self.largest_strength = found or NO_LIMIT
        return self.largest_strength

    @property
    def overlap(self) -> float:
        """The overlap c in the looks at this task; 1 before there was any."""
        return self._overlapping / self._gain if self._gain else 1.0

    def _add(self, seen: Sequence[Progress], total: Total) -> None:
        found = [_gain_and_met(one) for one in seen]
        gain, met = total([sum(gain for gain, _ in found), sum(met for _, met in found)])
        if gain > 0:
            self._gain += gain
            self._overlapping += min(gain, met)

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen of this task."""
        return {
            "wait": self.wait,
            "looks": (self.looks, self.largest_strength),
            "overlap": (self._gain, self._overlapping),
            **self._task.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Plasticity:
        """Go on from what `state_dict` returned.

        Raises:
            SnapshotError: If it is not that.
        """
        new = cls()
        try:
            new.wait = int(state["wait"])
            looks, limit = state["looks"]
            new.looks, new.largest_strength = int(looks), float(limit)
            new._gain, new._overlapping = map(float, state["overlap"])
            new._task = TaskProgress.from_state_dict(state)
            whole = 0 <= new._overlapping <= new._gain < math.inf
            whole &= new.looks >= 0 and 0.0 < new.largest_strength <= NO_LIMIT
        except (KeyError, OverflowError, RuntimeError, TypeError, ValueError):
            whole = False
        if not whole:
            raise SnapshotError(
                "the state of the handle has a damaged 'plasticity'; expected the value that the "
                "handle's state_dict() returned: load an unchanged copy"
            )
        return new


def _gain_and_met(progress: Progress) -> tuple[float, float]:
    """Return `Σ s² / η` of a block, and the same times `Λ / Λ̄`; zeros where Λ = 0."""
    largest = progress.eigenvalues.amax()
    if not bool(largest > 0):
        return 0.0, 0.0
    relative = progress.eigenvalues / largest
    own = relative.pow(1.5).sum() / relative.sqrt().sum()
    return float(progress.gains.sum()), float((progress.gains * relative).sum() / own)


def strength_keeping(
    part: float,
    progress: Sequence[tuple[Tensor, Tensor]],
    start: float = 1.0,
    total: Total = list,
) -> float | None:
    """Return the λ at which ρ(λ) has a value: Newton's method in log λ, bracketed.

    Args:
        part: ρ, between 0 and 1.
        progress: `s² / η` and `η Λ` of all protected coordinates, block by block.
        start: Where to begin.
        total: Sums numbers over all processes, where each has coordinates of its own.

    Returns:
        λ to about one part in a hundred, from 1e-20 to 1e20; None where the step makes no progress,
        or the penalty takes nothing of it however strong it is.
    """
    own = sum(float(gains[stiffnesses > 0].sum()) for gains, stiffnesses in progress)
    (held_back,) = total([own])
    if not 0 < held_back < math.inf:
        return None
    low, high = _SMALLEST, _LARGEST
    position = min(max(math.log(start), low), high)
    for _ in range(_MOST_ITERATIONS):
        kept, slope = _kept_part(progress, math.exp(position), total)
        low, high = (position, high) if kept > part else (low, position)
        following = position + (kept - part) / slope if slope > 0 else math.inf
        if not low < following < high:
            following = (low + high) / 2
        if abs(following - position) < _TOLERANCE:
            return math.exp(following)
        position = following
    return math.exp(position)


def _kept_part(
    progress: Sequence[tuple[Tensor, Tensor]], strength: float, total: Total
) -> tuple[float, float]:
    """Return ρ(λ), and by how much it falls with log λ; 1 and 0 where there is no progress.

    With `k = 1 / (1 + λ η Λ)` these are `Σ g k / Σ g` and `Σ g k (1 - k) / Σ g`.
    """
    whole = kept = slope = 0.0
    for gains, stiffnesses in progress:
        parts = (stiffnesses * strength).add_(1.0).reciprocal_()
        left = gains * parts
        whole += float(gains.sum())
        kept += float(left.sum())
        slope += float(left.sub_(left * parts).sum())
    whole, kept, slope = total([whole, kept, slope])
    return (kept / whole, slope / whole) if whole > 0 else (1.0, 0.0)
