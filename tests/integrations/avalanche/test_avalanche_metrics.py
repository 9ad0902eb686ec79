"""Metrics of the plugin, through Avalanche's evaluator and loggers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.benchmarks import split_online_stream
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.logging import CSVLogger, InteractiveLogger, TensorboardLogger, TextLogger
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import nn

from rotate_ewc import EKFACPenalty
from rotate_ewc.integrations.avalanche import RotatedEWCPlugin, rotated_ewc_metrics
from rotate_ewc.integrations.avalanche.metrics import ConsolidationMetric
from tests.helpers.avalanche_training import dataset, domain_benchmark, net

CE = nn.CrossEntropyLoss()
OPTIONS: dict[str, dict[str, Any]] = {
    "rotated": {},
    "loss": {"update": "loss"},
    "separate": {"update": "loss", "mode": "separate"},
    "tangent": {"update": "tangent", "every": 2},
    "gradient": {"update": "gradient"},
}


def train(
    evaluator: EvaluationPlugin, options: str = "rotated", tasks: int = 2, evaluate: bool = False
) -> tuple[nn.Module, RotatedEWCPlugin]:
    """Train without shuffling, on three batches a task and epoch."""
    plugin, model = RotatedEWCPlugin(10.0, seed=5, **OPTIONS[options]), net(dropout=0.0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    strategy = Naive(
        model=model, optimizer=sgd, criterion=CE, train_mb_size=8, train_epochs=2,
        eval_mb_size=24, plugins=[plugin], evaluator=evaluator,
    )  # fmt: skip
    benchmark = domain_benchmark(tasks)
    for experience in benchmark.train_stream:
        strategy.train(experience, shuffle=False)
        if evaluate:
            strategy.eval(benchmark.test_stream)
    return model, plugin


def values(evaluator: EvaluationPlugin, name: str) -> list[float]:
    """What a metric was, every time."""
    found = [v for key, (_, v) in evaluator.get_all_metrics().items() if key.startswith(name)]
    assert found, name
    return [value for series in found for value in series]


def test_penalty_and_share_are_means_over_batches() -> None:
    evaluator = EvaluationPlugin(rotated_ewc_metrics())
    train(evaluator, "loss")
    model, penalty = net(dropout=0.0), EKFACPenalty(10.0, seed=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    expected, shares = [], []
    for t in range(2):
        x, y = dataset(t).tensors
        for _ in range(2):
            added, total = 0.0, 0.0
            for rows in torch.arange(24).split(8):
                extra = penalty(model)
                loss = CE(model(x[rows]), y[rows]) + extra
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                added, total = added + extra.item() / 3, total + loss.item() / 3
            expected.append(added)
            shares.append(added / total)
        penalty.consolidate(model, CE, [(x[rows], y[rows]) for rows in torch.arange(24).split(8)])
    assert values(evaluator, "RotatedEWC_Penalty/") == pytest.approx(expected, rel=1e-4)
    assert values(evaluator, "RotatedEWC_Share/") == pytest.approx(shares, rel=1e-4)
    assert expected[:2] == [0.0, 0.0]
    assert 0.0 < shares[-1] < 1.0


@pytest.mark.parametrize("options", ["rotated", "tangent", "gradient"])
def test_penalty_that_is_not_in_the_loss_is_that_of_the_moment(options: str) -> None:
    evaluator = EvaluationPlugin(rotated_ewc_metrics())
    seen: list[float] = []

    class Watch(RotatedEWCPlugin):
        def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            seen.append(self.penalty(strategy.model).item())
            super().after_training_exp(strategy, *args, **kwargs)

    model = net(dropout=0.0)
    strategy = Naive(
        model=model, criterion=CE, train_mb_size=8, evaluator=evaluator,
        optimizer=torch.optim.SGD(model.parameters()), plugins=[Watch(10.0, **OPTIONS[options])],
    )  # fmt: skip
    for experience in domain_benchmark(3).train_stream:
        strategy.train(experience, shuffle=False)
    assert values(evaluator, "RotatedEWC_Penalty/") == pytest.approx(seen)
    assert seen[0] == 0.0 < min(seen[1:])
    assert all(0.0 <= share < 1.0 for share in values(evaluator, "RotatedEWC_Share/"))


@pytest.mark.parametrize("options", OPTIONS)
def test_sizes_and_traces_of_consolidations(options: str) -> None:
    evaluator = EvaluationPlugin(rotated_ewc_metrics(penalty=False, traces=True))
    model, plugin = train(evaluator, options)
    assert all(seconds > 0 for seconds in values(evaluator, "RotatedEWC_ConsolidationSeconds/"))
    kept = sum(t.nbytes for k, t in plugin.penalty.state_dict().items() if k != "header")
    sizes = values(evaluator, "RotatedEWC_KeptBytes/")
    assert len(sizes) == 2
    assert sizes[-1] == kept
    if options == "separate":
        assert sizes[1] == 2 * sizes[0]
    else:
        assert sizes[1] == sizes[0]
    names = ["0.weight", "0.bias", "3.weight", "3.bias"]
    last = [values(evaluator, f"RotatedEWC_Trace_{name}/")[-1] for name in names]
    # The trace of the second derivatives, by two backward passes for each entry.
    parameters = dict(model.named_parameters())
    assert list(parameters) == names
    gradients = torch.autograd.grad(
        plugin.penalty(model), list(parameters.values()), create_graph=True
    )
    for name, gradient, trace in zip(names, gradients, last, strict=True):
        expected = 0.0
        for index in range(gradient.numel()):
            second = torch.autograd.grad(
                gradient.flatten()[index], parameters[name], retain_graph=True
            )[0]
            expected += second.flatten()[index].item()
        assert trace == pytest.approx(expected, rel=1e-4), name


def test_loggers_show_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = io.StringIO()
    loggers = [TextLogger(text), InteractiveLogger(), TensorboardLogger(tmp_path)]
    train(EvaluationPlugin(rotated_ewc_metrics(traces=True), loggers=loggers), evaluate=True)
    for shown in (text.getvalue(), capsys.readouterr().out):
        for name in ("Penalty", "Share", "ConsolidationSeconds", "KeptBytes", "Trace_0.weight"):
            assert f"RotatedEWC_{name}/train_phase/train_stream" in shown, name
    assert list(tmp_path.glob("events*"))


def test_csv_files_are_unharmed(tmp_path: Path) -> None:
    written = []
    for index, metrics in enumerate(([], rotated_ewc_metrics(traces=True))):
        logger = CSVLogger(str(tmp_path / str(index)))
        usual = [accuracy_metrics(epoch=True, experience=True), loss_metrics(epoch=True)]
        try:
            train(EvaluationPlugin(*usual, metrics, loggers=[logger]), evaluate=True)
        finally:
            logger.close()
        written.append([path.read_text() for path in sorted((tmp_path / str(index)).iterdir())])
    assert written[0] == written[1]
    assert any(len(content.splitlines()) > 2 for content in written[0])


def test_nothing_is_chosen() -> None:
    assert rotated_ewc_metrics(penalty=False, consolidation=False) == []


def test_a_strategy_without_the_plugin_is_told() -> None:
    model = net()
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters()), criterion=CE, train_mb_size=8,
        evaluator=EvaluationPlugin(rotated_ewc_metrics()),
    )  # fmt: skip
    with pytest.raises(ValueError, match="has 0 RotatedEWCPlugin; expected one"):
        strategy.train(domain_benchmark(1).train_stream[0])


def test_results_of_the_consolidation_metric_itself() -> None:
    """The duration of the last consolidation, which Avalanche may ask for and reset."""
    metric = ConsolidationMetric(costs=True, traces=False)
    assert metric.result() == 0.0
    evaluator = EvaluationPlugin([metric])
    _, plugin = train(evaluator, tasks=1)
    assert plugin.consolidation_seconds is not None
    assert metric.result() == plugin.consolidation_seconds > 0
    metric.reset()
    assert metric.result() == 0.0


def test_no_consolidation_no_values() -> None:
    """In the middle of an online task there is none."""
    evaluator = EvaluationPlugin(rotated_ewc_metrics())
    stream = split_online_stream(domain_benchmark(1).train_stream, experience_size=8)
    strategy = Naive(
        model=(model := net()), optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        criterion=CE, train_mb_size=8, plugins=[RotatedEWCPlugin(10.0)], evaluator=evaluator,
    )  # fmt: skip
    counts = []
    for part in stream:
        strategy.train(part)
        found = [k for k in evaluator.get_all_metrics() if k.startswith("RotatedEWC_Consolidation")]
        counts.append(len(found))
    assert counts == [0, 0, 1]
