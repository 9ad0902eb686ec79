"""Run the model over the data, batch by batch, and record what every layer shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rotate_ewc.batches import batches, count_examples
from rotate_ewc.capture import Trace, find_batch_axes, trace
from rotate_ewc.fisher import Likelihood
from rotate_ewc.observation import Observation
from rotate_ewc.options import EstimationSettings


class Observer:
    """Turns batches into observations; every pass over the data sees the same label samples."""

    def __init__(
        self,
        forward: Callable[[Any], Tensor],
        likelihood: Likelihood,
        parameters: Mapping[str, Tensor],
        settings: EstimationSettings,
    ) -> None:
        """Hold what is needed to run the model and to know its parameters."""
        self.forward = forward
        self.likelihood = likelihood
        self.parameters = parameters
        self.settings = settings
        self.device = next(iter(parameters.values())).device
        self._batch_axes: dict[tuple[object, ...], list[int]] = {}

    def observe(self, data: Iterable[Any], description: str) -> Iterator[Observation]:
        """Yield one observation for each batch, or several where memory asks for it.

        Raises:
            ValueError: If a batch or a layer cannot be handled; the message names it.
            TypeError: If a part of a batch, or the outputs, have the wrong type.
        """
        generator = torch.Generator(self.device).manual_seed(self.settings.seed)
        for index, inputs, targets in batches(
            data, self.device, progressbar=self.settings.progressbar, description=description
        ):
            try:
                yield from self._observe_batch(inputs, targets, generator)
            except (ValueError, TypeError) as error:
                if type(error) not in (ValueError, TypeError):
                    raise
                raise type(error)(f"batch {index} of data: {error}") from error

    def _observe_batch(
        self, inputs: Any, targets: Tensor, generator: torch.Generator
    ) -> Iterator[Observation]:
        settings, likelihood = self.settings, self.likelihood
        num_examples = count_examples(inputs, settings.batch_size_fn)
        recorded = trace(lambda: self.forward(inputs), self.parameters)
        outputs = recorded.outputs.detach()
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        self._check_outputs(outputs, targets, num_examples)
        mass = likelihood.mass(outputs, num_examples, settings.fisher_type)
        if not recorded.uses:
            yield Observation(num_examples, mass, (), (), (), first=True)
            return
        axes = self._axes(recorded, num_examples)
        vectors = likelihood.vectors(
            outputs, targets, num_examples, settings.fisher_type, settings.mc_samples, generator
        )
        # One vector more is kept in hand, to know when the graph can be freed.
        following = next(vectors, None)
        gradient_sets: list[list[Tensor]] = []
        first, held = True, 0
        while following is not None:
            vector, following = following, next(vectors, None)
            gradient_sets.append(recorded.gradients(vector, last=following is None))
            held += sum(g.nbytes for g in gradient_sets[-1])
            if following is None or held > settings.memory_budget // 4:
                yield Observation(num_examples, mass, recorded.uses, axes, gradient_sets, first)
                gradient_sets, first, held = [], False, 0

    def _check_outputs(self, outputs: Tensor, targets: Tensor, num_examples: int) -> None:
        if not bool(torch.isfinite(outputs).all()):
            raise ValueError("the model's outputs are not finite (NaN or infinity)")
        if outputs.ndim == 0 or outputs.shape[0] % num_examples:
            raise ValueError(
                f"the model's outputs have shape {list(outputs.shape)} for {num_examples} examples;"
                f" expected the examples on the first axis"
            )
        self.likelihood.check(outputs, targets)
        expected = self.settings.num_per_example_loss_terms
        terms = self.likelihood.rows(outputs) / num_examples
        if expected is not None and terms != expected:
            raise ValueError(
                f"num_per_example_loss_terms is {expected}, but the outputs of shape "
                f"{list(outputs.shape)} for {num_examples} examples have {terms:g} each"
            )

    def _axes(self, recorded: Trace, num_examples: int) -> list[int]:
        """Look for the batch axes once for every sequence of layers (and rank of their inputs)."""
        layers = tuple((use.weight, use.bias, use.call.input.ndim) for use in recorded.uses)
        axes = self._batch_axes.get(layers)
        if axes is None:
            probe = torch.Generator(self.device).manual_seed(self.settings.seed)
            axes, certain = find_batch_axes(recorded, num_examples, probe)
            # With a single example every axis passes, so nothing has been learned.
            if certain and num_examples > 1:
                self._batch_axes[layers] = axes
        return axes
