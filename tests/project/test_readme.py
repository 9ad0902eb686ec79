"""The code of the README and of "Start" runs as it stands there, one block after another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from rotate_ewc import EKFACPenalty

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "docs/start/migrating.md",
    "docs/start/quickstart.md",
    "docs/start/updates.md",
    "docs/reference/index.md",
)


def blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def small_stream(n_experiences: int) -> Any:
    """Noise in the place of MNIST, which the code would download."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import as_classification_dataset

    tasks = []
    for _ in range(min(n_experiences, 2)):
        data = TensorDataset(torch.randn(20, 1, 28, 28), torch.arange(20) % 10)
        data.targets = data.tensors[1].tolist()
        tasks.append(as_classification_dataset(data))
    return benchmark_from_datasets(train=tasks, test=tasks)


def language_model(folder: Path) -> dict[str, Any]:
    """What the code for `Trainer` takes as given."""
    from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

    config = GPT2Config(
        vocab_size=16, n_positions=4, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0
    )
    args = TrainingArguments(
        str(folder / "trainer"), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    first, second = ([{"input_ids": t, "labels": t} for t in torch.randint(16, (8, 4))],) * 2
    return {"model": GPT2LMHeadModel(config), "args": args, "first": first, "second": second}


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import avalanche.benchmarks.classic

    monkeypatch.setattr(avalanche.benchmarks.classic, "SplitMNIST", small_stream)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    assert blocks(page)
    for block in blocks(page):
        # People copy one block of the README, and read the other pages from the top.
        own: dict[str, Any] = {} if page == "README.md" else namespace
        if "import Trainer" in block:
            own |= language_model(tmp_path)
        exec(compile(block, page, "exec"), own)
        namespace |= own
    if page == "README.md":
        assert (tmp_path / "penalty.safetensors").exists()
        assert EKFACPenalty.load("penalty.safetensors").num_tasks == 3
        assert namespace["plugin"].penalty.num_tasks == 2
        assert namespace["callback"].penalty.num_tasks == 2
    if page.endswith("quickstart.md"):
        assert min(map(namespace["accuracy"], namespace["tasks"])) > 0.9


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / link).exists(), link
