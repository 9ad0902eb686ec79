"""Attention and the models that are built from it."""

from torch import nn

from tests.helpers.cases.attention_modules import (
    GPT,
    BatchSecond,
    CrossAttention,
    Decoder,
    Encoder,
    SelfAttention,
    Seq2Seq,
    ViT,
    Windows,
    with_plain_attention,
)
from tests.helpers.cases.case import Case, derived, diagonal, layouts_of
from tests.helpers.cases.modules import ChannelsFirst, MeanOver, later, linear, sequential, shaken

SELF_ATTENTION_NAMES = (
    ("1.attention.in_proj_weight", "1.in_proj.weight"),
    ("1.attention.in_proj_bias", "1.in_proj.bias"),
    ("1.attention.out_proj.weight", "1.out_proj.weight"),
    ("1.attention.out_proj.bias", "1.out_proj.bias"),
)

ATTENTION: tuple[Case, ...] = (
    Case(
        "attention-batch-first",
        sequential(
            linear(3, 4),
            lambda: SelfAttention(4, 2, batch_first=True),
            nn.Tanh,
            lambda: MeanOver(1),
            linear(4, 3),
        ),
        (3, 3),
        shared=True,
        reference=with_plain_attention,
        renamed=SELF_ATTENTION_NAMES,
    ),
    Case(
        "attention-causal-token-outputs",
        sequential(
            linear(3, 4),
            lambda: SelfAttention(4, 2, mask="causal", batch_first=True),
            linear(4, 2),
            ChannelsFirst,
        ),
        (3, 3),
        (2, 3),
        shared=True,
        reference=with_plain_attention,
        renamed=SELF_ATTENTION_NAMES,
    ),
    Case(
        "attention-batch-second",
        sequential(
            linear(3, 4),
            lambda: BatchSecond(SelfAttention(4, 1)),
            nn.Tanh,
            lambda: MeanOver(1),
            linear(4, 3),
        ),
        (2, 3),
        shared=True,
        reference=with_plain_attention,
        renamed=tuple(
            (name.replace("1.", "1.inner.", 1), other.replace("1.", "1.0.", 1))
            for name, other in SELF_ATTENTION_NAMES
        ),
    ),
    Case(
        "attention-batch-second-padding",
        sequential(
            lambda: BatchSecond(SelfAttention(4, 2, mask="padding")),
            lambda: MeanOver(1),
            linear(4, 3),
        ),
        (3, 4),
        shared=True,
    ),
    Case(
        "attention-padding",
        sequential(
            lambda: SelfAttention(4, 2, mask="padding", batch_first=True), nn.Flatten, linear(12, 3)
        ),
        (3, 4),
        shared=True,
    ),
    Case(
        "attention-no-bias",
        sequential(
            linear(3, 4),
            lambda: SelfAttention(4, 2, bias=False, batch_first=True),
            lambda: MeanOver(1),
            linear(4, 3),
        ),
        (3, 3),
        shared=True,
    ),
    Case(
        "attention-windows",
        sequential(
            linear(3, 4),
            lambda: Windows(SelfAttention(4, 2, batch_first=True)),
            nn.Tanh,
            lambda: MeanOver(1, 2),
            linear(4, 3),
        ),
        (2, 3, 3),
        shared=True,
    ),
    Case(
        "attention-subset",
        sequential(
            linear(3, 4),
            lambda: SelfAttention(4, 2, batch_first=True),
            nn.Tanh,
            lambda: MeanOver(1),
            linear(4, 3),
        ),
        (2, 3),
        shared=True,
        frozen=("1.attention.in_proj_weight", "0.bias"),
        left_out=("1.attention.out_proj.bias", "4.weight"),
    ),
    Case(
        "cross-attention-memory",
        sequential(lambda: CrossAttention("memory"), nn.Tanh, lambda: MeanOver(1), linear(4, 3)),
        (5, 3),
        shared=True,
        layouts=derived("0.attention.in_proj_weight", "0.attention.in_proj_bias"),
    ),
    Case(
        "cross-attention-three",
        sequential(lambda: CrossAttention("three"), nn.Tanh, lambda: MeanOver(1), linear(4, 3)),
        (5, 3),
        shared=True,
        layouts=derived("0.attention.in_proj_weight", "0.attention.in_proj_bias"),
    ),
    Case(
        "cross-attention-batch-second",
        sequential(
            lambda: CrossAttention("memory", batch_first=False),
            nn.Tanh,
            nn.Flatten,
            linear(8, 3),
        ),
        (4, 3),
        shared=True,
        layouts=derived("0.attention.in_proj_weight", "0.attention.in_proj_bias"),
    ),
    Case(
        "cross-attention-sizes",
        sequential(lambda: CrossAttention("sizes"), nn.Tanh, lambda: MeanOver(1), linear(4, 3)),
        (5, 3),
        shared=True,
        layouts=(
            *derived("0.attention.in_proj_bias"),
            *(
                layout
                for which in "qkv"
                for layout in layouts_of("layer", f"0.attention.{which}_proj_weight")
            ),
        ),
    ),
    *(
        Case(
            f"encoder-layer-{'norm-first' if norm_first else 'norm-last'}",
            shaken(
                sequential(
                    later(
                        nn.TransformerEncoderLayer,
                        *(4, 2, 3),
                        batch_first=True,
                        norm_first=norm_first,
                    ),
                    lambda: MeanOver(1),
                    linear(4, 3),
                )
            ),
            (3, 4),
            shared=True,
        )
        for norm_first in (False, True)
    ),
    Case(
        "encoder-layer-batch-second",
        shaken(
            sequential(
                lambda: BatchSecond(nn.TransformerEncoderLayer(4, 1, 3, activation="gelu")),
                linear(4, 2),
                ChannelsFirst,
            )
        ),
        (2, 4),
        (2, 2),
        shared=True,
    ),
    *(
        Case(
            f"decoder-layer-{'norm-first' if norm_first else 'norm-last'}",
            shaken(
                sequential(
                    lambda norm_first=norm_first: Decoder(
                        batch_first=not norm_first, norm_first=norm_first
                    ),
                    lambda: MeanOver(1),
                    linear(4, 3),
                )
            ),
            (4, 4),
            shared=True,
            layouts=derived(
                "0.layer.multihead_attn.in_proj_weight", "0.layer.multihead_attn.in_proj_bias"
            ),
        )
        for norm_first in (False, True)
    ),
    *(
        Case(
            f"gpt-{positions}-positions",
            shaken(lambda positions=positions: GPT(5, 3, 4, positions)),
            (3,),
            (5, 3),
            vocabulary=5,
            shared=True,
            layouts=layouts_of("tied", "tokens.weight")
            + layouts_of("lookup" if positions == "expanded" else "derived", "positions.weight"),
        )
        for positions in ("functional", "module", "row", "expanded")
    ),
    Case(
        "vit",
        shaken(ViT),
        (2, 4, 4),
        shared=True,
        layouts=diagonal("position"),
        batch_sizes=(4, 1, 2),
    ),
    Case(
        "encoder-subset",
        shaken(Encoder),
        (3,),
        vocabulary=5,
        shared=True,
        frozen=(
            "layers.layers.0.self_attn.in_proj_weight",
            "layers.layers.1.norm1.bias",
            "layers.layers.1.linear1.bias",
        ),
        left_out=("tokens.weight", "layers.norm.weight", "layers.layers.0.self_attn.out_proj.bias"),
    ),
    Case(
        "encoder-of-two-layers",
        shaken(Encoder),
        (3,),
        vocabulary=5,
        shared=True,
    ),
    Case(
        "seq2seq",
        shaken(Seq2Seq),
        (4,),
        (4, 2),
        vocabulary=4,
        shared=True,
        layouts=(
            *layouts_of("tied", "table.weight"),
            *layouts_of("bias", "bias"),
            *derived(
                "layers.decoder.layers.0.multihead_attn.in_proj_weight",
                "layers.decoder.layers.0.multihead_attn.in_proj_bias",
            ),
        ),
    ),
    Case(
        "cross-attention-biases",
        sequential(lambda: CrossAttention("three"), nn.Tanh, lambda: MeanOver(1), linear(4, 3)),
        (5, 3),
        shared=True,
        layouts=derived("0.attention.in_proj_bias"),
        left_out=(
            "0.attention.in_proj_weight",
            "0.attention.out_proj.weight",
            "0.query.weight",
            "3.weight",
        ),
    ),
)
