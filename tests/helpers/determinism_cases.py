"""Snapshots and training runs that must come out the same bit for bit, also in another process.

Run as a program it does its part of a test: it takes snapshots, or goes on with saved runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rotate_ewc import Attachment, EKFACLinearOperator, EKFACPenalty
from tests.helpers.exact import exact_penalty

CE: Final = nn.CrossEntropyLoss()


# ------------------------------------------------------------------ snapshots


class Transformer(nn.Module):
    """Tokens → one prediction, by attention and with layer normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 16), nn.Parameter(0.1 * torch.randn(6, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.layer(self.tokens(x) + self.positions)
        prediction: Tensor = self.head(hidden.mean(dim=1))
        return prediction


def mlp() -> nn.Module:
    """Layers that are wide enough to be worked on by panels, and by several threads."""
    return nn.Sequential(nn.Linear(200, 130), nn.Tanh(), nn.Linear(130, 5))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(54, 5),
    )


MODELS: Final[dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]] = {
    "mlp": (mlp, (200,)),
    "cnn": (cnn, (2, 8, 8)),
    "transformer": (Transformer, (6,)),
}
FISHERS: Final = ("type2", "mc", "empirical")
# Captured batches are kept, are not, and even the gradients of a batch are taken in several parts.
BUDGETS: Final = (2**30, 2**18, 1)


@dataclass(frozen=True)
class Estimation:
    """What is estimated, and how."""

    model: str
    fisher: str
    joint: bool
    budget: int

    def __str__(self) -> str:
        return f"{self.model}-{self.fisher}-{'joint' if self.joint else 'separate'}-{self.budget}"

    def build(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return MODELS[self.model][0]()

    def data(self, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
        """Batches of different sizes."""
        generator = torch.Generator().manual_seed(seed)
        shape = MODELS[self.model][1]
        return [(self._inputs((n, *shape), generator), _labels(n, generator)) for n in (7, 12, 1)]

    def _inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if self.model == "transformer":
            return torch.randint(11, shape, generator=generator)
        return torch.randn(shape, generator=generator)

    def options(self) -> dict[str, Any]:
        return {
            "fisher_type": self.fisher,
            "separate_weight_and_bias": not self.joint,
            "memory_budget": self.budget,
            "seed": 4,
        }

    def operator(self, model: nn.Module, data: Any) -> EKFACLinearOperator:
        params = list(model.parameters())
        return EKFACLinearOperator(
            model, CE, params, data, check_deterministic=False, **self.options()
        )

    def snapshot(self) -> dict[str, Any]:
        return self.operator(self.build(), self.data()).state_dict()


# All pairs of choices: budgets as in a Latin square, and in every row and column of it both forms.
ESTIMATIONS: Final = [
    Estimation(model, fisher, m == f, BUDGETS[(m + f) % len(BUDGETS)])
    for m, model in enumerate(MODELS)
    for f, fisher in enumerate(FISHERS)
]


def _labels(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(5, (count,), generator=generator)


# ------------------------------------------------------------------ training runs

STEPS: Final = 8
EVERY: Final = 3
# A task is its steps, and then its consolidation.
EVENTS: Final = STEPS + 1
# The third task is only begun: so far that the penalty of two has been obeyed, and refreshed.
END: Final = 2 * EVENTS + EVERY + 1
# In the first task, before and after a consolidation, right after a refresh, between two.
STOPS: Final = (5, STEPS, EVENTS, EVENTS + EVERY, EVENTS + EVERY + 1)


@dataclass(frozen=True)
class Run:
    """How a run is trained and protected."""

    way: str
    optimizer: str
    mode: str = "merged"
    joint: bool = False

    def __str__(self) -> str:
        joint = "joint" if self.joint else "separate blocks"
        return f"{self.way}, {self.optimizer}, {self.mode}, {joint}"


RUNS: Final = [
    *(Run("loss", name, mode) for name in ("sgd", "adam") for mode in ("merged", "separate")),
    *(Run(way, name) for way in ("rotated", "tangent", "gradient") for name in ("sgd", "adam")),
    *(
        Run(way, name, joint=True)
        for way, name in (("loss", "adam"), ("tangent", "sgd"), ("rotated", "adam"))
    ),
]

# Every run is stopped twice, and ways of training at all stops.
STOPPED: Final = [
    (run, STOPS[(2 * number + turn) % len(STOPS)])
    for number, run in enumerate(sorted(RUNS, key=str))
    for turn in range(2)
]


class Training:
    """A plain loop over three tasks, of which every step can be the last one of a process."""

    def __init__(self, run: Run) -> None:
        self.run = run
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Sequential(
                nn.Linear(9, 20), nn.LayerNorm(20), nn.ReLU(), nn.Dropout(0.2), nn.Linear(20, 4)
            )
        self.penalty = exact_penalty(
            2.0, mode=run.mode, separate_weight_and_bias=not run.joint, decay=0.9
        )
        self.optimizer = self._optimizer()
        self.handle: Attachment[EKFACPenalty] | None = None
        if run.way != "loss":
            every = EVERY if run.way == "tangent" or run.optimizer == "sgd" else 1
            every = 1 if run.way == "gradient" else every
            self.handle = self.penalty.attach(self.optimizer, self.model, run.way, every)
        self.done = 0

    def _optimizer(self) -> Optimizer:
        if self.run.optimizer == "adam":
            return torch.optim.Adam(self.model.parameters(), lr=0.01)
        return torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def until(self, end: int) -> None:
        """Train; the random state decides which units are dropped."""
        while self.done < end:
            task, step = divmod(self.done, EVENTS)
            if step < STEPS:
                self._step(*batch(task, step))
            else:
                self.penalty.consolidate(self.model, CE, [batch(task, s) for s in range(4)])
            self.done += 1

    def _step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = CE(self.model(x), y)
        if self.handle is None:
            loss = loss + self.penalty(self.model)
        loss.backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """What has to be saved to go on."""
        return {
            "done": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "penalty": self.penalty.state_dict(),
            "handle": {} if self.handle is None else self.handle.state_dict(),
            "random": torch.get_rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.penalty.load_state_dict(state["penalty"])
        if self.handle is not None:
            self.handle.load_state_dict(state["handle"])
        torch.set_rng_state(state["random"])

    def outcome(self) -> dict[str, Any]:
        """Everything, with the penalty's value and the gradient of it."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.01)
        value = self.penalty(self.model)
        gradients = torch.autograd.grad(value, list(self.model.parameters()))
        return {**self.state(), "value": value.detach(), "gradients": list(gradients)}


def batch(task: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * task + step)
    x = torch.randn(16, 9, generator=generator)
    return x + task, torch.randint(4, (16,), generator=generator)


# ------------------------------------------------------------------ bits


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what nested dictionaries and lists hold, with the way to it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}/{index}")
    else:
        yield path, value


def differences(found: Any, expected: Any) -> list[str]:
    """Return where two nested results are not the same, bit for bit."""
    first, second = dict(leaves(found)), dict(leaves(expected))
    ways = {*first} ^ {*second}
    return sorted(ways | {way for way in {*first} & {*second} if not same(first[way], second[way])})


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        kind = (first.dtype, first.shape) == (second.dtype, second.shape)
        return kind and bits(first) == bits(second)
    return type(first) is type(second) and bool(first == second)


def bits(tensor: Tensor) -> bytes:
    content: bytes = tensor.detach().contiguous().numpy().tobytes()
    return content


def main(folder: str, threads: str) -> None:
    """Estimate, and go on from what the other process left in a folder."""
    torch.set_num_threads(int(threads))
    torch.manual_seed(987)
    snapshots = {str(case): case.snapshot() for case in ESTIMATIONS}
    resumed = {}
    for run, stop in STOPPED:
        training = Training(run)
        training.load(torch.load(Path(folder) / f"{run} {stop}.pt", weights_only=True))
        training.until(END)
        resumed[f"{run} {stop}"] = training.outcome()
    torch.save({"snapshots": snapshots, "resumed": resumed}, Path(folder) / "found.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
