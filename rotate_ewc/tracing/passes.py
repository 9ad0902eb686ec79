"""Two passes over the user's data, which show the same examples with the same sampled labels."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, NoReturn
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from tqdm import tqdm

from rotate_ewc._utils.out_of_memory import is_out_of_memory
from rotate_ewc._utils.structure import mapped, tensors_of
from rotate_ewc._utils.tree import memory_of, parts_of, place_of, same, to_device, version_of
from rotate_ewc._utils.warnings import add_note
from rotate_ewc.distributed.processes import Ranks
from rotate_ewc.errors import NotFiniteError
from rotate_ewc.losses import BatchForm
from rotate_ewc.losses.draws import LabelGenerator
from rotate_ewc.tracing.capture import BatchCapturer, CapturedBatch
from rotate_ewc.tracing.forward_advice import advice_for_batch, advice_for_data

_SAME_IN_EACH_PASS: Final = (
    "pass a list of the batches (list(data), before anything has read them), or a loader that "
    "gives the same ones each time"
)
Consumer = Callable[[CapturedBatch], None]


class Batch(NamedTuple):
    """One batch of the user's data: its number, and inputs and targets on the model's device."""

    number: int
    inputs: Any
    targets: Any


class ReiterableData:
    """The user's data, which must show as many examples in every pass.

    Attributes:
        data: The batches.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        """Check that the data can be iterated more than once, as far as that is seen."""
        check_reiterable(data)
        self.data = data
        self._has_shown = False
        self._num_examples: int | None = None

    @classmethod
    def of(cls, data: Iterable[Any]) -> ReiterableData:
        """Return data of which it is known what earlier passes have shown, if there were any."""
        return data if isinstance(data, cls) else cls(data)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches."""
        for batch in self.data:
            self._has_shown = True
            yield batch

    def __len__(self) -> int:
        """Return the number of batches, for progress bars; loaders of streams have none."""
        return len(self.data)  # type: ignore[arg-type]

    def end_pass(self, num_examples: int) -> None:
        """Note how many examples a pass has shown.

        Raises:
            ValueError: If it was another number in an earlier pass.
        """
        before = num_examples if self._num_examples is None else self._num_examples
        self._num_examples = before
        if num_examples != before:
            raise ValueError(
                f"data gave {before} examples in one pass and {num_examples} in a later one; "
                f"expected the same examples in each pass: {_SAME_IN_EACH_PASS}"
            )

    def refuse_empty(self) -> NoReturn:
        """Raise a `ValueError` for a pass without batches."""
        if self._has_shown:
            raise ValueError(
                f"data gave batches in one pass and none in the next, as if one pass had used them "
                f"up; expected the same batches in each pass: {_SAME_IN_EACH_PASS}"
            )
        raise ValueError("data is empty; expected at least one batch (inputs, targets)")


class Passes:
    """Two passes over the data; in the second, the model runs only for batches not in the cache.

    What the model itself raises is not changed, but for a note that says which batch it was (Python
    3.11 or later); neither is what the data raise.
    """

    def __init__(
        self, capturer: BatchCapturer, data: ReiterableData, max_bytes: int, ranks: Ranks
    ) -> None:
        """Prepare the first pass.

        Args:
            capturer: Runs the model.
            data: Batches (inputs, targets) that can be iterated more than once; of several
                processes, those of this one.
            max_bytes: What may be kept of the first pass for the second.
            ranks: The processes that go through data of their own.
        """
        self._capturer = capturer
        self._data = data
        self._ranks = ranks
        self._cache = ActivationCache(max_bytes)

    def first(self, consume: Consumer, *, with_squares: bool = True) -> None:
        """Capture every batch, and keep what fits in memory.

        Args:
            consume: Gets what every batch shows, in one or several parts.
            with_squares: Whether to take squared per-example gradients of parameters without rule.

        Raises:
            ValueError: If a batch or a layer cannot be handled; the message names it.
            TypeError: If a part of a batch, or the outputs, have the wrong type.
        """
        generator, num_examples = self._label_generator(), 0
        for batch in self._batches("factors"):
            with naming_batch(batch.number):
                for captured in self._captured(batch, generator, with_squares=with_squares):
                    num_examples += captured.new_examples
                    consume(captured)
                    self._cache.add(batch, captured)
                    # Or it would live on while the model runs on the next batch.
                    del captured
            self._cache.end_batch(generator.position)
        self._data.end_pass(num_examples)

    def second(self, consume: Consumer) -> None:
        """Show all batches again, those in the cache as they were, without the squares.

        Args:
            consume: Gets what every batch shows, in the parts that the first pass had.

        Raises:
            ValueError: As in the first pass.
            TypeError: As in the first pass.
        """
        if self._cache.holds_all:
            for cached in self._cache.take_all():
                _hand_on(cached, consume)
            return
        generator, num_examples = self._label_generator(), 0
        for batch in self._batches("eigenvalues"):
            found = self._cache.take(batch)
            if found is not None:
                num_examples += sum(part.new_examples for part in found.parts)
                generator.position = found.position
                _hand_on(found, consume)
                continue
            with naming_batch(batch.number):
                for captured in self._captured(batch, generator, with_squares=False):
                    num_examples += captured.new_examples
                    consume(captured)
                    del captured
        self._data.end_pass(num_examples)

    def _label_generator(self) -> LabelGenerator:
        seed, ranks = self._capturer.settings.seed, self._ranks
        return LabelGenerator(self._capturer.device, seed, ranks.rank, ranks.size)

    def _batches(self, description: str) -> Iterator[Batch]:
        return batches(
            self._data,
            self._capturer.device,
            self._capturer.likelihood.batch_form,
            progressbar=bool(self._capturer.settings.progressbar),
            description=description,
            ranks=self._ranks,
        )

    def _captured(
        self, batch: Batch, generator: LabelGenerator, *, with_squares: bool
    ) -> Iterator[CapturedBatch]:
        """Run the model on a batch, and note on its own errors which batch it was."""
        with noting_batch(batch.number):
            yield from self._capturer.capture(
                batch.inputs, batch.targets, generator, with_squares=with_squares
            )


@dataclass
class CachedBatch:
    """What one batch has shown.

    Attributes:
        batch: The batch as it was given.
        versions: How often its tensors had been written to.
        parts: What it has shown.
        position: Number of examples that labels were drawn for by its end.
    """

    batch: Batch
    versions: list[int]
    parts: deque[CapturedBatch] = field(default_factory=deque)
    position: int = 0

    @property
    def unmodified(self) -> bool:
        """Whether the batch and the layers' inputs are still what they were."""
        return self.versions == _versions(self.batch) and all(
            use.unmodified for part in self.parts for use in part.uses
        )


class ActivationCache:
    """What the first batches have shown, of whole batches, as long as there is room.

    Not all loaders give the same batches twice: they may shuffle, change the inputs at random, or
    fill the same buffer for every batch. What is cached counts only for a batch that is the same.
    """

    def __init__(self, max_bytes: int) -> None:
        """Hold nothing yet.

        Args:
            max_bytes: What all that is cached may take.
        """
        self._max_bytes = max_bytes
        self._cached: deque[CachedBatch] = deque()
        # Addresses of memory that counts already, since batches may be views of the same.
        self._addresses: set[int] = set()
        # Weakly, or batches would outlive what is cached of them.
        self._places: WeakValueDictionary[object, Tensor] = WeakValueDictionary()
        self._num_bytes = 0
        self._full = False

    def add(self, batch: Batch, captured: CapturedBatch) -> None:
        """Keep what a batch (or a part of it) has shown, if it fits and all earlier ones did."""
        if self._full:
            return
        if not self._cached or self._cached[-1].batch.number != batch.number:
            if self._is_refilled(batch):
                # What the earlier ones had is lost; nothing tells whether they are asked for again.
                self._cached.clear()
                self._full = True
                return
            self._cached.append(CachedBatch(batch, _versions(batch)))
        self._cached[-1].parts.append(captured)
        storages = _storages(batch, captured)
        self._num_bytes += sum(storages[address] for address in storages.keys() - self._addresses)
        self._addresses |= storages.keys()
        if self._num_bytes > self._max_bytes:
            self._full = True
            self._cached.pop()

    def _is_refilled(self, batch: Batch) -> bool:
        """Whether a batch is in the memory of an earlier one, which NumPy fills without a trace."""
        given = tensors_of((batch.inputs, batch.targets))
        tensors = {place_of(part): t for t in given for part in parts_of(t)}
        refilled = any(self._places.get(place, t) is not t for place, t in tensors.items())
        self._places.update(tensors)
        return refilled

    def end_batch(self, position: int) -> None:
        """Note how many examples labels were drawn for by the end of the last batch."""
        if not self._full:
            self._cached[-1].position = position

    @property
    def holds_all(self) -> bool:
        """Whether every batch was kept and has not been modified since."""
        return not self._full and all(cached.unmodified for cached in self._cached)

    def take_all(self) -> Iterator[CachedBatch]:
        """Yield all batches in order, and drop them."""
        while self._cached:
            yield self._cached.popleft()

    def take(self, batch: Batch) -> CachedBatch | None:
        """Return and drop what a batch has shown; None if it is not the batch that was kept.

        Batches must be taken in order. After a batch that was not kept, all others are dropped.
        """
        found = self._cached.popleft() if self._cached else None
        if found is None or not found.unmodified or not same(found.batch[1:], batch[1:]):
            self._cached.clear()
            return None
        return found


def check_reiterable(data: object) -> None:
    """Raise unless `data` can be iterated more than once.

    Raises:
        TypeError: If `data` is not iterable at all, or one batch, or a data set of examples.
        ValueError: If `data` is its own iterator, such as a generator: it would be used up.
    """
    kind = type(data)
    if advice := advice_for_data(data):
        raise TypeError(f"data is {advice}")
    if getattr(kind, "__iter__", None) is None and not hasattr(kind, "__getitem__"):
        raise TypeError(
            f"data is {kind.__name__}; expected an iterable of batches (inputs, targets)"
        )
    # No loader is asked for an iterator: that alone draws random numbers, or starts processes.
    if hasattr(kind, "__next__") and iter(data) is data:  # type: ignore[call-overload]
        raise ValueError(
            f"data is a one-shot iterator ({type(data).__name__}), and reading it would lose "
            f"batches; pass something that can be iterated again, such as a list or a DataLoader"
        )


def batches(
    data: ReiterableData,
    device: torch.device,
    form: BatchForm,
    *,
    progressbar: bool,
    description: str,
    ranks: Ranks,
) -> Iterator[Batch]:
    """Yield every batch, checked and moved to a device.

    One of several processes may have none.

    Raises:
        ValueError: If a batch does not have the required form, or there are no batches.
        TypeError: If a batch's targets are not a tensor, where they must be one.
    """
    index = -1
    for index, batch in enumerate(tqdm(data, desc=description, disable=not progressbar)):
        if form is BatchForm.INPUTS or isinstance(batch, Tensor):
            yield Batch(index, to_device(batch, device), None)
            ranks.look()
            continue
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            got = (
                f"{type(batch).__name__} of {len(batch)} items"
                if isinstance(batch, (tuple, list))
                else type(batch).__name__
            )
            raise ValueError(
                f"batch {index} of data is a {got}; expected (inputs, targets)"
                f"{advice_for_batch(batch)}"
            )
        inputs, targets = batch
        if targets is not None and form is BatchForm.TENSOR and not isinstance(targets, Tensor):
            raise TypeError(
                f"batch {index} of data has targets of type {type(targets).__name__}; "
                f"expected a tensor"
            )
        yield Batch(index, to_device(inputs, device), _moved(targets, device))
        ranks.look()
    if index < 0 and ranks.size == 1:
        data.refuse_empty()


def _moved(targets: Any, device: torch.device) -> Any:
    """Move targets of any structure to a device."""
    if isinstance(targets, Tensor):
        return targets.to(device)
    return mapped(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, targets)


@contextmanager
def noting_batch(index: int) -> Iterator[None]:
    """Note on a model's own errors which batch it was."""
    try:
        yield
    except RuntimeError as error:
        add_note(error, f"in the model's own passes over batch {index} of data")
        if is_out_of_memory(error):
            add_note(error, "smaller batches take less memory, as in training")
        raise


@contextmanager
def naming_batch(index: int) -> Iterator[None]:
    """Say in the message of a ValueError or TypeError which batch it was."""
    try:
        yield
    except (ValueError, TypeError) as error:
        # Others may have more to tell than a message.
        if type(error) not in (ValueError, TypeError, NotFiniteError):
            raise
        named = type(error)(f"batch {index} of data: {error}")
        for note in getattr(error, "__notes__", ()):
            add_note(named, note)
        raise named from error


def _hand_on(cached: CachedBatch, consume: Consumer) -> None:
    """Hand on the parts of a batch, and hold none of them any longer."""
    with naming_batch(cached.batch.number):
        while cached.parts:
            consume(cached.parts.popleft())


def _versions(batch: Batch) -> list[int]:
    return [version_of(tensor) for tensor in tensors_of((batch.inputs, batch.targets))]


def _storages(batch: Batch, captured: CapturedBatch) -> dict[int, int]:
    """Return the bytes of all memory that a captured batch keeps, by address.

    It is all of what its tensors are views of, and several may share some.
    """
    tensors = [gradient for gradients in captured.gradients for gradient in gradients]
    tensors += [use.call.input for use in captured.uses]
    tensors += captured.inputs
    tensors += tensors_of((batch.inputs, batch.targets))
    return dict(memory_of(part) for tensor in tensors for part in parts_of(tensor))
