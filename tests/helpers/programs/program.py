"""Random programs: the source of a model, its data, and how its Fisher matrix is asked for."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.oracles import Fisher
from tests.helpers.programs import row_stages, stages, step_stages
from tests.helpers.programs.rows import on_rows
from tests.helpers.programs.source import Source, Variable

CLASSES = 3
EDGES = 6
# Inputs that have one entry for each example.
BY_EXAMPLE = ("z", "s", "t", "k", "l")
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Program:
    """A model, its data and settings, all drawn from a seed.

    Attributes:
        seed: The seed.
        text: Source of a class `Model`.
        inputs: Names of the inputs, in the order in which the model reads them.
        batches: Inputs by name, for every batch.
        sizes: Number of examples of every batch.
        targets: Targets of every batch.
        loss: The loss.
        fisher: Which Fisher matrix.
        frozen: How many of the parameters are not estimated.
        kinds: What the program contains that the package is known to refuse.
        options: Keyword arguments of the operator.
        counted: Whether the number of examples must be told.
    """

    seed: int
    text: str
    inputs: Sequence[str]
    batches: Sequence[Batch]
    sizes: Sequence[int]
    targets: Sequence[Tensor]
    loss: nn.Module
    fisher: Fisher
    frozen: int
    kinds: frozenset[str]
    options: Mapping[str, Any]
    counted: bool

    def model(self) -> nn.Module:
        """Make the model; some of its parameters do not require gradients."""
        model = make(self.text, self.seed)
        parameters = list(model.parameters())
        for parameter in random.Random(self.seed).sample(parameters, self.frozen):
            parameter.requires_grad_(False)
        return model

    def arguments(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return a batch as the model takes it."""
        return tuple(batch[name] for name in self.inputs)

    def data(self) -> list[tuple[tuple[Tensor, ...], Tensor]]:
        """Return the batches with their targets."""
        inputs = map(self.arguments, self.batches)
        return list(zip(inputs, self.targets, strict=True))

    def num_examples(self, inputs: Sequence[Tensor]) -> int:
        """Count the examples of a batch, as a user would."""
        for name, tensor in zip(self.inputs, inputs, strict=True):
            if name in BY_EXAMPLE:
                return len(tensor)
        return int(inputs[self.inputs.index("o")].max()) + 1


def make(text: str, seed: int) -> nn.Module:
    """Make the model that a source describes."""
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
    exec(compile(text, f"<program {seed}>", "exec"), names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = names["Model"]().double().eval()
    return model


def draw(seed: int) -> Program:
    """Draw a program."""
    rng = random.Random(seed)
    source = Source(rng, grouped=rng.random() < 0.6)
    start(source)
    functions, weights = zip(*stages.STAGES, strict=True)
    # Of two programs in three all stages keep the examples apart.
    where = rng.randrange(1, 6) if rng.random() < 0.2 else None
    for number in range(rng.randint(2, 6)):
        stage = stages.mixing if number == where else rng.choices(functions, weights)[0]
        stage(source)
    output = finish(source)
    source.write(f"return {output.name}")
    rng.shuffle(source.inputs)
    by_example = [name for name in source.inputs if name in BY_EXAMPLE]
    count = f"len({by_example[0]})" if by_example else "int(o.max()) + 1"
    inputs, text = list(source.inputs), source.text(count)
    batches = draw_batches(rng, inputs, grouped=source.grouped)
    sizes = [count for count, _ in batches]
    model = make(text, seed)
    with torch.no_grad():
        outputs = [model(tuple(batch[name] for name in inputs)) for _, batch in batches]
    loss, targets = draw_loss(rng, seed, outputs)
    num_parameters = len(list(model.parameters()))
    return Program(
        seed,
        text,
        inputs,
        [batch for _, batch in batches],
        sizes,
        targets,
        loss,
        rng.choice(["type2", "empirical"]),
        rng.randrange(num_parameters) // 2 if rng.random() < 0.3 else 0,
        frozenset(source.kinds),
        {
            "kfac_approx": rng.choice(["expand", "reduce"]),
            "separate_weight_and_bias": rng.random() < 0.5,
            "memory_budget": rng.choice([1, 2_000, 2**30]),
            "unsupported": "diagonal" if rng.random() < 0.1 else "error",
        },
        counted=len(by_example) < len(inputs) or rng.random() < 0.3,
    )


def start(source: Source) -> None:
    """Read one or two inputs."""
    first = {
        "z": Variable("z", "examples", 3),
        "x": Variable("x", "rows", 3, "o"),
        "s": Variable("s", "steps", 3),
    }
    for name in source.rng.sample(["z", "x", "x", "x", "s", "s"], source.rng.randint(1, 2)):
        source.read(name)
        if name == "x":
            source.read("o")
        if first[name] not in source.variables:
            source.variables.append(first[name])


def finish(source: Source) -> Variable:
    """Bring what there is to outputs, `[N, classes]` or `[N, classes, T]`."""
    last = source.variables[-1]
    if last.kind == "steps" and not last.mask and source.rng.random() < 0.3:
        call = source.linear(last.width, CLASSES)
        return source.add_plain(f"{call}({last.name}).mT", last, CLASSES)
    chosen = [last]
    if len(source.variables) > 1 and source.rng.random() < 0.5:
        chosen.append(source.rng.choice(source.variables[:-1]))
    found = []
    for variable in chosen:
        source.variables = [variable]
        if variable.kind != "examples":
            to_examples = {"steps": step_stages.summed, "rows": row_stages.pooled}
            to_examples[variable.kind](source)
        found.append(source.variables[-1])
    width = sum(variable.width for variable in found)
    joined = source.let(f"torch.cat([{', '.join(v.name for v in found)}], 1)", "h")
    if source.rng.random() < 0.3:
        expression = on_rows(source, joined, width, CLASSES)
    else:
        expression = f"{source.linear(width, CLASSES)}({joined})"
    return source.add_plain(expression, Variable("", "examples", CLASSES))


def draw_batches(
    rng: random.Random, inputs: Sequence[str], *, grouped: bool
) -> list[tuple[int, Batch]]:
    """Draw inputs; more often than not batches have the same shapes."""
    generator = torch.Generator().manual_seed(rng.randrange(10**9))
    same, found = rng.random() < 0.6, []
    size, rows, steps = rng.randint(1, 4), rng.randint(4, 8), rng.randint(2, 4)
    for _ in range(rng.randint(2, 3)):
        if not same:
            size, rows, steps = rng.randint(1, 4), rng.randint(4, 8), rng.randint(2, 4)
        # A regular layout first, and others of the same shapes later.
        regular = not found and rng.random() < 0.5
        rows = -(-rows // size) * size if regular else rows
        owners = torch.randint(size, (rows,), generator=generator)
        if regular:
            owners = torch.arange(rows) % size
        if not {*inputs} & {*BY_EXAMPLE}:
            owners[:size] = torch.arange(size)
        owners = owners.sort().values if grouped else owners
        edges = torch.randint(rows, (EDGES,), generator=generator)
        ends = [rng.choice((owners == owners[i]).nonzero().flatten().tolist()) for i in edges]
        batch = {
            "z": torch.randn(size, 3, generator=generator, dtype=torch.double),
            "x": torch.randn(rows, 3, generator=generator, dtype=torch.double),
            "s": torch.randn(size, steps, 3, generator=generator, dtype=torch.double),
            "o": owners,
            "r": torch.randint(4, (rows,), generator=generator),
            "t": torch.randint(4, (size, steps), generator=generator),
            "k": torch.rand(size, steps, generator=generator) < 0.6,
            "l": torch.randint(1, steps + 1, (size,), generator=generator),
            "e": torch.stack([edges, torch.tensor(ends)]),
            "f": torch.randint(rows, (2, 3), generator=generator),
        }
        if regular:
            batch["x"], batch["z"] = (batch[c][batch[c][:, 0].argsort()] for c in "xz")
            batch["k"], batch["l"] = batch["k"] | True, batch["l"] * 0 + steps
        found.append((size, {name: batch[name] for name in {*inputs, "o"}}))
    return found


def alone(batch: Batch, example: int) -> Batch:
    """Return one example of a batch as a batch of its own."""
    own = batch["o"] == example
    found = {}
    for name, tensor in batch.items():
        if name in BY_EXAMPLE:
            found[name] = tensor[example : example + 1]
        elif name in "ef":
            inside = own[tensor].all(dim=0)
            found[name] = own.cumsum(0)[tensor[:, inside]] - 1
        else:
            found[name] = tensor[own]
    found["o"] = torch.zeros_like(found["o"])
    return found


def draw_loss(
    rng: random.Random, seed: int, outputs: Sequence[Tensor]
) -> tuple[nn.Module, list[Tensor]]:
    """Draw a loss, with targets for the outputs of every batch."""
    generator = torch.Generator().manual_seed(seed)
    kind = rng.choice([nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss])
    targets = []
    for output in outputs:
        if kind is nn.CrossEntropyLoss:
            shape = (len(output), *output.shape[2:])
            targets.append(torch.randint(CLASSES, shape, generator=generator))
        else:
            drawn = torch.rand(output.shape, generator=generator, dtype=torch.double)
            targets.append(drawn.round() if kind is nn.BCEWithLogitsLoss else drawn)
    return kind(reduction=rng.choice(["mean", "sum"])), targets
