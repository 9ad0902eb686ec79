"""Lightning's `Trainer` for tests: on the CPU, silent, and without files but those asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint


def trainer(folder: Path, *callbacks: Any, **options: Any) -> lightning.Trainer:
    chosen = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "default_root_dir": str(folder),
        "num_sanity_val_steps": 0,
        **options,
    }
    return lightning.Trainer(callbacks=list(callbacks), **chosen)
