"""``study-processes``: what two processes, and by count more of them, save of an estimation."""

import os
import signal
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any
from unittest import mock

from benchmarks.command import CommandError, keep, make_folder, print_table
from benchmarks.option_types import Count, Folder, some_of, whole_number
from benchmarks.speed import names

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.speed.cases import Batch, Workload

NAME, FOUND = "processes", "found.pt"
FORMAT = "rotate_ewc.benchmarks.processes/1"
CASES = (names.SMALL_MLP, names.CNN, names.TRANSFORMER)
PLANNED = (8, 16, 32, 64)
MIB = 2**20
# Labels are sampled anew where a process cannot tell which examples of all it has.
TOLERANCE = 0.1
COLLECTIVES = ("all_reduce", "reduce", "broadcast")
STEPS = PLAIN, WHOLE, SHARED = ("plain", "whole everywhere", "a share each")
CALLS = 5


@dataclass(frozen=True, kw_only=True)
class Options:
    """Estimate matrices in one process, and in several that have a part of the batches each.

    All have one thread and talk through gloo; in every round one process estimates alone, and then
    all do together. Tells how much faster they are, in the passes over the data and in the
    decompositions (of which each process has its own), and what a process sends. For more
    processes, seconds are planned: the passes divided by their number, the decompositions of the
    busiest, and what is exchanged at a given bandwidth.

    Then a penalty is attached to Adam, once whole in every process and once with ``sharded=True``,
    and steps with the same gradients everywhere are timed. Writes processes.json.

    Attributes:
        cases: Any of a, c and e, as the command speed has them.
        processes: How many.
        rounds: Number of rounds.
        fraction: Part of every case's examples.
        bandwidth: Bytes a second between any two processes, of what is planned.
        output: Folder for the results.
    """

    cases: Annotated[tuple[str, ...], some_of(CASES)] = CASES
    processes: Annotated[int, whole_number(2)] = 2
    rounds: Count = 5
    fraction: float = 1.0
    bandwidth: float = 1.25e9
    output: Folder = Path("results")


@dataclass
class Share:
    """What one process did in one estimation."""

    seconds: float = 0.0  # from when all were ready until all were done
    decompositions: list[tuple[int, float]] = field(default_factory=list)  # size, seconds of eigh
    exchanged: int = 0  # bytes of the tensors that it sent
    memory: int = 0  # bytes by which the peak of resident memory was above what was there before
    trace: float = 0.0  # of the matrix

    @property
    def decomposing(self) -> float:
        """Seconds of all decompositions."""
        return sum(seconds for _, seconds in self.decompositions)


@dataclass
class Case:
    """What was measured of one case, in every round."""

    name: str
    alone: list[Share] = field(default_factory=list)  # of one process
    together: list[list[Share]] = field(default_factory=list)  # of all processes
    # Bytes of the layers' inputs and of the gradients of their outputs, over all examples.
    activations: int = 0
    # Seconds of the first process's optimizer steps: plain ones, with a penalty that is whole
    # everywhere, and with one of which each process has its share.
    steps: dict[str, list[float]] = field(default_factory=dict)
    # Bytes of these two penalties, in the process that keeps most.
    kept: dict[str, int] = field(default_factory=dict)

    def speedups(self) -> tuple[float, float, float]:
        """How much faster all are than one: as a whole, in the passes, in the decompositions.

        Medians over rounds; of decompositions, the busiest process's count.
        """
        ratios = []
        for one, all_ in zip(self.alone, self.together, strict=True):
            busiest = max(share.decomposing for share in all_)
            passes = (one.seconds - one.decomposing) / (all_[0].seconds - busiest)
            ratios.append((one.seconds / all_[0].seconds, passes, one.decomposing / busiest))
        whole, of_passes, of_decompositions = map(statistics.median, zip(*ratios, strict=True))
        return whole, of_passes, of_decompositions

    def exchanged(self) -> int:
        """Bytes that the busiest process sends."""
        return max(share.exchanged for share in self.together[0])

    def planned(self, processes: int, bandwidth: float) -> float:
        """How much faster so many processes would be.

        The largest decompositions go first, each to the idlest process. Nothing is said of passes
        over batches that are too few to be divided.
        """
        alone = sorted(self.alone, key=lambda one: one.seconds)[len(self.alone) // 2]
        busy = [0.0] * processes
        for _, seconds in sorted(alone.decompositions, reverse=True):
            busy[busy.index(min(busy))] += seconds
        passes = (alone.seconds - alone.decomposing) / processes
        return alone.seconds / (passes + max(busy) + self.exchanged() / bandwidth)


def run(options: Options) -> int:
    """Measure all cases, and print a table of them."""
    make_folder(options.output)
    results = options.output / f"{NAME}.json"
    found = keep(measure(options), results, {"format": FORMAT})
    times = ("alone [s]", f"{options.processes} processes", "passes", "decompositions")
    title = f"How many times as fast as one process, medians of {options.rounds} rounds"
    print_table(title, ["case"], times, map(times_of, found))
    sizes = ("peak, alone", "peak of each", "exchanged", "activations")
    print_table("Bytes of a process [MiB]", ["case"], sizes, map(sizes_of, found))
    print_table("Adam's steps, medians", ["case"], STEPS, map(steps_of, found))
    rows = (
        [one.name, *(f"× {one.planned(n, options.bandwidth):.1f}" for n in PLANNED)]
        for one in found
    )
    title = f"Planned at {options.bandwidth:g} bytes a second: times as fast as one process"
    print_table(title, ["case"], [f"{number} processes" for number in PLANNED], rows)
    print(f"Wrote {results}.")
    return 0


def times_of(case: Case) -> list[str]:
    """What is told of a case's times."""
    alone = statistics.median(one.seconds for one in case.alone)
    return [case.name, f"{alone:.2f}", *(f"× {ratio:.2f}" for ratio in case.speedups())]


def sizes_of(case: Case) -> list[str]:
    """What is told of its bytes."""
    alone, each = case.alone[0].memory, max(share.memory for share in case.together[0])
    sizes = (alone, each, case.exchanged(), case.activations)
    return [case.name, *(f"{size / MIB:.0f}" for size in sizes)]


def steps_of(case: Case) -> list[str]:
    """What is told of attached steps."""
    plain, *seconds = (1_000 * statistics.median(case.steps[kind]) for kind in STEPS)
    kept = (
        f"{one:.1f} ms, {case.kept[kind] / MIB:.1f} MiB"
        for kind, one in zip(STEPS[1:], seconds, strict=True)
    )
    return [case.name, f"{plain:.1f} ms", *kept]


def measure(options: Options) -> list[Case]:
    """Start the processes, and return what the first of them found."""
    import torch
    from torch.multiprocessing.spawn import ProcessException, spawn

    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_work, (folder, options), options.processes, daemon=True)  # type: ignore[no-untyped-call]
        except ProcessException as error:
            raise CommandError(f"a process has failed: {error}") from error
        found: list[Case] = torch.load(Path(folder) / FOUND, weights_only=False)
    return found


def _work(rank: int, folder: str, options: Options) -> None:
    """Take part in all cases, as one of the processes."""
    import torch
    import torch.distributed as dist

    from benchmarks.speed.cases import build

    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    torch.set_num_threads(1)
    address = f"file://{folder}/meeting"
    dist.init_process_group("gloo", address, rank=rank, world_size=options.processes)
    found = []
    for name in options.cases:
        workload = build(name, fraction=options.fraction)
        workload.freeze_other_parameters()
        part = workload.batches[rank :: options.processes]
        case = Case(name, activations=activations_of(workload) if rank == 0 else 0)
        # The first round, which does not count, brings libraries into memory.
        for number in range(options.rounds + 1):
            dist.barrier()
            alone = share_of(workload, workload.batches, None, number) if rank == 0 else Share()
            dist.barrier()
            together: list[Share] = [Share()] * options.processes
            own = share_of(workload, part, "auto", number)
            dist.all_gather_object(together, own)
            if rank == 0 and number:
                check_traces(name, alone, together)
                case.alone.append(alone)
                case.together.append(together)
        time_steps(workload, part, case, options.rounds)
        found.append(case)
    if rank == 0:
        torch.save(found, Path(folder) / FOUND)
    dist.barrier()
    dist.destroy_process_group()


def share_of(workload: "Workload", batches: "list[Batch]", group: Any, seed: int) -> Share:
    """Estimate a matrix, and tell what this process did for it."""
    from benchmarks.speed.measuring import peak_growth
    from rotate_ewc import EKFACLinearOperator

    share = Share()
    with watched(share):
        start = perf_counter()
        operator, share.memory = peak_growth(
            lambda: EKFACLinearOperator(
                workload.model,
                workload.criterion,
                workload.known_parameters,
                batches,
                fisher_type="mc",
                seed=seed,
                check_deterministic=False,
                group=group,
            )
        )
        share.seconds = perf_counter() - start
    share.trace = float(operator.trace)
    return share


def time_steps(workload: "Workload", batches: "list[Batch]", case: Case, rounds: int) -> None:
    """Time Adam's steps, plain and with a penalty attached, in turns."""
    import torch
    import torch.distributed as dist

    from rotate_ewc import EKFACPenalty

    parameters = [p for p in workload.model.parameters() if p.requires_grad]
    penalties = {kind: EKFACPenalty(1.0, sharded=kind == SHARED) for kind in (WHOLE, SHARED)}
    for kind, penalty in penalties.items():
        penalty.consolidate(workload.model, workload.criterion, batches)
        sizes: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(sizes, penalty.nbytes)
        case.kept[kind] = max(sizes)
    generator = torch.Generator().manual_seed(0)
    for number in range(rounds + 1):
        for kind in STEPS:
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer = torch.optim.Adam(parameters)
            if kind != PLAIN:
                penalties[kind].attach(optimizer, workload.model)
            optimizer.step()  # makes its state
            dist.barrier()
            start = perf_counter()
            for _ in range(CALLS):
                optimizer.step()
            dist.barrier()
            if number:
                seconds = (perf_counter() - start) / CALLS
                case.steps.setdefault(kind, []).append(seconds)


def check_traces(name: str, alone: Share, together: Sequence[Share]) -> None:
    """Raise unless all have the same matrix, but for sampled labels that of one process."""
    traces = [share.trace for share in together]
    if len(set(traces)) > 1 or abs(traces[0] / alone.trace - 1) > TOLERANCE:
        raise RuntimeError(
            f"case {name}: the traces are {traces} in the processes, and {alone.trace} in one "
            f"alone; expected the same"
        )


@contextmanager
def watched(share: Share) -> Iterator[None]:
    """Note every ``torch.linalg.eigh``, and the bytes of all tensors that this process sends."""
    import torch
    import torch.distributed as dist

    def timed(eigh: Callable[..., Any], matrix: Any, *args: Any, **kwargs: Any) -> Any:
        start = perf_counter()
        try:
            return eigh(matrix, *args, **kwargs)
        finally:
            share.decompositions.append((matrix.shape[-1], perf_counter() - start))

    def counted(collective: Callable[..., Any], tensor: Any, *args: Any, **kwargs: Any) -> Any:
        receives = collective.__name__ == "broadcast" and args[0] != dist.get_rank()
        share.exchanged += 0 if receives else tensor.nbytes
        return collective(tensor, *args, **kwargs)

    with ExitStack() as stack:
        patches = [(torch.linalg, "eigh", timed), *((dist, name, counted) for name in COLLECTIVES)]
        for module, name, instead in patches:
            watching = partial(instead, getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, watching))
        yield


def activations_of(workload: "Workload") -> int:
    """Bytes of the layers' inputs and of their outputs' gradients, if they were sent instead."""
    import torch

    counted: list[int] = []

    def count(_: "nn.Module", inputs: tuple[Any, ...], output: Any) -> None:
        counted.append(inputs[0].nbytes + output.nbytes)

    hooks = [layer.register_forward_hook(count) for layer in workload.known_layers]
    with torch.no_grad():
        workload.model(workload.batches[0][0])
    for hook in hooks:
        hook.remove()
    return sum(counted) * len(workload.batches)
