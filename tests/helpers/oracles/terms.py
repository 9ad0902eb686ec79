"""Layer inputs and output gradients, found by perturbing outputs, and the Kronecker factors."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad, vjp

from tests.helpers.oracles.blocks import TRANSPOSED_CONVOLUTIONS
from tests.helpers.oracles.curvature import (
    Fisher,
    Loss,
    by_example,
    evaluation_copy,
    loss_mass,
    output_hessian,
    with_reduction,
)

Approximation = Literal["expand", "reduce"]


# --------------------------------------------------------------------------- unfolding


def pad_input(module: nn.Module, x: Tensor) -> Tensor:
    """Pad the input of a convolution module as the module would.

    Args:
        module: A Conv1d, Conv2d or Conv3d.
        x: Its input ``[N, C, *spatial]``.

    Returns:
        The padded input.
    """
    conv: Any = module
    sides: list[tuple[int, int]] = []
    for axis, (size, dilation) in enumerate(zip(conv.kernel_size, conv.dilation, strict=True)):
        if conv.padding == "same":
            total = dilation * (size - 1)
            sides.append((total // 2, total - total // 2))
        elif conv.padding == "valid":
            sides.append((0, 0))
        else:
            sides.append((conv.padding[axis], conv.padding[axis]))
    amounts = [amount for side in reversed(sides) for amount in side]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return nn.functional.pad(x, amounts, mode=mode)


def windows(module: nn.Module, padded: Tensor, size: Sequence[int]) -> Tensor:
    """Cut a convolution's windows, one kernel tap after the other.

    Args:
        module: A convolution, transposed or not.
        padded: What its kernel slides over, ``[N, C, *spatial]``.
        size: Number of windows along each spatial axis.

    Returns:
        ``[N, S, groups, channels * taps]``.
    """
    conv: Any = module
    taps = []
    for tap in itertools.product(*(range(k) for k in conv.kernel_size)):
        window: list[slice] = [slice(None), slice(None)]
        for i, count in enumerate(size):
            first = tap[i] * conv.dilation[i]
            last = first + conv.stride[i] * (count - 1)
            window.append(slice(first, last + 1, conv.stride[i]))
        taps.append(padded[tuple(window)].flatten(start_dim=2))
    patches = torch.stack(taps, dim=2)  # [N, channels, taps, S]
    patches = patches.reshape(len(padded), conv.groups, -1, patches.shape[-1])
    return patches.permute(0, 3, 1, 2)


def unfold_input(module: nn.Module, x: Tensor) -> Tensor:
    """Lay out a layer's input so that the layer is one matrix product per group.

    Args:
        module: A Linear, Embedding or (transposed) convolution module.
        x: Its input, with the batch axis first.

    Returns:
        ``[N, S, groups, d_in]`` with S the positions that share the weight.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(len(x), -1, 1, x.shape[-1])
    if isinstance(module, nn.Embedding):
        tokens = torch.eye(module.num_embeddings, dtype=module.weight.dtype)
        if module.padding_idx is not None:
            tokens[module.padding_idx] = 0
        return tokens[x].reshape(len(x), -1, 1, module.num_embeddings)
    conv: Any = module
    if isinstance(module, TRANSPOSED_CONVOLUTIONS):
        return x.reshape(len(x), conv.groups, x.shape[1] // conv.groups, -1).permute(0, 3, 1, 2)
    padded = pad_input(module, x)
    spatial = range(len(conv.kernel_size))
    reach = [conv.dilation[i] * (conv.kernel_size[i] - 1) for i in spatial]
    size = [(padded.shape[2 + i] - reach[i] - 1) // conv.stride[i] + 1 for i in spatial]
    return windows(module, padded, size)


def unfold_output(module: nn.Module, z: Tensor) -> Tensor:
    """Lay out the gradient at a layer's output like the layer's unfolded input.

    Args:
        module: A Linear, Embedding or (transposed) convolution module.
        z: The gradient at its output, with the batch axis first.

    Returns:
        ``[N, S, groups, d_out]``; for a transposed convolution, d_out runs over all that one input
        position adds to.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        return z.reshape(len(z), -1, 1, z.shape[-1])
    conv: Any = module
    if not isinstance(module, TRANSPOSED_CONVOLUTIONS):
        return z.reshape(len(z), conv.groups, z.shape[1] // conv.groups, -1).permute(0, 3, 1, 2)
    size, amounts = [], []
    for i, length in enumerate(z.shape[2:]):
        reach = conv.dilation[i] * (conv.kernel_size[i] - 1)
        whole = length + 2 * conv.padding[i] - conv.output_padding[i]
        size.append((whole - reach - 1) // conv.stride[i] + 1)
        amounts.append((conv.padding[i], conv.padding[i]))
    padded = nn.functional.pad(z, [amount for side in reversed(amounts) for amount in side])
    return windows(module, padded, size)


# --------------------------------------------------------------------------- terms


@contextmanager
def output_hook(modules: Iterable[nn.Module], hook: Any) -> Iterator[None]:
    """Register a forward hook on several modules for the length of a ``with``.

    Args:
        modules: The modules.
        hook: The hook.

    Yields:
        Nothing.
    """
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class LayerTerms:
    """Inputs and output gradients of one weight, over all its uses, for every example.

    The gradients are scaled so that the sum over examples and label vectors of the outer products
    of ``vec(sum_s g_s a_s^T)`` is the exact Fisher block.

    Attributes:
        activations: ``[N, S, groups, d_in]``.
        gradients: ``[N, V, S, groups, d_out]`` with V the label vectors.
    """

    activations: Tensor
    gradients: Tensor

    def weight_gradients(self) -> Tensor:
        """Return per-example gradients ``[N, V, groups, d_out, d_in]``."""
        return torch.einsum("nvsgo,nsgi->nvgoi", self.gradients, self.activations)

    def with_bias(self) -> "LayerTerms":
        """Return the terms of the joint block: a constant 1 as the first input."""
        ones = torch.ones_like(self.activations[..., :1])
        return LayerTerms(torch.cat([ones, self.activations], dim=-1), self.gradients)


@dataclass(frozen=True)
class LayerDerivatives:
    """Inputs of one weight for one example, over all its uses, and derivatives of the model there.

    Attributes:
        activations: ``[S, groups, d_in]``.
        jacobian: ``[M, S, groups, d_out]``, of the M numbers of the example's output.
    """

    activations: Tensor
    jacobian: Tensor


def layer_derivatives(
    model: nn.Module, weights: Sequence[str], x: Tensor
) -> list[dict[str, LayerDerivatives]]:
    """Differentiate the model by perturbations of the outputs of layers.

    Args:
        model: A model in which modules own the weights; used in evaluation mode.
        weights: Names of the weights.
        x: All inputs, ``[N, *]``.

    Returns:
        For each example the derivatives by name of those weights whose modules are called.
    """
    model = evaluation_copy(model)
    owners = {
        name: [m for m in model.modules() if getattr(m, "weight", None) is parameter]
        for name, parameter in ((name, model.get_parameter(name)) for name in weights)
    }
    assert all(owners.values())
    modules = {module for owned in owners.values() for module in owned}

    found: list[dict[str, LayerDerivatives]] = []
    for x_n in x:
        uses: list[tuple[nn.Module, Tensor, Tensor]] = []

        def record(
            module: nn.Module, args: tuple[Tensor], z: Tensor, uses: list[Any] = uses
        ) -> None:
            inputs = unfold_input(module, args[0]).flatten(0, 1)  # of one example, wherever it is
            uses.append((module, inputs.clone(), torch.zeros_like(z)))

        with torch.no_grad(), output_hook(modules, record):
            model(x_n[None])
        if not uses:
            found.append({})
            continue

        def perturbed(*perturbations: Tensor, x_n: Tensor = x_n) -> Tensor:
            remaining = iter(perturbations)

            def perturb(module: nn.Module, args: tuple[Tensor], z: Tensor) -> Tensor:
                return z + next(remaining)

            with output_hook(modules, perturb):
                output: Tensor = model(x_n[None])
            return output.reshape(-1)

        output, pull_back = vjp(perturbed, *(zeros for _, _, zeros in uses))
        pulled = [pull_back(row) for row in torch.eye(len(output), dtype=output.dtype)]
        own: dict[str, LayerDerivatives] = {}
        for name, owned in owners.items():
            places = [(place, m, a) for place, (m, a, _) in enumerate(uses) if m in owned]
            if places:
                rows = [
                    torch.cat([at_positions(m, a, gradients[place]) for place, m, a in places])
                    for gradients in pulled
                ]
                activations = torch.cat([a for _, _, a in places])
                own[name] = LayerDerivatives(activations, torch.stack(rows))
        found.append(own)
    return found


def layer_terms(
    model: nn.Module,
    loss_func: Loss,
    derivatives: Sequence[Mapping[str, LayerDerivatives]],
    x: Tensor,
    y: Tensor,
    fisher: Fisher,
) -> dict[str, LayerTerms]:
    """Send label vectors back to the outputs of layers.

    Args:
        model: The model; used in evaluation mode.
        loss_func: The loss, whose reduction sets the scale.
        derivatives: Those of :func:`layer_derivatives`, which are the same for all losses.
        x: All inputs, ``[N, *]``.
        y: All targets, ``[N, *]`` or ``[N * rows, *]``.
        fisher: Which Fisher matrix.

    Returns:
        The terms by name of the weight; none where its modules are not called.
    """
    with torch.no_grad():
        outputs = evaluation_copy(model)(x)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for (_, y_n, output), known in zip(by_example(x, y, outputs), derivatives, strict=True):
        vectors = label_vectors(loss_func, output, outputs, y_n, y, fisher)
        for name, one in known.items():
            gradients = torch.einsum("vm,msgo->vsgo", vectors, one.jacobian)
            found.setdefault(name, []).append((one.activations, gradients))
    return {
        name: LayerTerms(*map(torch.stack, zip(*pairs, strict=True)))
        for name, pairs in found.items()
    }


def at_positions(module: nn.Module, activations: Tensor, gradient: Tensor) -> Tensor:
    """Unfold the gradient at a use's output; where an embedding pads there is none.

    Args:
        module: The module.
        activations: Its unfolded input, ``[S, groups, d_in]``.
        gradient: The gradient at its output.

    Returns:
        ``[S, groups, d_out]``.
    """
    unfolded = unfold_output(module, gradient).flatten(0, 1)
    if isinstance(module, nn.Embedding):
        return unfolded * activations.sum(dim=-1, keepdim=True)
    return unfolded


def label_vectors(
    loss_func: Loss,
    output: Tensor,
    outputs: Tensor,
    target: Tensor,
    targets: Tensor,
    fisher: Fisher,
) -> Tensor:
    """Return vectors whose outer products sum to one example's part of the curvature.

    Args:
        loss_func: The loss, whose reduction sets the scale.
        output: Output of one example, ``[rows, *]``.
        outputs: Outputs of the whole data set.
        target: Its target, ``[rows, *]``.
        targets: Targets of the whole data set.
        fisher: Which Fisher matrix.

    Returns:
        ``[V, M]``: for ``"type2"`` a square root of the summed loss's Hessian, for ``"empirical"``
        its gradient; both over the root of what ``mean`` divides by.
    """
    mass = loss_mass(loss_func, outputs, targets) if loss_func.reduction == "mean" else 1.0
    if fisher == "type2":
        values, vectors = torch.linalg.eigh(output_hessian(loss_func, output, target) / mass)
        root: Tensor = vectors * values.clamp(min=0).sqrt()
        return root.T

    def loss_of(flat_output: Tensor) -> Tensor:
        loss: Tensor = with_reduction(loss_func, "sum")(flat_output.reshape(output.shape), target)
        return loss

    gradient: Tensor = grad(loss_of)(output.reshape(-1))
    return gradient[None] / mass**0.5


# --------------------------------------------------------------------------- Kronecker factors


def kronecker_factors(terms: LayerTerms, approximation: Approximation) -> tuple[Tensor, Tensor]:
    """Compute the two Kronecker factors of KFAC with plain loops.

    Args:
        terms: Inputs and output gradients of one weight.
        approximation: ``"expand"`` treats shared positions as examples, ``"reduce"`` averages
            inputs and sums output gradients over them.

    Returns:
        The mean of ``a a^T`` ``[groups, d_in, d_in]`` and the sum of ``g g^T``
        ``[groups, d_out, d_out]``.
    """
    a, g = terms.activations, terms.gradients
    if approximation == "reduce":
        a, g = a.mean(dim=1, keepdim=True), g.sum(dim=2, keepdim=True)
    examples, shared, groups, d_in = a.shape
    d_out = g.shape[-1]
    inputs = torch.zeros(groups, d_in, d_in, dtype=a.dtype)
    outputs = torch.zeros(groups, d_out, d_out, dtype=a.dtype)
    for n, s, group in itertools.product(range(examples), range(shared), range(groups)):
        inputs[group] += torch.outer(a[n, s, group], a[n, s, group]) / (examples * shared)
        for v in range(g.shape[1]):
            outputs[group] += torch.outer(g[n, v, s, group], g[n, v, s, group])
    return inputs, outputs


def kfac_matrix(terms: LayerTerms, approximation: Approximation) -> Tensor:
    """Write out the KFAC approximation of one block.

    Args:
        terms: Inputs and output gradients of one weight.
        approximation: How shared positions are treated.

    Returns:
        ``[groups, d_out * d_in, d_out * d_in]``.
    """
    pairs = zip(*kronecker_factors(terms, approximation), strict=True)
    return torch.stack([torch.kron(outputs, inputs) for inputs, outputs in pairs])
