"""Run the model on one batch, and capture what it shows of every use of a parameter."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rotate_ewc._utils.messages import left_out, parameters_are
from rotate_ewc._utils.numerics import statistics_dtype
from rotate_ewc._utils.parameters import matches
from rotate_ewc._utils.tree import map_tensors, tensors_in
from rotate_ewc.errors import NotFiniteError
from rotate_ewc.layers import Factors
from rotate_ewc.losses import Likelihood
from rotate_ewc.losses.draws import LabelGenerator
from rotate_ewc.options import EstimationSettings, FisherType, Unsupported
from rotate_ewc.tracing.block_plan import BlockPlan, plan_blocks
from rotate_ewc.tracing.counting import ExampleCounter
from rotate_ewc.tracing.example_rows import ExampleRows, Layout, mixing_message
from rotate_ewc.tracing.forward_pass import ForwardPass, record_forward
from rotate_ewc.tracing.layouts import FoundLayout, Layouts
from rotate_ewc.tracing.origins import NO_CONSTANTS, Computed, Constants
from rotate_ewc.tracing.per_example import add_squares, same_outputs, squares_like
from rotate_ewc.tracing.recorder import Use


@dataclass(frozen=True)
class CapturedBatch:
    """What a batch shows of every block: layer inputs, and gradients of some output vectors.

    Attributes:
        num_examples: Examples in the batch.
        normalizer: What the batch adds to the number that the reduction `mean` divides by.
        plans: How the blocks come out of the uses.
        uses: Every use of a parameter.
        inputs: The input of every use with the examples first, `[n, rows, *rest]`.
        present: For every use, which of these rows exist, `[n, rows]`; None if all do. Where
            one does not, its gradients are zero.
        gradients: For every output vector, the gradient at the output of every use, likewise.
        computed: The tensors computed from parameters that plans may name.
        first: Whether these are the batch's first output vectors. A batch is captured in several
            parts where the gradients of all its output vectors do not fit in the memory budget.
        squares: Squared per-example gradients, summed, of parameters whose uses have no rule.
    """

    num_examples: int
    normalizer: float
    plans: tuple[BlockPlan, ...]
    uses: tuple[Use, ...]
    inputs: tuple[Tensor, ...]
    present: tuple[Tensor | None, ...]
    gradients: Sequence[Sequence[Tensor]] = ()
    computed: Mapping[str, Computed] = field(default_factory=dict)
    first: bool = True
    squares: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def new_examples(self) -> int:
        """Examples that no earlier part of the batch has shown."""
        return self.num_examples if self.first else 0

    def reaches(self, plan: BlockPlan) -> bool:
        """Whether a block gets a gradient that is not zero; False where that is not obvious.

        It is where the gradients are outer products of g and something else, or are g.
        """
        for contribution in plan.contributions:
            if contribution.is_weight:
                inputs = self.inputs[contribution.use]
                obvious = plan.form.factors is not Factors.NONE
                obvious = obvious and (not inputs.is_floating_point() or bool(inputs.any()))
            else:
                obvious = plan.uniform and plan.one_position
            if obvious and any(bool(found[contribution.use].any()) for found in self.gradients):
                return True
        return False


@dataclass
class BatchCapturer:
    """Captures batches of one model with one loss.

    Attributes:
        forward: From a batch's inputs to the model's outputs.
        likelihood: The distribution behind the loss.
        parameters: The parameters to look for, by name; all must require gradients.
        settings: How to estimate.
        constants: The model's tensors that do not depend on the data.
        unsupported: Names of the parameters for whose uses there is no rule; None before the first
            batch.
        may_look_again: Whether it may be known what is the same for all examples; not so once that
            has been looked for in vain.
        layouts: Finds the examples' rows of batches.
        counter: Counts their examples.
    """

    forward: Callable[[Any], Tensor]
    likelihood: Likelihood
    parameters: Mapping[str, Tensor]
    settings: EstimationSettings
    constants: Constants = NO_CONSTANTS
    unsupported: frozenset[str] | None = None
    may_look_again: bool = True
    layouts: Layouts = field(init=False)
    counter: ExampleCounter = field(init=False)

    def __post_init__(self) -> None:
        """Begin with nothing known of the examples."""
        self.layouts = Layouts(self.settings.seed)
        self.counter = ExampleCounter(self.forward, self.settings.batch_size_fn)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters.values())).device

    def capture(
        self, inputs: Any, targets: Any, generator: LabelGenerator, *, with_squares: bool
    ) -> Iterator[CapturedBatch]:
        """Run the model on a batch, and yield what it shows, in parts where memory asks for it.

        Args:
            inputs: The batch's inputs.
            targets: Its targets; None where it has none.
            generator: Where sampled labels come from.
            with_squares: Whether to take squared per-example gradients of parameters without rule.

        Raises:
            ValueError: If the batch or a layer cannot be handled; the message names the layer.
            TypeError: If the outputs or the targets have the wrong type.
        """
        for part in self.likelihood.parts_of_batch(
            self.forward, inputs, self.settings.batch_size_fn
        ):
            yield from self._capture(part, targets, generator, with_squares=with_squares)

    def _capture(
        self, inputs: Any, targets: Any, generator: LabelGenerator, *, with_squares: bool
    ) -> Iterator[CapturedBatch]:
        """Capture a batch, or one of its examples where these must be seen alone."""
        self.counter.check(inputs)
        recorded = self._record(inputs, self.constants)
        likelihood = self.likelihood.current
        outputs = recorded.outputs.detach()
        outputs = outputs.to(statistics_dtype(outputs.dtype))
        if not bool(torch.isfinite(outputs).all()):
            raise NotFiniteError(self._not_finite())
        targets = likelihood.completed_targets(outputs, targets, self.settings.fisher_type)
        likelihood.check(outputs, targets)
        num_examples = self.counter.count(inputs, outputs, targets)
        self._check_terms(likelihood, outputs, num_examples)
        normalizer = float(likelihood.num_terms(outputs, targets))
        generator.begin(num_examples)
        vectors = self._vectors(likelihood, outputs, targets, num_examples, generator)
        inputs, recorded, found_layout = self._located(recorded, inputs, num_examples, vectors)
        layout, vectors, known = found_layout
        self._check_layout(recorded, layout, num_examples)
        captured = self._without_gradients(recorded, layout, normalizer, num_examples)
        without_rule = self._per_example_parameters() if with_squares else {}
        if not recorded.uses and not without_rule:
            yield captured
            return
        squares = squares_like(without_rule)
        add = partial(
            add_squares,
            squares,
            without_rule,
            self.forward,
            inputs,
            recorded.outputs,
            num_examples,
            in_batch=self._needs_batch(recorded, layout, num_examples),
        )
        found: list[list[Tensor]] = []
        held = 0
        for vector, last in _with_last(vectors):
            if without_rule:
                add(vector)
            gradients = known or recorded.gradients(vector, last=last and not layout.is_tentative)
            known = None
            del vector
            if layout.is_tentative and not layout.covers(gradients):
                if found:
                    yield replace(captured, gradients=found)
                    captured, found, held = replace(captured, first=False), [], 0
                layout = self.layouts.measure(recorded, num_examples)
                self._check_layout(recorded, layout, num_examples)
                again = self._without_gradients(recorded, layout, normalizer, num_examples)
                captured = replace(again, first=captured.first)
            for index, rows in enumerate(layout.rows):
                gradients[index] = _gradients_first(rows, gradients[index], num_examples)
            found.append(gradients)
            held += sum(gradient.nbytes for gradient in gradients)
            del gradients
            if last or held > self.settings.memory_budget // 4:
                yield replace(captured, gradients=found, squares=squares if last else {})
                captured, found, held = replace(captured, first=False), [], 0

    def _record(self, inputs: Any, constants: Constants) -> ForwardPass:
        """Run the model."""
        return record_forward(
            self.forward,
            inputs,
            self.parameters,
            constants=constants.without(inputs),
            unsupported=self.settings.unsupported,
        )

    def _not_finite(self) -> str:
        """Say that outputs are not finite, and which parameters are not either."""
        told = "the model's outputs are not finite (NaN or infinity)"
        wrong = [n for n, p in self.parameters.items() if not bool(torch.isfinite(p).all())]
        if not wrong:
            return f"{told}, though all parameters are; expected finite inputs and activations"
        return f"{told}, because {parameters_are(wrong)} not finite; expected a model that trains"

    def _located(
        self, recorded: ForwardPass, inputs: Any, num_examples: int, vectors: Iterator[Tensor]
    ) -> tuple[Any, ForwardPass, FoundLayout]:
        """Return inputs, and a forward pass with the examples' rows; others where only those do."""
        layout, vectors, known = self._layout(
            recorded, inputs, num_examples, vectors, self.constants
        )
        if None in layout.rows and self.may_look_again:
            for constants, others in self._alternatives(inputs, num_examples):
                try:
                    again = self._record(others, constants)
                except Exception:  # a model need not take what it was not given
                    continue
                if not same_outputs(again.outputs, recorded.outputs):
                    continue
                found = self._layout(again, others, num_examples, vectors, constants)
                if None not in found[0].rows:
                    self.constants = constants
                    return others, again, found
                vectors = found[1]
            self.may_look_again = False
        return inputs, recorded, (layout, vectors, known)

    def _layout(
        self,
        recorded: ForwardPass,
        inputs: Any,
        num_examples: int,
        vectors: Iterator[Tensor],
        constants: Constants,
    ) -> FoundLayout:
        """Find the examples' rows, by the output vectors of the batch or by another one."""
        return self.layouts.find(
            recorded,
            inputs,
            num_examples,
            vectors,
            one_vector=self._has_one_vector,
            free_graph=self.settings.unsupported is not Unsupported.DIAGONAL,
            may_remember=not constants.others_are_shared,
        )

    def _alternatives(self, inputs: Any, num_examples: int) -> Iterator[tuple[Constants, Any]]:
        """Yield constants and inputs with which no examples may be mixed where some were.

        What does not come from the inputs may be the same for all examples, and inputs of one row,
        such as positions, may be meant for each of them.
        """
        tensors = list(tensors_in(inputs))
        if not tensors:
            return
        shared = replace(self.constants, others_are_shared=True)
        if not self.constants.others_are_shared:
            yield shared, inputs
        if num_examples > 1 and any(map(_has_one_row, tensors)):
            repeated = map_tensors(
                lambda t: t.expand(num_examples, *t.shape[1:]) if _has_one_row(t) else t, inputs
            )
            yield self.constants, repeated
            if not self.constants.others_are_shared:
                yield shared, repeated

    def _check_layout(self, recorded: ForwardPass, layout: Layout, num_examples: int) -> None:
        """Check that every use has its examples' rows, or that those without are unsupported."""
        mixing = [u for u, rows in zip(recorded.uses, layout.rows, strict=True) if rows is None]
        if mixing and self.settings.unsupported is Unsupported.ERROR:
            raise ValueError(mixing_message(mixing, num_examples))
        self._settle_unsupported(recorded.unsupported.union(*map(recorded.sources, mixing)))

    def _needs_batch(self, recorded: ForwardPass, layout: Layout, num_examples: int) -> bool:
        """Whether it may not be asked what an example is by itself."""
        moved = recorded.program.indexes_by_data(num_examples) or any(
            rows is None or rows.present is not None for rows in layout.rows
        )
        return moved or self.settings.batch_size_fn is not None

    @property
    def _not_rotated(self) -> frozenset[str]:
        """The names of the parameters that the settings do not want to have rotated."""
        patterns = self.settings.diagonal
        return frozenset(n for n in self.parameters if any(matches(n, p) for p in patterns))

    @property
    def _has_one_vector(self) -> bool:
        """Whether every batch has one output vector."""
        fisher_type = self.settings.fisher_type
        sampled_once = fisher_type is FisherType.MC and self.settings.mc_samples == 1
        return sampled_once or fisher_type is FisherType.EMPIRICAL

    def _settle_unsupported(self, names: frozenset[str]) -> None:
        """Note the parameters without a rule in the first batch, and check that they stay it."""
        if self.unsupported is None:
            self.unsupported = names
        elif new := sorted(names - self.unsupported):
            raise ValueError(
                f"{parameters_are(new)} used by an operation without a rule, or for several "
                f"examples at once, but not so in the first batch; {left_out(new)}"
            )

    def _without_gradients(
        self, recorded: ForwardPass, layout: Layout, normalizer: float, num_examples: int
    ) -> CapturedBatch:
        """Return what the forward pass shows of a batch."""
        without_rule = self.unsupported or frozenset()
        plans = plan_blocks(
            [
                use.forms(rows.size_of(use.output_shape) if rows else 0)
                for use, rows in zip(recorded.uses, layout.rows, strict=True)
            ],
            {key: computed.sources for key, computed in recorded.computed.items()},
            {name: p for name, p in self.parameters.items() if name not in without_rule},
            num_examples,
            separate=self.settings.separate_weight_and_bias,
            diagonal=self._not_rotated,
        )
        inputs = tuple(
            use.call.input if rows is None else rows.examples_first(use.call.input, num_examples)
            for use, rows in zip(recorded.uses, layout.rows, strict=True)
        )
        present = tuple(rows.present if rows else None for rows in layout.rows)
        return CapturedBatch(
            num_examples,
            normalizer,
            plans,
            recorded.uses,
            inputs,
            present,
            computed=recorded.computed,
        )

    def _per_example_parameters(self) -> dict[str, Tensor]:
        """Return the parameters whose gradients are taken for one example after another."""
        if self.settings.unsupported is not Unsupported.DIAGONAL:
            return {}
        return {name: self.parameters[name] for name in sorted(self.unsupported or ())}

    def _vectors(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Any,
        num_examples: int,
        generator: LabelGenerator,
    ) -> Iterator[Tensor]:
        """Yield the output vectors; one of zeros where there are none (with a single class)."""
        settings, vector = self.settings, None
        for vector in likelihood.vectors(
            outputs, targets, num_examples, settings.fisher_type, settings.mc_samples, generator
        ):
            yield vector
        if vector is None:
            yield torch.zeros_like(outputs)

    def _check_terms(self, likelihood: Likelihood, outputs: Tensor, num_examples: int) -> None:
        expected = self.settings.num_per_example_loss_terms
        terms = likelihood.predictions(outputs) / num_examples
        if expected is not None and terms != expected:
            raise ValueError(
                f"num_per_example_loss_terms is {expected}, but the outputs of shape "
                f"{list(outputs.shape)} for {num_examples} examples have {terms:g} each"
            )


def _gradients_first(rows: ExampleRows | None, gradients: Tensor, num_examples: int) -> Tensor:
    """Put the examples first; nothing is left where they are mixed, which no plan makes use of."""
    return gradients.new_empty(0) if rows is None else rows.gradients_first(gradients, num_examples)


def _with_last(vectors: Iterator[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Yield every vector, and whether it is the last: then the graph can be freed.

    No vector is held any longer once it has been yielded.
    """
    pending = deque(islice(vectors, 1))
    while pending:
        pending.extend(islice(vectors, 1))
        yield pending.popleft(), not pending


def _has_one_row(tensor: Tensor) -> bool:
    return not tensor.is_nested and tensor.ndim > 0 and len(tensor) == 1
