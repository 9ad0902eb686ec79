"""Train LoRA adapters on a new task, and keep what the base model knows.

The model is a tiny GPT-2 with random weights, and the languages are made up, so that nothing is
downloaded.
"""
# ruff: noqa: T201

import copy

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from rotate_ewc import EKFACPenalty
from rotate_ewc.integrations.peft import effective_parameters

Batches = list[dict[str, torch.Tensor]]


def texts(seed: int, first: int) -> Batches:
    """Return batches of a language: after each of its words, one of two others follows."""
    generator = torch.Generator().manual_seed(seed)
    follows = torch.stack([torch.randperm(8, generator=generator) for _ in range(2)], dim=1)
    words = torch.randint(8, (256,), generator=generator)
    columns = [words]
    for _ in range(11):
        words = follows[words, torch.randint(2, (256,), generator=generator)]
        columns.append(words)
    parts = (torch.stack(columns, dim=1) + first).split(32)
    return [{"input_ids": part, "labels": part} for part in parts]


def train(model: torch.nn.Module, data: Batches, penalty: EKFACPenalty | None = None) -> None:
    """Train whatever requires gradients, with a penalty on the weights that result from it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.0)
    if penalty is not None:
        penalty.attach(optimizer, model, "gradient", view=effective_parameters)
    for batch in (batch for _ in range(8) for batch in data):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@torch.no_grad()
def loss(model: torch.nn.Module, data: Batches) -> str:
    """Return the mean loss of a word."""
    return f"{sum(float(model(**batch).loss) for batch in data) / len(data):5.2f}"


torch.manual_seed(0)
first, second = texts(1, 0), texts(2, 8)
config = GPT2Config(
    vocab_size=16, n_positions=12, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
)
base = GPT2LMHeadModel(config).eval()
train(base, first)

# Only the weights that adapters will change; before they are added.
penalty = EKFACPenalty(include=["*.c_attn.weight", "*.c_fc.weight"])
penalty.consolidate(base, data=first)
print(f"the base model         first {loss(base, first)}   second {loss(base, second)}")

for name, used in (("adapters", None), ("with the penalty", penalty)):
    lora = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = get_peft_model(copy.deepcopy(base), lora).eval()
    train(model, second, used)
    print(f"{name:21}  first {loss(model, first)}   second {loss(model, second)}")

merged = model.merge_and_unload()  # the names, and so the penalty, are those of the base model
print(f"penalty after merging: {float(penalty(merged)):.3g}")
