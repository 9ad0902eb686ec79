"""Tiny models in the shape of real ones, that put, look up or bias with parameters of their own."""

import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn import functional as F


class VisionTransformer(nn.Module):
    """A class token and registers before the patches, positions, one block; the class is read."""

    def __init__(self, *, by_einops: bool = False) -> None:
        """Make tokens and layers."""
        super().__init__()
        self.by_einops = by_einops
        self.cls = nn.Parameter(torch.randn(1, 1, 4))
        self.registers = nn.Parameter(torch.randn(1, 2, 4))
        self.positions = nn.Parameter(torch.randn(1, 6, 4))
        self.patches = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        n, patches = len(x), self.patches(x)
        if self.by_einops:
            cls, registers = (repeat(p, "1 t d -> b t d", b=n) for p in (self.cls, self.registers))
        else:
            cls, registers = self.cls.expand(n, -1, -1), self.registers.repeat(n, 1, 1)
        tokens = torch.cat([cls, registers, patches], dim=1)
        tokens = tokens + self.positions[:, : tokens.shape[1]]
        normed = self.norm(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        logits: Tensor = self.head(tokens[:, 0])
        return logits


class WindowAttention(nn.Module):
    """Swin: attention inside windows, with a bias looked up in a table by relative position."""

    relative_index: Tensor

    def __init__(self) -> None:
        """Make layers and the table."""
        super().__init__()
        self.window, self.heads = 2, 2
        self.table = nn.Parameter(torch.randn(3 * 3, self.heads))
        axes = torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")
        places = torch.stack(axes).flatten(1)
        offsets = (places[:, :, None] - places[:, None, :]).permute(1, 2, 0) + 1
        self.register_buffer("relative_index", offsets[..., 0] * 3 + offsets[..., 1])
        self.qkv, self.project = nn.Linear(4, 12), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Cut `[n, 4, 4, 4]` into four windows of four positions, attend, and average."""
        n = len(x)
        windows = x.view(n, 2, 2, 2, 2, 4).transpose(2, 3).reshape(-1, 4, 4)
        q, k, v = self.qkv(windows).view(-1, 4, 3, self.heads, 2).permute(2, 0, 3, 1, 4)
        bias = self.table[self.relative_index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        scores = q @ k.transpose(-2, -1) + bias.contiguous().unsqueeze(0)
        mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(-1, 4, 4)
        logits: Tensor = self.head(self.project(mixed).view(n, -1, 4).tanh().mean(dim=1))
        return logits


class BiasedAttention(nn.Module):
    """T5: attention with a bias looked up in an embedding by buckets of distances."""

    def __init__(self, *, fused: bool = False) -> None:
        """Make layers."""
        super().__init__()
        self.fused = fused
        self.q, self.k, self.v = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.relative_attention_bias = nn.Embedding(4, 2)

    def bias(self, length: int) -> Tensor:
        """Return the bias `[1, heads, length, length]`."""
        distances = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        buckets = (distances < 0).to(torch.long) * 2 + torch.clamp(distances.abs(), max=1)
        return self.relative_attention_bias(buckets).permute(2, 0, 1).unsqueeze(0)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        q, k, v = (
            layer(x).tanh().unflatten(-1, (2, 2)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(x.shape[1]))
        else:
            mixed = (q @ k.mT + self.bias(x.shape[1])).softmax(dim=-1) @ v
        return mixed.transpose(1, 2).flatten(2)


class ContinuousBias(nn.Module):
    """The second Swin: adds what a small network, with a ReLU in place, makes of places."""

    places: Tensor

    def __init__(self) -> None:
        """Make the network, and the places as a buffer."""
        super().__init__()
        self.register_buffer("places", torch.tensor([[-1.0, 0.5], [0.0, 1.0], [1.0, -0.7]]))
        self.network = nn.Sequential(nn.Linear(2, 5), nn.ReLU(inplace=True), nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Add."""
        shifted: Tensor = x + 2 * torch.sigmoid(self.network(self.places))
        return shifted


class Conv1D(nn.Module):
    """The linear layer of GPT-2, whose weight comes the other way round."""

    def __init__(self, d_out: int, d_in: int) -> None:
        """Make the parameters."""
        super().__init__()
        self.d_out = d_out
        self.w = nn.Parameter(0.5 * torch.randn(d_in, d_out))
        self.b = nn.Parameter(0.5 * torch.randn(d_out))

    def forward(self, x: Tensor) -> Tensor:
        """Apply."""
        shape = (*x.shape[:-1], self.d_out)
        return torch.addmm(self.b, x.view(-1, x.shape[-1]), self.w).view(shape)


class GPT2Block(nn.Module):
    """Causal attention and a perceptron."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(12, 4), Conv1D(4, 4)
        self.c_fc, self.c_out = Conv1D(5, 4), Conv1D(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        q, k, v = (
            part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.c_attn(x).split(4, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(mixed.transpose(1, 2).flatten(2).contiguous())
        hidden: Tensor = x + self.c_out(F.gelu(self.c_fc(x)))
        return hidden


class ActorCritic(nn.Module):
    """Means, standard deviations that do not depend on the state, and a value."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.body, self.mean, self.value = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 1)
        self.log_std = nn.Parameter(0.3 * torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return all in one."""
        hidden = self.body(x).tanh()
        mean = self.mean(hidden)
        return torch.cat([mean, self.log_std.expand_as(mean).exp(), self.value(hidden)], dim=-1)


class MaskedAutoencoder(nn.Module):
    """Keeps some tokens, and puts a mask token in the others' place, in an order of its own."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(4, 3)
        self.mask_token = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Mask those tokens that have the largest first feature."""
        order = x[..., 0].argsort(dim=1)
        kept = torch.gather(x, 1, order[:, :2, None].expand(-1, -1, 3))
        tokens = torch.cat([self.encoder(kept), self.mask_token.repeat(len(x), 2, 1)], dim=1)
        back = order.argsort(dim=1)[..., None].repeat(1, 1, 4)
        decoded: Tensor = self.decoder(torch.gather(tokens, 1, back).tanh())
        return decoded.transpose(1, 2)


class LearnedQueries(nn.Module):
    """Detection transformers: queries of their own attend to each other, then to the data."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2, 4))
        self.own = nn.MultiheadAttention(4, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        queries = self.queries.unsqueeze(0).expand(len(x), -1, -1)
        queries = queries + self.own(queries, queries, queries, need_weights=False)[0]
        return self.cross(queries, x, x, need_weights=False)[0].flatten(1)


class PlainIds(nn.Module):
    """Looks positions and roles up by ids that are plain attributes."""

    def __init__(self) -> None:
        """Make the tables, and the ids as no buffers."""
        super().__init__()
        self.positions, self.roles = nn.Embedding(3, 4), nn.Embedding(2, 4)
        self.ids = torch.arange(3)
        self.more = {"roles": [torch.tensor([0, 1, 0])]}
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Add both."""
        tokens = x + self.positions(self.ids) + self.roles(self.more["roles"][0])
        return self.layer(tokens.tanh()).transpose(1, 2)


class MaskedWeight(nn.Module):
    """A weight with a mask that is a plain attribute."""

    def __init__(self) -> None:
        """Make the weight."""
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.mask = torch.ones(3, 4, dtype=torch.float64).tril()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return F.linear(x, self.weight * self.mask)
