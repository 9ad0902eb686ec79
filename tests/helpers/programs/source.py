"""Write the source of a random model, stage by stage."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

Kind = Literal["examples", "steps", "rows"]


@dataclass(frozen=True)
class Variable:
    """A tensor of the program that is being written.

    Attributes:
        name: Its name.
        kind: What its first axes are: ``"examples"`` is ``[N, width]``, ``"steps"``
            ``[N, T, width]``, and ``"rows"`` ``[R, width]``, of which each example owns some.
        width: Size of the last axis.
        owners: For rows, the name of the vector that tells each row's example.
        mask: For steps, the name of the boolean matrix ``[N, T]`` of those that exist, if not all.
        length: For steps, what stands for their number: the same for the same T.
    """

    name: str
    kind: Kind
    width: int
    owners: str = ""
    mask: str = ""
    length: str = ""


@dataclass
class Source:
    """The source of a model while it is written.

    Attributes:
        rng: Draws.
        grouped: Whether the rows of an example follow each other in the inputs.
        layers: Lines of ``__init__``.
        lines: Lines of ``forward``.
        inputs: Names of the inputs that are read.
        variables: Tensors that a stage may start from.
        kinds: What the program contains that the package is known to refuse, or to mix.
        linears: The linear layers so far: name, size of inputs, size of outputs.
        embeddings: The embedding layers so far: name, width.
    """

    rng: random.Random
    grouped: bool
    layers: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    linears: list[tuple[str, int, int]] = field(default_factory=list)
    embeddings: list[tuple[str, int]] = field(default_factory=list)
    count: int = 0

    def read(self, name: str) -> str:
        """Take an input."""
        if name not in self.inputs:
            self.inputs.append(name)
        return name

    def fresh(self, prefix: str = "h") -> str:
        """Return a name that is free."""
        self.count += 1
        return f"{prefix}{self.count}"

    def let(self, expression: str, prefix: str = "i") -> str:
        """Write an assignment and return the name."""
        name = self.fresh(prefix)
        self.lines.append(f"{name} = {expression}")
        return name

    def write(self, *lines: str) -> None:
        """Write lines."""
        self.lines.extend(lines)

    def own(self, expression: str, prefix: str = "l") -> str:
        """Register a module or a parameter, and return how `forward` names it."""
        name = self.fresh(prefix)
        self.layers.append(f"self.{name} = {expression}")
        return f"self.{name}"

    def parameter(self, *shape: int) -> str:
        """Register a parameter."""
        return self.own(f"nn.Parameter(torch.randn({', '.join(map(str, shape))}))", "p")

    def linear(self, width: int, out: int) -> str:
        """Return a linear layer: a new one, or one that was used before."""
        fitting = [name for name, d_in, d_out in self.linears if (d_in, d_out) == (width, out)]
        if fitting and self.rng.random() < 0.3:
            return self.rng.choice(fitting)
        bias = "" if self.rng.random() < 0.7 else ", bias=False"
        name = self.own(f"nn.Linear({width}, {out}{bias})")
        self.linears.append((name, width, out))
        return name

    def layer(self, width: int, out: int) -> str:
        """Return something to call on ``[*, width]`` that returns ``[*, out]``."""
        draw = self.rng.random()
        if draw < 0.7:
            return self.linear(width, out)
        if draw < 0.76:
            weight = self.parameter(out, width)
            return f"(lambda a: F.linear(a, {weight}))"
        if draw < 0.82:
            weight = self.parameter(width, out)
            return f"(lambda a: a @ {weight})"
        tied = [(n, i) for n, i, o in self.linears if (o, i) == (width, out)]
        if tied and draw < 0.9:
            return f"(lambda a: a @ {self.rng.choice(tied)[0]}.weight)"
        if width == out and draw < 0.95:
            scale, shift = self.parameter(width), self.parameter(width)
            return f"(lambda a: a * {scale} + {shift})"
        if width == out:
            return self.own(f"nn.LayerNorm({width})")
        return self.linear(width, out)

    def add(self, expression: str, like: Variable, width: int | None = None) -> Variable:
        """Write a tensor that later stages may use."""
        activation = self.rng.choice(["", ".tanh()", ".relu()", ".sigmoid()", ".tanh()"])
        if not activation and self.rng.random() < 0.1:
            expression, activation = f"F.gelu({expression})", ""
        elif activation:
            expression = f"({expression}){activation}"
        made = replace(like, name=self.let(expression, "h"), width=width or like.width)
        self.variables.append(made)
        return made

    def add_plain(self, expression: str, like: Variable, width: int | None = None) -> Variable:
        """Write a tensor likewise, as it is."""
        made = replace(like, name=self.let(expression, "h"), width=width or like.width)
        self.variables.append(made)
        return made

    def pick(self, *kinds: Kind) -> Variable | None:
        """Return a variable of one of these kinds, a recent one more often than others."""
        fitting = [variable for variable in self.variables if variable.kind in kinds]
        if not fitting:
            return None
        return fitting[-1] if self.rng.random() < 0.6 else self.rng.choice(fitting)

    def text(self, count: str) -> str:
        """Return the source of the whole model, in which an expression counts the examples."""
        names = ", ".join(self.inputs)
        head = ["class Model(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        body = ["    def forward(self, batch):", f"        {names}, = batch"]
        body.append(f"        n = {count}")
        init = [f"        {line}" for line in self.layers]
        return "\n".join([*head, *init, *body, *(f"        {line}" for line in self.lines)])


Stage = Callable[[Source], None]
