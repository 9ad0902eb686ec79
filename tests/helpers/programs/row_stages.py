"""Stages on rows: pooling, messages along edges, padding, pieces."""

from tests.helpers.programs.rows import on_rows
from tests.helpers.programs.source import Source, Variable


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
            f"torch.cat([{a}.new_zeros(1, {d}), {a}.cumsum(0)])[{lengths}.cumsum(0)]",
        ]
    s.add(s.rng.choice(ways), Variable("", "examples", d))


def spread_out(s: Source) -> None:
    """From examples to rows."""
    h = s.pick("examples")
    if h is None:
        return
    o = s.read("o")
    ways = [
        f"{h.name}[{o}]",
        f"{h.name}.index_select(0, {o})",
        f"F.one_hot({o}, n).to({h.name}) @ {h.name}",
    ]
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
    zeros = f"{h.name}.new_zeros(*{mask}.shape, {h.width})"
    ways = [
        f"nn.utils.rnn.pad_sequence([*{h.name}.split({counts}.tolist()), "
        f"{h.name}.new_zeros(1, {h.width})], batch_first=True)[:n]",
        f"{zeros}.masked_scatter({mask}[..., None], {h.name})",
        f"{zeros}.index_put({mask}.nonzero(as_tuple=True), {h.name})",
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
        s.add(
            f"torch.zeros_like({b}).index_add(0, {e}[1], {w} / {total}[{e}[1]] * {b}[{e}[0]])",
            h,
            out,
        )
    else:
        adjacency = s.let(
            f"{a}.new_zeros(len({a}), len({a})).index_put(({e}[1], {e}[0]), {a}.new_ones(()))", "g"
        )
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
        s.add(
            f"F.scaled_dot_product_attention({q}[None], {k}[None], {v}[None], attn_mask={same})[0]",
            h,
        )


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
        s.add(
            f"torch.cat([{h.name}.new_zeros(0, {out})] + "
            f"[{conv}(b.T[None])[0].T for b in {pieces} if len(b)])",
            h,
            out,
        )
    else:
        call = s.layer(h.width, out)
        s.add(f"torch.cat([{call}(b).softmax(0) for b in {pieces}])", h, out)
