"""From a finished task to the terms of a penalty: its Fisher matrix, estimated and folded in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from msgspec import structs
from torch import Tensor, nn

from rotate_ewc._utils.numerics import check_trace, statistics_dtype
from rotate_ewc._utils.parameters import fits
from rotate_ewc.curvature.merge import merge_together
from rotate_ewc.curvature.operator import EKFACLinearOperator
from rotate_ewc.distributed.processes import Ranks
from rotate_ewc.estimation.estimate import fit_blocks
from rotate_ewc.linalg.block import Block
from rotate_ewc.losses import likelihood_of
from rotate_ewc.options import EstimationSettings, Mode
from rotate_ewc.penalty.owners import Owners
from rotate_ewc.penalty.temperature import fitting_temperature, softened
from rotate_ewc.penalty.terms import Term
from rotate_ewc.tracing.passes import ReiterableData


def estimate_task(
    model: nn.Module,
    loss_func: Callable[..., Any],
    named: dict[str, Tensor],
    data: Iterable[Any],
    forward: Callable[[Any], Any] | None,
    *,
    temperature: float | str,
    damping: float,
    settings: EstimationSettings,
    num_data: int | None,
    ranks: Ranks,
) -> EKFACLinearOperator:
    """Return a task's Fisher matrix, softened and damped.

    Args:
        model: The model.
        loss_func: The task's loss.
        named: The parameters to protect, by name.
        data: The task's batches.
        forward: From a batch's inputs to outputs; None is the model.
        temperature: What outputs are divided by; `"auto"` finds it.
        damping: The part of two means of the eigenvalues that is added to them, see `_damped`.
        settings: How to estimate.
        num_data: Examples that the data stand for, where they are a sample.
        ranks: The processes that estimate together.
    """
    likelihood = likelihood_of(loss_func, settings.fisher_type)
    data = ReiterableData.of(data)
    shown = likelihood.packing_forward(forward or model)
    temperature = fitting_temperature(temperature, model, shown, likelihood, data, settings, ranks)
    blocks, shapes, provenance = fit_blocks(
        softened(shown, likelihood, temperature),
        likelihood,
        named,
        data,
        settings,
        model=model,
        ranks=ranks,
        num_data=num_data,
    )
    blocks = tuple(_damped(block, temperature**2, damping) for block in blocks)
    told = {**provenance.settings, "temperature": temperature, "damping": damping}
    provenance = structs.replace(provenance, settings=told)
    return EKFACLinearOperator.from_blocks(blocks, shapes, provenance)


def check_dtypes(terms: Sequence[Term], named: Mapping[str, Tensor]) -> None:
    """Raise unless what a task will add to terms, by merging, has their dtypes.

    Args:
        terms: Those of earlier tasks.
        named: The parameters that the new task protects, by name.

    Raises:
        ValueError: If terms have been cast, or the model has, naming the parameters.
    """
    for term in terms:
        for block in term.operator.blocks:
            found = block.eigenvalues.dtype
            for name in filter(named.__contains__, block.parameters):
                wanted = statistics_dtype(named[name].dtype)
                if wanted != found:
                    raise ValueError(
                        f"the penalty's matrix of {name!r} is in {found}, but that of a new task, "
                        f"of a parameter in {named[name].dtype}, is in {wanted}; expected the same "
                        f"dtype, to merge them: call penalty.to({wanted}) before consolidate (what "
                        f"was rounded stays rounded)"
                    )


def fold_in(
    terms: Sequence[Term],
    task: Term,
    parameters: Mapping[str, Tensor],
    *,
    mode: Mode,
    decay: float,
    settings: EstimationSettings,
    ranks: Ranks,
    owners: Owners,
) -> list[Term]:
    """Return terms with one more task; in mode `"merged"` they are one, anchored at that task.

    Args:
        terms: Those of earlier tasks.
        task: The new one's.
        parameters: The model's, by name; what does not fit in them any more is left out.
        mode: Whether to merge.
        decay: Factor on the weights of earlier tasks.
        settings: What merged blocks keep, and in which dtype; of one task alone as much is kept as
            was estimated.
        ranks: The processes that merge together.
        owners: The owners of all blocks, if each process keeps only its share.

    Raises:
        ValueError: If the losses have different reductions, or the sums are not finite.
    """
    reductions = {term.operator.provenance.reduction for term in terms}
    reduction = task.operator.provenance.reduction
    if reductions - {reduction}:
        raise ValueError(
            f"loss_func has reduction {reduction!r}, but earlier tasks had "
            f"{reductions.pop()!r}; expected the same for all tasks"
        )
    left = (term.only(lambda name, anchor: fits(name, parameters, anchor)) for term in terms)
    kept = [replace(term, weight=decay * term.weight) for term in left if term]
    kept.append(task)
    if mode is Mode.MERGED:
        operators, weights = [term.operator for term in kept], [term.weight for term in kept]
        rank = settings.rank if len(kept) > 1 else None
        owner_of = owners.of if owners.are_several else None
        merged = merge_together(operators, weights, rank, ranks, owner_of)
        merged = merged.to(storage_dtype=settings.storage_dtype)
        kept = [Term(merged, {**kept[0].anchor, **task.anchor}, 1.0)]
    for term in kept:
        for block in term.operator.blocks:
            if owners.has(block.parameters[0]):
                check_trace(block.trace * term.weight, block.label)
    return kept


def _damped(block: Block, factor: float, damping: float) -> Block:
    """Return a block with eigenvalues times a factor, and more by a part of two of their means.

    One is the mean over the whole block. The other is that over the outputs, for each direction of
    the inputs: it holds on to what a layer computes for old inputs (see `docs/design.md`).
    """
    block = block.with_eigenvalues(block.eigenvalues * factor)
    _, of_inputs = block.partial_traces
    _, d_out, _ = block.shape
    mean_over_outputs = of_inputs[:, None, :] / d_out
    return block.with_eigenvalues(block.eigenvalues + damping * (mean_over_outputs + block.mean))
