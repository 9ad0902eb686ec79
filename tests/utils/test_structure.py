"""Nested outputs in one tensor and back."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from rotate_ewc._utils.structure import mapped, packed, packed_like, part_of, tensors_of

Pair = namedtuple("Pair", ["one", "two"])


@dataclass(frozen=True)
class Record:
    """A dataclass that cannot be written to, with a field that is no argument."""

    one: Any
    two: Any
    name: str = field(init=False, default="record")


def numbers(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


NESTED: dict[str, Any] = {
    "tuple": (numbers(4, 3), numbers(4)),
    "list": [numbers(4, 3), [numbers(4, 2, 2)]],
    "namedtuple": Pair(numbers(4), numbers(4, 1)),
    "dict": {"a": numbers(4, 3), "b": {"c": numbers(4), "d": "text", "e": None}},
    "ordered": OrderedDict(a=numbers(4), b=numbers(4, 2)),
    "userdict": UserDict(a=numbers(4), b=numbers(4, 2)),
    "dataclass": Record(numbers(4, 3), (numbers(4), 7)),
    "rows": (numbers(12, 2), numbers(4, 5)),
    "other-kinds": (numbers(4, 2), torch.arange(4), torch.tensor(1.0), 3.0),
}


def same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    tensors = list(tensors_of(one)), list(tensors_of(other))
    for ours, theirs in zip(*tensors, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NESTED)
def test_what_is_packed_comes_back(name: str) -> None:
    value = NESTED[name]
    whole, packing = packed(value)
    assert packing is not None
    assert len(whole) == 4
    same(packing.unpacked(whole), value)
    assert torch.equal(packed_like(value, 4), whole)


@pytest.mark.parametrize("name", NESTED)
def test_rows_stay_together(name: str) -> None:
    """The second example of all is that of each."""
    value = NESTED[name]
    whole, packing = packed(value)
    assert packing is not None
    part = packing.unpacked(whole[1:2])
    for own, of_all in zip(tensors_of(part), tensors_of(value), strict=True):
        if of_all.is_floating_point() and of_all.ndim:
            rows = len(of_all) // 4
            assert torch.equal(own, of_all[rows : 2 * rows])


def test_one_tensor_stays_what_it_is() -> None:
    outputs = numbers(4, 3)
    assert packed(outputs) == (outputs, None)


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(TypeError, match="returned dict with floating-point tensors of shapes"):
        packed({"a": torch.arange(3), "b": "text"})
    loss = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(ValueError, match=r"shapes \[\[4, 3\], \[\]\].*forward=.*ModelLoss"):
        packed((numbers(4, 3), loss))
    with pytest.raises(ValueError, match="no rows"):
        packed((numbers(0, 3), numbers(0)))


def test_read_only_mappings_become_dictionaries() -> None:
    found = mapped(lambda leaf: leaf + 1, MappingProxyType({"a": 1}))
    assert found == {"a": 2}


def test_parts_are_found_by_key() -> None:
    for value, key in (((1, 2), 1), ({"a": 2}, "a"), (Record(1, 2), "two")):
        assert part_of(value, key) == 2
    for value, key in (((1, 2), 5), ((1, 2), "a"), ({"a": 2}, "b"), (Record(1, 2), "c"), (3, 0)):
        with pytest.raises(LookupError):
            part_of(value, key)
