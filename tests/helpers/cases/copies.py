"""Parameters that are concatenated with data, looked up, or written into them."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.cases.attention_modules import SelfAttention
from tests.helpers.cases.case import Case, derived, diagonal
from tests.helpers.cases.modules import (
    ChannelsFirst,
    MeanOver,
    SwapFirst,
    applied,
    linear,
    sequential,
    using,
)
from tests.helpers.cases.token_models import (
    ActorCritic,
    BiasedAttention,
    ContinuousBias,
    GPT2Block,
    LearnedQueries,
    MaskedAutoencoder,
    MaskedWeight,
    PlainIds,
    VisionTransformer,
    WindowAttention,
)
from tests.helpers.oracles import BlockLayout


def addmms(*names: str) -> tuple[BlockLayout, ...]:
    """Return the layouts of layers of GPT-2."""
    return tuple(BlockLayout((f"{n}.w", f"{n}.b"), transposed=True) for n in names)


def with_token_in_place(m: Any, x: Tensor) -> Tensor:
    """Write a token over the first one."""
    x = x.clone()
    x[:, 0] = m.token
    return x


GPT2 = ("0.c_attn", "0.c_proj", "0.c_fc", "0.c_out")

COPIES: tuple[Case, ...] = (
    Case(
        "vision-transformer",
        VisionTransformer,
        (3, 3),
        shared=True,
        layouts=derived("cls", "registers", "positions"),
    ),
    Case(
        "vision-transformer-by-einops",
        lambda: VisionTransformer(by_einops=True),
        (3, 3),
        shared=True,
        layouts=derived("cls", "registers", "positions"),
    ),
    Case(
        "swin-window-attention",
        WindowAttention,
        (4, 4, 4),
        shared=True,
        layouts=derived("table"),
    ),
    Case(
        "continuous-position-bias",
        sequential(ContinuousBias, nn.Tanh, linear(4, 3), ChannelsFirst),
        (3, 4),
        (3, 3),
        shared=True,
        layouts=derived(*(f"0.network.{i}.{p}" for i in (0, 2) for p in ("weight", "bias"))),
    ),
    Case(
        "t5-attention",
        sequential(BiasedAttention, linear(4, 3), ChannelsFirst),
        (3, 4),
        (3, 3),
        shared=True,
        layouts=derived("0.relative_attention_bias.weight"),
    ),
    Case(
        "t5-attention-fused",
        sequential(lambda: BiasedAttention(fused=True), linear(4, 3), ChannelsFirst),
        (3, 4),
        (3, 3),
        shared=True,
        layouts=derived("0.relative_attention_bias.weight"),
    ),
    Case(
        "gpt2-block",
        sequential(GPT2Block, linear(4, 3), ChannelsFirst),
        (3, 4),
        (3, 3),
        shared=True,
        layouts=addmms(*GPT2),
    ),
    Case(
        "gpt2-block-frozen-biases",
        sequential(GPT2Block, linear(4, 3), ChannelsFirst),
        (3, 4),
        (3, 3),
        shared=True,
        frozen=tuple(f"{name}.b" for name in GPT2),
        layouts=tuple(BlockLayout((f"{name}.w",), transposed=True) for name in GPT2),
    ),
    Case(
        "gpt2-block-frozen-weights",
        sequential(GPT2Block, linear(4, 3), ChannelsFirst),
        (3, 4),
        (3, 3),
        shared=True,
        frozen=tuple(f"{name}.w" for name in GPT2),
        layouts=tuple(BlockLayout((f"{name}.b",), kind="bias") for name in GPT2),
    ),
    Case("actor-critic", ActorCritic, (4,), (5,), layouts=derived("log_std")),
    Case(
        "masked-autoencoder",
        MaskedAutoencoder,
        (4, 3),
        (3, 4),
        shared=True,
        layouts=derived("mask_token"),
    ),
    Case(
        "learned-queries",
        sequential(LearnedQueries, linear(8, 3)),
        (3, 4),
        shared=True,
        layouts=derived("0.queries", "0.cross.in_proj_weight", "0.cross.in_proj_bias"),
    ),
    Case(
        "plain-ids",
        PlainIds,
        (3, 4),
        (3, 3),
        shared=True,
        layouts=derived("positions.weight", "roles.weight"),
    ),
    Case("plain-mask", MaskedWeight, (4,), layouts=derived("weight")),
    Case(
        "class-token-time-first",
        sequential(
            SwapFirst,
            using(lambda m, x: torch.cat([m.token.expand(1, x.shape[1], 4), x]), token=(1, 1, 4)),
            linear(4, 4),
            nn.Tanh,
            lambda: MeanOver(0),
            linear(4, 3),
        ),
        (2, 4),
        shared=True,
        layouts=derived("1.token"),
    ),
    Case(
        "token-written-into-data",
        sequential(using(with_token_in_place, token=(4,)), linear(4, 3), nn.Tanh, ChannelsFirst),
        (2, 4),
        (3, 2),
        shared=True,
        layouts=diagonal("0.token"),
    ),
    Case(
        "mask-token",
        sequential(
            using(
                lambda m, x: torch.where(x[..., :1] > 0, m.token, x.tanh() @ m.w),
                token=(1, 1, 4),
                w=(4, 4),
            ),
            linear(4, 3),
            nn.Tanh,
            ChannelsFirst,
        ),
        (2, 4),
        (3, 2),
        shared=True,
        layouts=(BlockLayout(("0.w",), transposed=True), *diagonal("0.token")),
    ),
    Case(
        "table-indexed-by-data",
        sequential(
            using(lambda m, x: m.table[x], table=(5, 4)),
            nn.Tanh,
            lambda: MeanOver(1),
            linear(4, 3),
        ),
        (3,),
        vocabulary=5,
        shared=True,
        layouts=(BlockLayout(("0.table",), transposed=True, kind="lookup"),),
    ),
    Case(
        "table-of-matrices-indexed-by-data",
        sequential(
            using(lambda m, x: m.table.index_select(0, x[:, 0]), table=(5, 2, 4)),
            nn.Tanh,
            nn.Flatten,
            linear(8, 3),
        ),
        (1,),
        vocabulary=5,
        layouts=(BlockLayout(("0.table",), transposed=True, kind="lookup"),),
    ),
    Case(
        "columns-indexed-by-data",
        sequential(
            using(lambda m, x: m.table[:, x] + m.table[0, x], table=(2, 5)),
            nn.Tanh,
            applied(lambda x: x.sum(0)),
            linear(3, 3),
        ),
        (3,),
        vocabulary=5,
        shared=True,
        layouts=derived("0.table"),
    ),
    Case(
        "attention-with-learned-key",
        sequential(
            linear(3, 4),
            lambda: SelfAttention(4, 2, batch_first=True, add_bias_kv=True),
            nn.Flatten,
            linear(8, 3),
        ),
        (2, 3),
        shared=True,
        layouts=derived("1.attention.bias_k", "1.attention.bias_v"),
    ),
)
