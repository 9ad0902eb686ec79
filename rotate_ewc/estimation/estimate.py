"""From a model, a loss and data to finished blocks, and no trace of having been there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from rotate_ewc._utils.numerics import is_faint
from rotate_ewc._utils.preserve_state import undisturbed
from rotate_ewc._utils.warnings import warn_user
from rotate_ewc.estimation.passes import Estimate, estimate
from rotate_ewc.linalg.block import Block
from rotate_ewc.losses import likelihood_of
from rotate_ewc.options import EstimationSettings, Unsupported
from rotate_ewc.provenance import Provenance

# The settings that matter to what is found.
_TOLD: Final = ("mc_samples", "kfac_approx", "separate_weight_and_bias", "seed", "unsupported")


def fit_blocks(
    forward: Callable[[Any], Tensor],
    loss_func: Callable[..., Any],
    parameters: Mapping[str, Tensor],
    data: Iterable[Any],
    settings: EstimationSettings,
    *,
    model: nn.Module | None,
    num_data: int | None = None,
    check_deterministic: bool = False,
) -> tuple[tuple[Block, ...], dict[str, torch.Size], Provenance]:
    """Estimate the blocks of an operator, leaving the model and the random states as they were.

    Args:
        forward: From a batch's inputs to the model's outputs.
        loss_func: The loss.
        parameters: What the matrix is over, by name.
        data: Re-iterable batches (inputs, targets).
        settings: How to estimate.
        model: The module to put into eval mode; None if it is not known.
        num_data: Examples that the data stand for, where they are a sample of a larger set.
        check_deterministic: Whether to estimate twice and raise if the results differ.

    Returns:
        Blocks, parameter shapes by name, and provenance.

    Raises:
        ValueError: If a parameter, layer, loss or batch cannot be handled, naming it.
        TypeError: If a part of a batch, or the outputs, have the wrong type.
    """
    likelihood = likelihood_of(loss_func)
    constants = [] if model is None else [*model.buffers(), *model.parameters()]
    with undisturbed(model, parameters.values()), torch.inference_mode(False):
        found = estimate(forward, likelihood, parameters, data, settings, constants, num_data)
        if check_deterministic:
            again = estimate(forward, likelihood, parameters, data, settings, constants, num_data)
            _check_equal(found.blocks, again.blocks)
    if len(found.unused) == len(parameters):
        raise ValueError(
            f"the outputs depend on none of the parameters ({', '.join(map(repr, found.unused))}), "
            f"as far as autograd knows; expected a model that is not run inside torch.no_grad or "
            f"torch.inference_mode, whose outputs are not detached, and an estimation that is not "
            f"inside a transform of torch.func"
        )
    if model is None and found.unused:
        raise ValueError(
            f"parameter {found.unused[0]!r} is not used by model_func; expected parameters that "
            f"the outputs depend on"
        )
    _warn_of_vanished(found.used, found.faint, found.num_examples)
    if found.unsupported:
        _warn(found, settings)
    if not found.blocks:
        raise ValueError(
            f"no parameter is left: unsupported='skip' leaves out {list(found.unsupported)}, and "
            f"there are no others"
        )
    provenance = Provenance(
        loss=likelihood.name,
        reduction=likelihood.reduction,
        fisher_type=settings.fisher_type.value,
        num_data=num_data or found.num_examples,
        settings={
            **{name: settings.to_json()[name] for name in _TOLD},
            "num_data_seen": found.num_examples,
        },
    )
    kept = {name for block in found.blocks for name in block.parameters}
    shapes = {name: parameter.shape for name, parameter in parameters.items() if name in kept}
    return found.blocks, shapes, provenance


def _warn_of_vanished(used: Sequence[Block], faint: Sequence[Block], num_examples: int) -> None:
    """Warn, once, if the Fisher matrix or a part of it is zero only for want of a wider range.

    Args:
        used: The blocks of all parameters that the outputs depend on.
        faint: Those of them that do get gradients, whose squares are too small though.
        num_examples: Examples seen.
    """
    if used and all(is_faint(block.eigenvalues) for block in used):
        dtype = used[0].eigenvalues.dtype
        warn_user(
            f"the Fisher matrix has vanished: over {num_examples} examples, all of its eigenvalues "
            f"are zero or too small for {dtype}, so that nothing is protected. The model is sure "
            f"of every prediction (or no label counts, or these parameters have no effect). Soften "
            f"the predictions (temperature above 1), take the exact expectation over labels "
            f"(fisher_type='type2') instead of sampled ones, pass more examples, or train for less "
            f"long",
            RuntimeWarning,
        )
    elif faint:
        labels = ", ".join(repr(block.label) for block in faint)
        warn_user(
            f"the Fisher matrix of {labels} has vanished, or lost its precision: gradients do "
            f"reach these parameters, but squares of them, or of layer inputs, are too small for "
            f"{faint[0].eigenvalues.dtype}, so that they are not protected. Use a model in float64 "
            f"(model.double()), or layer inputs and parameters of usual size",
            RuntimeWarning,
        )


def _warn(found: Estimate, settings: EstimationSettings) -> None:
    """Say which parameters have no rule, and what became of them."""
    treated = {
        Unsupported.DIAGONAL: "their Fisher matrix is an exact diagonal, without a rotated basis",
        Unsupported.SKIP: "they are left out, and not protected",
    }[settings.unsupported]
    warn_user(
        f"there is no rule for the way in which these parameters are used: "
        f"{', '.join(map(repr, found.unsupported))}; {treated}"
    )


def _check_equal(blocks: Sequence[Block], others: Sequence[Block]) -> None:
    """Raise if two estimates differ by more than rounding, naming the first block that does."""
    for block, other in zip(blocks, others, strict=True):
        first, second = block.trace.item(), other.trace.item()
        tolerance = 1e-3 if block.eigenvalues.dtype is torch.float32 else 1e-8
        if abs(first - second) > tolerance * max(abs(first), abs(second)):
            raise ValueError(
                f"two estimates of the block of {block.label!r} have traces {first:.6g} and "
                f"{second:.6g}: the model or the data loader is random (shuffling, augmentation, "
                f"dropout in a function). Make it deterministic, or pass check_deterministic=False"
            )
