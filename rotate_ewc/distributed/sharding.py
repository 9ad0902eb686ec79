"""Parameters that are spread over processes, by FSDP2 (`fully_shard`), and the whole ones.

Such a parameter is a `DTensor`: a tensor that says how large it is, and has a part of its numbers.
All that is done here must be done by all processes of its mesh, in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rotate_ewc._utils.messages import parameters_are
from rotate_ewc._utils.parameters import Parameters, named_parameters, unwrapped

# Parameters, or None.
Given = TypeVar("Given", bound=Parameters | None)


def is_sharded(tensor: object) -> TypeGuard[Any]:
    """Whether a tensor is spread over processes."""
    # Not imported for those who have none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """Return all numbers of a tensor, differentiably; an ordinary tensor is returned itself."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return full


def spread_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return a tensor spread as another one is; all processes must have it whole."""
    if not is_sharded(like):
        return whole
    part = _own_part(whole, like)
    spread: Tensor = type(like).from_local(
        # Not a view, which would keep all of it.
        part.clone(memory_format=torch.contiguous_format),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=whole.shape,
        stride=like.stride(),
    )
    return spread


def own_numbers(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor, to be changed in place, without gradients."""
    local: Tensor = tensor.detach().to_local() if is_sharded(tensor) else tensor
    return local


def write_(sharded: Tensor, whole: Tensor) -> None:
    """Give a tensor the numbers of another one that all processes have whole."""
    part = _own_part(whole, sharded) if is_sharded(sharded) else whole
    own_numbers(sharded).copy_(part)


def fully_sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules to which `fully_shard` was applied."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    kind = getattr(dist.fsdp, "FSDPModule", None)
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]


def reshard(modules: Iterable[Any]) -> None:
    """Have the parameters of modules be the sharded ones that an optimizer knows.

    After an evaluation, those of an FSDP2 model may be whole ones, until it trains again.
    """
    for module in modules:
        module.reshard()


def check_one_axis(named: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` unless every sharded tensor is cut along one axis, naming the others."""
    other = {
        name: tensor
        for name, tensor in named.items()
        if is_sharded(tensor) and sum(not p.is_replicate() for p in tensor.placements) > 1
    }
    if other:
        raise ValueError(_not_whole(other))


@contextmanager
def whole(model: nn.Module | None, params: Given) -> Iterator[Given]:
    """Have an FSDP2 model be an ordinary one meanwhile, with all numbers of its parameters.

    They are gathered once, in their own dtypes, and the hooks that gather and cast them in every
    forward pass are left out. So the processes need not run the model equally often.

    Args:
        model: The model; None, or another one, is left as it is.
        params: Some of its parameters, or None.

    Yields:
        The whole ones instead of them.

    Raises:
        ValueError: If a parameter is spread in another way, as by tensor parallelism.
    """
    model = None if model is None else unwrapped(model)
    modules = [] if model is None else fully_sharded_modules(model)
    reshard(modules)
    named: dict[str, Any] = {} if model is None else dict(named_parameters(model))
    if isinstance(params, Mapping):
        named.update(params)
    elif isinstance(params, Iterable) and not isinstance(params, Tensor):
        listed = list(params)  # what can be iterated once only is not to be lost
        params = cast(Given, listed)
        named.update((str(number), tensor) for number, tensor in enumerate(listed))
    spread = {name: tensor for name, tensor in named.items() if is_sharded(tensor)}
    if not spread:
        yield params
        return
    inside = {id(parameter) for module in modules for parameter in module.parameters()}
    if strange := {name: t for name, t in spread.items() if id(t) not in inside}:
        raise ValueError(_not_whole(strange))
    check_one_axis(spread)
    replaced: dict[int, Tensor] = {}
    for parameter in spread.values():
        if id(parameter) not in replaced:
            full = gathered(parameter.detach())
            replaced[id(parameter)] = nn.Parameter(full, parameter.requires_grad)
    with _with_parameters(modules, replaced), _without_hooks(modules):
        if isinstance(params, Mapping):
            yield cast(Given, {name: replaced.get(id(t), t) for name, t in params.items()})
        elif params is not None:
            yield cast(Given, [replaced.get(id(t), t) for t in params])
        else:
            yield params


@contextmanager
def _with_parameters(
    modules: Iterable[nn.Module], replaced: Mapping[int, Tensor]
) -> Iterator[None]:
    """Put other parameters in the places of modules' own."""
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (module._parameters, name, parameter)
        for module in dict.fromkeys(inner for outer in modules for inner in outer.modules())
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in replaced
    ]
    try:
        for parameters, name, parameter in places:
            parameters[name] = replaced[id(parameter)]
        yield
    finally:
        for parameters, name, parameter in places:
            parameters[name] = parameter


@contextmanager
def _without_hooks(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run modules without the hooks of FSDP2."""
    removed: list[tuple[Any, dict[Any, Any]]] = []
    try:
        for module in modules:
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                removed.append((hooks, dict(hooks)))
                for key, hook in list(hooks.items()):
                    if _is_of_fsdp(hook):
                        del hooks[key]
        yield
    finally:
        for hooks, before in removed:
            # In the old order, and with what others have registered meanwhile.
            added = {key: hook for key, hook in hooks.items() if key not in before}
            hooks.clear()
            hooks.update({**before, **added})


def _is_of_fsdp(hook: Callable[..., Any]) -> bool:
    owner = getattr(hook, "__self__", None)
    module = type(owner).__module__ if owner is not None else getattr(hook, "__module__", "")
    return str(module).startswith("torch.distributed.fsdp")


def _not_whole(tensors: Mapping[str, Any]) -> str:
    placements = next(iter(tensors.values())).placements
    return (
        f"{parameters_are(tensors)} spread over processes in a way that is not supported "
        f"(placements {list(placements)}), as by tensor parallelism; expected parameters of the "
        f"model itself that fully_shard cuts along one axis. Use fully_shard for them, or "
        f"consolidate a model of the same weights without tensor parallelism"
    )


def _own_part(whole: Tensor, like: Any) -> Tensor:
    """Return the part of a tensor that this process has of another one of its shape."""
    part = whole
    for axis, placement in enumerate(like.placements):
        if placement.is_shard():
            mesh = like.device_mesh
            size = part.shape[placement.dim]
            each = -(-size // mesh.size(axis))
            start = min(size, mesh.get_local_rank(axis) * each)
            part = part.narrow(placement.dim, start, min(each, size - start))
    return part
