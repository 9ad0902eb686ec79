"""Ways to call a layer on rows `[R, width]`, which end with the rows where they were."""

from collections.abc import Callable

from tests.helpers.programs.source import Source

# From the source, the name of rows, their width and the size of the outputs to an expression.
Way = Callable[[Source, str, int, int], str]


def directly(s: Source, a: str, width: int, out: int) -> str:
    return f"{s.layer(width, out)}({a})"


def sorted_by_value(s: Source, a: str, width: int, out: int) -> str:
    layer = s.layer(width, out)
    i = s.let(s.rng.choice([f"{a}[:, 0].argsort()", f"{a}.sum(1).sort().indices"]))
    taken = s.rng.choice(
        [f"{a}[{i}]", f"{a}.index_select(0, {i})", f"{a}.gather(0, {i}[:, None].expand_as({a}))"]
    )
    found = s.let(f"{layer}({taken})", "b")
    return s.rng.choice(
        [
            f"{found}[{i}.argsort()]",
            f"{found}.new_zeros({found}.shape).index_copy(0, {i}, {found})",
            f"torch.zeros_like({found}).scatter(0, {i}[:, None].expand_as({found}), {found})",
            f"torch.empty_like({found}).index_put(({i},), {found})",
        ]
    )


def moved(s: Source, a: str, width: int, out: int) -> str:
    layer = s.layer(width, out)
    there, back = s.rng.choice(
        [
            (f"{a}.flip(0)", "{}.flip(0)"),
            (f"{a}.roll(1, 0)", "{}.roll(-1, 0)"),
            (f"torch.cat([{a}[1:], {a}[:1]])", "torch.cat([{0}[-1:], {0}[:-1]])"),
            (f"torch.cat([{a}[::2], {a}[1::2]])", None),
            (f"torch.cat([{a}, {a}.flip(0)])", "{}.chunk(2)[1].flip(0)"),
            (f"{a}.repeat(2, 1)", "{0}[:len({0}) // 2]"),
            (f"{a}.repeat_interleave(2, 0)", "{}.unflatten(0, (-1, 2)).sum(1)"),
            (f"torch.stack([{a}, {a} * {a}], 1)", "{}.sum(1)"),
            (f"torch.stack([{a}, {a} * {a}], 0)", "{}.sum(0)"),
            (f"{a}[None]", "{}[0]"),
        ]
    )
    found = s.let(f"{layer}({there})", "b")
    if back is None:
        i = s.let(f"torch.arange(len({a}))")
        order = f"torch.cat([{i}[::2], {i}[1::2]])"
        return f"torch.empty_like({found}).index_put(({order},), {found})"
    return back.format(found)


def shuffled(s: Source, a: str, width: int, out: int) -> str:
    layer = s.layer(width, out)
    seed = s.rng.randrange(9)
    i = s.let(f"torch.randperm(len({a}), generator=torch.Generator().manual_seed({seed}))")
    return f"{layer}({a}[{i}])[{i}.argsort()]"


def in_pieces(s: Source, a: str, width: int, out: int) -> str:
    layer = s.layer(width, out)
    cut = s.rng.choice(["split(2)", "split(3)", "chunk(2)", "split(1)"])
    return f"torch.cat([{layer}(b) for b in {a}.{cut}])"


def by_mask(s: Source, a: str, width: int, out: int) -> str:
    one, other = s.layer(width, out), s.layer(width, out)
    q = s.let(f"{a}[:, 0] > {s.rng.choice(['0', '0.3', '-0.3', f'{a}[:, -1]'])}", "q")
    taken = s.rng.choice(
        [
            f"{a}[{q}]",
            f"{a}.masked_select({q}[:, None]).view(-1, {width})",
            f"{a}[{q}.nonzero()[:, 0]]",
            f"{a}[torch.where({q})[0]]",
            f"torch.masked_select({a}, {q}[:, None]).reshape(-1, {width})",
        ]
    )
    kind = s.rng.randrange(6)
    if kind == 0:
        return f"torch.where({q}[:, None], {one}({a}), {other}({a}))"
    if kind == 1:
        return f"{a}.new_zeros(len({a}), {out}).masked_scatter({q}[:, None], {one}({taken}))"
    if kind == 2:
        found = s.let(f"{a}.new_zeros(len({a}), {out})", "b")
        s.write(f"{found}[{q}] = {one}({taken})")
        if s.rng.random() < 0.6:
            s.write(f"{found}[~{q}] = {other}({a}[~{q}])")
        return found
    if kind == 3:
        k = s.let(f"{q}.nonzero()[:, 0]")
        verb = s.rng.choice(["index_add", "index_copy"])
        return f"{a}.new_zeros(len({a}), {out}).{verb}(0, {k}, {one}({a}[{k}]))"
    if kind == 4:
        return f"{one}({a}).masked_fill({q}[:, None], 0.5)"
    return f"{one}({a}) * {q}[:, None] + {other}({a}) * ~{q}[:, None]"


def experts(s: Source, a: str, width: int, out: int) -> str:
    count = s.rng.randint(2, 3)
    gate = s.linear(width, count)
    found = [s.linear(width, out) for _ in range(count)]
    i = s.let(f"{gate}({a}).argmax(1)")
    layers = s.let(f"[{', '.join(found)}]", "e")
    kind = s.rng.randrange(3)
    if kind == 0:
        b = s.let(f"{a}.new_zeros(len({a}), {out})", "b")
        s.write(
            f"for j, layer in enumerate({layers}):", f"    {b}[{i} == j] = layer({a}[{i} == j])"
        )
        return b
    if kind == 1:
        b = s.let(f"{a}.new_zeros(len({a}), {out})", "b")
        s.write(
            f"for j, layer in enumerate({layers}):",
            f"    at = ({i} == j).nonzero()[:, 0]",
            "    if len(at):" if s.rng.random() < 0.5 else "    if True:",
            f"        {b} = {b}.index_add(0, at, layer({a}[at]))",
        )
        return b
    order = s.let(f"{i}.argsort(stable=True)")
    cut = f"{a}[{order}].split({i}.bincount(minlength={count}).tolist())"
    b = s.let(f"torch.cat([layer(b) for layer, b in zip({layers}, {cut})])", "b")
    return f"{b}[{order}.argsort()]"


def gated_experts(s: Source, a: str, width: int, out: int) -> str:
    count, top = s.rng.randint(2, 3), s.rng.randint(1, 2)
    gate = s.linear(width, count)
    layers = s.let(f"[{', '.join(s.linear(width, out) for _ in range(count))}]", "e")
    w, i, b = s.fresh("w"), s.fresh("i"), s.let(f"{a}.new_zeros(len({a}), {out})", "b")
    if s.rng.random() < 0.5:
        s.write(f"{w}, {i} = {gate}({a}).softmax(1).topk({top}, 1)")
    else:
        s.write(f"{w}, {i} = {gate}({a}).topk({top}, 1)", f"{w} = {w}.softmax(1)")
    s.write(f"for j, layer in enumerate({layers}):")
    if s.rng.random() < 0.5:
        s.write(
            f"    at, c = ({i} == j).nonzero(as_tuple=True)",
            f"    {b} = {b}.index_add(0, at, {w}[at, c, None] * layer({a}[at]))",
        )
    else:
        s.write(
            f"    at, c = torch.where({i} == j)",
            f"    {b}[at] += {w}[at, c].unsqueeze(1) * layer({a}[at])",
        )
    return b


def dispatched(s: Source, a: str, width: int, out: int) -> str:
    """All pairs of rows and experts, sorted by expert."""
    gate, layers = s.linear(width, 3), [s.linear(width, out) for _ in range(3)]
    w, i = s.fresh("w"), s.fresh("i")
    s.write(f"{w}, {i} = {gate}({a}).softmax(1).topk(2, 1)")
    order = s.let(f"{i}.flatten().argsort(stable=True)")
    pieces = s.let(f"{a}[{order} // 2].split({i}.flatten().bincount(minlength=3).tolist())")
    listed = ", ".join(f"{layer}({pieces}[{j}])" for j, layer in enumerate(layers))
    b = s.let(f"torch.cat([{listed}]) * {w}.flatten()[{order}, None]", "b")
    return f"{a}.new_zeros(len({a}), {out}).index_add(0, {order} // 2, {b})"


def with_capacity(s: Source, a: str, width: int, out: int) -> str:
    """Experts' rows in a buffer of one slot for each row, most of them empty."""
    layers = [s.linear(width, out) for _ in range(2)]
    i = s.let(f"({a}[:, 0] > {a}[:, -1]).long()")
    place = s.let(f"F.one_hot({i}, 2).cumsum(0).gather(1, {i}[:, None])[:, 0] - 1")
    buffer = s.let(f"{a}.new_zeros(2, len({a}), {width}).index_put(({i}, {place}), {a})", "b")
    listed = ", ".join(f"{layer}({buffer}[{j}])" for j, layer in enumerate(layers))
    return f"torch.stack([{listed}])[{i}, {place}]"


def parameter_by_row(s: Source, a: str, width: int, out: int) -> str:
    """Parameters that rows pick from by their values."""
    s.kinds.add("parameter indexed by data")
    i = s.let(f"({a}[:, 0] > 0).long()")
    if s.rng.random() < 0.5:
        return f"{s.layer(width, out)}({a}) + {s.parameter(2, out)}[{i}]"
    return f"torch.einsum('nd,nod->no', {a}, {s.parameter(2, out, width)}[{i}])"


def parameter_in_place_of_rows(s: Source, a: str, width: int, out: int) -> str:
    s.kinds.add("parameter in place of data")
    b = s.let(f"{s.layer(width, out)}({a})", "b")
    p, q = s.parameter(out), f"({b}[:, :1] > 0)"
    kind = s.rng.randrange(6)
    if kind == 0:
        return f"{b}.masked_scatter({b} > 0, {p}.expand(len({b}), {out}))"
    if kind == 1:
        return f"torch.where({q}, {b}, {p})"
    if kind == 2:
        c = s.let(f"{b}.clone()", "c")
        s.write(f"{c}[{q}[:, 0]] = {p}")
        return c
    if kind == 3:
        return f"{b}.index_put(({q}[:, 0].nonzero()[:, 0],), {p})"
    if kind == 4:
        return (
            f"torch.cat([{b}, {p}.expand(len({b}), -1)], 1)[:, ::2]"
            if out == 1
            else (f"torch.cat([{b}, {p}.expand(len({b}), -1)], 1)[:, 1:{out + 1}]")
        )
    return f"torch.lerp({b}, {p}.expand_as({b}), 0.3)"


def sorted_without_indices(s: Source, a: str, width: int, out: int) -> str:
    """Rows in an order that their values make, by arithmetic alone, and as they were."""
    layer = s.layer(width, out)
    kind = s.rng.randrange(3)
    if kind == 0:
        ranks = f"({a}[:, 0] > {a}[:, :1]).sum(0)"
        order = s.let(f"({ranks} == torch.arange(len({a}))[:, None]).to({a}.dtype)", "g")
        return f"{layer}({a}) * ({order}.T @ {layer}({order} @ {a}))"
    if kind == 1:
        q = s.let(f"(({a} + {a}.flip(0)).sum(1, keepdim=True) > 0)", "q")
        b = s.let(f"{layer}(torch.where({q}, {a}, {a}.flip(0)))", "b")
        return f"torch.where({q}, {b}, {b}.flip(0)) + {layer}({a}).tanh()"
    i = s.let(f"{a}[:, 0].detach().numpy().argsort()")
    index = s.rng.choice([i, f"{i}.tolist()", f"torch.from_numpy({i})"])
    back = f"torch.from_numpy({i}).argsort()"
    return f"{layer}({a}[{index}])[{back}] + {layer}({a}).tanh()"


def batched_weights(s: Source, a: str, width: int, out: int) -> str:
    s.kinds.add("bmm with a parameter")
    w = s.parameter(2, width, out)
    b = s.let(f"torch.bmm(torch.stack([{a}, {a}.tanh()]), {w})", "b")
    return f"{b}[0] + {b}[1]"


def with_einsum(s: Source, a: str, width: int, out: int) -> str:
    s.kinds.add("einsum with a parameter")
    return f"torch.einsum('nd,od->no', {a}, {s.parameter(out, width)})"


def deduplicated(s: Source, a: str, width: int, out: int) -> str:
    """A layer called once for all rows that round to the same values."""
    s.kinds.add("rows shared by examples")
    u, v = s.fresh("u"), s.fresh("v")
    s.write(f"{u}, {v} = torch.unique({a}.detach().sign(), dim=0, return_inverse=True)")
    return f"{s.layer(width, out)}({u})[{v}] + {s.layer(width, out)}({a})"


WAYS: list[tuple[Way, int]] = [
    (directly, 10),
    (sorted_by_value, 6),
    (moved, 6),
    (shuffled, 2),
    (in_pieces, 3),
    (by_mask, 8),
    (experts, 5),
    (gated_experts, 4),
    (dispatched, 2),
    (with_capacity, 2),
    (sorted_without_indices, 3),
    (parameter_by_row, 1),
    (parameter_in_place_of_rows, 2),
    (batched_weights, 1),
    (with_einsum, 1),
    (deduplicated, 1),
]


def on_rows(s: Source, a: str, width: int, out: int) -> str:
    """Call a layer on rows in some way."""
    ways, weights = zip(*WAYS, strict=True)
    way: Way = s.rng.choices(ways, weights)[0]
    return way(s, a, width, out)
