"""Save the Fisher matrices of two tasks, look into one, and compare them.

The same is done by `python -m rotate_ewc inspect FILE` and `python -m rotate_ewc diff A B`.
"""
# ruff: noqa: T201

# %%
# Two networks learn the same handwritten digits; for the second one the pixels are shuffled. Each
# matrix is estimated on the data that its network was trained on, and written to a file.

import torch
from sklearn.datasets import load_digits
from torch import nn

from rotate_ewc import EKFACLinearOperator, merge

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
criterion = nn.CrossEntropyLoss()
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def learn(pixels: torch.Tensor, path: str) -> None:
    """Train on the images with their pixels in an order, and save the Fisher matrix."""
    data = list(zip(images[:, pixels].split(64), labels.split(64), strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for x, y in (batch for _ in range(15) for batch in data):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    EKFACLinearOperator(model, criterion, list(model.parameters()), data).save(path)


learn(torch.arange(64), "first.safetensors")
learn(torch.arange(64), "again.safetensors")
learn(torch.randperm(64), "second.safetensors")

# %%
# A file holds the matrix and where it comes from. The effective rank `(Σλ)² / Σλ²` says how many
# directions matter.

fisher = EKFACLinearOperator.load("first.safetensors")
print(fisher.provenance)
for block in fisher.blocks:
    values = block.spectrum.flatten()
    effective = float(values.sum() ** 2 / values.square().sum())
    print(f"{block.label:9} {values.numel():5} directions, effective rank {effective:5.1f}, "
          f"trace {float(block.trace):.3g}")  # fmt: skip

# %%
# How alike two matrices are: the cosine `tr(AB) / (‖A‖ ‖B‖)`, here by products with random
# vectors, since `E[(Av)ᵀ(Bv)] = tr(AB)`.


def cosine(a: EKFACLinearOperator, b: EKFACLinearOperator) -> float:
    """Estimate the cosine of two matrices over the same parameters."""
    v = torch.randn(a.shape[0], 2000, generator=torch.Generator().manual_seed(0))
    return float(((a @ v) * (b @ v)).sum() / ((a @ v).norm() * (b @ v).norm()))


again, second = map(EKFACLinearOperator.load, ("again.safetensors", "second.safetensors"))
print(f"the same task, trained further: cosine {cosine(fisher, again):.2f}")
print(f"another task:                   cosine {cosine(fisher, second):.2f}")

# %%
# Two matrices merge into one of the same size, whose trace is exactly the sum.

both = merge([fisher, second])
print(f"traces {float(fisher.trace):.4f} + {float(second.trace):.4f} = {float(both.trace):.4f}")
