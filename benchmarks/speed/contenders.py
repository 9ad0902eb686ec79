"""Who estimates, and what can be said of each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.peers import adapters
from benchmarks.speed import names
from benchmarks.speed.cases import Estimate, InMemory, Workload

SMALL_BUDGET = 2**26


class Kind:
    """What a contender's time can be compared with."""

    SAME = "the same quantity"  # it computes what this package computes, and is compared with it
    THIN = "the same trace"  # it keeps fewer directions, with the same trace for the same labels
    MORE = "more parameters"  # the same, for more parameters
    OTHER = "another quantity"  # its time is shown for reference
    SCALE = "for scale"  # it computes no Fisher matrix at all


class PlainPass(adapters.Adapter):
    """Training without a step: what a pass over the data takes by itself."""

    package = module = "torch"

    def prepare(self, workload: Workload, fisher: str) -> Estimate:
        """Compute the gradient of the loss of every batch, for all parameters."""

        def run(seed: int) -> None:
            for inputs, targets in workload.batches:
                workload.model.zero_grad()
                workload.criterion(workload.model(inputs), targets).backward()

        return run


class Avalanche(adapters.Adapter):
    """The importances of ``EWCPlugin``, whatever the Fisher type; only their cost."""

    package, module = "avalanche-lib", "avalanche"

    def prepare(self, workload: Workload, fisher: str) -> Estimate:
        """Compute squares of batch-mean gradients, as the plugin does after an experience."""
        from benchmarks.avalanche_names import EWCPlugin

        plugin = EWCPlugin(ewc_lambda=1.0)
        optimizer = torch.optim.SGD(workload.trained_parameters, lr=0.1)
        data = workload.dataset()
        triples = InMemory(*data.tensors, torch.zeros(len(data), dtype=torch.int64))

        def estimate(seed: int) -> None:
            plugin.compute_importances(
                workload.model, workload.criterion, optimizer, triples, "cpu", workload.batch_size
            )
            workload.model.eval()  # it leaves the model in training mode

        return estimate


@dataclass(frozen=True)
class Contender:
    """One that is measured."""

    name: str
    adapter: adapters.Adapter
    kind: str = Kind.SAME
    remark: str = ""  # what it computes, for the table; empty for the same quantity
    options: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the adapter

    def prepare(self, workload: Workload, fisher: str) -> Estimate:
        """Make what is timed."""
        if self.kind in (Kind.SAME, Kind.THIN, Kind.OTHER):
            workload.freeze_other_parameters()
        return self.adapter.prepare(workload, fisher, **self.options)


OURS = adapters.RotateEWC()
WHOLE = {"rank": "full"}
LEAN = {**WHOLE, "memory_budget": SMALL_BUDGET}
DEFAULT, THIN = "long sides in thin bases", f"{names.THIN_RANK} directions of each side"
KRONECKER = "another quantity: Kronecker factors alone"
SQUARES = "another quantity: squares of batch-mean gradients"
CONTENDERS = (
    Contender(names.OURS, OURS, options=WHOLE),
    Contender(names.LEAN, OURS, Kind.SAME, "keeps no more than 32 MiB between its passes", LEAN),
    Contender(names.DEFAULT_RANK, OURS, Kind.THIN, DEFAULT),
    Contender(names.THIN, OURS, Kind.THIN, THIN, {"rank": names.THIN_RANK}),
    Contender(names.EVERYTHING, OURS, Kind.MORE, "what others do not know as well"),
    Contender(names.CURVLINOPS, adapters.Curvlinops()),
    Contender(names.NNGEOMETRY, adapters.NNGeometry()),
    Contender(names.LAPLACE, adapters.Laplace(), Kind.OTHER, KRONECKER),
    Contender(names.AVALANCHE, Avalanche(), Kind.OTHER, SQUARES),
    Contender(names.PLAIN, PlainPass(), Kind.SCALE, "forward and backward of the loss"),
)
BY_NAME = {contender.name: contender for contender in CONTENDERS}
