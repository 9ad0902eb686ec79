"""Attached penalties against torch's optimizers on the dense coordinates `x = Qᵀθ`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR

from rotate_ewc import NotFiniteError
from tests.helpers.crossing import crossed
from tests.helpers.dense_steps import CASES, advance, dense, draw, follow
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import assert_close
from tests.helpers.penalties import (
    CE,
    MODELS,
    SUMMED,
    consolidated,
    flat,
    make,
    move,
    place,
    quadratic,
    task,
)


@pytest.mark.parametrize("case", CASES)
def test_steps_in_the_eigenbasis_and_shrinks(case: str) -> None:
    model, penalty = consolidated("plain", 2)
    start = flat(model)
    follow(model, penalty, case, 2.5 / 10)
    assert (flat(model) - start).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "joint", "case"),
    [
        (name, joint, ("sgd-nesterov", "adamw", "adam-decay", "nadam")[(n + 2 * joint) % 4])
        for n, name in enumerate(MODELS)
        for joint in (False, True)
    ],
)
def test_blocks_of_every_form(name: str, joint: bool, case: str) -> None:
    model, penalty = consolidated(name, 1, separate_weight_and_bias=not joint)
    follow(model, penalty, case, 2.5 / 9, steps=5)


@pytest.mark.parametrize("case", ["sgd-momentum", "adam", "adamw", "adagrad", "rmsprop-momentum"])
@pytest.mark.parametrize("strength", [0.0, 1e-3, 1e9])
def test_strengths(strength: float, case: str) -> None:
    """With a strength of 0 they are the optimizer's own steps, in rotated coordinates."""
    model, penalty = consolidated("plain", 1, strength)
    follow(model, penalty, case, strength / 9, steps=8)


@crossed(weighting=["examples", "uniform"], loss=[CE, SUMMED], case=["sgd-nesterov", "adam"])
def test_scale_is_that_of_the_penalty(weighting: str, loss: nn.Module, case: str) -> None:
    """In proportion to the loss: by numbers of examples, M_now divides the mean."""
    model, penalty = consolidated("plain", 2, loss=loss, weighting=weighting, decay=0.7)
    penalty.current_num_data = 25
    of_all = 25.0 if loss is SUMMED else 1.0
    scale = 2.5 * of_all / (25.0 if weighting == "examples" else 1.0)
    follow(model, penalty, case, scale, steps=5)


class Odd(nn.Module):
    """A tied weight, a scalar, blocks without a basis, and a filter with other strides."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.filter = nn.Conv2d(1, 2, (2, 2)).to(memory_format=torch.channels_last)
        self.mixed = nn.Linear(12, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        seen = self.norm(self.words(tokens)) * self.scale
        features = self.mixed(self.filter(seen[:, None]).flatten(1).tanh())
        return nn.functional.linear(features, self.words.weight)


@pytest.mark.parametrize("case", ["sgd-nesterov", "adam"])
@pytest.mark.parametrize("joint", [False, True])
def test_diagonal_tied_and_scalar_parameters(joint: bool, case: str) -> None:
    """The first have no basis at all, so that nothing is rotated but all could be aliased."""
    torch.manual_seed(0)
    model = Odd().double()
    penalty = exact_penalty(2.5, fisher_type="type2", separate_weight_and_bias=not joint)
    for t in range(2):
        penalty.consolidate(model, CE, [(x.clamp(max=4), y) for x, y in task("transposed", t)])
        move(model, t)
    state = {key: value.clone() for key, value in penalty.state_dict().items()}
    follow(model, penalty, case, 2.5 / 9)
    assert all(torch.equal(value, state[key]) for key, value in penalty.state_dict().items())


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("update", ["rotated", "tangent", "gradient"])
def test_gradients_that_cannot_be_written_to(update: str, graph: bool) -> None:
    """Expanded ones, and those that have a gradient function themselves."""
    model, penalty = consolidated("plain", 1)
    twin = copy.deepcopy(model)
    for net in (model, twin):
        parameters = list(net.parameters())
        value = sum(p.sum() + 0.1 * p.square().sum() for p in parameters)
        slopes = torch.autograd.grad(value, parameters, create_graph=graph)
        optimizer = Adam(net.parameters(), lr=0.1)
        for p, slope in zip(parameters, slopes, strict=True):
            expanded = torch.ones(1, dtype=p.dtype).expand(p.shape)
            p.grad = slope if graph else expanded
            if net is twin:
                p.grad = p.grad.detach().clone()
        with penalty.attach(optimizer, net, update):
            optimizer.step()
    assert torch.equal(flat(model), flat(twin))
    model.zero_grad()


@pytest.mark.parametrize("update", ["rotated", "tangent", "gradient"])
def test_step_under_autocast_is_in_full_precision(update: str) -> None:
    model, penalty = consolidated("plain", 1)
    penalty.float()
    found = []
    for inside in (True, False):
        net = copy.deepcopy(model).float()
        optimizer = Adam(net.parameters(), lr=0.1)
        with penalty.attach(optimizer, net, update):
            for step in range(3):
                draw(net, step)
                with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                    optimizer.step()
        found.append(flat(net))
    assert torch.equal(*found)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("update", ["rotated", "tangent", "gradient"])
def test_to_the_bit_the_optimizer_before_the_first_task(update: str, case: str) -> None:
    kind, options = CASES[case]
    model, twin, data = make("plain"), make("plain"), task("plain", 0)
    optimizer = kind(model.parameters(), **options)
    reference = kind(twin.parameters(), **options)
    exact_penalty(1e6).attach(optimizer, model, update)
    for _ in range(4):
        for net, stepped in ((model, optimizer), (twin, reference)):
            stepped.zero_grad()
            CE(net(data[0][0]), data[0][1]).backward()
            stepped.step()
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("case", ["sgd-nesterov", "adam", "adagrad", "nadam", "rmsprop-momentum"])
def test_state_starts_again_with_each_eigenbasis(case: str) -> None:
    """But not that of SGD, which is in no eigenbasis."""
    model, penalty = make("plain"), exact_penalty(2.5, seed=3)
    kind, options = CASES[case]
    optimizer = kind(model.parameters(), **options)
    penalty.attach(optimizer, model)
    oracle = None
    for done in range(3):
        last, oracle = oracle, dense(penalty, model, kind, options)
        if case.startswith("sgd") and last is not None:
            turned = oracle.at.basis.T @ last.at.basis
            whole = turned @ torch.cat([last.optimizer.state[p]["momentum_buffer"]
                                        for p in last.parts])  # fmt: skip
            for part, buffer in zip(
                oracle.parts, whole.split([p.numel() for p in oracle.parts]), strict=True
            ):
                oracle.optimizer.state[part]["momentum_buffer"] = buffer.clone()
        start = flat(model)
        for step in range(4):
            scale = 2.5 / (8 + done) if done else 0.0
            expected = advance(oracle, draw(model, 10 * done + step), scale)
            optimizer.step()
        assert_close(flat(model) - start, expected - start, 1e-9)
        penalty.consolidate(model, CE, task("plain", done, 9 + done))


def options_of_each(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"lr": 0.1, "weight_decay": 0.1},
        {"lr": 0.02, "betas": (0.5, 0.9)},
        {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.0},
        {"lr": 0.2},
    ]


def test_groups() -> None:
    model, penalty = consolidated("plain", 1)
    given, start = options_of_each(model), flat(model)
    oracle = dense(penalty, model, AdamW, given)
    named = zip(model.parameters(), given, strict=True)
    optimizer = AdamW([{"params": [p], **options} for p, options in named])
    penalty.attach(optimizer, model)
    schedulers = [
        OneCycleLR(o, max_lr=[0.1, 0.2, 0.3, 0.4], total_steps=20)
        for o in (optimizer, oracle.optimizer)
    ]
    for step in range(15):
        expected = advance(oracle, draw(model, step), 2.5 / 9)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert_close(flat(model) - start, expected - start, 1e-9)


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_groups_that_are_added_later(kind: type[Optimizer]) -> None:
    model, penalty = consolidated("plain", 1)
    whole, start = dense(penalty, model, kind, {"lr": 0.1}), flat(model)
    optimizer = kind(model[0].parameters(), lr=0.1)
    penalty.attach(optimizer, model)
    for step in range(6):
        gradients = draw(model, step)
        if step == 3:
            optimizer.add_param_group({"params": model[2].parameters()})
        if step < 3:
            gradients = [*gradients[:2], None, None]
        expected = advance(whole, gradients, 2.5 / 9)
        optimizer.step()
        if step == 2:
            assert torch.equal(flat(model[2]), start[-len(flat(model[2])) :])
    assert_close(flat(model) - start, expected - start, 1e-9)


@pytest.mark.parametrize("case", ["sgd-momentum", "adam", "adamw"])
@pytest.mark.parametrize("frozen", ["0.weight", "2.bias"])
def test_frozen_halves(frozen: str, case: str) -> None:
    model, penalty = consolidated("plain", 1)
    model.get_parameter(frozen).requires_grad_(False)
    kind, options = CASES[case]
    oracle, start = dense(penalty, model, kind, options), flat(model)
    optimizer = kind(model.parameters(), **options)
    penalty.attach(optimizer, model)
    for step in range(5):
        draw(model, step)
        model.get_parameter(frozen).grad = None
        expected = advance(oracle, [p.grad for p in model.parameters()], 2.5 / 9)
        optimizer.step()
    assert_close(flat(model) - start, expected - start, 1e-9)


@pytest.mark.parametrize("every", [2, 5])
@pytest.mark.parametrize("case", ["sgd-decay", "sgd-nesterov"])
def test_proximal_step_every_few_steps(case: str, every: int) -> None:
    """By the sum of the step sizes, while the learning rate falls; what is left is flushed."""
    model, penalty = consolidated("plain", 1)
    kind, options = CASES[case]
    form, twin = quadratic(penalty, model, 2.5 / 9), copy.deepcopy(model)
    optimizer, reference = (kind(m.parameters(), **options) for m in (model, twin))
    handle = penalty.attach(optimizer, model, every=every)
    schedulers = [ExponentialLR(o, 0.8) for o in (optimizer, reference)]
    total, start = 0.0, flat(model)
    factor = 1.0 / (1.0 - options.get("momentum", 0.0))
    for step in range(11):
        for net, stepped in ((model, optimizer), (twin, reference)):
            draw(net, step)
            stepped.step()
        total += reference.param_groups[0]["lr"] * factor
        if (step + 1) % every == 0:
            place(twin, form.proximal(flat(twin), total))
            total = 0.0
        for scheduler in schedulers:
            scheduler.step()
        assert_close(flat(model) - start, flat(twin) - start, 1e-9)
    expected = form.proximal(flat(twin), total)
    assert (expected - flat(model)).abs().max() > 1e-4
    for end in (handle.flush, handle.flush, handle.detach):
        end()
        assert_close(flat(model) - start, expected - start, 1e-9)


def test_nothing_is_flushed_before_the_first_task_or_after_a_consolidation() -> None:
    model, penalty = make("plain"), exact_penalty(2.5)
    optimizer = SGD(model.parameters(), lr=0.1)
    with penalty.attach(optimizer, model, every=3) as handle:
        for seed in range(2):
            for step in range(2):
                draw(model, step)
                optimizer.step()
            if seed:
                penalty.consolidate(model, CE, task("plain", 0))
            before = flat(model)
            handle.flush()
            assert torch.equal(flat(model), before)


@pytest.mark.parametrize("case", ["sgd-momentum", "adam", "adamw"])
def test_parameters_that_something_else_moves(case: str) -> None:
    """In place, through `.data`, or a new tensor there."""
    model, penalty = consolidated("plain", 1)
    kind, options = CASES[case]
    oracle, start = dense(penalty, model, kind, options), flat(model)
    optimizer = kind(model.parameters(), **options)
    penalty.attach(optimizer, model)
    for step in range(6):
        expected = advance(oracle, draw(model, step), 2.5 / 9)
        optimizer.step()
        assert_close(flat(model) - start, expected - start, 1e-9)
        if step == 1:
            move(model, step)
        elif step == 2:
            model[0].weight.data.mul_(0.5)
        elif step == 3:
            model[2].weight.data = model[2].weight.data + 0.25
        sizes = [p.numel() for p in oracle.parts]
        whole = (oracle.at.basis.T @ flat(model)).split(sizes)
        for part, x in zip(oracle.parts, whole, strict=True):
            part.data.copy_(x)


def test_accumulated_and_clipped_gradients() -> None:
    model, penalty = consolidated("plain", 1)
    oracle, start = dense(penalty, model, Adam, {"lr": 0.1}), flat(model)
    optimizer = Adam(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model)
    for _ in range(3):
        optimizer.zero_grad()
        for inputs, targets in task("plain", 4):
            CE(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        expected = advance(oracle, gradients, 2.5 / 9)
        optimizer.step()
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            assert torch.equal(p.grad, gradient)
    assert_close(flat(model) - start, expected - start, 1e-9)


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("update", ["rotated", "tangent", "gradient"])
def test_closures_are_evaluated_where_the_model_is(update: str, keyword: bool) -> None:
    model, penalty = consolidated("plain", 1)
    twin = copy.deepcopy(model)
    optimizer, reference = Adam(model.parameters(), lr=0.1), Adam(twin.parameters(), lr=0.1)
    penalty.attach(optimizer, model, update)
    penalty.attach(reference, twin, update)
    inputs, targets = task("plain", 5)[0]
    losses = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = CE(model(inputs), targets)
        loss.backward()
        losses.append(loss)
        return loss

    for step in range(3):
        result = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert len(losses) == step + 1
        assert result is losses[-1]
        reference.zero_grad()
        CE(twin(inputs), targets).backward()
        assert reference.step() is None
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize(("kind", "tolerance"), [(SGD, 1e-9), (Adam, 1e-4)])
def test_compiled_steps(kind: type[Optimizer], tolerance: float) -> None:
    """Compiled, Adam counts its steps in single precision."""
    model, penalty = consolidated("plain", 1)
    oracle, start = dense(penalty, model, kind, {"lr": 0.1}), flat(model)
    optimizer = kind(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model)

    @torch.compile(backend="eager")
    def take() -> None:
        optimizer.step()

    for step in range(3):
        expected = advance(oracle, draw(model, step), 2.5 / 9)
        take()
    assert_close(flat(model) - start, expected - start, tolerance)


def test_proximal_steps_start_again_after_a_consolidation() -> None:
    model, penalty = consolidated("plain", 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model, every=3)
    for step in range(2):
        draw(model, step)
        optimizer.step()
    penalty.consolidate(model, CE, task("plain", 3, 10))
    form, twin = quadratic(penalty, model, 2.5 / 10), copy.deepcopy(model)
    for step in range(2, 5):
        draw(model, step)
        optimizer.step()
        with torch.no_grad():
            for p, gradient in zip(twin.parameters(), draw(model, step), strict=True):
                p.sub_(0.1 * gradient)
    assert_close(flat(model), form.proximal(flat(twin), 3 * 0.1), 1e-9)


@pytest.mark.parametrize("case", ["sgd-momentum", "adam", "adamw", "rmsprop"])
def test_single_precision(case: str) -> None:
    """Against the same in double precision, with small learning rates."""
    model, penalty = consolidated("plain", 1)
    kind, options = CASES[case]
    options = {**options, "lr": 1e-4}
    oracle, start = dense(penalty, model, kind, options), flat(model)
    single, halved = copy.deepcopy(model).float(), copy.deepcopy(penalty).float()
    optimizer = kind(single.parameters(), **options)
    halved.attach(optimizer, single)
    for step in range(20):
        expected = advance(oracle, draw(single, step), 2.5 / 9)
        optimizer.step()
    assert_close(flat(single).double() - start, expected - start, 2e-3)


class Sharded(Tensor):
    """A tensor that is not what it seems."""


@pytest.mark.parametrize("update", ["rotated", "gradient"])
def test_tensors_of_other_kinds(update: str) -> None:
    model, penalty = consolidated("plain", 1)
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Sharded))
    optimizer = Adam(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model, update)
    draw(model, 0)
    with pytest.raises(ValueError, match=r"'0\.weight' is Sharded; expected ordinary tensors, or"):
        optimizer.step()


@pytest.mark.parametrize("case", ["sgd-momentum", "adam", "adamw"])
def test_strength_may_change_between_steps(case: str) -> None:
    model, penalty = consolidated("plain", 1)
    kind, options = CASES[case]
    oracle, start = dense(penalty, model, kind, options), flat(model)
    optimizer = kind(model.parameters(), **options)
    handle = penalty.attach(optimizer, model)
    for step in range(6):
        handle.strength = 2.0**step
        penalty.current_num_data = 5 + step
        expected = advance(oracle, draw(model, step), 2.0**step / (5 + step))
        optimizer.step()
    assert_close(flat(model) - start, expected - start, 1e-9)


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_large_gradients_are_finite(kind: type[Optimizer]) -> None:
    """Though their sum is not."""
    model, penalty = consolidated("plain", 1)
    model, penalty = model.float(), penalty.float()
    optimizer = kind(model.parameters(), lr=1e-30)
    penalty.attach(optimizer, model)
    draw(model, 0)
    model[0].weight.grad.fill_(3e38)
    if kind is SGD:
        optimizer.step()
        assert torch.isfinite(flat(model)).all()
    else:
        with pytest.raises(NotFiniteError, match=r"'0\.weight'"):
            optimizer.step()


def test_half_precision_keeps_what_it_rounds_off() -> None:
    """Proximal steps that are too small for it add up, after an optimizer that rotates nothing."""
    model, penalty = consolidated("plain", 1)
    model, penalty = model.bfloat16().float(), penalty.float()
    halved = copy.deepcopy(model).bfloat16()
    start = flat(model)
    for net in (model, halved):
        optimizer = SGD(net.parameters(), lr=2e-3)
        with penalty.attach(optimizer, net):
            for _ in range(300):
                for p in net.parameters():
                    p.grad = torch.zeros_like(p)
                optimizer.step()
    assert (flat(model) - start).abs().max() > 0.02
    assert (flat(halved).float() - flat(model)).abs().max() < 0.004


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_moves_before_a_step_that_fails_count_once(kind: type[Optimizer]) -> None:
    model, penalty = consolidated("plain", 1)
    optimizer = kind(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model)
    draw(model, 0)
    optimizer.step()
    move(model, 1)
    start = flat(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("of the user's")

    hook = optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="of the user's"):
        optimizer.step()
    assert torch.equal(flat(model), start)
    hook.remove()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert_close(flat(model), start, 1e-12)


@pytest.mark.parametrize("case", ["sgd-decay", "adam", "adamw"])
def test_what_does_not_move_stays_the_same_to_the_bit(case: str) -> None:
    """After a first step, which rounds."""
    model, penalty = consolidated("plain", 1)
    model, penalty = model.float(), penalty.float()
    kind, options = CASES[case]
    optimizer = kind(model.parameters(), **{**options, "lr": 0.0})
    penalty.attach(optimizer, model)
    for step in range(10):
        draw(model, step)
        optimizer.step()
        if step == 0:
            start = flat(model)
    assert torch.equal(flat(model), start)


@pytest.mark.parametrize("case", ["adam", "adam-fused", "sgd-momentum"])
def test_parameters_with_other_strides(case: str) -> None:
    """As those of convolutions in the memory format `channels_last`."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    model = nn.Sequential(*layers).double().to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(9, 2, 3, 3, generator=generator).double()
    penalty = exact_penalty(2.5, seed=3)
    penalty.consolidate(model, CE, [(inputs, torch.randint(3, (9,), generator=generator))])
    kind, options = CASES[case]
    oracle, start = dense(penalty, model, kind, options), flat(model)
    optimizer = kind(model.parameters(), **options)
    penalty.attach(optimizer, model)
    strides = model[0].weight.stride()
    assert strides != model[0].weight.detach().clone(memory_format=torch.contiguous_format).stride()
    for step in range(5):
        gradients = draw(model, step)
        expected = advance(oracle, gradients, 2.5 / 9)
        optimizer.step()
    assert_close(flat(model) - start, expected - start, 1e-9)
    assert model[0].weight.stride() == strides
    if case != "sgd-momentum":
        assert optimizer.state[model[0].weight]["exp_avg"].stride() == strides
