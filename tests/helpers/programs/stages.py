"""Stages that move between examples, steps and rows, or that mix examples."""

from dataclasses import replace

from tests.helpers.programs.rows import on_rows
from tests.helpers.programs.source import Source, Stage, Variable

# --------------------------------------------------------------------------- layers


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
        s.write(s.rng.choice([f"{b}.mul_(2)", f"{b} += {p}", f"{b}.add_({h.name})", f"{b}.tanh_()"]))
        s.add(b, h)


def joined(s: Source) -> None:
    """Two tensors of a kind, side by side or one after the other."""
    h = s.pick("examples", "steps", "rows")
    if h is None:
        return
    others = [v for v in s.variables if replace(v, name="", width=0) == replace(h, name="", width=0)]
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


# --------------------------------------------------------------------------- rows


def pooled(s: Source) -> None:
    """From rows to examples."""
    h = s.pick("rows")
    if h is None:
        return
    o, d = h.owners, h.width
    a = h.name
    if s.rng.random() < 0.6:
        out = s.rng.randint(2, 4)
        a, d = s.let(on_rows(s, a, d, out), "a"), out
    zeros, spread = f"{a}.new_zeros(n, {d})", f"{o}[:, None].expand_as({a})"
    ways = [
        f"{zeros}.index_add(0, {o}, {a})",
        f"{zeros}.scatter_add(0, {spread}, {a})",
        f"{zeros}.index_put(({o},), {a}, accumulate=True)",
        f"{zeros}.scatter_reduce(0, {spread}, {a}, 'amax')",
        f"{zeros}.scatter_reduce(0, {spread}, {a}, 'mean')",
        f"{zeros}.index_add(0, {o}, {a}) / {o}.bincount(minlength=n)[:, None].clamp(min=1)",
        f"F.one_hot({o}, n).T.to({a}.dtype) @ {a}",
        f"torch.stack([{a}[{o} == j].sum(0) for j in range(n)])",
        f"({o} == torch.arange(n)[:, None]).to({a}.dtype).mm({a})",
        f"torch.sparse.mm(torch.sparse_coo_tensor(torch.stack([{o}, torch.arange(len({o}))]), "
        f"{a}.new_ones(len({o})), (n, len({o}))).coalesce(), {a})",
    ]
    if s.grouped:
        lengths = f"{o}.bincount(minlength=n)"
        ways += [
            f"torch.stack([b.sum(0) for b in {a}.split({lengths}.tolist())])",
            f"torch.segment_reduce({a}, 'sum', lengths={lengths}, axis=0)",
            f"torch.cat([{a}.new_zeros(1, {d}), {a}.cumsum(0)]).index_select(0, {lengths}.cumsum(0))",
        ]
    s.add(s.rng.choice(ways), Variable("", "examples", d))


def spread_out(s: Source) -> None:
    """From examples to rows."""
    h = s.pick("examples")
    if h is None:
        return
    o = s.read("o")
    ways = [f"{h.name}[{o}]", f"{h.name}.index_select(0, {o})", f"F.one_hot({o}, n).to({h.name}) @ {h.name}"]
    if s.grouped:
        ways.append(f"{h.name}.repeat_interleave({o}.bincount(minlength=n), 0)")
    s.add_plain(s.rng.choice(ways), Variable("", "rows", h.width, "o"))


def repeated(s: Source) -> None:
    """Every example as many times as its data say."""
    h = s.pick("examples")
    if h is None:
        return
    k = s.read("l")
    o = s.let(f"torch.arange(n).repeat_interleave({k})", "o")
    s.add_plain(f"{h.name}.repeat_interleave({k}, 0)", Variable("", "rows", h.width, o))


def padded(s: Source) -> None:
    """From rows to steps."""
    h = s.pick("rows")
    if h is None or h.owners != "o" or not s.grouped:
        return
    counts = s.let("o.bincount(minlength=n)", "c")
    mask = s.let(f"torch.arange(max(1, int({counts}.max()))) < {counts}[:, None]", "m")
    ways = [
        f"nn.utils.rnn.pad_sequence([*{h.name}.split({counts}.tolist()), "
        f"{h.name}.new_zeros(1, {h.width})], batch_first=True)[:n]",
        f"{h.name}.new_zeros(*{mask}.shape, {h.width}).masked_scatter({mask}[..., None], {h.name})",
        f"{h.name}.new_zeros(*{mask}.shape, {h.width}).index_put({mask}.nonzero(as_tuple=True), {h.name})",
    ]
    s.add_plain(s.rng.choice(ways), Variable("", "steps", h.width, mask=mask, length=mask))


def messages(s: Source) -> None:
    """Along edges inside the examples."""
    h = s.pick("rows")
    if h is None or h.owners != "o":
        return
    e, a, d = s.read("e"), h.name, h.width
    out, kind = s.rng.randint(2, 4), s.rng.randrange(5)
    if kind == 0:
        b = s.let(f"{s.layer(d, out)}({a})", "b")
        s.add(f"{b}.index_add(0, {e}[1], {b}[{e}[0]])", h, out)
    elif kind == 1:
        b = s.let(on_rows(s, s.let(f"{a}[{e}[0]]", "a"), d, out), "b")
        s.add(f"{b}.new_zeros(len({a}), {out}).index_add(0, {e}[1], {b})", h, out)
    elif kind == 2 and d <= 3:
        b = s.let(f"{s.layer(2 * d, out)}({a}[{e}.T].flatten(1)).tanh()", "b")
        s.add(f"{b}.new_zeros(len({a}), {out}).index_add(0, {e}[1], {b})", h, out)
    elif kind == 3:
        b, c = s.let(f"{s.layer(d, out)}({a})", "b"), s.let(f"{s.linear(d, 1)}({a})", "c")
        w = s.let(f"({c}[{e}[0]] + {c}[{e}[1]]).exp()", "w")
        total = s.let(f"{w}.new_full((len({a}), 1), 1e-3).index_add(0, {e}[1], {w})", "w")
        s.add(f"torch.zeros_like({b}).index_add(0, {e}[1], {w} / {total}[{e}[1]] * {b}[{e}[0]])", h, out)
    else:
        adjacency = s.let(f"{a}.new_zeros(len({a}), len({a})).index_put(({e}[1], {e}[0]), {a}.new_ones(()))", "g")
        s.add(f"{adjacency} @ {s.layer(d, out)}({a}) + {s.layer(d, out)}({a})", h, out)


def block_attention(s: Source) -> None:
    """Attention between the rows of each example."""
    h = s.pick("rows")
    if h is None:
        return
    d = h.width
    q, k, v = (s.let(f"{s.layer(d, d)}({h.name})", "b") for _ in range(3))
    same = f"{h.owners}[:, None] == {h.owners}"
    if s.rng.random() < 0.5:
        s.add(f"({q} @ {k}.T).masked_fill(~({same}), -torch.inf).softmax(1) @ {v}", h)
    else:
        s.add(f"F.scaled_dot_product_attention({q}[None], {k}[None], {v}[None], attn_mask={same})[0]", h)


def kept_rows(s: Source) -> None:
    """Only some of the rows."""
    h = s.pick("rows")
    if h is None:
        return
    q = s.let(f"{h.name}[:, 0] > {s.rng.choice(['0', '-0.5'])}", "q")
    o = s.let(f"{h.owners}[{q}]", "o")
    s.add_plain(f"{h.name}[{q}]", Variable("", "rows", h.width, o))


def by_piece(s: Source) -> None:
    """A layer called once for every example, on its rows."""
    h = s.pick("rows")
    if h is None or h.owners != "o" or not s.grouped:
        return
    pieces = s.let(f"{h.name}.split(o.bincount(minlength=n).tolist())", "c")
    out = s.rng.randint(2, 4)
    if s.rng.random() < 0.6:
        conv = s.own(f"nn.Conv1d({h.width}, {out}, 3, padding=1)")
        s.add(f"torch.cat([{h.name}.new_zeros(0, {out})] + "
            f"[{conv}(b.T[None])[0].T for b in {pieces} if len(b)])", h, out)
    else:
        call = s.layer(h.width, out)
        s.add(f"torch.cat([{call}(b).softmax(0) for b in {pieces}])", h, out)


# --------------------------------------------------------------------------- steps


def turned_steps(s: Source) -> None:
    """Steps of every example in another order."""
    h = s.pick("steps")
    if h is None or h.mask:
        return
    a = h.name
    ways = [
        f"{a}.roll(1, 1)",
        f"{a}.flip(1)",
        f"{a}.cumsum(1)",
        f"{a}.sort(1).values",
        f"{a}.gather(1, {a}[..., :1].argsort(1).expand_as({a}))",
        f"torch.take_along_dim({a}, {a}[..., :1].argsort(1), 1)",
        f"{a}[torch.arange(n)[:, None], {a}[..., 0].argsort(1)]",
        f"{a} - {a}.mean(1, keepdim=True)",
        f"{a}.softmax(1)",
        f"{a}[:, torch.randperm({a}.shape[1], generator=torch.Generator().manual_seed(1))]",
        f"{a}.topk(1, 1).values.expand_as({a})",
    ]
    s.add_plain(s.rng.choice(ways), h)


def convolved(s: Source) -> None:
    h = s.pick("steps")
    if h is None or (h.mask and s.rng.random() < 0.7):
        return
    out = s.rng.randint(2, 4)
    kind = s.rng.randrange(3)
    if kind == 0:
        conv = s.own(f"nn.Conv1d({h.width}, {out}, 3, padding=1)")
        s.add(f"{conv}({h.name}.mT).mT", h, out)
    elif kind == 1:
        windows = f"F.pad({h.name}, (0, 0, 1, 0)).unfold(1, 2, 1).flatten(2)"
        s.add(f"{s.layer(2 * h.width, out)}({windows})", h, out)
    else:
        pair = f"torch.cat([{h.name}, {h.name}.roll(1, 1)], -1)"
        s.add(f"{s.layer(2 * h.width, out)}({pair})", h, out)


def attended(s: Source) -> None:
    h = s.pick("steps")
    if h is None or h.width > 4:
        return
    layer_ = s.own(f"nn.MultiheadAttention({h.width}, 1, batch_first=True)")
    mask = f", key_padding_mask=~{h.mask}" if h.mask else ""
    if h.mask:  # an example without rows has nothing to attend to
        mask = f", key_padding_mask=~({h.mask} | ~{h.mask}.any(1, keepdim=True))"
    s.add(f"{layer_}({h.name}, {h.name}, {h.name}, need_weights=False{mask})[0]", h)


def packed(s: Source) -> None:
    """Sequences of unequal lengths, packed, through a layer, and padded."""
    h = s.pick("steps")
    if h is None or h.mask:
        return
    a = h.name
    s.read("l")
    p = s.let(
        f"nn.utils.rnn.pack_padded_sequence({a}, l.clamp(max={a}.shape[1]), batch_first=True, enforce_sorted=False)"
    )
    mask = s.let(f"torch.arange({a}.shape[1]) < l[:, None]", "m")
    if s.rng.random() < 0.15:
        s.kinds.add("recurrent layer")
        cell = s.own(f"nn.{s.rng.choice(['GRU', 'LSTM', 'RNN'])}({h.width}, 2, batch_first=True)")
        q, out = f"{cell}({p})[0]", 2
    else:
        out = s.rng.randint(2, 4)
        b = s.let(f"{on_rows(s, p + '.data', h.width, out)}", "b")
        q = f"{p}._replace(data={b})"
    b = s.let(f"nn.utils.rnn.pad_packed_sequence({q}, batch_first=True, total_length={a}.shape[1])[0]", "b")
    s.add_plain(b, replace(h, mask=mask), out)


def chosen_steps(s: Source) -> None:
    """From steps to rows: those that a mask keeps."""
    h = s.pick("steps")
    if h is None:
        return
    a = h.name
    masks = [h.mask] if h.mask else [f"{a}[..., 0] > 0"]
    if not h.mask:
        masks.append(f"F.pad({s.read('k')}, (0, 9), value=True)[:, : {a}.shape[1]]")
    m = s.let(s.rng.choice(masks), "m")
    o = s.let(f"torch.arange(n)[:, None].expand({m}.shape)[{m}]", "o")
    s.add_plain(
        s.rng.choice([f"{a}[{m}]", f"{a}.masked_select({m}[..., None]).view(-1, {h.width})"]),
        Variable("", "rows", h.width, o),
    )


def positions(s: Source) -> None:
    """Parameters for positions."""
    h = s.pick("steps")
    if h is None:
        return
    p = s.parameter(12, h.width)
    kind = s.rng.randrange(4)
    if kind == 0:
        s.add(f"{h.name} + {p}[:{h.name}.shape[1]]", h)
    elif kind == 1:
        e = s.own(f"nn.Embedding(12, {h.width})")
        s.add(f"{h.name} + {e}(torch.arange({h.name}.shape[1]))", h)
    elif kind == 2:
        s.add(f"{h.name} * {p}[:{h.name}.shape[1]].tanh()", h)
    else:
        s.kinds.add("parameter in place of data")
        token = s.parameter(1, 1, h.width)
        if not h.mask:
            longer = replace(h, length=s.fresh("T"))
            s.add(f"torch.cat([{token}.expand(n, -1, -1), {h.name}], 1)", longer)


def summed(s: Source) -> None:
    """From steps to examples."""
    h = s.pick("steps")
    if h is None:
        return
    a = h.name
    if h.mask:
        weight = f"{h.mask}[..., None]"
        ways = [
            f"({a} * {weight}).sum(1)",
            f"({a} * {weight}).sum(1) / {weight}.sum(1).clamp(min=1)",
            f"{a}.masked_fill(~{weight}, 0.0).amax(1)",
            f"{a}[torch.arange(n), {h.mask}.sum(1).clamp(min=1) - 1] * {h.mask}.any(1, keepdim=True)",
        ]
    else:
        ways = [f"{a}.mean(1)", f"{a}.sum(1)", f"{a}.amax(1)", f"{a}[:, -1]", f"{a}[:, 0]"]
        ways += [f"{a}.gather(1, {a}[..., :1].argmax(1, keepdim=True).expand(-1, -1, {h.width}))[:, 0]"]
    s.add(s.rng.choice(ways), Variable("", "examples", h.width))


def many(s: Source) -> None:
    """From examples to steps."""
    h = s.pick("examples")
    if h is not None:
        ways = [f"{h.name}[:, None].expand(-1, 2, -1)", f"torch.stack([{h.name}, -{h.name}], 1)"]
        s.add_plain(s.rng.choice(ways), Variable("", "steps", h.width, length="2"))


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
    (bags, 0),
    (output_layer, 1),
    (pooled, 4),
    (spread_out, 3),
    (repeated, 2),
    (padded, 3),
    (messages, 4),
    (block_attention, 1),
    (kept_rows, 2),
    (by_piece, 2),
    (turned_steps, 3),
    (convolved, 2),
    (attended, 1),
    (packed, 3),
    (chosen_steps, 2),
    (positions, 1),
    (summed, 2),
    (many, 1),
    (constant_rows, 1),
]
