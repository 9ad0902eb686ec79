"""How well features compare texts; all features are ``[n, width]``, compared by their cosines."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


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
