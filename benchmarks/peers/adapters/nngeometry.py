"""nngeometry: ``PMatEKFAC`` with its diagonal updated, and ``PMatDiag`` beside it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.peers.adapters.adapter import (
    Adapter,
    Mode,
    RoundTrip,
    all_equal,
    canonical_names,
    moved_model,
    readable_without_pickle,
    weights,
)
from benchmarks.peers.exact import mean_divisor
from benchmarks.peers.problem import DTYPE, Problem
from benchmarks.peers.verdict import BlockEstimate, NotOffered, Structure

# The closed forms of `FIM`, and what a loss's Hessian is in units of theirs.
VARIANTS: dict[type[nn.Module], tuple[str, float]] = {
    nn.CrossEntropyLoss: ("classif_logits", 1.0),
    nn.BCEWithLogitsLoss: ("classif_binary_logits", 1.0),
    nn.MSELoss: ("regression", 2.0),
}


class NNGeometry(Adapter):
    """The Fisher matrix of its closed forms, and the second moment of per-example gradients."""

    package: ClassVar[str] = "nngeometry"
    title: ClassVar[str] = "nngeometry"
    module: ClassVar[str] = "nngeometry"
    modes: ClassVar[tuple[Mode, ...]] = (
        Mode("type2", "type2"),
        Mode("empirical", "empirical"),
        Mode("diagonal", "type2", Structure.DIAGONAL, fallback=True),
    )
    raisers: ClassVar[tuple[str, ...]] = ("nngeometry",)

    def estimate(self, problem: Problem, mode: Mode, model: nn.Module) -> list[BlockEstimate]:
        """Write out the matrix of every layer."""
        with float64_by_default():
            matrix, layers, scale = self._matrix(problem, mode, model)
            if mode.structure is Structure.EKFAC:
                dense = matrix.to_torch()
            else:
                dense = torch.diag(matrix.get_diag())
        canonical = canonical_names(model)
        blocks = []
        for layer, description in layers.layers.items():
            names = [f"{layer}.weight"]
            if description.bias is not None:
                names.append(f"{layer}.bias")
            first = layers.p_pos[layer]
            part = slice(first, first + description.numel())
            parameters = tuple(canonical[name] for name in names)
            blocks.append(BlockEstimate(parameters, scale * dense[part, part]))
        return blocks

    def round_trip(self, problem: Problem, folder: Path) -> RoundTrip:
        """Pickle the matrix, the only way it has of being saved."""
        with float64_by_default():
            matrix, _, _ = self._matrix(problem, self.modes[0], problem.model())
        path = folder / "matrix.pt"
        torch.save(matrix, path)
        model = moved_model(problem)
        before = weights(model)
        loaded = torch.load(path, weights_only=False)
        return RoundTrip(
            without_pickle=readable_without_pickle(path),
            same=all_equal(list(matrix.data[1].values()), list(loaded.data[1].values())),
            weights_kept=all_equal(before, weights(model)),
        )

    def _matrix(self, problem: Problem, mode: Mode, model: nn.Module) -> tuple[Any, Any, float]:
        """The matrix, its layers, and the factor to the scale of the loss."""
        if problem.one_shot:
            raise NotOffered("data are a DataLoader or one batch")
        objects = import_module("nngeometry.object")
        layers = self._layers(problem, model)
        ekfac = mode.structure is Structure.EKFAC
        representation = objects.PMatEKFAC if ekfac else objects.PMatDiag
        build = self._empirical if mode.fisher == "empirical" else self._closed_form
        matrix, scale = build(problem, model, layers, representation)
        if ekfac:
            matrix.update_diag(problem.loader())
        return matrix, layers, scale

    def _layers(self, problem: Problem, model: nn.Module) -> Any:
        """All layers, or those of which all parameters are to be estimated."""
        collection = import_module("nngeometry.layercollection").LayerCollection
        if not problem.left_out:
            return collection.from_model(model)
        layers = collection()
        for module in model.modules():
            own = [p.requires_grad for p in module.parameters(recurse=False)]
            if all(own) and own:
                layers.add_layer_from_model(model, module)
            elif any(own):
                raise NotOffered("whole layers only")
        return layers

    def _closed_form(
        self, problem: Problem, model: nn.Module, layers: Any, representation: Any
    ) -> tuple[Any, float]:
        """``FIM``: an average over examples, of the summed loss of each."""
        loss = problem.loss("mean")
        if has_options(loss) or problem.targets in ("some ignored", "probabilities"):
            raise NotOffered("FIM knows likelihoods, not the options of a loss")
        variant, unit = VARIANTS[type(loss)]
        loader = problem.loader()
        matrix = import_module("nngeometry.metrics").FIM(
            model, loader, representation, variant=variant, layer_collection=layers
        )
        divisor = mean_divisor(problem) if problem.reduction == "mean" else 1.0
        return matrix, unit * len(problem.seen()) / divisor

    def _empirical(
        self, problem: Problem, model: nn.Module, layers: Any, representation: Any
    ) -> tuple[Any, float]:
        """The second moment of the gradients of a function: here the loss of every example."""
        backend = import_module("nngeometry.backend").TorchHooksJacobianBackend
        generator = backend(
            layer_collection=layers, model=model, function=example_losses(problem, model)
        )
        matrix = representation(generator=generator, examples=problem.loader())
        return matrix, float(len(problem.seen()))


def example_losses(problem: Problem, model: nn.Module) -> Callable[..., Tensor]:
    """A function from a batch to the summed loss of each example, ``[B, 1]``."""
    loss = problem.loss_for("empirical")

    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        outputs: Tensor = model(inputs)
        pairs = zip(
            torch.split(outputs, problem.rows), torch.split(targets, problem.rows), strict=True
        )
        return torch.stack([loss(output, target) for output, target in pairs])[:, None]

    return losses


def has_options(loss: nn.Module) -> bool:
    """Whether a loss weights, smooths or ignores."""
    options = [getattr(loss, name, None) for name in ("weight", "pos_weight")]
    smoothing = getattr(loss, "label_smoothing", 0.0)
    return any(option is not None for option in options) or smoothing != 0.0


@contextmanager
def float64_by_default() -> Iterator[None]:
    """Some of its buffers have the default dtype whatever the model's is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
