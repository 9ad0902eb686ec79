"""Cases and contenders by name: known before anything heavy is imported."""

MC, TYPE2 = "mc", "type2"
FISHERS = (MC, TYPE2)

# --------------------------------------------------------------------------- estimation

OURS = "rotate-ewc"
LEAN, EVERYTHING = f"{OURS} (64 MiB budget)", f"{OURS} (all parameters)"
THIN_RANK = 64
DEFAULT_RANK, THIN = f"{OURS} (default rank)", f"{OURS} (rank {THIN_RANK})"
CURVLINOPS, NNGEOMETRY = "curvlinops", "nngeometry"
LAPLACE, AVALANCHE, PLAIN = "laplace-torch", "avalanche", "plain pass"
PEERS = (NNGEOMETRY, CURVLINOPS)  # those with a quadratic form
CONTENDERS = (
    *(OURS, LEAN, DEFAULT_RANK, THIN, EVERYTHING),
    *(CURVLINOPS, NNGEOMETRY, LAPLACE, AVALANCHE),
    PLAIN,
)

SMALL_MLP, LARGE_MLP, CNN = "a", "b", "c"
GROUP_NORM, BATCH_NORM = "d-groupnorm", "d-batchnorm"
TRANSFORMER, LANGUAGE_MODEL = "e", "f"
CASES = {
    SMALL_MLP: "MLP 784-400-400-10",
    LARGE_MLP: "MLP 784-1000-1000-10",
    CNN: "CNN with four convolutions",
    GROUP_NORM: "ResNet with GroupNorm",
    BATCH_NORM: "ResNet with frozen BatchNorm",
    TRANSFORMER: "Transformer of four blocks",
    LANGUAGE_MODEL: "GPT-2 small, four blocks",
}
# These have parameters that not all contenders know.
WITH_MORE_PARAMETERS = (GROUP_NORM, BATCH_NORM, TRANSFORMER, LANGUAGE_MODEL)


Combination = tuple[str, str]  # a case and a Fisher type


def combinations(cases: tuple[str, ...], fishers: tuple[str, ...] | None) -> list[Combination]:
    """Choose what is measured; None for the Fisher types that each case has by default."""
    if fishers is not None:
        return [(case, fisher) for case in cases for fisher in fishers]
    # The exact Fisher matrix of token-level cross-entropy takes as many backward passes as there
    # are pairs of a token and a class, here 128 × 64 and 128 × 50,257.
    too_many = [(case, TYPE2) for case in (TRANSFORMER, LANGUAGE_MODEL)]
    return [one for one in combinations(cases, FISHERS) if one not in too_many]


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
WITH_SEPARATE = (TINY_MLP, SMALL_MLP, CNN)

# After how many steps of the optimizer a tangent plane is renewed.
TANGENT_EVERY = 20

STEP = "step"
ATTACHED = "step, attached"
# In the one task in which the strength is found; the other steps are with a number.
FINDING = "step, attached, finding λ"
TANGENT = f"step, attached, tangent, k={TANGENT_EVERY}"
GRADIENT = "step, attached, gradient"
# At most so many plain steps is an attached one to take.
TARGETS = {SMALL_MLP: 4.0, CNN: 1.15, TRANSFORMER: 1.4}
# To be completed by a number of tasks.
PENALTY, SEPARATE, STEP_WITH_PENALTY = "penalty", "separate penalty", "step with penalty"


def after(quantity: str, tasks: int) -> str:
    """A quantity after so many tasks."""
    return f"{quantity}, {tasks} task{'s' * (tasks > 1)}"


def ours_beside_peers(case: str) -> str:
    """The contender that protects the same parameters as the peers do."""
    known = "penalty of known layers" if case in WITH_MORE_PARAMETERS else PENALTY
    return after(known, 1)
