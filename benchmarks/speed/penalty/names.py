"""What is measured, by name: known before anything heavy is imported."""

from benchmarks.speed import names as speed

SMALL = "small"
CASES = {
    SMALL: "MLP 784-100-100-10",
    **{case: speed.CASES[case] for case in (speed.SMALL_MLP, speed.CNN, speed.TRANSFORMER)},
}
PERCEPTRONS = (SMALL, speed.SMALL_MLP)
WITH_SEPARATE = (SMALL, speed.SMALL_MLP, speed.CNN)

# After how many steps of the optimizer an implicit step on the penalty is taken. A tangent plane is
# as good as the penalty in the loss with more of them than a proximal step (docs/results.md).
TANGENT_EVERY = 20
PROXIMAL_EVERY = 10

STEP = "step"
KNOWN = "penalty of known layers, 1 task"
TANGENT = f"step with tangent, k={TANGENT_EVERY}"
PROXIMAL = f"step, and a proximal one every {PROXIMAL_EVERY}th"
ROTATED = "RotatedAdam step"
CALLS = {TANGENT: TANGENT_EVERY, PROXIMAL: PROXIMAL_EVERY}
PEERS = (speed.NNGEOMETRY, speed.CURVLINOPS)


def tasks_phrase(tasks: int) -> str:
    """Say how many tasks."""
    return f"{tasks} task{'s' * (tasks > 1)}"


def penalty_after(tasks: int) -> str:
    """Value and gradient of the merged penalty."""
    return f"penalty, {tasks_phrase(tasks)}"


def step_after(tasks: int) -> str:
    """A training step with the merged penalty in the loss."""
    return f"step with penalty, {tasks_phrase(tasks)}"


def separate(tasks: int) -> str:
    """Value and gradient of the penalty that keeps tasks separate."""
    return f"separate penalty, {tasks_phrase(tasks)}"


def one_by_one(tasks: int) -> str:
    """Value and gradient of the sum of as many penalties of one task each."""
    return f"{tasks} penalties one by one"


def ours_beside_peers(case: str) -> str:
    """The contender that protects the same parameters as the peers do."""
    return KNOWN if case in speed.WITH_MORE_PARAMETERS else penalty_after(1)


def is_step(contender: str) -> bool:
    """Whether a contender is a whole training step, rather than a penalty alone."""
    return "step" in contender
