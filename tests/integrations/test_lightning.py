"""`RotatedEWCCallback` in Lightning's `Trainer`."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rotate_ewc import EKFACPenalty
from rotate_ewc.integrations.lightning import RotatedEWCCallback
from tests.helpers import hf_models, hf_training
from tests.helpers.exact import exact_penalty
from tests.helpers.lightning_training import trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    """A small classifier, with automatic or manual optimization."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.automatic_optimization = not manual
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found

    def training_step(self, batch: Any, index: int) -> Any:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.losses.append(float(loss))
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch: Any, index: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def loader(seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, x[:, :3].roll(seed, dims=1).argmax(dim=1)), batch_size=4)


def with_a_task(strength: Any = 3.0) -> EKFACPenalty:
    penalty = exact_penalty(strength)
    module = Module()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
    penalty.consolidate(module, nn.CrossEntropyLoss(), loader(1))
    return penalty


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("manual", [False, True])
def test_steps_are_those_of_an_attached_penalty(tmp_path: Path, manual: bool) -> None:
    module, twin = Module(manual), Module()
    penalty, own = with_a_task(), with_a_task()
    callback = RotatedEWCCallback(penalty, nn.CrossEntropyLoss())
    trainer(tmp_path, callback).fit(module, loader(2))
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.05)
    own.attach(optimizer, twin)
    own.current_num_data = 12
    losses = []
    for _ in range(2):
        for x, y in loader(2):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(twin(x), y)
            losses.append(float(loss))
            loss.backward()
            optimizer.step()
    assert module.losses == pytest.approx(losses, rel=1e-9)
    for name, value in weights(module).items():
        assert torch.allclose(value, weights(twin)[name], rtol=1e-9)
    assert penalty.num_tasks == 2
    assert callback.attachment is None
    own.consolidate(twin, nn.CrossEntropyLoss(), loader(2))
    moved = {name: value + 0.1 for name, value in weights(twin).items()}
    assert float(penalty(moved)) == pytest.approx(float(own(moved)), rel=1e-6)


@pytest.mark.parametrize(("update", "every"), [("rotated", 1), ("tangent", 4)])
def test_resumed_runs_end_in_the_same_bits(tmp_path: Path, update: str, every: int) -> None:
    def run(folder: Path, ckpt: str | None, penalty: EKFACPenalty) -> dict[str, Tensor]:
        module = Module()
        saver = ModelCheckpoint(folder, save_top_k=-1, every_n_epochs=1)
        callback = RotatedEWCCallback(penalty, nn.CrossEntropyLoss(), update=update, every=every)
        trainer(folder, callback, saver, max_epochs=3).fit(module, loader(2), ckpt_path=ckpt)
        return weights(module)

    penalty, resumed = with_a_task("auto"), exact_penalty("auto")
    whole = run(tmp_path / "whole", None, penalty)
    (tmp_path / "parts").mkdir()
    shutil.copy(tmp_path / "whole" / "epoch=0-step=3.ckpt", tmp_path / "parts" / "first.ckpt")
    found = run(tmp_path / "parts", str(tmp_path / "parts" / "first.ckpt"), resumed)
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    assert resumed.num_tasks == penalty.num_tasks == 2
    assert resumed.strength == penalty.strength != 1.0
    moved = {name: value + 0.1 for name, value in whole.items()}
    assert float(penalty(moved)) == float(resumed(moved))


def test_a_task_is_consolidated_once(tmp_path: Path) -> None:
    """Also where a checkpoint was saved after that, and the run is resumed from it."""
    penalty = exact_penalty()
    run = trainer(tmp_path, RotatedEWCCallback(penalty, nn.CrossEntropyLoss()))
    module = Module()
    run.fit(module, loader(2))
    run.strategy.connect(module)
    callback = run.callbacks[0]
    state = copy.deepcopy(callback.state_dict())
    assert state["consolidated"]
    again = exact_penalty()
    other = RotatedEWCCallback(again, nn.CrossEntropyLoss())
    other.load_state_dict(state)
    other._consolidate(run, module)
    assert again.num_tasks == 1
    run = trainer(tmp_path, other, max_epochs=1)
    run.fit(module, loader(3))
    assert again.num_tasks == 2


def test_logs_and_validation(tmp_path: Path) -> None:
    module, penalty = Module(), with_a_task()
    run = trainer(tmp_path, RotatedEWCCallback(penalty, nn.CrossEntropyLoss(), False))
    run.fit(module, loader(2), loader(3))
    metrics = run.logged_metrics
    assert float(metrics["rotated_ewc_penalty"]) == pytest.approx(float(penalty(module)), rel=1e-6)
    assert float(metrics["rotated_ewc_strength"]) == 3.0
    x, y = loader(3).dataset.tensors
    expected = float(nn.functional.cross_entropy(module(x), y))
    assert float(metrics["val_loss"]) == pytest.approx(expected, rel=1e-6)


class Language(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model, _ = hf_models.case("gpt2")

    def training_step(self, batch: Any, index: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def test_a_model_of_transformers_inside(tmp_path: Path) -> None:
    """Its own loss, its own batches, and the names of parameters that it has by itself."""
    penalty, module = exact_penalty(), Language()
    callback = RotatedEWCCallback(penalty, submodule="model")
    batches = DataLoader(hf_training.task(1), batch_size=4)
    trainer(tmp_path, callback, max_epochs=1).fit(module, batches)
    (term,) = penalty.terms
    assert term.operator.provenance.num_loss_terms == 12 * 4 - 3
    assert set(term.anchor) == set(dict(module.model.named_parameters()))
    assert float(penalty(module.model)) == 0.0


def test_bad_arguments(tmp_path: Path) -> None:
    penalty = exact_penalty()
    pair: Any = (penalty, penalty)
    with pytest.raises(TypeError, match="penalty is tuple; expected one EKFACPenalty"):
        RotatedEWCCallback(pair)
    with pytest.raises(ValueError, match="optimizer is -1"):
        RotatedEWCCallback(penalty, optimizer=-1)
    with pytest.raises(ValueError, match="view is given, and consolidate_at_end is True"):
        RotatedEWCCallback(penalty, view=lambda model: {})
    with pytest.raises(ValueError, match="forward is given, but loss_func is not"):
        RotatedEWCCallback(penalty, forward=lambda inputs: inputs)
    callback = RotatedEWCCallback(penalty, nn.CrossEntropyLoss(), optimizer=1)
    with pytest.raises(ValueError, match="optimizer is 1, but the module has 1"):
        trainer(tmp_path, callback).fit(Module(), loader(1))
    two = [RotatedEWCCallback(p, nn.CrossEntropyLoss()) for p in (penalty, exact_penalty())]
    with pytest.raises(Exception, match=r"(?s)state_key|already has a penalty|unique"):
        trainer(tmp_path, *two).fit(Module(), loader(1))
    module = Module()
    before = weights(module)
    with pytest.raises(ValueError, match=r"loss_func is None.*has no loss of its own"):
        trainer(tmp_path, RotatedEWCCallback(penalty)).fit(module, loader(1))
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters())
    assert penalty.num_tasks == 0


def test_a_checkpoint_without_the_penalty_is_refused(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_top_k=-1)
    trainer(tmp_path, saver, max_epochs=1).fit(Module(), loader(1))
    path = str(tmp_path / "epoch=0-step=3.ckpt")
    callback = RotatedEWCCallback(exact_penalty(), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="the checkpoint has no state of this callback"):
        trainer(tmp_path, callback).fit(Module(), loader(1), ckpt_path=path)
    # The advice.
    callback = RotatedEWCCallback(exact_penalty(), nn.CrossEntropyLoss())
    module = Module()
    module.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
    trainer(tmp_path, callback).fit(module, loader(1))
