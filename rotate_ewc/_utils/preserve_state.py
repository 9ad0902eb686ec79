"""Leave the user's model and random state as they were found, whatever happens in between.

Both belong to the whole process. Estimations run inside each other, and at the same time in several
threads, where the first to come may be the first to leave. A lock held throughout would let an
estimation inside a data loader wait for itself for ever, so every setting remembers who uses it.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rotate_ewc._utils.tree import same

AS_FOUND: Final = object()
# Where a loader has what draws for it, and how far inside: a generator of a sampler of a batch
# sampler of a loader of a loader.
_PARTS_OF_LOADERS: Final = ("data", "base_dataloader", "batch_sampler", "sampler")
_DEPTH: Final = 6


@dataclass(frozen=True)
class Setting:
    """Something that everybody can read and write.

    Attributes:
        key: What tells it from other settings.
        read: Returns its value.
        write: Gives it a value.
        meanwhile: The value it has until it is restored; `AS_FOUND` leaves it alone.
    """

    key: Hashable
    read: Callable[[], Any]
    write: Callable[[Any], object]
    meanwhile: Any = AS_FOUND


@dataclass(eq=False)
class _Visit:
    """One use of a setting, and the value to restore after it."""

    found: Any = None


# The visits to every setting that have not ended, in the order in which they began.
_VISITS: Final[dict[Hashable, list[_Visit]]] = {}
_LOCK: Final = Lock()


def undisturbed(
    modules: Iterable[nn.Module], parameters: Iterable[Tensor], data: object = None
) -> AbstractContextManager[None]:
    """Evaluate a model without leaving a trace.

    Inside, every module is in eval mode and the given parameters require gradients. On the way out
    each module's mode, each parameter's `requires_grad`, the values of buffers, and the
    random states of torch (CPU and the parameters' devices), Python, NumPy and the data's own
    generators, as a `DataLoader` may have them, are restored, also after an exception. A buffer in
    whose place the model has put another one stays replaced.

    A `DistributedDataParallel` exchanges nothing meanwhile, since processes may run it a different
    number of times. What `torch.compile` has compiled runs as it was written (with torch 2.6 or
    later), so that nothing is compiled for the evaluation, or again after it.

    All of these are shared by the threads of a process. Where several are inside at once, they are
    restored when the last one leaves; what other threads draw at random meanwhile is drawn again.

    Args:
        modules: All modules of the model, and others that it calls; their submodules are not
            looked for.
        parameters: Leaf tensors whose uses will be captured.
        data: What is gone through meanwhile.
    """
    tensors = list(parameters)
    each = list(dict.fromkeys(modules))
    buffers = {id(buffer): buffer for module in each for buffer in module.buffers(recurse=False)}
    return kept(
        [
            *random_states(tensor.device for tensor in tensors),
            *generator_states(data),
            *_compilation(),
            *(mode(module, training=False) for module in each),
            *(setting for module in each for setting in _exchanges(module)),
            *map(_requiring_gradients, tensors),
            *map(_buffer, buffers.values()),
        ]
    )


@contextmanager
def kept(settings: Iterable[Setting]) -> Iterator[None]:
    """Change settings, and restore them, whatever happens in between.

    A second visitor finds the value that the first one has set. So a visitor that leaves before a
    later one writes nothing, but hands on the value that it found: the setting stays as the others
    need it, and when all have left, it has the value from before the first one came.
    """
    visits: list[tuple[Setting, _Visit]] = []
    try:
        for setting in settings:
            # In this order, so that an interrupt in between leaves nothing that is not restored.
            visits.append((setting, _Visit()))
            _arrive(*visits[-1])
        yield
    finally:
        # An interrupt may come here too; what it prevented is tried once more.
        try:
            _leave_all(visits)
        except BaseException:
            try:
                _leave_all(visits)
            finally:
                _forget_all(visits)
            raise


def _leave_all(visits: Sequence[tuple[Setting, _Visit]]) -> None:
    """End the visits that have not ended, the last first, also where one cannot be ended."""
    errors = []
    for setting, visit in reversed(visits):
        try:
            _leave(setting, visit)
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _arrive(setting: Setting, visit: _Visit) -> None:
    with _LOCK:
        visit.found = setting.read()
        _VISITS.setdefault(setting.key, []).append(visit)
        if setting.meanwhile is not AS_FOUND:
            setting.write(setting.meanwhile)


def _leave(setting: Setting, visit: _Visit) -> None:
    with _LOCK:
        visits = _VISITS.get(setting.key, [])
        if visit not in visits:
            return
        later = visits[visits.index(visit) + 1 :]
        if later:
            later[0].found = visit.found
        else:
            setting.write(visit.found)
        _forget(setting, visit)


def _forget_all(visits: Sequence[tuple[Setting, _Visit]]) -> None:
    with _LOCK:
        for setting, visit in visits:
            _forget(setting, visit)


def _forget(setting: Setting, visit: _Visit) -> None:
    visits = _VISITS.get(setting.key, [])
    if visit in visits:
        visits.remove(visit)
    if not visits:
        _VISITS.pop(setting.key, None)


def _compilation() -> Iterator[Setting]:
    """Whether compiled code is run; without torch's compiler in memory there is none."""
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        yield Setting("compilation", *map(torch.compiler.disable, (_run_eagerly, _leave_stance)))


def _run_eagerly() -> AbstractContextManager[None]:
    # To make it is to enter it already.
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def _leave_stance(stance: AbstractContextManager[None]) -> None:
    stance.__exit__(None, None, None)


def mode(module: nn.Module, *, training: bool) -> Setting:
    """Return whether a module, without its children, is in training or in eval mode."""

    def write(training: bool) -> None:
        module.training = training

    return Setting(("training", id(module)), lambda: module.training, write, training)


def _exchanges(module: nn.Module) -> Iterator[Setting]:
    """Whether a wrapper of data-parallel training broadcasts buffers, and averages gradients."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        for name in ("require_forward_param_sync", "require_backward_grad_sync"):
            yield Setting(
                (name, id(module)),
                partial(getattr, module, name),
                partial(setattr, module, name),
                False,
            )


def _requiring_gradients(tensor: Tensor) -> Setting:
    def write(required: bool) -> None:
        # What is no leaf can require gradients, but cannot be told to; whole numbers, as quantised
        # weights are, cannot at all.
        if tensor.requires_grad != required and (tensor.is_floating_point() or tensor.is_complex()):
            tensor.requires_grad_(required)

    return Setting(("requires_grad", id(tensor)), lambda: tensor.requires_grad, write, True)


def _buffer(buffer: Tensor) -> Setting:
    """A few buffers change in eval mode too, such as counters of calls."""

    def read() -> Tensor | None:
        without_numbers = is_lazy(buffer) or buffer.is_meta
        return None if without_numbers else buffer.detach().clone()

    @torch.no_grad()
    def write(value: Tensor | None) -> None:
        # Only where it is needed: a graph that the buffer is part of would notice.
        if value is not None and not same(buffer, value) and _fits(buffer, value):
            buffer.copy_(value)

    return Setting(("buffer", id(buffer)), read, write)


def _fits(buffer: Tensor, value: Tensor) -> bool:
    """Whether a buffer has the shape that it had; nested ones cannot change theirs."""
    return buffer.is_nested or buffer.shape == value.shape


def random_states(devices: Iterable[torch.device]) -> Iterator[Setting]:
    """Yield the random states of Python, torch, NumPy, and the devices that have their own."""
    yield Setting("random", random.getstate, random.setstate)
    yield Setting("torch", torch.get_rng_state, torch.set_rng_state)
    # NumPy is not a dependency, but data transforms may draw from it.
    if (numpy := sys.modules.get("numpy")) is not None:
        yield Setting("numpy", numpy.random.get_state, numpy.random.set_state)
    for device in {device for device in devices if device.type not in ("cpu", "meta")}:
        backend = getattr(torch, device.type)
        yield Setting(
            device,
            partial(backend.get_rng_state, device),
            partial(backend.set_rng_state, device=device),
        )


def generator_states(data: object) -> Iterator[Setting]:
    """Yield the states of `generators_of` data."""
    for generator in generators_of(data):
        yield Setting(("generator", id(generator)), generator.get_state, generator.set_state)


def generators_of(data: object) -> list[torch.Generator]:
    """Return the generators that a loader, or one of its samplers, draws from.

    Args:
        data: A loader, or something that has one as its attribute `data`.
    """
    found: dict[int, torch.Generator] = {}
    parts = [data]
    for _ in range(_DEPTH):
        generators = [getattr(part, "generator", None) for part in parts]
        found.update({id(g): g for g in generators if isinstance(g, torch.Generator)})
        inside = [getattr(part, name, None) for part in parts for name in _PARTS_OF_LOADERS]
        # A tensor's `data` is a tensor again.
        parts = [part for part in inside if part is not None and not isinstance(part, Tensor)]
    return list(found.values())
