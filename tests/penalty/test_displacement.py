"""Where parameters are in an eigenbasis, followed from step to step, against dense rotations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rotate_ewc.linalg.block import Block
from rotate_ewc.penalty.displacement import Displacement, without_rounding_errors_
from rotate_ewc.penalty.terms import Stack
from tests.helpers.oracles import assert_close
from tests.helpers.thin import orthonormal

D_OUT, D_IN = 3, 4


def made(dtype: torch.dtype = torch.float64) -> tuple[Displacement, Tensor]:
    """A stack of a weight and its bias, in bases of float64; and the rotation, dense."""
    left, right = orthonormal(1, D_OUT, D_OUT, 1), orthonormal(1, D_IN + 1, D_IN + 1, 2)
    values = torch.ones(1, D_OUT, D_IN + 1, dtype=torch.float64)
    block = Block(("0/w", "0/b"), left, right, values)
    anchors = (random(3, (1, D_OUT, D_IN)).to(dtype), random(4, (1, D_OUT)).to(dtype))
    stack = Stack(("w", "b"), block, anchors)
    return Displacement(stack), torch.kron(left[0].contiguous(), right[0].contiguous())


def random(seed: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def parameters(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Both have grown by outputs, which no anchor has."""
    sizes = {"w": (D_OUT + 1, D_IN), "b": (D_OUT + 2,)}
    return {
        name: random(seed + number, shape).to(dtype).requires_grad_()
        for number, (name, shape) in enumerate(sizes.items())
    }


def flat(weight: Tensor, bias: Tensor) -> Tensor:
    """Row by row, the bias first."""
    return torch.cat([bias[:D_OUT, None], weight[:D_OUT]], dim=1).flatten().double()


def coordinates(displacement: Displacement) -> Tensor:
    found = displacement.coordinates
    assert list(found) == ["0/w", "0/b"]
    return flat(found["0/w"], found["0/b"])


def expected(displacement: Displacement, rotation: Tensor, now: dict[str, Tensor]) -> Tensor:
    anchor = flat(*(a[0] for a in displacement.stack.anchors))
    return rotation.T @ (flat(now["w"], now["b"]).detach() - anchor)


def test_begins_at_the_anchor() -> None:
    displacement, _ = made(torch.float32)
    assert not coordinates(displacement).any()
    assert {z.dtype for z in displacement.coordinates.values()} == {torch.float64}
    at = {name: a[0].clone() for name, a in zip("wb", displacement.stack.anchors, strict=True)}
    assert not bool(displacement.moved(at))
    for name in "wb":
        moved = {n: t.clone() for n, t in at.items()}
        moved[name].view(-1)[-1] += 1.0
        assert bool(displacement.moved(moved))


def test_follows_what_has_moved() -> None:
    displacement, rotation = made()
    for seed in (10, 20):
        now = parameters(seed)
        assert bool(displacement.moved(now))
        displacement.follow(now)
        assert not bool(displacement.moved(now))
        assert_close(coordinates(displacement), expected(displacement, rotation, now))
        assert not any(z.requires_grad for z in displacement.coordinates.values())
    # What moves later is compared with a copy; rows that were added are no matter.
    with torch.no_grad():
        now["w"][D_OUT] += 1.0
        assert not bool(displacement.moved(now))
        now["w"][0, 0] += 1.0
    assert bool(displacement.moved(now))
    before = coordinates(displacement)
    displacement.follow(now)
    assert_close(coordinates(displacement), expected(displacement, rotation, now))
    assert (coordinates(displacement) - before).abs().max() > 1e-3


def test_what_parameters_round_off_is_no_move() -> None:
    """The coordinates that were set stay to the bit where the parameters cannot follow."""
    displacement, rotation = made(torch.float32)
    now = parameters(10, torch.float32)
    displacement.follow(now)
    assert_close(coordinates(displacement), expected(displacement, rotation, now))
    aim = {key: z + 1e-3 for key, z in displacement.coordinates.items()}
    with torch.no_grad():
        displacement.lead(now, aim)
    assert not bool(displacement.moved(now))
    displacement.follow(now)
    assert all(torch.equal(displacement.coordinates[key], z) for key, z in aim.items())


def test_leads_parameters_to_coordinates() -> None:
    displacement, rotation = made()
    now = parameters(10)
    displacement.follow(now)
    beyond = now["w"][D_OUT].detach().clone(), now["b"][D_OUT:].detach().clone()
    aim = {"0/w": random(5, (D_OUT, D_IN)), "0/b": random(6, (D_OUT,))}
    with torch.no_grad():
        displacement.lead(now, aim)
    assert not bool(displacement.moved(now))
    assert_close(flat(aim["0/w"], aim["0/b"]), expected(displacement, rotation, now))
    assert torch.equal(now["w"][D_OUT].detach(), beyond[0])
    assert torch.equal(now["b"][D_OUT:].detach(), beyond[1])
    assert displacement.coordinates == aim
    assert displacement.coordinates is not aim


def test_coordinates_that_are_restored_are_those_of_parameters_that_match() -> None:
    first, rotation = made()
    now = parameters(10)
    first.follow(now)
    second, _ = made()
    second.restore(first.coordinates)
    assert all(second.coordinates[key] is z for key, z in first.coordinates.items())
    second.follow(now)
    # They differ by the rounding of rotating back.
    assert_close(coordinates(second), expected(second, rotation, now))
    other = parameters(20)
    second.follow(other)
    assert_close(coordinates(second), expected(second, rotation, other))


def test_rotates_and_splits_by_the_names_of_the_stack() -> None:
    displacement, rotation = made()
    tensors = {"0/w": random(5, (D_OUT, D_IN)), "0/b": random(6, (D_OUT,))}
    rotated = displacement.rotate(tensors)
    assert {key: z.shape for key, z in rotated.items()} == {
        "0/w": (D_OUT, D_IN),
        "0/b": (D_OUT,),
    }
    assert_close(
        flat(rotated["0/w"], rotated["0/b"]), rotation.T @ flat(tensors["0/w"], tensors["0/b"])
    )


# --- rounding errors ---


def test_entries_within_rounding_errors_of_rows_and_columns() -> None:
    """Eight units in the last place of the larger of both norms."""
    unit = torch.finfo(torch.float32).eps
    for row, column in ((1.0, 100.0), (100.0, 1.0)):
        for units, kept in ((790.0, False), (810.0, True)):
            matrix = torch.zeros(1, 2, 2)
            matrix[0, 0, 1], matrix[0, 1, 0] = row, column
            matrix[0, 0, 0] = units * unit
            found = without_rounding_errors_(matrix.clone())
            assert bool(found[0, 0, 0] != 0) == kept
            assert torch.equal(found[0].fliplr().diag(), matrix[0].fliplr().diag())


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_entries_whose_row_and_column_are_within_those_of_the_whole_matrix(scale: float) -> None:
    """In each group by itself; elsewhere what is within those of its own row goes all the same."""
    unit = scale * torch.finfo(torch.float64).eps
    for row, column, kept in ((7.0, 7.0, False), (9.0, 7.0, True), (7.0, 9.0, True)):
        matrix = torch.zeros(2, 3, 3, dtype=torch.float64)
        matrix[:, 2, 2] = scale
        matrix[0, 0, 0] = 6.0 * unit
        matrix[0, 0, 1] = (row**2 - 36.0) ** 0.5 * unit
        matrix[0, 1, 0] = (column**2 - 36.0) ** 0.5 * unit
        matrix[0, 2, 1] = 5.0 * unit
        matrix[1, 2, 0] = 20.0 * unit
        given = matrix.clone()
        found = without_rounding_errors_(given)
        assert found is given
        assert bool(found[0, 0, 0] != 0) == kept
        assert found[0, 2, 1] == 0.0
        assert torch.equal(found[:, 2, 2], matrix[:, 2, 2])
        assert torch.equal(found[1], matrix[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_taken_of_what_is_known(dtype: torch.dtype) -> None:
    matrix = random(1, (2, 4, 5)).to(dtype)
    assert torch.equal(without_rounding_errors_(matrix.clone()), matrix)
