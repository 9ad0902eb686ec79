"""Tiny random models of transformers with batches for them; nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY, LENGTH, EXAMPLES = 7, 5, 4
Batch = dict[str, Tensor]


def bert_config(**options: Any) -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=6,
        max_position_embeddings=8,
        hidden_dropout_prob=0.1,
        **options,
    )


def gpt2_config(**options: Any) -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=8,
        n_embd=4,
        n_layer=1,
        n_head=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        **options,
    )


def llama_config(**options: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        **options,
    )


def t5_config() -> T5Config:
    return T5Config(
        vocab_size=VOCABULARY,
        d_model=4,
        d_kv=2,
        d_ff=6,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )


# Of networks that see four patches of an image.
PATCHES: dict[str, Any] = {
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 6,
    "image_size": 4,
    "patch_size": 2,
    "num_channels": 1,
    "num_labels": 3,
}


def vit_config() -> ViTConfig:
    return ViTConfig(**PATCHES)


def beit_config() -> BeitConfig:
    """It keeps the positions of pixels, from which biases are looked up, in a cache."""
    return BeitConfig(**PATCHES, use_relative_position_bias=True)


def swin_config() -> SwinConfig:
    """Two windows a side, which the second layer shifts."""
    return SwinConfig(
        image_size=4,
        patch_size=1,
        num_channels=1,
        embed_dim=4,
        depths=[2],
        num_heads=[1],
        window_size=2,
        mlp_ratio=1.5,
        num_labels=3,
    )


def texts(seed: int = 0, examples: int = EXAMPLES) -> Batch:
    """Tokens, of which the last ones of some texts are padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCABULARY, (examples, LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, -2:] = mask[2, -1:] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


def with_labels(batch: Batch, labels: Any) -> Batch:
    return {**batch, "labels": torch.as_tensor(labels)}


def language(seed: int = 0, examples: int = EXAMPLES) -> Batch:
    """Every token that is no padding is to be predicted."""
    batch = texts(seed, examples)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return with_labels(batch, labels)


def masked(seed: int = 0) -> Batch:
    """Some tokens are to be predicted; of one text none."""
    batch = texts(seed)
    hidden = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    hidden[0, 1] = hidden[0, 3] = hidden[1, 2] = hidden[3, 0] = True
    return with_labels(batch, batch["input_ids"].masked_fill(~hidden, -100))


def tagged(seed: int = 0) -> Batch:
    batch = texts(seed)
    labels = (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)
    return with_labels(batch, labels)


def spans(seed: int = 0) -> Batch:
    """The first token of one answer, and all of another, lie behind the end."""
    ends = {"start_positions": [0, 1, 2, 9], "end_positions": [2, 9, 3, 9]}
    return {**texts(seed), **{key: torch.tensor(value) for key, value in ends.items()}}


def translated(seed: int = 0) -> Batch:
    labels = texts(seed + 1)
    return with_labels(texts(seed), labels["input_ids"].masked_fill(labels["input_ids"] == 0, -100))


def pictures(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(EXAMPLES, 1, 4, 4, generator=generator, dtype=torch.float64)
    return with_labels({"pixel_values": pixels}, [0, 2, 1, 2])


def choices(seed: int = 0) -> Batch:
    batch = texts(seed, 8)
    pairs = {key: value.view(4, 2, LENGTH) for key, value in batch.items()}
    return with_labels(pairs, [0, 1, 1, 0])


def classified(problem: str | None, labels: Any, num_labels: int) -> tuple[Any, Any]:
    config = bert_config(num_labels=num_labels, problem_type=problem)
    return (lambda: BertForSequenceClassification(copy.deepcopy(config))), lambda: with_labels(
        texts(), labels
    )


ONE_HOT = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
NUMBERS = torch.tensor([0.3, -1.0, 2.0, 0.1])

CASES: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[], Batch]]] = {
    "gpt2": (lambda: GPT2LMHeadModel(gpt2_config()), language),
    "llama": (lambda: LlamaForCausalLM(llama_config()), language),
    "bert, masked tokens": (lambda: BertForMaskedLM(bert_config()), masked),
    "bert, one class": classified(None, [0, 2, 1, 2], 3),
    "bert, several classes": classified("multi_label_classification", ONE_HOT, 3),
    "bert, several classes, untold": classified(None, ONE_HOT, 3),
    "bert, regression": classified(None, NUMBERS, 1),
    "bert, regressions": classified("regression", ONE_HOT + 0.1, 3),
    "bert, tokens": (lambda: BertForTokenClassification(bert_config(num_labels=3)), tagged),
    "bert, answers": (lambda: BertForQuestionAnswering(bert_config()), spans),
    "bert, choices": (lambda: BertForMultipleChoice(bert_config()), choices),
    "gpt2, one class": (
        lambda: GPT2ForSequenceClassification(gpt2_config(num_labels=3)),
        lambda: with_labels(texts(), [0, 2, 1, 2]),
    ),
    "t5": (lambda: T5ForConditionalGeneration(t5_config()), translated),
    "vit": (lambda: ViTForImageClassification(vit_config()), pictures),
    "beit": (lambda: BeitForImageClassification(beit_config()), pictures),
    "swin, one head": (lambda: SwinForImageClassification(swin_config()), pictures),
}


def in_double_precision(model: nn.Module) -> None:
    """Put norms that compute in float64 in the place of those that always take float32."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ("LlamaRMSNorm", "T5LayerNorm"):
            norm = nn.RMSNorm(len(module.weight), module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)


def case(name: str) -> tuple[PreTrainedModel, Batch]:
    """A model in float64 with weights of a size that matters, and a batch for it."""
    make_model, make_batch = CASES[name]
    torch.manual_seed(0)
    model = make_model().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter).mul_(0.3))
    in_double_precision(model)
    batch = make_batch()
    doubled = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    return model, doubled
