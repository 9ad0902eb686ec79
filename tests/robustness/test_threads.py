"""Estimations in several threads at once: each as if it were alone, and all left as it was."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread, get_ident
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator, EKFACPenalty
from rotate_ewc.linalg import eigh
from tests.helpers.determinism_cases import CE, Estimation, differences
from tests.helpers.exact import exact_penalty
from tests.helpers.exactness import assert_exact_diagonal
from tests.helpers.model_state import ModelState
from tests.helpers.oracles import dense_ggn, parameter_shapes

Batches = Sequence[tuple[Tensor, Tensor]]

# Long enough for a machine that is busy, short enough to see that something hangs.
PATIENCE = 100.0


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """Run functions in threads of their own; return what they return, or the exception."""
    # Products that come before anything else in a thread do not ask for the number that was set.
    number = torch.get_num_threads()
    with ThreadPoolExecutor(len(functions), "", torch.set_num_threads, (number,)) as pool:
        futures = [pool.submit(function) for function in functions]
        return [future.exception(PATIENCE) or future.result() for future in futures]


class Meeting(nn.Module):
    """Passes its input on, after as many threads have come to it."""

    def __init__(self) -> None:
        super().__init__()
        self.barrier: Barrier | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.barrier is not None:
            self.barrier.wait(PATIENCE)
        return x


def meeting_net(seed: int, hidden: int = 6) -> nn.Module:
    """A network that waits for others before, between and after its layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            Meeting(), nn.Linear(5, hidden), Meeting(), nn.Tanh(), nn.Linear(hidden, 3), Meeting()
        )


def meet(models: Sequence[nn.Module], parties: int) -> None:
    """Let the forward passes of models wait for each other, layer by layer; 0 is not at all."""
    for layers in zip(*(list(model.children()) for model in models), strict=True):
        if isinstance(layers[0], Meeting):
            barrier = Barrier(parties) if parties else None
            for layer in layers:
                layer.barrier = barrier


def batches(seed: int, sizes: Sequence[int] = (4, 2, 3)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 5, generator=generator), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]


def estimate(model: nn.Module, data: Any, **options: Any) -> dict[str, Any]:
    params = dict(model.named_parameters())
    operator = EKFACLinearOperator(model, CE, params, data, check_deterministic=False, **options)
    return operator.state_dict()


# ------------------------------------------------------------------ each as if alone


@pytest.mark.parametrize("budget", [2**30, 1], ids=["kept", "two passes"])
@pytest.mark.parametrize("fisher", ["type2", "mc", "empirical"])
def test_interleaved_forward_passes(fisher: str, budget: int) -> None:
    models, data = [meeting_net(seed) for seed in (0, 1, 2)], [batches(seed) for seed in (0, 1, 2)]

    def of(index: int) -> dict[str, Any]:
        return estimate(models[index], data[index], fisher_type=fisher, memory_budget=budget)

    alone = [of(index) for index in range(3)]
    assert differences(alone[0], alone[1]) != []
    meet(models, 3)
    assert differences(at_once(*(lambda i=i: of(i) for i in range(3))), alone) == []


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("model", ["mlp", "cnn", "transformer"])
def test_without_waiting(model: str) -> None:
    """Whatever the order is, in networks whose eigenbases are found in threads too."""
    cases = [Estimation(model, "mc", True, 2**18), Estimation(model, "empirical", False, 2**18)]
    alone = [case.snapshot() for case in cases]
    networks = [case.build() for case in cases]
    found = at_once(
        *(
            lambda c=case, n=network: c.operator(n, c.data()).state_dict()
            for case, network in zip(cases, networks, strict=True)
        )
    )
    assert differences(found, alone) == []


@pytest.mark.parametrize("budget", [2**30, 1], ids=["kept", "two passes"])
def test_one_model_in_two_threads(budget: int) -> None:
    """Of different data, with layers that are frozen, or behave differently in training."""
    model = meeting_net(0)
    model.append(nn.BatchNorm1d(3)).append(nn.Dropout(0.5))
    model[1].bias.requires_grad_(False)
    before = ModelState.of(model)

    def of(seed: int) -> dict[str, Any]:
        return estimate(model, batches(seed), memory_budget=budget)

    alone = [of(seed) for seed in (0, 1)]
    assert differences(alone[0], alone[1]) != []
    meet([model], 2)
    assert differences(at_once(lambda: of(0), lambda: of(1)), alone) == []
    before.assert_unchanged(model)


class Scripted:
    """Data whose making is told to somebody, and draws at random."""

    def __init__(
        self, data: Batches, first: Callable[[], object], last: Callable[[], object]
    ) -> None:
        self.data, self.first, self.last = data, first, last

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.first()
        for pair in self.data:
            torch.rand(1), random.random(), np.random.rand()
            yield pair
        self.last()


@pytest.mark.parametrize("fails", [None, "first", "second"])
@pytest.mark.parametrize("leaves", ["first", "second"])
def test_who_comes_first_may_leave_first_or_last(leaves: str, fails: str | None) -> None:
    """The model and the random states are as they were, and nothing was dropped meanwhile."""
    model = meeting_net(0).append(nn.Dropout(0.5))
    model[4].weight.requires_grad_(False)
    alone = [estimate(model, batches(seed)) for seed in (0, 1)]
    first_came, second_came, left = Event(), Event(), Event()
    before = ModelState.of(model)

    def wait(event: Event) -> None:
        assert event.wait(PATIENCE)

    def last(who: str) -> Callable[[], None]:
        def act() -> None:
            if who != leaves:
                wait(left)
            if who == fails:
                raise RuntimeError("no more data")

        return act

    def come_first() -> None:
        first_came.set()
        wait(second_came)

    def run(who: str, data: Scripted) -> dict[str, Any]:
        try:
            return estimate(model, data)
        finally:
            if who == leaves:
                left.set()

    def second() -> dict[str, Any]:
        wait(first_came)
        return run("second", Scripted(batches(1), second_came.set, last("second")))

    found = at_once(lambda: run("first", Scripted(batches(0), come_first, last("first"))), second)
    for who, result, expected in zip(("first", "second"), found, alone, strict=True):
        if who == fails:
            assert isinstance(result, RuntimeError)
        else:
            assert differences(result, expected) == []
    before.assert_unchanged(model)


def test_the_failure_of_one_is_its_own() -> None:
    """It says what is wrong with it, and those beside it go on."""
    models = [meeting_net(0), meeting_net(1)]
    bad = [*batches(1, (4,)), (torch.full((2, 5), float("nan")), torch.zeros(2).long())]
    good = batches(0, (4, 2))
    alone = estimate(models[0], good)
    before = [ModelState.of(model) for model in models]
    meet(models, 2)
    found, failure = at_once(lambda: estimate(models[0], good), lambda: estimate(models[1], bad))
    assert differences(found, alone) == []
    assert isinstance(failure, ValueError)
    assert "batch 1 of data: the model's outputs are not finite" in str(failure)
    for model, snapshot in zip(models, before, strict=True):
        snapshot.assert_unchanged(model)


def test_training_beside_an_estimation() -> None:
    """The recorder sees nothing of it, and it nothing of the recorder."""
    models, data = [meeting_net(0), meeting_net(1)], batches(0)

    def train() -> dict[str, Any]:
        penalty = exact_penalty()
        optimizer = torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9)
        for x, y in data:
            optimizer.zero_grad()
            loss = CE(models[1](x), y)
            assert loss.requires_grad
            (loss + penalty(models[1])).backward()
            optimizer.step()
        return {name: tensor.clone() for name, tensor in models[1].state_dict().items()}

    start = {name: tensor.clone() for name, tensor in models[1].state_dict().items()}
    alone = [estimate(models[0], data), train()]
    assert differences(start, alone[1]) != []
    models[1].load_state_dict(start)
    for parameter in models[1].parameters():
        parameter.grad = None
    meet(models, 2)
    assert differences(at_once(lambda: estimate(models[0], data), train), alone) == []


def test_penalties_in_threads_on_one_model() -> None:
    """Consolidated at once, each has what it would have had alone."""
    model = meeting_net(0)
    penalties = [exact_penalty(mode=mode) for mode in ("merged", "separate")]
    alone = [exact_penalty(mode=mode) for mode in ("merged", "separate")]

    def learn(penalty: EKFACPenalty, seed: int) -> None:
        for task in range(2):
            penalty.consolidate(model, CE, batches(10 * seed + task))

    for seed, penalty in enumerate(alone):
        learn(penalty, seed)
    meet([model], 2)
    failures = at_once(
        *(lambda p=penalty, s=seed: learn(p, s) for seed, penalty in enumerate(penalties))
    )
    assert failures == [None, None]
    states = [[penalty.state_dict() for penalty in group] for group in (penalties, alone)]
    assert differences(*states) == []


# ------------------------------------------------------------------ what a model does in threads


class InAThread(nn.Module):
    """Runs its layer in a thread of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            result: Tensor = pool.submit(self.layer, x).result()
        return result


def test_layers_run_in_other_threads_are_refused_by_name() -> None:
    """They cannot be seen from here, which is noticed; their exact diagonal can be had."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5).double(), InAThread(), nn.Linear(3, 3).double())
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(3, (6,))
    params = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"'1\.layer\.bias', '1\.layer\.weight' are used by an op"):
        EKFACLinearOperator(model, CE, params, [(x, y)], fisher_type="type2")
    with pytest.warns(UserWarning, match=r"no rule .* '1\.layer\.weight', '1\.layer\.bias'"):
        operator = EKFACLinearOperator(
            model, CE, params, [(x, y)], fisher_type="type2", unsupported="diagonal"
        )
    # The same network without threads, into which torch.func does not see either.
    plain = nn.Sequential(model[0], nn.Sequential(OrderedDict(layer=model[1].layer)), model[2])
    names = list(params)
    dense = dense_ggn(plain, CE, names, x, y)
    assert_exact_diagonal(operator, dense, parameter_shapes(model, names))


# ------------------------------------------------------------------ numbers of threads


def number_in_a_new_thread() -> int:
    found: list[int] = []
    thread = Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The bits depend on how many threads share a product, which busy ones may decide anew."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(eigh, "_SMALLEST_IN_THREADS", 4)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_numbers_of_threads_while_bases_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that find bases are alone each, and those of others are as many as before."""
    own, others = [], []
    original, all_have_begun, begun = eigh.decomposed, Barrier(3), set()

    def observed(covariance: Tensor, label: str) -> tuple[Tensor, str]:
        if get_ident() not in begun:
            begun.add(get_ident())
            all_have_begun.wait(PATIENCE)
        own.append(torch.get_num_threads())
        others.append(number_in_a_new_thread())
        return original(covariance, label)

    monkeypatch.setattr(eigh, "decomposed", observed)
    eigh.eigenbases([torch.eye(6)[None]] * 4)
    assert own == [1, 1, 1, 1]
    assert others == [3, 3, 3, 3]
    assert torch.get_num_threads() == 3
    assert number_in_a_new_thread() == 3


@pytest.mark.usefixtures("three_threads")
def test_numbers_of_threads_are_kept_apart() -> None:
    """A thread that has set a number of its own keeps it, and does not give it to others."""
    found: list[int] = []

    def with_two() -> None:
        torch.set_num_threads(2)
        eigh.eigenbases([torch.eye(size)[None] for size in (5, 5, 6, 6)])
        found.append(torch.get_num_threads())

    thread = Thread(target=with_two)
    thread.start()
    thread.join()
    assert found == [2]
    # What the thread itself has set is what others begin with; that is torch's doing.
    assert number_in_a_new_thread() == 2
    assert torch.get_num_threads() == 3
    eigh.eigenbases([torch.eye(size)[None] for size in (5, 5, 6, 6)])
    assert torch.get_num_threads() == 3
    assert number_in_a_new_thread() == 2


@pytest.mark.usefixtures("three_threads")
def test_bases_found_in_many_threads_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    roots = [torch.randn(1, size, size, generator=generator) for size in (6, 7, 8, 9)]
    covariances = [root @ root.mT for root in roots]
    alone = eigh.eigenbases(covariances)
    found = at_once(*[lambda: eigh.eigenbases(covariances)] * 4)
    assert differences(found, [alone] * 4) == []
    assert torch.get_num_threads() == 3
    assert number_in_a_new_thread() == 3
