"""The callbacks of other frameworks' trainers, which train in several processes by themselves."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rotate_ewc import EKFACPenalty
from tests.helpers.exact import exact_penalty
from tests.helpers.processes import distributed_test, gather

# Each process imports the framework.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@contextmanager
def launched() -> Iterator[Path]:
    """Have the environment be that of `torchrun`; yields a folder that all processes have."""
    rank, size = dist.get_rank(), dist.get_world_size()
    told = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,  # not used: the processes are in a group already
        "TORCHELASTIC_RUN_ID": "tests",
    }
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in told.items()})
    try:
        with tempfile.TemporaryDirectory() as own:
            yield Path(gather(own)[0])
            dist.barrier()
    finally:
        os.environ.clear()
        os.environ.update(before)


def same_everywhere(model: nn.Module, penalty: EKFACPenalty) -> None:
    """Weights and snapshots have the same bits in all processes."""
    numbers = [*model.parameters(), *penalty.state_dict().values()]
    first, *others = gather([tensor.detach().clone() for tensor in numbers])
    assert all(map(torch.equal, first, other) for other in others)
    for other in others:
        assert all(map(torch.equal, first, other))


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@distributed_test((2,), backends=["gloo"], seconds=200)
def test_trainer_of_transformers() -> None:
    """The same snapshot as one process with all texts has, and a checkpoint to go on from."""
    from accelerate.state import AcceleratorState, GradientState

    from rotate_ewc.integrations.transformers import RotatedEWCCallback
    from tests.helpers.hf_training import task, tiny_gpt2, trainer

    options: dict[str, Any] = {
        "max_steps": 6, "per_device_train_batch_size": 2, "ddp_backend": "gloo",
        "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip

    def learn(model: Any, callback: Any, name: str, seed: int, resume: Any = None) -> None:
        again = {"resume_from_checkpoint": resume}
        run = trainer(folder / name, model, [callback], task(seed, 14), **options, **again)
        run.train(resume_from_checkpoint=resume)

    with launched() as folder:
        penalty = EKFACPenalty(fisher_type="type2")
        model = tiny_gpt2()
        callback = RotatedEWCCallback(penalty)
        learn(model, callback, "first", 1)
        same_everywhere(model, penalty)
        (term,) = penalty.terms
        # Every text once: 14 are no multiple of two batches of two.
        assert term.operator.provenance.num_data == 14
        alone = EKFACPenalty(fisher_type="type2")
        alone.consolidate(model, data=_batches(task(1, 14)), group=None)
        expected = alone.terms[0].operator
        found, wanted = term.operator.to_dense(), expected.to_dense()
        assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())

        before = penalty.state_dict()
        learn(model, callback, "second", 2)
        same_everywhere(model, penalty)
        assert penalty.num_tasks == 2

        # From the middle, by processes that know the first task from the checkpoint alone.
        resumed, again = EKFACPenalty(fisher_type="type2"), tiny_gpt2()
        resumed.load_state_dict(before)
        checkpoint = str(folder / "second" / "checkpoint-3")
        learn(again, RotatedEWCCallback(resumed), "resumed", 2, checkpoint)
        same_everywhere(again, resumed)
        assert differences(dict(again.named_parameters()), dict(model.named_parameters())) == 0.0
        assert resumed.strength == penalty.strength
        for state in (AcceleratorState, GradientState):
            state._reset_state()


def _batches(texts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{key: torch.stack([text[key] for text in texts]) for key in texts[0]}]


@distributed_test((2,), backends=["gloo"], seconds=200)
def test_trainer_of_lightning() -> None:
    """The same snapshot as one process with all examples has; weights that stay the same."""
    import lightning
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset

    from rotate_ewc.integrations.lightning import RotatedEWCCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.net(x)
            return found

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.05)

    def data(seed: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(24, 4, generator=generator, dtype=torch.float64)
        return DataLoader(TensorDataset(x, x[:, :3].argmax(dim=1)), batch_size=4)

    def learn(module: Any, penalty: Any, seed: int, name: str, resume: str | None = None) -> None:
        callback = RotatedEWCCallback(penalty, nn.CrossEntropyLoss())
        saver = ModelCheckpoint(folder / name, save_top_k=-1, every_n_epochs=1)
        lightning.Trainer(
            max_epochs=3, accelerator="cpu", devices=2, strategy="ddp", logger=False,
            plugins=[TorchElasticEnvironment()], callbacks=[callback, saver],
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            default_root_dir=str(folder),
        ).fit(module, data(seed), ckpt_path=resume)  # fmt: skip

    with launched() as folder:
        module, penalty = Module(), exact_penalty("auto", fisher_type="type2")
        learn(module, penalty, 1, "first")
        same_everywhere(module, penalty)
        provenance = penalty.terms[0].operator.provenance
        assert provenance.num_data == 24
        alone = exact_penalty(fisher_type="type2")
        alone.consolidate(module, nn.CrossEntropyLoss(), data(1), group=None)
        found = penalty.terms[0].operator.to_dense()
        assert torch.allclose(found, alone.terms[0].operator.to_dense(), rtol=1e-9, atol=1e-12)

        before, start = penalty.state_dict(), module.state_dict()
        start = {name: value.clone() for name, value in start.items()}
        learn(module, penalty, 2, "second")
        same_everywhere(module, penalty)
        assert penalty.num_tasks == 2
        assert penalty.current_num_data == 24

        resumed, again = exact_penalty("auto", fisher_type="type2"), Module()
        resumed.load_state_dict(before)
        checkpoint = next((folder / "second").glob("epoch=0-*.ckpt"))
        learn(again, resumed, 2, "resumed", str(checkpoint))
        same_everywhere(again, resumed)
        assert differences(dict(again.named_parameters()), dict(module.named_parameters())) == 0.0
