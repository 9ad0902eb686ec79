"""Teach the package a loss and an optimizer, and use a layer that it does not know."""
# ruff: noqa: T201

import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from rotate_ewc import EKFACPenalty, Likelihood, register_likelihood, register_step_size

# %%
# **A loss.** Waiting times, exponentially distributed with the rate `exp(output)`. For outputs f
# and targets t, a term of the loss is `exp(f) t - f`. Three functions give what the Fisher matrix
# needs: vectors whose outer products sum to the Hessian (its mean over t is 1), the gradient for
# labels drawn from the model, and the gradient for the labels given.


class WaitingTimeLoss(nn.Module):
    """Negative log-likelihood of exponential waiting times."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over the elements."""
        return (outputs.exp() * targets - outputs).mean()


class WaitingTimes(Likelihood):
    """The derivatives of the loss, and labels drawn from the model."""

    def exact_vectors(
        self, outputs: Tensor, targets: Tensor, num_examples: int
    ) -> Iterator[Tensor]:
        """Yield a unit vector for each output."""
        for element in range(outputs.shape[1]):
            vector = torch.zeros_like(outputs)
            vector[:, element] = 1
            yield vector

    def sampled_vector(
        self, outputs: Tensor, targets: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Draw waiting times, in units of their mean."""
        return torch.empty_like(outputs).exponential_(generator=generator) - 1

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Differentiate the summed loss."""
        return outputs.exp() * targets - 1

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Say that the mean is over elements, not over rows."""
        return torch.full_like(outputs[:, 0], outputs.shape[1])


register_likelihood(WaitingTimeLoss, lambda loss: WaitingTimes("WaitingTimeLoss", "mean"))

# %%
# **An optimizer.** Signs of averaged gradients. Its rule says how far a step goes for a gradient of
# one that has long been constant: by the learning rate.


class SignDescent(torch.optim.Optimizer):
    """Moves each entry by the learning rate, against the sign of its averaged gradient."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        """Keep the learning rate."""
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    average.lerp_(p.grad, 0.1)
                    p.sub_(group["lr"] * average.sign())


register_step_size(SignDescent, lambda group, state: group["lr"])

# %%
# **A layer.** A module made of known operations needs nothing, whatever its name. A recurrent layer
# is refused by name; `unsupported="diagonal"` takes the exact diagonal of its matrix, and warns.


class Sequences(nn.Module):
    """Reads sequences, and returns log rates."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.reader, self.rates = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return log rates `[N, 2]`."""
        return self.rates(self.reader(x)[0][:, -1])


torch.manual_seed(0)
model, criterion = Sequences(), WaitingTimeLoss()
first, second = (
    [(torch.randn(32, 6, 4) + shift, torch.rand(32, 2) * scale) for _ in range(4)]
    for shift, scale in ((0.0, 1.0), (3.0, 4.0))
)
try:
    EKFACPenalty().consolidate(model, criterion, first)
except ValueError as error:
    print("refused:", str(error)[:57])


@torch.no_grad()
def loss(data: list[tuple[Tensor, Tensor]]) -> float:
    """Return the mean loss."""
    return sum(float(criterion(model(x), y)) for x, y in data) / len(data)


penalty = EKFACPenalty(unsupported="diagonal")
optimizer = SignDescent(model.parameters(), lr=2e-3)
penalty.attach(optimizer, model)
for name, data in (("first", first), ("second", second)):
    for x, y in (batch for _ in range(50) for batch in data):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    print(f"after the {name} task: first {loss(first):.2f}   second {loss(second):.2f}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells which parameters get a diagonal
        penalty.consolidate(model, criterion, data)
