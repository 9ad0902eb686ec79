"""`EKFACPenalty`: what keeps a network from forgetting, for any training loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from rotate_ewc import snapshot
from rotate_ewc.fitting import fit_blocks
from rotate_ewc.merging import merge
from rotate_ewc.operator import EKFACLinearOperator
from rotate_ewc.options import (
    EstimationSettings,
    FisherType,
    KFACType,
    Unsupported,
    as_choice,
    as_non_negative_number,
    as_patterns,
    check_positive_integer,
)
from rotate_ewc.parameters import (
    Parameters,
    name_parameters,
    parameters_of,
    protected_slice,
    select_parameters,
    unwrapped,
)
from rotate_ewc.quadratic import quadratic_form
from rotate_ewc.snapshot import HEADER, SnapshotError

FORMAT: Final = "rotate_ewc.penalty/1"
MODES: Final = ("merged", "separate")


@dataclass(frozen=True)
class Term:
    """One quadratic term of the penalty: an operator, the point it pulls to, and its weight."""

    operator: EKFACLinearOperator
    anchor: dict[str, Tensor]
    weight: float


class EKFACPenalty(nn.Module):
    """Elastic weight consolidation in a rotated basis.

    After each task, `consolidate` estimates the Fisher matrix F_t at the solution θ*. On later
    tasks, the penalty is added to the loss:

        ½ · strength · Σ_t (N_t / N_now) (θ - θ*)ᵀ F_t (θ - θ*)

    With a mean loss, strength 1 is Bayes' rule: N_t are the example counts of the past tasks, N_now
    that of the task being trained (Huszár 2018, "Note on the quadratic penalties in elastic weight
    consolidation"). Larger strengths protect more; 3 is a good practical value.

    In mode `"merged"` the operators of all tasks are merged into one, anchored at the latest
    solution: time and memory do not depend on the number of tasks. In mode `"separate"` every task
    keeps its operator and its own anchor.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from rotate_ewc import EKFACPenalty
        >>> _ = torch.manual_seed(0)
        >>> model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
        >>> old_task = [(torch.randn(16, 4), torch.randint(3, (16,)))]
        >>> penalty = EKFACPenalty(strength=3.0)
        >>> penalty(model).item()
        0.0
        >>> penalty.consolidate(model, criterion, old_task)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(0.1)
        >>> loss = penalty(model)
        >>> loss.backward()
        >>> model.weight.grad is not None
        True
    """

    def __init__(
        self,
        strength: float = 1.0,
        mode: str = "merged",
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        fisher_type: FisherType | str = FisherType.MC,
        mc_samples: int = 1,
        kfac_approx: KFACType | str = KFACType.EXPAND,
        separate_weight_and_bias: bool = True,
        seed: int = 2147483647,
        memory_budget: int = 2**30,
        progressbar: bool = False,
        unsupported: Unsupported | str = Unsupported.ERROR,
    ) -> None:
        """Make a penalty that is zero until the first task is consolidated.

        Args:
            strength: λ, at least 0.
            mode: `"merged"` (constant cost) or `"separate"`.
            include: Patterns such as `"encoder.*"` for the names of the parameters to protect.
            exclude: Patterns for names to leave out, such as those of unsupported layers.
            fisher_type: `MC` (sampled labels), `TYPE2` (exact expectation) or `EMPIRICAL`.
            mc_samples: Sampled labels per example, for `MC`.
            kfac_approx: `EXPAND` or `REDUCE`: how shared positions enter the basis.
            separate_weight_and_bias: One block for each, or one joint block for both.
            seed: Seed of the sampled labels; task t uses `seed + t`.
            memory_budget: Bytes that estimation may use beyond the model's own passes.
            progressbar: Whether to show progress while consolidating.
            unsupported: What to do about parameters that are used in a way for which there is no
                rule: `"error"` refuses them by name, `"diagonal"` takes the exact diagonal of their
                Fisher matrix (slow), `"skip"` leaves them free. The last two warn.

        Raises:
            ValueError: If a value is out of range, naming the argument.
            TypeError: If a value has the wrong type.
        """
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; expected one of {', '.join(map(repr, MODES))}")
        self.strength = strength
        self.mode = mode
        self.include = as_patterns("include", include)
        self.exclude = as_patterns("exclude", exclude)
        self.current_examples = None
        self.settings = EstimationSettings(
            fisher_type=as_choice("fisher_type", fisher_type, FisherType),
            mc_samples=mc_samples,
            kfac_approx=as_choice("kfac_approx", kfac_approx, KFACType),
            separate_weight_and_bias=separate_weight_and_bias,
            seed=seed,
            memory_budget=memory_budget,
            progressbar=progressbar,
            unsupported=as_choice("unsupported", unsupported, Unsupported),
        )
        self._terms: list[Term] = []
        self._num_tasks = 0
        self._last_examples = 1

    @property
    def strength(self) -> float:
        """λ; may be changed at any time, for example along a schedule."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = as_non_negative_number("strength", value)

    @property
    def current_examples(self) -> int | None:
        """N_now; None takes the last consolidated task's count."""
        return self._current_examples

    @current_examples.setter
    def current_examples(self, value: int | None) -> None:
        check_positive_integer("current_examples", value, optional=True)
        self._current_examples = value

    @property
    def num_tasks(self) -> int:
        """Number of consolidated tasks."""
        return self._num_tasks

    @property
    def terms(self) -> tuple[Term, ...]:
        """The quadratic terms: one for each task, or one in all."""
        return tuple(self._terms)

    def consolidate(
        self,
        model: nn.Module,
        loss_func: Callable[..., Any],
        data: Iterable[Any],
        *,
        params: Parameters | None = None,
        forward: Callable[[Any], Tensor] | None = None,
        num_examples: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
    ) -> None:
        """Remember a task: estimate its Fisher matrix at the current solution and fold it in.

        The model, its gradients and modes, and the random states are left as they were; if anything
        fails, so is the penalty.

        Args:
            model: The model at the end of the task.
            loss_func: The task's loss, with reduction `mean` or `sum`.
            data: The task's data, as re-iterable batches (inputs, targets). A few thousand examples
                are enough for most models.
            params: The parameters to protect, which keep the names they have in the model; None is
                all that require gradients and that `include` and `exclude` choose.
            forward: From a batch's inputs to outputs, where that is not `model(inputs)`.
            num_examples: The task's number of examples, where `data` is only a sample of them.
            batch_size_fn: From a batch's inputs to its number of examples, where that is not the
                length of their first axis.

        Raises:
            ValueError: If a parameter, layer, loss or batch cannot be handled, naming it.
            TypeError: If an argument has the wrong type.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
        check_positive_integer("num_examples", num_examples, optional=True)
        model = unwrapped(model)
        if params is None:
            params = select_parameters(model, self.include, self.exclude)
        # Whatever names they were given, the penalty will look for them by those in the model.
        chosen = name_parameters(params, model)
        named = name_parameters(list(chosen.values()), model)
        self._check_protected(parameters_of(model))
        settings = replace(
            self.settings,
            seed=self.settings.seed + self._num_tasks,
            num_data=num_examples,
            batch_size_fn=batch_size_fn,
        )
        operator = EKFACLinearOperator.from_blocks(
            *fit_blocks(forward or model, loss_func, named, data, settings, model=model)
        )
        anchor = {name: named[name].detach().clone() for name in operator.parameter_shapes}
        self._fold_in(operator, anchor)

    def forward(self, model: nn.Module | Mapping[str, Tensor]) -> Tensor:
        """Return the penalty, a scalar tensor; zero before the first task.

        Args:
            model: The model, or its parameters by name. Parameters that are new since a task, or
                the new rows of one that has grown, are free.

        Raises:
            ValueError: If a protected parameter is missing or has lost its shape, naming it.
            TypeError: If `model` is neither a module nor a mapping.
        """
        parameters = parameters_of(model)
        if not self._terms:
            like = next(iter(parameters.values()), torch.zeros(()))
            return like.new_zeros(())
        values = []
        for term in self._terms:
            deltas = {
                name: protected_slice(name, parameters, anchor) - anchor
                for name, anchor in term.anchor.items()
            }
            values.append(term.weight * quadratic_form(term.operator.blocks, deltas))
        return 0.5 * self.strength / self._reference() * torch.stack(values).sum()

    def _check_protected(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise if a parameter of an earlier task is missing, or smaller than it was."""
        for term in self._terms:
            for name, anchor in term.anchor.items():
                protected_slice(name, parameters, anchor)

    def _fold_in(self, operator: EKFACLinearOperator, anchor: dict[str, Tensor]) -> None:
        """Add a task's operator; everything that can fail comes before the first change."""
        reductions = {term.operator.provenance.reduction for term in self._terms}
        reduction = operator.provenance.reduction
        if reductions - {reduction}:
            raise ValueError(
                f"loss_func has reduction {reduction!r}, but earlier tasks had "
                f"{reductions.pop()!r}; expected the same for all tasks"
            )
        weight = float(operator.num_data) if reduction == "mean" else 1.0
        term = Term(operator, anchor, weight)
        if self.mode == "merged":
            parts = [*self._terms, term]
            merged = merge([part.operator for part in parts], [part.weight for part in parts])
            older = self._terms[0].anchor if self._terms else {}
            terms = [Term(merged, {**older, **anchor}, 1.0)]
        else:
            terms = [*self._terms, term]
        self._terms = terms
        self._num_tasks += 1
        self._last_examples = operator.num_data

    def _reference(self) -> float:
        """N_now for a mean loss; a summed loss has its example counts inside."""
        if self._terms[0].operator.provenance.reduction == "sum":
            return 1.0
        return float(self.current_examples or self._last_examples)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EKFACPenalty:
        """Move or cast the state, as `nn.Module.to` and its relatives ask for."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._terms = [
            Term(
                term.operator.map(fn),
                {name: fn(anchor) for name, anchor in term.anchor.items()},
                term.weight,
            )
            for term in self._terms
        ]
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        header = {
            "format": FORMAT,
            "mode": self.mode,
            "weights": [term.weight for term in self._terms],
            "num_tasks": self._num_tasks,
            "last_examples": self._last_examples,
        }
        destination[prefix + HEADER] = json.dumps(header)
        for index, term in enumerate(self._terms):
            for key, value in term.operator.state_dict().items():
                destination[f"{prefix}{index}/operator/{key}"] = value
            for name, anchor in term.anchor.items():
                destination[f"{prefix}{index}/anchor/{name}"] = anchor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Check the whole state before anything is replaced."""
        state = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        header = snapshot.read_header(state, FORMAT)
        if header.get("mode") != self.mode:
            raise SnapshotError(
                f"snapshot is of a penalty with mode {header.get('mode')!r}; expected "
                f"{self.mode!r}, the mode of this one"
            )
        try:
            weights = [as_non_negative_number("weights", w) for w in header["weights"]]
            num_tasks, last_examples = int(header["num_tasks"]), int(header["last_examples"])
        except (KeyError, TypeError, ValueError) as error:
            raise SnapshotError(f"snapshot key {HEADER!r} is incomplete: {error}") from None
        known = {f"{index}/" for index in range(len(weights))}
        for key in state:
            if key != HEADER and key[: key.find("/") + 1] not in known:
                raise SnapshotError(f"snapshot has the unexpected key {key!r}")
        self._terms = [_load_term(state, index, weight) for index, weight in enumerate(weights)]
        self._num_tasks, self._last_examples = num_tasks, last_examples

    def extra_repr(self) -> str:
        """Show strength, mode and tasks."""
        return f"strength={self.strength}, mode={self.mode!r}, tasks={self._num_tasks}"


def _load_term(state: Mapping[str, Any], index: int, weight: float) -> Term:
    operator_prefix, anchor_prefix = f"{index}/operator/", f"{index}/anchor/"
    operator = EKFACLinearOperator.from_state_dict(
        {
            key[len(operator_prefix) :]: value
            for key, value in state.items()
            if key.startswith(operator_prefix)
        }
    )
    anchor = {
        key[len(anchor_prefix) :]: value
        for key, value in state.items()
        if key.startswith(anchor_prefix)
    }
    shapes = operator.parameter_shapes
    for name in sorted(set(shapes) ^ set(anchor)):
        raise SnapshotError(f"snapshot key {anchor_prefix + name!r} is missing or unexpected")
    for name, shape in shapes.items():
        value = anchor[name]
        if not isinstance(value, Tensor) or value.shape != shape:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise SnapshotError(
                f"snapshot key {anchor_prefix + name!r} is {got}; expected a tensor of shape "
                f"{list(shape)}"
            )
        if not bool(torch.isfinite(value).all()):
            raise SnapshotError(f"snapshot key {anchor_prefix + name!r} is not finite")
    return Term(operator, {name: anchor[name].detach() for name in shapes}, weight)
