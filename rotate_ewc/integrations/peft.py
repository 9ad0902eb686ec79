"""PEFT: protect what a base model knows, while only adapters on it are trained.

A penalty that was consolidated on a model before it got adapters knows its weights by their own
names. `effective_parameters` returns the weights that the model with its adapters computes with,
`W + scaling · B A` with LoRA, under these names, so that gradients reach A and B:

    penalty.consolidate(model, data=old_task)
    model = get_peft_model(model, LoraConfig(...))
    optimizer = torch.optim.AdamW(model.parameters())
    handle = penalty.attach(optimizer, model, "gradient", view=effective_parameters)

(To protect adapters themselves, as parameters, no more is needed than
`penalty.consolidate(peft_model, data=task)`: the base model requires no gradients.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from torch import Tensor, nn

try:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"rotate_ewc.integrations.peft needs PEFT ({error}); "
        f"install it with: pip install 'rotate-ewc[peft]'"
    ) from error

from rotate_ewc._utils.messages import listed
from rotate_ewc._utils.parameters import unwrapped

__all__ = ["effective_parameters"]


def effective_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that a model with adapters computes with, by the base model's names.

    Parameters that no adapter changes are the base model's own. The others are computed,
    differentiably, from the adapters' parameters. The names do not depend on those of the adapters,
    and are the same before adapters are added and after `merge_and_unload`.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected. Without any adapters
            these are its parameters.

    Raises:
        ValueError: If an adapter does more than add to the weights (DoRA, IA3, OFT), or the weights
            it changes are quantised; all such layers are named.
    """
    model = unwrapped(model)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    refused: list[str] = []
    found = dict(_parameters(base, "", refused))
    if refused:
        raise ValueError(
            f"the weights with adapters are not known for {listed(refused)}; expected adapters "
            f"that are added to weights in floating point, such as LoraConfig(use_dora=False) on a "
            f"model without quantization_config, or a penalty on the adapters themselves, without "
            f"view"
        )
    return found


def _parameters(module: nn.Module, prefix: str, refused: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a module, and note the layers for which that cannot be done."""
    if isinstance(module, ModulesToSaveWrapper):
        yield from _parameters(_active(module), prefix, refused)
        return
    if isinstance(module, BaseTunerLayer):
        if reason := _refusal(module):
            refused.append(f"{prefix.rstrip('.')!r} ({reason})")
        else:
            yield from _adapted(module, prefix)
        return
    if isinstance(module, AuxiliaryTrainingWrapper):
        refused.append(f"{prefix.rstrip('.')!r} ({type(module).__name__})")
        return
    for name, parameter in module.named_parameters(recurse=False):
        yield f"{prefix}{name}", parameter
    for name, child in module.named_children():
        yield from _parameters(child, f"{prefix}{name}.", refused)


def _active(wrapper: Any) -> nn.Module:
    """Return the module that a wrapper uses now: its own copy, or the original."""
    adapters = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    if wrapper.disable_adapters or not adapters:
        module: nn.Module = wrapper.original_module
        return module
    trained: nn.Module = wrapper.modules_to_save[adapters[0]]
    return trained


# What PEFT calls the methods whose `get_delta_weight` is added to the weights; that of others, such
# as OFT, is a rotation of them.
_ADDING: Final = frozenset(
    {"adalora", "c3a", "delora", "fourierft", "gralora", "loha", "lokr", "lora", "osf", "psoft"}
    | {"pvera", "randlora", "shira", "tinylora", "vblora", "vera", "waveft"}
)


def _refusal(layer: Any) -> str:
    """Return why the weights of a layer with its adapters are not known; nothing if they are."""
    kind, base = type(layer).__name__, layer.get_base_layer()
    weight = getattr(base, "weight", None)
    modules = {f"peft.tuners.{method}.layer" for method in _ADDING}
    if modules.isdisjoint(parent.__module__ for parent in type(layer).__mro__):
        return f"{kind}, whose adapters are not added to the weights"
    if hasattr(layer, "parameter_name") or not isinstance(weight, Tensor):
        return f"{kind} of {type(base).__name__}, which has no weight"
    if not weight.is_floating_point():
        return f"quantised, {weight.dtype}"
    if variants := [v for v in getattr(layer, "lora_variant", {}).values() if v is not None]:
        return type(variants[0]).__name__
    return ""


def _adapted(layer: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a layer with what its adapters add to them."""
    parameters = dict(layer.get_base_layer().named_parameters())
    for adapter in _adding(layer):
        delta = layer.get_delta_weight(adapter)
        parameters["weight"] = parameters["weight"] + delta.to(parameters["weight"].dtype)
        if getattr(layer, "lora_bias", {}).get(adapter):
            delta = layer.lora_B[adapter].bias * layer.scaling[adapter]
            parameters["bias"] = parameters["bias"] + delta
    for name, parameter in parameters.items():
        yield f"{prefix}{name}", parameter


def _adding(layer: Any) -> list[str]:
    """Return the adapters at work whose part is not merged into the base layer's weights."""
    if layer.disable_adapters:
        return []
    names = {name for key in layer.adapter_layer_names for name in getattr(layer, key)}
    merged = set(layer.merged_adapters)
    return [name for name in layer.active_adapters if name in names and name not in merged]
