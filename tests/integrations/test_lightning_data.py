"""What `RotatedEWCCallback` consolidates in Lightning: which batches, in which precision, when."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from rotate_ewc import EKFACPenalty
from rotate_ewc._utils.preserve_state import generator_states, kept
from rotate_ewc.integrations.lightning import RotatedEWCCallback
from tests.helpers.exact import exact_penalty
from tests.helpers.lightning_training import CE, Module, assert_same, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Endless(IterableDataset[Any]):
    read = 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            for example in data():
                self.read += 1
                assert self.read < 1000, "it does not end"
                yield example


class Ends(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from data(12)


def fit(folder: Path, module: Module, batches: Any, *callbacks: Any, **options: Any) -> None:
    run = trainer(folder, *callbacks, **options)
    before = list(run.callbacks)
    run.fit(module, batches)
    assert run.callbacks == before


def penalty_of(folder: Path, batches: Any, module: Module, **options: Any) -> EKFACPenalty:
    penalty = exact_penalty(fisher_type="type2")
    fit(folder, module, batches, RotatedEWCCallback(penalty, CE), **options)
    return penalty


def test_a_limit_holds_for_the_estimate(tmp_path: Path) -> None:
    module = Module()
    penalty = penalty_of(tmp_path, DataLoader(data(), 8), module, limit_train_batches=2)
    assert penalty.current_num_data == penalty.terms[0].operator.num_data == 16
    x, y = data()[:16]
    assert_same(penalty, module, [(x, y)])


@pytest.mark.parametrize("own", [False, True])
def test_a_limit_of_shuffled_data_shows_both_passes_the_same(tmp_path: Path, own: bool) -> None:
    from rotate_ewc.integrations.lightning.data import FitBatches

    generator = torch.Generator().manual_seed(5) if own else None
    loader = DataLoader(data(), 8, shuffle=True, generator=generator)
    batches = FitBatches(loader, 2, lambda batch: batch, False)
    before = None if generator is None else generator.get_state()
    with kept(generator_states(batches)):
        first, second = (torch.cat([x for x, _ in batches]) for _ in range(2))
    assert torch.equal(first, second)
    assert len(first) == 16
    assert not torch.equal(first, data()[:16][0])
    if generator is not None:
        assert torch.equal(before, generator.get_state())


def test_streams(tmp_path: Path) -> None:
    endless = Endless()
    with pytest.raises(ValueError, match=r"may have no end.*limit_train_batches=\.\.\."):
        penalty_of(tmp_path, DataLoader(endless, 8), Module(), max_steps=3)
    assert endless.read <= 16  # what Lightning has fetched
    with pytest.raises(ValueError, match="may have no end"):
        penalty_of(tmp_path, DataLoader(Endless(), 8), Module(), max_time="00:01:00:00")
    # The advice.
    module = Module()
    penalty = penalty_of(tmp_path, DataLoader(Endless(), 8), module, limit_train_batches=2)
    assert penalty.current_num_data == penalty.terms[0].operator.num_data == 16
    assert_same(penalty, module, [data()[:16]])
    callback = RotatedEWCCallback(exact_penalty(), CE, data=[data()[:8]])
    fit(tmp_path, Module(), DataLoader(Endless(), 8), callback, max_steps=3)
    assert callback.penalty.terms[0].operator.num_data == 8


def test_streams_that_training_reads_to_their_end(tmp_path: Path) -> None:
    module = Module()
    penalty = penalty_of(tmp_path, DataLoader(Ends(), 8), module)
    assert penalty.terms[0].operator.num_data == 12
    assert_same(penalty, module, [data(12)[:]])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["swa", "ema", "own"])
def test_the_final_weights_are_consolidated(tmp_path: Path, kind: str, first: bool) -> None:
    class Replaces(lightning.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            nn.init.constant_(pl_module.net.weight, 0.5)

    others = {
        "swa": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
        "ema": lambda: EMAWeightAveraging(decay=0.5),
        "own": Replaces,
    }
    module, penalty = Module(), exact_penalty()
    saver = ModelCheckpoint(tmp_path, save_last=True)
    pair = [RotatedEWCCallback(penalty, CE), others[kind]()]
    order = pair if first else pair[::-1]
    fit(tmp_path, module, DataLoader(data(), 8), *order, saver, max_epochs=4)
    assert penalty.num_tasks == 1
    assert torch.equal(penalty.terms[0].anchor["net.weight"], module.net.weight)
    assert float(penalty(module)) == 0.0


def test_checkpoints_at_the_end_have_the_task(tmp_path: Path) -> None:
    class Saves(ModelCheckpoint):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "end.ckpt")

    penalty = exact_penalty()
    fit(tmp_path, Module(), DataLoader(data(), 8), Saves(tmp_path), RotatedEWCCallback(penalty, CE))
    states = torch.load(tmp_path / "end.ckpt", weights_only=False)["callbacks"]
    (state,) = (value for key, value in states.items() if "RotatedEWC" in key)
    assert state["consolidated"]
    again = exact_penalty()
    again.load_state_dict(state["penalty"])
    assert again.num_tasks == 1


def test_a_resumed_run_with_nothing_left_to_train_consolidates(tmp_path: Path) -> None:
    """As the run would have done that was killed between its last epoch and its end."""
    batches, module = DataLoader(data(), 8), Module()
    penalty, resumed = exact_penalty(), exact_penalty()
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(tmp_path, module, batches, RotatedEWCCallback(penalty, CE), saver)
    other, callback = Module(), RotatedEWCCallback(resumed, CE)
    run = trainer(tmp_path, callback)
    run.fit(other, batches, ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert other.inputs == []
    assert resumed.num_tasks == 1
    state, expected = resumed.state_dict(), penalty.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_a_module_that_changes_weights_at_the_very_end(tmp_path: Path) -> None:
    class Changes(Module):
        by = 1.0

        def on_train_end(self) -> None:
            with torch.no_grad():
                self.net.weight += self.by

    with pytest.warns(UserWarning, match="on_train_end of the module has changed weights"):
        penalty_of(tmp_path, DataLoader(data(), 8), Changes())
    Changes.by = 0.0
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        penalty_of(tmp_path, DataLoader(data(), 8), Changes())
    assert not [w for w in warned if "on_train_end of the module" in str(w.message)]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("64-true", torch.float64), ("bf16-true", torch.bfloat16), ("16-true", torch.float16)],
)
@pytest.mark.parametrize("update", ["rotated", "gradient"])
def test_true_precision(tmp_path: Path, precision: Any, dtype: torch.dtype, update: str) -> None:
    module, penalty = Module(), exact_penalty(fisher_type="type2")
    for _ in range(2):
        callback = RotatedEWCCallback(penalty, CE, update=update)
        fit(tmp_path, module, DataLoader(data(), 8), callback, precision=precision)
    assert module.inputs[0].dtype == module.net.weight.dtype == dtype
    assert penalty.num_tasks == 2
    (term,) = penalty.terms
    assert term.anchor["net.weight"].dtype == dtype
    x, y = data()[:]
    known = exact_penalty(fisher_type="type2")
    known.consolidate(module.double(), CE, [(x.to(dtype).double(), y)])
    traces = float(term.operator.trace), 2 * float(known.terms[0].operator.trace)
    assert 0.5 < traces[0] / traces[1] < 2.0
    if dtype == torch.float64:
        single = exact_penalty(fisher_type="type2")
        fit(tmp_path, module, DataLoader(data(), 8), RotatedEWCCallback(single, CE),
            precision=precision, max_epochs=1)  # fmt: skip
        assert_same(single, module, [(x.double(), y)])


def test_advice_fits_a_callback(tmp_path: Path) -> None:
    loader = DataLoader([{"x": x, "y": y} for x, y in data(16)], batch_size=8)
    callback = RotatedEWCCallback(exact_penalty(), CE)
    with pytest.raises(ValueError, match=r"a dict with \['x', 'y'\].*RotatedEWCCallback\(data="):
        fit(tmp_path, Module(), loader, callback)
    several = {"a": DataLoader(data(), 8), "b": DataLoader(data(), 8)}
    with pytest.raises(ValueError, match=r"are 2 loaders, in a dict; .*RotatedEWCCallback\(data="):
        fit(tmp_path, Module(), several, RotatedEWCCallback(exact_penalty(), CE))
    for name in ("nope", "net.nope"):
        callback = RotatedEWCCallback(exact_penalty(), CE, submodule=name)
        with pytest.raises(ValueError, match=rf"submodule is '{name}'.* expected one of 'net'"):
            fit(tmp_path, Module(), DataLoader(data(), 8), callback)


class WithoutForward(Module):
    """Its steps call a part of it."""

    forward = lightning.LightningModule.forward  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)


def test_modules_without_forward(tmp_path: Path) -> None:
    """The advice is tried: the part, or a function."""
    loader = DataLoader(data(), 8)
    with pytest.raises(ValueError, match=r"no forward; expected submodule= .* 'net' .*forward="):
        fit(tmp_path, WithoutForward(), loader, RotatedEWCCallback(exact_penalty(), CE))
    module = WithoutForward()
    for options in ({"submodule": "net"}, {"forward": lambda x: module.net(x)}):
        penalty = exact_penalty()
        fit(tmp_path, module, loader, RotatedEWCCallback(penalty, CE, **options))
        assert penalty.num_tasks == 1


class ForwardOfItsOwn(WithoutForward):
    def __init__(self) -> None:
        super().__init__()
        self.forward = self.net.forward  # type: ignore[method-assign]


class Called(WithoutForward):
    def __call__(self, x: Any) -> Any:
        return self.net(x)


@pytest.mark.parametrize("kind", [ForwardOfItsOwn, Called])
def test_modules_that_can_be_called_in_other_ways(kind: type[Module], tmp_path: Path) -> None:
    penalty = exact_penalty()
    fit(tmp_path, kind(), DataLoader(data(), 8), RotatedEWCCallback(penalty, CE))
    assert penalty.num_tasks == 1
