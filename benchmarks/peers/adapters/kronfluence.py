"""kronfluence: the ``ekfac`` strategy, with the empirical Fisher matrix."""

import logging
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.peers.adapters.adapter import Adapter, Mode, canonical_names, whole_layers
from benchmarks.peers.problem import DTYPE, Problem
from benchmarks.peers.verdict import BlockEstimate, NotOffered

FACTORS = "factors"
COVARIANCES = ("activation_covariance", "gradient_covariance")
QUANTITIES = (*COVARIANCES, "eigendecomposition", "per_sample_gradient", "lambda")
IN_FLOAT64 = {f"{quantity}_dtype": DTYPE for quantity in QUANTITIES}


class Kronfluence(Adapter):
    """Its Fisher matrix with sampled labels has no exact value to compare with."""

    package = module = title = "kronfluence"
    modes = (Mode("empirical", "empirical"),)
    raisers = ("kronfluence",)

    def estimate(self, problem: Problem, mode: Mode, model: nn.Module) -> list[BlockEstimate]:
        """Fit the factors in a temporary folder, and read them from there."""
        with tempfile.TemporaryDirectory() as folder:
            return _blocks(problem, model, Path(folder), fit=True)

    def save(self, problem: Problem, folder: Path) -> list[Tensor]:
        """Fitting saves safetensors."""
        return [one.matrix for one in _blocks(problem, problem.model(), folder, fit=True)]

    def load(self, problem: Problem, folder: Path, model: nn.Module) -> list[Tensor]:
        """Another analyzer reads them."""
        return [one.matrix for one in _blocks(problem, model, folder, fit=False)]


def _analyzer(
    model: nn.Module, loss: Callable[..., Tensor], tracked: list[str] | None, folder: Path
) -> Any:
    """Make an analyzer of a model with a summed loss, as its documentation asks for."""

    class ClassificationTask(import_module("kronfluence.task").Task):  # type: ignore[misc]
        """A model with a loss."""

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            """The loss of the labels given, which are all that the empirical matrix needs."""
            return loss(model(batch[0]), batch[1])

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            """Never used: there are no queries."""
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str] | None:
            """The modules to be estimated; None for all."""
            return tracked

    task, package = ClassificationTask(), import_module("kronfluence.analyzer")
    return package.Analyzer(
        analysis_name="analysis",
        model=package.prepare_model(model, task),
        task=task,
        cpu=True,
        log_level=logging.CRITICAL,
        disable_tqdm=True,
        output_dir=str(folder),
    )


def _fit(analyzer: Any, problem: Problem) -> None:
    """Fit all factors."""
    arguments = import_module("kronfluence.arguments")
    loader = import_module("kronfluence.utils.dataset").DataLoaderKwargs
    analyzer.fit_all_factors(
        factors_name=FACTORS,
        dataset=TensorDataset(*problem.data()),
        per_device_batch_size=problem.batch_size,
        dataloader_kwargs=loader(collate_fn=problem.collate),
        factor_args=arguments.FactorArguments(
            strategy="ekfac",
            use_empirical_fisher=True,
            has_shared_parameters=problem.shared,
            **IN_FLOAT64,
        ),
    )


def _blocks(problem: Problem, model: nn.Module, folder: Path, *, fit: bool) -> list[BlockEstimate]:
    """The empirical blocks of all modules it supports, those named, or those not left out."""
    if problem.drop_last or problem.one_shot:
        raise NotOffered("it makes its batches from a data set by itself")
    canonical, loss = canonical_names(model), problem.loss_for("empirical")
    tracked = whole_layers(model) if problem.left_out else None
    tracked = problem.settings.get("kronfluence", {}).get("modules", tracked)
    analyzer = _analyzer(model, loss, tracked, folder)
    if fit:
        _fit(analyzer, problem)
    # Put the saved factors together: the sums over examples, a bias as the last column.
    bases = analyzer.load_eigendecomposition(FACTORS)
    lambdas = analyzer.load_lambda_matrices(FACTORS)["lambda_matrix"]
    blocks = []
    for module, eigenvalues in lambdas.items():
        basis_in = bases["activation_eigenvectors"][module]
        basis_out = bases["gradient_eigenvectors"][module]
        basis = torch.kron(basis_out.contiguous(), basis_in.contiguous())
        matrix = basis @ torch.diag(eigenvalues.flatten()) @ basis.T
        entries = torch.arange(eigenvalues.numel()).reshape(eigenvalues.shape)
        own, order = [f"{module}.weight"], entries.flatten()
        if f"{module}.bias" in canonical:
            own.append(f"{module}.bias")
            order = torch.cat([entries[:, :-1].flatten(), entries[:, -1]])
        parameters = tuple(canonical[name] for name in own)
        blocks.append(BlockEstimate(parameters, matrix[order][:, order]))
    return blocks
