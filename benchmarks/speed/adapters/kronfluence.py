"""kronfluence: the ``ekfac`` strategy with sampled labels."""

import logging
import tempfile
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.speed import names
from benchmarks.speed.adapters.data import in_memory
from benchmarks.speed.cases import Problem
from benchmarks.speed.contenders import Estimation

FACTORS = "factors"


def prepare(problem: Problem, fisher: str) -> Estimation:
    """Fit the factors in a temporary folder, which is what it always does."""
    if fisher != names.MC:
        raise NotImplementedError("its Fisher matrix samples labels, or takes those of the data")
    problem.freeze_other_parameters()
    arguments = import_module("kronfluence.arguments")
    dataset = in_memory(problem)
    settings = import_module("kronfluence.utils.dataset").DataLoaderKwargs(
        collate_fn=dataset.collate_fn
    )
    task = _make_task()
    model = import_module("kronfluence.analyzer").prepare_model(problem.model, task)

    def estimate(seed: int) -> float:
        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            analyzer = _make_analyzer(model, task, folder)
            analyzer.fit_all_factors(
                factors_name=FACTORS,
                dataset=dataset,
                per_device_batch_size=len(problem.batches[0][0]),
                dataloader_kwargs=settings,
                factor_args=arguments.FactorArguments(
                    strategy="ekfac",
                    use_empirical_fisher=False,
                    has_shared_parameters=False,
                ),
            )
            eigenvalues = analyzer.load_lambda_matrices(FACTORS)["lambda_matrix"]
        # Sums over examples, of a loss that is a sum.
        total = sum(float(one.sum()) for one in eigenvalues.values())
        return total / problem.examples / problem.labels_per_example

    return estimate


def _make_analyzer(model: nn.Module, task: Any, folder: str) -> Any:
    return import_module("kronfluence.analyzer").Analyzer(
        analysis_name="analysis",
        model=model,
        task=task,
        cpu=True,
        log_level=logging.CRITICAL,
        disable_tqdm=True,
        output_dir=folder,
    )


def _make_task() -> Any:
    """The task: the summed loss, as its documentation asks for."""

    class ClassificationTask(import_module("kronfluence.task").Task):  # type: ignore[misc]
        """Classification of examples, or of their tokens."""

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            """The loss of the labels given, or of labels that the model draws."""
            inputs, targets = batch
            scores = model(inputs)
            if sample:
                with torch.no_grad():
                    probabilities = scores.movedim(1, -1).softmax(-1)
                    drawn = probabilities.flatten(0, -2).multinomial(1)
                    targets = drawn.reshape(targets.shape)
            return F.cross_entropy(scores, targets, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            """Never used: there are no queries."""
            return self.compute_train_loss(batch, model)

    return ClassificationTask()
