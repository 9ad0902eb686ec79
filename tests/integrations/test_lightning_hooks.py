"""The batches that are consolidated in Lightning are those that training sees, after its hooks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from rotate_ewc import EKFACPenalty
from rotate_ewc.integrations.lightning import RotatedEWCCallback
from tests.helpers import hf_models, hf_training, lightning_training
from tests.helpers.exact import exact_penalty
from tests.helpers.lightning_training import CE, assert_same, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Hooks:
    """All three, of a module or of its data; what one does, the order of the others shows."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"x": 2 * batch[0], "y": batch[1]}

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return {"x": batch["x"].to(device) + 1, "y": batch["y"].to(device)}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch["x"].square(), batch["y"]


class Module(lightning_training.Module):
    rate = 0.01  # hooks make the inputs large


class Hooked(Hooks, Module):
    """A module that has the hooks."""


class HookedData(Hooks, lightning.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(data(), 8)


def data() -> TensorDataset:
    return lightning_training.data(16)


@pytest.mark.parametrize("of", ["module", "data"])
def test_hooks(tmp_path: Path, of: str) -> None:
    """Of mappings they make pairs, which is what the loss takes."""
    penalty = exact_penalty(fisher_type="type2")
    module = Hooked() if of == "module" else Module()
    run = trainer(tmp_path, RotatedEWCCallback(penalty, CE))
    run.fit(module, DataLoader(data(), 8) if of == "module" else HookedData())
    x, y = data()[:]
    seen = (2 * x + 1).square()
    assert torch.equal(torch.cat(module.inputs[:2]), seen)
    assert_same(penalty, module, [(seen, y)])


def test_batches_that_hooks_leave_mappings_are_refused(tmp_path: Path) -> None:
    class Leaves(Hooked):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    run = trainer(tmp_path, RotatedEWCCallback(EKFACPenalty(), CE))
    with pytest.raises(ValueError, match=r"batch 0 of data is a dict with \['x', 'y'\]"):
        run.fit(Leaves(), DataLoader(data(), 8))


def test_batches_for_the_estimate_alone_are_taken_as_they_are(tmp_path: Path) -> None:
    penalty, module = exact_penalty(fisher_type="type2"), Hooked()
    x, y = data()[:]
    callback = RotatedEWCCallback(penalty, CE, data=[(x, y)])
    trainer(tmp_path, callback).fit(module, DataLoader(data(), 8))
    assert_same(penalty, module, [(x, y)])


class Augments(Module):
    """Adds noise in training, as each of the usual guards finds it."""

    def __init__(self, guard: str) -> None:
        super().__init__()
        self.guard, self.seen = guard, list[Tensor]()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        if self.trainer.training if self.guard == "trainer" else self.training:
            x = x + torch.randn_like(x) + random.random() + np.random.rand()
        self.seen.append(x)
        return x, y


def states() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


class Ends(lightning.Callback):
    """Forgets what was seen before training ends, and notes the random states then."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.seen.clear()
        self.states = [*states(), trainer.train_dataloader.generator.get_state().tolist()]


@pytest.mark.parametrize("submodule", ["", "net"])
@pytest.mark.parametrize("guard", ["trainer", "module"])
def test_every_pass_has_the_same_augmentation(tmp_path: Path, guard: str, submodule: str) -> None:
    # Without room for batches, each pass reads the data.
    penalty = exact_penalty(fisher_type="type2", memory_budget=2**10)
    module, ends = Augments(guard), Ends()
    callback = RotatedEWCCallback(penalty, CE, submodule=submodule)
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(data(), 8, shuffle=True, generator=generator)
    trainer(tmp_path, callback, ends).fit(module, loader)
    first, second = (torch.cat(module.seen[start : start + 2]) for start in (0, 2))
    assert len(module.seen) == 4
    assert torch.equal(first, second)
    x, _ = data()[:]
    assert not (first[:, None] == x).all(dim=-1).any()
    assert [*states(), generator.get_state().tolist()] == ends.states
    assert module.training


def test_generators_of_samplers_begin_each_pass_anew(tmp_path: Path) -> None:
    penalty = exact_penalty(fisher_type="type2", memory_budget=2**10)
    module, generator = Augments("none"), torch.Generator().manual_seed(3)
    sampler = RandomSampler(data(), generator=generator)
    callback = RotatedEWCCallback(penalty, CE)
    trainer(tmp_path, callback).fit(module, DataLoader(data(), 8, sampler=sampler))
    first, second = torch.cat(module.seen[-4:]).chunk(2)
    assert torch.equal(first, second)


def test_what_hooks_use_is_left_as_it_was(tmp_path: Path) -> None:
    """Such as running statistics of a part of the module that is not consolidated."""

    class Normalizes(Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6, affine=False)
            self.calls = 0

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.calls += 1
            assert self.norm.training
            return self.norm(batch[0]), batch[1]

    class Means(lightning.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.mean, self.calls = pl_module.norm.running_mean.clone(), pl_module.calls

    module, means = Normalizes(), Means()
    callback = RotatedEWCCallback(exact_penalty(), CE, submodule="net")
    trainer(tmp_path, callback, means, max_epochs=1).fit(module, DataLoader(data(), 8))
    assert module.calls > means.calls
    assert torch.equal(module.norm.running_mean, means.mean)
    assert int(module.norm.num_batches_tracked) == 2


def test_a_resumed_run_with_nothing_left_to_train(tmp_path: Path) -> None:
    """Its hooks find the trainer training, too."""
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    penalties = [exact_penalty(fisher_type="type2") for _ in range(2)]
    loader = DataLoader(data(), 8)
    trainer(tmp_path, RotatedEWCCallback(penalties[0], CE), saver).fit(Augments("trainer"), loader)
    module = Augments("trainer")
    run = trainer(tmp_path, RotatedEWCCallback(penalties[1], CE))
    run.fit(module, loader, ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert module.inputs == []
    state, expected = penalties[1].state_dict(), penalties[0].state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


class Texts(Dataset[Any]):
    """Notes which examples are read."""

    def __init__(self) -> None:
        self.examples, self.read = hf_training.task(1), list[int]()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        example = self.examples[index]
        return {"tokens": example["input_ids"], **example}


class Noted(DataLoader[Any]):
    """Counts how often it is gone through."""

    passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return super().__iter__()


class Language(lightning.LightningModule):
    """Takes the tokens by a name that the model of transformers does not know."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch["input_ids"] = batch.pop("tokens").flip(dims=[1])
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        keep = slice(None, -1)
        return {key: value[:, keep] for key, value in batch.items()}

    def training_step(self, batch: Any, index: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Begins(lightning.Callback):
    """Notes how often a loader was gone through before the first step."""

    passes = -1

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.passes = trainer.train_dataloader.passes if self.passes < 0 else self.passes


def flipped(count: int) -> Iterator[dict[str, Tensor]]:
    batch = hf_models.language(1, 12)
    batch["input_ids"] = batch["input_ids"].flip(dims=[1])
    yield {key: value[:count, :-1] for key, value in batch.items()}


@pytest.mark.parametrize("limit", [None, 2])
def test_a_model_with_its_own_loss(tmp_path: Path, limit: int | None) -> None:
    penalty, begins = exact_penalty(fisher_type="type2"), Begins()
    module = Language(hf_models.case("gpt2")[0])
    loader = Noted(Texts(), batch_size=4)
    callback = RotatedEWCCallback(penalty, submodule="model")
    run = trainer(tmp_path, begins, callback, max_epochs=1, limit_train_batches=limit)
    run.fit(module, loader)
    assert begins.passes == 1  # that of training
    (term,) = penalty.terms
    assert term.operator.num_data == (12 if limit is None else 8)
    known = exact_penalty(fisher_type="type2")
    known.consolidate(module.model, data=list(flipped(term.operator.num_data)))
    moved = {name: p + torch.randn_like(p) for name, p in module.model.named_parameters()}
    assert float(penalty(moved)) == pytest.approx(float(known(moved)), rel=1e-6)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_the_models_own_loss_is_compared_in_the_precision_of_training(
    tmp_path: Path, precision: Any
) -> None:
    """A model makes tensors of the default dtype, which is that of training."""
    dtypes: list[torch.dtype] = []
    model, _ = hf_models.case("gpt2")
    model.register_forward_pre_hook(lambda *_: dtypes.append(torch.get_default_dtype()))
    penalty = exact_penalty()
    callback = RotatedEWCCallback(penalty, submodule="model")
    run = trainer(tmp_path, callback, max_epochs=1, precision=precision)
    run.fit(Language(model), Noted(Texts(), batch_size=4))
    assert penalty.num_tasks == 1
    assert set(dtypes) == {torch.float64 if precision == "64-true" else torch.bfloat16}


def test_streams_that_may_not_be_read_before_training(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from (Texts()[index] for index in range(12))

    penalty, begins = exact_penalty(), Begins()
    loader = Noted(Stream(), batch_size=4)
    callback = RotatedEWCCallback(penalty, submodule="model")
    run = trainer(tmp_path, begins, callback, max_epochs=1)
    run.fit(Language(hf_models.case("gpt2")[0]), loader)
    assert begins.passes == 1
    assert penalty.terms[0].operator.num_data == 12
