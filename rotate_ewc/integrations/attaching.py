"""What callbacks of several frameworks have in common: one penalty, attached while they train."""

from __future__ import annotations

from typing import Final
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer

from rotate_ewc._utils.validation import check_boolean, check_positive_integer
from rotate_ewc.distributed.processes import Group, Ranks
from rotate_ewc.penalty.attachable import unwrapped_optimizer
from rotate_ewc.penalty.attachment import Attachment, View
from rotate_ewc.penalty.penalty import EKFACPenalty
from rotate_ewc.penalty.updates import UpdateKind

# Whose penalty takes part in the steps of an optimizer.
_ATTACHED: Final[WeakKeyDictionary[Optimizer, AttachesPenalty]] = WeakKeyDictionary()


class AttachesPenalty:
    """A penalty, the options for attaching it, and its handle while it is attached.

    Attributes:
        penalty: The penalty.
        attachment: The handle of the penalty in the optimizer's steps; None unless training runs.
        consolidation_seconds: How long the last consolidation took.
    """

    def _take(
        self,
        penalty: EKFACPenalty,
        *,
        consolidate_at_end: bool,
        update: UpdateKind | str,
        every: int,
        view: View | None,
        group: Group,
    ) -> None:
        """Check the arguments that all callbacks have, and keep them.

        Raises:
            TypeError: If `penalty` is not one penalty, or another argument has the wrong type.
            ValueError: If an argument is out of range.
        """
        if not isinstance(penalty, EKFACPenalty):
            raise TypeError(
                f"penalty is {type(penalty).__name__}; expected one EKFACPenalty (which holds any "
                f"number of tasks)"
            )
        if penalty.sharded:
            raise ValueError(
                "penalty has sharded=True, but a callback saves it in one process alone; expected "
                "sharded=False, or a training loop of your own"
            )
        check_boolean("consolidate_at_end", consolidate_at_end)
        check_positive_integer("every", every)
        if view is not None and consolidate_at_end:
            raise ValueError(
                "view is given, and consolidate_at_end is True; expected "
                "consolidate_at_end=False: merge the adapters, and consolidate the model then"
            )
        Ranks.of(group)  # what is no group is refused at once
        self.penalty = penalty
        self.consolidate_at_end = consolidate_at_end
        self.update = update
        self.every = every
        self.view = view
        self.group = group
        self.attachment: Attachment[EKFACPenalty] | None = None
        self.consolidation_seconds: float | None = None

    def _attach(self, optimizer: Optimizer, model: nn.Module) -> Attachment[EKFACPenalty]:
        """Attach the penalty to an optimizer, and return the handle.

        Raises:
            ValueError: If it takes part in no steps of this optimizer, or another callback does.
        """
        own = unwrapped_optimizer(optimizer)
        other = _ATTACHED.get(own)
        if other is not None and other is not self and other.attachment is not None:
            # Training does not begin, so that nobody would detach it.
            other._detach()
            raise ValueError(
                f"two {type(self).__name__}s are given for one optimizer, which takes one penalty; "
                f"expected one callback, with one EKFACPenalty for all tasks"
            )
        attachment = self.penalty.attach(own, model, self.update, self.every, view=self.view)
        self.attachment = attachment
        _ATTACHED[own] = self
        return attachment

    def _detach(self) -> None:
        attached, self.attachment = self.attachment, None
        if attached is not None:
            attached.detach()

    def _flush(self) -> None:
        if self.attachment is not None:
            self.attachment.flush()
