"""Leave the user's model and random state as they were found, whatever happens in between."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Restore = Callable[[], None]


@contextmanager
def undisturbed(model: nn.Module | None, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Evaluate a model without leaving a trace.

    Inside, every submodule is in eval mode and the given parameters require gradients. On the way
    out each submodule's mode, each parameter's `requires_grad`, the values of buffers, and the
    random states of torch (CPU and the parameters' devices), Python and NumPy are restored, also
    after an exception. A buffer in whose place the model has put another one stays replaced.

    Args:
        model: The model, or None if only its forward function is known.
        parameters: Leaf tensors whose uses will be captured.
    """
    tensors = list(parameters)
    modules = [] if model is None else list(model.modules())
    restores = (_random_states(), _modes(modules), _flags(tensors), _buffers(model))
    devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
    with ExitStack() as stack:
        for kind in {device.type for device in devices}:
            indices = [device for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
        try:
            for module in modules:
                module.training = False
            for tensor in tensors:
                tensor.requires_grad_(True)
            yield
        finally:
            # An interrupt may come here too; what it left out is then done before it goes on.
            try:
                for restore in restores:
                    restore()
            except BaseException:
                for restore in restores:
                    restore()
                raise


def _modes(modules: Sequence[nn.Module]) -> Restore:
    modes = [(module, module.training) for module in modules]

    def restore() -> None:
        for module, training in modes:
            module.training = training

    return restore


def _flags(tensors: Sequence[Tensor]) -> Restore:
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]

    def restore() -> None:
        for tensor in frozen:
            tensor.requires_grad_(False)

    return restore


def _buffers(model: nn.Module | None) -> Restore:
    """A few buffers may change in eval mode too, such as counters of calls."""
    buffers = [] if model is None else [b for b in model.buffers() if not is_lazy(b)]
    values = [buffer.detach().clone() for buffer in buffers]

    @torch.no_grad()
    def restore() -> None:
        for buffer, value in zip(buffers, values, strict=True):
            # Only where it is needed: a graph that the buffer is part of would notice.
            if buffer.shape == value.shape and not torch.equal(buffer, value):
                buffer.copy_(value)

    return restore


def _random_states() -> Restore:
    # NumPy is not a dependency, but data transforms may draw from it.
    numpy = sys.modules.get("numpy")
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = numpy.random.get_state() if numpy is not None else None

    def restore() -> None:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)

    return restore
