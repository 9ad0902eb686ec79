"""Draw networks from the Laplace posterior, and see where a regression is unsure.

The posterior of the weights is close to the normal distribution `N(θ*, (F / 2σ² + I / s²)⁻¹)`: F is
the matrix of the summed squared error, σ the noise of the data, and s the deviation of the prior.
"""
# ruff: noqa: T201

# %%
# Noisy values of a sine, with a gap in the middle.

import torch
from torch import nn
from torch.func import functional_call

from rotate_ewc import EKFACLinearOperator

torch.manual_seed(0)
NOISE, PRIOR = 0.15, 1.0
x = torch.cat([torch.linspace(-3, -1, 60), torch.linspace(1, 3, 60)])[:, None]
y = x.sin() + NOISE * torch.randn_like(x)
model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-4)
for _ in range(1500):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()

# %%
# The negative log-likelihood is the sum of `(f - y)² / 2σ²`, so the matrix of the summed squared
# error is divided by `2σ²`. `sample` draws from `N(0, (F + damping · I)⁻¹)`; the damping is the
# precision of the prior.

criterion = nn.MSELoss(reduction="sum")
params = dict(model.named_parameters())
fisher = EKFACLinearOperator(model, criterion, params, [(x, y)], fisher_type="type2", rank="full")
posterior = (1 / (2 * NOISE**2)) * fisher
draws = posterior.sample(200, damping=1 / PRIOR**2, generator=torch.Generator().manual_seed(0))

# %%
# Predictions of the drawn networks to first order in the weights, `f(x; θ*) + J(x) δ`: the
# approximation from which the normal distribution comes.

grid = torch.linspace(-4, 4, 161)[:, None]


def function(values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the network's outputs on the grid, with other parameters."""
    return functional_call(model, values, (grid,)).flatten()


def linearised(*steps: torch.Tensor) -> torch.Tensor:
    """Return the change of the outputs, to first order."""
    tangents = dict(zip(params, steps, strict=True))
    return torch.func.jvp(function, (params,), (tangents,))[1]


changes = torch.func.vmap(linearised, in_dims=-1)(*draws).detach()
mean, deviation = function(params).detach(), changes.std(dim=0)
for name, place in (("in the data", 2.0), ("in the gap", 0.0), ("outside", 4.0)):
    nearest = int((grid.flatten() - place).abs().argmin())
    print(
        f"x = {place:.0f}, {name:12} {float(mean[nearest]):5.2f} ± {float(deviation[nearest]):.2f}"
    )

# %%
# If Matplotlib is installed, a picture.

try:
    import matplotlib.pyplot as plt
except ModuleNotFoundError:
    raise SystemExit from None
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
ends = mean - 2 * deviation, mean + 2 * deviation
axes.fill_between(grid.flatten(), *ends, alpha=0.25, color="#0072B2", lw=0, label="± 2 deviations")
axes.plot(grid, mean, color="#0072B2", lw=2, label="the network")
axes.plot(x, y, ".", color="#D55E00", ms=4, label="data")
axes.set_ylim(-3, 3)
axes.legend(frameon=False, ncols=3)
figure.savefig("laplace_uncertainty.png", dpi=150)
