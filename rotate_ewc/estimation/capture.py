"""Run the model over the data, batch by batch, and record what every layer shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rotate_ewc._utils.numerics import statistics_dtype
from rotate_ewc._utils.out_of_memory import is_out_of_memory
from rotate_ewc._utils.tree import tensors_in, version_of
from rotate_ewc._utils.warnings import add_note
from rotate_ewc.errors import NotFiniteError
from rotate_ewc.estimation.activation_cache import Keeper
from rotate_ewc.estimation.captured_batch import Observation
from rotate_ewc.estimation.data import batches, count_examples, naming_batch
from rotate_ewc.estimation.per_example import add_squares, squares_like
from rotate_ewc.losses import Likelihood
from rotate_ewc.options import EstimationSettings, Unsupported
from rotate_ewc.tracing.block_plan import Plan, plan_blocks
from rotate_ewc.tracing.example_axis import Placement, find_placements
from rotate_ewc.tracing.trace import Trace, trace


class Observer:
    """Turns batches into observations; every pass over the data sees the same label samples."""

    def __init__(
        self,
        forward: Callable[[Any], Tensor],
        likelihood: Likelihood,
        parameters: Mapping[str, Tensor],
        settings: EstimationSettings,
        constants: Sequence[Tensor] = (),
    ) -> None:
        """Hold what is needed to run the model and to know its parameters.

        Args:
            forward: From a batch's inputs to the model's outputs.
            likelihood: The distribution behind the loss.
            parameters: The parameters to look for, by name.
            settings: How to estimate.
            constants: The model's tensors that are no parameters.
        """
        self.forward = forward
        self.likelihood = likelihood
        self.parameters = parameters
        self.settings = settings
        self.device = next(iter(parameters.values())).device
        self.unsupported: frozenset[str] = frozenset()
        self._traced = False
        self._constants = constants
        self._placements: dict[tuple[object, ...], list[Placement]] = {}

    def observe(
        self, data: Iterable[Any], description: str, keeper: Keeper | None = None
    ) -> Iterator[Observation]:
        """Yield one observation for each batch, or several where memory asks for it.

        Args:
            data: Batches (inputs, targets).
            description: What a progress bar shows.
            keeper: If the data were observed before, what was kept of that. For the same batches
                the model does not run again; nor are squares asked for twice.

        What the model itself raises is not changed, but for a note that says which batch it was
        (Python 3.11 or later); so is what the data raise.

        Raises:
            ValueError: If a batch or a layer cannot be handled; the message names it.
            TypeError: If a part of a batch, or the outputs, have the wrong type.
        """
        again = keeper is not None
        generator = torch.Generator(self.device).manual_seed(self.settings.seed)
        for index, inputs, targets in batches(
            data,
            self.device,
            progressbar=bool(self.settings.progressbar),
            description=description,
        ):
            kept = [] if keeper is None else keeper.take(index, inputs, targets)
            if kept and kept[-1].random_state is not None:
                generator.set_state(kept[-1].random_state)
                yield from kept
                continue
            try:
                with naming_batch(index):
                    yield from self._observe_batch(index, inputs, targets, generator, again)
            except RuntimeError as error:
                add_note(error, f"in the model's own passes over batch {index} of data")
                if is_out_of_memory(error):
                    add_note(error, "smaller batches take less memory, as in training")
                raise

    def _observe_batch(
        self, index: int, inputs: Any, targets: Tensor, generator: torch.Generator, again: bool
    ) -> Iterator[Observation]:
        settings, likelihood = self.settings, self.likelihood
        num_examples = count_examples(inputs, settings.batch_size_fn)
        recorded = self._trace(inputs)
        outputs = recorded.outputs.detach()
        outputs = outputs.to(statistics_dtype(outputs.dtype))
        self._check_outputs(outputs, targets, num_examples)
        observation = Observation(
            num_examples,
            mass=float(likelihood.terms(outputs, targets).sum()),
            parameters=self.parameters,
            plans=self._plans(recorded),
            uses=recorded.uses,
            placements=self._find_placements(recorded, num_examples),
            computed=recorded.computed,
            batch=index,
            given=(inputs, targets),
            versions=[version_of(tensor) for tensor in tensors_in((inputs, targets))],
        )
        one_by_one = {} if again else self._one_by_one()
        if not recorded.uses and not one_by_one:
            yield replace(observation, random_state=generator.get_state())
            return
        vectors = likelihood.vectors(
            outputs, targets, num_examples, settings.fisher_type, settings.mc_samples, generator
        )
        # One vector more is kept in hand, to know when the graph can be freed.
        following = next(vectors, None)
        if following is None:
            # No vectors at all (a single class): the Fisher matrix is that of one that is zero.
            following = torch.zeros_like(outputs)
        gradient_sets: list[list[Tensor]] = []
        squares = squares_like(one_by_one)
        first, held = True, 0
        while following is not None:
            vector, following = following, next(vectors, None)
            add_squares(squares, one_by_one, self.forward, inputs, recorded, vector, num_examples)
            gradient_sets.append(recorded.gradients(vector, last=following is None))
            held += sum(g.nbytes for g in gradient_sets[-1])
            del vector
            if following is None or held > settings.memory_budget // 4:
                done = following is None
                yield replace(
                    observation,
                    gradient_sets=gradient_sets,
                    first=first,
                    squares=squares if done else {},
                    random_state=generator.get_state() if done else None,
                )
                gradient_sets, first, held = [], False, 0

    def _trace(self, inputs: Any) -> Trace:
        """Run the model, and check that its unsupported parameters are always the same."""
        given = {id(tensor) for tensor in tensors_in(inputs)}
        recorded = trace(
            lambda: self.forward(inputs),
            self.parameters,
            constants=[tensor for tensor in self._constants if id(tensor) not in given],
            unsupported=self.settings.unsupported,
        )
        if self._traced and recorded.unsupported - self.unsupported:
            names = ", ".join(map(repr, sorted(recorded.unsupported - self.unsupported)))
            raise ValueError(
                f"parameter {names} is used by an operation without a rule, but was not in the "
                f"first batch; leave it out (params, or exclude)"
            )
        if not self._traced:
            self.unsupported, self._traced = recorded.unsupported, True
        return recorded

    def _plans(self, recorded: Trace) -> tuple[Plan, ...]:
        supported = {n: p for n, p in self.parameters.items() if n not in self.unsupported}
        separate = self.settings.separate_weight_and_bias
        return plan_blocks(recorded.uses, recorded.computed, supported, separate=separate)

    def _one_by_one(self) -> dict[str, Tensor]:
        """Return the parameters whose gradients are taken for one example after another."""
        if self.settings.unsupported is not Unsupported.DIAGONAL:
            return {}
        return {name: self.parameters[name] for name in sorted(self.unsupported)}

    def _check_outputs(self, outputs: Tensor, targets: Tensor, num_examples: int) -> None:
        if not bool(torch.isfinite(outputs).all()):
            raise NotFiniteError("the model's outputs are not finite (NaN or infinity)")
        if outputs.ndim == 0 or outputs.shape[0] % num_examples:
            raise ValueError(
                f"the model's outputs have shape {list(outputs.shape)} for {num_examples} examples;"
                f" expected the examples on the first axis"
            )
        self.likelihood.check(outputs, targets)
        expected = self.settings.num_per_example_loss_terms
        terms = self.likelihood.predictions(outputs) / num_examples
        if expected is not None and terms != expected:
            raise ValueError(
                f"num_per_example_loss_terms is {expected}, but the outputs of shape "
                f"{list(outputs.shape)} for {num_examples} examples have {terms:g} each"
            )

    def _find_placements(self, recorded: Trace, num_examples: int) -> list[Placement]:
        """Look for the examples once for every sequence of layers (and shapes of their inputs)."""
        if not recorded.uses:
            return []
        layers = tuple(
            (use.weight, use.bias, *(size / num_examples for size in use.call.input.shape[:2]))
            for use in recorded.uses
        )
        placements = self._placements.get(layers)
        if placements is None:
            probe = torch.Generator(self.device).manual_seed(self.settings.seed)
            placements, certain = find_placements(recorded, num_examples, probe)
            # With a single example every placement passes, so nothing has been learned.
            if certain and num_examples > 1:
                self._placements[layers] = placements
        return placements
