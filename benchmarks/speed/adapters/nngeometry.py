"""nngeometry: ``PMatEKFAC`` with its diagonal updated."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed import names
from benchmarks.speed.adapters.data import loader
from benchmarks.speed.cases import Problem
from benchmarks.speed.contenders import Estimation


def prepare(problem: Problem, fisher: str) -> Estimation:
    """Estimate the layers that it is told, each weight together with its bias."""
    problem.freeze_other_parameters()
    metrics = import_module("nngeometry.metrics")
    representation = import_module("nngeometry.object").PMatEKFAC
    metric = metrics.FIM_MonteCarlo if fisher == names.MC else metrics.FIM
    settings = settings_for(problem, fisher)
    data = loader(problem)

    def estimate(seed: int) -> float:
        torch.manual_seed(seed)
        matrix = metric(problem.model, data, representation, **settings)
        matrix.update_diag(data)
        # An average over examples of the summed loss of each.
        return float(matrix.trace()) / problem.labels_per_example

    return estimate


def settings_for(problem: Problem, fisher: str) -> dict[str, Any]:
    """Its layers, and how it is to understand the outputs."""
    layers = import_module("nngeometry.layercollection").LayerCollection()
    for module in problem.known_layers:
        layers.add_layer_from_model(problem.model, module)
    settings: dict[str, Any] = {"layer_collection": layers, "variant": "classif_logits"}
    if problem.labels_per_example > 1 and fisher == names.MC:

        def scores_of_pixels(*batch: Tensor) -> Tensor:
            scores: Tensor = problem.model(batch[0])
            return scores.unsqueeze(-1)

        settings |= {"variant": "segmentation_logits", "function": scores_of_pixels}
    return settings
