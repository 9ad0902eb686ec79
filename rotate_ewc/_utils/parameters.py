"""Find, name and check parameters: of a model, of a list, of a mapping."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from rotate_ewc._utils.messages import left_out, listed, parameters_are, quoted

# Where compiled modules, and those of data-parallel training and averaging, have what they wrap.
_COMPILED: Final = "_orig_mod"
_PARALLEL: Final = "module"
_PERHAPS_WRAPPED: Final = re.compile(rf"(^|\.)({_COMPILED}|{_PARALLEL})\.")

Parameters = Sequence[Tensor] | Mapping[str, Tensor]


def name_parameters(params: Parameters, model: nn.Module | None) -> dict[str, Tensor]:
    """Give every parameter a name, and check that it can be one of the model's.

    Raises:
        TypeError: If something is not a tensor of real or complex floating-point numbers.
        ValueError: If there are none, one comes twice, is not the model's, or can have no gradient;
            or if any of the model's has no size before a first batch.
    """
    if isinstance(params, Tensor) or not isinstance(params, (Mapping, Iterable)):
        raise TypeError(
            f"params is {type(params).__name__}; expected a list of parameters or a dictionary"
        )
    own = {} if model is None else named_parameters(model)
    known = {id(tensor): name for name, tensor in own.items()}
    if isinstance(params, Mapping):
        named = _with_plain_names(params, model)
    else:
        tensors = list(params)
        named = {known.get(id(tensor), str(i)): tensor for i, tensor in enumerate(tensors)}
        if len({id(tensor) for tensor in tensors}) < len(tensors):
            raise ValueError("params holds one parameter more than once; expected each once")
    if not named:
        raise ValueError("params is empty; expected at least one parameter")
    check_initialised({**own, **named})
    _check_tensors(named)
    strangers = {name: t for name, t in named.items() if model is not None and id(t) not in known}
    if strangers:
        shapes = [f"{name!r} (shape {list(t.shape)})" for name, t in strangers.items()]
        raise ValueError(
            f"params {listed(shapes)} {'is not a parameter' if len(shapes) == 1 else 'are none'} "
            f"of the model; expected tensors from model.parameters(), not copies of them"
        )
    return named


def _check_tensors(named: Mapping[str, Any]) -> None:
    """Raise unless all are tensors that can have gradients, naming those that cannot."""
    kinds = {
        name: str(t.dtype) if isinstance(t, Tensor) else type(t).__name__
        for name, t in named.items()
        if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex())
    }
    if kinds:
        got = [f"{name!r} is {kind}" for name, kind in kinds.items()]
        raise TypeError(f"params {listed(got)}; expected a floating-point tensor")
    if inference := [name for name, tensor in named.items() if tensor.is_inference()]:
        raise ValueError(
            f"{parameters_are(inference)} made in inference mode and cannot have gradients; "
            f"expected a model made outside of torch.inference_mode"
        )
    if without_numbers := [name for name, tensor in named.items() if tensor.is_meta]:
        raise ValueError(
            f"{parameters_are(without_numbers)} on the meta device, without values; expected a "
            f"model with weights: model.to_empty(device=...), then load_state_dict"
        )
    strange = [name for name, tensor in named.items() if tensor.layout is not torch.strided]
    if strange:
        raise ValueError(
            f"{parameters_are(strange)} sparse or nested; expected dense ones, such as "
            f"nn.Parameter(parameter.detach().to_dense()), or {left_out(strange)}"
        )


def check_initialised(named: Mapping[str, Any]) -> None:
    """Raise `ValueError` if parameters wait for a first batch, naming their layers."""
    if waiting := [name for name, tensor in named.items() if is_lazy(tensor)]:
        layers = dict.fromkeys(name.rpartition(".")[0] or name for name in waiting)
        raise ValueError(
            f"{parameters_are(waiting)} not initialised; the layers {quoted(layers)}, such as "
            f"nn.LazyLinear, find their sizes in the first batch: run one batch through the model "
            f"first"
        )


def _with_plain_names(params: Mapping[str, Tensor], model: nn.Module | None) -> dict[str, Tensor]:
    """Return parameters by the names that they have without compiled and parallel wrappers."""
    plain = {} if model is None else _plain_names(model)
    named = {plain.get(name, _without_compiled(name)): t for name, t in params.items()}
    if len(named) < len(params):
        raise ValueError(
            f"params has names that differ only in {_COMPILED!r} and mean the same "
            f"parameter; expected each once"
        )
    return named


def select_parameters(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str]
) -> dict[str, Tensor]:
    """Return the parameters that require gradients and that name patterns choose, by name.

    Args:
        model: The model.
        include: Shell-style patterns, of which a name must match at least one.
        exclude: Shell-style patterns, none of which a name may match.

    Raises:
        ValueError: If there are no parameters, a pattern matches none at all, or nothing is left.
    """
    named = named_parameters(model)
    if not named:
        raise ValueError(
            f"model is {type(model).__name__}, which has no parameters; expected the model that "
            f"was trained, and its loss after it"
        )
    for argument, patterns in (("include", include), ("exclude", exclude)):
        check_matching(argument, patterns, named, "parameter of the model")
    chosen = {
        name: parameter
        for name, parameter in named.items()
        if parameter.requires_grad
        and any(matches(name, pattern) for pattern in include)
        and not any(matches(name, pattern) for pattern in exclude)
    }
    if not chosen:
        raise ValueError(
            f"no parameter is left to protect: of {len(named)} in the model, none requires "
            f"gradients and matches include={list(include)} but not exclude={list(exclude)}"
        )
    return chosen


def check_matching(argument: str, patterns: Iterable[str], names: Iterable[str], what: str) -> None:
    """Raise if patterns match none of some names.

    Args:
        argument: Where the patterns come from.
        patterns: The patterns.
        names: The names.
        what: What the names are of, in the singular.
    """
    known = list(names)
    unmatched = [p for p in patterns if not any(matches(name, p) for name in known)]
    if unmatched:
        one = len(unmatched) == 1
        raise ValueError(
            f"{argument} {'pattern' if one else 'patterns'} {quoted(unmatched)} "
            f"{'matches' if one else 'match'} no {what}; expected patterns for names such as "
            f"{known[:3]}"
        )


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter's name, which is without wrappers, fits a pattern."""
    return fnmatchcase(name, _without_compiled(pattern))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside compiled and data-parallel wrappers, whose names are plain."""
    while attribute := _wrapping_attribute(model):
        model = getattr(model, attribute)
    return model


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters by the names they have without wrappers around its modules.

    A module that `torch.compile` or `DistributedDataParallel` has wrapped is another one with the
    first as its only part, whose name would come into all names below.
    """
    named: dict[str, Tensor] = dict(model.named_parameters())
    if not any(map(_PERHAPS_WRAPPED.search, named)):
        return named
    return dict(zip(_plain_names(model).values(), named.values(), strict=True))


def _plain_names(model: nn.Module) -> dict[str, str]:
    """Return the names of a model's parameters without wrappers, by those with them."""
    inside = {
        ".".join(filter(None, (path, attribute)))
        for path, module in model.named_modules(remove_duplicate=False)
        if (attribute := _wrapping_attribute(module))
    }
    names = [name for name, _ in model.named_parameters()]
    return {name: _without(name.split("."), inside) for name in names}


def _without(parts: Sequence[str], inside: Container[str]) -> str:
    kept = (part for i, part in enumerate(parts) if ".".join(parts[: i + 1]) not in inside)
    return ".".join(kept)


def _without_compiled(name: str) -> str:
    return name.replace(f"{_COMPILED}.", "")


def _wrapping_attribute(module: nn.Module) -> str | None:
    """Return the attribute in which a wrapper has its module; None for any other module."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)):
        return _PARALLEL
    return _COMPILED if isinstance(getattr(module, _COMPILED, None), nn.Module) else None


def parameters_of(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return parameters by name of a module, or of a mapping that already is one."""
    if isinstance(model, nn.Module):
        return named_parameters(model)
    if isinstance(model, Mapping):
        if any(_COMPILED in name for name in model):
            return {_without_compiled(name): tensor for name, tensor in model.items()}
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
    if parameter is None or parameter.device != anchor.device:
        raise ValueError(misfits({name: anchor}, parameters))
    if parameter.shape == anchor.shape:
        return parameter
    if not fits(name, parameters, anchor):
        raise ValueError(misfits({name: anchor}, parameters))
    return parameter[tuple(slice(size) for size in anchor.shape)]


def code_of_part(path: str) -> str:
    """Return code for a part of a model."""
    if all(part.isidentifier() for part in path.split(".")):
        return f"model.{path}"
    return f"model.get_submodule({path!r})" if path else "model"


def _remedy(missing: Sequence[str], names: Iterable[str]) -> str:
    """Return what to pass where a model has other names than those that are protected."""
    own = set(names)
    paths = (name.removesuffix(missing[0]) for name in own if name.endswith(f".{missing[0]}"))
    for path in sorted(paths, key=lambda path: (len(path), path)):
        if all(f"{path}{name}" in own for name in missing):
            part = code_of_part(path.removesuffix("."))
            return (
                f"the part of it that was consolidated: {part} (penalty.consolidate({part}, "
                f"loss_func, data, forward=model) goes through the whole model)"
            )
    return (
        "the model that was consolidated, or one grown from it (strict=False leaves such "
        "parameters out)"
    )


def misfits(anchors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> str:
    """Say which parameters a penalty protects that the model has not, or not as they were."""
    told = []
    if missing := [name for name in anchors if name not in parameters]:
        told.append(
            f"{parameters_are(missing)} protected by the penalty, but the model has no such "
            f"parameter; expected {_remedy(missing, parameters)}"
        )
    present = {name: (parameters[name], a) for name, a in anchors.items() if name in parameters}
    if elsewhere := [name for name, (p, anchor) in present.items() if p.device != anchor.device]:
        parameter, anchor = present[elsewhere[0]]
        told.append(
            f"{parameters_are(elsewhere)} on {parameter.device}, but the penalty on "
            f"{anchor.device}; call penalty.to({str(parameter.device)!r})"
        )
    smaller = [
        f"parameter {name!r} has shape {list(p.shape)}, but the penalty protects {list(a.shape)}"
        for name, (p, a) in present.items()
        if not fits(name, parameters, a)
    ]
    if smaller:
        told.append(
            f"{listed(smaller)}; expected at least that size along every axis (strict=False leaves "
            f"such parameters out)"
        )
    return "; ".join(told)
