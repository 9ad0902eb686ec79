"""One run: a method learns all tasks of a scenario at one seed, and becomes a record."""

import warnings
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.avalanche_names import ReplayPlugin, avalanche_forward
from benchmarks.configuration import Configuration
from benchmarks.inspection import state_bytes
from benchmarks.methods import Variant, make_optimizer, make_plugin, make_strategy
from benchmarks.metrics import average_accuracy, backward_transfer, forgetting
from benchmarks.models import make_model
from benchmarks.results import Record
from benchmarks.scenarios import Scenario, training_experiences
from benchmarks.schedule import Schedule
from benchmarks.timing import Stopwatch, penalty_milliseconds, time_callback
from benchmarks.versions import versions
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

    own = [] if plugin is None else [plugin]
    # The schedule first, so that a proximal step is as long as the step that it follows.
    plugins = [*_schedule(configuration), *extra_plugins, *own, *_replay(configuration)]
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
        penalty_ms_per_step=penalty_milliseconds(plugin, strategy, experiences[-1]),
        state_bytes=state_bytes(plugin, strategy.model),
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


def _schedule(configuration: Configuration) -> list[Schedule]:
    """The plugin for a learning rate that changes, if it does."""
    decays = configuration.schedule == "linear"
    if not decays and not configuration.warm_up:
        return []
    return [Schedule(decays=decays, warm_up=configuration.warm_up)]


def _replay(configuration: Configuration) -> list[Any]:
    """The plugin for a buffer of old examples, if there is one."""
    return [ReplayPlugin(mem_size=configuration.replay)] if configuration.replay else []


def _train(
    strategy: Any,
    experiences: Sequence[Any],
    scenario: Scenario,
    stopwatch: Stopwatch,
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
