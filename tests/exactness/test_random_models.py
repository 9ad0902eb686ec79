"""Models put together at random: layers in any order, any layout of the axes, any sharing."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotate_ewc import EKFACLinearOperator
from tests.helpers.cases import LOSSES
from tests.helpers.cases.losses import make_targets
from tests.helpers.exactness import EXACT_FISHERS
from tests.helpers.oracles import block_matrix, dense_fisher, in_own_basis, parameter_shapes

EXAMPLES = 7
# A step reads layers and parameters from the model, so that a copy of the model has its own.
Step = Callable[[Any, Tensor], Tensor]


class Random(nn.Module):
    """A random sequence of layers on tokens, whose axes are moved about meanwhile.

    Attributes:
        layout: Order of the axes: ``"NT"``, ``"TN"``, or merged into rows in either order.
        length: Number of tokens of an example.
        width: Size of a token, at the end of what was drawn so far.
        vocabulary: Number of different tokens; 0 for real inputs.
        output_shape: Shape of one output.
    """

    def __init__(self, rng: random.Random) -> None:
        """Draw the layers."""
        super().__init__()
        self.length, self.width, self.layout = rng.randint(1, 4), rng.randint(2, 4), "NT"
        self.input_shape: tuple[int, ...] = (self.length, self.width)
        self.output_shape: tuple[int, ...] = (3,)
        self.vocabulary = rng.choice([0, 0, 5])
        self.layers = nn.ModuleList()
        self.steps: list[Step] = []
        if self.vocabulary:
            self.input_shape = (self.length,)
            self.use(nn.Embedding(self.vocabulary, self.width, padding_idx=rng.choice([None, 1])))
        for _ in range(rng.randint(2, 6)):
            draw = rng.choice(
                [
                    *(self.linear, self.linear, self.product, self.norm, self.elementwise),
                    *(self.turn, self.turn, self.turn, self.again, self.attention, self.computed),
                ]
            )
            draw(rng)
            activation = rng.choice([torch.tanh, torch.relu, F.gelu, torch.clone])
            self.steps.append(lambda m, x, activation=activation: activation(x))
        self.end(rng)

    def use(self, layer: nn.Module) -> None:
        """Register a layer and call it."""
        index = len(self.layers)
        self.layers.append(layer)
        self.steps.append(lambda m, x: m.layers[index](x))

    def own(self, *shape: int) -> str:
        """Register a parameter and return its name."""
        name = f"p{len(self._parameters)}"
        self.register_parameter(name, nn.Parameter(0.7 * torch.randn(*shape)))
        return name

    def linear(self, rng: random.Random) -> None:
        """Add a Linear of another width."""
        width = rng.randint(2, 4)
        self.use(nn.Linear(self.width, width, bias=rng.random() < 0.8))
        self.width = width

    def product(self, rng: random.Random) -> None:
        """Add a product with a parameter."""
        width = rng.randint(2, 4)
        w = self.own(self.width, width)
        self.width = width
        self.steps.append(lambda m, x: x @ getattr(m, w))

    def norm(self, rng: random.Random) -> None:
        """Add a normalisation whose scale and shift are not 1 and 0."""
        layer = rng.choice([nn.LayerNorm, nn.RMSNorm])(self.width, eps=0.1)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        self.use(layer)

    def elementwise(self, rng: random.Random) -> None:
        """Add a scale or a shift, for all tokens or for each of them."""
        shapes = {"NT": (self.length, self.width), "TN": (self.length, 1, self.width)}
        shape = shapes.get(self.layout) if rng.random() < 0.6 else None
        own = self.own(*(shape or (self.width,)))
        kinds: list[Step] = [
            lambda m, x: x * getattr(m, own),
            lambda m, x: getattr(m, own) + x,
            lambda m, x: x * (1 + getattr(m, own)),
        ]
        self.steps.append(rng.choice(kinds))

    def computed(self, rng: random.Random) -> None:
        """Add layers whose weights are computed from parameters, or are also used as others."""
        own, scale = self.own(self.width, self.width), self.own(self.width)
        kinds: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
            lambda x, w, s: F.linear(x, w * s.exp()),
            lambda x, w, s: x @ w.t() + F.linear(x, w, s),
            lambda x, w, s: F.linear(F.linear(x, w + w.mT), w, s) * s,
            lambda x, w, s: x + F.linear(s, w),
        ]
        kind = rng.choice(kinds)
        self.steps.append(lambda m, x: kind(x, getattr(m, own), getattr(m, scale)))

    def attention(self, rng: random.Random) -> None:
        """Add self- or cross-attention between tokens, where they have an axis of their own."""
        if self.layout not in ("NT", "TN"):
            return
        index, other = len(self.layers), rng.random() < 0.5
        self.layers.append(nn.MultiheadAttention(self.width, 1, batch_first=self.layout == "NT"))

        def attend(m: Any, x: Tensor) -> Tensor:
            key = x.tanh() if other else x
            attended: Tensor = m.layers[index](x, key, key, need_weights=False)[0]
            return attended

        self.steps.append(attend)

    def again(self, rng: random.Random) -> None:
        """Call an earlier layer again, if one fits."""
        fitting = [
            index
            for index, layer in enumerate(self.layers)
            if isinstance(layer, nn.Linear) and layer.in_features == self.width
        ]
        if fitting:
            index = rng.choice(fitting)
            self.width = self.layers[index].out_features
            self.steps.append(lambda m, x: m.layers[index](x))

    def turn(self, rng: random.Random) -> None:
        """Move the axes."""
        length = self.length
        to_batch_first: dict[str, Callable[[Tensor], Tensor]] = {
            "NT": lambda x: x,
            "TN": lambda x: x.transpose(0, 1),
            "N*T": lambda x: x.unflatten(0, (-1, length)),
            "T*N": lambda x: x.unflatten(0, (length, -1)).transpose(0, 1),
        }
        from_batch_first: dict[str, Callable[[Tensor], Tensor]] = {
            "NT": lambda x: x,
            "TN": lambda x: x.transpose(0, 1),
            "N*T": lambda x: x.flatten(0, 1),
            "T*N": lambda x: x.transpose(0, 1).flatten(0, 1),
        }
        back = to_batch_first[self.layout]
        self.layout = rng.choice([*from_batch_first])
        on = from_batch_first[self.layout]
        self.steps.append(lambda m, x: on(back(x)))

    def end(self, rng: random.Random) -> None:
        """Move the batch axis first, and pool, pick, flatten or keep the tokens."""
        while self.layout != "NT":
            self.turn(rng)
        kind, position = rng.choice(["mean", "pick", "all", "keep"]), rng.randrange(self.length)
        if kind == "mean":
            self.steps.append(lambda m, x: x.mean(dim=1))
        elif kind == "pick":
            self.steps.append(lambda m, x: x[:, position])
        elif kind == "all":
            self.steps.append(lambda m, x: x.flatten(1))
            self.width *= self.length
        self.use(nn.Linear(self.width, 3))
        if kind == "keep":
            self.output_shape = (3, self.length)
            self.steps.append(lambda m, x: x.transpose(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Run all steps."""
        for step in self.steps:
            x = step(self, x)
        return x


def cut(rng: random.Random, total: int) -> list[int]:
    """Cut a number of examples into batches."""
    sizes = []
    while total:
        sizes.append(rng.randint(1, min(4, total)))
        total -= sizes[-1]
    return sizes


# Of some, the parameters that are chosen have no effect: the exact matrix is zero then, too.
@pytest.mark.filterwarnings("ignore:the Fisher matrix has vanished:RuntimeWarning")
@pytest.mark.parametrize(
    "seed",
    [*range(24), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(24, 100))],
)
def test_random_model(seed: int) -> None:
    """Eigenvalues are the exact diagonal in their own basis, whatever the model and the choices."""
    rng = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Random(rng).double().eval()
        shape = (EXAMPLES, *model.input_shape)
        x = torch.randint(5, shape) if model.vocabulary else torch.randn(shape).double()
    loss, reduction = rng.choice([*LOSSES]), rng.choice(["mean", "sum"])
    loss_func = LOSSES[loss].make(reduction, model.output_shape)
    y = make_targets(LOSSES[loss], EXAMPLES, 1, model.output_shape)
    names = [name for name, _ in model.named_parameters()]
    names = rng.sample(names, rng.randint((len(names) + 1) // 2, len(names)))
    sizes, fisher = cut(rng, EXAMPLES), rng.choice(EXACT_FISHERS)
    operator = EKFACLinearOperator(
        model,
        loss_func,
        {name: model.get_parameter(name) for name in names},
        list(zip(torch.split(x, sizes), torch.split(y, sizes), strict=True)),
        fisher_type=fisher,
        kfac_approx=rng.choice(["expand", "reduce"]),
        separate_weight_and_bias=rng.random() < 0.5,
        memory_budget=rng.choice([1, 10_000, 2**30]),
    )
    dense = dense_fisher(model, loss_func, names, x, y, fisher)
    shapes = parameter_shapes(model, names)
    assert [*operator.parameter_shapes] == names
    for block in operator.blocks:
        groups = block.eigenvalues.shape[0]
        matrix = block_matrix(dense, shapes, block.parameters, groups, block.transposed)
        error = (block.eigenvalues - in_own_basis(block, matrix)).abs().max()
        assert error <= 1e-10 * dense.abs().max(), block.label
    assert float(operator.trace) == pytest.approx(float(dense.trace()), rel=1e-10)
