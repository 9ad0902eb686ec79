"""kronfluence: the ``ekfac`` strategy with the empirical Fisher matrix."""

import logging
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.peers.adapters.adapter import (
    Adapter,
    Mode,
    RoundTrip,
    all_equal,
    canonical_names,
    moved_model,
    weights,
)
from benchmarks.peers.problem import DTYPE, Problem, collate
from benchmarks.peers.verdict import BlockEstimate, NotOffered

FACTORS = "factors"


class Kronfluence(Adapter):
    """Its other Fisher matrix samples labels, and has no exact value to compare with."""

    package: ClassVar[str] = "kronfluence"
    title: ClassVar[str] = "kronfluence"
    module: ClassVar[str] = "kronfluence"
    modes: ClassVar[tuple[Mode, ...]] = (Mode("empirical", "empirical"),)
    raisers: ClassVar[tuple[str, ...]] = ("kronfluence",)

    def estimate(self, problem: Problem, mode: Mode, model: nn.Module) -> list[BlockEstimate]:
        """Fit the factors in a temporary folder, and read them from there."""
        canonical = canonical_names(model)
        with tempfile.TemporaryDirectory() as folder:
            analyzer = self._fitted(problem, model, Path(folder))
            return read_blocks(analyzer, canonical)

    def round_trip(self, problem: Problem, folder: Path) -> RoundTrip:
        """Fitting saves safetensors; another analyzer, of the moved model, reads them."""
        model = problem.model()
        canonical = canonical_names(model)
        fitted = read_blocks(self._fitted(problem, model, folder), canonical)
        moved = moved_model(problem)
        before = weights(moved)
        prepared, analyzer = self._analyzer(problem, moved, folder)
        kept = [p for n, p in prepared.named_parameters() if not n.endswith("_constant")]
        loaded = read_blocks(analyzer, canonical)
        factors = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"]
        return RoundTrip(
            without_pickle=all(path.suffix == ".safetensors" for path in factors),
            same=all_equal([b.matrix for b in fitted], [b.matrix for b in loaded]),
            weights_kept=all_equal(before, kept),
        )

    def _fitted(self, problem: Problem, model: nn.Module, folder: Path) -> Any:
        if problem.drop_last or problem.one_shot:
            raise NotOffered("it makes its batches from a data set by itself")
        arguments = import_module("kronfluence.arguments")
        dataset = import_module("kronfluence.utils.dataset")
        _, analyzer = self._analyzer(problem, model, folder)
        analyzer.fit_all_factors(
            factors_name=FACTORS,
            dataset=TensorDataset(*problem.data()),
            per_device_batch_size=problem.batch_size,
            dataloader_kwargs=dataset.DataLoaderKwargs(collate_fn=collate),
            factor_args=arguments.FactorArguments(
                strategy="ekfac",
                use_empirical_fisher=True,
                has_shared_parameters=problem.shared,
                activation_covariance_dtype=DTYPE,
                gradient_covariance_dtype=DTYPE,
                eigendecomposition_dtype=DTYPE,
                per_sample_gradient_dtype=DTYPE,
                lambda_dtype=DTYPE,
            ),
        )
        return analyzer

    def _analyzer(self, problem: Problem, model: nn.Module, folder: Path) -> tuple[nn.Module, Any]:
        module = import_module("kronfluence.analyzer")
        task = make_task(problem, tracked_modules(problem, model))
        prepared: nn.Module = module.prepare_model(model, task)
        analyzer = module.Analyzer(
            analysis_name="analysis",
            model=prepared,
            task=task,
            cpu=True,
            log_level=logging.CRITICAL,
            disable_tqdm=True,
            output_dir=str(folder),
        )
        return prepared, analyzer


def tracked_modules(problem: Problem, model: nn.Module) -> list[str] | None:
    """All modules it supports, or those named, or those to be estimated with all parameters."""
    if not problem.left_out:
        named: list[str] | None = problem.settings.get("kronfluence", {}).get("modules")
        return named
    names = []
    for name, module in model.named_modules():
        own = [p.requires_grad for p in module.parameters(recurse=False)]
        if all(own) and own:
            names.append(name)
        elif any(own):
            raise NotOffered("whole layers only")
    return names


def make_task(problem: Problem, tracked: list[str] | None) -> Any:
    """The task: the summed loss, as its documentation asks for."""
    loss = problem.loss_for("empirical")

    class PeerTask(import_module("kronfluence.task").Task):  # type: ignore[misc]
        """The problem as a task."""

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            """The loss of the labels given."""
            inputs, targets = batch
            value: Tensor = loss(model(inputs), targets)
            return value

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            """Never used: there are no queries."""
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str] | None:
            """The modules to be estimated."""
            return tracked

    return PeerTask()


def read_blocks(analyzer: Any, canonical: dict[str, str]) -> list[BlockEstimate]:
    """Put the saved factors together: the sums over examples, a bias as the last column."""
    bases = analyzer.load_eigendecomposition(FACTORS)
    lambdas = analyzer.load_lambda_matrices(FACTORS)["lambda_matrix"]
    blocks = []
    for module, eigenvalues in lambdas.items():
        basis_in = bases["activation_eigenvectors"][module]
        basis_out = bases["gradient_eigenvectors"][module]
        basis = torch.kron(basis_out.contiguous(), basis_in.contiguous())
        matrix = basis @ torch.diag(eigenvalues.flatten()) @ basis.T
        d_out, d_in = eigenvalues.shape
        entries = torch.arange(d_out * d_in).reshape(d_out, d_in)
        names = [f"{module}.weight"]
        order = entries.flatten()
        if f"{module}.bias" in canonical:
            names.append(f"{module}.bias")
            order = torch.cat([entries[:, :-1].flatten(), entries[:, -1]])
        parameters = tuple(canonical[name] for name in names)
        blocks.append(BlockEstimate(parameters, matrix[order][:, order]))
    return blocks
