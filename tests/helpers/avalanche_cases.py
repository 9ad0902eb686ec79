"""Strategies for the tests of checkpoints, which other processes build anew."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import dill
import torch
from avalanche.benchmarks import nc_benchmark, split_online_stream
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from rotate_ewc.integrations.avalanche import RotatedEWCPlugin
from tests.helpers.avalanche_training import (
    CE,
    Incremental,
    MultiHead,
    dataset,
    domain_benchmark,
    net,
)

SEED = 11


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    update: str = "rotated"
    optimizer: str = "sgd"
    mode: str = "merged"
    model: str = "net"
    every: int = 1

    def __str__(self) -> str:
        return "-".join(str(getattr(self, field.name)) for field in fields(self))

    @classmethod
    def parse(cls, text: str) -> Case:
        *words, every = text.split("-")
        return cls(*words, every=int(every))


def experiences_of(case: Case) -> list[Any]:
    """Three tasks; for growing models each has two new classes."""
    if case.model == "net":
        return list(domain_benchmark(3).train_stream)
    if case.model == "online":
        stream = split_online_stream(domain_benchmark(2).train_stream, experience_size=8, seed=3)
        return list(stream)
    data, labels = dataset(0, 48, classes=6), case.model == "multi_head"
    benchmark = nc_benchmark(
        data, data, n_experiences=3, task_labels=labels, seed=0, shuffle=False,
        class_ids_from_zero_in_each_exp=labels,
    )  # fmt: skip
    return list(benchmark.train_stream)


def optimizer_of(case: Case, model: nn.Module) -> Optimizer:
    if case.optimizer == "adam":
        return Adam(model.parameters(), lr=0.02)
    return SGD(model.parameters(), lr=0.05, momentum=0.5)


def build(case: Case) -> Naive:
    """A strategy at its start, and the random generators at theirs."""
    models = {"incremental": Incremental, "multi_head": MultiHead}
    model = models.get(case.model, net)()
    plugin = RotatedEWCPlugin(
        3.0, case.mode, update=case.update, every=case.every, num_samples=16, seed=5
    )
    strategy = Naive(
        model=model, optimizer=optimizer_of(case, model), criterion=CE, train_mb_size=8,
        train_epochs=2, eval_mb_size=24, plugins=[plugin], evaluator=None,
    )  # fmt: skip
    RNGManager.set_random_seeds(SEED)
    return strategy


def train(strategy: Naive, experiences: Iterable[Any]) -> Naive:
    for experience in experiences:
        strategy.train(experience)
    return strategy


def plugin_of(strategy: Naive) -> RotatedEWCPlugin:
    """The one at work now; a checkpoint brings its own."""
    (plugin,) = (p for p in strategy.plugins if isinstance(p, RotatedEWCPlugin))
    return plugin


def outcome(strategy: Naive) -> dict[str, Any]:
    """All that a run leads to: parameters, snapshots, anchors, and what is drawn next."""
    weights = {f"model/{name}": value for name, value in strategy.model.state_dict().items()}
    plugin = plugin_of(strategy)
    states = {
        f"optimizer/{name}/{key}": value
        for name, parameter in strategy.model.named_parameters()
        for key, value in strategy.optimizer.state.get(parameter, {}).items()
    }
    kept = {f"plugin/{key}": value for key, value in plugin.state_dict().items()}
    value = {"penalty": plugin.penalty(strategy.model).detach(), "next": torch.rand(3)}
    return {**weights, **states, **kept, **value}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Keys whose values are not the same bit for bit."""
    keys = sorted(found.keys() | expected.keys())
    return [key for key in keys if not _same(found.get(key), expected.get(key))]


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return type(first) is type(second) and bool(first == second)


def main(case_text: str, folder: str, stop: str) -> None:
    """Go on from where the last process was killed, up to an experience; as a script would."""
    dill.settings["byref"] = True
    case, checkpoint = Case.parse(case_text), Path(folder, "checkpoint.pt")
    strategy, start = maybe_load_checkpoint(build(case), checkpoint)
    experiences = experiences_of(case)
    for experience in experiences[start : int(stop)]:
        strategy.train(experience)
        save_checkpoint(strategy, checkpoint)
    if int(stop) == len(experiences):
        torch.save(outcome(strategy), Path(folder, "outcome.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
