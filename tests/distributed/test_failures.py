"""What fails in one process fails in all, soon, and leaves everything usable."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rotate_ewc import EKFACPenalty, NotFiniteError
from rotate_ewc.distributed.processes import Ranks
from rotate_ewc.linalg import eigh
from tests.helpers.model_state import ModelState
from tests.helpers.penalties import CE, Batches, make, task
from tests.helpers.processes import distributed_test, end_this_process, gather, here

FAILING = 1
MOST_SECONDS = 10.0


class Data:
    """Batches, of which in one process some is an error."""

    def __init__(self, batches: Batches, fails_at: int, error: BaseException | None) -> None:
        self.batches, self.left, self.error = batches, fails_at, error

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            if self.left == 0 and self.error is not None and dist.get_rank() == FAILING:
                raise self.error
            self.left -= 1
            yield batch


class Slow(nn.Module):
    """A model that takes its time in the processes that do not fail."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.inner, self.seconds = make("plain"), seconds

    def forward(self, x: Tensor) -> Tensor:
        if dist.get_rank() != FAILING:
            time.sleep(self.seconds)
        outputs: Tensor = self.inner(x)
        return outputs


@contextlib.contextmanager
def fails_everywhere(
    model: nn.Module, penalty: EKFACPenalty, own: Any, elsewhere: Any, match: str
) -> Iterator[None]:
    """All processes raise within seconds; nothing has changed, and all goes on afterwards."""
    before, state = ModelState.of(model), penalty.state_dict()
    start = time.monotonic()
    expected = own if dist.get_rank() == FAILING else elsewhere
    with pytest.raises(expected, match=match if dist.get_rank() != FAILING else None):
        yield
    assert time.monotonic() - start < MOST_SECONDS
    before.assert_unchanged(model)
    assert penalty.state_dict().keys() == state.keys()
    assert all(map(torch.equal, penalty.state_dict().values(), state.values()))
    number = torch.ones(1)
    dist.all_reduce(here(number))
    penalty.consolidate(model, CE, here(task("plain", 2)))
    # The same call, with the same result in all processes.
    values = gather([t.cpu() for t in penalty.state_dict().values()])
    assert all(map(torch.equal, values[0], values[-1]))


@distributed_test((2,))
def test_data_that_fail_in_any_pass() -> None:
    """Batches are looked at for the temperature, the factors, the eigenvalues, in this order."""
    model, penalty = here(make("plain")), EKFACPenalty(1.0, memory_budget=1)
    for number in (0, 3, 5):
        for error, elsewhere, told in (
            (ValueError("no such file"), ValueError, "on rank 1: no such file"),
            (KeyboardInterrupt(), RuntimeError, "rank 1 has failed with KeyboardInterrupt"),
        ):
            data = Data(here(task("plain", 0)), number, error)
            with fails_everywhere(model, penalty, type(error), elsewhere, told):
                penalty.consolidate(model, CE, data)


@distributed_test((2,))
def test_arguments_and_batches_that_are_wrong_in_one_process() -> None:
    model, penalty = here(make("plain")), EKFACPenalty(1.0)
    good = here(task("plain", 0))
    bad = [(torch.full_like(x, float("nan")), y) for x, y in good]
    wrong = dist.get_rank() == FAILING
    with fails_everywhere(model, penalty, NotFiniteError, NotFiniteError, "on rank 1: batch 0"):
        penalty.consolidate(model, CE, bad if wrong else good)
    with fails_everywhere(model, penalty, TypeError, TypeError, "on rank 1: data is int"):
        penalty.consolidate(model, CE, 3 if wrong else good)
    with fails_everywhere(model, penalty, ValueError, ValueError, "on rank 1: weight is"):
        penalty.consolidate(model, CE, good, weight=-1.0 if wrong else 1.0)
    loss = nn.CrossEntropyLoss(reduction="sum") if wrong else CE
    told = r"loss_func is \('CrossEntropyLoss', 'mean'\) on rank 0, but .* on rank 1"
    with fails_everywhere(model, penalty, ValueError, ValueError, told):
        penalty.consolidate(model, loss, good)
    with fails_everywhere(model, penalty, ValueError, ValueError, "data is empty on all ranks"):
        penalty.consolidate(model, CE, [])


@distributed_test((2,))
def test_plans_that_differ() -> None:
    """A weight that is a layer's in one process, and a scale in the other."""

    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            if dist.get_rank() == FAILING:
                return (x[:, None] * self.weight).sum(dim=1)
            return nn.functional.linear(x, self.weight)

    model, penalty = here(Either()), EKFACPenalty(1.0)
    data = here([(torch.ones(4, 3, dtype=torch.float64), torch.zeros(4).long())])
    for _ in range(2):
        with pytest.raises(ValueError, match="'weight' was used in different ways on rank 0 and"):
            penalty.consolidate(model, CE, data)
    weights = here(make("plain", seed=dist.get_rank()))
    with pytest.raises(ValueError, match=r"parameters '0.weight'.* not the same on rank 1"):
        penalty.consolidate(weights, CE, here(task("plain", 0)))


@distributed_test((2,))
def test_decompositions() -> None:
    """Each factor is decomposed in one process, once; what fails there fails everywhere."""
    model, penalty = here(make("plain")), EKFACPenalty(1.0, fisher_type="type2")
    labels: list[str] = []
    real = eigh.decomposed

    def noting(covariance: Tensor, label: str) -> tuple[Tensor, str]:
        labels.append(label)
        return real(covariance, label)

    with mock.patch.object(eigh, "decomposed", noting):
        penalty.consolidate(model, CE, here(task("plain", 0, 40)))
        once = sorted(label for rank in gather(labels) for label in rank)
        # The bias of a layer has the gradient factor of its weight.
        assert once == sorted(
            f"{side} factor of '{layer}.weight'"
            for side in ("gradient", "activation")
            for layer in (0, 2)
        )
        labels.clear()
        penalty.consolidate(model, CE, here(task("plain", 1, 40)))
        found = [label for rank in gather(labels) for label in rank]
        assert len(set(found)) == len(found)
        assert sum("merged" in label for label in found) == 6

    def failing(*_: object, **__: object) -> Any:
        raise torch.linalg.LinAlgError("no")

    eigh_of_rank = failing if dist.get_rank() == FAILING else torch.linalg.eigh
    told = "on rank 1: eigh of the .* factor"
    with fails_everywhere(model, penalty, ValueError, ValueError, told):
        with_failure = mock.patch.object(torch.linalg, "eigh", eigh_of_rank)
        with with_failure:
            penalty.consolidate(model, CE, here(task("plain", 1, 40)))


@distributed_test((2,))
def test_others_do_not_work_on_for_nothing() -> None:
    """One fails at once; the other, with a minute of work before it, hears of it."""
    model, penalty = here(Slow(0.2)), EKFACPenalty(1.0, temperature=1.0)
    data = here(task("plain", 0)) * 150
    start = time.monotonic()
    own = Data(data, 0, OSError("no disk"))
    with pytest.raises((OSError, RuntimeError), match="no disk"):
        penalty.consolidate(model, CE, own)
    assert time.monotonic() - start < MOST_SECONDS


@distributed_test((2,), seconds=40, killed=[FAILING])
def test_a_process_that_is_killed() -> None:
    """The others end with an error."""
    model, penalty = here(make("plain")), EKFACPenalty(1.0, memory_budget=1)
    batches = here(task("plain", 0))

    def data() -> Iterator[tuple[Tensor, Tensor]]:
        yield batches[0]
        if dist.get_rank() == FAILING:
            end_this_process()
        yield batches[1]

    class Batches(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            return data()

    start = time.monotonic()
    with pytest.raises(RuntimeError):
        penalty.consolidate(model, CE, Batches())
    assert time.monotonic() - start < 2 * MOST_SECONDS
    assert penalty.num_tasks == 0


@distributed_test((2,))
def test_calls_in_different_order() -> None:
    """Are told of, instead of adding up what does not belong together."""
    ranks = Ranks.of("auto")
    places = ["here", "there"]
    told = "rank 0 at 'here', rank 1 at 'there'"
    with pytest.raises(RuntimeError, match=told), ranks.together():
        ranks.sum(places[dist.get_rank()], [here(torch.ones(2))])
