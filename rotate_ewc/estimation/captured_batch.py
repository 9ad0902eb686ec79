"""What one batch shows of every layer, and the portions of it that one block is estimated from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from rotate_ewc._utils.numerics import statistics_dtype
from rotate_ewc._utils.tree import tensors_in, version_of
from rotate_ewc.layers import FactoredCall, Factors, LayerCall
from rotate_ewc.linalg.eigenvalues import chunk_bytes
from rotate_ewc.tracing.block_plan import BlockKey, Contribution, Plan
from rotate_ewc.tracing.example_axis import Placement
from rotate_ewc.tracing.recorder import Computed, Use

# What is made of a portion at a time: laid out, copied, rotated, squared.
_TENSORS_IN_WORK: Final = 4


@dataclass(frozen=True)
class Observation:
    """One batch's layer inputs and the gradients of some of its output vectors.

    Attributes:
        num_examples: Examples in the batch.
        mass: What the batch adds to the normaliser.
        parameters: The parameters, by name.
        plans: The blocks that the uses make.
        uses: Every use of a parameter.
        placements: Where the examples are, for every use.
        computed: The computed tensors that uses may name instead of parameters.
        gradient_sets: For every output vector, the gradient at the output of every use.
        first: Whether this is the batch's first observation; a batch is cut into several when the
            gradients of all its output vectors would not fit in the memory budget.
        squares: Squared per-example gradients, summed, of parameters whose uses have no rule.
        batch: The batch's number in the data.
        given: The batch's inputs and targets.
        versions: How often the tensors in these had been written to.
        random_state: State of the generator of labels after the batch; None if more observations of
            it follow.
    """

    num_examples: int
    mass: float
    parameters: Mapping[str, Tensor]
    plans: Sequence[Plan]
    uses: Sequence[Use]
    placements: Sequence[Placement]
    computed: Mapping[str, Computed]
    gradient_sets: Sequence[Sequence[Tensor]] = ()
    first: bool = True
    squares: Mapping[str, Tensor] = field(default_factory=dict)
    batch: int = 0
    given: tuple[Any, Any] = (None, None)
    versions: Sequence[int] = ()
    random_state: Tensor | None = None

    @property
    def storages(self) -> dict[int, int]:
        """Bytes of the memory that keeping the observation keeps, by address.

        It is all of what its tensors are views of, and several observations may share some.
        """
        tensors = [gradient for gradient_set in self.gradient_sets for gradient in gradient_set]
        tensors += [use.call.input for use in self.uses]
        tensors += tensors_in(self.given)
        return dict(map(_memory, tensors))

    @property
    def unmodified(self) -> bool:
        """Whether the batch and the layers' inputs are still what they were."""
        versions = [version_of(tensor) for tensor in tensors_in(self.given)]
        return versions == list(self.versions) and all(use.unmodified for use in self.uses)

    @property
    def followers(self) -> dict[BlockKey, BlockKey]:
        """Weights, by the biases whose per-example gradients are the weights' g, in this batch.

        That is so with one shared position: what is computed from g is then computed for both.
        """
        return {
            plan.follower: plan.key
            for plan in self.plans
            if plan.follower is not None and self._has_one_position(plan)
        }

    def portions(self, plan: Plan, max_bytes: int) -> Iterator[Portion]:
        """Cut the examples so that what is made of one portion stays within `max_bytes`.

        Also, a tensor of a portion is no larger than a few chunks, for the sake of speed.
        """
        device = self.parameters[plan.key.weight].device
        most = min(max_bytes, _TENSORS_IN_WORK * chunk_bytes(device))
        size = max(1, most // max(1, self._bytes_per_example(plan)))
        for start in range(0, self.num_examples, size):
            yield Portion(self, plan, slice(start, min(start + size, self.num_examples)), max_bytes)

    def reaches(self, plan: Plan) -> bool:
        """Whether a block gets a gradient that is not zero; False where that is not obvious.

        It is where the gradients are outer products of g and something else, or are g.
        """
        for contribution in plan.contributions:
            if contribution.is_weight:
                inputs = self.uses[contribution.use].call.input
                obvious = plan.form.factors is not Factors.NONE
                obvious = obvious and (not inputs.is_floating_point() or bool(inputs.any()))
            else:
                obvious = plan.uniform and self._has_one_position(plan)
            if obvious and any(bool(found[contribution.use].any()) for found in self.gradient_sets):
                return True
        return False

    def _bytes_per_example(self, plan: Plan) -> int:
        """Bytes that the work on one example takes in a block."""
        elements, itemsize = 0, torch.float32.itemsize
        for index in plan.uses:
            gradient = self.gradient_sets[0][index]
            elements += self.uses[index].call.elements(gradient) // self.num_examples
            itemsize = max(itemsize, gradient.itemsize)
        if plan.form.factors is Factors.NONE:
            size = self.parameters[plan.key.weight].numel()
            through = {c.through for c in plan.contributions if c.through is not None}
            elements += size
            elements += sum(size + self.computed[key].tensor.numel() for key in through)
        return _TENSORS_IN_WORK * elements * itemsize

    def _has_one_position(self, plan: Plan) -> bool:
        groups, d_out, _ = plan.form.shape(self.parameters[plan.key.weight].shape)
        gradient = self.gradient_sets[0][plan.uses[0]]
        return gradient.numel() == self.num_examples * groups * d_out


@dataclass(frozen=True)
class Portion:
    """Some examples of an observation, as one block sees them.

    Attributes:
        observation: The observation.
        plan: How the block comes out of it.
        examples: Which examples.
        max_bytes: What the work on them may take, beyond the tensors returned here.
    """

    observation: Observation
    plan: Plan
    examples: slice
    max_bytes: int

    @property
    def label(self) -> str:
        """The block's name."""
        return self.plan.key.label

    def halves(self) -> tuple[Portion, ...]:
        """Return two portions of half the examples; none for a single example."""
        start, stop = self.examples.start, self.examples.stop
        middle = (start + stop) // 2
        if middle == start:
            return ()
        halves = (slice(start, middle), slice(middle, stop))
        return tuple(replace(self, examples=h, max_bytes=self.max_bytes // 2) for h in halves)

    @property
    def dtype(self) -> torch.dtype:
        """Statistics are accumulated in float32 or better, whatever the model computes in."""
        parameter = self.observation.parameters[self.plan.key.weight]
        return statistics_dtype(parameter.dtype)

    @property
    def num_vectors(self) -> int:
        """Number of output vectors."""
        return len(self.observation.gradient_sets)

    def activations(self) -> Tensor:
        """Return the block's inputs a, `[groups, n, shared, d_in]`, in float32 or better.

        In a joint block the first feature is a one, which stands for the bias. Of an embedding they
        are the indices, `[1, n, shared, 1]`.
        """
        parts = [call.activations(self._inputs(index)) for index, call in self._factored_calls()]
        activations = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        activations = self._as_statistics(activations)
        if self.plan.key.bias is None:
            return activations
        return torch.cat([torch.ones_like(activations[..., :1]), activations], dim=3)

    def gradients(self, first: int = 0) -> Iterator[Tensor]:
        """Yield, for every output vector, the block's gradients g, `[groups, n, shared, d_out]`.

        Args:
            first: The vector to begin with.
        """
        for which in range(first, self.num_vectors):
            parts = [
                call.gradients(self._output_gradients(which, index))
                for index, call in self._factored_calls()
            ]
            yield self._as_statistics(torch.cat(parts, dim=2) if len(parts) > 1 else parts[0])

    def example_gradients(self, first: int = 0) -> Iterator[Tensor]:
        """Yield, for every output vector, per-example gradients `[groups, n, d_out, d_in]`.

        Args:
            first: The vector to begin with.
        """
        parameter = self.observation.parameters[self.plan.key.weight]
        for which in range(first, self.num_vectors):
            total: Tensor | None = None
            for contribution in self.plan.contributions:
                part = self._contributed(contribution, which, parameter)
                total = part if total is None else total + part
            if total is not None:
                yield self.plan.form.matrices(total)

    def _factored_calls(self) -> Iterator[tuple[int, FactoredCall]]:
        """Yield the block's uses; in a block of factored form all are of this kind."""
        for index in self.plan.uses:
            call = self.observation.uses[index].call
            if isinstance(call, FactoredCall):
                yield index, call

    def _contributed(self, contribution: Contribution, which: int, parameter: Tensor) -> Tensor:
        """Return one use's part of the per-example gradients, `[n, *parameter.shape]`."""
        call = self.observation.uses[contribution.use].call
        # The model may run under autocast; its statistics do not.
        with torch.autocast(parameter.device.type, enabled=False):
            gradients = self._per_example(call, contribution, which)
            if contribution.through is None:
                return gradients
            computed = self.observation.computed[contribution.through]
            return computed.pull_back(gradients, parameter)

    def _per_example(self, call: LayerCall, contribution: Contribution, which: int) -> Tensor:
        outputs = self._as_statistics(self._output_gradients(which, contribution.use))
        if contribution.is_weight:
            inputs = self._as_statistics(self._inputs(contribution.use))
            return call.weight_gradients(inputs, outputs)
        return call.bias_gradients(outputs)

    def _inputs(self, use: int) -> Tensor:
        return self._own(self.observation.uses[use].call.input, use)

    def _output_gradients(self, which: int, use: int) -> Tensor:
        return self._own(self.observation.gradient_sets[which][use], use)

    def _own(self, tensor: Tensor, use: int) -> Tensor:
        """Select the portion's examples, `[n, rows, *rest]`."""
        placement, count = self.observation.placements[use], self.observation.num_examples
        return placement.examples_first(tensor.detach(), count)[self.examples]

    def _as_statistics(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Return the address and the bytes of what a tensor is a view of."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except NotImplementedError:
        # A tensor inside a transform of `torch.func` only stands for another one.
        return id(tensor), tensor.nbytes
