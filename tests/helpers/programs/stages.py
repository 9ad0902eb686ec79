"""Stages on any tensors, stages that mix examples, and how often each stage is taken."""

from dataclasses import replace

from tests.helpers.programs import row_stages, step_stages
from tests.helpers.programs.rows import on_rows
from tests.helpers.programs.source import Source, Stage, Variable


def layer(s: Source) -> None:
    """A layer on whatever there is, whose leading axes are merged, turned, or stay."""
    h = s.pick("examples", "steps", "rows")
    if h is None:
        return
    out = s.rng.randint(2, 4)
    if h.kind != "steps":
        s.add(on_rows(s, h.name, h.width, out), h, out)
        return
    kind = s.rng.randrange(4)
    if kind == 0:
        s.add(f"{s.layer(h.width, out)}({h.name})", h, out)
    elif kind == 1:
        s.add(f"{s.layer(h.width, out)}({h.name}.transpose(0, 1)).transpose(0, 1)", h, out)
    elif kind == 2:
        a = s.let(f"{h.name}.flatten(0, 1)", "a")
        s.add(f"({on_rows(s, a, h.width, out)}).unflatten(0, (n, -1))", h, out)
    else:
        a = s.let(f"{h.name}.transpose(0, 1).flatten(0, 1)", "a")
        s.add(f"({on_rows(s, a, h.width, out)}).unflatten(0, (-1, n)).transpose(0, 1)", h, out)


def in_place(s: Source) -> None:
    h = s.pick("examples", "steps", "rows")
    if h is not None:
        b = s.let(f"{s.layer(h.width, h.width)}({h.name})", "b")
        p = s.parameter(h.width)
        s.write(
            s.rng.choice([f"{b}.mul_(2)", f"{b} += {p}", f"{b}.add_({h.name})", f"{b}.tanh_()"])
        )
        s.add(b, h)


def joined(s: Source) -> None:
    """Two tensors of a kind, side by side or one after the other."""
    h = s.pick("examples", "steps", "rows")
    if h is None:
        return
    others = [
        v for v in s.variables if replace(v, name="", width=0) == replace(h, name="", width=0)
    ]
    other = s.rng.choice(others)
    if h.width != other.width or s.rng.random() < 0.5:
        width = h.width + other.width
        if width <= 6:
            s.add_plain(f"torch.cat([{h.name}, {other.name}], -1)", h, width)
    elif h.kind == "steps" and not h.mask:
        longer = replace(h, length=s.fresh("T"))
        s.add_plain(f"torch.cat([{h.name}, {other.name}], 1)", longer)
    else:
        out = s.rng.randint(2, 4)
        b = s.let(f"{s.layer(h.width, out)}(torch.cat([{h.name}, {other.name}]))", "b")
        s.add(f"{b}[:len({h.name})] * {b}[len({h.name}):]", h, out)


def embedded(s: Source) -> None:
    """Tokens of sequences or of rows."""
    width = s.rng.randint(2, 4)
    if s.embeddings and s.rng.random() < 0.4:
        name, width = s.rng.choice(s.embeddings)
    else:
        padding = s.rng.choice(["", "", ", padding_idx=0"])
        name = s.own(f"nn.Embedding(4, {width}{padding})")
        s.embeddings.append((name, width))
    rows = s.rng.random() < 0.5
    ids = s.read("r") if rows else s.read("t")
    like = Variable("", "rows", width, s.read("o")) if rows else Variable("", "steps", width)
    draw = s.rng.random()
    if draw < 0.8:
        s.add(f"{name}({ids})", like)
    elif draw < 0.9:
        s.kinds.add("parameter indexed by data")
        s.add(f"{name}.weight[{ids}]", like)
    else:
        s.kinds.add("rows shared by examples")
        u, v = s.fresh("u"), s.fresh("v")
        s.write(f"{u}, {v} = {ids}.unique(return_inverse=True)")
        s.add(f"{name}({u})[{v}]", like)


def bags(s: Source) -> None:
    s.kinds.add("embedding bag")
    name = s.own("nn.EmbeddingBag(4, 3, mode='sum')")
    s.add(f"{name}({s.read('t')})", Variable("", "examples", 3))


def output_layer(s: Source) -> None:
    """An embedding used as output layer too."""
    h = s.pick("examples", "steps", "rows")
    fitting = [name for name, width in s.embeddings if h is not None and width == h.width]
    if h is not None and fitting:
        s.add(f"{h.name} @ {s.rng.choice(fitting)}.weight.t()", h, 4)


# --------------------------------------------------------------------------- mixing


def mixing(s: Source) -> None:
    """Whatever makes the outputs of an example depend on other examples."""
    h = s.pick("examples", "rows", "steps")
    if h is None:
        return
    a = h.name
    ways = [
        f"{a} - {a}.mean(0, keepdim=True)",
        f"{a}.softmax(0)",
        f"{a}.cumsum(0)",
        f"{a}.roll(1, 0)",
        f"{a}.flip(0)",
        f"{a}.sort(0).values",
        f"{a} / (0.1 + {a}.std(0, unbiased=False, keepdim=True))",
        f"{a} - {a}.detach().mean(0, keepdim=True)",
        f"{a} * ({a} >= {a}.median())",
    ]
    if h.kind != "steps":
        ways += [f"{a}[{a}[:, 0].argsort()]", f"({a} @ {a}.T).softmax(1) @ {a}"]
        ways += [f"F.batch_norm({a}, None, None, training=True) if len({a}) > 1 else {a}"]
    if h.owners == "o":
        f = s.read("f")
        ways += [f"{a}.index_add(0, {f}[1], {a}[{f}[0]])"] * 3
    s.add(s.rng.choice(ways), h)


def constant_rows(s: Source) -> None:
    """A layer on something that is the same for all examples."""
    h = s.pick("examples", "steps", "rows")
    if h is None:
        return
    width = s.rng.randint(2, 4)
    call = s.layer(width, h.width)
    kind = s.rng.randrange(3)
    if kind == 0:
        s.add(f"{h.name} + {call}(torch.eye({width}, dtype=torch.double)[0])", h)
    elif kind == 1:
        s.layers.append(f"self.register_buffer('c{s.count}', torch.randn({width}))")
        s.add(f"{h.name} * {call}(self.c{s.count})", h)
    else:
        s.kinds.add("rows shared by examples")
        s.add(f"{h.name} + {call}({h.name}.new_ones(1, {width}))", h)


STAGES: list[tuple[Stage, int]] = [
    (layer, 12),
    (in_place, 1),
    (joined, 3),
    (embedded, 3),
    (bags, 1),
    (output_layer, 1),
    (row_stages.pooled, 4),
    (row_stages.spread_out, 3),
    (row_stages.repeated, 2),
    (row_stages.padded, 3),
    (row_stages.messages, 4),
    (row_stages.block_attention, 1),
    (row_stages.kept_rows, 2),
    (row_stages.by_piece, 2),
    (step_stages.turned_steps, 3),
    (step_stages.convolved, 2),
    (step_stages.attended, 1),
    (step_stages.packed, 3),
    (step_stages.chosen_steps, 2),
    (step_stages.positions, 1),
    (step_stages.summed, 2),
    (step_stages.many, 1),
    (constant_rows, 1),
]
