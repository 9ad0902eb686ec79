"""Leave the user's model and random state as they were found, whatever happens in between."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@contextmanager
def undisturbed(model: nn.Module | None, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Evaluate a model without leaving a trace.

    Inside, every submodule is in eval mode and the given parameters require gradients. On the way
    out each submodule's mode, each parameter's `requires_grad`, the values of buffers, and the
    random states of torch (CPU and the parameters' devices), Python and NumPy are restored, also
    after an exception. A buffer that the model has put another in the place of stays replaced.

    Args:
        model: The model, or None if only its forward function is known.
        parameters: Leaf tensors whose uses will be captured.
    """
    tensors = list(parameters)
    devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
    with ExitStack() as stack:
        stack.enter_context(_random_states())
        for kind in {device.type for device in devices}:
            indices = [device for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
        stack.enter_context(_same_buffers(model))
        stack.enter_context(_eval_mode(model))
        stack.enter_context(_requiring_gradients(tensors))
        yield


@contextmanager
def _eval_mode(model: nn.Module | None) -> Iterator[None]:
    modes = [] if model is None else [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, training in modes:
            module.training = training

    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        _surely(restore)


@contextmanager
def _same_buffers(model: nn.Module | None) -> Iterator[None]:
    # A few may change in eval mode too, such as counters of calls.
    buffers = [] if model is None else [b for b in model.buffers() if not is_lazy(b)]
    values = [buffer.detach().clone() for buffer in buffers]
    try:
        yield
    finally:
        _surely(lambda: [_restore(b, v) for b, v in zip(buffers, values, strict=True)])


@torch.no_grad()
def _restore(buffer: Tensor, value: Tensor) -> None:
    # Only where it is needed: a graph that the buffer is part of would notice.
    if buffer.shape == value.shape and not torch.equal(buffer, value):
        buffer.copy_(value)


@contextmanager
def _requiring_gradients(tensors: list[Tensor]) -> Iterator[None]:
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    try:
        for tensor in frozen:
            tensor.requires_grad_(True)
        yield
    finally:
        _surely(lambda: [tensor.requires_grad_(False) for tensor in frozen])


@contextmanager
def _random_states() -> Iterator[None]:
    # NumPy is not a dependency, but data transforms may draw from it.
    numpy = sys.modules.get("numpy")
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = numpy.random.get_state() if numpy is not None else None

    def restore() -> None:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)

    try:
        yield
    finally:
        _surely(restore)


def _surely(restore: Callable[[], object]) -> None:
    """Restore something; if that is interrupted, do it again before the interrupt goes on."""
    try:
        restore()
    except BaseException:
        restore()
        raise
