"""Draw the pictures of "Understand" from handwritten digits: `python docs/pictures/understand.py`.

MNIST is taken from `$ROTATE_EWC_DATA` or `./data`, or else scikit-learn's digits. Three minutes on
one core. With names (`python docs/pictures/understand.py toy thin`) only those are drawn.
"""
# ruff: noqa: T201

import copy
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from torch import Tensor, nn

from rotate_ewc import Block, EKFACLinearOperator, EKFACPenalty, merge

FOLDER = Path(__file__).parent
# Colours of Okabe and Ito; lines differ in dashes and markers too.
RED, BLUE, GREEN, BLACK = "#D55E00", "#0072B2", "#009E73", "#000000"
LOSS = nn.CrossEntropyLoss()
Data = list[tuple[Tensor, Tensor]]


def images(side: int = 28, count: int = 10_000) -> tuple[Tensor, Tensor]:
    """Return images of digits, `[count, side²]`, at most as fine as they are, and their labels."""
    folder = Path(os.environ.get("ROTATE_EWC_DATA", "data"))
    if (folder / "MNIST" / "raw").is_dir():
        from torchvision.datasets import MNIST

        digits = MNIST(str(folder), train=True)
        pixels, labels = digits.data[:count].float() / 255, digits.targets[:count]
    else:
        from sklearn.datasets import load_digits

        found = load_digits()
        pixels, labels = torch.tensor(found.images).float() / 16, torch.tensor(found.target)
    side = min(side, pixels.shape[1])
    return nn.functional.adaptive_avg_pool2d(pixels[:, None], side).flatten(1), labels


def batches(x: Tensor, y: Tensor, size: int = 100) -> Data:
    """Cut examples into batches."""
    return list(zip(x.split(size), y.split(size), strict=True))


def train(
    model: nn.Module, data: Data, penalty: EKFACPenalty | None = None, epochs: int = 3
) -> None:
    """Train with Adam, with a penalty attached if there is one."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    if penalty is not None:
        penalty.attach(optimizer, model)
    for x, y in (batch for _ in range(epochs) for batch in data):
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Return the percentage of examples that are classified correctly."""
    return 100 * float(torch.cat([model(x).argmax(dim=1) == y for x, y in data]).float().mean())


@torch.no_grad()
def exact_fisher(model: nn.Sequential, layer: nn.Linear, x: Tensor) -> Tensor:
    """Return the exact Fisher matrix of a layer's weight, from the Jacobians of single examples."""

    def outputs(weight: Tensor, example: Tensor) -> Tensor:
        names = {id(p): name for name, p in model.named_parameters()}
        return torch.func.functional_call(model, {names[id(layer.weight)]: weight}, (example,))

    found = torch.zeros(layer.weight.numel(), layer.weight.numel())
    for part in x.split(100):
        jacobian = torch.func.vmap(torch.func.jacrev(outputs), in_dims=(None, 0))(
            layer.weight, part
        ).flatten(2)
        p = model(part).softmax(dim=1)
        hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        found += torch.einsum("nci,ncd,ndj->ij", jacobian, hessian, jacobian)
    return found / len(x)


def small() -> tuple[nn.Sequential, Tensor, Tensor, Tensor, Tensor]:
    """Return a small trained network, data, and a layer's exact matrix with our basis of it."""
    torch.manual_seed(0)
    x, y = images(7, 4000)
    model = nn.Sequential(nn.Linear(x.shape[1], 12), nn.Tanh(), nn.Linear(12, 10))
    train(model, batches(x, y), epochs=12)
    exact = exact_fisher(model, model[2], x[:2000])
    fisher = EKFACLinearOperator(
        model, LOSS, {"2.weight": model[2].weight}, batches(x[:2000], y[:2000]),
        fisher_type="type2", check_deterministic=False,
    )  # fmt: skip
    block = fisher.block("2.weight")
    basis = torch.kron(block.gradient_basis[0], block.activation_basis[0])
    order = block.eigenvalues.flatten().argsort(descending=True)
    return model, x, y, exact, basis[:, order]


def bases() -> None:
    """Draw one layer's Fisher matrix in two bases, and its spectrum."""
    _, _, _, exact, basis = small()
    rotated = basis.T @ exact @ basis
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.5))
    norm = LogNorm(1e-4 * float(exact.abs().max()), float(rotated.abs().max()), clip=True)
    for axes, matrix, title in (
        (left, exact, "in the basis of the weights"),
        (right, rotated, "in the rotated basis"),
    ):
        shown = axes.imshow(matrix.abs(), cmap="cividis", norm=norm, interpolation="nearest")
        part = float(matrix.diag().square().sum() / matrix.square().sum())
        axes.set_title(f"{title}\nthe diagonal is {part:.0%} of ‖F‖²", fontsize="medium")
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(shown, ax=(left, right), label="absolute value", shrink=0.8)
    save(figure, "fisher_bases")

    figure, axes = plt.subplots(figsize=(7, 3))
    true = torch.linalg.eigvalsh(exact).flip(0).clamp(min=1e-12)
    lines = (
        (true, BLACK, "-", "eigenvalues of the exact matrix"),
        (rotated.diag(), RED, "--", "diagonal in the rotated basis"),
        (exact.diag(), BLUE, ":", "diagonal in the basis of the weights"),
    )
    for values, colour, dashes, label in lines:
        sorted_ = values.sort(descending=True).values
        axes.semilogy(range(1, len(sorted_) + 1), sorted_, dashes, color=colour, label=label, lw=2)
    axes.set_ylim(float(true[0]) * 1e-6, float(true[0]) * 2)
    axes.set_xlabel("direction, from the stiffest to the freest")
    axes.set_ylabel("curvature")
    finish(axes)
    save(figure, "spectrum")


def directions() -> None:
    """Draw the loss along directions that the penalty keeps stiff, and along free ones."""
    model, x, y, exact, basis = small()
    weight, value = model[2].weight.detach().clone(), torch.linspace(-2, 2, 41)
    figure, axes = plt.subplots(figsize=(7, 3))
    with torch.no_grad():
        base = float(LOSS(model(x), y))
        scale = weight.norm() / 4
        chosen = (
            (0, RED, "-", "stiffest direction"),
            (8, BLUE, "--", "9th"),
            (30, GREEN, "-.", "31st"),
            (basis.shape[1] - 1, BLACK, ":", "freest direction, the 120th"),
        )
        for index, colour, dashes, label in chosen:
            direction = basis[:, index].reshape(weight.shape) * scale
            losses = []
            for step in value:
                model[2].weight.copy_(weight + step * direction)
                losses.append(float(LOSS(model(x), y)) - base)
            axes.plot(value, losses, dashes, color=colour, label=label, lw=2)
            if index == 0:
                curve = 0.5 * (scale * value) ** 2 * (basis[:, 0] @ exact @ basis[:, 0])
                axes.plot(value, curve, color="#999999", lw=1, label="its quadratic approximation")
    axes.set_ylim(-0.05, 1.0)
    axes.set_xlabel("step, in quarters of the size of the weights")
    axes.set_ylabel("increase of the loss")
    finish(axes)
    save(figure, "directions")


def toy() -> None:
    """Draw two regressions on two weights, learned with a diagonal and with a rotated penalty."""
    torch.manual_seed(0)
    turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / math.sqrt(2)
    first = torch.randn(500, 2) * torch.tensor([1.5, 0.12]) @ turn.T  # the inputs are correlated
    second = torch.randn(500, 2) * torch.tensor([0.5, 0.6])
    best_first, best_second = torch.tensor([1.0, 1.0]), torch.tensor([2.5, 0.1])
    matrices = [2 * inputs.T @ inputs / len(inputs) for inputs in (first, second)]
    # The operator's own matrix of the first task: with a squared error it is exact.
    layer = nn.Linear(2, 1, bias=False)
    data = [(first, first @ best_first[:, None])]
    params = list(layer.parameters())
    rotated = EKFACLinearOperator(layer, nn.MSELoss(), params, data, fisher_type="type2").to_dense()
    diagonal = rotated.diag().diag()
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.6), sharex=True, sharey=True)
    grid = torch.meshgrid(
        torch.linspace(-0.2, 3.2, 200), torch.linspace(-1.4, 2.2, 200), indexing="xy"
    )
    points = torch.stack(grid, dim=-1)

    def height(best: Tensor, matrix: Tensor, at: Tensor) -> Tensor:
        return 0.5 * torch.einsum("...i,ij,...j->...", at - best, matrix, at - best)

    def solution(penalty: Tensor) -> Tensor:
        pull = matrices[1] @ best_second + penalty @ best_first
        return torch.linalg.solve(matrices[1] + penalty, pull)

    def losses(at: Tensor) -> list[float]:
        pairs = zip((best_first, best_second), matrices, strict=True)
        return [float(height(best, matrix, at)) for best, matrix in pairs]

    for axes, penalty, title in ((left, diagonal, "diagonal"), (right, rotated, "rotated")):
        axes.contour(*grid, height(best_first, matrices[0], points), [0.05, 0.2, 0.6, 1.5],
                     colors=BLUE, linewidths=1)  # fmt: skip
        axes.contour(*grid, height(best_second, matrices[1], points), [0.05, 0.2, 0.6, 1.5],
                     colors=RED, linewidths=1, linestyles="dashed")  # fmt: skip
        axes.contour(*grid, height(best_first, penalty, points), [0.6], colors=BLACK, linewidths=2,
                     linestyles="dotted")  # fmt: skip
        # Each has the strength that is best for the sum of both losses.
        factor, together = min(
            ((10**power, solution(10**power * penalty)) for power in torch.linspace(-2, 1, 61)),
            key=lambda one: sum(losses(one[1])),
        )
        ends = losses(together)
        print(f"toy, {title}: loss of the first task {ends[0]:.3f}, of the second {ends[1]:.3f}")
        axes.annotate("", together, best_first, arrowprops={"arrowstyle": "->", "lw": 1.5})
        axes.plot(*best_first, "s", color=BLUE, ms=7)
        axes.plot(*best_second, "^", color=RED, ms=7)
        axes.plot(*together, "o", color=BLACK, ms=7)
        axes.set_title(
            f"{title} penalty, λ = {factor:.2g}\nlosses: first {ends[0]:.2f}, second {ends[1]:.2f}",
            fontsize="medium",
        )
        axes.set_xlabel("first weight")
        axes.set_aspect("equal")
    left.set_ylabel("second weight")
    ground = {"boxstyle": "round", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for text, place, colour in (
        ("first task", (0.75, 0.55), BLUE),
        ("second task", (2.5, -0.75), RED),
    ):
        left.annotate(text, place, ha="center", color=colour, bbox=ground)
    save(figure, "toy")


def merging() -> None:
    """Draw what merging costs in memory and accuracy of the matrix, over ten tasks."""
    torch.manual_seed(0)
    x, y = images(14, 6000)
    model = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 10))
    penalty, merged = EKFACPenalty(), None
    operators, ratios, memories = [], [], []
    for _ in range(10):
        data = batches(x[:, torch.randperm(x.shape[1])], y)
        train(model, data, penalty, epochs=2)
        penalty.consolidate(model, LOSS, data[:20])
        params = list(model.parameters())
        one = EKFACLinearOperator(model, LOSS, params, data[:20], check_deterministic=False)
        operators.append(one)
        merged = one if merged is None else merge([merged, one])
        memories.append(sum(num_bytes(block) for block in merged.blocks) / 2**20)
        # How well it weighs the steps that forget: those of training on a new task, unprotected.
        found = []
        for _ in range(3):
            other = copy.deepcopy(model)
            train(other, batches(x[:, torch.randperm(x.shape[1])], y)[:20], epochs=1)
            step = [
                new.detach() - old.detach()
                for new, old in zip(other.parameters(), params, strict=True)
            ]
            exact = sum(float(operator.quadratic_form(step)) for operator in operators)
            found.append(float(merged.quadratic_form(step)) / exact)
        ratios.append((min(found), sum(found) / len(found), max(found)))
    tasks = list(range(1, 11))
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3))
    separate = [memories[0] * count for count in tasks]
    left.plot(tasks, memories, "o-", color=RED, lw=2, label="merged")
    left.plot(tasks, separate, "s--", color=BLUE, lw=2, label="one for each task")
    left.set_ylabel("memory [MiB]")
    left.set_ylim(0)
    low, mean, high = zip(*ratios, strict=True)
    right.fill_between(tasks, low, high, color=RED, alpha=0.2, lw=0, label="3 new tasks")
    right.plot(tasks, mean, "o-", color=RED, lw=2, label="their mean")
    right.axhline(1, color=BLACK, lw=1, ls=":")
    right.set_ylim(0, 2)
    right.set_ylabel("ΔᵀFΔ, merged / exact sum")
    for axes in (left, right):
        axes.set_xlabel("tasks")
        finish(axes)
    print("merging:", [f"{m:.2f}" for m in mean])
    save(figure, "merging")


def thin() -> None:
    """Draw how much of a wide layer's matrix a thin basis keeps."""
    torch.manual_seed(0)
    x, y = images(28, 4000)
    model = nn.Sequential(nn.Linear(x.shape[1], 100), nn.ReLU(), nn.Linear(100, 10))
    train(model, batches(x, y), epochs=3)
    data, weight = batches(x[:2000], y[:2000]), {"0.weight": model[0].weight}

    def estimate(rank: int | str) -> EKFACLinearOperator:
        return EKFACLinearOperator(model, LOSS, weight, data, rank=rank, check_deterministic=False)

    full = estimate("full")
    ranks = [r for r in (4, 8, 16, 32, 64, 128, 256, 512) if r < x.shape[1]]
    captured, dropped, sizes, traces = [], [], [], []
    for rank in ranks:
        operator = estimate(rank)
        block = operator.block("0.weight")
        kept = block.eigenvalues[:, : block.ranks[0], : block.ranks[1]]
        captured.append(100 * float((operator.frobenius_norm / full.frobenius_norm) ** 2))
        dropped.append(100 * float(kept.sum() / full.trace))
        traces.append(100 * float(operator.trace / full.trace))
        sizes.append(num_bytes(block) / model[0].weight.nbytes)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3))
    left.semilogx(ranks, traces, "o-", color=RED, lw=2, label="trace, with the mean outside")
    left.semilogx(ranks, dropped, "s--", color=BLUE, lw=2, label="trace of the kept part alone")
    left.semilogx(ranks, captured, "^-.", color=GREEN, lw=2, label="‖F‖²")
    left.set_ylabel("percent of the full matrix")
    left.set_ylim(0, 105)
    right.loglog(ranks, sizes, "o-", color=RED, lw=2)
    right.axhline(1, color=BLACK, lw=1, ls=":", label="the layer itself")
    right.set_ylabel("snapshot / layer")
    for axes in (left, right):
        axes.set_xticks(ranks, ranks)
        axes.minorticks_off()
        axes.set_xlabel("rank")
        finish(axes)
    print("thin:", list(zip(ranks, captured, dropped, sizes, strict=True)))
    save(figure, "thin")


def strength() -> None:
    """Draw what is kept and what is learned at different strengths, on two kinds of streams."""
    x, y = images(14, 6000)
    torch.manual_seed(1)
    order = torch.randperm(x.shape[1])
    low = y < 5
    streams = {
        "other pixels": ((x, y), (x[:, order], y)),
        "other digits, same question": ((x[low], y[low] % 2), (x[~low], y[~low] % 2)),
    }
    figure, grid = plt.subplots(1, 2, figsize=(7, 3.2), sharey=True)
    for axes, (title, (first, second)) in zip(grid, streams.items(), strict=True):
        tried = [10.0**e for e in (-2, -1, 0, 1, 2, 3, 4)]
        found = [outcome(first, second, value) for value in [*tried, "auto"]]
        auto = found.pop()
        axes.semilogx(tried, [f[0] for f in found], "o-", color=BLUE, lw=2, label="first task")
        axes.semilogx(tried, [f[1] for f in found], "s--", color=RED, lw=2, label="second task")
        axes.axvline(auto[2], color=BLACK, ls=":", lw=2, label=f"found: {auto[2]:.2g}")
        print(f"strength, {title}: auto {auto}, {list(zip(tried, found, strict=True))}")
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("strength λ")
        finish(axes)
    grid[0].set_ylabel("accuracy after both tasks [%]")
    save(figure, "strength")


def outcome(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], value: float | str
) -> tuple[float, float, float]:
    """Learn two tasks; return both accuracies on held-out images, and the strength."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(first[0].shape[1], 64), nn.ReLU(), nn.Linear(64, 10))
    penalty = EKFACPenalty(value)
    tests = []
    for x, y in (first, second):
        cut = 5 * len(x) // 6
        tests.append(batches(x[cut:], y[cut:]))
        data = batches(x[:cut], y[:cut])
        train(model, data, penalty, epochs=4)
        if len(tests) == 1:
            penalty.consolidate(model, LOSS, data[:20])
    return accuracy(model, tests[0]), accuracy(model, tests[1]), penalty.strength


def num_bytes(block: Block) -> int:
    """Return the memory that a block takes."""
    tensors = (block.gradient_basis, block.activation_basis, block.eigenvalues)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def finish(axes: Axes) -> None:
    """Add a legend and a pale grid."""
    axes.grid(alpha=0.3, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")


def save(figure: plt.Figure, name: str) -> None:
    """Write a picture next to this file."""
    figure.savefig(FOLDER / f"{name}.png", dpi=150, metadata={"Software": None})
    plt.close(figure)


PICTURES: dict[str, Callable[[], None]] = {
    "bases": bases,
    "directions": directions,
    "toy": toy,
    "merging": merging,
    "thin": thin,
    "strength": strength,
}

if __name__ == "__main__":
    mpl.rcParams.update({"figure.constrained_layout.use": True, "font.size": 9})
    for chosen in sys.argv[1:] or PICTURES:
        PICTURES[chosen]()
