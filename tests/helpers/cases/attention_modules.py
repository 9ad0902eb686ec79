"""Modules made of attention."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` with query, key and value from the same tokens."""

    def __init__(self, width: int, heads: int, mask: str = "none", **options: Any) -> None:
        """Make the layer.

        Args:
            width: Size of a token.
            heads: Number of heads.
            mask: ``"none"``, ``"causal"``, or ``"padding"``, which hides tokens by their values.
            **options: Of `nn.MultiheadAttention`.
        """
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, **options)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        """Attend, with the batch axis first or second as the layer has it."""
        masks: dict[str, Any] = {}
        if self.mask == "causal":
            length = x.shape[1] if self.attention.batch_first else x.shape[0]
            masks["attn_mask"] = torch.ones(length, length).triu(1).bool()
        if self.mask == "padding":
            hidden = x[..., 0] > 0.5
            hidden = hidden if self.attention.batch_first else hidden.T
            masks["key_padding_mask"] = hidden & (torch.arange(hidden.shape[1]) > 0)
        attended: Tensor = self.attention(x, x, x, need_weights=self.mask == "none", **masks)[0]
        return attended


class PlainAttention(nn.Module):
    """Self-attention written out with Linear modules; the batch axis comes first."""

    def __init__(self, of: nn.MultiheadAttention, causal: bool) -> None:
        """Take over the weights of a layer.

        Args:
            of: The layer.
            causal: Whether a token sees only itself and those before it.
        """
        super().__init__()
        width = of.embed_dim
        self.in_proj = nn.Linear(width, 3 * width).double()
        self.in_proj.weight, self.in_proj.bias = of.in_proj_weight, of.in_proj_bias
        self.out_proj = nn.Linear(width, width).double()
        self.out_proj.load_state_dict(of.out_proj.state_dict())
        self.heads, self.causal = of.num_heads, causal

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        rows, length, width = x.shape
        projected = self.in_proj(x).reshape(rows, length, 3, self.heads, -1)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        scores = query @ key.mT / math.sqrt(width // self.heads)
        if self.causal:
            scores = scores + torch.full((length, length), -math.inf).triu(1)
        attended = scores.softmax(dim=-1) @ value
        return self.out_proj(attended.transpose(1, 2).reshape(rows, length, width))


def with_plain_attention(model: nn.Module) -> nn.Module:
    """Write the self-attention of a Sequential's second module out."""
    first, middle, *last = model.children()
    own = middle if isinstance(middle, SelfAttention) else next(middle.children())
    assert isinstance(own, SelfAttention)
    plain: nn.Module = PlainAttention(own.attention, own.mask == "causal")
    if not own.attention.batch_first:
        plain = nn.Sequential(plain)
    return nn.Sequential(first, plain, *last)


class BatchSecond(nn.Module):
    """Run a module on ``[T, N, d]``, with the batch axis second."""

    def __init__(self, inner: nn.Module) -> None:
        """Keep the module."""
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Swap the first two axes, and back."""
        swapped: Tensor = self.inner(x.transpose(0, 1)).transpose(0, 1)
        return swapped


class Windows(nn.Module):
    """Run a module on windows ``[N * windows, T, d]`` of a longer sequence."""

    def __init__(self, inner: nn.Module) -> None:
        """Keep the module."""
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Merge the windows into the batch axis, and back."""
        windows: Tensor = self.inner(x.flatten(0, 1))
        return windows.unflatten(0, x.shape[:2])


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention` whose query, key and value differ."""

    def __init__(self, kind: str, batch_first: bool = True) -> None:
        """Make the layers.

        Args:
            kind: ``"memory"`` (key and value are the same tokens), ``"three"`` (all differ) or
                ``"sizes"`` (all differ, also in size).
            batch_first: As in `nn.MultiheadAttention`.
        """
        super().__init__()
        sizes = {"kdim": 3, "vdim": 2} if kind == "sizes" else {}
        self.query, self.key = nn.Linear(3, 4), nn.Linear(3, sizes.get("kdim", 4))
        self.value = nn.Linear(3, sizes.get("vdim", 4)) if kind != "memory" else None
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from the last two tokens to the others: ``[N, 2, 4]``."""
        x = x if self.attention.batch_first else x.transpose(0, 1)
        split = [x.shape[1] - 2, 2] if self.attention.batch_first else [x.shape[0] - 2, 2]
        rest, last = x.split(split, dim=1 if self.attention.batch_first else 0)
        key = torch.tanh(self.key(rest))
        value = key if self.value is None else torch.tanh(self.value(rest))
        attended: Tensor = self.attention(self.query(last), key, value, need_weights=False)[0]
        return attended if self.attention.batch_first else attended.transpose(0, 1)


class Decoder(nn.Module):
    """A `nn.TransformerDecoderLayer` from some tokens to the others."""

    def __init__(self, **options: Any) -> None:
        """Make the layers."""
        super().__init__()
        self.memory = nn.Linear(4, 4)
        self.layer = nn.TransformerDecoderLayer(4, 2, 3, dropout=0.1, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Decode the last two tokens."""
        memory, target = torch.tanh(self.memory(x[:, :-2])), x[:, -2:]
        if self.layer.self_attn.batch_first:
            mask = nn.Transformer.generate_square_subsequent_mask(2, dtype=x.dtype)
            decoded: Tensor = self.layer(target, memory, tgt_mask=mask)
            return decoded
        return self.layer(target.transpose(0, 1), memory.transpose(0, 1)).transpose(0, 1)


class GPT(nn.Module):
    """Token and position embeddings, a causal block, and a head tied to the token embedding."""

    def __init__(self, tokens: int, length: int, width: int, positions: str) -> None:
        """Make the layers.

        Args:
            tokens: Size of the vocabulary.
            length: Number of positions.
            width: Size of a token.
            positions: How positions are looked up: ``"functional"``, ``"module"``, ``"row"`` (with
                a leading axis of one) or ``"expanded"`` (once for each example).
        """
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.positions = nn.Embedding(length, width)
        self.how = positions
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 5), nn.Linear(5, width)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.tokens.weight

    def look_up(self, x: Tensor) -> Tensor:
        """Return the embedding of every position."""
        positions = torch.arange(x.shape[1])
        if self.how == "functional":
            return F.embedding(positions, self.positions.weight)
        positions = positions[None] if self.how == "row" else positions
        positions = positions.expand(x.shape) if self.how == "expanded" else positions
        embedded: Tensor = self.positions(positions)
        return embedded

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[N, C, T]``."""
        h = self.tokens(x) + self.look_up(x)
        query, key, value = self.qkv(self.norm1(h)).unflatten(-1, (3, 2, -1)).unbind(-3)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
        )
        h = h + self.out(attended.transpose(1, 2).flatten(-2))
        h = h + self.down(F.gelu(self.up(self.norm2(h))))
        logits: Tensor = self.head(h)
        return logits.transpose(1, 2)


class ViT(nn.Module):
    """Patches by a convolution, learned positions, an encoder layer, and mean pooling."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.patches = nn.Conv2d(2, 4, 2, stride=2)
        self.position = nn.Parameter(0.5 * torch.randn(1, 4, 4))
        self.encoder = nn.TransformerEncoderLayer(
            4, 2, 3, batch_first=True, norm_first=True, activation="gelu"
        )
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return class logits."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        pooled = self.norm(self.encoder(tokens).mean(dim=1))
        logits: Tensor = self.head(pooled)
        return logits


class Seq2Seq(nn.Module):
    """One table for the tokens of the encoder, of the decoder, and for the output layer."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.table = nn.Embedding(4, 4)
        self.layers = nn.Transformer(4, 2, 1, 1, 3, batch_first=True)
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[N, C, T]`` of the last two tokens, given the first two."""
        source, target = self.table(x[:, :2]), self.table(x[:, 2:])
        mask = nn.Transformer.generate_square_subsequent_mask(2, dtype=source.dtype)
        decoded = self.layers(source, target, tgt_mask=mask)
        return F.linear(decoded, self.table.weight, self.bias).transpose(1, 2)


class Encoder(nn.Module):
    """Two encoder layers with a mask of padding, and token types that are all zero."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.tokens = nn.Embedding(5, 4, padding_idx=0)
        self.types = nn.Embedding(2, 4)
        self.register_buffer("zeros", torch.zeros(1, 4, dtype=torch.long))
        layer = nn.TransformerEncoderLayer(4, 1, 3, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(4), enable_nested_tensor=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Classify by the first token."""
        types = self.types(self.zeros[:, : x.shape[1]].expand(x.shape))
        padding = (x == 0) & (torch.arange(x.shape[1]) > 0)
        encoded = self.layers(self.tokens(x) + types, src_key_padding_mask=padding)
        logits: Tensor = self.head(encoded[:, 0])
        return logits
