"""Handles of attached penalties: what is refused, undone, saved and resumed."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, NAdam, Optimizer, RMSprop, Rprop
from torch.optim.lr_scheduler import ExponentialLR, StepLR

from rotate_ewc import NotFiniteError, SnapshotError, register_step_size
from rotate_ewc.penalty import step_rules
from tests.helpers.crossing import crossed
from tests.helpers.dense_steps import CASES, advance, dense, draw
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import assert_close
from tests.helpers.penalties import CE, consolidated, flat, make, move, task

UPDATES = ["rotated", "tangent", "gradient"]


def everything(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """A copy of all that a step may change."""
    return copy.deepcopy(
        {
            "parameters": [p.detach() for p in model.parameters()],
            "gradients": [p.grad for p in model.parameters()],
            "optimizer": optimizer.state_dict(),
        }
    )


def assert_same(actual: Any, expected: Any) -> None:
    """Compare nested values bit for bit; what is no number is equal to itself."""
    if isinstance(expected, Tensor):
        assert torch.equal(actual.to_dense().nan_to_num(7.0), expected.to_dense().nan_to_num(7.0))
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_same(actual[key], value)
    elif isinstance(expected, (list, tuple)):
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert actual == expected


# --------------------------------------------------------------------------- what is refused


class Lion(Optimizer):
    """Moves every entry by the learning rate."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad.sign())


class Louder(Adam):
    """Steps by itself, and so is no Adam."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Named(Adam):
    """Is an Adam with a name."""


def of_another(model: nn.Module) -> Optimizer:
    return Adam(make("plain").parameters())


REFUSED: list[tuple[Callable[[nn.Module], Any], dict[str, Any], type[Exception], str]] = [
    (of_another, {}, ValueError, "has 4 parameters, none of which belongs to the model"),
    (lambda m: LBFGS(m.parameters()), {"update": "gradient"}, ValueError, "optimizer is LBFGS"),
    (lambda m: Rprop(m.parameters()), {}, ValueError, "Rprop, whose step size .*update='gradient'"),
    (
        lambda m: Lion(m.parameters()),
        {"update": "tangent"},
        ValueError,
        r"register_step_size\(Lion",
    ),
    (lambda m: Louder(m.parameters()), {}, ValueError, "optimizer is Louder"),
    (lambda m: SGD(m.parameters(), differentiable=True), {}, ValueError, "differentiable=True"),
    (lambda m: Adam(m.parameters()), {"every": 3}, ValueError, "every is 3, but update='rotated'"),
    (
        lambda m: SGD(m.parameters()),
        {"every": 3, "update": "gradient"},
        ValueError,
        "every is 3, but update='gradient'",
    ),
    (lambda m: Adam(m.parameters()), {"every": 0}, ValueError, "every is 0"),
    (lambda m: Adam(m.parameters()), {"every": 2.0}, TypeError, "every is 2.0"),
    (lambda m: Adam(m.parameters()), {"update": "proximal"}, ValueError, "update is 'proximal'"),
    (lambda m: m.parameters(), {}, TypeError, "optimizer is generator"),
]


@pytest.mark.parametrize(("maker", "options", "error", "message"), REFUSED)
def test_what_cannot_be_attached(
    maker: Callable[[nn.Module], Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    model, penalty = consolidated("plain", 1)
    optimizer = maker(model)
    with pytest.raises(error, match=message):
        penalty.attach(optimizer, model, **options)
    if isinstance(optimizer, Optimizer):
        assert not optimizer._optimizer_step_pre_hooks
        assert "step" not in vars(optimizer)


def test_what_is_no_model() -> None:
    model, penalty = consolidated("plain", 1)
    with pytest.raises(TypeError, match=r"model is OrderedDict; expected a torch\.nn\.Module"):
        penalty.attach(Adam(model.parameters()), model.state_dict())  # type: ignore[arg-type]


def test_separate_tasks_have_no_eigenbasis() -> None:
    model, penalty = consolidated("plain", 1, mode="separate")
    with pytest.raises(ValueError, match="mode 'separate'; expected 'merged'"):
        penalty.attach(Adam(model.parameters()), model)


@pytest.mark.parametrize("other", [False, True])
def test_one_penalty_for_an_optimizer(other: bool) -> None:
    """Until it is detached, as the message says."""
    model, penalty = consolidated("plain", 1)
    optimizer = Adam(model.parameters())
    handle = penalty.attach(optimizer, model)
    second = exact_penalty() if other else penalty
    with pytest.raises(ValueError, match=r"already has a penalty attached.* detach\(\)"):
        second.attach(optimizer, model)
    handle.detach()
    second.attach(optimizer, model)


def test_two_optimizers_of_a_model() -> None:
    model, penalty = consolidated("plain", 1)
    oracle, start = dense(penalty, model, Adam, {"lr": 0.1}), flat(model)
    optimizers = [Adam(model[i].parameters(), lr=0.1) for i in (0, 2)]
    for optimizer in optimizers:
        penalty.attach(optimizer, model)
    for step in range(4):
        draw(model, step)
        expected = advance(oracle, [p.grad for p in model.parameters()], 2.5 / 9)
        for optimizer in optimizers:
            optimizer.step()
    assert_close(flat(model) - start, expected - start, 1e-9)


def test_subclasses_that_step_alike() -> None:
    model, penalty = consolidated("plain", 1)
    penalty.attach(Named(model.parameters()), model).detach()


def test_remedies_for_unknown_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_rules, "_RULES", dict(step_rules._RULES))
    model, penalty = consolidated("plain", 1)
    start = flat(model)
    optimizer = Lion(model.parameters(), lr=0.05)
    with penalty.attach(optimizer, model, "gradient"):
        draw(model, 0)
        optimizer.step()
    register_step_size(Lion, lambda group, state: float(group["lr"]))
    penalty.attach(optimizer, model)
    oracle = dense(penalty, model, Lion, {"lr": 0.05})
    shrinking = [1.0 + 0.05 * 2.5 / 9 * v for v in oracle.at.eigenvalues.split(
        [p.numel() for p in oracle.parts])]  # fmt: skip
    for step in range(3):
        draw(model, step)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        x = torch.cat([p.detach() for p in oracle.parts])
        at = oracle.at.basis.T @ oracle.at.anchor
        x = at + (x - 0.05 * (oracle.at.basis.T @ gradient).sign() - at) / torch.cat(shrinking)
        for part, own in zip(oracle.parts, x.split([p.numel() for p in oracle.parts]), strict=True):
            part.data.copy_(own)
        optimizer.step()
    assert_close(flat(model) - start, oracle.at.basis @ x - start, 1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Linear, lambda g, s: 1.0), "optimizer_class is <class .*Linear"),
        ((Lion, 0.1), "rule is 0.1"),
    ],
)
def test_rules_that_are_none(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        register_step_size(*arguments)
    with pytest.raises(TypeError, match="rotated is 1"):
        register_step_size(Lion, lambda g, s: 1.0, rotated=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="optimizer_class is LBFGS"):
        register_step_size(LBFGS, lambda g, s: 1.0)


# --------------------------------------------------------------------------- steps that fail


def no_number(model: nn.Module, optimizer: Optimizer) -> None:
    model[2].weight.grad[0, 0] = math.nan


def infinite(model: nn.Module, optimizer: Optimizer) -> None:
    model[0].bias.grad[1] = math.inf


def sparse(model: nn.Module, optimizer: Optimizer) -> None:
    model[0].weight.grad = model[0].weight.grad.to_sparse()


def replaced(model: nn.Module, optimizer: Optimizer) -> None:
    model[0].weight = nn.Parameter(torch.zeros(2, 2).double())


def all_replaced(model: nn.Module, optimizer: Optimizer) -> None:
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        layer.bias = nn.Parameter(layer.bias.detach().clone())


def raising(model: nn.Module, optimizer: Optimizer) -> None:
    def hook(*_: Any) -> None:
        raise RuntimeError("of the user's")

    optimizer.register_step_pre_hook(hook)


def raising_later(model: nn.Module, optimizer: Optimizer) -> None:
    def hook(*_: Any) -> None:
        raise RuntimeError("of the user's")

    hooks = optimizer._optimizer_step_post_hooks
    optimizer.register_step_post_hook(hook)
    hooks.move_to_end(next(reversed(hooks)), last=False)


def in_the_middle(model: nn.Module, optimizer: Optimizer) -> None:
    """The optimizer fails after it has stepped other parameters."""
    optimizer.state[model[2].bias]["exp_avg"] = torch.zeros(99).double()


FAILURES = [
    (no_number, NotFiniteError, "gradient of '2.weight' is not finite"),
    (infinite, NotFiniteError, "gradient of '0.bias' is not finite"),
    (sparse, ValueError, "'0.weight' has a sparse gradient"),
    (replaced, ValueError, r"'0.weight' has shape \[2, 2\]"),
    (all_replaced, ValueError, "none of the model's parameters that the penalty protects"),
    (raising, RuntimeError, "of the user's"),
]


@pytest.mark.parametrize("kind", [SGD, Adam])
@pytest.mark.parametrize(("spoil", "error", "message"), FAILURES)
def test_steps_that_fail_change_nothing(
    spoil: Callable[[nn.Module, Optimizer], None],
    error: type[BaseException],
    message: str,
    kind: type[Optimizer],
) -> None:
    model, penalty = consolidated("plain", 1)
    optimizer = kind(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model)
    draw(model, 0)
    optimizer.step()
    penalty.consolidate(model, CE, task("plain", 5))
    draw(model, 1)
    spoil(model, optimizer)
    before, tensors = everything(model, optimizer), [p.grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_same(everything(model, optimizer), before)
    assert all(p.grad is g for p, g in zip(model.parameters(), tensors, strict=True))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("spoil", [raising_later, pytest.param(in_the_middle, id="in the middle")])
def test_model_is_put_back_when_the_optimizer_fails(
    spoil: Callable[[nn.Module, Optimizer], None], update: str
) -> None:
    """Also in the middle of its step; with other updates than "rotated", as far as it would be."""
    model, penalty = consolidated("plain", 1)
    optimizer = Adam(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model, update)
    draw(model, 0)
    optimizer.step()
    before, tensors = everything(model, optimizer), [p.grad for p in model.parameters()]
    pointers = [p.data_ptr() for p in model.parameters()]
    spoil(model, optimizer)
    with pytest.raises(RuntimeError):
        optimizer.step()
    after = everything(model, optimizer)
    assert all(p.grad is g for p, g in zip(model.parameters(), tensors, strict=True))
    assert_same(after["gradients"], before["gradients"])
    assert pointers == [p.data_ptr() for p in model.parameters()]
    if update == "rotated":
        assert_same(after["parameters"], before["parameters"])


def test_closures_that_fail() -> None:
    model, penalty = consolidated("plain", 1)
    optimizer = Adam(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model)
    draw(model, 0)
    before = everything(model, optimizer)

    def closure() -> None:
        raise RuntimeError("of the loss")

    with pytest.raises(RuntimeError, match="of the loss"):
        optimizer.step(closure)
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize("update", UPDATES)
def test_strength_of_infinity(update: str) -> None:
    model, penalty = consolidated("plain", 1)
    handle = penalty.attach(Adam(model.parameters()), model, update)
    with pytest.raises(ValueError, match="strength is inf"):
        handle.strength = math.inf
    assert handle.strength == 2.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_any_strength(kind: type[Optimizer], dtype: torch.dtype) -> None:
    """What a number can hold, and a learning rate of zero."""
    model, penalty = consolidated("plain", 1, 1e308)
    model, penalty = model.to(dtype), penalty.to(dtype)
    optimizer = kind(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model)
    for step in range(4):
        draw(model, step)
        optimizer.param_groups[0]["lr"] = 0.0 if step == 2 else 0.1
        optimizer.step()
        assert torch.isfinite(flat(model)).all()


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_dtypes_that_do_not_fit(kind: type[Optimizer]) -> None:
    """The advice is good."""
    model, penalty = consolidated("plain", 1)
    model.float()
    optimizer = kind(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model)
    draw(model, 0)
    before = everything(model, optimizer)
    if kind is Adam:
        with pytest.raises(ValueError, match=r"call penalty\.to\(torch\.float32\)"):
            optimizer.step()
        assert_same(everything(model, optimizer), before)
        penalty.to(torch.float32)
    optimizer.step()
    assert not torch.equal(flat(model), torch.cat([p.flatten() for p in before["parameters"]]))


def test_half_precision_is_refused_with_a_remedy() -> None:
    model, penalty = consolidated("plain", 1)
    model.bfloat16()
    penalty.bfloat16().float()
    optimizer = Adam(model.parameters(), lr=0.1)
    handle = penalty.attach(optimizer, model)
    draw(model, 0)
    with pytest.raises(ValueError, match=r"torch\.bfloat16, .*update='gradient'"):
        optimizer.step()
    handle.detach()
    penalty.attach(optimizer, model, "gradient")
    before = flat(model)
    optimizer.step()
    assert not torch.equal(flat(model), before)


@pytest.mark.parametrize("name", ["plain", "words"])
def test_penalty_on_another_device_is_named(name: str) -> None:
    model, penalty = consolidated(name, 1)
    optimizer = Adam(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model)
    penalty.to("meta")
    draw(model, 0)
    with pytest.raises(ValueError, match=r"call penalty\.to\('cpu'\)"):
        optimizer.step()


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_halves_of_a_joint_block(kind: type[Optimizer]) -> None:
    model, penalty = consolidated("plain", 1, separate_weight_and_bias=False)
    optimizer = kind(model.parameters(), lr=0.1)
    handle = penalty.attach(optimizer, model)
    draw(model, 0)
    model[0].bias.grad = None
    with pytest.raises(ValueError, match=r"'0.bias' has no gradient .*separate_weight_and_bias"):
        optimizer.step()
    handle.detach()
    groups = [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(model.parameters(), 1)]
    optimizer = kind(groups, lr=0.1)
    penalty.attach(optimizer, model)
    draw(model, 0)
    with pytest.raises(ValueError, match=r"different lr \('0.weight' has 0.1, '0.bias' has 0.2\)"):
        optimizer.step()


# --------------------------------------------------------------------------- handles


def test_handle() -> None:
    model, penalty = consolidated("plain", 1)
    handle = penalty.attach(Adam(model.parameters()), model)
    assert repr(handle) == "Attachment(Adam, update='rotated', every=1)"
    handle.strength = 7.0
    assert penalty.strength == handle.strength == 7.0


@pytest.mark.parametrize("case", ["sgd-momentum", "adam", "adagrad"])
@pytest.mark.parametrize("update", UPDATES)
def test_detached_optimizers_step_by_themselves(update: str, case: str) -> None:
    """Averages that were in an eigenbasis start again, others go on."""
    kind, options = CASES[case]
    model, penalty = consolidated("plain", 1)
    optimizer = kind(model.parameters(), **options)
    with penalty.attach(optimizer, model, update) as handle:
        for step in range(3):
            draw(model, step)
            optimizer.step()
    handle.detach()
    twin = copy.deepcopy(model)
    reference = kind(twin.parameters(), **options)
    if update != "rotated" or case == "sgd-momentum":
        reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not optimizer._optimizer_step_pre_hooks
    assert "step" not in vars(optimizer)
    for step in range(3):
        for net, stepped in ((model, optimizer), (twin, reference)):
            draw(net, step)
            stepped.step()
    assert torch.equal(flat(model), flat(twin))


def test_detached_optimizers_have_the_step_of_their_scheduler() -> None:
    """Or else it would warn that it was overridden."""
    model, penalty = consolidated("plain", 1)
    optimizer = Adam(model.parameters(), lr=0.1)
    scheduler = ExponentialLR(optimizer, 0.9)
    step = optimizer.step
    penalty.attach(optimizer, model).detach()
    assert optimizer.step == step
    draw(model, 0)
    optimizer.step()
    scheduler.step()


@pytest.mark.parametrize("first", [False, True])
def test_schedulers_before_and_after(first: bool) -> None:
    """They wrap `step` too; and a failing step is undone all the same."""
    model, penalty = consolidated("plain", 1)
    oracle, start = dense(penalty, model, Adam, {"lr": 0.1}), flat(model)
    optimizer = Adam(model.parameters(), lr=0.1)
    schedulers = [ExponentialLR(optimizer, 0.9)] if first else []
    handle = penalty.attach(optimizer, model)
    schedulers.append(StepLR(optimizer, 2))
    for step in range(4):
        draw(model, step)
        for group in oracle.optimizer.param_groups:
            group["lr"] = optimizer.param_groups[0]["lr"]
        expected = advance(oracle, [p.grad for p in model.parameters()], 2.5 / 9)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert_close(flat(model) - start, expected - start, 1e-9)
    raising(model, optimizer)
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match="of the user's"):
        optimizer.step()
    assert_same(everything(model, optimizer), before)
    handle.detach()


def test_wrapped_optimizers() -> None:
    """As those of accelerate are, which have no hooks of their own."""

    class Accelerated(Optimizer):
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        def step(self, closure: Any = None) -> None:
            self.optimizer.step(closure)

    model, penalty = consolidated("plain", 1)
    oracle, start = dense(penalty, model, Adam, {"lr": 0.1}), flat(model)
    optimizer = Accelerated(Adam(model.parameters(), lr=0.1))
    penalty.attach(optimizer, model)
    draw(model, 0)
    expected = advance(oracle, [p.grad for p in model.parameters()], 2.5 / 9)
    optimizer.step()
    assert_close(flat(model) - start, expected - start, 1e-9)


def test_copies_of_optimizers_are_not_attached() -> None:
    model, penalty = consolidated("plain", 1)
    optimizer = Adam(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not copied._optimizer_step_pre_hooks


# --------------------------------------------------------------------------- going on


def through_a_file(state: Any) -> Any:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@pytest.mark.parametrize("case", ["sgd-momentum", "adam", "adamw", "adagrad"])
@pytest.mark.parametrize(("update", "every"), [("rotated", 1), ("tangent", 3), ("gradient", 1)])
def test_resumed_runs_end_in_the_same_bits(update: str, every: int, case: str) -> None:
    kind, options = CASES[case]
    every = 3 if case.startswith("sgd") and update == "rotated" else every
    model, penalty = consolidated("plain", 1)
    optimizer = kind(model.parameters(), **options)
    handle = penalty.attach(optimizer, model, update, every)

    def go_on(net: nn.Module, stepped: Optimizer, steps: range) -> None:
        for step in steps:
            draw(net, step)
            stepped.step()

    go_on(model, optimizer, range(4))
    saved = through_a_file(
        [model.state_dict(), penalty.state_dict(), optimizer.state_dict(), handle.state_dict()]
    )
    go_on(model, optimizer, range(4, 8))
    twin, other = make("plain", 9), exact_penalty(2.5, seed=3)
    resumed = kind(twin.parameters(), **options)
    second = other.attach(resumed, twin, update, every)
    for loading, state in zip((twin, other, resumed, second), saved, strict=True):
        loading.load_state_dict(state)
    go_on(twin, resumed, range(4, 8))
    assert torch.equal(flat(twin), flat(model))
    assert_same(through_a_file(second.state_dict()), through_a_file(handle.state_dict()))


def test_without_the_state_of_the_handle_a_run_goes_on() -> None:
    """The optimizer's own state tells in which eigenbasis it is."""
    model, penalty = consolidated("plain", 1)
    optimizer = Adam(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model)
    for step in range(4):
        draw(model, step)
        optimizer.step()
    twin, resumed = copy.deepcopy(model), None
    resumed = Adam(twin.parameters(), lr=0.1)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    penalty.attach(resumed, twin)
    for step in range(4, 7):
        for net, stepped in ((model, optimizer), (twin, resumed)):
            draw(net, step)
            stepped.step()
    assert_close(flat(twin), flat(model), 1e-12)
    assert {int(s["step"]) for s in resumed.state.values()} == {7}


@pytest.mark.parametrize("update", UPDATES)
def test_states_that_are_none(update: str) -> None:
    model, penalty = consolidated("plain", 1)
    optimizer = Adam(model.parameters(), lr=0.1)
    handle = penalty.attach(optimizer, model, update)
    draw(model, 0)
    optimizer.step()
    good = handle.state_dict()
    bad = [
        ({}, "not the state of a handle"),
        ({**good, "update": "other"}, "has update 'other'"),
        ({**good, "num_tasks": 4}, "a penalty with 4 tasks, but this one has 1"),
        ({**good, "state": {**good["state"], "a/b": torch.ones(2)}}, "'a/b'|missing|NoneType"),
    ]
    for key, value in good["state"].items():
        if isinstance(value, Tensor):
            for wrong in (value.float(), value[..., None], value * math.nan):
                bad.append(({**good, "state": {**good["state"], key: wrong}}, key))
    for state, message in bad:
        with pytest.raises(SnapshotError, match=message):
            handle.load_state_dict(state)
    assert_same(handle.state_dict(), good)


# --------------------------------------------------------------------------- growing models


def grown(classes: int = 4) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, classes)).double()


@pytest.mark.parametrize("case", ["sgd-nesterov", "adam", "adamw", "nadam", "rmsprop-momentum"])
@pytest.mark.parametrize("joint", [False, True])
def test_new_rows_follow_the_optimizer(joint: bool, case: str) -> None:
    small, penalty = consolidated("plain", 1, separate_weight_and_bias=not joint)
    model = grown()
    with torch.no_grad():
        for p, old in zip(model.parameters(), small.parameters(), strict=True):
            p[tuple(map(slice, old.shape))] = old
    kind, options = CASES[case]
    oracle, start = dense(penalty, model, kind, options), flat(model)
    optimizer = kind(model.parameters(), **options)
    penalty.attach(optimizer, model)
    for step in range(5):
        draw(model, step)
        expected = advance(oracle, [p.grad for p in model.parameters()], 2.5 / 9)
        optimizer.step()
    assert_close(flat(model) - start, expected - start, 1e-9)


@pytest.mark.parametrize("kind", [SGD, Adam, RMSprop])
def test_excluded_parameters_follow_the_optimizer(kind: type[Optimizer]) -> None:
    model = make("plain")
    penalty = exact_penalty(2.5, exclude=["0.*"])
    penalty.consolidate(model, CE, task("plain", 0))
    move(model, 0)
    oracle, start = dense(penalty, model, kind, {"lr": 0.1}), flat(model)
    optimizer = kind(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model)
    for step in range(3):
        draw(model, step)
        expected = advance(oracle, [p.grad for p in model.parameters()], 2.5 / 9)
        optimizer.step()
    assert_close(flat(model) - start, expected - start, 1e-9)


@pytest.mark.parametrize("kind", [SGD, NAdam])
@pytest.mark.parametrize("update", UPDATES)
def test_parameters_that_are_missing_are_left_out(update: str, kind: type[Optimizer]) -> None:
    _, penalty = consolidated("plain", 1, strict=False)
    model = grown()
    model[2].bias = None
    optimizer = kind(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model, update)
    draw(model, 0)
    before = flat(model)
    with pytest.warns(UserWarning, match="not protected any more|ha(s|ve) grown"):
        optimizer.step()
    assert not torch.equal(flat(model), before)


# --------------------------------------------------------------------------- scaled gradients


@crossed(update=UPDATES, kind=[SGD, AdamW], fused=[False, True], overflow=[False, True])
def test_gradient_scaler(update: str, kind: type[Optimizer], fused: bool, overflow: bool) -> None:
    """Fused optimizers unscale gradients, and skip infinite ones, by themselves."""
    model, penalty = consolidated("plain", 1)
    model, penalty = model.float(), penalty.float()
    twin = copy.deepcopy(model)
    optimizer = kind(model.parameters(), lr=0.1, fused=fused)
    reference = kind(twin.parameters(), lr=0.1)
    penalty.attach(optimizer, model, update)
    penalty.attach(reference, twin, update)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        draw(model, step)
        draw(twin, step)
        scaler.scale(torch.ones(()))
        for p in model.parameters():
            p.grad.mul_(scaler.get_scale())
        if overflow and step == 1:
            model[0].weight.grad[0, 0] = math.inf
            before = flat(model)
        else:
            reference.step()
        scaler.step(optimizer)
        scaler.update()
        if overflow and step == 1:
            assert torch.equal(flat(model), before)
    torch.testing.assert_close(flat(model), flat(twin))


# --------------------------------------------------------------------------- advice


def test_a_new_optimizer_for_parameters_that_were_replaced() -> None:
    model, penalty = consolidated("plain", 1)
    optimizer = Adam(model.parameters(), lr=0.1)
    handle = penalty.attach(optimizer, model)
    all_replaced(model, optimizer)
    draw(model, 0)
    with pytest.raises(ValueError, match="or attach the penalty to a new optimizer"):
        optimizer.step()
    handle.detach()
    optimizer = Adam(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model)
    before = flat(model)
    optimizer.step()
    assert not torch.equal(flat(model), before)


@pytest.mark.parametrize("how", ["both", "separate"])
def test_remedies_for_halves_of_a_joint_block(how: str) -> None:
    model, penalty = consolidated("plain", 1, separate_weight_and_bias=how == "separate")
    optimizer = Adam(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model)
    draw(model, 0)
    if how == "separate":
        model[0].bias.grad = None
    before = flat(model)
    optimizer.step()
    assert not torch.equal(flat(model), before)


def test_attached_twice_in_turn_with_a_scheduler() -> None:
    """What wraps the first guard does no harm to the second."""
    model, penalty = consolidated("plain", 1)
    oracle, start = dense(penalty, model, SGD, {"lr": 0.1}), flat(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    for step in range(3):
        handle = penalty.attach(optimizer, model)
        ExponentialLR(optimizer, 1.0)
        draw(model, step)
        expected = advance(oracle, [p.grad for p in model.parameters()], 2.5 / 9)
        optimizer.step()
        handle.detach()
    assert_close(flat(model) - start, expected - start, 1e-9)
