"""What a whole task has gained so far, from a few of its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

# Progress is summed up by stiffness in bins of an eighth of a decade: in finer ones, what is noise
# would less often cancel.
_BINS_PER_DECADE: Final = 8
_LOWEST_DECADE, _HIGHEST_DECADE = -40, 20
_BINS: Final = (_HIGHEST_DECADE - _LOWEST_DECADE) * _BINS_PER_DECADE + 1
# How much of what is positive must be left after what is negative. In all streams of the benchmarks
# but one it is 0.97 or more; in that one (a convolutional network in small batches) below zero.
_CLEAR: Final = 0.5


class TaskProgress:
    """The progress of a task by stiffness, and how many steps at its highest speed that takes.

    Attributes:
        steps: How many steps there were.
    """

    def __init__(self) -> None:
        """Begin with a task of which nothing was seen."""
        self.steps = self._seen_until = 0
        # `[bins]`: that of the task so far, and that of the step that was seen last.
        self._whole, self._last = torch.zeros(2, _BINS, dtype=torch.float64)
        self._distance, self._top_speed = 0.0, 0.0

    def add(self, progress: Tensor) -> None:
        """Take in the progress of the latest step; between two such it is taken to change evenly.

        Args:
            progress: As `by_size` sums it up by stiffness, over all coordinates.
        """
        before = self._last if self._seen_until else progress
        steps, self._seen_until, self._last = self.steps - self._seen_until, self.steps, progress
        self._whole = self._whole + steps * (before + progress) / 2
        # Distances are as the square roots of progress.
        speeds = [math.sqrt(max(float(of_a_step.sum()), 0.0)) for of_a_step in (before, progress)]
        self._distance += steps * sum(speeds) / 2
        self._top_speed = max(self._top_speed, *speeds)

    @property
    def num_steps(self) -> float:
        """How many steps at its highest speed the task takes, as far as it has been seen."""
        return self._distance / self._top_speed if self._top_speed else 0.0

    @property
    def is_clear(self) -> bool:
        """Whether most of the progress is progress: noise has two signs, bin by bin."""
        return float(self._whole.sum()) > _CLEAR * float(self._whole.clamp(min=0.0).sum())

    @property
    def gains_and_stiffnesses(self) -> tuple[Tensor, Tensor]:
        """The progress, and the stiffness at which it was made times `num_steps`; both `[bins]`.

        What is negative was noise, or went to and fro, and counts for nothing.
        """
        places = torch.arange(_BINS, dtype=torch.float64)
        centers = 10.0 ** (_LOWEST_DECADE + (places - 0.5) / _BINS_PER_DECADE)
        centers[0] = 0.0
        return self._whole.clamp(min=0.0), self.num_steps * centers

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen."""
        return {
            "steps": (self._seen_until, self.steps),
            "way": (self._top_speed, self._distance),
            "progress": torch.stack([self._whole, self._last]),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> TaskProgress:
        """Go on from what `state_dict` returned.

        Raises:
            KeyError, OverflowError, RuntimeError, TypeError, ValueError: If it is not that.
        """
        new = cls()
        new._seen_until, new.steps = map(int, state["steps"])
        new._top_speed, new._distance = map(float, state["way"])
        progress = torch.as_tensor(state["progress"], dtype=torch.float64, device="cpu")
        new._whole, new._last = progress.clone().view(2, _BINS)
        if not (
            0 <= new._seen_until <= new.steps
            and 0 <= new._top_speed < math.inf
            and 0 <= new._distance < math.inf
            and bool(progress.isfinite().all())
        ):
            raise ValueError("progress is no sum over the steps of a task")
        return new


def by_size(gains: Tensor, sizes: Tensor) -> Tensor:
    """Return sums of gains, `[bins]`, by the sizes of something else; the first is of zeros."""
    places = (sizes.float().log10() - _LOWEST_DECADE).mul_(_BINS_PER_DECADE).ceil_()
    places = places.nan_to_num_(0.0, neginf=0.0).clamp_(0, _BINS - 1).long().flatten()
    gains = gains.flatten()
    sums = torch.zeros(_BINS, dtype=torch.float64)
    if gains.device.type == "cpu":
        return sums.index_add_(0, places, gains.double())
    # Elsewhere the order of such a sum is not the same each time, and the bits are not.
    exact = torch.float32 if gains.device.type == "mps" else torch.float64
    found = torch.unique(places)
    parts = [(gains * (places == place)).sum(dtype=exact) for place in found.tolist()]
    return sums.index_copy_(0, found.cpu(), torch.stack(parts).cpu().double())
