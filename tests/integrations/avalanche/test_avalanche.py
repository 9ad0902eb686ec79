"""The plugin and the strategy, inside Avalanche's own training loop."""

from __future__ import annotations

import importlib
import pickle
import sys
from typing import Any

import pytest
import torch
from avalanche.benchmarks import split_online_stream
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn

from rotate_ewc.integrations.avalanche import RotatedEWC, RotatedEWCPlugin
from tests.helpers.avalanche_training import (
    CE,
    Incremental,
    MultiHead,
    class_benchmark,
    dataset,
    domain_benchmark,
    net,
)
from tests.helpers.exact import exact_penalty
from tests.helpers.exact_plugin import exact_plugin


def run(model: nn.Module, experiences: Any, plugins: list[Any], **options: Any) -> Naive:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    strategy = Naive(
        model=model, optimizer=optimizer, criterion=CE, train_mb_size=8, train_epochs=2,
        eval_mb_size=24, plugins=plugins, evaluator=None,
    )  # fmt: skip
    for experience in experiences:
        strategy.train(experience, **options)
    return strategy


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_is_the_same_as_a_loop_written_by_hand(mode: str) -> None:
    """Bit for bit: the plugin adds nothing to, and leaves nothing out of, the penalty module."""
    benchmark = domain_benchmark()
    trained = net(dropout=0.0)
    plugin = exact_plugin(3.0, mode, update="loss", num_samples=16, seed=5)
    run(trained, benchmark.train_stream, [plugin], shuffle=False)

    model, penalty = net(dropout=0.0), exact_penalty(3.0, mode, seed=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for t in range(3):
        x, y = dataset(t).tensors
        model.train()
        for _ in range(2):
            for rows in torch.arange(24).split(8):
                optimizer.zero_grad()
                (CE(model(x[rows]), y[rows]) + penalty(model)).backward()
                optimizer.step()
        drawn = torch.randperm(24, generator=torch.Generator().manual_seed(5 + t))[:16]
        batches = [(x[rows], y[rows]) for rows in drawn.split(8)]
        penalty.consolidate(model, CE, batches, num_data=24)
    assert plugin.penalty.num_tasks == 3
    for name, parameter in trained.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_penalty_changes_training() -> None:
    """Guards against a penalty that is always zero."""
    benchmark = domain_benchmark()
    free, held = net(), net()
    for model, plugins in ((free, []), (held, [exact_plugin(1000.0)])):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        strategy = Naive(
            model=model, optimizer=optimizer, criterion=CE, train_mb_size=8, train_epochs=3,
            plugins=plugins, evaluator=None,
        )  # fmt: skip
        for experience in benchmark.train_stream:
            strategy.train(experience)
    assert not torch.equal(free[0].weight, held[0].weight)
    assert plugins[0].penalty(free).item() > plugins[0].penalty(held).item()


def test_estimation_leaves_modes_and_gradients() -> None:
    model = net()
    seen: list[list[bool]] = []

    class Watch(RotatedEWCPlugin):
        def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            strategy.model[2].eval()
            before = [module.training for module in strategy.model.modules()]
            gradients = [p.grad.clone() for p in strategy.model.parameters()]
            super().after_training_exp(strategy, *args, **kwargs)
            seen.append([module.training for module in strategy.model.modules()])
            assert seen[-1] == before
            for parameter, gradient in zip(strategy.model.parameters(), gradients, strict=True):
                assert torch.equal(parameter.grad, gradient)

    run(model, domain_benchmark(2).train_stream, [Watch()])
    assert seen == [[True, True, True, False, True]] * 2


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_growing_classifier(mode: str) -> None:
    plugin, model = exact_plugin(1.0, mode, update="loss"), Incremental()
    benchmark = class_benchmark(task_labels=False)
    strategy = run(model, [benchmark.train_stream[0]], [plugin])
    assert plugin.penalty.terms[0].anchor["classifier.classifier.weight"].shape == (2, 8)
    strategy.eval(benchmark.test_stream)
    strategy.train(benchmark.train_stream[1])
    assert plugin.penalty.terms[-1].anchor["classifier.classifier.weight"].shape == (4, 8)
    assert plugin.penalty(model).item() >= 0.0


def test_multi_head_classifier() -> None:
    plugin, model = exact_plugin(1.0), MultiHead()
    run(model, class_benchmark(task_labels=True).train_stream, [plugin])
    blocks = {block.label: block for block in plugin.penalty.terms[0].operator.blocks}
    heads = [f"classifier.classifiers.{t}.classifier.weight" for t in (0, 1)]
    assert all(blocks[head].trace > 0 for head in heads)
    alone = exact_plugin(1.0, "separate", update="loss")
    run(MultiHead(), class_benchmark(task_labels=True).train_stream, [alone])
    first = {block.label: block for block in alone.penalty.terms[0].operator.blocks}
    assert heads[1] not in first or first[heads[1]].trace == 0


def test_replay_and_the_users_list_of_plugins() -> None:
    replay = ReplayPlugin(mem_size=8)
    plugins = [replay]
    model = net()
    strategy = RotatedEWC(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), ewc_lambda=2.0,
        train_mb_size=8, plugins=plugins, evaluator=None,
    )  # fmt: skip
    for experience in domain_benchmark().train_stream:
        strategy.train(experience)
    assert plugins == [replay]
    assert strategy.rotated_ewc.ewc_lambda == 2.0
    assert strategy.rotated_ewc.penalty.num_tasks == 3
    assert strategy.rotated_ewc.penalty.current_num_data == 24


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("boundaries", [True, False])
def test_online_stream_consolidates_at_task_boundaries(size: int, boundaries: bool) -> None:
    benchmark = split_online_stream(
        domain_benchmark(2).train_stream, experience_size=size, access_task_boundaries=boundaries
    )
    plugin = exact_plugin(1.0)
    counts = []
    strategy = run(net(), [], [plugin])
    for experience in benchmark:
        strategy.train(experience)
        counts.append(plugin.penalty.num_tasks)
    assert counts == [0, 0, 1, 1, 1, 2]
    assert plugin.penalty.terms[0].operator.num_data == 48


def test_state_continues_in_a_new_plugin() -> None:
    experiences = list(domain_benchmark().train_stream)
    whole = exact_plugin(3.0)
    reference = net()
    strategy = run(reference, experiences[:2], [whole], shuffle=False)
    torch.manual_seed(3)
    strategy.train(experiences[2], shuffle=False)

    first, model = exact_plugin(3.0), net()
    run(model, experiences[:2], [first], shuffle=False)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    resumed = exact_plugin(3.0)
    resumed.load_state_dict(first.state_dict())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
    torch.manual_seed(3)
    run(model, [experiences[2]], [resumed], shuffle=False)
    for name, parameter in reference.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize("stop", range(1, 6))
def test_state_continues_in_the_middle_of_an_online_task(stop: int) -> None:
    """Bit for bit, wherever the run was stopped."""
    parts = list(split_online_stream(domain_benchmark(2).train_stream, experience_size=8))
    whole, model = exact_plugin(3.0), net(dropout=0.0)
    run(model, parts, [whole], shuffle=False)

    first, other = exact_plugin(3.0), net(dropout=0.0)
    run(other, parts[:stop], [first], shuffle=False)
    resumed = exact_plugin(3.0)
    resumed.load_state_dict(first.state_dict())
    run(other, parts[stop:], [resumed], shuffle=False)
    assert resumed.penalty.num_tasks == whole.penalty.num_tasks == 2
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


@pytest.mark.parametrize(
    "damage", [None, "{}", "no JSON", '{"sub_experiences": -1}', '{"sub_experiences": "2"}']
)
def test_damaged_progress_is_refused(damage: str | None) -> None:
    source, model = exact_plugin(3.0), net()
    run(model, [domain_benchmark(1).train_stream[0]], [source])
    state = source.state_dict()
    state["progress"] = damage
    if damage is None:
        del state["progress"]
    plugin = exact_plugin(3.0)
    with pytest.raises(ValueError, match="snapshot key 'progress' is missing or damaged"):
        plugin.load_state_dict(state)
    assert plugin.penalty.num_tasks == 0


def test_plugin_can_be_pickled() -> None:
    """Avalanche's checkpoints pickle whole strategies."""
    plugin, model = exact_plugin(3.0), net()
    run(model, [domain_benchmark(1).train_stream[0]], [plugin])
    with torch.no_grad():
        model[0].weight.add_(0.1)
    again = pickle.loads(pickle.dumps(plugin))
    assert again.penalty(model).item() == plugin.penalty(model).item() > 0.0


def test_sample_is_drawn_over_all_classes() -> None:
    plugin = exact_plugin(1.0, num_samples=16, estimation_mb_size=16)
    seen: list[Tensor] = []
    consolidate = plugin.penalty.consolidate

    def watch(model: nn.Module, loss: Any, data: Any, **options: Any) -> None:
        seen.extend(targets for _, targets in data)
        assert options["num_data"] == 24
        consolidate(model, loss, data, **options)

    plugin.penalty.consolidate = watch
    run(net(), [domain_benchmark(1).train_stream[0]], [plugin])
    assert [len(targets) for targets in seen] == [16]
    assert sorted(set(seen[0].tolist())) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message", "error"),
    [
        ({"ewc_lambda": -1.0}, "ewc_lambda is -1.0", ValueError),
        ({"ewc_lambda": None}, "ewc_lambda is None", TypeError),
        ({"mode": "online"}, "mode is 'online'", ValueError),
        ({"mode": "separate"}, "update 'rotated', .* mode='merged', or update='loss'", ValueError),
        ({"num_samples": 0}, "num_samples is 0", ValueError),
        ({"estimation_mb_size": 2.5}, "estimation_mb_size is 2.5", TypeError),
        ({"fisher_type": "x"}, "fisher_type is 'x'", ValueError),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=message):
        exact_plugin(**arguments)


def test_unsupported_criterion_is_named() -> None:
    model = net()
    strategy = RotatedEWC(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        criterion=nn.MultiMarginLoss(), train_mb_size=8, evaluator=None,
    )  # fmt: skip
    with pytest.raises(TypeError, match=r"loss_func is MultiMarginLoss, .* is not known"):
        strategy.train(domain_benchmark(1).train_stream[0])


def test_message_where_avalanche_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "avalanche", None)
    for name in [n for n in sys.modules if n.startswith("rotate_ewc.integrations.avalanche")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rotate-ewc\[avalanche\]'"):
        importlib.import_module("rotate_ewc.integrations.avalanche")
