"""`NamedBlocks`: what an operator holds, looked up by name, moved, saved and loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from rotate_ewc._utils.storage_dtype import OF_BASES, OF_FILES, as_storage_dtype
from rotate_ewc.errors import SnapshotError
from rotate_ewc.io import files, snapshot
from rotate_ewc.linalg.block import Block, map_together
from rotate_ewc.linalg.storage import stored_in
from rotate_ewc.provenance import Provenance


class NamedBlocks:
    """Finished blocks, the shapes of the parameters that they are over, and where they come from.

    Attributes are read only. Whatever changes the tensors returns a new object of the same class.
    """

    _blocks: tuple[Block, ...]
    _shapes: dict[str, torch.Size]
    _provenance: Provenance

    @classmethod
    def from_blocks(
        cls,
        blocks: Iterable[Block],
        parameter_shapes: Mapping[str, Sequence[int]],
        provenance: Provenance,
    ) -> Self:
        """Make an operator from finished blocks.

        Args:
            blocks: Blocks that together hold every parameter once.
            parameter_shapes: Shapes by name, in the order of the operator's parameters.
            provenance: Where the blocks come from.

        Raises:
            ValueError: If there are no blocks.
        """
        operator = cls.__new__(cls)
        operator._hold(blocks, parameter_shapes, provenance)
        if not operator._blocks:
            raise ValueError("blocks is empty; expected at least one block")
        return operator

    def _hold(
        self,
        blocks: Iterable[Block],
        parameter_shapes: Mapping[str, Sequence[int]],
        provenance: Provenance,
    ) -> None:
        # One layout for all tensors: the bits of products depend on it, and files know no other.
        self._blocks = map_together(Tensor.contiguous, blocks)
        self._shapes = {name: torch.Size(shape) for name, shape in parameter_shapes.items()}
        self._provenance = provenance

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks, in the order of their first parameters."""
        return self._blocks

    @property
    def parameter_shapes(self) -> dict[str, torch.Size]:
        """Parameter shapes by name, in order."""
        return dict(self._shapes)

    @property
    def provenance(self) -> Provenance:
        """Loss, Fisher type and number of examples behind the operator."""
        return self._provenance

    @property
    def num_data(self) -> int:
        """Number of examples the operator stands for."""
        return self._provenance.num_data

    @property
    def shape(self) -> tuple[int, int]:
        """`(D, D)` for D numbers in all parameters."""
        size = sum(shape.numel() for shape in self._shapes.values())
        return size, size

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._blocks[0].eigenvalues.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the eigenvalues, and of products; the widest where a model has several."""
        return reduce(torch.promote_types, [block.eigenvalues.dtype for block in self._blocks])

    def block(self, name: str) -> Block:
        """Return the block that holds a parameter.

        Raises:
            ValueError: If the operator has no such parameter.
        """
        for block in self._blocks:
            if name in block.parameters:
                return block
        raise ValueError(f"there is no parameter {name!r}; expected one of {list(self._shapes)}")

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        storage_dtype: torch.dtype | str | None = None,
    ) -> Self:
        """Return the operator on another device or in another floating-point dtype.

        Args:
            device: The device.
            dtype: Dtype of eigenvalues and products; bases with a `storage_dtype` keep that.
            storage_dtype: Dtype of the bases, as in `EstimationSettings`; `torch.float32` restores
                the bases of float32 eigenvalues.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; expected a floating-point dtype")
        wanted = as_storage_dtype(storage_dtype, OF_BASES)
        moved = self.map(lambda tensor: tensor.to(device=device, dtype=dtype))
        return moved._with(stored_in(moved.blocks, wanted))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the operator with every stored tensor replaced by `function` of it.

        Tensors that blocks share stay shared.
        """
        return self._with(map_together(function, self._blocks))

    def map_blocks(self, function: Callable[[Block], Block]) -> Self:
        """Return the operator with every block replaced by one for the same parameters."""
        return self._with(function(block) for block in self._blocks)

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshot: a flat dictionary of tensors, one of which is the `"header"`.

        It can be written with `torch.save` and read with `torch.load(..., weights_only=True)`.
        """
        return snapshot.pack(self._blocks, self._shapes, self._provenance)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """Make an operator from a snapshot; nothing is decomposed again.

        Raises:
            SnapshotError: If the snapshot is incomplete or inconsistent, naming the key.
        """
        return cls.from_blocks(*snapshot.unpack(state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace this operator's contents by those of a snapshot of the same model and loss.

        The number of examples, ranks, dtype and device may differ. `from_state_dict` makes a new
        operator from any snapshot.

        Raises:
            SnapshotError: If the snapshot is bad, or of other parameters, shapes, loss, reduction,
                Fisher type or temperature, naming them; the operator is then left as it was.
        """
        loaded = self.from_state_dict(state)
        ours, theirs = ((o._shapes, o._provenance) for o in (self, loaded))
        if differences := snapshot.differences(*theirs, *ours):
            raise SnapshotError(
                f"snapshot is of another operator: {'; '.join(differences)}; expected a snapshot "
                f"of the same model and loss (from_state_dict makes a new operator from it)"
            )
        self._hold(loaded._blocks, loaded._shapes, loaded._provenance)

    def save(
        self, path: str | os.PathLike[str], *, storage_dtype: torch.dtype | str | None = None
    ) -> None:
        """Write the snapshot to a safetensors file, whole or not at all.

        Args:
            path: The file; an older one is replaced.
            storage_dtype: Dtype in the file, such as `torch.bfloat16` for half the size and an
                error of about 0.2 %; loading restores the original dtype. None stores the original
                dtype.

        Raises:
            FileNotFoundError: If the folder does not exist.
            ValueError: If a snapshot cannot be stored in the dtype.
        """
        dtype = as_storage_dtype(storage_dtype, OF_FILES)
        files.save(snapshot.pack(self._blocks, self._shapes, self._provenance, dtype), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a snapshot from a file that `save` wrote.

        Raises:
            SnapshotError: If the file is damaged or not such a snapshot, naming it and the key.
            FileNotFoundError: If there is no file.
        """
        with files.loaded(path) as state:
            return cls.from_state_dict(state)

    def __repr__(self) -> str:
        """Show size, provenance and blocks."""
        tensors = [t for block in self._blocks for t in block.tensors.values()]
        size = sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)
        lines = [
            f"  {block.label}: {' × '.join(map(str, block.shape))}, {_kept(block)}{_trace(block)}"
            for block in self._blocks
        ]
        head = f"{type(self).__name__} {self.shape[0]} × {self.shape[1]}, {size / 2**20:.1f} MiB, "
        return "\n".join([head + str(self._provenance), *lines])

    def _with(self, blocks: Iterable[Block]) -> Self:
        return self.from_blocks(blocks, self._shapes, self._provenance)


def _trace(block: Block) -> str:
    """Say what the trace of a block is; another process may keep its numbers."""
    return "without numbers" if block.eigenvalues.is_meta else f"trace {block.trace.item():.4g}"


def _kept(block: Block) -> str:
    """Say how many directions a thin block keeps of each side."""
    return f"rank {' × '.join(map(str, block.ranks))}, " if block.is_thin else ""
