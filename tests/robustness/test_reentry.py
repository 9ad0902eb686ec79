"""Estimation inside other things that are going on: another one, training, modes, loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from rotate_ewc import EKFACLinearOperator, EKFACPenalty
from tests.helpers.crossing import crossed
from tests.helpers.determinism_cases import CE, differences
from tests.helpers.exact import exact_penalty
from tests.helpers.exactness import assert_exact_diagonal
from tests.helpers.model_state import ModelState
from tests.helpers.oracles import dense_ggn, parameter_shapes
from tests.helpers.penalties import dense_quadratic, flat, flat_gradient, shapes_of

Data = Any


def net(seed: int = 0) -> nn.Module:
    """A network in which something differs in training, and something is frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)
        )
    model[0].bias.requires_grad_(False)
    return model.double()


def batches(seed: int = 0, sizes: Sequence[int] = (3, 4)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 4, generator=generator, dtype=torch.float64),
            torch.randint(3, (n,), generator=generator),
        )
        for n in sizes
    ]


def joined(data: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def operator_of(
    model: Callable[..., Any], data: Data, params: Mapping[str, Tensor], **options: Any
) -> EKFACLinearOperator:
    return EKFACLinearOperator(model, CE, params, data, check_deterministic=False, **options)


def estimate(model: nn.Module, data: Data, **options: Any) -> dict[str, Any]:
    return operator_of(model, data, dict(model.named_parameters()), **options).state_dict()


# ------------------------------------------------------------------ one inside another


class Observed:
    """Batches, and something that happens before each of them."""

    def __init__(self, data: Sequence[tuple[Tensor, Tensor]], act: Callable[[], object]) -> None:
        self.data, self.act = data, act

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pair in self.data:
            self.act()
            yield pair


def in_the_loader(model: nn.Module, act: Callable[[], object], **options: Any) -> dict[str, Any]:
    return estimate(model, Observed(batches(), act), **options)


def in_the_forward_pass(
    model: nn.Module, act: Callable[[], object], **options: Any
) -> dict[str, Any]:
    handle = model[2].register_forward_hook(lambda *_: act() and None)
    try:
        return estimate(model, batches(), **options)
    finally:
        handle.remove()


def in_the_backward_pass(
    model: nn.Module, act: Callable[[], object], **options: Any
) -> dict[str, Any]:
    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: act() and None)

    handle = model[2].register_forward_hook(watch)
    try:
        return estimate(model, batches(), **options)
    finally:
        handle.remove()


PLACES = {
    "loader": in_the_loader,
    "forward": in_the_forward_pass,
    "backward": in_the_backward_pass,
}


@crossed(place=PLACES, which=["same", "other"], joint=[False, True], budget=[2**30, 1])
def test_one_estimation_inside_another(place: str, which: str, joint: bool, budget: int) -> None:
    """Both are what they are by themselves, of the same model or not."""
    model = net()
    inner = model if which == "same" else net(1)
    options = {"separate_weight_and_bias": not joint, "memory_budget": budget}
    expected = estimate(model, batches(), **options)
    of_inner = estimate(inner, batches(1))
    before = [ModelState.of(model), ModelState.of(inner)]
    found: list[dict[str, Any]] = []
    deep = False

    def act() -> None:
        nonlocal deep
        torch.rand(1)
        if not deep:
            # Hooks of the same model see the inner estimation too.
            deep = True
            found.append(estimate(inner, batches(1)))
            deep = False

    assert differences(PLACES[place](model, act, **options), expected) == []
    assert len(found) >= 2
    assert all(differences(one, of_inner) == [] for one in found)
    before[0].assert_unchanged(model)
    before[1].assert_unchanged(inner)


@pytest.mark.parametrize("place", PLACES)
def test_failure_of_the_inner_one(place: str) -> None:
    """It comes through, and everything is restored from both."""
    model = net()
    before = ModelState.of(model)

    def act() -> None:
        estimate(model, [])

    with pytest.raises(ValueError, match="data is empty"):
        PLACES[place](model, act)
    before.assert_unchanged(model)
    assert estimate(model, batches())


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_penalty_inside_the_forward_pass(mode: str) -> None:
    """Looked at while another task is consolidated, it is what it was before."""
    model, penalty = net(), exact_penalty(mode=mode)
    penalty.consolidate(model, CE, batches())
    with torch.no_grad():
        model[4].weight.add_(1.0)
    value = penalty(model).item()
    seen: list[float] = []
    penalty.consolidate(model, CE, Observed(batches(1), lambda: seen.append(penalty(model).item())))
    assert value > 0
    assert set(seen) == {value}
    assert penalty.num_tasks == 2


# ------------------------------------------------------------------ inside contexts


class Counting(TorchFunctionMode):
    """A user's own mode, which lets everything pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


class AsProducts(TorchFunctionMode):
    """A user's own mode, which computes layers in another way."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs:
            x, weight, bias = args
            return x @ weight.T + bias
        return func(*args, **(kwargs or {}))


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "autocast, disabled": lambda: torch.autocast("cpu", torch.bfloat16, enabled=False),
    "mode": Counting,
    "default device": lambda: torch.device("cpu"),
    "saved tensors on the CPU": torch.autograd.graph.save_on_cpu,
    "deterministic": lambda: Deterministic(),
}


class Deterministic:
    """Algorithms that are known to be deterministic, or else an error."""

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self.before)


@pytest.mark.parametrize("where", ["around", "in the forward pass"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_do_not_matter(context: str, where: str) -> None:
    model, data = net(), batches()
    params = dict(model.named_parameters())
    expected = estimate(model, data)
    model.eval()

    def forward(x: Tensor) -> Any:
        with CONTEXTS[context]():
            return model(x)

    if where == "around":
        with CONTEXTS[context]():
            found = operator_of(model, data, params).state_dict()
    elif context in ("no_grad", "inference_mode"):
        # Then the outputs depend on no parameter.
        with pytest.raises(ValueError, match="the outputs depend on none of the parameters"):
            operator_of(forward, data, params)
        return
    else:
        found = operator_of(forward, data, params).state_dict()
    assert differences(found, expected) == []


def test_nothing_of_a_mode_stays() -> None:
    """Modes of the user see what happens afterwards as they did before."""
    model, counting = net().eval(), Counting()
    with counting:
        estimate(model, batches())
        seen = counting.seen
        model(batches()[0][0])
    # Five layers, of which four are functions of torch.
    assert counting.seen > seen > 0


@pytest.mark.parametrize("where", ["around", "in the forward pass"])
def test_a_mode_that_computes_otherwise(where: str) -> None:
    """Its operations are seen, or at least the ones it replaces: exact either way."""
    model, data = net(), batches()
    params = dict(model.named_parameters())
    names = list(params)
    dense = dense_ggn(model, CE, names, *joined(data))
    model.eval()

    def forward(x: Tensor) -> Any:
        with AsProducts():
            return model(x)

    if where == "around":
        with AsProducts():
            operator = operator_of(model, data, params, fisher_type="type2")
    else:
        operator = operator_of(forward, data, params, fisher_type="type2")
    assert_exact_diagonal(operator, dense, parameter_shapes(model, names))


# ------------------------------------------------------------------ transforms and compiled code


def by_grad(function: Callable[[Tensor], Tensor]) -> None:
    torch.func.grad(function)(torch.ones(3))


def by_jvp(function: Callable[[Tensor], Tensor]) -> None:
    torch.func.jvp(function, (torch.ones(3),), (torch.ones(3),))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("transform", [by_grad, by_jvp])
def test_inside_a_transform_of_torch_func(
    transform: Callable[[Callable[[Tensor], Tensor]], None],
) -> None:
    """There autograd sees nothing of it, and blocks of zeros would come out."""
    model = net()
    model[0].bias.requires_grad_(True)
    before = ModelState.of(model)

    def function(x: Tensor) -> Tensor:
        estimate(model, batches())
        return x.square().sum()

    with pytest.raises(ValueError, match=r"depend on none of .*'0\.weight'.* torch\.func"):
        transform(function)
    before.assert_unchanged(model)


def compiled_as_a_whole(model: nn.Module) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(model, backend="eager")
    return compiled


def compiled_function(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(lambda x: model(x), backend="eager")


def compiled_in_part(model: nn.Module) -> Callable[..., Any]:
    inner = torch.compile(nn.Sequential(*list(model.children())[1:]), backend="eager")
    return lambda x: inner(next(model.children())(x))


def compiled_in_place(model: nn.Module) -> Callable[..., Any]:
    model.compile(backend="eager")
    return model


# Torch's compiler warns of what it does itself.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("how", "warm"),
    [
        (compiled_as_a_whole, True),
        (compiled_in_place, False),
        (compiled_function, True),
        (compiled_in_part, False),
    ],
)
def test_compiled_models(how: Callable[[nn.Module], Callable[..., Any]], warm: bool) -> None:
    """Code that is compiled runs as it was written, where the recorder sees it."""
    torch._dynamo.reset()
    data, model = batches(), net().eval()
    params = dict(model.named_parameters())
    dense = dense_ggn(model, CE, list(params), *joined(data))
    shapes = parameter_shapes(model, list(params))
    compiled = how(model)
    if warm:
        compiled(data[0][0])
    options = {"fisher_type": "type2"}
    if how is compiled_as_a_whole:
        # Its parameters have names of their own, which the operator does not take over.
        params = {f"_orig_mod.{name}": parameter for name, parameter in params.items()}
    operator = operator_of(compiled, data, params, **options)
    assert_exact_diagonal(operator, dense, shapes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inside_a_compiled_function() -> None:
    torch._dynamo.reset()
    model = net().eval()
    expected = operator_of(model, batches(), dict(model.named_parameters())).trace

    @torch.compile(backend="eager")
    def function(x: Tensor) -> Tensor:
        return operator_of(model, batches(), dict(model.named_parameters())).trace + x

    assert torch.equal(function(torch.zeros(())), expected)
    assert expected > 0


# ------------------------------------------------------------------ what autograd cannot see


class Checkpointed(nn.Module):
    """The layer in the middle is run again in the backward pass."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.inner, self.outer = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Any:
        # As after an embedding that is frozen.
        x = x.clone().requires_grad_()
        hidden = checkpoint(lambda h: self.inner(h).tanh(), x, use_reentrant=self.reentrant)
        return self.outer(hidden)


def test_checkpoints() -> None:
    model, data = Checkpointed(reentrant=False), batches()
    params = dict(model.named_parameters())
    operator = operator_of(model, data, params, fisher_type="type2")
    dense = dense_ggn(straight(model), CE, list(params), *joined(data))
    assert_exact_diagonal(operator, dense, parameter_shapes(model, list(params)))


def straight(model: Checkpointed) -> nn.Module:
    """The same without checkpoints, which torch.func does not know."""
    plain = nn.Sequential()
    plain.add_module("inner", model.inner)
    plain.add_module("tanh", nn.Tanh())
    plain.add_module("outer", model.outer)
    return plain


@pytest.mark.parametrize("unsupported", ["error", "diagonal"])
def test_reentrant_checkpoints_are_refused_by_name(unsupported: str) -> None:
    """Autograd does not know that the outputs depend on what is inside of them."""
    model = Checkpointed(reentrant=True)
    params = dict(model.named_parameters())
    message = r"batch 0 of data: parameters 'inner\.bias', 'inner\.weight' are used while gradients"
    with pytest.raises(ValueError, match=message):
        operator_of(model, batches(), params, unsupported=unsupported)


def test_what_is_hidden_can_be_skipped() -> None:
    model, data = Checkpointed(reentrant=True), batches()
    with pytest.warns(UserWarning, match=r"'inner\.weight', 'inner\.bias'; they are left out"):
        operator = operator_of(
            model, data, dict(model.named_parameters()), fisher_type="type2", unsupported="skip"
        )
    names = ["outer.weight", "outer.bias"]
    dense = dense_ggn(straight(model), CE, names, *joined(data))
    assert_exact_diagonal(operator, dense, parameter_shapes(model, names))


class Reversed(torch.autograd.Function):
    """Turns gradients around."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def test_functions_that_hide_nothing_are_no_obstacle() -> None:
    """Also where a parameter is looked at without gradients elsewhere."""
    model, data = net().eval(), batches()
    params = dict(model.named_parameters())
    expected = estimate(model, data)

    def forward(x: Tensor) -> Any:
        with torch.no_grad():
            assert float(model[0].weight.norm()) > 0
        return model[1:](Reversed.apply(model[0](x)))

    assert differences(operator_of(forward, data, params).state_dict(), expected) == []


# ------------------------------------------------------------------ inference tensors


def test_data_that_were_made_in_inference_mode() -> None:
    """Such as features that were computed once and for all."""
    model = net()
    with torch.inference_mode():
        data = [(1 * x, 1 * y) for x, y in batches()]
    assert data[0][0].is_inference()
    assert differences(estimate(model, data), estimate(model, batches())) == []


def test_parameters_that_were_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = net()
    message = (
        r"parameters '0\.weight', .* are made in inference mode.* outside of torch\.inference_mode"
    )
    with pytest.raises(ValueError, match=message):
        estimate(model, batches())
    with pytest.raises(ValueError, match=message):
        exact_penalty().consolidate(model, CE, batches())


# ------------------------------------------------------------------ loaders with processes


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        pytest.param("fork", 2**30, id="fork, kept"),
        pytest.param("fork", 1, id="fork, two passes"),
        pytest.param("spawn", 1, id="spawn, two passes", marks=pytest.mark.slow),
    ],
)
def test_loaders_with_worker_processes(method: str, budget: int) -> None:
    model, whole = net(), batches(sizes=(11,))
    dataset = TensorDataset(*whole[0])
    before = ModelState.of(model)
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=4, num_workers=2, multiprocessing_context=method
    )
    found = estimate(model, loader, memory_budget=budget)
    before.assert_unchanged(model)
    in_this_process = DataLoader(dataset, batch_size=4)
    assert differences(found, estimate(model, in_this_process, memory_budget=budget)) == []


# ------------------------------------------------------------------ in the middle of training


def learned(model: nn.Module, mode: str = "merged", **options: Any) -> EKFACPenalty:
    penalty = exact_penalty(mode=mode, **options)
    for task in range(2):
        penalty.consolidate(model, CE, batches(task))
    return penalty


def test_in_the_middle_of_gradient_accumulation() -> None:
    """Gradients that are waiting go on waiting, and so do graphs without their backward pass."""
    data = batches()

    def accumulate(between: Callable[[nn.Module], object]) -> nn.Module:
        model = net().train()
        # Whatever is dropped must be the same.
        torch.manual_seed(3)
        CE(model(data[0][0]), data[0][1]).backward()
        pending = CE(model(data[1][0]), data[1][1])
        between(model)
        pending.backward()
        CE(model(data[0][0]), data[0][1]).backward()
        return model

    model = accumulate(learned)
    expected = accumulate(lambda _: None)
    gradients = [[p.grad for p in m.parameters() if p.requires_grad] for m in (model, expected)]
    assert gradients[1][0].norm() > 0
    assert differences(*gradients) == []
    assert differences(model.state_dict(), expected.state_dict()) == []


@pytest.mark.parametrize("modes", [("merged", "merged"), ("merged", "separate")])
def test_two_penalties_on_one_model(modes: tuple[str, str]) -> None:
    """They know nothing of each other, and their sum is that of both quadratics."""
    model = net()
    options: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2, "exclude": ["0.*"], "strength": 3.0}]
    model[0].bias.requires_grad_(True)
    alone = [learned(model, mode, **own) for mode, own in zip(modes, options, strict=True)]
    together = [exact_penalty(mode=mode, **own) for mode, own in zip(modes, options, strict=True)]
    for task in range(2):
        for penalty in together:
            penalty.consolidate(model, CE, batches(task))
    states = [[penalty.state_dict() for penalty in group] for group in (together, alone)]
    assert differences(*states) == []
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * (index + 1))
    sum(penalty(model) for penalty in together).backward()
    theta, expected = flat(model), 0.0
    for penalty in together:
        for term in penalty.terms:
            weight = penalty.strength * term.weight / 7
            form = dense_quadratic(term.operator, term.anchor, shapes_of(model), weight)
            expected = expected + form.gradient(theta)
    torch.testing.assert_close(flat_gradient(model), expected, rtol=1e-9, atol=1e-12)


def test_one_penalty_in_the_optimizer_and_one_in_the_loss() -> None:
    """A step with the first attached sees the second as part of the loss."""
    model, other = net().eval(), net().eval()
    for m in (model, other):
        m[0].bias.requires_grad_(True)
    first, second = learned(model, seed=1), learned(model, seed=2)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, other)]
    for m, optimizer in zip((model, other), optimizers, strict=True):
        first.attach(optimizer, m)
    x, y = batches()[0]
    for _ in range(3):
        for m, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            loss = CE(m(x), y)
            if m is model:
                (loss + second(m)).backward()
            else:
                # The same, in two parts.
                loss.backward()
                second(m).backward()
            optimizer.step()
    torch.testing.assert_close(flat(model), flat(other), rtol=1e-9, atol=1e-12)
    assert second(model) > 0
