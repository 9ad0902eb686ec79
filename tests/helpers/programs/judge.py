"""Whether the package is right about a program, by a loop over its examples in float64."""

import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import rotate_ewc
from rotate_ewc import EKFACLinearOperator
from tests.helpers.oracles import block_bases, block_indices
from tests.helpers.programs.program import Program, alone

TOLERANCE = 1e-9
PACKAGE = str(Path(rotate_ewc.__file__).parent)
Outcome = Literal["right", "refused", "wrong", "crashed"]


@dataclass(frozen=True)
class Verdict:
    """What the package made of a program.

    Attributes:
        outcome: What it did; `refused` is an error of its own that a user may expect.
        separate: Whether the outputs of a batch are those of its examples alone.
        message: The error's message, or by how much the numbers are wrong.
    """

    outcome: Outcome
    separate: bool
    message: str = ""


@dataclass(frozen=True)
class Exact:
    """The exact Fisher matrix of a program, as the vectors whose outer products are summed.

    Attributes:
        vectors: `[K, D]`.
        shapes: Shapes of the parameters.
        separate: Whether the outputs of a batch are those of its examples alone.
    """

    vectors: Tensor
    shapes: dict[str, tuple[int, ...]]
    separate: bool

    def error(self, operator: EKFACLinearOperator) -> float:
        """Return how far the eigenvalues are from the exact diagonal in their basis."""
        scale = float(self.vectors.square().sum(dim=0).max().clamp(min=1e-30))
        worst = 0.0
        for block in operator.blocks:
            groups = block.eigenvalues.shape[0]
            indices = block_indices(self.shapes, block.parameters, groups, block.transposed)
            q_g, q_a = block_bases(block)
            rotated = q_g.mT @ self.vectors[:, indices] @ q_a
            difference = block.eigenvalues - rotated.square().sum(dim=0)
            worst = max(worst, float(difference.abs().max()) / scale)
        return worst


def loss_vectors(loss: nn.Module, output: Tensor, target: Tensor, fisher: str) -> Iterator[Tensor]:
    """Yield vectors whose outer products sum to the Hessian of an example's summed loss.

    Args:
        loss: The loss.
        output: The example's output, `[1, C]` or `[1, C, T]`.
        target: Its target.
        fisher: `"empirical"` for the gradient of the loss alone.
    """
    output = output.detach()
    if fisher == "empirical":
        output.requires_grad_()
        summed = type(loss)(reduction="sum")(output, target)
        yield torch.autograd.grad(summed, output)[0]
        return
    units = torch.eye(output.numel(), dtype=output.dtype).view(-1, *output.shape)
    if isinstance(loss, nn.CrossEntropyLoss):
        # Σ_c p_c (e_c - p)(e_c - p)ᵀ = diag(p) - p pᵀ at every step.
        p = output.softmax(dim=1)
        for unit in units:
            step = unit.sum(dim=1, keepdim=True)
            yield (unit * p).sum().sqrt() * (unit - p * step)
    elif isinstance(loss, nn.MSELoss):
        yield from 2**0.5 * units
    else:
        p = output.sigmoid()
        yield from (p * (1 - p)).sqrt() * units


def normalizer(program: Program) -> float:
    """Return what the program's loss divides by over all data."""
    if program.loss.reduction == "sum":
        return 1.0
    return float(sum(target.numel() for target in program.targets))


def gradients(
    output: Tensor, parameters: Sequence[nn.Parameter], vectors: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Yield flat gradients of products of the outputs and vectors."""
    for vector in vectors:
        if not output.requires_grad:
            yield torch.cat([torch.zeros_like(p).flatten() for p in parameters])
            continue
        found = torch.autograd.grad(
            output, parameters, vector, retain_graph=True, materialize_grads=True
        )
        yield torch.cat([gradient.flatten() for gradient in found])


def exact(program: Program) -> Exact:
    """Work the Fisher matrix out, with every example in a batch of its own.

    If that gives other outputs, the examples do depend on each other: then the gradients of each
    example's outputs in its batch count, whichever examples they reach.
    """
    model = program.model()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    own: list[Tensor] = []
    together: list[Tensor] = []
    separate = True
    for batch, size, target in zip(program.batches, program.sizes, program.targets, strict=True):
        outputs = model(program.arguments(batch))
        for n in range(size):
            output = model(program.arguments(alone(batch, n)))
            here = slice(n, n + 1)
            same = output.shape == outputs[here].shape
            separate = separate and same and torch.allclose(output, outputs[here], 1e-9, 1e-9)
            args = program.loss, outputs[here], target[here], program.fisher
            vectors = list(loss_vectors(*args))
            if separate:
                own.extend(gradients(output, parameters, vectors))
            together.extend((outputs, n, vector) for vector in vectors)
    if not separate:
        own = []
        for outputs, n, vector in together:
            whole = torch.zeros_like(outputs)
            whole[n] = vector[0]
            own.extend(gradients(outputs, parameters, [whole]))
    found = torch.stack(own) / normalizer(program) ** 0.5
    return Exact(found, {name: tuple(p.shape) for name, p in named.items()}, separate)


def estimate(program: Program, *, one_example: bool = False) -> EKFACLinearOperator:
    """Ask the package.

    Args:
        program: The program.
        one_example: Whether to take every batch for one example.
    """
    model = program.model()
    counting = (lambda inputs: 1) if one_example else program.num_examples
    options = {
        **program.options,
        "batch_size_fn": counting if program.counted or one_example else None,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return EKFACLinearOperator(
            model,
            program.loss,
            {name: p for name, p in model.named_parameters() if p.requires_grad},
            program.data(),
            fisher_type=program.fisher,
            check_deterministic=False,
            **options,
        )


def judge(program: Program) -> Verdict:
    """Compare the package's numbers with exact ones."""
    found = exact(program)
    verdict = compared(program, found)
    mixes = not found.separate and verdict.outcome == "refused"
    if mixes and program.fisher == "type2" and not program.kinds:
        remedied = compared(program, found, one_example=True)
        if remedied.outcome != "right":
            message = f"with a batch for one example: {remedied.message}"
            return Verdict("wrong", found.separate, message)
    return verdict


def compared(program: Program, found: Exact, *, one_example: bool = False) -> Verdict:
    """Ask the package, and compare."""
    try:
        operator = estimate(program, one_example=one_example)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = isinstance(error, ValueError) and last.startswith(PACKAGE)
        message = f"{type(error).__name__}: {error}"
        if ours and not found.vectors.any():  # no parameter matters: there is nothing to estimate
            return Verdict("right", found.separate, message)
        return Verdict("refused" if ours else "crashed", found.separate, message)
    error = found.error(operator)
    if [*operator.parameter_shapes] != [*found.shapes]:
        return Verdict("wrong", found.separate, "not all parameters are in the operator")
    right = error <= TOLERANCE
    return Verdict("right" if right else "wrong", found.separate, f"{error:.3g}")
