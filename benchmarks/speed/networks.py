"""The networks whose Fisher matrices are estimated."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Sequential:
    """Four convolutions of images of 32 x 32 pixels, and two linear layers."""
    layers: list[nn.Module] = []
    for (d_in, d_out), stride in zip(pairwise((3, 32, 64, 64, 128)), (1, 2, 2, 2), strict=True):
        layers += [nn.Conv2d(d_in, d_out, 3, stride=stride, padding=1), nn.ReLU()]
    head = (nn.Flatten(), nn.Linear(2048, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    return nn.Sequential(*layers, *head)


def residual(norm: Callable[[int], nn.Module], width: int = 16) -> nn.Sequential:
    """A ResNet-18 for images of 32 x 32 pixels, with a quarter of its channels."""
    from torchvision.models.resnet import BasicBlock  # takes a second, in every process that times

    stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
    layers: list[nn.Module] = [stem, norm(width), nn.ReLU()]
    d_in = width
    for stage, stride in enumerate((1, 2, 2, 2)):
        d_out = width * 2**stage
        shortcut = None
        if stage:
            convolution = nn.Conv2d(d_in, d_out, 1, stride=stride, bias=False)
            shortcut = nn.Sequential(convolution, norm(d_out))
        layers += [
            BasicBlock(d_in, d_out, stride, shortcut, norm_layer=norm),
            BasicBlock(d_out, d_out, norm_layer=norm),
        ]
        d_in = d_out
    network = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(d_in, CLASSES)
    )
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # not all packages know functions that overwrite their input
    return network


class TransformerBlock(nn.Module):
    """Causal attention and a perceptron, each after a norm."""

    def __init__(self, width: int, heads: int) -> None:
        """Make the layers."""
        super().__init__()
        self.heads = heads
        self.attention_norm, self.perceptron_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens ``[N, T, width]``."""
        packed = self.queries_keys_values(self.attention_norm(x))
        queries, keys, values = packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.attended(mixed.transpose(1, 2).flatten(-2))
        down: Tensor = self.down(F.gelu(self.up(self.perceptron_norm(x))))
        return x + down


class Transformer(nn.Module):
    """A small language model, whose layers are those that all packages know."""

    def __init__(
        self,
        width: int,
        blocks: int,
        heads: int,
        length: int,
        vocabulary: int,
        *,
        tied: bool = False,
    ) -> None:
        """Make the layers; in a tied model the head's weight is the embedding, as in GPT-2."""
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=not tied)
        if tied:
            self.head.weight = self.tokens.weight
            nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[N, T]`` to scores ``[N, vocabulary, T]``, as cross-entropy wants them."""
        positions = torch.arange(x.shape[1], device=x.device)
        hidden = self.blocks(self.tokens(x) + self.positions(positions))
        scores: Tensor = self.head(self.norm(hidden))
        return scores.transpose(1, 2)
