"""nngeometry: ``PMatEKFAC`` with its diagonal updated, and ``PMatDiag`` where that is of no use."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.adapters import adapter
from benchmarks.peers.adapters.adapter import Adapter, Mode, canonical_names, whole_layers
from benchmarks.peers.exact import mean_divisor
from benchmarks.peers.problem import DTYPE, Problem
from benchmarks.peers.verdict import BlockEstimate, NotOffered, Structure
from benchmarks.speed import names
from benchmarks.speed.cases import Estimate, Form, Workload

FILE = "matrix.pt"
# The closed forms of `FIM`, and what a loss's Hessian is in units of theirs.
VARIANTS: dict[type[nn.Module], tuple[str, float]] = {
    nn.CrossEntropyLoss: ("classif_logits", 1.0),
    nn.BCEWithLogitsLoss: ("classif_binary_logits", 1.0),
    nn.MSELoss: ("regression", 2.0),
}


class NNGeometry(Adapter):
    """The Fisher matrix of its closed forms, and the second moment of per-example gradients."""

    package = module = title = "nngeometry"
    modes = (
        Mode("type2", "type2"),
        Mode("empirical", "empirical"),
        Mode("diagonal", "type2", Structure.DIAGONAL, fallback=True),
    )
    raisers = ("nngeometry",)

    def estimate(self, problem: Problem, mode: Mode, model: nn.Module) -> list[BlockEstimate]:
        """Write out the matrix of every layer."""
        with float64_by_default():
            matrix, layers, scale = self._matrix(problem, mode, model)
            ekfac = mode.structure is Structure.EKFAC
            dense = matrix.to_torch() if ekfac else torch.diag(matrix.get_diag())
        canonical = canonical_names(model)
        blocks = []
        for layer, description in layers.layers.items():
            own = ("weight",) if description.bias is None else ("weight", "bias")
            first = layers.p_pos[layer]
            part = slice(first, first + description.numel())
            parameters = tuple(canonical[f"{layer}.{name}"] for name in own)
            blocks.append(BlockEstimate(parameters, scale * dense[part, part]))
        return blocks

    def save(self, problem: Problem, folder: Path) -> list[Tensor]:
        """Pickle the matrix, the only way it has of being saved."""
        with float64_by_default():
            matrix, _, _ = self._matrix(problem, self.modes[0], problem.model())
        torch.save(matrix, folder / FILE)
        return list(matrix.data[1].values())

    def load(self, problem: Problem, folder: Path, model: nn.Module) -> list[Tensor]:
        """Unpickle the matrix."""
        return list(torch.load(folder / FILE, weights_only=False).data[1].values())

    def _matrix(self, problem: Problem, mode: Mode, model: nn.Module) -> tuple[Any, Any, float]:
        """The matrix, its layers, and the factor to the scale of the loss."""
        if problem.one_shot:
            raise NotOffered("data are a DataLoader or one batch")
        if not isinstance(problem.seen()[0][0], Tensor):
            raise NotOffered("the first of a batch is a tensor with a row for every example")
        objects = import_module("nngeometry.object")
        if problem.left_out:
            layers = _collect(model, map(model.get_submodule, whole_layers(model)))
        else:
            layers = import_module("nngeometry.layercollection").LayerCollection.from_model(model)
        ekfac = mode.structure is Structure.EKFAC
        representation = objects.PMatEKFAC if ekfac else objects.PMatDiag
        build = _empirical if mode.fisher == "empirical" else _closed_form
        matrix, scale = build(problem, model, layers, representation)
        if ekfac:
            matrix.update_diag(problem.loader())
        return matrix, layers, scale

    def prepare(self, workload: Workload, fisher: str) -> Estimate:
        """Estimate the layers that it is told, each weight together with its bias."""
        make = _make_matrices(workload, fisher)

        def estimate(seed: int) -> float:
            torch.manual_seed(seed)
            # An average over examples of the summed loss of each.
            return float(make()[0].trace()) / workload.labels_per_example

        return estimate

    def quadratic_form(self, workload: Workload) -> Form:
        """``PMatEKFAC.vTMv``, of a mean over examples of the summed loss of each."""
        matrix, layers = _make_matrices(workload, names.MC)()
        sizes = {name: 1 + bool(layer.bias) for name, layer in layers.layers.items()}
        vector_of = import_module("nngeometry.object").PVector

        def form(deltas: Sequence[Tensor]) -> Tensor:
            rest = iter(deltas)
            parts = {name: tuple(next(rest) for _ in range(size)) for name, size in sizes.items()}
            value: Tensor = 0.5 * matrix.vTMv(vector_of(layer_collection=layers, dict_repr=parts))
            return value

        return form


def _make_matrices(workload: Workload, fisher: str) -> Callable[[], tuple[Any, Any]]:
    """A function that makes a matrix, and its layers."""
    metrics, objects = map(import_module, ("nngeometry.metrics", "nngeometry.object"))
    metric = metrics.FIM_MonteCarlo if fisher == names.MC else metrics.FIM
    layers = _collect(workload.model, workload.known_layers)
    settings: dict[str, Any] = {"layer_collection": layers, "variant": "classif_logits"}
    if workload.labels_per_example > 1 and fisher == names.MC:

        def scores_of_pixels(*batch: Tensor) -> Tensor:
            scores: Tensor = workload.model(batch[0])
            return scores.unsqueeze(-1)

        settings |= {"variant": "segmentation_logits", "function": scores_of_pixels}
    data = workload.loader()

    def make() -> tuple[Any, Any]:
        matrix = metric(workload.model, data, objects.PMatEKFAC, **settings)
        matrix.update_diag(data)
        return matrix, layers

    return make


def _collect(model: nn.Module, modules: Iterable[nn.Module]) -> Any:
    """Some of a model's layers."""
    layers = import_module("nngeometry.layercollection").LayerCollection()
    for module in modules:
        layers.add_layer_from_model(model, module)
    return layers


def _closed_form(
    problem: Problem, model: nn.Module, layers: Any, representation: Any
) -> tuple[Any, float]:
    """``FIM``: an average over examples, of the summed loss of each."""
    loss = problem.loss("mean")
    if adapter.has_options(loss) or problem.targets in ("some ignored", "probabilities"):
        raise NotOffered("FIM knows likelihoods, not the options of a loss")
    variant, unit = VARIANTS[type(loss)]
    matrix = import_module("nngeometry.metrics").FIM(
        model, problem.loader(), representation, variant=variant, layer_collection=layers
    )
    divisor = mean_divisor(problem) if problem.reduction == "mean" else 1.0
    return matrix, unit * len(problem.seen()) / divisor


def _empirical(
    problem: Problem, model: nn.Module, layers: Any, representation: Any
) -> tuple[Any, float]:
    """The second moment of the gradients of a function: here the loss of every example."""
    loss = problem.loss_for("empirical")

    def example_losses(inputs: Tensor, targets: Tensor) -> Tensor:
        outputs: Tensor = model(inputs)
        parts = (torch.split(tensor, problem.rows) for tensor in (outputs, targets))
        return torch.stack([loss(*pair) for pair in zip(*parts, strict=True)])[:, None]

    generator = import_module("nngeometry.backend").TorchHooksJacobianBackend(
        layer_collection=layers, model=model, function=example_losses
    )
    matrix = representation(generator=generator, examples=problem.loader())
    return matrix, float(len(problem.seen()))


@contextmanager
def float64_by_default() -> Iterator[None]:
    """Some of its buffers have the default dtype whatever the model's is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
