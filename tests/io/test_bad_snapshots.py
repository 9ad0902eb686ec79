"""Snapshots with a valid digest that say what they should not, one mistake at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rotate_ewc import EKFACLinearOperator, EKFACPenalty, SnapshotError
from rotate_ewc.io import files
from rotate_ewc.io.header import header_text
from tests.helpers.honest_snapshots import (
    contents_of,
    digest_of,
    operator,
    penalty,
)


def edited(change: Callable[[dict[str, Any], dict[str, Any]], None], made: Any) -> dict[str, Any]:
    """Return a snapshot of which header and tensors were changed."""
    tensors = contents_of(made)
    header = json.loads(header_text(tensors))
    del tensors["header"]
    change(header, tensors)
    return {"header": json.dumps(header), **tensors}


def spoil(key: str, value: float) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(header: dict[str, Any], tensors: dict[str, Any]) -> None:
        spoiled = tensors[key].clone()
        spoiled[(0,) * spoiled.ndim] = value
        tensors[key] = spoiled

    return change


def replace(
    key: str, function: Callable[[Any], Any]
) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(header: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors[key] = function(tensors[key])

    return change


def in_header(text: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Run a statement on the header, `h`."""

    def change(header: dict[str, Any], tensors: dict[str, Any]) -> None:
        exec(text, {"h": header})

    return change


VALUES, BASIS = "0.weight/eigenvalues", "0.weight/gradient_basis"
BAD_OPERATORS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], None], str]] = {
    "NaN": (spoil(VALUES, float("nan")), f"'{VALUES}' has values that are not finite"),
    "infinite": (spoil(VALUES, float("inf")), f"'{VALUES}' has values that are not finite"),
    "negative": (spoil(VALUES, -1e-20), f"'{VALUES}' has negative values"),
    "NaN in a basis": (spoil(BASIS, float("nan")), f"'{BASIS}' has values that are not finite"),
    "stretched basis": (replace(BASIS, lambda q: 1.02 * q), f"'{BASIS}' is not orthonormal"),
    "blank basis": (replace(BASIS, torch.zeros_like), f"'{BASIS}' is not orthonormal"),
    "huge basis": (replace(BASIS, lambda q: 1e30 * q), f"'{BASIS}' is not orthonormal"),
    "repeated columns": (
        replace(BASIS, lambda q: q[:, :, :1].repeat(1, 1, 6)),
        f"'{BASIS}' is not",
    ),
    "integers": (replace(VALUES, lambda t: t.long()), f"'{VALUES}' is torch.int64 of shape"),
    "Booleans": (replace(VALUES, lambda t: t > 0), f"'{VALUES}' is torch.bool of shape"),
    "complex": (replace(VALUES, lambda t: t + 0j), f"'{VALUES}' is torch.complex64 of shape"),
    "float64 for float32": (replace(VALUES, lambda t: t.double()), f"'{VALUES}' is torch.float64"),
    "eight bits": (
        replace(VALUES, lambda t: t.to(torch.float8_e5m2)),
        f"'{VALUES}' is torch.float8_e5m2 of shape",
    ),
    "one tensor more": (
        lambda header, tensors: tensors.update({"2.weight/eigenvalues": torch.zeros(1, 1, 1)}),
        "unexpected key '2.weight/eigenvalues'",
    ),
    "one tensor less": (
        lambda header, tensors: tensors.pop(BASIS),
        f"snapshot key '{BASIS}' is missing",
    ),
    "another shape": (
        replace(VALUES, lambda t: t.mT),
        r"shape \[1, 4, 6\]; expected .*\[1, 6, 4\]",
    ),
    "no format": (in_header("del h['format']"), "'header': .* missing required field `format`"),
    "future": (
        in_header("h['format'] = 'rotate_ewc.operator/2'"),
        'format is "rotate_ewc.operator/2"; expected .* later version',
    ),
    "format without a name": (in_header("h['format'] = 2"), "format is 2; expected"),
    "unknown field": (
        in_header("h['more'] = 1"),
        "'header': .* unknown field `more`: load an unchanged copy, or save the snapshot again$",
    ),
    "unknown field of a block": (
        in_header("h['blocks'][1]['more'] = 1"),
        r"at 'blocks\[1\]': .* unknown field `more`",
    ),
    "no label": (
        in_header("h['blocks'][0]['parameters'] = []"),
        r"\[\] at 'blocks\[0\].parameters",
    ),
    "transposed": (
        in_header("h['blocks'][0]['transposed'] = 1"),
        r"has 1 at 'blocks\[0\].transposed': Expected `bool`",
    ),
    "two blocks for one": (
        in_header("h['blocks'].append(h['blocks'][0])"),
        "parameter '0.weight' is in 2 blocks; expected one",
    ),
    "one block less": (in_header("del h['blocks'][0]"), "'0.weight' is in 0 blocks; expected one"),
    "twice in a block": (
        in_header("h['blocks'][1]['parameters'] = ['1.weight'] * 2"),
        "'1.bias' is in 0 blocks; expected one",
    ),
    "unknown parameter": (
        in_header("h['blocks'][0]['parameters'] = ['2.weight']"),
        "'0.weight' is in 0 blocks; expected one",
    ),
    "additional parameter": (
        in_header("h['blocks'][1]['parameters'][1] = '9.bias'; del h['parameters']['1.bias']"),
        "'9.bias' is in a block, but not among the parameters; expected it in both: load an ",
    ),
    "same label": (
        in_header(
            "h['parameters']['1.weight+1.bias'] = [5, 5];"
            "h['blocks'].append({**h['blocks'][1], 'parameters': ['1.weight+1.bias']})"
        ),
        "two blocks have the same label",
    ),
    "unknown basis": (in_header("h['blocks'][0]['bases'] = ['basis']"), r"'bases' is \['basis'\]"),
    "basis twice": (
        in_header("h['blocks'][0]['bases'] *= 2"),
        r"at 'blocks\[0\]': 'bases' is .*; expected some of",
    ),
    "rank of more than there is": (
        in_header("h['blocks'][5]['ranks'] = [3, 9]"),
        r"at 'blocks\[5\]': 'ranks' is \[3, 9\], but .*'activation_basis' has 8 entries; expected",
    ),
    "rank of nothing": (
        in_header("h['blocks'][5]['ranks'] = [0, 2]"),
        r"at 'blocks\[5\]': 'ranks' is \[0, 2\], but .*'gradient_basis' has 4 entries; expected",
    ),
    "rank without a basis": (
        in_header("h['blocks'][3]['ranks'] = [3, 6]"),
        r"at 'blocks\[3\]': 'ranks' is \[3, 6\], .* from 1 to (\d), and \1 where there is no basis",
    ),
    "rank of other tensors": (
        in_header("h['blocks'][5]['ranks'] = [3, 3]"),
        r"'wide.weight/eigenvalues' is torch.float32 of shape .*; expected .*\[1, 4, 4\]",
    ),
    "no ranks": (in_header("del h['blocks'][0]['ranks']"), "missing required field `ranks`"),
    "no number": (
        in_header("h['blocks'][0]['shape'][0] = 1.0"),
        r"has 1.0 at 'blocks\[0\].shape\[0\]': Expected `int`",
    ),
    "too large": (
        in_header("h['parameters']['scale'] = [1, 2**48]"),
        rf"has {2**48} at \"parameters\['scale'\]\[1\]\": Expected `int` <= {2**48 - 1}",
    ),
    "many axes": (
        in_header("h['parameters']['scale'] = [1] * 65"),
        r"parameters\['scale'\]\": Expected `array` of length <= 64",
    ),
    "weight that does not fit": (
        in_header("h['parameters']['0.weight'] = [6, 5]"),
        r"block '0.weight' has shape \(1, 6, 4\), .* \[\(6, 5\)\]; expected as many .*: load an ",
    ),
    "bias that does not fit": (
        in_header("h['parameters']['1.bias'] = [4]"),
        r"'1.weight\+1.bias' has shape \(1, 5, 5\), which does not fit .* \[\(5, 4\), \(4,\)\]",
    ),
    "negative sizes": (
        in_header("h['parameters']['0.weight'] = [-6, -4]"),
        r"has -6 at \"parameters\['0.weight'\]\[0\]\": Expected `int` >= 0",
    ),
    "no shape": (
        in_header("h['parameters']['scale'] = None"),
        r"has null at \"parameters\['scale'\]\": Expected `array`",
    ),
    "unknown dtype": (
        in_header("h['blocks'][0]['dtype'] = 'int8'"),
        r'has "int8" at .blocks\[0\].dtype.: Expected one of float64, float32, bfloat16, float16',
    ),
    "num_data": (
        in_header("h['provenance']['num_data'] = 0"),
        "has 0 at 'provenance.num_data': Expected `int` >= 1",
    ),
    "num_loss_terms": (
        in_header("h['provenance']['num_loss_terms'] = -1"),
        "has -1 at 'provenance.num_loss_terms': Expected `float` >= 0",
    ),
    "reduction": (
        in_header("h['provenance']['reduction'] = 'mean\\n'"),
        "at 'provenance.reduction': Expected one of mean, sum",
    ),
    "no loss": (
        in_header("del h['provenance']['loss']"),
        "at 'provenance': .* missing required field `loss`",
    ),
    "unknown field of the provenance": (
        in_header("h['provenance']['more'] = 1"),
        "at 'provenance': .* unknown field `more`",
    ),
    "nested setting": (
        in_header("h['provenance']['settings']['seed'] = [1]"),
        r"has 1 at \"provenance.settings\['seed'\]\[0\]\": Expected `str`",
    ),
}


@pytest.mark.parametrize("case", BAD_OPERATORS)
def test_bad_operators(case: str, tmp_path: Path) -> None:
    """With a valid digest, so that what is wrong has to be seen; and nothing changes by it."""
    change, message = BAD_OPERATORS[case]
    path, receiver = tmp_path / "file", operator(50)
    before = digest_of(receiver)
    bad = edited(change, operator())
    with pytest.raises(SnapshotError, match=message):
        receiver.load_state_dict(bad)
    assert digest_of(receiver) == before
    files.save(bad, path)
    with pytest.raises(SnapshotError, match=message) as caught:
        EKFACLinearOperator.load(path)
    assert str(caught.value).startswith(repr(str(path)))


ANCHOR = "0/anchor/0.weight"
BAD_PENALTIES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], None], str]] = {
    "NaN": (
        spoil("1/operator/0.bias/eigenvalues", float("nan")),
        "'1/operator/0.bias/eigenvalues'",
    ),
    "anchor": (spoil(ANCHOR, float("nan")), f"'{ANCHOR}' has values that are not finite"),
    "anchor's shape": (replace(ANCHOR, lambda t: t.mT), rf"'{ANCHOR}' is .* of shape \[3, 4\]"),
    "anchor's dtype": (replace(ANCHOR, lambda t: t.long()), f"'{ANCHOR}' is torch.int64"),
    "negative weight": (
        in_header("h['terms'][1]['weight'] = -1"),
        r"has -1 at 'terms\[1\].weight': Expected `float` >= 0",
    ),
    "weight is NaN": (in_header("h['terms'][0]['weight'] = float('nan')"), "'header' is not JSON"),
    "infinite weight": (
        in_header("h['terms'][0]['weight'] = 1e999"),
        "'header' is not JSON: .*; expected JSON text: load an unchanged copy",
    ),
    "huge weight": (in_header("h['terms'][0]['weight'] = 1e300"), "term '0/'.* overflow"),
    "huger weight": (
        in_header("h['terms'][0]['weight'] = 10**400"),
        r"has 1000.* at 'terms\[0\].weight': Number out of range",
    ),
    "no weight": (
        in_header("del h['terms'][0]['weight']"),
        r"at 'terms\[0\]': .* missing required field `weight`",
    ),
    "tensor in a term": (
        lambda header, tensors: tensors.update({"0/more": torch.zeros(1)}),
        "unexpected key '0/more'",
    ),
    "no anchor": (lambda header, tensors: tensors.pop(ANCHOR), f"'{ANCHOR}' is missing"),
    "fewer terms": (in_header("del h['terms'][1]"), "unexpected key '1/"),
    "more terms": (
        in_header("h['terms'] *= 2; h['num_tasks'] = 4"),
        "'2/operator/0.weight/eigenvalues' is missing",
    ),
    "mode": (in_header("h['mode'] = 'merged'"), "2 terms for 2 tasks in mode 'merged'"),
    "other mode": (in_header("h['mode'] = 'other'"), "mode 'other'; expected 'separate'"),
    "fewer tasks": (in_header("h['num_tasks'] = 1"), "2 terms for 1 tasks"),
    "weighting": (in_header("h['weighting'] = 3"), "has 3 at 'weighting': Expected `str`"),
    "tasks": (in_header("h['num_tasks'] = -1"), "has -1 at 'num_tasks': Expected `int` >= 0"),
    "examples": (
        in_header("h['last_examples'] = 10**400"),
        f"has 1000.* at 'last_examples': Expected `int` <= {2**63 - 1}",
    ),
    "no examples": (in_header("h['last_examples'] = 0"), "has 0 at 'last_examples'"),
    "no loss terms": (in_header("h['last_loss_terms'] = 0"), "has 0 at 'last_loss_terms'"),
    "nested options": (
        in_header("h['options']['mode'] = [[]]"),
        r"has \[\] at \"options\['mode'\]\[0\]\": Expected `str`",
    ),
    "numbers in options": (
        in_header("h['options']['include'] = ['*', 1]"),
        r"has 1 at \"options\['include'\]\[1\]\": Expected `str`",
    ),
    "dictionary in options": (
        in_header("h['options']['rank'] = {'w': {}}"),
        r"at \"options\['rank'\].*\": Expected `.*`, got `object`",
    ),
    "NaN in options": (
        in_header("h['options']['strength'] = float('nan')"),
        "'header' is not JSON",
    ),
    "kind": (
        lambda header, tensors: header.update(json.loads(header_text(operator().state_dict()))),
        "unknown field|format is",
    ),
    "reductions": (
        in_header("h['terms'][0]['operator']['provenance']['reduction'] = 'sum'"),
        "reduction",
    ),
}
BAD_OPTIONS: dict[str, Any] = {
    "strength": [-1, 10**400, "x", None, True],
    "decay": [2, -1, 10**400],
    "temperature": [0, 10**400, []],
    "mode": ["x" * 10**5, 3, []],
    "include": ["*", 5, None],
    "fisher_type": ["other", [], None],
    "mc_samples": [0, 1.0, True],
    "strict": ["yes", 2, None],
    "seed": [1.5, "x"],
    "self": [1],
    "unknown": [1],
    "a\nb": [1],
}


@pytest.mark.parametrize("case", BAD_PENALTIES)
def test_bad_penalties(case: str, tmp_path: Path) -> None:
    change, message = BAD_PENALTIES[case]
    path, receiver = tmp_path / "file", penalty("separate", 3)
    before = digest_of(receiver)
    bad = edited(change, penalty("separate"))
    files.save(bad, path)
    with pytest.raises(SnapshotError, match=message) as caught:
        EKFACPenalty.load(path)
    assert str(caught.value).startswith(repr(str(path)))
    with pytest.raises(SnapshotError, match=message):
        receiver.load_state_dict(bad)
    assert digest_of(receiver) == before


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name: str, tmp_path: Path) -> None:
    for value in BAD_OPTIONS[name]:

        def change(header: dict[str, Any], tensors: dict[str, Any], value: Any = value) -> None:
            header["options"][name] = value

        files.save(edited(change, penalty("separate")), tmp_path / "file")
        with pytest.raises(
            SnapshotError, match="file': snapshot's 'options' cannot be used"
        ) as error:
            EKFACPenalty.load(tmp_path / "file")
        assert len(str(error.value)) < 600 + len(str(tmp_path))
        assert str(error.value).isprintable()
