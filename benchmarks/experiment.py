"""One run: a method learns all tasks of a scenario at one seed, and becomes a record."""

import functools
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.avalanche_names import ReplayPlugin, SupervisedPlugin, avalanche_forward
from benchmarks.command import versions
from benchmarks.configuration import Configuration
from benchmarks.methods import Variant, make_optimizer, make_plugin, make_strategy
from benchmarks.metrics import average_accuracy, backward_transfer, forgetting
from benchmarks.models import make_model
from benchmarks.results import Record
from benchmarks.scenarios import Scenario, training_experiences
from rotate_ewc.errors import NotFiniteError

EVALUATION_BATCH_SIZE = 2_000


def run(
    variant: Variant,
    scenario: Scenario,
    configuration: Configuration,
    *,
    seed: int,
    extra_plugins: Sequence[Any] = (),
    quiet: bool = False,
) -> Record:
    """Train and test one method.

    The seed fixes the initial weights and the order of examples, so that all methods start alike;
    the scenario is to be made with the same. Extra plugins are called before the method's own, and
    so see the end of a task before it is consolidated.
    """
    torch.manual_seed(seed)
    device = torch.device(configuration.device)
    jointly = variant.method.trained_jointly
    model = make_model(scenario, configuration.hidden)
    experiences = training_experiences(scenario, jointly=jointly)
    examples = len(experiences[0].dataset)
    plugin = make_plugin(variant, configuration, seed=seed, examples=examples)
    training, estimation = Stopwatch(device), Stopwatch(device)
    if plugin is not None:
        time_callback(plugin, "after_training_exp", estimation)

    # The schedule first, so that everything in a step has its learning rate.
    plugins: list[Any] = [Schedule(configuration.schedule == "linear", configuration.warm_up)]
    plugins += [*extra_plugins] if plugin is None else [*extra_plugins, plugin]
    if configuration.replay:
        plugins.append(ReplayPlugin(mem_size=configuration.replay))
    optimizer = make_optimizer(model, configuration, variant.method)
    strategy = make_strategy(model, configuration, optimizer, plugins)
    title = "" if quiet else f"{variant.label}, seed {seed}"
    matrix, refused = _train(strategy, experiences, scenario, training, title)
    return Record(
        method=variant.name,
        label=variant.label,
        seed=seed,
        average_accuracy=average_accuracy(matrix),
        forgetting=None if jointly else forgetting(matrix),
        backward_transfer=None if jointly else backward_transfer(matrix),
        accuracy_matrix=matrix,
        training_seconds=training.seconds - estimation.seconds,
        estimation_seconds=estimation.seconds,
        state_bytes=state_bytes(plugin, strategy.model, strategy.optimizer),
        trained_jointly=jointly,
        configuration={
            **configuration.as_dict(),
            "data": scenario.data_source,
            "strength": variant.strength,
            "threads": torch.get_num_threads(),
        },
        versions=versions(),
        diverged=refused or diverged(strategy.model),
    )


def _train(
    strategy: Any,
    experiences: Sequence[Any],
    scenario: Scenario,
    stopwatch: "Stopwatch",
    title: str,
) -> tuple[list[list[float]], bool]:
    """Train on each experience; return accuracies ``[T][T]``, and if a snapshot was refused."""
    matrix: list[list[float]] = []
    refused = False
    jointly = len(experiences) < scenario.tasks
    for task, experience in enumerate(experiences):
        with stopwatch:
            refused |= not _train_once(strategy, experience)
        row = accuracies(strategy.model, scenario, strategy.device)
        matrix.append(row)
        if title:
            seen, done = (row, "all") if jointly else (row[: task + 1], f"task {task + 1} of")
            accuracy = f"average accuracy {fmean(seen):.2%}"
            print(f"{title}, {done} {scenario.tasks} tasks: {accuracy}", flush=True)
    return matrix * scenario.tasks if jointly else matrix, refused


def _train_once(strategy: Any, experience: Any) -> bool:
    """Train on one experience; say whether its end was reached with a network to consolidate."""
    try:
        with warnings.catch_warnings():
            # Avalanche's own replay buffer calls what Avalanche has deprecated.
            warnings.filterwarnings("ignore", "Call to deprecated", DeprecationWarning)
            strategy.train(experience)
    except ValueError as error:
        # No snapshot can be taken of a network that has diverged, nor of one that is about to,
        # whose squares overflow though its parameters do not.
        if not isinstance(error, NotFiniteError) and not diverged(strategy.model):
            raise
        return False
    return True


def diverged(model: nn.Module) -> bool:
    """Whether any parameter is not a number, or infinite."""
    return not all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def accuracies(model: nn.Module, scenario: Scenario, device: torch.device) -> list[float]:
    """Accuracy on the test set of every task, learned already or not: a row of the matrix."""
    return [
        accuracy(model, *scenario.test_set(task), device, task) for task in range(scenario.tasks)
    ]


@torch.inference_mode()
def accuracy(
    model: nn.Module, inputs: Tensor, labels: Tensor, device: torch.device, task: int = 0
) -> float:
    """Fraction of inputs ``[M, ...]`` whose largest logit is that of their class in ``[M]``.

    Avalanche's evaluation would load every image by itself, which takes longer than training.
    """
    was_training = model.training
    model.eval()
    correct = 0
    batches = (torch.split(tensor, EVALUATION_BATCH_SIZE) for tensor in (inputs, labels))
    for x, y in zip(*batches, strict=True):
        logits = avalanche_forward(model, x.to(device), torch.full((len(x),), task))
        correct += int((logits.argmax(1) == y.to(device)).sum().item())
    model.train(was_training)
    return correct / len(labels)


class Schedule(SupervisedPlugin, supports_distributed=True):  # type: ignore[misc, call-arg]
    """In every task, lets the learning rate rise from zero, and then stay or fall back to zero."""

    def __init__(self, decays: bool, warm_up: float) -> None:
        """Fall in a straight line or not, and rise for a part of each task, from 0 to 1."""
        super().__init__()
        self._decays = decays
        self._warm_up = warm_up
        self._full: list[float] = []
        self._steps = 1
        self._done = 0

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Start a task."""
        if not self._full:
            self._full = [group["lr"] for group in strategy.optimizer.param_groups]
        batches = ceil(len(strategy.experience.dataset) / strategy.train_mb_size)
        self._steps, self._done = strategy.train_epochs * batches, 0

    def before_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Set the rate of the next step."""
        scale = self.scale(self._done / self._steps)
        for group, full in zip(strategy.optimizer.param_groups, self._full, strict=True):
            group["lr"] = full * scale
        self._done += 1

    def scale(self, progress: float) -> float:
        """Return what the full rate is multiplied with, at some part of a task."""
        falling = max(0.0, 1.0 - progress) if self._decays else 1.0
        rising = min(1.0, progress / self._warm_up) if self._warm_up else 1.0
        return falling * rising


def state_bytes(plugin: Any | None, model: nn.Module, optimizer: Optimizer) -> int:
    """Bytes of all tensors that a plugin holds but the network's and the optimizer's.

    Shared memory counts once.
    """
    others = _tensors([model.state_dict(), optimizer], set())
    known = {tensor.untyped_storage().data_ptr() for tensor in others}
    kept = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in _tensors(plugin, set())
    }
    return sum(size for place, size in kept.items() if place not in known)


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that can be reached from a value through containers and attributes."""
    if id(value) in seen or value is None or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from _tensors(part, seen)


class Stopwatch:
    """Adds up the wall time of ``with`` blocks, work queued on an accelerator included."""

    def __init__(self, device: torch.device) -> None:
        """Start at zero; the queued work of the device counts."""
        self.seconds = 0.0
        self._device = device
        self._start = 0.0

    def __enter__(self) -> "Stopwatch":
        """Start."""
        self._synchronise()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop."""
        self._synchronise()
        self.seconds += time.perf_counter() - self._start

    def _synchronise(self) -> None:
        """Wait for what has been queued; the CPU queues nothing."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()


def time_callback(plugin: Any, callback: str, stopwatch: Stopwatch) -> None:
    """Have a stopwatch run whenever a callback of this one Avalanche plugin is called."""
    original = getattr(plugin, callback)

    @functools.wraps(original)
    def timed(*arguments: Any, **keywords: Any) -> Any:
        with stopwatch:
            return original(*arguments, **keywords)

    setattr(plugin, callback, timed)
