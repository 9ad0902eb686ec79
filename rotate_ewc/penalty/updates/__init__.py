"""What an attached penalty does before and after each step of an optimizer, a file for each update.

In come the parameters that are about to be stepped, with their gradients and options (`Step`); an
update changes what the optimizer sees before its step, and what has become of it afterwards.
"""

from __future__ import annotations

from rotate_ewc.options import Choice
from rotate_ewc.penalty.consolidated import ConsolidatedTasks
from rotate_ewc.penalty.step_rules import StepRule
from rotate_ewc.penalty.updates.base import Update
from rotate_ewc.penalty.updates.gradient import GradientUpdate
from rotate_ewc.penalty.updates.proximal import ProximalUpdate
from rotate_ewc.penalty.updates.rotated import RotatedUpdate
from rotate_ewc.penalty.updates.tangent import TangentUpdate


class UpdateKind(Choice):
    """How an attached penalty acts on the steps of an optimizer.

    `ROTATED` has the optimizer step in the eigenbasis and then takes the exact proximal step;
    `TANGENT` adds a constant gradient, which is renewed every few steps, at little cost; `GRADIENT`
    adds the penalty's gradient, for optimizers without a known step size.
    """

    ROTATED = "rotated"
    TANGENT = "tangent"
    GRADIENT = "gradient"


def make_update(
    kind: UpdateKind, penalty: ConsolidatedTasks, rule: StepRule | None, every: int
) -> Update:
    """Return an update for optimizers with a rule; `GRADIENT` needs none."""
    if rule is None or kind is UpdateKind.GRADIENT:
        return GradientUpdate(penalty)
    if kind is UpdateKind.TANGENT:
        return TangentUpdate(penalty, rule, every)
    return RotatedUpdate(penalty, rule) if rule.rotated else ProximalUpdate(penalty, rule, every)
