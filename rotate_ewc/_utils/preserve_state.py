"""Leave the user's model and random state as they were found, whatever happens in between."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rotate_ewc._utils.process_state import Setting, kept


def undisturbed(
    model: nn.Module | None, parameters: Iterable[Tensor]
) -> AbstractContextManager[None]:
    """Evaluate a model without leaving a trace.

    Inside, every submodule is in eval mode and the given parameters require gradients. On the way
    out each submodule's mode, each parameter's `requires_grad`, the values of buffers, and the
    random states of torch (CPU and the parameters' devices), Python and NumPy are restored, also
    after an exception. A buffer in whose place the model has put another one stays replaced.

    All of these are shared by the threads of a process. Where several are inside at once, they are
    restored when the last one leaves; what other threads draw at random meanwhile is drawn again.

    Args:
        model: The model, or None if only its forward function is known.
        parameters: Leaf tensors whose uses will be captured.
    """
    tensors = list(parameters)
    modules = [] if model is None else list(model.modules())
    devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
    return kept(
        [
            *_random_states(devices),
            *map(_eval_mode, modules),
            *map(_requiring_gradients, tensors),
            *([] if model is None else map(_buffer, model.buffers())),
        ]
    )


def _eval_mode(module: nn.Module) -> Setting:
    def write(training: bool) -> None:
        module.training = training

    return Setting(("training", id(module)), lambda: module.training, write, False)


def _requiring_gradients(tensor: Tensor) -> Setting:
    def write(required: bool) -> None:
        # What is no leaf can require gradients, but cannot be told to.
        if tensor.requires_grad != required:
            tensor.requires_grad_(required)

    return Setting(("requires_grad", id(tensor)), lambda: tensor.requires_grad, write, True)


def _buffer(buffer: Tensor) -> Setting:
    """A few buffers change in eval mode too, such as counters of calls."""

    def read() -> Tensor | None:
        return None if is_lazy(buffer) else buffer.detach().clone()

    @torch.no_grad()
    def write(value: Tensor | None) -> None:
        # Only where it is needed: a graph that the buffer is part of would notice.
        if value is not None and buffer.shape == value.shape and not torch.equal(buffer, value):
            buffer.copy_(value)

    return Setting(("buffer", id(buffer)), read, write)


def _random_states(devices: Iterable[torch.device]) -> Iterator[Setting]:
    yield Setting("random", random.getstate, random.setstate)
    yield Setting("torch", torch.get_rng_state, torch.set_rng_state)
    # NumPy is not a dependency, but data transforms may draw from it.
    if (numpy := sys.modules.get("numpy")) is not None:
        yield Setting("numpy", numpy.random.get_state, numpy.random.set_state)
    for device in devices:
        backend = getattr(torch, device.type)
        yield Setting(
            device,
            partial(backend.get_rng_state, device),
            partial(backend.set_rng_state, device=device),
        )
