"""Measure what the penalty adds to a training step: in the loss, or by its tangent plane.

Run ``python -m benchmarks.tangent_cost --help`` for the options.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import nn
from torch.optim import Adam

from benchmarks.contenders import CRITERION, network, penalties, random_batch
from benchmarks.option_types import several, whole_number
from benchmarks.rounds import median_ratio, time_in_rounds
from rotate_ewc import EKFACPenalty, TangentPenalty, step_sizes_of

DESCRIPTION = """\
Time a training step of Adam (a batch of 250 images of noise) without a penalty, with it in the
loss, and with its tangent plane, which is taken anew after every so many steps. All take turns.
Prints a table: milliseconds per step, medians over the rounds, and how much longer than the plain
step of the same round.
"""
EVERY = (5, 10, 20)
STEPS = 40  # a multiple of each
RATE = 1e-5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement.

    Args:
        arguments: Words of the command line; None for those of the process.

    Returns:
        The exit code, 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tangent_cost",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hidden", type=several(whole_number(1)), default=[100, 100], metavar="W")
    parser.add_argument("--rounds", type=whole_number(1), default=9, metavar="R")
    parser.add_argument("--threads", type=whole_number(1), default=1, metavar="N")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    times = time_in_rounds(_works(tuple(options.hidden)), rounds=options.rounds, repetitions=1)
    plain = times["plain"]
    for name, milliseconds in times.items():
        extra = 100 * (median_ratio(milliseconds, plain) - 1)
        print(f"{name:20s} {median(milliseconds) / STEPS:8.2f} ms  {extra:+6.0f} %")
    return 0


def _works(hidden: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """Everything that is timed; each has a model of its own."""
    model = network(hidden)
    penalty = penalties(model, "merged", {2})[2]
    works: dict[str, Callable[[], object]] = {
        "plain": _steps(copy.deepcopy(model), None, 0),
        "in the loss": _steps(copy.deepcopy(model), penalty, 0),
    }
    for every in EVERY:
        works[f"tangent, every {every}"] = _steps(copy.deepcopy(model), penalty, every)
    return works


def _steps(model: nn.Module, penalty: EKFACPenalty | None, every: int) -> Callable[[], object]:
    """Some training steps; ``every`` is 0 where the penalty, if any, is in the loss."""
    optimizer, (inputs, targets) = Adam(model.parameters(), lr=RATE), random_batch()
    tangent = TangentPenalty(penalty) if penalty is not None and every else None
    named = dict(model.named_parameters())

    def steps() -> None:
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            loss = CRITERION(model(inputs), targets)
            if penalty is not None and tangent is None:
                loss = loss + penalty(model)
            loss.backward()
            if tangent is not None:
                tangent.add_gradient_(model)
            optimizer.step()
            if tangent is not None and step % every == 0:
                tangent.refresh_(model, step_sizes_of(optimizer, named, every * RATE))

    return steps


if __name__ == "__main__":
    sys.exit(main())
