"""Independent oracles: dense Fisher matrices from first principles.

Nothing here knows how the library computes anything. Curvature is assembled one example at a time
from ``torch.func`` Jacobians and from the Hessian of the actual PyTorch loss, so that no closed
form, no layer rule and no scaling convention of the library is repeated. Everything is written for
clarity, not speed, and is meant for models with at most a few hundred parameters in float64.

Conventions:
    * A *flat* vector is the concatenation of the parameters, each flattened row-major, in the
      order of a ``shapes`` mapping (name to shape).
    * A weight is the matrix ``[groups, d_out, d_in]``, a separate bias ``[groups, d_out, 1]``, and
      a weight with its bias ``[groups, d_out, 1 + d_in]`` with the bias as the first column.
    * A block acts on the row-major ``vec`` of each group's matrix.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

Fisher = Literal["type2", "empirical"]
Approximation = Literal["expand", "reduce"]
Shapes = Mapping[str, tuple[int, ...]]
Loss = nn.CrossEntropyLoss | nn.MSELoss | nn.BCEWithLogitsLoss


class BlockLike(Protocol):
    """What the oracles read from a block of the operator under test."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the block's parameters."""

    @property
    def gradient_basis(self) -> Tensor | None:
        """Basis of the output side, ``[groups, d_out, d_out]``; ``None`` is the identity."""

    @property
    def activation_basis(self) -> Tensor | None:
        """Basis of the input side, ``[groups, d_in, d_in]``; ``None`` is the identity."""

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues, ``[groups, d_out, d_in]``."""


# --------------------------------------------------------------------------- losses


def with_reduction(loss_func: Loss, reduction: str) -> Loss:
    """Return the same kind of loss under another reduction.

    Args:
        loss_func: A loss without options other than its reduction.
        reduction: ``"sum"`` or ``"mean"``.

    Returns:
        A new loss module.
    """
    return type(loss_func)(reduction=reduction)


def mean_divisor(loss_func: Loss, outputs: Tensor, targets: Tensor) -> float:
    """Count what ``mean`` divides by, by asking the loss itself.

    Args:
        loss_func: The loss; its reduction is ignored.
        outputs: Outputs of the whole data set.
        targets: Targets of the whole data set.

    Returns:
        The ratio of the summed to the averaged loss.
    """
    summed = with_reduction(loss_func, "sum")(outputs, targets)
    averaged = with_reduction(loss_func, "mean")(outputs, targets)
    return round(float(summed / averaged), 6)


def loss_scale(loss_func: Loss, outputs: Tensor, targets: Tensor) -> float:
    """Return the factor between the summed loss and the loss under its own reduction.

    Args:
        loss_func: The loss.
        outputs: Outputs of the whole data set.
        targets: Targets of the whole data set.

    Returns:
        1 for ``sum``, and one over what ``mean`` divides by otherwise.
    """
    if loss_func.reduction == "sum":
        return 1.0
    return 1.0 / mean_divisor(loss_func, outputs, targets)


def output_hessian(loss_func: Loss, output: Tensor, target: Tensor) -> Tensor:
    """Differentiate the summed loss of one example twice with respect to the model's output.

    Args:
        loss_func: The loss; its reduction is ignored.
        output: Output of one example, ``[rows, *]``.
        target: Target of that example, ``[rows, *]``.

    Returns:
        The Hessian, ``[M, M]`` with M the number of output elements.
    """
    summed = with_reduction(loss_func, "sum")

    def loss_of(flat_output: Tensor) -> Tensor:
        loss: Tensor = summed(flat_output.reshape(output.shape), target)
        return loss

    curvature: Tensor = jacrev(jacrev(loss_of))(output.reshape(-1))
    return curvature


# --------------------------------------------------------------------------- dense curvature


def evaluation_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model in evaluation mode, leaving the original alone.

    Args:
        model: Any module.

    Returns:
        The copy.
    """
    return copy.deepcopy(model).eval()


def by_example(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Go through examples, of which each may own several consecutive rows of outputs and targets.

    Args:
        x: All inputs, ``[N, *]``.
        *others: Tensors ``[N * rows, *]``.

    Yields:
        One input without the batch axis, and the ``[rows, *]`` that belong to it.
    """
    pieces = [torch.split(other, len(other) // len(x)) for other in others]
    yield from zip(x, *pieces, strict=True)


def parameter_shapes(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the named parameters, in the order of the names.

    Args:
        model: The model.
        names: Names as in ``model.named_parameters()``.

    Returns:
        Name to shape.
    """
    parameters = dict(model.named_parameters())
    return {name: tuple(parameters[name].shape) for name in names}


def flatten_parameters(tensors: Mapping[str, Tensor], names: Iterable[str], lead: int) -> Tensor:
    """Flatten and concatenate tensors shaped like the parameters.

    Args:
        tensors: Name to tensor, each with the same ``lead`` leading axes.
        names: The order.
        lead: Number of leading axes to keep.

    Returns:
        A tensor with the leading axes and one flat axis of all parameters.
    """
    return torch.cat([tensors[name].flatten(start_dim=lead) for name in names], dim=-1)


def example_jacobian(model: nn.Module, names: Sequence[str], x: Tensor) -> Tensor:
    """Differentiate all outputs of one example with respect to the named parameters.

    Args:
        model: The model, already in evaluation mode.
        names: The parameters, in the order of the columns.
        x: One input, without the batch axis.

    Returns:
        The Jacobian ``[M, D]``.
    """
    named = dict(model.named_parameters())
    parameters = {name: named[name].detach() for name in names}

    def outputs(values: dict[str, Tensor]) -> Tensor:
        output: Tensor = functional_call(model, values, (x[None],))
        return output.reshape(-1)

    return flatten_parameters(jacrev(outputs)(parameters), names, lead=1)


def example_gradient(
    model: nn.Module, loss_func: Loss, names: Sequence[str], x: Tensor, y: Tensor
) -> Tensor:
    """Differentiate the loss of one example alone, under the loss's own reduction.

    Args:
        model: The model, already in evaluation mode.
        loss_func: The loss.
        names: The parameters, in the order of the entries.
        x: One input, without the batch axis.
        y: Its target, ``[rows, *]``.

    Returns:
        The gradient ``[D]``.
    """
    named = dict(model.named_parameters())
    parameters = {name: named[name].detach() for name in names}

    def loss_of(values: dict[str, Tensor]) -> Tensor:
        loss: Tensor = loss_func(functional_call(model, values, (x[None],)), y)
        return loss

    return flatten_parameters(grad(loss_of)(parameters), names, lead=0)


def dense_ggn(
    model: nn.Module, loss_func: Loss, names: Sequence[str], x: Tensor, y: Tensor
) -> Tensor:
    """Assemble the generalised Gauss-Newton matrix over the named parameters.

    Args:
        model: The model; it is evaluated in evaluation mode.
        loss_func: The loss, whose reduction sets the scale.
        names: The parameters, in the order of rows and columns.
        x: All inputs, ``[N, *]``.
        y: All targets, ``[N, *]`` or ``[N * rows, *]``.

    Returns:
        The matrix ``[D, D]``.
    """
    model = evaluation_copy(model)
    with torch.no_grad():
        outputs = model(x)
    total: Tensor | None = None
    for x_n, y_n, output in by_example(x, y, outputs):
        jacobian = example_jacobian(model, names, x_n)
        term = jacobian.T @ output_hessian(loss_func, output, y_n) @ jacobian
        total = term if total is None else total + term
    assert total is not None
    return loss_scale(loss_func, outputs, y) * total


def dense_empirical_fisher(
    model: nn.Module, loss_func: Loss, names: Sequence[str], x: Tensor, y: Tensor
) -> Tensor:
    """Sum (or, under ``mean``, average) the outer products of per-example gradients.

    Args:
        model: The model; it is evaluated in evaluation mode.
        loss_func: The loss, applied to every example alone under its own reduction.
        names: The parameters, in the order of rows and columns.
        x: All inputs, ``[N, *]``.
        y: All targets, ``[N, *]`` or ``[N * rows, *]``.

    Returns:
        The matrix ``[D, D]``.
    """
    model = evaluation_copy(model)
    total: Tensor | None = None
    for x_n, y_n in by_example(x, y):
        gradient = example_gradient(model, loss_func, names, x_n, y_n)
        term = torch.outer(gradient, gradient)
        total = term if total is None else total + term
    assert total is not None
    return total / len(x) if loss_func.reduction == "mean" else total


def dense_fisher(
    model: nn.Module,
    loss_func: Loss,
    names: Sequence[str],
    x: Tensor,
    y: Tensor,
    fisher: Fisher,
) -> Tensor:
    """Assemble the exact matrix that a Fisher type stands for.

    Args:
        model: The model; it is evaluated in evaluation mode.
        loss_func: The loss, whose reduction sets the scale.
        names: The parameters, in the order of rows and columns.
        x: All inputs, ``[N, *]``.
        y: All targets, ``[N, *]`` or ``[N * rows, *]``.
        fisher: Which Fisher matrix.

    Returns:
        The matrix ``[D, D]``.
    """
    build = dense_ggn if fisher == "type2" else dense_empirical_fisher
    return build(model, loss_func, names, x, y)


# --------------------------------------------------------------------------- blocks


@dataclass(frozen=True)
class BlockLayout:
    """A block as it should be: which parameters, and in how many groups."""

    parameters: tuple[str, ...]
    groups: int


def expected_layouts(model: nn.Module, names: Sequence[str], joint: bool) -> list[BlockLayout]:
    """Work out the blocks of a model made of Linear and convolution modules.

    Args:
        model: The model.
        names: The parameters to be estimated.
        joint: Whether a weight and its bias share a block (where both are estimated).

    Returns:
        One layout per block, covering every name exactly once.
    """
    layouts = []
    for prefix, module in model.named_modules():
        groups = getattr(module, "groups", 1)
        own = [name for name in (f"{prefix}.weight", f"{prefix}.bias") if name in names]
        if joint and len(own) == 2:
            layouts.append(BlockLayout(tuple(own), groups))
        else:
            layouts.extend(BlockLayout((name,), groups) for name in own)
    covered = [name for layout in layouts for name in layout.parameters]
    assert sorted(covered) == sorted(names), "the case has parameters outside Linear and Conv"
    return layouts


def block_indices(shapes: Shapes, parameters: Sequence[str], groups: int) -> Tensor:
    """Find a block's entries in the flat parameter vector.

    Args:
        shapes: Shapes of all parameters, in flat order.
        parameters: One parameter, or a weight and its bias.
        groups: The number of groups.

    Returns:
        Positions ``[groups, d_out, d_in]``; for a weight and its bias, the bias comes first.
    """
    offsets = dict(
        zip(
            shapes,
            itertools.accumulate((prod(shape) for shape in shapes.values()), initial=0),
            strict=False,
        )
    )

    def positions(name: str) -> Tensor:
        shape = shapes[name]
        entries = offsets[name] + torch.arange(prod(shape))
        return entries.reshape(groups, shape[0] // groups, prod(shape[1:]))

    if len(parameters) == 1:
        return positions(parameters[0])
    weight, bias = parameters
    return torch.cat([positions(bias), positions(weight)], dim=2)


def block_matrix(
    dense: Tensor, shapes: Shapes, parameters: Sequence[str], groups: int = 1
) -> Tensor:
    """Cut a block out of a dense matrix, in the block's own layout.

    Args:
        dense: Matrix over all parameters, ``[D, D]``.
        shapes: Shapes of all parameters, in flat order.
        parameters: One parameter, or a weight and its bias.
        groups: The number of groups; entries between different groups are dropped.

    Returns:
        ``[groups, d_out * d_in, d_out * d_in]``.
    """
    indices = block_indices(shapes, parameters, groups).flatten(start_dim=1)
    return torch.stack([dense[index][:, index] for index in indices])


def exact_blocks(
    dense: Tensor, shapes: Shapes, layouts: Iterable[BlockLayout]
) -> dict[tuple[str, ...], Tensor]:
    """Cut all blocks out of a dense matrix.

    Args:
        dense: Matrix over all parameters, ``[D, D]``.
        shapes: Shapes of all parameters, in flat order.
        layouts: The blocks.

    Returns:
        Parameter names to ``[groups, d_out * d_in, d_out * d_in]``.
    """
    return {
        layout.parameters: block_matrix(dense, shapes, layout.parameters, layout.groups)
        for layout in layouts
    }


def block_bases(block: BlockLike) -> tuple[Tensor, Tensor]:
    """Return both bases of a block, with identities written out.

    Args:
        block: A block of an operator.

    Returns:
        ``[groups, d_out, d_out]`` and ``[groups, d_in, d_in]``.
    """
    groups, d_out, d_in = block.eigenvalues.shape

    def explicit(basis: Tensor | None, size: int) -> Tensor:
        if basis is not None:
            return basis
        return torch.eye(size, dtype=block.eigenvalues.dtype).expand(groups, size, size)

    return explicit(block.gradient_basis, d_out), explicit(block.activation_basis, d_in)


def kronecker_basis(block: BlockLike) -> Tensor:
    """Write out a block's eigenvectors as Kronecker products.

    Args:
        block: A block of an operator.

    Returns:
        ``[groups, d_out * d_in, d_out * d_in]``, eigenvectors in columns.
    """
    pairs = zip(*block_bases(block), strict=True)
    return torch.stack([torch.kron(q_g.contiguous(), q_a.contiguous()) for q_g, q_a in pairs])


def dense_block(block: BlockLike) -> Tensor:
    """Write out the matrix a block stands for.

    Args:
        block: A block of an operator.

    Returns:
        ``[groups, d_out * d_in, d_out * d_in]``.
    """
    basis = kronecker_basis(block)
    return basis @ torch.diag_embed(block.eigenvalues.flatten(start_dim=1)) @ basis.mT


def dense_operator(blocks: Iterable[BlockLike], shapes: Shapes) -> Tensor:
    """Write out the matrix over all parameters that a set of blocks stands for.

    Args:
        blocks: All blocks of an operator.
        shapes: Shapes of all parameters, in flat order.

    Returns:
        ``[D, D]``, zero between blocks and between groups.
    """
    size = sum(prod(shape) for shape in shapes.values())
    dense = torch.zeros(size, size, dtype=torch.float64)
    for block in blocks:
        groups = block.eigenvalues.shape[0]
        indices = block_indices(shapes, block.parameters, groups).flatten(start_dim=1)
        for index, matrix in zip(indices, dense_block(block), strict=True):
            dense[index[:, None], index[None, :]] += matrix
    return dense


# --------------------------------------------------------------------------- Kronecker factors


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


def unfold_input(module: nn.Module, x: Tensor) -> Tensor:
    """Lay out a layer's input so that the layer is one matrix product per group.

    Args:
        module: A Linear or convolution module.
        x: Its input, with the batch axis first.

    Returns:
        ``[N, S, groups, d_in]`` with S the positions that share the weight.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(len(x), -1, 1, x.shape[-1])
    conv: Any = module
    padded = pad_input(module, x)
    spatial = range(len(conv.kernel_size))
    reach = [conv.dilation[i] * (conv.kernel_size[i] - 1) for i in spatial]
    size = [(padded.shape[2 + i] - reach[i] - 1) // conv.stride[i] + 1 for i in spatial]
    taps = []
    for tap in itertools.product(*(range(k) for k in conv.kernel_size)):
        window: list[slice] = [slice(None), slice(None)]
        for i in spatial:
            first = tap[i] * conv.dilation[i]
            last = first + conv.stride[i] * (size[i] - 1)
            window.append(slice(first, last + 1, conv.stride[i]))
        taps.append(padded[tuple(window)].flatten(start_dim=2))
    patches = torch.stack(taps, dim=2)  # [N, channels, taps, S]
    patches = patches.reshape(len(x), conv.groups, -1, patches.shape[-1])
    return patches.permute(0, 3, 1, 2)


def unfold_output(module: nn.Module, z: Tensor) -> Tensor:
    """Lay out a layer's output like its unfolded input.

    Args:
        module: A Linear or convolution module.
        z: Its output, with the batch axis first.

    Returns:
        ``[N, S, groups, d_out]``.
    """
    if isinstance(module, nn.Linear):
        return z.reshape(len(z), -1, 1, z.shape[-1])
    conv: Any = module
    return z.reshape(len(z), conv.groups, z.shape[1] // conv.groups, -1).permute(0, 3, 1, 2)


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


def layer_terms(
    model: nn.Module, loss_func: Loss, weight: str, x: Tensor, y: Tensor, fisher: Fisher
) -> LayerTerms:
    """Record the inputs and output gradients of one weight by perturbing the layer's outputs.

    Args:
        model: A model made of Linear and convolution modules; used in evaluation mode.
        loss_func: The loss, whose reduction sets the scale.
        weight: Name of the weight.
        x: All inputs, ``[N, *]``.
        y: All targets, ``[N, *]`` or ``[N * rows, *]``.
        fisher: Which Fisher matrix.

    Returns:
        The terms.
    """
    model = evaluation_copy(model)
    parameter = model.get_parameter(weight)
    modules = [module for module in model.modules() if getattr(module, "weight", None) is parameter]
    with torch.no_grad():
        outputs = model(x)
    scale = loss_scale(loss_func, outputs, y)
    if fisher == "empirical":
        scale = 1 / len(x) if loss_func.reduction == "mean" else 1.0

    activations, gradients = [], []
    for x_n, y_n, output in by_example(x, y, outputs):
        uses: list[tuple[nn.Module, Tensor, Tensor]] = []

        def record(
            module: nn.Module, args: tuple[Tensor], z: Tensor, uses: list[Any] = uses
        ) -> None:
            inputs = unfold_input(module, args[0]).flatten(0, 1)  # of one example, wherever it is
            uses.append((module, inputs.clone(), torch.zeros_like(z)))

        with torch.no_grad(), output_hook(modules, record):
            model(x_n[None])

        def perturbed(perturbations: tuple[Tensor, ...], x_n: Tensor = x_n) -> Tensor:
            remaining = iter(perturbations)

            def perturb(module: nn.Module, args: tuple[Tensor], z: Tensor) -> Tensor:
                return z + next(remaining)

            with output_hook(modules, perturb):
                output: Tensor = model(x_n[None])
            return output.reshape(-1)

        jacobians = jacrev(perturbed)(tuple(zeros for _, _, zeros in uses))
        vectors = label_vectors(loss_func, output, y_n, fisher)
        per_use = []
        for (module, _, _), jacobian in zip(uses, jacobians, strict=True):
            pulled = torch.tensordot(vectors, jacobian, dims=1)
            per_use.append(
                torch.stack([unfold_output(module, row).flatten(0, 1) for row in pulled])
            )
        activations.append(torch.cat([a for _, a, _ in uses]))
        gradients.append(torch.cat(per_use, dim=1))
    return LayerTerms(torch.stack(activations), scale**0.5 * torch.stack(gradients))


def label_vectors(loss_func: Loss, output: Tensor, target: Tensor, fisher: Fisher) -> Tensor:
    """Return vectors whose outer products sum to one example's curvature in output space.

    Args:
        loss_func: The loss.
        output: Output of one example, ``[rows, *]``.
        target: Its target, ``[rows, *]``.
        fisher: Which Fisher matrix.

    Returns:
        ``[V, M]``: for ``"type2"`` a square root of the summed loss's Hessian, for ``"empirical"``
        the gradient of the loss of this example alone.
    """
    if fisher == "empirical":

        def loss_of(flat_output: Tensor) -> Tensor:
            loss: Tensor = loss_func(flat_output.reshape(output.shape), target)
            return loss

        gradient: Tensor = grad(loss_of)(output.reshape(-1))
        return gradient[None]
    values, vectors = torch.linalg.eigh(output_hessian(loss_func, output, target))
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root.T


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
