"""The models and batches of training steps."""

from dataclasses import replace

from benchmarks.speed import names as speed
from benchmarks.speed.cases import CASES as ESTIMATED
from benchmarks.speed.cases import Case, Problem, build_case
from benchmarks.speed.networks import CLASSES, perceptron
from benchmarks.speed.penalty import names

BATCH = 250
FEATURES = 784
# Steps of networks with many products are long enough to need few of them.
REPETITIONS = {names.SMALL: 20, speed.SMALL_MLP: 20}
FEW_REPETITIONS = 3


def _case(name: str) -> Case:
    """What a problem is made from; a single batch is enough to step on."""
    if name == names.SMALL:
        return Case(lambda: perceptron(FEATURES, 100, 100, CLASSES), (FEATURES,), BATCH, BATCH)
    found = ESTIMATED[name]
    batch = min(BATCH, found.batch)
    return replace(found, examples=batch, batch=batch)


def build(name: str, *, quick: bool = False) -> Problem:
    """Make a problem with one batch, the same whenever it is called.

    Args:
        name: One of the cases.
        quick: Whether to take only a few examples.

    Returns:
        The problem, its model in training mode.
    """
    problem = build_case(_case(name), quick=quick)
    problem.model.train()
    return problem


def repetitions(name: str, *, quick: bool = False) -> int:
    """How often a contender is called in its turn."""
    return 1 if quick else REPETITIONS.get(name, FEW_REPETITIONS)
