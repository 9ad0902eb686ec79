"""Learning rates that change during a task."""

from types import SimpleNamespace

import pytest

from benchmarks.schedule import Schedule


@pytest.mark.parametrize(
    ("decays", "warm_up", "expected"),
    [
        (True, 0.0, [1.0, 0.75, 0.5, 0.25]),
        (False, 0.5, [0.0, 0.5, 1.0, 1.0]),
        (True, 0.5, [0.0, 0.375, 0.5, 0.25]),
    ],
)
def test_rates_of_every_task(decays: bool, warm_up: float, expected: list[float]) -> None:
    """Four steps a task: two epochs of two batches, the last of which is not full."""
    group = {"lr": 0.1}
    strategy = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=[group]),
        experience=SimpleNamespace(dataset=range(7)),
        train_mb_size=4,
        train_epochs=2,
    )
    schedule = Schedule(decays=decays, warm_up=warm_up)
    for _ in range(2):
        schedule.before_training_exp(strategy)
        rates = []
        for _ in range(4):
            schedule.before_training_iteration(strategy)
            rates.append(group["lr"] / 0.1)
        assert rates == pytest.approx(expected)
