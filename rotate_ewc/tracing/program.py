"""The parts of a forward pass that decide which rows of its tensors depend on which example.

Two forward passes that call the same functions with the same arguments, on tensors of the same
shapes, move rows in the same way, unless they index by data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from rotate_ewc._utils.tree import version_of

# Where rows go is told by a tensor of indices or by a mask.
_INDEXING: Final = frozenset(
    {"__getitem__", "__setitem__", "index", "embedding", "gather", "take", "take_along_dim", "put"}
    | {"index_add", "index_copy", "index_fill", "index_put", "index_reduce", "index_select"}
    | {"scatter", "scatter_add", "scatter_reduce", "segment_reduce", "tensor_split", "where"}
    | {"select_scatter", "slice_scatter", "embedding_bag"}
)
# Where rows go, and how many there are, is told by a single tensor.
_SELECTING: Final = frozenset(
    {"masked_select", "masked_scatter", "repeat_interleave"}
    | {"_pack_padded_sequence", "_pad_packed_sequence"}
)
# Where rows go is told by the numbers in them.
_SORTING: Final = frozenset(
    {"sort", "msort", "argsort", "topk", "kthvalue", "median", "nanmedian", "mode", "multinomial"}
    | {"unique", "unique_consecutive", "cummax", "cummin", "nonzero", "argwhere", "bernoulli"}
    | {"randperm", "randint", "histc", "bincount", "bucketize", "searchsorted"}
)
# Where rows go is told by numbers, each of which may be a tensor.
_SHAPING: Final = frozenset(
    {"split", "tensor_split", "narrow", "select", "roll", "flip", "repeat", "tile", "unfold"}
    | {"view", "reshape", "expand", "movedim", "transpose", "permute", "chunk", "unflatten"}
)
# Where rows go is told by a matrix of data, such as the ones and zeros that send tokens to experts.
_MULTIPLYING: Final = frozenset(
    {"bmm", "mm", "mv", "matmul", "__matmul__", "__rmatmul__", "addmm", "addbmm", "baddbmm"}
    | {"einsum", "tensordot", "linear", "inner", "multi_dot", "solve", "vecdot", "bilinear"}
    | {"conv1d", "conv2d", "conv3d", "grid_sample"}
)
# Of these, those that multiply one matrix after another along the first axis.
_BATCHED: Final = frozenset({"bmm", "baddbmm", "matmul", "__matmul__", "__rmatmul__"})
# Where rows go may be told by a mask of data with two axes of examples.
_MASKING: Final = frozenset(
    {"mul", "multiply", "where", "masked_fill", "add", "sub", "div", "scaled_dot_product_attention"}
    | {"addcmul", "lerp", "pow", "maximum", "minimum"}
)


# So many indices are read in a moment, also on another device; more are as data. Of factors and
# masks, more are taken to be weights.
_MOST_NUMBERS: Final = 2**18
_FEW_NUMBERS: Final = 2**14


class Program:
    """A digest of the functions that a forward pass calls, with their arguments.

    Tensors are told apart by numbers: those that are known beforehand by their places among them,
    results by the calls that made them. So Python that picks one of several tensors, or one order
    of them, makes another program.

    Attributes:
        key: The digest; equal for equal programs, in one process.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        """Begin with no function called.

        Args:
            known: The inputs, parameters and constants, in this order.
        """
        self.key = 0
        self._held: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._numbers: dict[int, int] = {}
        for place, tensor in enumerate(known):
            self._number(tensor, hash((place, version_of(tensor) if tensor.ndim else 0)))
        self._indexes = False
        self._factors: set[torch.Size] = set()
        self._masks: set[tuple[torch.Size, bool]] = set()

    def indexes_by_data(self, num_examples: int) -> bool:
        """Whether rows may be moved by what the data are, and not by their shapes alone.

        Matrices and masks of data for each example move no rows from one to another, such as the
        frozen keys of an attention layer, or a mask of padding.

        Args:
            num_examples: Number of examples in the batch.
        """
        if self._indexes or any(
            shape[0] % num_examples or num_examples in shape[1:] for shape in self._factors
        ):
            return True
        return any(
            sum(size % num_examples == 0 for size in shape) > 1
            for shape, of_each in self._masks
            if not (of_each and shape[0] == num_examples)
        )

    def note(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tensors: Sequence[Tensor],
        varying: Sequence[Tensor],
    ) -> None:
        """Add a call.

        Args:
            func: The function of torch.
            args: Its arguments.
            kwargs: Its named arguments.
            tensors: The tensors among them.
            varying: Those of them that may depend on the data.
        """
        name = getattr(func, "__name__", "").partition(".")[0].removeprefix("linalg_")
        if name == "__get__":
            return
        if not name.endswith("__"):
            name = name.rstrip("_")
        self.key = hash((self.key, func, self._described(args), self._described(kwargs)))
        if self._indexes:
            return
        # Whatever wrote them: not everything that writes can be seen.
        kept = {id(tensor) for tensor in varying}
        self._add_numbers(name, [t for t in tensors if id(t) not in kept and _has_numbers(t)])
        if not varying or self._indexes:
            return
        of_data = [t for t in varying if not t.requires_grad]
        mixed = 0 < len(of_data) < len(varying)
        if mixed and name in _BATCHED and _is_batched(varying):
            self._factors.update(t.shape for t in of_data)
            return
        if mixed and name in _MASKING:
            self._masks.update((t.shape, _is_batched(varying)) for t in of_data)
        # What is indexed may be a mask itself.
        is_first = bool(args) and varying[0] is args[0] and name != "where"
        self._indexes = (
            (mixed and name in _MULTIPLYING)
            or _indexes(name, varying, varying[1:] if is_first else varying)
            or (name in ("__getitem__", "__setitem__") and _slices_by_tensors(args[1]))
        )

    def note_results(
        self, func: Callable[..., Any], args: Sequence[Any], results: Iterable[Tensor]
    ) -> None:
        """Number what the last call has made, or written into."""
        call: object = self.key
        if getattr(func, "__name__", "") == "__get__":
            # Of the properties that are tensors, such as `x.T`; they are no calls of their own.
            call = getattr(func, "__self__", func), self._described(args)
        for place, tensor in enumerate(results):
            self._number(tensor, hash((call, place)))

    def _number(self, tensor: Tensor, number: int) -> None:
        self._held[id(tensor)] = tensor
        self._numbers[id(tensor)] = number

    def _number_of(self, tensor: Tensor) -> int:
        if self._held.get(id(tensor)) is not tensor:
            # What no call was seen to make is the same in each pass only if it is the same object;
            # not so activations, which come at the same place.
            self._number(tensor, len(self._numbers) if tensor.requires_grad else id(tensor))
        return self._numbers[id(tensor)]

    def _add_numbers(self, name: str, constants: Sequence[Tensor]) -> None:
        """Tell programs apart by the numbers in constants that may move rows."""
        if name in _INDEXING or name in _SELECTING or name in _SHAPING:
            moving = [tensor for tensor in constants if not tensor.is_floating_point()]
            if sum(tensor.numel() for tensor in moving) > _MOST_NUMBERS:
                self._indexes = True
                return
        elif name in _MULTIPLYING or name in _MASKING:
            few = (t for t in constants if t.ndim and t.numel() <= _FEW_NUMBERS)
            moving = [tensor for tensor in few if not isinstance(tensor, nn.Parameter)]
        else:
            return
        try:
            self.key = hash((self.key, *map(_bytes_of, moving)))
        except RuntimeError:  # inside a transform of torch.func they stand for others
            self._indexes = True

    def _described(self, value: Any) -> Any:
        """Return what can be hashed of an argument, with all but the numbers in a tensor."""
        if isinstance(value, Tensor):
            shape = "nested" if value.is_nested else value.shape
            return value.dtype, shape, self._number_of(value)
        if isinstance(value, int):
            return value if value >= 0 else ("-", -value)  # -1 and -2 have the same hash
        if isinstance(value, (tuple, list)):
            return tuple(map(self._described, value))
        if isinstance(value, Mapping):
            return tuple((key, self._described(item)) for key, item in value.items())
        if isinstance(value, slice):
            return self._described((value.start, value.stop, value.step))
        if hasattr(value, "tobytes"):
            return value.tobytes()
        try:
            hash(value)
        except TypeError:
            return type(value)
        return value


def _has_numbers(tensor: Tensor) -> bool:
    regular = not tensor.is_nested and tensor.layout is torch.strided and not tensor.is_meta
    return regular and not tensor.is_complex()


def _bytes_of(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    return plain.view(torch.uint8).numpy().tobytes() if plain.ndim else repr(plain.item()).encode()


def _indexes(name: str, varying: Sequence[Tensor], indices: Sequence[Tensor]) -> bool:
    """Whether a function moves rows by what is in tensors that depend on the data.

    Args:
        name: The function's name.
        varying: The tensors.
        indices: Those of them that may tell where rows go.
    """
    if name in _SORTING or name in _SELECTING or any(t.layout != torch.strided for t in varying):
        return True
    if name in _SHAPING and any(t.ndim == 0 and not t.dtype.is_floating_point for t in varying):
        return True
    if name not in _INDEXING:
        return False
    if any(t.dtype in (torch.bool, torch.uint8) for t in indices):
        # Rows of a parameter too; but a mask that selects from one tensor moves nothing.
        return name != "where" or len(varying) > 2
    return len(varying) > 1 and not all(t.dtype.is_floating_point for t in varying)


def _is_batched(varying: Sequence[Tensor]) -> bool:
    """Whether all tensors hold matrices, and as many of them."""
    many = all(tensor.ndim > 2 for tensor in varying)
    return many and len({(tensor.ndim, tensor.shape[0]) for tensor in varying}) == 1


def _slices_by_tensors(index: Any) -> bool:
    """Whether a slice begins or ends where a tensor says."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(end, Tensor)
        for part in parts
        if isinstance(part, slice)
        for end in (part.start, part.stop, part.step)
    )
