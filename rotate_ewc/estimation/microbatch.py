"""Some examples of a captured batch, as one block sees them: no more than fit in memory.

If memory runs out all the same, a microbatch is taken again in halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from rotate_ewc._utils.messages import left_out
from rotate_ewc._utils.numerics import statistics_dtype, without_autocast
from rotate_ewc._utils.out_of_memory import is_out_of_memory
from rotate_ewc.layers import FactoredCall, Factors
from rotate_ewc.linalg import eigenvalues
from rotate_ewc.linalg.tied_eigenvalues import TiedFactors
from rotate_ewc.tracing.block_plan import BlockPlan, Contribution
from rotate_ewc.tracing.capture import CapturedBatch

# What is made of a microbatch at a time: laid out, copied, rotated, squared.
_TENSORS_IN_WORK: Final = 4


@dataclass(frozen=True)
class Microbatch:
    """Some examples of a captured batch, and some of its output vectors, as one block sees them.

    Attributes:
        captured: The batch.
        plan: How the block comes out of it.
        examples: Which examples.
        vectors: Which output vectors.
        max_bytes: What the work on them may take, beyond the tensors returned here.
    """

    captured: CapturedBatch
    plan: BlockPlan
    examples: slice
    vectors: range
    max_bytes: int

    @property
    def label(self) -> str:
        """The block's name."""
        return self.plan.key.label

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters of the block, and of the one that follows it."""
        follower = self.plan.follower
        return (*self.plan.key.parameters, *(follower.parameters if follower else ()))

    def by_vector(self) -> Iterator[Microbatch]:
        """Yield the same examples with every output vector by itself."""
        for vector in self.vectors:
            yield replace(self, vectors=range(vector, vector + 1))

    def halves(self) -> tuple[Microbatch, ...]:
        """Return two microbatches of half the examples; none for a single example."""
        start, stop = self.examples.start, self.examples.stop
        middle = (start + stop) // 2
        if middle == start:
            return ()
        halves = (slice(start, middle), slice(middle, stop))
        return tuple(replace(self, examples=h, max_bytes=self.max_bytes // 2) for h in halves)

    def block_activations(self) -> Tensor:
        """Return the block's inputs a, `[groups, n, shared, d_in]`, in float32 or better.

        In a joint block the first feature is a one, which stands for the bias. Of an embedding they
        are the indices, `[1, n, shared, 1]`. Positions that an example does not have are zero.
        """
        return self._activations()[0]

    def mean_activations(self) -> Tensor:
        """Return the means of the block's inputs over shared positions, `[groups, n, 1, d_in]`."""
        activations, present = self._activations()
        if present is None and activations.shape[2]:
            return activations.mean(dim=2, keepdim=True)
        if present is None:  # of nothing, which is zero here, and no number elsewhere
            return activations.sum(dim=2, keepdim=True)
        counts = present.sum(dim=1).clamp(min=1)
        return activations.sum(dim=2, keepdim=True) / counts[:, None, None]

    def _activations(self) -> tuple[Tensor, Tensor | None]:
        """Return the block's inputs, and which positions exist, `[n, shared]`; None if all do."""
        parts = [call.activations(self._inputs(index)) for index, call in self._factored_calls()]
        present = self._present([part.shape[2] for part in parts])
        activations = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        activations = self._as_statistics(activations)
        if self.plan.key.bias is not None:
            activations = torch.cat([torch.ones_like(activations[..., :1]), activations], dim=3)
        if present is not None and self.plan.form.factors is not Factors.LOOKUP:
            activations = activations * present[:, :, None]
        return activations, present

    def _present(self, shared: Sequence[int]) -> Tensor | None:
        """Return which shared positions exist, given how many each of the block's uses has."""
        uses = [index for index, _ in self._factored_calls()]
        masks = [self.captured.present[use] for use in uses]
        if all(mask is None for mask in masks):
            return None
        every = torch.ones(
            len(self._inputs(uses[0])), 1, dtype=torch.bool, device=self.plan.parameter.device
        )
        return torch.cat(
            [
                every.expand(-1, size)
                if mask is None
                else mask[self.examples].repeat_interleave(size // max(1, mask.shape[1]), dim=1)
                for mask, size in zip(masks, shared, strict=True)
            ],
            dim=1,
        )

    def block_gradients(self) -> Iterator[Tensor]:
        """Yield, for every output vector, the block's gradients g, `[groups, n, shared, d_out]`."""
        for vector in self.vectors:
            parts = [
                call.gradients(self._output_gradients(vector, index))
                for index, call in self._factored_calls()
            ]
            yield self._as_statistics(torch.cat(parts, dim=2) if len(parts) > 1 else parts[0])

    def tied_factors(self) -> Iterator[TiedFactors]:
        """Yield, for every output vector, the factors of a tied embedding's gradients."""
        for vector in self.vectors:
            dense, looked_up = [], []
            for index, call in self._factored_calls():
                inputs = call.activations(self._inputs(index))[0]
                gradients = self._as_statistics(
                    call.gradients(self._output_gradients(vector, index))[0]
                )
                if call.weight_form.factors is Factors.LOOKUP:
                    looked_up.append((gradients, inputs[:, :, 0]))
                    continue
                inputs = self._as_statistics(inputs)
                pair = (gradients, inputs) if call.weight_form.transposed else (inputs, gradients)
                dense.append(pair)
            features, words = (_joined(parts) for parts in zip(*dense, strict=True))
            rows, indices = (_joined(parts) for parts in zip(*looked_up, strict=True))
            yield TiedFactors(torch.cat([features, rows], dim=1), words, indices)

    def per_example_gradients(self) -> Iterator[Tensor]:
        """Yield, for every output vector, per-example gradients `[groups, n, d_out, d_in]`."""
        for vector in self.vectors:
            parts = (self._contributed(c, vector) for c in self.plan.contributions)
            total = next(parts)
            for part in parts:
                total = total + part
            yield self.plan.form.matrices(total)

    def _factored_calls(self) -> Iterator[tuple[int, FactoredCall]]:
        """Yield the block's uses; in a block of factored form all are of this kind."""
        for index in self.plan.uses:
            call = self.captured.uses[index].call
            if isinstance(call, FactoredCall):
                yield index, call

    def _contributed(self, contribution: Contribution, vector: int) -> Tensor:
        """Return one use's part of the per-example gradients, `[n, *parameter.shape]`."""
        call = self.captured.uses[contribution.use].call
        gradients = self._as_statistics(self._output_gradients(vector, contribution.use))
        if contribution.is_weight:
            inputs = self._as_statistics(self._inputs(contribution.use))
            gradients = call.weight_gradients(inputs, gradients)
        else:
            gradients = call.bias_gradients(gradients)
        if contribution.through is None:
            return gradients
        computed = self.captured.computed[contribution.through]
        return computed.pull_back(gradients, self.plan.parameter)

    def _inputs(self, use: int) -> Tensor:
        return self.captured.inputs[use][self.examples]

    def _output_gradients(self, vector: int, use: int) -> Tensor:
        return self.captured.gradients[vector][use][self.examples]

    def _as_statistics(self, tensor: Tensor) -> Tensor:
        dtype = statistics_dtype(self.plan.parameter.dtype)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Join what several uses have at their positions; one alone is not copied."""
    return torch.cat([*parts], dim=1) if len(parts) > 1 else parts[0]


def microbatches(captured: CapturedBatch, plan: BlockPlan, max_bytes: int) -> Iterator[Microbatch]:
    """Cut the examples so that what is made of one microbatch stays within `max_bytes`.

    Also, a tensor of a microbatch is no larger than a few chunks, for the sake of speed.
    """
    chunk = eigenvalues.chunk_bytes(plan.parameter.device)
    most = min(max_bytes, _TENSORS_IN_WORK * chunk)
    size = max(1, most // max(1, _bytes_per_example(captured, plan)))
    vectors = range(len(captured.gradients))
    for start in range(0, captured.num_examples, size):
        examples = slice(start, min(start + size, captured.num_examples))
        yield Microbatch(captured, plan, examples, vectors, max_bytes)


def in_halves(microbatch: Microbatch, add: Callable[[Microbatch], None]) -> None:
    """Add the contribution of a microbatch; if memory runs out, one half after the other.

    Sums of outer products are added to in place rather than returned and added: for a batch of 32
    and 784 inputs that takes half the time, and no memory of the size of the sum.

    Args:
        microbatch: The examples.
        add: Adds what examples contribute to sums. It must allocate all that it takes before it
            changes a sum, and is called outside of `torch.autocast`.

    Raises:
        MemoryError: If a single example needs more memory than there is, naming the block.
    """
    try:
        with without_autocast(microbatch.plan.parameter.device):
            add(microbatch)
        return
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = f"{error}"
    # Not in the handler: as long as the error lives, so do the tensors of the work that failed.
    halves = microbatch.halves()
    if not halves:
        raise MemoryError(
            f"out of memory while processing one example for the block of {microbatch.label!r} "
            f"({reason}); pass a smaller memory_budget, so that less is kept meanwhile, use "
            f"smaller batches, or {left_out(microbatch.names)}"
        )
    for half in halves:
        in_halves(half, add)


def _bytes_per_example(captured: CapturedBatch, plan: BlockPlan) -> int:
    """Bytes that the work on one example takes in a block."""
    elements, itemsize = 0, torch.float32.itemsize
    for index in plan.uses:
        use = captured.uses[index]
        # Where rows are scattered, every example has as many as the one with the most.
        most = -(-captured.inputs[index].numel() // max(1, use.call.input.numel()))
        elements += most * use.call.elements(use.output_shape) // captured.num_examples
        itemsize = max(itemsize, captured.gradients[0][index].itemsize)
    if plan.form.factors is Factors.NONE:
        size = plan.parameter.numel()
        through = {c.through for c in plan.contributions if c.through is not None}
        elements += size
        elements += sum(size + captured.computed[key].tensor.numel() for key in through)
    return _TENSORS_IN_WORK * elements * itemsize
