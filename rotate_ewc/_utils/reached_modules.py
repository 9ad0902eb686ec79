"""The modules that a function can reach, which must be in eval mode while it is used."""

from __future__ import annotations

import dis
import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import CodeType, FunctionType, MethodType
from typing import Any, Final

from torch import Tensor, nn

# How deep objects inside objects are searched, and how many items of a collection.
_MOST_STEPS: Final = 8
_MOST_ITEMS: Final = 1000

# Objects of these packages call only modules that are registered with or passed to them.
_NOT_OPENED: Final = ("torch", "rotate_ewc", "builtins", "numpy")


def reached_modules(function: Callable[..., Any]) -> list[nn.Module]:
    """Return the modules that a function may call, with all of their submodules.

    It is followed through bound methods, `functools.partial`, decorators, closures, default
    arguments, the globals that its code names, attributes of objects, and collections. Modules that
    it gets or finds in another way, such as by import, are not found.

    Args:
        function: A function, a module, or another object that can be called.
    """
    found: dict[nn.Module, None] = {}
    seen: dict[int, Any] = {}
    steps: deque[tuple[Any, int]] = deque([(function, 0)])
    while steps:
        value, depth = steps.popleft()
        if id(value) in seen or depth > _MOST_STEPS:
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            found.update(dict.fromkeys(value.modules()))
        steps.extend((inner, depth + 1) for inner in _inside(value))
    return list(found)


def _inside(value: Any) -> Iterator[Any]:
    """Yield the objects inside a value that may be called."""
    if isinstance(value, (str, bytes, int, float, type, Tensor)) or value is None:
        return
    if isinstance(value, FunctionType):
        yield from _inside_function(value)
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, Mapping):
        if type(value) is dict and len(value) <= _MOST_ITEMS:
            yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        if len(value) <= _MOST_ITEMS:
            yield from value
    else:
        yield from _inside_object(value)


def _inside_object(value: Any) -> Iterator[Any]:
    kind = type(value)
    if isinstance(value, nn.Module):
        yield from value._modules.values()
    if kind.__module__.partition(".")[0] in _NOT_OPENED:
        return
    with suppress(AttributeError):
        yield from list(object.__getattribute__(value, "__dict__").values())
    if callable(value):
        # Weak proxies show the methods of their target; only their class shows that they have none.
        name = "forward" if isinstance(value, nn.Module) else "__call__"
        yield inspect.getattr_static(kind, name, None)


def _inside_function(function: FunctionType) -> Iterator[Any]:
    if (function.__module__ or "").partition(".")[0] == "torch":
        return
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # empty until its variable has a value
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from function.__dict__.values()
    for name in _global_names(function.__code__):
        if name in function.__globals__:
            yield function.__globals__[name]


@functools.lru_cache(maxsize=256)
def _global_names(code: CodeType) -> frozenset[str]:
    """Return the names of the globals that a code object, or one inside it, reads."""
    reading = ("LOAD_GLOBAL", "LOAD_NAME")
    names = {step.argval for step in dis.get_instructions(code) if step.opname in reading}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _global_names(constant)
    return frozenset(names)
