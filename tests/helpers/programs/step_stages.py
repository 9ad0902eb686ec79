"""Stages on steps: orders, windows, packed sequences, masks, positions."""

from dataclasses import replace

from tests.helpers.programs.rows import on_rows
from tests.helpers.programs.source import Source, Variable


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
        f"nn.utils.rnn.pack_padded_sequence({a}, l.clamp(max={a}.shape[1]), batch_first=True, "
        f"enforce_sorted=False)"
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
    b = s.let(
        f"nn.utils.rnn.pad_packed_sequence({q}, batch_first=True, total_length={a}.shape[1])[0]",
        "b",
    )
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
            f"{a}[torch.arange(n), {h.mask}.sum(1).clamp(min=1) - 1] * {h.mask}[:, :1]",
        ]
    else:
        ways = [f"{a}.mean(1)", f"{a}.sum(1)", f"{a}.amax(1)", f"{a}[:, -1]", f"{a}[:, 0]"]
        ways += [
            f"{a}.gather(1, {a}[..., :1].argmax(1, keepdim=True).expand(-1, -1, {h.width}))[:, 0]"
        ]
    s.add(s.rng.choice(ways), Variable("", "examples", h.width))


def many(s: Source) -> None:
    """From examples to steps."""
    h = s.pick("examples")
    if h is not None:
        ways = [f"{h.name}[:, None].expand(-1, 2, -1)", f"torch.stack([{h.name}, -{h.name}], 1)"]
        s.add_plain(s.rng.choice(ways), Variable("", "steps", h.width, length="2"))
