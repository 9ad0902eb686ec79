"""`RotatedAdam`: Adam in the eigenbasis of a penalty, where the penalty is no obstacle to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rotate_ewc._utils.messages import listed, parameters_have
from rotate_ewc._utils.parameters import parameters_of
from rotate_ewc._utils.validation import as_non_negative_number
from rotate_ewc.penalty.penalty import EKFACPenalty
from rotate_ewc.penalty.rotation import Rotation


class RotatedAdam(Optimizer):
    """Adam in the eigenbasis of an `EKFACPenalty`, followed by the penalty's proximal step.

    Gradients of the loss, without the penalty, are rotated into the basis in which the penalty is
    diagonal. There Adam has a step size η of its own for every coordinate, and so the proximal step
    is exact and elementwise. With `z = Qᵀ(θ - θ*)`, Adam's averages m and v of the rotated gradient
    and its square, and the eigenvalues Λ,

        η = lr / (√v + ε),    z ← (z - η m) / (1 + η λ Λ),    θ = θ* + Q z

    (m and v corrected for their bias). It comes to rest exactly where the gradient of the loss and
    that of the penalty cancel, it is stable for every strength, and no coordinate is held back by
    the stiffness of another. Plain Adam on loss plus penalty has only the first of the three: where
    the penalty is stiff, its gradients swamp Adam's averages of the loss's own.

    Whenever the penalty's number of tasks has changed, the averages start again in the new basis.
    What the penalty does not protect (new rows, left-out parameters, everything before the first
    task) is trained by plain Adam (Kingma and Ba 2015). Adam in the eigenbasis of Kronecker factors
    of the *gradient* is known as SOAP (Vyas et al. 2024).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from rotate_ewc import EKFACPenalty, RotatedAdam
        >>> _ = torch.manual_seed(0)
        >>> model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
        >>> penalty = EKFACPenalty(strength=3.0)
        >>> optimizer = RotatedAdam(model, penalty, lr=3e-3)
        >>> for task in range(2):
        ...     x, y = torch.randn(16, 4), torch.randint(3, (16,))
        ...     for step in range(10):
        ...         optimizer.zero_grad()
        ...         criterion(model(x), y).backward()  # without the penalty
        ...         optimizer.step()
        ...     penalty.consolidate(model, criterion, [(x, y)])
    """

    def __init__(
        self,
        model: nn.Module,
        penalty: EKFACPenalty | None = None,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        params: Iterable[Any] | None = None,
    ) -> None:
        """Make an optimizer of a model's parameters, which the penalty knows by their names.

        Args:
            model: The model.
            penalty: A penalty in mode `"merged"`; None is plain Adam, until `penalty` is set.
            lr: Learning rate, at least 0.
            betas: What m and v keep of themselves at each step, at least 0 and less than 1.
            eps: ε, more than 0. Where the gradient is nothing but rounding errors, and those are
                large against ε, coordinates without a penalty move by up to `lr` a step.
            params: Some of the model's parameters, or groups of them with options of their own, as
                for every optimizer of PyTorch; None is all that require gradients.

        Raises:
            ValueError: If a value is out of range or the penalty's mode is `"separate"`.
            TypeError: If an argument has the wrong type.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is {type(model).__name__}; expected a torch.nn.Module (not its parameters: "
                f"the penalty knows them by their names in the model)"
            )
        if params is None:
            params = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.model = model
        self.penalty = penalty
        defaults = {"lr": lr, "betas": betas, "eps": eps, "tasks": 0}
        super().__init__(params, defaults)

    @property
    def penalty(self) -> EKFACPenalty | None:
        """The penalty; it can be set once, where the constructor got none."""
        return self._penalty

    @penalty.setter
    def penalty(self, penalty: EKFACPenalty | None) -> None:
        if penalty is not None and not isinstance(penalty, EKFACPenalty):
            raise TypeError(f"penalty is {type(penalty).__name__}; expected an EKFACPenalty")
        if penalty is not None:
            penalty.check_merged()
        if getattr(self, "_penalty", None) not in (None, penalty):
            raise ValueError(
                "the optimizer has another penalty already; expected one that was made without, "
                "RotatedAdam(model, lr=...), or with this one"
            )
        self._penalty = penalty

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, as for every optimizer of PyTorch.

        Raises:
            ValueError: If an option is out of range, naming it.
            TypeError: If an option has the wrong type.
        """
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state, also one of Adam, which is the same before the first task."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("tasks", 0)

    def __getstate__(self) -> dict[str, Any]:
        """Return what to copy or pickle, model and penalty included."""
        state: dict[str, Any] = super().__getstate__()
        return {**state, "model": self.model, "_penalty": self._penalty}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; parameters without a gradient are left alone.

        Args:
            closure: Evaluates the loss, without the penalty, and its gradient.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: If a protected parameter is missing, has lost its shape or is on another
                device, a gradient is sparse, a parameter is not the model's, or the two halves of
                a joint block do not both have a gradient and the same options.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = parameters_of(self.model)
        groups = self._groups_by_name(parameters)
        rotation = self._rotation(parameters, groups)
        self._restart_after_consolidation()
        for name, group in groups.items():
            step, sizes = self._adam(parameters[name], rotation.gradients[name], group)
            rotation.move(name, step, sizes)
        rotation.write_back()
        return loss

    def _groups_by_name(self, parameters: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
        """Find the option groups of the parameters that have a gradient, by name."""
        names = {id(parameter): name for name, parameter in parameters.items()}
        found: dict[str, dict[str, Any]] = {}
        strangers, sparse = [], []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                name = names.get(id(parameter))
                if name is None:
                    strangers.append(str(list(parameter.shape)))
                    continue
                if parameter.grad.is_sparse:
                    sparse.append(name)
                found[name] = group
        if strangers:
            raise ValueError(
                f"{len(strangers)} of the optimizer's parameters, of shape {listed(strangers)}, "
                f"are none of the model's; expected an optimizer of the model that it was given"
            )
        if sparse:
            raise ValueError(
                f"{parameters_have(sparse)} a sparse gradient; expected a dense one, as of "
                f"torch.nn.Embedding(..., sparse=False)"
            )
        return found

    def _rotation(
        self, parameters: Mapping[str, Tensor], groups: Mapping[str, Mapping[str, Any]]
    ) -> Rotation:
        """Rotate; what can fail is done before anything changes."""
        gradients = {name: parameters[name].grad for name in groups}
        present = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        penalty = self._penalty
        if penalty is None:
            return Rotation(parameters, present, (), {}, 0.0)
        deltas = penalty.deltas(parameters)
        rotation = Rotation(parameters, present, penalty.stacks, deltas, penalty.scale)
        for stack in penalty.stacks:
            _check_same_options({n: groups[n] for n in stack.names if n in groups})
        return rotation

    def _restart_after_consolidation(self) -> None:
        """Forget averages that were taken in the basis of another number of tasks."""
        tasks = 0 if self._penalty is None else self._penalty.num_tasks
        for group in self.param_groups:
            if group["tasks"] != tasks:
                for parameter in group["params"]:
                    self.state.pop(parameter, None)
                group["tasks"] = tasks

    def _adam(
        self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return Adam's step η m for a gradient, and η itself."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        first, second = group["betas"]
        gradient = gradient.to(parameter.dtype)
        state["exp_avg"].lerp_(gradient, 1.0 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1.0 - second)
        taken = float(state["step"])
        roots = state["exp_avg_sq"].sqrt() / (1.0 - second**taken) ** 0.5
        sizes = float(group["lr"]) / (roots + group["eps"])
        return sizes * state["exp_avg"] / (1.0 - first**taken), sizes


def _check_same_options(groups: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise unless the parameters of one block have the same options: its coordinates mix them."""
    readers: dict[str, Callable[[Any], Any]] = {"lr": float, "betas": tuple, "eps": float}
    for option, read in readers.items():
        if len({read(group[option]) for group in groups.values()}) > 1:
            given = ", ".join(f"{name!r} has {group[option]}" for name, group in groups.items())
            raise ValueError(
                f"the parameters of a joint block have different {option} ({given}); expected the "
                f"same, or a penalty with separate_weight_and_bias=True"
            )


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise unless the options of a group are in range."""
    as_non_negative_number("lr", _plain(options["lr"]))
    if options.get("weight_decay", 0) != 0:
        raise ValueError(
            f"weight_decay is {options['weight_decay']}; expected none: the penalty draws the "
            f"parameters to where they were, not to zero"
        )
    if as_non_negative_number("eps", options["eps"]) == 0:
        raise ValueError("eps is 0; expected more: √v can be 0")
    betas = options["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas is {betas!r}; expected two numbers")
    for index, beta in enumerate(betas):
        if as_non_negative_number(f"betas[{index}]", beta) >= 1:
            raise ValueError(f"betas[{index}] is {beta}; expected less than 1")


def _plain(rate: Any) -> Any:
    """Return a learning rate that is a tensor as a number."""
    return rate.item() if isinstance(rate, Tensor) and rate.numel() == 1 else rate
