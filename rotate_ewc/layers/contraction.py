"""Products of data and one parameter that sum over common axes: `matmul`, `einsum` and the like."""

from __future__ import annotations

from dataclasses import dataclass, replace
from string import ascii_lowercase
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from rotate_ewc.layers.base import FactoredCall, Factors, Form, IsParameter, form_within_reach
from rotate_ewc.layers.linear import LinearCall, MatmulCall


@dataclass(frozen=True)
class ContractionCall(FactoredCall):
    """`einsum(f"{axes},{weight_axes}->{output_axes}", input, weight)`, a letter for each axis.

    Examples lie along an axis that input and output have at the same place, and the weight has not.

    Attributes:
        axes: The input's axes.
        weight_axes: The weight's, without those of size one along which it is broadcast.
        output_axes: The output's.
    """

    axes: str = ""
    weight_axes: str = ""
    output_axes: str = ""

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """The first and the second axis, where the weight does not have them."""
        pairs = zip(self.axes[:2], self.output_axes, strict=False)
        return tuple(i for i, (x, y) in enumerate(pairs) if x == y and x not in self.weight_axes)

    @property
    def mergeable_axes(self) -> int:
        """Both, if both can hold examples."""
        return max(1, len(self.batch_axes))

    @property
    def weight_form(self) -> Form:
        """Both sides get a basis, where the weight's first axis is one side and the rest another.

        The products are then sums of outer products. In weights with several axes on both sides,
        or with axes that input and output have as well, they are no products of two such sides.
        """
        shape = torch.Size() if self.weight is None else self.weight.shape
        outputs = [axis in self.output_axes for axis in self.weight_axes]
        inputs = [axis in self.axes for axis in self.weight_axes]
        whole = len(self.weight_axes) == len(shape)
        if whole and not any(map(bool.__and__, outputs, inputs)):
            if not any(inputs[:1]) and not any(outputs[1:]):
                return Form(Factors.OUTER_PRODUCTS, activation_basis=True)
            if not any(outputs[:1]) and not any(inputs[1:]):
                return Form(Factors.OUTER_PRODUCTS, transposed=True, activation_basis=True)
        return form_within_reach(shape)

    def activations(self, inputs: Tensor) -> Tensor:
        """Lay out the input as `[1, n, shared, d_in]`."""
        return self._laid_out(inputs, self.axes)

    def gradients(self, output_gradients: Tensor) -> Tensor:
        """Lay out the output's gradient as `[1, n, shared, d_out]`."""
        return self._laid_out(output_gradients, self.output_axes)

    def weight_gradients(self, inputs: Tensor, output_gradients: Tensor) -> Tensor:
        """Contract inputs and output gradients over all axes but the weight's."""
        x = self._without_examples(inputs, self.axes)
        y = self._without_examples(output_gradients, self.output_axes)
        summed = torch.einsum(f"NR{x},NR{y}->N{self.weight_axes}", inputs, output_gradients)
        shape = () if self.weight is None else self.weight.shape
        return summed.reshape(len(inputs), *shape)

    def _laid_out(self, tensor: Tensor, axes: str) -> Tensor:
        """Bring the axes that the weight has to the end, in its order."""
        rest = self._without_examples(tensor, axes)
        features = " ".join(axis for axis in self.weight_axes if axis in rest)
        shared = sorted(axis for axis in rest if axis not in self.weight_axes)
        pattern = f"N R {' '.join(rest)} -> 1 N (R {' '.join(shared)}) ({features})"
        return rearrange(tensor, pattern)

    def _without_examples(self, tensor: Tensor, axes: str) -> str:
        """Return the axes of `[n, rows, *rest]` behind the first two."""
        merged = len(axes) + 2 - tensor.ndim
        if merged > 1:
            return axes[merged:]
        # Where both could be the examples', the other one is shared, whatever its name.
        axis = self.batch_axes[0]
        return axes[:axis] + axes[axis + 1 :]


def matmul(
    is_parameter: IsParameter, input: Tensor, other: Tensor
) -> MatmulCall | ContractionCall | None:
    """Read the arguments of `torch.matmul`, where one factor is a parameter."""
    if not is_parameter(input) and is_parameter(other) and other.ndim == 2 and input.ndim > 1:
        return MatmulCall(input, other, None)
    batch = ascii_lowercase[3 : 3 + max(input.ndim, other.ndim, 2) - 2]
    left = "ab"[2 - min(input.ndim, 2) :]
    right = "bc"[: min(other.ndim, 2)]
    first = batch[len(batch) - max(input.ndim - 2, 0) :] + left
    second = batch[len(batch) - max(other.ndim - 2, 0) :] + right
    output = batch + left.replace("b", "") + right.replace("b", "")
    return _contraction(is_parameter, first, second, output, input, other)


def inner(
    is_parameter: IsParameter, input: Tensor, other: Tensor
) -> LinearCall | ContractionCall | None:
    """Read the arguments of `torch.inner`, which sums over the last axis of both."""
    if not is_parameter(input) and other.ndim == 2:
        return LinearCall(input, other, None)
    return tensordot(is_parameter, input, other, dims=([-1], [-1]))


def tensordot(
    is_parameter: IsParameter, a: Tensor, b: Tensor, dims: Any = 2, out: None = None
) -> ContractionCall | None:
    """Read the arguments of `torch.tensordot`."""
    del out
    if isinstance(dims, int):
        dims = (range(a.ndim - dims, a.ndim), range(dims))
    letters = iter(ascii_lowercase)
    first, second = ([next(letters) for _ in range(tensor.ndim)] for tensor in (a, b))
    summed = set()
    for i, j in zip(*dims, strict=False):
        second[j] = first[i]
        summed.add(first[i])
    output = "".join(axis for axis in first + second if axis not in summed)
    return _contraction(is_parameter, "".join(first), "".join(second), output, a, b)


def einsum(
    is_parameter: IsParameter, equation: object, *operands: object
) -> ContractionCall | None:
    """Read the arguments of `torch.einsum`, with one operand of data and one parameter."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    a, b = operands
    terms, arrow, output = equation.replace(" ", "").partition("->")
    first, comma, second = terms.partition(",")
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and comma):
        return None
    if not arrow:
        named = (axis for axis in sorted({*first, *second}) if axis != ".")
        once = (axis for axis in named if (first + second).count(axis) == 1)
        output = "..." * ("..." in terms) + "".join(once)
    # Letters for the axes that the ellipsis stands for, which are aligned on the right.
    free = "".join(axis for axis in ascii_lowercase if axis not in equation)
    sizes = [
        tensor.ndim - len(term.replace("...", "")) for tensor, term in ((a, first), (b, second))
    ]
    first, second, output = (
        term.replace("...", free[len(free) - size :] if size else "")
        for term, size in ((first, sizes[0]), (second, sizes[1]), (output, max(sizes)))
    )
    return _contraction(is_parameter, first, second, output, a, b)


def _contraction(
    is_parameter: IsParameter, first: str, second: str, output: str, a: Tensor, b: Tensor
) -> ContractionCall | None:
    """Return the call of an einsum of data and a parameter; None if it is no such thing."""
    if is_parameter(a) == is_parameter(b):
        return None
    axes, weight_axes, data, weight = first, second, a, b
    if is_parameter(a):
        axes, weight_axes, data, weight = second, first, b, a
    if any(len({*term}) < len(term) for term in (axes, weight_axes, output)):
        return None
    if (len(axes), len(weight_axes)) != (data.ndim, weight.ndim):  # as the function itself will say
        return None
    data = data.detach()
    sizes = dict(zip(axes, data.shape, strict=True))
    own_sizes = dict(zip(weight_axes, weight.shape, strict=True))
    # Along an axis of which one of them has a single entry, this one is broadcast.
    weight_axes = "".join(a for a, size in own_sizes.items() if size > 1 or sizes.get(a, 1) == 1)
    for axis, size in sizes.items():
        if axis not in weight_axes + output or (size == 1 and own_sizes.get(axis, 1) > 1):
            data, axes = data.sum(axes.index(axis)), axes.replace(axis, "")
    if {*weight_axes} - {*axes, *output}:
        return None
    return _examples_in_front(ContractionCall(data, weight, None, 1, axes, weight_axes, output))


def _examples_in_front(call: ContractionCall) -> ContractionCall | None:
    """Lay the input out so that axes that can hold examples are where the output has them."""
    shared = [axis in call.axes and axis not in call.weight_axes for axis in call.output_axes[:2]]
    if not any(shared):
        return None
    present = [axis for axis, known in zip(call.output_axes, shared, strict=False) if known]
    order = present + [axis for axis in call.axes if axis not in present]
    data, axes = call.input.permute([call.axes.index(axis) for axis in order]), "".join(order)
    if not shared[0]:
        data, axes = data[None], f"A{axes}"
    return replace(call, input=data, axes=axes)
