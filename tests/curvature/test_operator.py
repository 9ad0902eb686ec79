"""The operator's algebra against dense matrices, and its snapshots."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import rotate_ewc
from rotate_ewc import EKFACLinearOperator, SnapshotError
from rotate_ewc.io.header import header_text
from rotate_ewc.linalg.block import Block
from rotate_ewc.provenance import Provenance
from tests.helpers.oracles import dense_operator

LOSS = nn.BCEWithLogitsLoss()


def seeded(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture(params=[True, False], ids=["separate", "joint"])
def operator(request: pytest.FixtureRequest) -> EKFACLinearOperator:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
    ).double()
    data = [(seeded(9, 2, 4), (seeded(9, 2, seed=1) > 0).double())]
    return EKFACLinearOperator(
        model,
        LOSS,
        list(model.parameters()),
        data,
        fisher_type="type2",
        separate_weight_and_bias=request.param,
    )


def dense(operator: EKFACLinearOperator) -> Tensor:
    return dense_operator(operator.blocks, operator.parameter_shapes)


def check_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_scalars(operator: EKFACLinearOperator) -> None:
    matrix = dense(operator)
    check_close(operator.trace, matrix.trace())
    check_close(operator.frobenius_norm, torch.linalg.matrix_norm(matrix))
    damped = operator.inverse(damping=0.3)
    sign, logabsdet = torch.linalg.slogdet(dense(damped))
    assert sign == 1
    check_close(damped.logdet, logabsdet)
    check_close(damped.det, torch.linalg.det(dense(damped)))


def test_singular_operator_has_minus_infinite_logdet(operator: EKFACLinearOperator) -> None:
    singular = operator * 0.0
    assert singular.logdet.item() == -math.inf
    assert singular.det.item() == 0.0
    with pytest.raises(ValueError, match=r"block of '0.weight.*' is singular; expected damping"):
        singular.inverse(damping=0.0)
    with pytest.raises(ValueError, match="damping is -1"):
        operator.inverse(damping=-1)


def test_no_columns(operator: EKFACLinearOperator) -> None:
    matrix = torch.zeros(sum(shape.numel() for shape in operator.parameter_shapes.values()), 0)
    assert (operator @ matrix).shape == matrix.shape
    tensors = [torch.zeros(*shape, 0) for shape in operator.parameter_shapes.values()]
    assert [t.shape for t in operator @ tensors] == [t.shape for t in tensors]


def test_inverse(operator: EKFACLinearOperator) -> None:
    matrix = dense(operator)
    eye = torch.eye(len(matrix), dtype=torch.float64)
    check_close(operator.inverse(damping=0.1) @ eye, torch.linalg.inv(matrix + 0.1 * eye))


def test_multiples(operator: EKFACLinearOperator) -> None:
    check_close(dense(2.5 * operator), 2.5 * dense(operator))
    check_close(dense(operator * 2), 2 * dense(operator))
    with pytest.raises(ValueError, match="factor is -1"):
        operator * -1
    with pytest.raises(TypeError):
        operator * "x"


def test_functions_of_eigenvalues_are_checked(operator: EKFACLinearOperator) -> None:
    bad: list[tuple[Callable[[Tensor], Any], type[Exception], str]] = [
        (lambda values: values - 1e3, ValueError, "0.weight.*(negative|at least 0)"),
        (lambda values: values / 0, ValueError, "0.weight.*finite"),
        (lambda values: values * math.inf, ValueError, "0.weight.*finite"),
        (lambda values: values.sum(), ValueError, "0.weight.*shape"),
        (lambda values: values[..., :1, :1], ValueError, "0.weight.*shape"),
        (lambda values: values > 0, ValueError, r"0.weight.*torch\.bool.*torch\.float64"),
        (lambda values: 1.0, TypeError, "float; expected a tensor"),
    ]
    before = dense(operator)
    for function, error, message in bad:
        with pytest.raises(error, match=message):
            operator.apply(function)
    with pytest.raises(TypeError, match=r"'sqrt'"):
        operator.apply("sqrt")
    assert torch.equal(dense(operator), before)


def test_functions_may_work_in_place(operator: EKFACLinearOperator) -> None:
    before = dense(operator)
    check_close(operator.apply(lambda values: values.add_(0.5)).trace, before.trace() + 19)
    assert torch.equal(dense(operator), before)


def test_damping_is_checked(operator: EKFACLinearOperator) -> None:
    for damping in (-1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"damping is {damping}"):
            operator.damped(damping)
        with pytest.raises(ValueError, match=f"damping is {damping}"):
            operator.sample(damping=damping)
    with pytest.raises(TypeError, match="damping is '1'"):
        operator.damped("1")


def test_arguments_of_samples_are_checked(operator: EKFACLinearOperator) -> None:
    with pytest.raises(ValueError, match="num_samples is 0"):
        operator.sample(0, damping=1.0)
    with pytest.raises(TypeError, match=r"num_samples is 1\.5"):
        operator.sample(1.5, damping=1.0)
    with pytest.raises(ValueError, match=r"'0.weight.*singular.*damping"):
        (operator * 0.0).sample(damping=0.0)


def test_samples_leave_the_global_random_state_alone(operator: EKFACLinearOperator) -> None:
    state = torch.get_rng_state()
    operator.sample(3, damping=1.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    first = operator.sample(damping=1.0)
    torch.manual_seed(5)
    for one, other in zip(first, operator.sample(damping=1.0), strict=True):
        assert torch.equal(one, other)


def test_unknown_parameter_has_no_block(operator: EKFACLinearOperator) -> None:
    with pytest.raises((KeyError, ValueError), match=r"'nothing'.*0\.weight.*3\.bias"):
        operator.block("nothing")


def test_what_is_too_large_is_not_written_out() -> None:
    numbers = torch.ones(1).expand(1, 3000, 4000)
    provenance = Provenance("L", "sum", "mc", 1, 1.0)
    blocks = [Block(("w",), None, None, numbers)]
    large = EKFACLinearOperator.from_blocks(blocks, {"w": (3000, 4000)}, provenance)
    with pytest.raises(ValueError, match=r"12000000 × 12000000"):
        large.to_dense()


def test_moves_and_casts(operator: EKFACLinearOperator) -> None:
    single = operator.to(dtype=torch.float32)
    assert single.dtype == torch.float32
    assert operator.dtype == torch.float64
    torch.testing.assert_close(dense(single), dense(operator), rtol=1e-4, atol=1e-5)
    elsewhere = operator.to("meta")
    assert elsewhere.device == torch.device("meta")
    product = elsewhere @ torch.ones(elsewhere.shape[0], dtype=torch.float64, device="meta")
    assert product.shape == (elsewhere.shape[0],)
    with pytest.raises(ValueError, match=r"dtype is torch.int64; expected a floating-point"):
        operator.to(dtype=torch.int64)


def test_file_round_trip(operator: EKFACLinearOperator, tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    operator.save(path)
    loaded = EKFACLinearOperator.load(path)
    assert torch.equal(dense(loaded), dense(operator))
    assert loaded.provenance == operator.provenance
    assert loaded.parameter_shapes == operator.parameter_shapes
    assert [p.name for p in tmp_path.iterdir()] == ["task.safetensors"]


def test_failed_save_leaves_the_old_file(
    operator: EKFACLinearOperator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "task.safetensors"
    operator.save(path)
    before = path.read_bytes()

    def full_disk(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(rotate_ewc.io.files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        (operator * 2.0).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["task.safetensors"]


def test_saving_into_no_folder(operator: EKFACLinearOperator, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none' to save in"):
        operator.save(tmp_path / "none" / "task.safetensors")


def test_files_that_are_no_snapshots(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no snapshot file"):
        EKFACLinearOperator.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(SnapshotError, match="text': this is not a snapshot file"):
        EKFACLinearOperator.load(tmp_path / "text")
    save_file({"x": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(SnapshotError, match=r"other': this is not a snapshot file: .*'header'"):
        EKFACLinearOperator.load(tmp_path / "other")


def test_no_decomposition_on_load(
    operator: EKFACLinearOperator, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = operator.state_dict()
    monkeypatch.setattr(torch.linalg, "eigh", None)
    assert torch.equal(dense(EKFACLinearOperator.from_state_dict(state)), dense(operator))


def test_load_state_dict_replaces_or_leaves_alone(operator: EKFACLinearOperator) -> None:
    other = operator * 2.0
    state = operator.state_dict()
    key = next(key for key in state if key.endswith("/gradient_basis"))
    broken = {**state, key: state[key][:, :1]}
    before = dense(other)
    with pytest.raises(SnapshotError, match=r"gradient_basis' is torch.float64 of shape"):
        other.load_state_dict(broken)
    assert torch.equal(dense(other), before)
    other.load_state_dict(state)
    assert torch.equal(dense(other), dense(operator))


def with_header(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**state, "header": json.dumps({**json.loads(header_text(state)), **changes})}


def test_bad_snapshots_are_refused(operator: EKFACLinearOperator) -> None:
    state = operator.state_dict()
    eigenvalues = next(key for key in state if key.endswith("/eigenvalues"))
    bad: list[tuple[Any, str]] = [
        ([1], "snapshot is list; expected a dictionary"),
        (with_header(state, format="rotate_ewc.operator/99"), 'format is "rotate_ewc.operator/99"'),
        (
            with_header(state, provenance={}),
            "at 'provenance': Object missing required field `loss`",
        ),
        (with_header(state, blocks=[{"parameters": ["w"]}]), "missing required field `transposed`"),
        (with_header(state, parameters={"w": [2]}), "is in a block, but not among the parameters"),
        ({**state, "more": torch.zeros(1)}, "unexpected key 'more'"),
        ({**state, eigenvalues: "x"}, "is str; expected a tensor"),
        ({**state, eigenvalues: state[eigenvalues].long()}, "is torch.int64 of shape"),
        (
            {**state, eigenvalues: state[eigenvalues][..., :1]},
            r"1\]; expected torch.float64 or .* of shape",
        ),
        ({**state, eigenvalues: -1 - state[eigenvalues]}, "has negative values"),
        ({**state, eigenvalues: state[eigenvalues] / 0}, "not finite"),
    ]
    for broken, message in bad:
        with pytest.raises(SnapshotError, match=message):
            EKFACLinearOperator.from_state_dict(broken)


def test_repr_shows_blocks(operator: EKFACLinearOperator) -> None:
    text = repr(operator)
    assert "38 × 38" in text
    assert "type2 Fisher of BCEWithLogitsLoss (mean), N = 9" in text
    for block in operator.blocks:
        assert block.label in text


def test_number_of_loss_terms_is_checked() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    tokens = [(seeded(5, 6, 3), seeded(5, 6, 4, seed=1))]
    for loss in (nn.MSELoss(), nn.MSELoss(reduction="sum")):
        EKFACLinearOperator(
            model, loss, list(model.parameters()), tokens, num_per_example_loss_terms=6
        )
        with pytest.raises(ValueError, match=r"is 7, but the outputs of shape .* have 6 each"):
            EKFACLinearOperator(
                model, loss, list(model.parameters()), tokens, num_per_example_loss_terms=7
            )


def test_num_data_scales_a_summed_loss_only() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    params, data = list(model.parameters()), [(seeded(5, 3), seeded(5, 4, seed=1))]
    for reduction, factor in (("sum", 10.0), ("mean", 1.0)):
        loss = nn.MSELoss(reduction=reduction)
        plain = EKFACLinearOperator(model, loss, params, data, fisher_type="type2")
        scaled = EKFACLinearOperator(model, loss, params, data, fisher_type="type2", num_data=50)
        check_close(scaled.trace, factor * plain.trace)
        assert scaled.num_data == 50
        assert plain.num_data == 5


def state_of_other(what: str) -> dict[str, Any]:
    """The snapshot of an operator that differs from `small()` in one thing."""
    shapes: dict[str, tuple[int, ...]] = {"w": (2, 3), "b": (2,)}
    told: dict[str, Any] = {
        "loss": "MSELoss",
        "reduction": "mean",
        "fisher_type": "mc",
        "num_data": 7,
        "num_loss_terms": 7.0,
        "settings": {"seed": 1},
    }
    if what == "names":
        shapes = {"w": (2, 3), "c": (2,)}
    elif what == "shape":
        shapes = {"w": (2, 4), "b": (2,)}
    elif what == "order":
        shapes = {"b": (2,), "w": (2, 3)}
    elif what == "temperature":
        told["settings"] = {"seed": 1, "temperature": 2.0}
    elif what in told:
        other = {"loss": "CrossEntropyLoss", "reduction": "sum", "fisher_type": "type2"}
        told[what] = {**other, "num_data": 9, "settings": {"seed": 2}}[what]
    blocks = [
        Block((name,), None, None, torch.ones(1, shape[0], shape[1] if len(shape) > 1 else 1))
        for name, shape in shapes.items()
    ]
    return EKFACLinearOperator.from_blocks(blocks, shapes, Provenance(**told)).state_dict()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("names", r"it lacks parameters \['b'\]; it has parameters \['c'\]"),
        ("shape", r"'w' has shape \[2, 4\] instead of \[2, 3\]"),
        ("order", r"in the order \['b', 'w'\] instead of \['w', 'b'\]"),
        ("loss", "loss is 'CrossEntropyLoss' instead of 'MSELoss'"),
        ("reduction", "reduction is 'sum' instead of 'mean'"),
        ("fisher_type", "fisher_type is 'type2' instead of 'mc'"),
        ("temperature", "temperature is 2.0 instead of 1.0"),
    ],
)
def test_load_state_dict_refuses_other_matrices(what: str, message: str) -> None:
    state = state_of_other(what)
    operator = EKFACLinearOperator.from_state_dict(state_of_other(""))
    before = operator.state_dict()
    with pytest.raises(SnapshotError, match=message + ".*from_state_dict makes a new operator"):
        operator.load_state_dict(state)
    after = operator.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in {*before, *after})
    new = EKFACLinearOperator.from_state_dict(state)
    assert list(new.state_dict()) == list(state)


@pytest.mark.parametrize("what", ["num_data", "settings"])
def test_load_state_dict_takes_other_data(what: str) -> None:
    operator = EKFACLinearOperator.from_state_dict(state_of_other(""))
    operator.load_state_dict(state_of_other(what))
    expected = EKFACLinearOperator.from_state_dict(state_of_other(what)).provenance
    assert operator.provenance == expected
