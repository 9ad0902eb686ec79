"""What can be measured, by name: known before anything heavy is imported."""

from typing import NamedTuple

MC, TYPE2 = "mc", "type2"
FISHERS = (MC, TYPE2)

MACHINE = "machine"
OURS = "rotate-ewc"
LEAN = "rotate-ewc (64 MiB budget)"
EVERYTHING = "rotate-ewc (all parameters)"
PLAIN = "plain pass"
CURVLINOPS = "curvlinops"
NNGEOMETRY = "nngeometry"
KRONFLUENCE = "kronfluence"
LAPLACE = "laplace-torch"
AVALANCHE = "avalanche"
CONTENDERS = (
    OURS,
    LEAN,
    EVERYTHING,
    CURVLINOPS,
    NNGEOMETRY,
    KRONFLUENCE,
    LAPLACE,
    AVALANCHE,
    PLAIN,
)


class Combination(NamedTuple):
    """A case with a Fisher type.

    Attributes:
        case: One of :data:`CASES`.
        fisher: One of :data:`FISHERS`.
    """

    case: str
    fisher: str


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

# The exact Fisher matrix of token-level cross-entropy takes as many backward passes as there are
# pairs of a token and a class, here 128 × 64.
DEFAULT_COMBINATIONS = tuple(
    Combination(case, fisher)
    for case in CASES
    for fisher in FISHERS
    if (case, fisher) != (TRANSFORMER, TYPE2)
)


def combinations(
    cases: tuple[str, ...] | None, fishers: tuple[str, ...] | None
) -> list[Combination]:
    """Choose what is measured.

    Args:
        cases: The cases; None for all.
        fishers: The Fisher types; None for those that each case has by default.

    Returns:
        Combinations, case by case.
    """
    chosen = cases or tuple(CASES)
    if fishers is None:
        return [one for one in DEFAULT_COMBINATIONS if one.case in chosen]
    return [Combination(case, fisher) for case in chosen for fisher in fishers]


def contenders_of(combination: Combination, chosen: tuple[str, ...] | None) -> list[str]:
    """Choose who takes part.

    Args:
        combination: What is measured.
        chosen: Names given by hand; None for all but kronfluence, which takes most of an hour for
            what others do in seconds.

    Returns:
        Names, without those that would do the same as another in this case.
    """
    names = chosen or tuple(name for name in CONTENDERS if name != KRONFLUENCE)
    more = combination.case in WITH_MORE_PARAMETERS
    return [name for name in names if more or name != EVERYTHING]
