"""Elastic weight consolidation with the exact diagonal of the Fisher matrix.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017.
"""

from typing import Any

import torch
from opt_einsum import contract
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from benchmarks.baselines.capture import Capture, Outer
from benchmarks.baselines.examples import Batch, Examples, call, evaluating, forward
from benchmarks.baselines.growth import grown, leading
from benchmarks.baselines.layers import Trained, parameter_name, trained
from benchmarks.baselines.plugin import QuadraticPlugin, present

CHUNK = 32  # examples whose Jacobians are in memory at a time


class DiagonalFisherEWC(QuadraticPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Penalises ``½ λ Σ_t Σ_i F_ti (θ_i - θ*_ti)²``.

    ``F_ti`` is the mean over the examples of task ``t`` of ``Σ_y p(y|x) (∂ log p(y|x) / ∂θ_i)²``,
    over all classes ``y`` and with the model's own predictions after that task: neither the given
    labels nor squares of gradients of whole batches.

    The sum over tasks is kept as one quadratic, ``½ λ Σ_i P_i (θ_i - m_i)²`` with ``P = Σ_t F_t``
    and ``m = Σ_t F_t θ*_t / P``. It has the same gradient; its value is less by a constant, the
    spread of the anchors of the tasks. Where ``P_i`` is zero nothing is anchored.

    Attributes:
        precision: ``P`` by name of parameter, in its shape when it was last estimated.
        anchor: ``m`` likewise.
    """

    def __init__(self, strength: float, *, samples: int | None, seed: int) -> None:
        """Protect nothing yet; for the arguments see :class:`QuadraticPlugin`."""
        super().__init__(strength, samples=samples, seed=seed)
        self.precision: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def penalty(self, model: nn.Module) -> Tensor:
        """Return the penalty, a scalar with a gradient."""
        parameters = dict(model.named_parameters())
        terms = []
        for name, precision in self.precision.items():
            now = leading(present(parameters, name), precision.shape, name)
            terms.append((precision * (now - self.anchor[name]).square()).sum())
        return 0.5 * self.strength * torch.stack(terms).sum()

    def consolidate(self, strategy: Any, examples: Examples) -> None:
        """Add the Fisher matrix of a task, and move the anchors."""
        parameters = dict(strategy.model.named_parameters())
        for name, fisher in exact_diagonal(strategy.model, examples).items():
            now = parameters[name].detach()
            before = grown(self.precision.get(name, torch.zeros_like(fisher)), now.shape)
            anchor = grown(self.anchor.get(name, now), now.shape)
            precision = before + fisher
            share = torch.where(precision > 0, fisher / precision, torch.ones_like(fisher))
            self.precision[name] = precision
            self.anchor[name] = torch.lerp(anchor, now, share)


def exact_diagonal(model: nn.Module, examples: Examples) -> dict[str, Tensor]:
    """Compute the diagonal of the Fisher matrix of cross-entropy, over all classes.

    Args:
        model: The network, left as it is.
        examples: The data, over which it is averaged.

    Returns:
        By name of the trained parameters, in their shapes; zeros for those that were not used.
    """
    found = trained(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    own = {name: total for name, total in sums.items() if name not in found.others}
    with evaluating(model):
        for number, batch in enumerate(examples):
            _add_layers(model, batch, found, own, check=number == 0)
            if found.others:
                _add_others(model, batch, found, sums)
    return {name: total / len(examples) for name, total in sums.items()}


def _add_layers(
    model: nn.Module, batch: Batch, found: Trained, sums: dict[str, Tensor], *, check: bool
) -> None:
    """Add the squared gradients of linear layers and convolutions, from inputs and gradients."""
    with Capture(found.layers) as capture:
        logits = forward(model, batch)
    if check:
        capture.check(logits, ignored=found.others.values())
    squares: dict[str, tuple[Outer, Tensor]] = {}
    for vectors in _vectors(logits).unbind(1):
        for name, outer in capture.backward(logits, vectors).items():
            if outer.gradients.shape[1] == 1:
                # The inputs are the same for all classes, so their squares wait for the sum.
                square = outer.gradients.squeeze(1).square()
                _, before = squares.get(name, (outer, torch.zeros_like(square)))
                squares[name] = (outer, before + square)
            else:
                _add_positions(name, outer, sums)
    for name, (outer, square) in squares.items():
        _add(sums, parameter_name(name, "weight"), square.T @ outer.inputs.squeeze(1).square())
        _add(sums, parameter_name(name, "bias"), square.sum(0))


def _add_positions(name: str, outer: Outer, sums: dict[str, Tensor]) -> None:
    """Add the squared gradients of a layer that is used at several positions of an example."""
    for start in range(0, len(outer.inputs), CHUNK):
        part = slice(start, start + CHUNK)
        a, g = outer.inputs[part], outer.gradients[part]
        gradients = contract("nso,nsi->noi", g, a)
        _add(sums, parameter_name(name, "weight"), gradients.square().sum(0))
        _add(sums, parameter_name(name, "bias"), g.sum(1).square().sum(0))


def _add(sums: dict[str, Tensor], name: str, squares: Tensor) -> None:
    """Add to the sum of a parameter, if there is one and it is trained."""
    if name in sums:
        sums[name] += squares.reshape(sums[name].shape)


def _add_others(model: nn.Module, batch: Batch, found: Trained, sums: dict[str, Tensor]) -> None:
    """Add the squared gradients of all other parameters, from the Jacobian of each example."""
    wrapped = _Forward(model)

    for inputs, task_label in _by_task(batch):

        def logits(
            others: dict[str, Tensor], example: Tensor, label: Tensor | None = task_label
        ) -> Tensor:
            values = {f"model.{name}": value for name, value in others.items()}
            outputs: Tensor = functional_call(wrapped, values, (example.unsqueeze(0), label))
            return outputs.squeeze(0)

        others = {name: parameter.detach() for name, parameter in found.others.items()}
        for chunk in torch.split(inputs, CHUNK):
            with torch.no_grad():
                labels = None if task_label is None else task_label.expand(len(chunk))
                vectors = _vectors(call(model, chunk, labels))
            jacobians = vmap(jacrev(logits), in_dims=(None, 0))(others, chunk)
            for name, jacobian in jacobians.items():
                rows = contract("nyc,nci->nyi", vectors, jacobian.reshape(*vectors.shape[:2], -1))
                sums[name] += rows.square().sum((0, 1)).reshape(sums[name].shape)


class _Forward(nn.Module):
    """A model that is always called with inputs and task label."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, task_labels: Tensor | None) -> Tensor:
        """Call the model with the task labels, if it takes any."""
        return call(self.model, inputs, task_labels)


def _vectors(logits: Tensor) -> Tensor:
    """Return the gradients of cross-entropy for every class, times √p: ``[n, y, C]``."""
    probabilities = logits.detach().softmax(1)
    identity = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    return probabilities.sqrt().unsqueeze(2) * (probabilities.unsqueeze(1) - identity)


def _by_task(batch: Batch) -> list[tuple[Tensor, Tensor | None]]:
    """Split a batch into the inputs of each task, with its label ``[1]``, for one path each."""
    labels = batch.task_labels
    if labels is None:
        return [(batch.inputs, None)]
    return [(batch.inputs[labels == label], label.view(1)) for label in torch.unique(labels)]
