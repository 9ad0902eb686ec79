"""The networks whose Fisher matrices are estimated."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10
GROUPS = 8


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


def group_norm(channels: int) -> nn.Module:
    """A norm within each example."""
    return nn.GroupNorm(GROUPS, channels)


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut, as in ResNet-18."""

    def __init__(
        self, d_in: int, d_out: int, stride: int, norm: Callable[[int], nn.Module]
    ) -> None:
        """Make the layers."""
        super().__init__()
        self.first = nn.Conv2d(d_in, d_out, 3, stride=stride, padding=1, bias=False)
        self.first_norm = norm(d_out)
        self.second = nn.Conv2d(d_out, d_out, 3, padding=1, bias=False)
        self.second_norm = norm(d_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or d_in != d_out:
            convolution = nn.Conv2d(d_in, d_out, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(convolution, norm(d_out))

    def forward(self, x: Tensor) -> Tensor:
        """Transform images ``[N, C, H, W]``."""
        hidden = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(hidden)) + self.shortcut(x))


def residual(norm: Callable[[int], nn.Module], width: int = 16) -> nn.Sequential:
    """A ResNet-18 for images of 32 x 32 pixels, with a quarter of its channels."""
    stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
    layers: list[nn.Module] = [stem, norm(width), nn.ReLU()]
    d_in = width
    for stage, stride in enumerate((1, 2, 2, 2)):
        d_out = width * 2**stage
        layers += [BasicBlock(d_in, d_out, stride, norm), BasicBlock(d_out, d_out, 1, norm)]
        d_in = d_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(d_in, CLASSES))


class TransformerBlock(nn.Module):
    """Causal attention and a perceptron, each after a norm."""

    def __init__(self, width: int, heads: int) -> None:
        """Make the layers."""
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.perceptron_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens ``[N, T, width]``."""
        packed = self.queries_keys_values(self.attention_norm(x))
        queries, keys, values = packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.attended(mixed.transpose(1, 2).flatten(-2))
        down: Tensor = self.down(F.gelu(self.up(self.perceptron_norm(x))))
        return x + down


class Transformer(nn.Module):
    """A small language model."""

    def __init__(self, width: int, blocks: int, heads: int, length: int, vocabulary: int) -> None:
        """Make the layers."""
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[N, T]`` to scores ``[N, vocabulary, T]``, as cross-entropy wants them."""
        positions = torch.arange(x.shape[1], device=x.device)
        hidden = self.blocks(self.tokens(x) + self.positions(positions))
        scores: Tensor = self.head(self.norm(hidden))
        return scores.transpose(1, 2)
