"""Networks of `study-rank`, with weights and data that are noise: wide, or large."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.studies.scale import ONE_BILLION, Decoder

WITHOUT_BIAS = partial(nn.Linear, bias=False)


@dataclass(frozen=True)
class Problem:
    """A network and what it is shown, for a cross-entropy."""

    model: nn.Module  # whose parameters without gradients are no part of it
    data: list[tuple[Tensor, Tensor]]  # batches of inputs and targets
    forward: Callable[[Tensor], Tensor] | None = None  # to logits, if not the model itself


def linear(d_in: int, d_out: int, examples: int, batch_size: int) -> Problem:
    """One layer."""
    x, y = torch.randn(examples, d_in), torch.randint(d_out, (examples,))
    return Problem(nn.Linear(d_in, d_out), _batches(x, y, batch_size))


def _batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(torch.split(x, size), torch.split(y, size), strict=True))


def resnet18() -> Problem:
    """torchvision's, 64 images of 64 x 64 pixels."""
    from torchvision.models import resnet18 as build

    x, y = torch.randn(64, 3, 64, 64), torch.randint(10, (64,))
    return Problem(build(num_classes=10).eval(), [(x, y)])


def crepe_tiny() -> Problem:
    """The convolutions of torchcrepe's "tiny" (Kim et al. 2018), 256 frames of sound."""
    channels = (1, 128, 16, 16, 16, 32, 64)
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 1024, 1))]
    for index, (d_in, d_out) in enumerate(pairwise(channels)):
        kernel, stride, around = (512, 4, (254, 254)) if index == 0 else (64, 1, (31, 32))
        convolution = nn.Conv2d(d_in, d_out, (kernel, 1), (stride, 1))
        layers += [nn.ZeroPad2d((0, 0, *around)), convolution, nn.ReLU()]
        layers += [nn.BatchNorm2d(d_out, eps=0.001), nn.MaxPool2d((2, 1))]
    layers += [nn.Flatten(), nn.Linear(256, 360)]
    x, y = torch.randn(256, 1024), torch.randint(360, (256,))
    return Problem(nn.Sequential(*layers).eval(), _batches(x, y, 32))


def gpt2() -> Problem:
    """GPT-2 small: 124 million parameters, a head of 50,257 words tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config())
    model.train(False)

    def logits(tokens: Tensor) -> Tensor:
        found: Tensor = model(tokens).logits[:, :-1].transpose(1, 2)
        return found

    tokens = torch.randint(model.config.vocab_size, (32, 64))
    return Problem(model, [(t, t[:, 1:].contiguous()) for t in torch.split(tokens, 4)], logits)


class _ClassesSecond(nn.Module):
    """`[n, tokens, classes]` as a cross-entropy wants them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class _Adapted(nn.Module):
    """A frozen layer with an adapter of rank 8."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(d_in, d_out, bias=False).requires_grad_(False)
        self.down = nn.Linear(d_in, 8, bias=False)
        self.up = nn.Linear(8, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.frozen(x) + 2 * self.up(self.down(x))
        return adapted


class _Block(nn.Module):
    """A block as in Llama, with causal attention and without rotary positions."""

    def __init__(
        self,
        width: int,
        hidden: int,
        heads: int,
        shared_heads: int,
        layer: Callable[[int, int], nn.Module] = WITHOUT_BIAS,
    ) -> None:
        super().__init__()
        self.size = width // heads
        self.query, self.output = layer(width, width), layer(width, width)
        self.key, self.value = (layer(width, self.size * shared_heads) for _ in range(2))
        self.gate, self.up = layer(width, hidden), layer(width, hidden)
        self.down = layer(hidden, width)
        self.before, self.after = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.before(x)
        layers = self.query, self.key, self.value
        q, k, v = (one(normal).unflatten(2, (-1, self.size)).transpose(1, 2) for one in layers)
        shared = k.shape[1] < q.shape[1]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        normal = self.after(x)
        changed: Tensor = x + self.down(F.silu(self.gate(normal)) * self.up(normal))
        return changed


def lora() -> Problem:
    """Adapters of rank 8 on all linear layers of a block as in Llama; its own are frozen."""
    width, classes = 1024, 10
    block = _Block(width, 2816, 16, 16, _Adapted)
    for norm in (block.before, block.after):
        norm.requires_grad_(False)
    head = nn.Linear(width, classes).requires_grad_(False)
    model = nn.Sequential(block, head, _ClassesSecond())
    x, y = torch.randn(16, 32, width), torch.randint(classes, (16, 32))
    return Problem(model, _batches(x, y, 8))


def decoder(sizes: Decoder, sequences: int, length: int, batch_size: int) -> Problem:
    """A transformer of these sizes, and random words."""
    embedding = nn.Embedding(sizes.vocabulary, sizes.width)
    blocks = [
        _Block(sizes.width, sizes.hidden, sizes.heads, sizes.shared_heads)
        for _ in range(sizes.layers)
    ]
    head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
    if sizes.tied:
        embedding.weight = head.weight
    model = nn.Sequential(embedding, *blocks, nn.RMSNorm(sizes.width), head, _ClassesSecond())
    tokens = torch.randint(sizes.vocabulary, (sequences, length + 1))
    return Problem(
        model, [(t[:, :-1], t[:, 1:].contiguous()) for t in torch.split(tokens, batch_size)]
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "few-examples": lambda: linear(8, 1500, 4, 4),
    "vocabulary": lambda: linear(16, 32000, 256, 64),
    "lora": lora,
    "resnet18": resnet18,
    "crepe": crepe_tiny,
    "gpt2": gpt2,
    "decoder": lambda: decoder(ONE_BILLION.divided(8), 16, 64, 4),
}
