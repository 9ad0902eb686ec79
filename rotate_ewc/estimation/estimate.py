"""Estimate the blocks of a model in passes over the data, and leave the model as it was.

The first pass sums the Kronecker factors, whose eigenvectors become the bases. The second finds, in
these bases, the exact mean squares of the per-example gradients.

Everything is summed in a fixed order: on a CPU the same seed, the same batches and the same number
of threads give the same bits, in every process. Another number of threads rounds differently, which
may rotate the basis of equal eigenvalues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from rotate_ewc._utils.messages import left_out, parameters_are, quoted
from rotate_ewc._utils.numerics import check_trace, statistics_dtype, underflowed
from rotate_ewc._utils.parameters import check_matching
from rotate_ewc._utils.preserve_state import undisturbed
from rotate_ewc._utils.reached_modules import reached_modules
from rotate_ewc._utils.warnings import warn_user
from rotate_ewc.distributed.processes import Ranks
from rotate_ewc.estimation.repeatability import WatchedForward, check_equal
from rotate_ewc.estimation.rounds import Sums, estimate_in_rounds
from rotate_ewc.linalg.block import Block, matrix_shape
from rotate_ewc.linalg.storage import stored_in
from rotate_ewc.losses import Likelihood
from rotate_ewc.options import EstimationSettings, Reduction, Unsupported
from rotate_ewc.provenance import Provenance
from rotate_ewc.tracing.capture import BatchCapturer
from rotate_ewc.tracing.origins import NO_CONSTANTS, Constants
from rotate_ewc.tracing.passes import (
    ReiterableData,
    batches,
    naming_batch,
    noting_batch,
)

# The settings that affect the result.
_TOLD: Final = (
    *("mc_samples", "kfac_approx", "rank", "diagonal", "separate_weight_and_bias", "seed"),
    *("unsupported", "storage_dtype"),
)


@dataclass(frozen=True)
class Estimate:
    """What estimation found.

    Attributes:
        blocks: One for every parameter, or pair of weight and bias.
        num_examples: Number of examples seen.
        num_loss_terms: Number of terms in their loss, by which the reduction `mean` divides.
        used: The blocks of the parameters on which an output depended.
        underflowed: Blocks that get gradients whose squares are too small for their dtype.
        unused: Names of the parameters on which no output depended.
        unsupported: Names of the parameters with uses for which there is no rule.
    """

    blocks: tuple[Block, ...]
    num_examples: int
    num_loss_terms: float
    used: tuple[Block, ...]
    underflowed: tuple[Block, ...]
    unused: tuple[str, ...]
    unsupported: tuple[str, ...]


def fit_blocks(
    forward: Callable[[Any], Tensor],
    likelihood: Likelihood,
    parameters: Mapping[str, Tensor],
    data: Iterable[Any],
    settings: EstimationSettings,
    *,
    model: nn.Module | None,
    ranks: Ranks,
    num_data: int | None = None,
    check_deterministic: bool = False,
) -> tuple[tuple[Block, ...], dict[str, torch.Size], Provenance]:
    """Estimate the blocks of an operator, leaving the model and the random states as they were.

    Call it inside `ranks.together()`.

    Args:
        forward: From a batch's inputs to the model's outputs, packed by the likelihood.
        likelihood: The distribution behind the loss.
        parameters: The parameters of the matrix, by name.
        data: Re-iterable batches (inputs, targets).
        settings: How to estimate.
        model: The model; None if it is not known. It is put into eval mode, and so are the modules
            that can be reached from `forward`.
        ranks: The processes, each with data of its own, that estimate one matrix.
        num_data: Number of examples that all the data represent, if they are a sample of a larger
            set.
        check_deterministic: Whether to estimate twice and raise if the results differ.

    Returns:
        Blocks, parameter shapes by name, and provenance.

    Raises:
        ValueError: If a parameter, layer, loss or batch cannot be handled, naming it.
        TypeError: If a part of a batch, or the outputs, have the wrong type.
    """
    if ranks.size > 1:
        _check_same(likelihood, parameters, settings, num_data, ranks)
    given, parameters = parameters, _without_complex(parameters, settings.unsupported)
    complex_names = tuple(name for name in given if name not in parameters)
    ranked = settings.rank if isinstance(settings.rank, Mapping) else ()
    for argument, patterns in (("rank", ranked), ("diagonal", settings.diagonal)):
        check_matching(argument, patterns, given, "parameter that is estimated")
    data = ReiterableData.of(data)
    modules = [] if model is None else [*model.modules()]
    for function in (forward, *likelihood.user_functions):
        modules += reached_modules(function)
    constants = Constants.of(modules)
    watched = WatchedForward(forward, {parameter.device for parameter in parameters.values()})
    with undisturbed(modules, parameters.values(), data), torch.inference_mode(False):
        arguments = (likelihood, parameters, data, settings, constants, num_data, ranks)
        found = estimate(watched, *arguments)
        if check_deterministic:
            again = estimate(forward, *arguments)
            check_equal(found.blocks, again.blocks)
        watched.warn_if_random()
    if len(found.unused) == len(parameters):
        raise ValueError(
            f"the outputs depend on none of the parameters ({quoted(found.unused)}), "
            f"according to autograd; expected a model that is not run inside torch.no_grad or "
            f"torch.inference_mode, whose outputs are not detached, and an estimation that is not "
            f"inside a transform of torch.func"
        )
    if model is None and found.unused:
        raise ValueError(
            f"{parameters_are(found.unused)} not used by model_func; expected parameters that the "
            f"outputs depend on: {left_out(found.unused)}"
        )
    _check_num_data(num_data, found.num_examples, ranks)
    _warn_of_vanished(found.used, found.underflowed, found.num_examples)
    unsupported = (*found.unsupported, *complex_names)
    if unsupported:
        _warn_of_unsupported(unsupported, settings)
    if not found.blocks:
        raise ValueError(_nothing_left(unsupported))
    stands_for = num_data or found.num_examples
    provenance = Provenance(
        loss=likelihood.name,
        reduction=Reduction(likelihood.final_reduction),
        fisher_type=settings.fisher_type,
        num_data=stands_for,
        num_loss_terms=stands_for * (found.num_loss_terms / max(1, found.num_examples)),
        settings={
            **{name: value for name, value in settings.to_json().items() if name in _TOLD},
            "num_data_seen": found.num_examples,
        },
    )
    kept = {name for block in found.blocks for name in block.parameters}
    shapes = {name: parameter.shape for name, parameter in parameters.items() if name in kept}
    return stored_in(found.blocks, settings.storage_dtype), shapes, provenance


def _check_num_data(num_data: int | None, num_examples: int, ranks: Ranks) -> None:
    """Raise unless the data can be a sample of as many examples as they are to stand for."""
    # Samplers for several processes repeat examples, so that all processes have as many.
    if ranks.size == 1 and num_data is not None and num_data < num_examples:
        raise ValueError(
            f"num_data is {num_data}, but data has {num_examples} examples; expected the size of "
            f"the whole set, of which data may be a sample, so at least {num_examples}; or None, "
            f"which takes the number in data"
        )


def _check_same(
    likelihood: Likelihood,
    parameters: Mapping[str, Tensor],
    settings: EstimationSettings,
    num_data: int | None,
    ranks: Ranks,
) -> None:
    """Raise unless all processes are about to estimate the same matrix of the same model."""
    own = {"memory_budget", "progressbar"}
    ranks.check_same(
        {
            "loss_func": (likelihood.name, likelihood.final_reduction),
            "num_data": num_data,
            "params": {name: (list(p.shape), str(p.dtype)) for name, p in parameters.items()},
            **{name: value for name, value in settings.to_json().items() if name not in own},
        }
    )
    real = {name: p.detach() for name, p in parameters.items() if not p.is_complex()}
    sums = [torch.stack([p.double().sum(), p.double().abs().sum()]) for p in real.values()]
    every = ranks.gather("weights", [one.tolist() for one in sums])
    for rank, others in enumerate(every):
        pairs = zip(real, every[0], others, strict=True)
        if differing := [n for n, a, b in pairs if abs(a[0] - b[0]) > 1e-6 * max(a[1], b[1])]:
            raise ValueError(
                f"{parameters_are(differing)} not the same on rank {rank} as on rank 0; expected "
                f"replicas with the same weights, as DistributedDataParallel keeps them (or "
                f"group=None, for each process alone)"
            )


def estimate(
    forward: Callable[[Any], Tensor],
    likelihood: Likelihood,
    parameters: Mapping[str, Tensor],
    data: Iterable[Any],
    settings: EstimationSettings,
    constants: Constants = NO_CONSTANTS,
    num_data: int | None = None,
    ranks: Ranks | None = None,
) -> Estimate:
    """Estimate the Fisher matrix of a loss over a data set, block by block.

    Half of the memory budget is for batches kept for the second pass, a quarter for the gradients
    of a batch's output vectors, and a quarter for the work on a block. Kronecker factors may take
    as much again. If they need more, there are several rounds of two passes, each for some of the
    blocks.

    Args:
        forward: From a batch's inputs to the model's outputs.
        likelihood: The distribution behind the loss.
        parameters: The parameters of the matrix, by name; all must require gradients.
        data: Re-iterable batches (inputs, targets).
        settings: How to estimate.
        constants: The model's tensors that do not depend on the data.
        num_data: Number of examples that all the data represent, if they are a sample of a larger
            set.
        ranks: The processes that estimate together; None is this one alone.

    Returns:
        The same in all processes: blocks in the order of `parameters`. A parameter on which the
        outputs do not depend has a block of zeros, its exact Fisher matrix; one that is to be
        skipped has none.

    Raises:
        ValueError: If the data, outputs or a layer cannot be handled; the message names which.
        TypeError: If the outputs, or a batch's parts, have the wrong type.
        MemoryError: If a single example, or a decomposition, needs more memory than there is.
    """
    ranks, data = ranks or Ranks(), ReiterableData.of(data)
    capturer = BatchCapturer(forward, likelihood, parameters, settings, constants)
    capturer.likelihood = likelihood = _counted(capturer, data, ranks)
    found = estimate_in_rounds(capturer, data, parameters, ranks)
    diagonals = [_diagonal(name, squares) for name, squares in found.squares.items()]
    used = (*found.blocks.values(), *diagonals)
    scale = _scale(found, likelihood, num_data)
    by_name = {}
    for block in used:
        block.eigenvalues.mul_(scale)
        if block.is_thin:
            rows, columns = block.multiplicities
            block.eigenvalues.div_(rows[:, None] * columns)
        check_trace(block.trace, block.label)
        by_name.update(dict.fromkeys(block.parameters, block))
    vanished = tuple(
        block
        for key, block in found.blocks.items()
        if key in found.reached and (key in found.tiny or underflowed(block.eigenvalues))
    )
    unsupported = tuple(name for name in parameters if name in found.unsupported)
    skipped = unsupported if settings.unsupported is Unsupported.SKIP else ()
    wanted = [name for name in parameters if name not in skipped]
    unused = tuple(name for name in wanted if name not in by_name)
    by_name.update({name: _diagonal(name, torch.zeros_like(parameters[name])) for name in unused})
    blocks = tuple(dict.fromkeys(by_name[name] for name in wanted))
    return Estimate(
        blocks, found.num_examples, found.normalizer, used, vanished, unused, unsupported
    )


def _counted(capturer: BatchCapturer, data: ReiterableData, ranks: Ranks) -> Likelihood:
    """Return the likelihood with its counts over all data, from a pass without gradients.

    A loss without counts needs no such pass. Sums of means have counts.
    """
    likelihood, settings = capturer.likelihood, capturer.settings
    if not likelihood.has_counts:
        return likelihood
    total: Tensor | None = None
    num_examples = 0
    shown = batches(
        data,
        capturer.device,
        likelihood.batch_form,
        progressbar=bool(settings.progressbar),
        description="loss terms",
        ranks=ranks,
    )
    for number, inputs, targets in shown:
        with torch.no_grad(), naming_batch(number), noting_batch(number):
            outputs = capturer.forward(inputs)
            outputs = outputs.to(statistics_dtype(outputs.dtype))
            current = likelihood.current
            targets = current.completed_targets(outputs, targets, settings.fisher_type)
            current.check(outputs, targets)
            num_examples += capturer.counter.count(inputs, outputs, targets)
            counts = current.counts(outputs, targets)
            total = counts if total is None else total + counts
    data.end_pass(num_examples)
    every = ranks.gather("loss terms", None if total is None else total.cpu())
    known = [counts for counts in every if counts is not None]
    return likelihood.with_counts(torch.stack(known).sum(dim=0)) if known else likelihood


def _scale(found: Sums, likelihood: Likelihood, num_data: int | None) -> float:
    """Return the factor that turns sums over the examples seen into the loss's reduction."""
    if likelihood.final_reduction == "mean":
        if found.normalizer <= 0:
            raise ValueError(
                "no target in the data counts (all are ignored, or have weight 0), so the mean "
                "loss is undefined; expected at least one"
            )
        return 1.0 / found.normalizer
    return (num_data or found.num_examples) / max(1, found.num_examples)


def _diagonal(name: str, values: Tensor) -> Block:
    """Return a block with the identity for both bases."""
    dtype = statistics_dtype(values.dtype)
    shape = matrix_shape(values.shape, groups=1, transposed=False)
    return Block((name,), None, None, values.detach().reshape(shape).to(dtype))


def _without_complex(
    parameters: Mapping[str, Tensor], unsupported: Unsupported
) -> dict[str, Tensor]:
    """Return the real parameters; raise if there are complex ones that may not be left out.

    The Fisher matrix over a complex parameter has two rows for each entry, of its real and its
    imaginary part, and no diagonal of the parameter's own shape.
    """
    names = [name for name, parameter in parameters.items() if parameter.is_complex()]
    if names and unsupported is not Unsupported.SKIP:
        raise ValueError(
            f"{parameters_are(names)} complex, with a Fisher matrix over real and imaginary parts "
            f"that has no diagonal of the parameter's shape. Pass unsupported='skip' to protect "
            f"only the others, {left_out(names)}, or make a real parameter with a last axis of two "
            f"(torch.view_as_real), which the model uses through torch.view_as_complex, and pass "
            f"unsupported='diagonal'"
        )
    if len(names) == len(parameters):
        raise ValueError(_nothing_left(names))
    return {name: tensor for name, tensor in parameters.items() if name not in names}


def _nothing_left(names: Sequence[str]) -> str:
    return (
        f"no parameter is left: unsupported='skip' leaves out {quoted(names)}, and there are no "
        f"others; expected some in linear layers, convolutions and the like"
    )


def _warn_of_vanished(used: Sequence[Block], vanished: Sequence[Block], num_examples: int) -> None:
    """Warn once if the Fisher matrix, or a part of it, is zero only because of underflow.

    Args:
        used: The blocks of all parameters that the outputs depend on.
        vanished: The blocks among them that get gradients, but with squares that are too small.
        num_examples: Number of examples seen.
    """
    if used and all(underflowed(block.eigenvalues) for block in used):
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
    elif vanished:
        labels = quoted(block.label for block in vanished)
        warn_user(
            f"the Fisher matrix of {labels} has vanished, or lost its precision: gradients do "
            f"reach these parameters, but squares of them, or of layer inputs, are too small for "
            f"{vanished[0].eigenvalues.dtype}, so that they are not protected. Use a model in "
            f"float64 (model.double()), or layer inputs and parameters of usual size",
            RuntimeWarning,
        )


def _warn_of_unsupported(names: Sequence[str], settings: EstimationSettings) -> None:
    """Warn of the parameters that have no rule, and say how they were treated."""
    treated = {
        Unsupported.DIAGONAL: "their Fisher matrix is an exact diagonal, without a rotated basis",
        Unsupported.SKIP: "they are left out, and not protected",
    }[settings.unsupported]
    warn_user(
        f"there is no rule for the way in which these parameters are used: "
        f"{quoted(names)}; {treated}"
    )
