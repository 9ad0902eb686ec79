"""Methods against forgetting, each a few lines, for a plain loop over batches.

`Method` is plain training. A method may add to the loss, or take part in the optimizer's steps, and
look at a task's training data when it has been learned.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.optim import Optimizer

from benchmarks.fine_tuning.tasks import Part
from benchmarks.methods import AUTO
from rotate_ewc import EKFACPenalty

# The temperature of the published method.
LWF_TEMPERATURE: Final = 2.0
REPLAYED_PART: Final = 0.01
MOST_EXACT_CLASSES: Final = 10


class Method:
    """Plain training."""

    strengths: tuple[float, ...] = ()  # that are searched, the likeliest first
    at_once = False  # whether all tasks are learned together
    needs_strength = False

    def __init__(self, strength: float | None, *, examples: int, seed: int) -> None:
        """Take a strength, how many examples of a task to look at, and a seed."""
        self.strength = strength
        self.examples = examples
        self.generator = torch.Generator().manual_seed(seed)

    def begin(self, model: nn.Module, optimizer: Optimizer) -> None:
        """A task that is not the first begins."""

    def extra_loss(self, model: Any, inputs: Tensor) -> Tensor | None:
        """Return what is added to the loss of a batch."""
        return None

    def end(self, model: Any, data: Part) -> None:
        """Look at the training data of the task that has been learned."""

    def finish(self) -> None:
        """The last step of the task has been taken."""

    def found_strength(self) -> float | None:
        """Return the strength at the end."""
        return self.strength

    def drawn(self, data: Part) -> Part:
        """Return some of the examples, drawn at random."""
        return data.part(torch.randperm(len(data), generator=self.generator)[: self.examples])


class Joint(Method):
    """All tasks at once, the bound."""

    at_once = True


class L2(Method):
    """Adds ``½ λ ‖θ - θ*‖²``, with θ* the parameters at the end of the last task."""

    strengths = (1.0, 0.1, 10.0)
    needs_strength = True

    def end(self, model: Any, data: Part) -> None:
        """Remember the parameters."""
        self.anchor = {name: p.detach().clone() for name, p in _trained(model)}

    def extra_loss(self, model: Any, inputs: Tensor) -> Tensor | None:
        """Return the penalty."""
        terms = [(p - self.anchor[name]).square().sum() for name, p in _trained(model)]
        return 0.5 * float(self.strength or 0) * torch.stack(terms).sum()


class EWC(Method):
    """Adds ``½ λ Σ_i P_i (θ_i - m_i)²``, with diagonals of the Fisher matrices summed over tasks.

    As in `benchmarks.baselines.diagonal_fisher`, which takes linear layers and convolutions alone;
    here any layer may be used, an example at a time. Exact over the classes where there are few;
    otherwise, and for the tokens of a language model, labels are drawn from the predictions.
    """

    strengths = (1e4, 1e3, 1e5)
    needs_strength = True

    def __init__(self, strength: float | None, *, examples: int, seed: int) -> None:
        """Protect nothing yet."""
        super().__init__(strength, examples=examples, seed=seed)
        self.precision: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def end(self, model: Any, data: Part) -> None:
        """Add the Fisher matrix of a task, and move the anchors."""
        for name, fisher in self._fisher(model, self.drawn(data)).items():
            now = dict(_trained(model))[name].detach()
            precision = self.precision.get(name, torch.zeros_like(fisher)) + fisher
            share = torch.where(precision > 0, fisher / precision, torch.ones_like(fisher))
            self.precision[name] = precision
            self.anchor[name] = torch.lerp(self.anchor.get(name, now), now, share)

    def _fisher(self, model: Any, data: Part) -> dict[str, Tensor]:
        named = dict(_trained(model))
        sums = {name: torch.zeros_like(p, requires_grad=False) for name, p in named.items()}
        for one in torch.split(data.inputs, 1):
            for loss in self._losses(_logits(model, one)):
                gradients = torch.autograd.grad(
                    loss, list(named.values()), retain_graph=True, allow_unused=True
                )
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    if gradient is not None:
                        total.addcmul_(gradient, gradient)
        return {name: total / len(data) for name, total in sums.items()}

    def _losses(self, logits: Tensor) -> list[Tensor]:
        """Return losses the squares of whose gradients add up to an example's Fisher matrix."""
        log_probabilities = log_softmax(logits, 1)
        weights = log_probabilities.detach().exp()
        if logits.numel() <= MOST_EXACT_CLASSES:
            return list((log_probabilities * weights.sqrt()).squeeze(0))
        labels = torch.multinomial(weights, 1, generator=self.generator)
        return [log_probabilities.gather(1, labels).sum() / math.sqrt(len(logits))]

    def extra_loss(self, model: Any, inputs: Tensor) -> Tensor | None:
        """Return the penalty."""
        terms = [
            (self.precision[name] * (p - self.anchor[name]).square()).sum()
            for name, p in _trained(model)
        ]
        return 0.5 * float(self.strength or 0) * torch.stack(terms).sum()


class LwF(Method):
    """Learning without forgetting (Li and Hoiem 2016): old heads answer as they did, on new texts.

    Adds λ times the mean, over the old heads, of ``T² KL(old predictions ‖ new ones)`` with both at
    temperature T = 2.
    """

    strengths = (1.0, 3.0, 10.0)
    needs_strength = True

    def __init__(self, strength: float | None, *, examples: int, seed: int) -> None:
        """Know of no old network yet."""
        super().__init__(strength, examples=examples, seed=seed)
        self.heads: set[int] = set()

    def end(self, model: Any, data: Part) -> None:
        """Keep a copy of the network."""
        self.heads.add(model.head)
        self.old = copy.deepcopy(model).requires_grad_(False)

    def extra_loss(self, model: Any, inputs: Tensor) -> Tensor | None:
        """Return the distance of predictions."""
        new, old = model.features(inputs), self.old.features(inputs)
        terms = []
        for head in sorted(self.heads):
            predictions = log_softmax(model.heads[head](new) / LWF_TEMPERATURE, 1)
            targets = log_softmax(self.old.heads[head](old) / LWF_TEMPERATURE, 1)
            terms.append(kl_div(predictions, targets, log_target=True, reduction="batchmean"))
        return float(self.strength or 0) * LWF_TEMPERATURE**2 * torch.stack(terms).mean()


class Replay(Method):
    """Keeps one example in a hundred of every task, and learns as many old ones as new ones."""

    def __init__(self, strength: float | None, *, examples: int, seed: int) -> None:
        """Keep nothing yet."""
        super().__init__(strength, examples=examples, seed=seed)
        self.kept: list[tuple[int, Part]] = []

    def end(self, model: Any, data: Part) -> None:
        """Keep some examples."""
        number = max(1, round(REPLAYED_PART * len(data)))
        chosen = torch.randperm(len(data), generator=self.generator)[:number]
        self.kept.append((model.head, data.part(chosen)))

    def extra_loss(self, model: Any, inputs: Tensor) -> Tensor | None:
        """Return the mean loss of old examples, of a task that is drawn for each batch."""
        which = int(torch.randint(len(self.kept), (1,), generator=self.generator))
        head, part = self.kept[which]
        batch = part.part(torch.randint(len(part), (len(inputs),), generator=self.generator))
        return cross_entropy(model.heads[head](model.features(batch.inputs)), batch.labels)


class RotatedEWC(Method):
    """This package's penalty, attached to the optimizer; no strength is to find it."""

    strengths: tuple[float, ...] = (1e3, 1e4, 1e2)
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    update: dict[str, Any] = {}  # noqa: RUF012 (never changed)

    def __init__(self, strength: float | None, *, examples: int, seed: int) -> None:
        """Protect nothing yet."""
        super().__init__(strength, examples=examples, seed=seed)
        self.penalty = EKFACPenalty(AUTO if strength is None else strength, **self.options)

    def begin(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Take part in the optimizer's steps."""
        self.handle = self.penalty.attach(optimizer, model, **self.update)

    def finish(self) -> None:
        """Apply what the update has put off."""
        self.handle.flush()

    def end(self, model: Any, data: Part) -> None:
        """Remember the task."""
        batches = self.drawn(data).batches(32)
        self.penalty.consolidate(model, nn.CrossEntropyLoss(), batches, num_data=len(data))

    def found_strength(self) -> float | None:
        """Return the strength at the end."""
        return self.penalty.strength


class LeanRotatedEWC(RotatedEWC):
    """The same, with 64 directions of each side and without the word embeddings."""

    options = {"rank": 64, "exclude": ["*word_embeddings*"]}  # noqa: RUF012 (never changed)


class PlasticRotatedEWC(RotatedEWC):
    """The same, with steps that keep 98 instead of 95 % of their progress where tasks overlap."""

    strengths = ()  # it is about the strength that is found
    options = {"plasticity": 0.98}  # noqa: RUF012 (never changed)


class TangentRotatedEWC(RotatedEWC):
    """The same penalty, of which the optimizer sees a tangent plane, renewed every 20 steps."""

    update = {"update": "tangent", "every": 20}  # noqa: RUF012 (never changed)


METHODS: dict[str, Callable[..., Method]] = {
    "naive": Method,
    "l2": L2,
    "ewc": EWC,
    "lwf": LwF,
    "replay": Replay,
    "rotated-ewc": RotatedEWC,
    "rotated-ewc-lean": LeanRotatedEWC,
    "rotated-ewc-plastic": PlasticRotatedEWC,
    "rotated-ewc-tangent": TangentRotatedEWC,
    "joint": Joint,
}


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return ``[predictions, C]`` of a classifier, ``[n, C]``, or tokens, ``[n, C, length]``."""
    logits: Tensor = model(inputs)
    return logits.movedim(1, -1).flatten(0, -2)
