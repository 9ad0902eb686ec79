"""``study-drift``: how far a network's old answers move, and how far a penalty sees them move."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from benchmarks.command import keep, load, make_folder, print_table, use_threads
from benchmarks.configuration import DataRoot, Steps, default_data_root
from benchmarks.option_types import Folder, Seeds, Threads, number, several

if TYPE_CHECKING:
    from torch import Tensor, nn

    from benchmarks.configuration import Configuration
    from benchmarks.scenarios import Scenario
    from rotate_ewc import EKFACPenalty

NAME = "drift"
FORMAT = "rotate_ewc.benchmarks.drift/1"
SPLIT = "split_mnist"
TASKS = (2, 5, 10)  # that ten digits can be shared out to, and of which some are old


@dataclass(frozen=True, kw_only=True)
class Options(Steps):
    """Learn two digits after two others, all with one head, and look back after every task.

    For every old task, prints how far the softened answers to its images have moved since it was
    learned, and how far they seem to have moved to the penalty of that task alone, and to its exact
    Gauss-Newton matrix. Accuracies are those of training images that are held out. Writes
    drift.json (after every stream), and prints a table.

    Attributes:
        damping: Dampings of the penalty to compare.
        seeds: A stream is learned with each; a seed determines initial weights and orders.
        data_root: Where the data are, or are downloaded to.
        output: Where results go.
        threads: CPU threads of PyTorch.
    """

    damping: Annotated[tuple[float, ...], several(number(zero=True))] = (0.0, 0.03)
    seeds: Seeds = (0,)
    data_root: DataRoot = field(default_factory=default_data_root)
    output: Folder = Path("results")
    threads: Threads = None

    def __post_init__(self) -> None:
        """Refuse numbers of tasks that ten digits cannot be shared out to, or none of them old."""
        if self.tasks not in (None, *TASKS):
            raise ValueError(
                f"--tasks: expected one of {', '.join(map(str, TASKS))}, got {self.tasks}"
            )


@dataclass(frozen=True)
class Look:
    """One old task after a later one; all distances are quadratic, of softened predictions."""

    after: int  # number of the task that has just been learned, from 1
    old: int  # number of the old task
    accuracy: float
    penalty: float  # distance according to the old task's own snapshot, without damping
    exact: float  # according to its exact Gauss-Newton matrix
    actual: float  # what it is


@dataclass(frozen=True)
class Stream:
    """One stream, with everything that was seen of it."""

    damping: float
    seed: int
    looks: list[Look]


def run(options: Options) -> int:
    """Learn every stream, and present what was seen."""
    make_folder(options.output)
    use_threads(options.threads)
    configuration, data = load(options, SPLIT, options.data_root, increment="class", validate=True)
    from benchmarks.scenarios import make_scenario

    results = options.output / f"{NAME}.json"
    streams = (
        learn(make_scenario(configuration, data, seed), configuration, damping, seed)
        for damping in options.damping
        for seed in options.seeds
    )
    found = keep(streams, results, {"format": FORMAT})
    names = ("damping", "seed", "after", "old task")
    headings = ("accuracy [%]", "snapshot", "exact", "actual")
    rows = (
        (
            *(f"{one.damping:g}", f"{one.seed}", f"{look.after}", f"{look.old}"),
            f"{100 * look.accuracy:.1f}",
            *(f"{distance:.2g}" for distance in (look.penalty, look.exact, look.actual)),
        )
        for one in found
        for look in one.looks
    )
    print_table("How far old answers move", names, headings, rows)
    print(f"Wrote {results}.")
    return 0


def learn(
    scenario: "Scenario", configuration: "Configuration", damping: float, seed: int
) -> Stream:
    """Learn all tasks under the penalty, and look back after each."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

    from benchmarks.methods import METHODS, make_optimizer
    from benchmarks.models import make_model
    from rotate_ewc import EKFACPenalty

    torch.manual_seed(seed)
    model, loss = make_model(scenario, configuration.hidden), nn.CrossEntropyLoss()
    optimizer = make_optimizer(model, configuration, METHODS["rotated-ewc"])
    penalty = EKFACPenalty(damping=damping)
    penalty.attach(optimizer, model)
    learned: list[Learned] = []
    looks: list[Look] = []
    for task, examples in enumerate(scenario.training_sets()):
        loader = DataLoader(examples, configuration.batch_size, shuffle=True)
        for _ in range(configuration.epochs):
            for images, targets in loader:
                optimizer.zero_grad()
                loss(model(images), targets).backward()
                optimizer.step()
        looks += [one.look(model, after=task + 1) for one in learned]
        alone = EKFACPenalty(1.0, damping=0.0)
        for one in (penalty, alone):
            one.consolidate(model, loss, DataLoader(examples, 1000))
        alone.current_num_data = len(examples)
        learned.append(Learned(model, alone, task + 1, *scenario.test_set(task)))
    return Stream(damping, seed, looks)


class Learned:
    """What is kept of a task, to look back at it."""

    def __init__(
        self,
        model: "nn.Module",
        penalty: "EKFACPenalty",
        number: int,
        images: "Tensor",
        targets: "Tensor",
    ) -> None:
        """Keep the parameters, and the answers to images that were held out."""
        self._penalty, self._number = penalty, number
        self._images, self._targets = images, targets
        self._anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
        (term,) = penalty.terms
        temperature = term.operator.provenance.settings["temperature"]
        assert isinstance(temperature, float)  # it has been found
        self._answers = model(images).detach()
        self._probabilities = (self._answers / temperature).softmax(dim=1)

    def look(self, model: "nn.Module", after: int) -> Look:
        """Measure how far the answers have moved, and by what they seem to have."""
        import torch
        from torch.func import functional_call, jvp

        moved = {n: p.detach() - self._anchor[n] for n, p in model.named_parameters()}
        # The first-order change of the answers: a derivative along the way, and no matrix of ours.
        with warnings.catch_warnings():
            # PyTorch's own: it compiles some of its derivatives.
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
            _, predicted, *_ = jvp(
                lambda parameters: functional_call(model, parameters, (self._images,)),
                (self._anchor,),
                (moved,),
            )
        with torch.no_grad():
            answers = model(self._images)
            return Look(
                after,
                self._number,
                float((answers.argmax(dim=1) == self._targets).double().mean()),
                float(self._penalty(model)),
                self._distance(predicted),
                self._distance(answers - self._answers),
            )

    def _distance(self, change: "Tensor") -> float:
        """`½ zᵀ (diag(p) - p pᵀ) z`, the mean over images, for changes z of the logits."""
        p = self._probabilities
        of_squares, mean = (p * change.square()).sum(dim=1), (p * change).sum(dim=1)
        return float((of_squares - mean.square()).mean()) / 2
