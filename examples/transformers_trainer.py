"""Teach a language model one language after another with `Trainer`, and without forgetting.

The model is a tiny GPT-2 with random weights, and the languages are made up, so that nothing is
downloaded. With a model of your own, only `model` and the data sets change.
"""
# ruff: noqa: T201

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from rotate_ewc import EKFACPenalty
from rotate_ewc.integrations.transformers import RotatedEWCCallback

WORDS, LENGTH = 16, 12


def texts(seed: int, first: int) -> list[dict[str, torch.Tensor]]:
    """Return texts of a language: after each of its words, one of two others follows."""
    generator = torch.Generator().manual_seed(seed)
    follows = torch.stack([torch.randperm(8, generator=generator) for _ in range(2)], dim=1)
    words = torch.randint(8, (256,), generator=generator)
    columns = [words]
    for _ in range(LENGTH - 1):
        words = follows[words, torch.randint(2, (256,), generator=generator)]
        columns.append(words)
    # Labels are the tokens themselves; transformers shifts them.
    return [{"input_ids": text, "labels": text} for text in torch.stack(columns, 1) + first]


def learn(
    model: GPT2LMHeadModel,
    data: list[dict[str, torch.Tensor]],
    callbacks: list[RotatedEWCCallback],
) -> None:
    """Fine-tune as ever."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, num_train_epochs=8, learning_rate=3e-3, per_device_train_batch_size=32,
            lr_scheduler_type="constant", report_to="none", disable_tqdm=True, use_cpu=True,
            save_strategy="no", logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model, args, train_dataset=data, callbacks=callbacks).train()


@torch.no_grad()
def loss(model: GPT2LMHeadModel, data: list[dict[str, torch.Tensor]]) -> str:
    """Return the mean loss of a word."""
    tokens = torch.stack([text["input_ids"] for text in data])
    return f"{float(model.eval()(tokens, labels=tokens).loss):5.2f}"


first, second = texts(1, 0), texts(2, 8)
for name in ("with the penalty", "without it"):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    penalty = EKFACPenalty()
    callbacks = [RotatedEWCCallback(penalty)] if name == "with the penalty" else []
    learn(model, first, callbacks)  # remembered at the end
    learned = loss(model, first)
    learn(model, second, callbacks)
    print(f"{name:17} first {learned}, then {loss(model, first)}   second {loss(model, second)}")
