"""Training steps: plain, with the penalty in the loss, and by the cheaper ways to obey it."""

import copy
from collections.abc import Callable

from torch import Tensor
from torch.optim import Adam

from benchmarks.speed.cases import Problem
from benchmarks.speed.penalty.names import PROXIMAL_EVERY, TANGENT_EVERY
from rotate_ewc import EKFACPenalty, RotatedAdam, TangentPenalty, step_sizes_of
from rotate_ewc.penalty.step_size import StepSizes

Work = Callable[[], object]

# So small that thousands of steps leave the network what it is: one that has learned the batch by
# heart has vanishing gradients, and processors take longer for numbers that are almost zero.
LEARNING_RATE = 1e-6


class Training:
    """A copy of a model, its optimizer and a batch.

    Attributes:
        model: The copy.
        optimizer: Adam.
    """

    def __init__(self, problem: Problem) -> None:
        """Copy a problem's model.

        Args:
            problem: The model and the batch to step on.
        """
        self.model = copy.deepcopy(problem.model)
        self.optimizer = Adam(self.model.parameters(), lr=LEARNING_RATE)
        self._criterion = problem.criterion
        self._inputs, self._targets = problem.batches[0]

    def loss(self) -> Tensor:
        """The loss of the batch."""
        value: Tensor = self._criterion(self.model(self._inputs), self._targets)
        return value

    def step(self, penalty: EKFACPenalty | None = None) -> None:
        """Take a whole step, with a penalty in the loss if there is one."""
        self.optimizer.zero_grad()
        loss = self.loss()
        if penalty is not None:
            loss = loss + penalty(self.model)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def sizes(self, steps: int) -> StepSizes:
        """What Adam makes of a gradient of one in so many steps."""
        return step_sizes_of(self.optimizer, self.model, steps * LEARNING_RATE)


def plain_step(problem: Problem, penalty: EKFACPenalty | None = None) -> Work:
    """A step of Adam, with a penalty in the loss if there is one."""
    training = Training(problem)
    return lambda: training.step(penalty)


def proximal_steps(problem: Problem, penalty: EKFACPenalty) -> Work:
    """Some steps, with a proximal step after the last."""
    training = Training(problem)

    def work() -> None:
        for _ in range(PROXIMAL_EVERY):
            training.step()
        penalty.proximal_step_(training.model, training.sizes(PROXIMAL_EVERY))

    return work


def tangent_steps(problem: Problem, penalty: EKFACPenalty) -> Work:
    """Some steps with the tangent plane's gradient, which is refreshed after the last."""
    training, tangent = Training(problem), TangentPenalty(penalty)

    def work() -> None:
        for _ in range(TANGENT_EVERY):
            training.optimizer.zero_grad()
            training.loss().backward()  # type: ignore[no-untyped-call]
            tangent.add_gradient_(training.model)
            training.optimizer.step()
        tangent.refresh_(training.model, training.sizes(TANGENT_EVERY))

    return work


def rotated_step(problem: Problem, penalty: EKFACPenalty) -> Work:
    """A step of the optimizer that obeys the penalty itself."""
    training = Training(problem)
    optimizer = RotatedAdam(training.model, penalty, lr=LEARNING_RATE)

    def work() -> None:
        optimizer.zero_grad()
        training.loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return work
