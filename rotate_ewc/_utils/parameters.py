"""Find, name and check parameters: of a model, of a list, of a mapping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

Parameters = Sequence[Tensor] | Mapping[str, Tensor]


def name_parameters(params: Parameters, model: nn.Module | None) -> dict[str, Tensor]:
    """Give every parameter a name, and check that it can be one of the model's.

    Raises:
        TypeError: If something is not a floating-point tensor.
        ValueError: If there are none, one comes twice, is not the model's, or can have no gradient.
    """
    if isinstance(params, Tensor) or not isinstance(params, (Mapping, Iterable)):
        raise TypeError(
            f"params is {type(params).__name__}; expected a list of parameters or a dictionary"
        )
    known = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    if isinstance(params, Mapping):
        named = dict(params)
    else:
        tensors = list(params)
        named = {known.get(id(tensor), str(i)): tensor for i, tensor in enumerate(tensors)}
        if len({id(tensor) for tensor in tensors}) < len(tensors):
            raise ValueError("params holds one parameter more than once; expected each once")
    if not named:
        raise ValueError("params is empty; expected at least one parameter")
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"params {name!r} is {got}; expected a floating-point tensor")
        if tensor.is_inference():
            raise ValueError(
                f"params {name!r} was made in inference mode, and can have no gradients; expected "
                f"a model that is made outside of torch.inference_mode"
            )
        if model is not None and id(tensor) not in known:
            raise ValueError(
                f"params {name!r} (shape {list(tensor.shape)}) is not a parameter of the model; "
                f"expected tensors from model.parameters(), not copies of them"
            )
    return named


def select_parameters(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str]
) -> dict[str, Tensor]:
    """Return the parameters that require gradients, by name, as far as name patterns choose them.

    Args:
        model: The model.
        include: Shell-style patterns, of which a name must match at least one.
        exclude: Shell-style patterns, none of which a name may match.

    Raises:
        ValueError: If a pattern matches no parameter at all, or if nothing is left.
    """
    names = [name for name, _ in model.named_parameters()]
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"{argument} pattern {pattern!r} matches no parameter of the model; expected a "
                    f"pattern for names such as {names[:3]}"
                )
    chosen: dict[str, Tensor] = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and any(fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }
    if not chosen:
        raise ValueError(
            f"no parameter is left to protect: of {len(names)} in the model, none requires "
            f"gradients and matches include={list(include)} but not exclude={list(exclude)}"
        )
    return chosen


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside compiled and data-parallel wrappers, whose names are plain."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def parameters_of(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return parameters by name of a module, or of a mapping that already is one."""
    if isinstance(model, nn.Module):
        return dict(unwrapped(model).named_parameters())
    if isinstance(model, Mapping):
        return model
    raise TypeError(
        f"model is {type(model).__name__}; expected a torch.nn.Module or a mapping from parameter "
        f"names to tensors"
    )


def fits(name: str, parameters: Mapping[str, Tensor], anchor: Tensor) -> bool:
    """Whether there is a parameter of a name that is as large as its anchor along every axis."""
    parameter = parameters.get(name)
    if parameter is None or parameter.ndim != anchor.ndim:
        return False
    return not any(map(int.__lt__, parameter.shape, anchor.shape))


def protected_slice(name: str, parameters: Mapping[str, Tensor], anchor: Tensor) -> Tensor:
    """Return the leading slice of a parameter that existed when its anchor was set."""
    parameter = parameters.get(name)
    if parameter is None:
        raise ValueError(
            f"parameter {name!r} is protected by the penalty, but the model has no such parameter; "
            f"expected the model that was consolidated, or one grown from it (strict=False leaves "
            f"such parameters out)"
        )
    if parameter.device != anchor.device:
        raise ValueError(
            f"parameter {name!r} is on {parameter.device}, but the penalty on {anchor.device}; "
            f"call penalty.to({str(parameter.device)!r})"
        )
    if parameter.shape == anchor.shape:
        return parameter
    if not fits(name, parameters, anchor):
        raise ValueError(
            f"parameter {name!r} has shape {list(parameter.shape)}, but the penalty protects "
            f"{list(anchor.shape)}; expected at least that size along every axis (strict=False "
            f"leaves such parameters out)"
        )
    return parameter[tuple(slice(size) for size in anchor.shape)]
