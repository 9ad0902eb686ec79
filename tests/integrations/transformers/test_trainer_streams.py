"""`Trainer` with data of no known length, and with damaged checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from rotate_ewc import EKFACPenalty
from rotate_ewc.errors import SnapshotError
from rotate_ewc.integrations.loaders import FirstOfStream
from rotate_ewc.integrations.transformers import RotatedEWCCallback
from tests.helpers.exact import exact_penalty
from tests.helpers.hf_training import penalty_of_a_task, task, tiny_gpt2, trainer


@pytest.fixture(autouse=True)
def _quiet(recwarn: Any) -> None:
    """What other packages warn of is not ours to fix."""


class Endless(IterableDataset[Any]):
    """The texts of a task, again and again; or once, without telling how many there are."""

    def __init__(self, once: bool = False) -> None:
        self.once, self.read = once, 0

    def __iter__(self) -> Iterator[Any]:
        for _ in range(1) if self.once else count():
            for text in task(1):
                self.read += 1
                assert self.read < 1000, "it does not end"
                yield text


def test_a_stream_without_number_is_refused(tmp_path: Path) -> None:
    data = Endless()
    run = trainer(tmp_path, tiny_gpt2(), [RotatedEWCCallback(exact_penalty())], data=data)
    with pytest.raises(ValueError, match=r"may have no end.*num_samples=2000"):
        run.train()
    assert data.read == 0


def test_the_first_examples_of_a_stream_are_taken(tmp_path: Path) -> None:
    model = tiny_gpt2()
    penalty, known = exact_penalty(fisher_type="type2"), exact_penalty(fisher_type="type2")
    callback = RotatedEWCCallback(penalty, num_samples=5)
    trainer(tmp_path, model, [callback], data=Endless()).train()
    provenance = penalty.terms[0].operator.provenance
    assert provenance.settings["num_data_seen"] == 5
    assert provenance.num_data == 6 * 4  # steps times batch size
    batch = {key: torch.stack([text[key] for text in task(1)[:5]]) for key in task(1)[0]}
    known.consolidate(model, data=[batch], num_data=24)
    moved = {name: p + 0.1 for name, p in model.named_parameters()}
    assert float(penalty(moved)) == pytest.approx(float(known(moved)), rel=1e-4)


def test_streams_that_end_and_tasks_before(tmp_path: Path) -> None:
    """No more is taken than there is, and than was trained on."""
    model = tiny_gpt2()
    penalty = penalty_of_a_task(model, weighting="uniform")
    callback = RotatedEWCCallback(penalty, num_samples=100)
    trainer(tmp_path, model, [callback], data=Endless(once=True)).train()
    assert callback._own is None
    assert penalty.current_num_data == 24
    assert penalty.current_num_loss_terms == pytest.approx((12 * 4 - 3) * 24 / 12)
    assert penalty.num_tasks == 2


def test_parts_of_streams() -> None:
    parts = [list(FirstOfStream(range(100), 7, slice(start, None, 2))) for start in (0, 1)]
    assert parts == [[0, 2, 4, 6], [1, 3, 5]]


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def of_something_else(path: Path) -> None:
    torch.save({"a": 1}, path)


def pickled(path: Path) -> None:
    torch.save(exact_penalty, path)


@pytest.mark.parametrize("damage", [emptied, truncated, of_something_else, pickled])
def test_a_damaged_attachment_is_named(damage: Callable[[Path], None], tmp_path: Path) -> None:
    def run(resume: bool, penalty: EKFACPenalty) -> Any:
        model, steps = tiny_gpt2(), 4 if resume else 2
        callback = RotatedEWCCallback(penalty)
        made = trainer(
            tmp_path, model, [callback], save_strategy="steps", save_steps=2, max_steps=steps
        )
        return made, callback

    first, _ = run(False, penalty_of_a_task(tiny_gpt2()))
    first.train()
    damage(tmp_path / "checkpoint-2" / "penalty_attachment.pt")
    second, callback = run(True, exact_penalty(5.0))
    with pytest.raises(SnapshotError, match=r"checkpoint-2/penalty_attachment\.pt.*delete this"):
        second.train(resume_from_checkpoint=True)
    assert callback.attachment is None
    # The advice.
    (tmp_path / "checkpoint-2" / "penalty_attachment.pt").unlink()
    third, callback = run(True, exact_penalty(5.0))
    third.train(resume_from_checkpoint=True)
    assert callback.penalty.num_tasks == 2


def test_a_collator_may_make_several_examples_of_one(tmp_path: Path) -> None:
    """All that is seen counts, where all of the data are taken."""

    def twice(texts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {key: torch.stack([text[key] for text in texts + texts]) for key in texts[0]}

    penalty = exact_penalty()
    run = trainer(tmp_path, tiny_gpt2(), [RotatedEWCCallback(penalty)])
    run.data_collator = twice
    run.train()
    assert penalty.terms[0].operator.num_data == 2 * len(task(1))
