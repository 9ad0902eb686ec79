"""`Trainer` with a tiny language model, and the texts of two tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from rotate_ewc import EKFACPenalty
from tests.helpers import hf_models
from tests.helpers.exact import exact_penalty


def task(seed: int, examples: int = 12) -> list[dict[str, Tensor]]:
    """Texts with labels, one by one as `Trainer` takes them."""
    batch = hf_models.language(seed, examples)
    return [{key: value[i] for key, value in batch.items()} for i in range(examples)]


def tiny_gpt2(seed: int = 0, **options: Any) -> GPT2LMHeadModel:
    """One without dropout, unless it is told otherwise."""
    torch.manual_seed(seed)
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **options}
    model = GPT2LMHeadModel(hf_models.gpt2_config(**rates))
    # Or else `Trainer` takes the first token, of which nothing is asked, into its mean loss.
    model.loss_type = "ForCausalLM"
    return model


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    chosen = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
        **options,
    }
    return TrainingArguments(str(folder), **chosen)


def trainer(
    folder: Path,
    model: Any,
    callbacks: list[TrainerCallback],
    data: Any = None,
    **options: Any,
) -> Trainer:
    return Trainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=task(1) if data is None else data,
        eval_dataset=task(7, 4),
        callbacks=callbacks,
    )


def penalty_of_a_task(model: Any, strength: Any = 5.0, **options: Any) -> EKFACPenalty:
    """One that has consolidated another task at weights a little away from the model's own."""
    penalty = exact_penalty(strength, **options)
    batch = hf_models.language(5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)
    penalty.consolidate(model, data=[batch])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    return penalty
