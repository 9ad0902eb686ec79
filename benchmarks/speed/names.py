"""Cases and contenders by name: known before anything heavy is imported."""

from typing import NamedTuple

MC, TYPE2 = "mc", "type2"
FISHERS = (MC, TYPE2)

# --------------------------------------------------------------------------- estimation

OURS = "rotate-ewc"
LEAN = "rotate-ewc (64 MiB budget)"
EVERYTHING = "rotate-ewc (all parameters)"
CURVLINOPS = "curvlinops"
NNGEOMETRY = "nngeometry"
KRONFLUENCE = "kronfluence"
LAPLACE = "laplace-torch"
AVALANCHE = "avalanche"
PLAIN = "plain pass"
CONTENDERS = (
    *(OURS, LEAN, EVERYTHING),
    *(CURVLINOPS, NNGEOMETRY, KRONFLUENCE, LAPLACE, AVALANCHE),
    PLAIN,
)

SMALL_MLP, LARGE_MLP, CNN = "a", "b", "c"
GROUP_NORM, BATCH_NORM = "d-groupnorm", "d-batchnorm"
TRANSFORMER = "e"
CASES = {
    SMALL_MLP: "MLP 784-400-400-10",
    LARGE_MLP: "MLP 784-1000-1000-10",
    CNN: "CNN with four convolutions",
    GROUP_NORM: "ResNet with GroupNorm",
    BATCH_NORM: "ResNet with frozen BatchNorm",
    TRANSFORMER: "Transformer of four blocks",
}
# These have parameters that not all contenders know.
WITH_MORE_PARAMETERS = (GROUP_NORM, BATCH_NORM, TRANSFORMER)


class Combination(NamedTuple):
    """A case with a Fisher type."""

    case: str  # one of :data:`CASES`
    fisher: str  # one of :data:`FISHERS`


def combinations(cases: tuple[str, ...], fishers: tuple[str, ...] | None) -> list[Combination]:
    """Choose what is measured; None for the Fisher types that each case has by default."""
    if fishers is not None:
        return [Combination(case, fisher) for case in cases for fisher in fishers]
    # The exact Fisher matrix of token-level cross-entropy takes as many backward passes as there
    # are pairs of a token and a class, here 128 × 64.
    too_many = Combination(TRANSFORMER, TYPE2)
    return [one for one in combinations(cases, FISHERS) if one != too_many]


def contenders_of(case: str, chosen: tuple[str, ...]) -> list[str]:
    """Leave out those who would do the same as another in a case."""
    more = case in WITH_MORE_PARAMETERS
    return [name for name in chosen if more or name != EVERYTHING]


# --------------------------------------------------------------------------- training steps

TINY_MLP = "small"
STEP_CASES = {
    TINY_MLP: "MLP 784-100-100-10",
    **{case: CASES[case] for case in (SMALL_MLP, CNN, TRANSFORMER)},
}
PERCEPTRONS = (TINY_MLP, SMALL_MLP)
WITH_SEPARATE = (TINY_MLP, SMALL_MLP, CNN)
PEERS = (NNGEOMETRY, CURVLINOPS)

# After how many steps of the optimizer an implicit step on the penalty is taken. A tangent plane is
# as good as the penalty in the loss with more of them than a proximal step (docs/results.md).
TANGENT_EVERY = 20
PROXIMAL_EVERY = 10

STEP = "step"
KNOWN = "penalty of known layers, 1 task"
TANGENT = f"step with tangent, k={TANGENT_EVERY}"
PROXIMAL = f"step, and a proximal one every {PROXIMAL_EVERY}th"
ROTATED = "RotatedAdam step"


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
    return KNOWN if case in WITH_MORE_PARAMETERS else penalty_after(1)
