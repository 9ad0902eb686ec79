"""A consolidation that fails leaves no trace, wherever it fails, and can be done again."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rotate_ewc
from rotate_ewc import EKFACLinearOperator, merge
from rotate_ewc.errors import NotFiniteError
from rotate_ewc.linalg import eigh, kronecker
from tests.helpers.exact import exact_penalty
from tests.helpers.penalties import CE
from tests.helpers.worlds import (
    NUM_BATCHES,
    TWO_PASSES,
    FailingLoader,
    World,
    failing,
    same,
    task,
    world,
)

PACKAGE = rotate_ewc.__file__.removesuffix("__init__.py")
MODES = ["merged", "separate"]


class OwnError(ValueError):
    """An error that cannot be made from a message alone."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)


ERRORS = [
    ValueError("bad row"),
    TypeError("bad type"),
    RuntimeError("worker died"),
    OSError(5, "disk"),
    OwnError(1, "theirs"),
    MemoryError(),
    KeyboardInterrupt(),
]


def fails(made: World, error: BaseException, **arguments: Any) -> BaseException:
    """Consolidate, check that an error of that very type comes out, and that nothing changed."""
    before = made.state()
    with pytest.raises(type(error)) as caught:
        made.consolidate(**arguments)
    assert type(caught.value) is type(error)
    made.assert_unchanged(before)
    return caught.value


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", range(2 * NUM_BATCHES))
def test_a_loader_that_fails(mode: str, batch: int) -> None:
    """In the first pass or the second, with whatever error: it comes out as it was raised."""
    made = world(mode, TWO_PASSES)
    for error in ERRORS[batch % NUM_BATCHES :: NUM_BATCHES]:  # each in either pass
        assert fails(made, error, data=FailingLoader(batch, error)) is error
        assert not isinstance(error, ValueError) or "batch" not in str(error)
    made.assert_goes_on(mode, TWO_PASSES)


def test_a_loader_may_draw_random_numbers_before_it_fails() -> None:
    class Drawing(FailingLoader):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                torch.rand(1), random.random(), np.random.rand()
                yield batch

    made, error = world(), RuntimeError("bad row")
    assert fails(made, error, data=Drawing(2, error)) is error
    made.assert_goes_on("merged")


@pytest.mark.parametrize("call", range(2 * NUM_BATCHES))
def test_a_model_that_fails(call: int) -> None:
    """The type stays; ValueError and TypeError say which batch it was."""
    made = world(budget=TWO_PASSES)
    for error in ERRORS[call % NUM_BATCHES :: NUM_BATCHES]:
        found = fails(made, error, forward=failing(made.model, call, error))
        named = type(error) in (ValueError, TypeError)
        assert named or found is error
        assert not named or str(found) == f"batch {call % NUM_BATCHES} of data: {error}"
        assert not named or found.__cause__ is error
    made.assert_goes_on("merged", TWO_PASSES)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes before 3.11")
def test_a_model_out_of_memory_is_not_ours() -> None:
    made, error = world(), torch.cuda.OutOfMemoryError("CUDA out of memory")
    assert fails(made, error, forward=failing(made.model, 1, error)) is error
    assert error.__notes__ == [
        "in the model's own passes over batch 1 of data",
        "smaller batches take less memory, as in training",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_inputs_that_are_not_finite(value: float, batch: int) -> None:
    made, data = world(), task(1)
    data[batch][0][0, 1, 2] = value
    found = fails(made, NotFiniteError(), data=data)
    # A saturated unit hides an infinite input from the outputs.
    what = "the model's outputs" if value != value else "the layer inputs of '0.weight'"
    assert str(found).startswith(f"batch {batch} of data: {what} are not finite")
    made.assert_goes_on("merged")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_targets_that_are_not_finite(value: float) -> None:
    """Where they matter, that is, as they do for the empirical Fisher matrix."""
    made = world()
    data = [(x, torch.randn(len(x), 3).double()) for x, _ in task(1)]
    data[1][1][0, 1] = value
    made.penalty = exact_penalty(fisher_type="empirical")
    with pytest.raises(ValueError, match=r"batch 1 of data: .* of '\d.\w+' are not finite"):
        made.penalty.consolidate(made.model, torch.nn.MSELoss(), data)
    assert made.penalty.num_tasks == 0


def is_ours(frame: FrameType) -> bool:
    """Whether a frame is one of the package, or was called by one."""
    frames = [frame] if frame.f_back is None else [frame, frame.f_back]
    return any(f.f_code.co_filename.startswith(PACKAGE) for f in frames)


def interrupted(call: Callable[[], None], moment: int) -> int:
    """Interrupt a call at the n-th moment at which Python would, and count the moments.

    Python looks for signals when a function is entered or a built-in one has returned; what is
    interrupted here is the package and what it calls, not what is below that. An interrupt in the
    clean-up of an unfinished generator is lost, as all errors there are.
    """
    moments = 0

    def at(frame: FrameType, event: str, _: object) -> None:
        nonlocal moments
        if is_ours(frame) and event in ("call", "c_return"):
            moments += 1
            if moments == moment:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(at)
    try:
        call()
    except KeyboardInterrupt:
        assert moments == moment
    finally:
        sys.setprofile(None)
    return moments


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("mode", "ends", "between"),
    [
        ("merged", 4, 12),
        ("separate", 2, 5),
        *(pytest.param(mode, 20, 60, marks=pytest.mark.slow) for mode in MODES),
    ],
)
def test_an_interrupt_at_any_moment(mode: str, ends: int, between: int) -> None:
    """All the first and last moments, and some between; to separate terms, merging only adds."""
    made, done = world(mode), world(mode)
    before = made.state()
    last = interrupted(done.consolidate, 10**9)
    assert last > 1000
    stopped = 0
    middle = range(ends, last - 2 * ends, last // between)
    for moment in (*range(1, ends), *middle, *range(last - 2 * ends, last + 1)):
        interrupted(made.consolidate, moment)
        if made.penalty.num_tasks == 1:
            stopped += 1
            made.assert_unchanged(before)
            continue
        # The interrupt was lost, or came when all was done.
        before.model.assert_unchanged(made.model)
        assert same(made.penalty.state_dict(), done.penalty.state_dict())
        made = world(mode)
        before = made.state()
    # What an interrupted call found out of blocks is kept, so the next one may have fewer moments.
    assert stopped > between
    made.assert_goes_on(mode)


def test_an_interrupted_restoring_is_finished() -> None:
    """An interrupt may come while the model is being restored, too."""
    made, left = world(), 3

    class Stubborn(type(made.model[5])):
        def __setattr__(self, name: str, value: Any) -> None:
            nonlocal left
            if name == "training":
                left -= 1
                if left == 1:
                    raise KeyboardInterrupt
            super().__setattr__(name, value)

    before = made.state()
    made.model[5].__class__ = Stubborn
    with pytest.raises(KeyboardInterrupt):
        made.consolidate()
    made.model[5].__class__ = torch.nn.Linear
    made.assert_unchanged(before)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_threads_are_as_before(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decompositions, of which each gets a thread, may fail or be interrupted."""
    monkeypatch.setattr(eigh, "_SMALLEST_IN_THREADS", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for error in (KeyboardInterrupt(), ValueError("no"), MemoryError("no")):
            made = world()
            with monkeypatch.context() as patch:
                decomposed = failing(eigh.decomposed, which, error)
                patch.setattr(eigh, "decomposed", decomposed)
                fails(made, error)
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_a_merge_that_fails_leaves_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    made = world()
    operators = [
        EKFACLinearOperator(
            made.model, CE, list(made.model.parameters()), task(seed), check_deterministic=False
        )
        for seed in (0, 1)
    ]
    before = [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in o.state_dict().items()}
        for o in operators
    ]
    expected = merge(operators).state_dict()
    for call in range(6):
        with monkeypatch.context() as patch:
            patch.setattr(
                kronecker,
                "merged_basis",
                failing(kronecker.merged_basis, call, KeyboardInterrupt()),
            )
            with pytest.raises(KeyboardInterrupt):
                merge(operators)
        assert all(same(o.state_dict(), b) for o, b in zip(operators, before, strict=True))
    assert same(merge(operators).state_dict(), expected)
