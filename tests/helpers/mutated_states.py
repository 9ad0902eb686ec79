"""Snapshots of which every part is well-formed, but that say what they should not.

Unlike damage to the bytes of a file, this can have a valid digest.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from rotate_ewc.io.header import header_text

State = dict[str, Any]
Mutation = Callable[[random.Random, dict[str, Any], State], None]

_DEEP: Final[list[Any]] = []
for _ in range(300):
    _DEEP[:] = [list(_DEEP)]

VALUES: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, 1, 2, 3, -1, 2**31, 2**47, 2**48, 2**63, 2**64, 10**400, -(10**4000)),
    *(0.5, 1.5, -0.0, -2.5, float("nan"), float("inf"), -float("inf"), 1e308, 5e-324),
    *("", "x", "x" * 10**5, "a\nb", "\ud800", "\x00\x1b[2J", "a/b", "header", "+", "é", "NaN"),
    *("mean", "sum", "merged", "separate", "uniform", "float16", "float32", "float64", "bfloat16"),
    *("rotate_ewc.operator/1", "rotate_ewc.operator/2", "rotate_ewc.penalty/1"),
    *([], {}, [[]], {"": None}, {"format": "rotate_ewc.operator/1"}, [1] * 1000, [2**47] * 3000),
    *(["gradient_basis"], ["activation_basis", "gradient_basis"], ["0.weight"], ["0.weight"] * 2),
    *([1, 2, 3], [0, 0, 0], [2**40, 0, 0], [-1, -1, 24], [1, 24, 1], [True, 6, 4], [6.0, 4.0]),
    _DEEP,
)
DTYPES: Final = tuple(
    getattr(torch, name)
    for name in (
        *("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "complex64"),
        *("int64", "int32", "int8", "uint8", "uint16", "bool", "float8_e8m0fnu", "uint64"),
    )
    if hasattr(torch, name)
)


def mutated_state(rng: random.Random, state: State) -> State:
    """Return a copy of a snapshot with one or a few things in it that should not be."""
    changed = {key: copy.copy(value) for key, value in state.items()}
    header = json.loads(header_text(changed))
    del changed["header"]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(MUTATIONS)(rng, header, changed)
    return {"header": json.dumps(header), **changed}


def places(node: Any) -> list[tuple[Any, Any]]:
    """Return every place in nested lists and dictionaries, as the container and the key in it."""
    found: list[tuple[Any, Any]] = []
    todo = [node]
    while todo:
        container = todo.pop()
        keys = container if isinstance(container, dict) else range(len(container))
        for key in list(keys):
            found.append((container, key))
            if isinstance(container[key], (dict, list)) and container[key] is not _DEEP:
                todo.append(container[key])
    return found


def _any_place(rng: random.Random, header: dict[str, Any]) -> tuple[Any, Any] | None:
    """Choose a place, those near to the root as often as the many far from it."""
    found = places(header)[:5000]
    near = [place for place in found if place[0] is header]
    return rng.choice(rng.choice((found, near))) if near else None


def replaced_value(rng: random.Random, header: dict[str, Any], tensors: State) -> None:
    if place := _any_place(rng, header):
        place[0][place[1]] = copy.copy(rng.choice(VALUES))


def deleted_value(rng: random.Random, header: dict[str, Any], tensors: State) -> None:
    if place := _any_place(rng, header):
        del place[0][place[1]]


def repeated_value(rng: random.Random, header: dict[str, Any], tensors: State) -> None:
    """Have an entry of a list twice, or one of a dictionary under another name too."""
    if not (place := _any_place(rng, header)):
        return
    container, key = place
    value = copy.deepcopy(container[key])
    if isinstance(container, list):
        container.append(value)
    else:
        container[rng.choice(("more", "", "a\nb", "0.weight", key + " "))] = value


def exchanged_values(rng: random.Random, header: dict[str, Any], tensors: State) -> None:
    one, other = _any_place(rng, header), _any_place(rng, header)
    if one and other:
        value = copy.deepcopy(one[0][one[1]])
        one[0][one[1]] = copy.deepcopy(other[0][other[1]])
        other[0][other[1]] = value


def changed_number(rng: random.Random, header: dict[str, Any], tensors: State) -> None:
    numbers = [(c, k) for c, k in places(header) if isinstance(c[k], (int, float))]
    if numbers:
        container, key = rng.choice(numbers)
        container[key] = rng.choice(
            (0, 1, -1, 2, container[key] + 1, container[key] * 2, 10**400, 1e308)
        )


def changed_dtype(rng: random.Random, header: dict[str, Any], tensors: State) -> None:
    """Say that a block, or its tensors too, have another dtype."""
    dtypes = [(c, k) for c, k in places(header) if k == "dtype" and isinstance(c[k], str)]
    if not dtypes:
        return
    container, key = rng.choice(dtypes)
    container[key] = rng.choice(("float64", "float32", "bfloat16", "float16"))
    names = container.get("parameters")
    if rng.random() < 0.5 and isinstance(names, list):
        label = "+".join(map(str, names))
        for name in [name for name in tensors if f"{label}/" in name]:
            if isinstance(tensors[name], Tensor):
                tensors[name] = tensors[name].to(getattr(torch, container[key]))


def renamed_parameter(rng: random.Random, header: dict[str, Any], tensors: State) -> None:
    """Give a parameter another name, everywhere, so that the snapshot is as good as it was."""
    names = _names(header)
    if not names:
        return
    old = rng.choice(names)
    new = rng.choice(
        ("header", "a/eigenvalues", "a+b", "a b", "é", "\n", "", "k" * 3000, rng.choice(names))
    )
    text = json.dumps(header).replace(json.dumps(old), json.dumps(new))
    header.clear()
    header.update(json.loads(text))
    for key in list(tensors):
        parts = key.split("/")
        renamed = ["+".join(new if n == old else n for n in part.split("+")) for part in parts]
        tensors["/".join(renamed)] = tensors.pop(key)


def _names(header: dict[str, Any]) -> list[str]:
    parts = [header]
    if isinstance(header.get("terms"), list):
        parts = [t["operator"] for t in header["terms"] if isinstance(t, dict) and "operator" in t]
    found = [p.get("parameters") for p in parts if isinstance(p, dict)]
    return sorted({name for names in found if isinstance(names, dict) for name in names})


def _some(rng: random.Random, tensors: State) -> str | None:
    """Choose the key of a tensor."""
    keys = sorted(key for key, value in tensors.items() if isinstance(value, Tensor))
    return rng.choice(keys) if keys else None


def dropped_tensor(rng: random.Random, header: dict[str, Any], tensors: State) -> None:
    if key := _some(rng, tensors):
        del tensors[key]


def renamed_tensor(rng: random.Random, header: dict[str, Any], tensors: State) -> None:
    if key := _some(rng, tensors):
        new = rng.choice((key + " ", key.upper(), key[1:], "7/" + key, "x", "k" * 5000, "a\nb\x1b"))
        tensors[new] = tensors.pop(key)


def extra_tensor(rng: random.Random, header: dict[str, Any], tensors: State) -> None:
    name = rng.choice(("more", "", "9/operator/x", "0/anchor/x", "0/x", "a\nb", "n" * 9999))
    tensors[name] = torch.zeros(2)


def exchanged_tensors(rng: random.Random, header: dict[str, Any], tensors: State) -> None:
    one, other = _some(rng, tensors), _some(rng, tensors)
    if one and other:
        tensors[one], tensors[other] = tensors[other], tensors[one]


def cast_tensor(rng: random.Random, header: dict[str, Any], tensors: State) -> None:
    if key := _some(rng, tensors):
        source = tensors[key]
        tensors[key] = source.to(torch.float32).to(rng.choice(DTYPES))


def reshaped_tensor(rng: random.Random, header: dict[str, Any], tensors: State) -> None:
    if not (key := _some(rng, tensors)):
        return
    tensor: Tensor = tensors[key]
    changes = (
        tensor.flatten(),
        tensor[None],
        tensor[..., None],
        tensor[:0] if tensor.ndim else tensor,
        tensor[..., :-1] if tensor.ndim else tensor,
        torch.cat([tensor, tensor]) if tensor.ndim else tensor,
        tensor.reshape(tensor.shape[::-1]),
        torch.zeros(()),
        torch.zeros(2**20, 0),
    )
    tensors[key] = rng.choice(changes).clone()


def transposed_tensor(rng: random.Random, header: dict[str, Any], tensors: State) -> None:
    key = _some(rng, tensors)
    if key and tensors[key].ndim > 1:
        tensors[key] = tensors[key].mT.contiguous()


def spoiled_tensor(rng: random.Random, header: dict[str, Any], tensors: State) -> None:
    """Have one number in it, or all, that should not be."""
    key = _some(rng, tensors)
    if key is None or not tensors[key].numel() or not tensors[key].is_floating_point():
        return
    tensor = tensors[key].to(torch.float64).clone(memory_format=torch.contiguous_format)
    value = rng.choice(
        (float("nan"), float("inf"), -float("inf"), -1.0, -1e-30, 0.0, 3e38, 1e-40, 2.0)
    )
    if rng.random() < 0.5:
        tensor.view(-1)[rng.randrange(tensor.numel())] = value
    else:
        tensor *= value
    tensors[key] = tensor.to(tensors[key].dtype)


MUTATIONS: Final[tuple[Mutation, ...]] = (
    replaced_value,
    replaced_value,
    replaced_value,
    deleted_value,
    repeated_value,
    exchanged_values,
    changed_number,
    changed_dtype,
    renamed_parameter,
    dropped_tensor,
    renamed_tensor,
    extra_tensor,
    exchanged_tensors,
    cast_tensor,
    reshaped_tensor,
    transposed_tensor,
    spoiled_tensor,
    spoiled_tensor,
)
