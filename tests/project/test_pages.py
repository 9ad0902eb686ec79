"""The code of the pages on files and frameworks runs, with small models and data in its places."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rotate_ewc import EKFACLinearOperator, EKFACPenalty

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RUN_BY = (
    "tests/losses/test_document.py",
    "tests/project/test_pages.py",
    "tests/project/test_readme.py",
)
CRITERION = nn.CrossEntropyLoss()


def run(page: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Run the blocks of a page, one after another."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    return namespace


def examples() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def test_snapshots() -> None:
    model, data = nn.Linear(4, 3), examples()
    fisher = EKFACLinearOperator(model, CRITERION, list(model.parameters()), data)
    penalty = EKFACPenalty()
    penalty.consolidate(model, CRITERION, data)
    names = {"EKFACLinearOperator": EKFACLinearOperator, "EKFACPenalty": EKFACPenalty}
    assert run("snapshots.md", {**names, "fisher": fisher, "penalty": penalty})["fisher"]


def test_every_page_with_code_is_run() -> None:
    """By the tests that name it."""
    tests = "".join((ROOT / name).read_text(encoding="utf-8") for name in RUN_BY)
    pages = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]
    with_code = [page for page in pages if "```python" in page.read_text(encoding="utf-8")]
    assert len(with_code) > 8
    for page in with_code:
        names = f'"{page.relative_to(ROOT)}"', f'"{page.name}"'
        assert any(name in tests for name in names), page


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_distributed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a group of this process alone."""
    start = dist.init_process_group
    address = f"file://{tmp_path / 'group'}"
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda backend: start("gloo", init_method=address, rank=0, world_size=1),
    )
    model = nn.Linear(4, 3)
    given = {
        "model": model,
        "criterion": CRITERION,
        "optimizer": torch.optim.Adam(model.parameters()),
        "task": TensorDataset(*examples()[0]),
    }
    try:
        found = run("distributed.md", given)
    finally:
        dist.destroy_process_group()
    assert found["penalty"].num_tasks == 1


@pytest.fixture
def restored() -> Iterator[None]:
    """Settings of dill, which the page changes."""
    import dill

    before = dict(dill.settings)
    yield
    dill.settings.clear()
    dill.settings.update(before)


@pytest.mark.slow
@pytest.mark.usefixtures("restored")
@pytest.mark.filterwarnings("ignore::dill.PicklingWarning")
def test_avalanche(tmp_path: Path) -> None:
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import as_classification_dataset

    tasks = []
    for x, y in examples():
        data = TensorDataset(x, y)
        data.targets = y.tolist()
        tasks.append(as_classification_dataset(data))
    model = nn.Linear(4, 3)
    found = run(
        "avalanche.md",
        {
            "model": model,
            "optimizer": torch.optim.Adam(model.parameters()),
            "criterion": CRITERION,
            "benchmark": benchmark_from_datasets(train=tasks, test=tasks),
            "path": tmp_path / "checkpoint.dill",
        },
    )
    assert found["strategy"].rotated_ewc.penalty.num_tasks == 2


@pytest.mark.slow
def test_transformers(tmp_path: Path) -> None:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        MixtralConfig,
        MixtralForCausalLM,
        TrainingArguments,
    )

    config = BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    args = TrainingArguments(
        str(tmp_path / "trainer"), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    texts = [{"input_ids": t, "labels": torch.tensor(0)} for t in torch.randint(16, (8, 4))]
    model = BertForSequenceClassification(config)
    experts = MixtralConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    tokens = torch.randint(16, (4, 6))
    given = {
        "torch": torch,
        "model": model,
        "loader": DataLoader(texts, 4),
        "args": args,
        "mixture": MixtralForCausalLM(experts),
        "texts": [{"input_ids": tokens, "labels": tokens}],
    }
    found = run("transformers.md", {**given, "first": texts, "second": texts})
    assert found["penalty"].num_tasks == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft() -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from rotate_ewc.integrations.transformers import RotatedEWCCallback

    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    tokens = torch.randint(16, (4, 6))
    found = run(
        "peft.md",
        {
            "torch": torch,
            "base": LlamaForCausalLM(config),
            "LoraConfig": LoraConfig,
            "PromptTuningConfig": PromptTuningConfig,
            "v": 2,
            "get_peft_model": lambda model, lora: get_peft_model(copy.deepcopy(model), lora),
            "penalty": EKFACPenalty(),
            "RotatedEWCCallback": RotatedEWCCallback,
            "task": [{"input_ids": tokens, "labels": tokens}],
            "old_task": [{"input_ids": tokens, "labels": tokens}],
        },
    )
    assert found["penalty"].num_tasks == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning() -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return CRITERION(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    loaders = [DataLoader(TensorDataset(x, y), 4) for x, y in examples()]
    found = run("lightning.md", {"module": Module(), "first": loaders[0], "second": loaders[1]})
    assert found["penalty"].num_tasks == 2
