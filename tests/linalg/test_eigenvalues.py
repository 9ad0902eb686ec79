"""The ways to the eigenvalues, against a loop over examples, label vectors and positions."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from threading import get_ident
from time import sleep
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from rotate_ewc.linalg import eigenvalues, eigh
from rotate_ewc.linalg.eigenvalues import Kernel, Route, cheapest_route, squared_projections
from rotate_ewc.linalg.outer_products import add_covariance_
from tests.helpers.memory import peak_bytes

MANY_POSITIONS = [
    Route(Kernel.PAIRS),
    *(Route(Kernel.EXAMPLES, a, g) for a in (True, False) for g in (True, False)),
]


def seeded(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def orthogonal(groups: int, size: int, seed: int) -> Tensor:
    return torch.linalg.qr(seeded(groups, size, size, seed=seed))[0]


def positions_together(vectors: Tensor) -> Tensor:
    """The same numbers, laid out as a convolution leaves them."""
    return vectors.mT.contiguous().mT


def by_loops(
    gradients: list[Tensor], activations: Tensor, left: Tensor | None, right: Tensor | None
) -> Tensor:
    groups, examples, shared, d_in = activations.shape
    d_out = gradients[0].shape[3]
    total = torch.zeros(groups, d_out, d_in, dtype=activations.dtype)
    for group in range(groups):
        q_g = torch.eye(d_out, dtype=total.dtype) if left is None else left[group]
        q_a = torch.eye(d_in, dtype=total.dtype) if right is None else right[group]
        for n in range(examples):
            for g in gradients:
                gradient = sum(
                    torch.outer(g[group, n, s], activations[group, n, s]) for s in range(shared)
                )
                total[group] += (q_g.T @ gradient @ q_a) ** 2
    return total


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("rotated", ["both", "output", "input", "neither"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("shared", [1, 2, 5, 9])
def test_every_route_agrees_with_a_loop(
    shared: int, groups: int, rotated: str, together: bool
) -> None:
    gradients = [seeded(groups, 7, shared, 4, seed=k) for k in range(3)]
    activations = seeded(groups, 7, shared, 6, seed=9)
    left = orthogonal(groups, 4, 1) if rotated in ("both", "output") else None
    right = orthogonal(groups, 6, 2) if rotated in ("both", "input") else None
    expected = by_loops(gradients, activations, left, right)
    if together:
        gradients = [positions_together(g) for g in gradients]
        activations = positions_together(activations)
    routes = [*MANY_POSITIONS, *([Route(Kernel.SINGLE)] if shared == 1 else [])]
    for route in routes:
        before = activations.clone()
        result = squared_projections(iter(gradients), activations, left, right, route)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(activations, before)


@pytest.mark.parametrize("max_bytes", [1, 1000, 5000])
@pytest.mark.parametrize("route", MANY_POSITIONS)
def test_work_in_chunks_changes_nothing(route: Route, max_bytes: int) -> None:
    gradients, activations = [seeded(2, 7, 5, 4)], seeded(2, 7, 5, 6, seed=1)
    left, right = orthogonal(2, 4, 3), orthogonal(2, 6, 4)
    whole = squared_projections(gradients, activations, left, right, route)
    chunks = squared_projections(gradients, activations, left, right, route, max_bytes)
    torch.testing.assert_close(chunks, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 4, 16, 48])
@pytest.mark.parametrize(
    ("route", "groups", "d_out", "d_in", "bases"),
    [
        (Route(Kernel.PAIRS), 1, 5, 60, False),
        (Route(Kernel.PAIRS), 3, 40, 4, False),
        (Route(Kernel.EXAMPLES), 1, 20, 30, False),
        (Route(Kernel.EXAMPLES, False, False), 1, 20, 30, True),
    ],
    ids=str,
)
def test_work_takes_what_it_may(
    route: Route, groups: int, d_out: int, d_in: int, bases: bool, at_once: int
) -> None:
    """Chunks are of as many examples as fit, and of one where not even that fits."""
    shared, examples = 4, 48
    gradients = [seeded(groups, examples, shared, d_out)]
    activations = seeded(groups, examples, shared, d_in)
    left = orthogonal(groups, d_out, 1) if bases else None
    right = orthogonal(groups, d_in, 2) if bases else None

    def peak(max_bytes: int | None) -> int:
        return peak_bytes(
            lambda: squared_projections(gradients, activations, left, right, route, max_bytes)
        )

    matrix = 8 * groups * d_out * d_in
    one = (1 + bases) * matrix
    if route.kernel is Kernel.PAIRS:
        # Of the pairs of four positions, both factors and their product.
        one = 8 * groups * 10 * 2 * (d_out + d_in)
    besides = 2 * matrix + 1000  # the sum, that of a chunk, and numbers of pairs
    for max_bytes in (at_once * one, at_once * one + one - 1):
        assert 0.85 * at_once * one <= peak(max_bytes) <= at_once * one + besides
    assert peak(1) <= one + besides
    assert peak(None) == peak(examples * one)


@pytest.mark.parametrize("route", MANY_POSITIONS, ids=str)
def test_work_is_on_the_device_of_the_data(route: Route) -> None:
    """Of tensors that have no data, so that no such device is needed."""
    with FakeTensorMode():
        gradients = [torch.empty(1, 3, 4, 5, device="cuda")]
        activations, left, right = (
            torch.empty(*shape, device="cuda") for shape in ((1, 3, 4, 6), (1, 5, 5), (1, 6, 6))
        )
        result = squared_projections(gradients, activations, left, right, route)
    assert result.device.type == "cuda"


def test_batches_that_do_not_belong_together_are_no_chunks() -> None:
    """Of different sizes, but the same in the first chunk: nothing is left out of the sum."""
    with pytest.raises(ValueError, match="shorter"):
        eigenvalues.pair_products(seeded(1, 4, 2, 3), seeded(1, 2, 2, 5), max_bytes=1)


@pytest.mark.parametrize("d_in", [1, 2, 3])
@pytest.mark.parametrize("rotated", ["both", "output", "input", "neither"])
def test_squares_of_gradients(rotated: str, d_in: int) -> None:
    """Also of a bias, which is one column."""
    gradients, expected = seeded(2, 5, 4, d_in), torch.zeros(2, 4, d_in, dtype=torch.float64)
    left = orthogonal(2, 4, 1) if rotated in ("both", "output") else None
    right = orthogonal(2, d_in, 2) if rotated in ("both", "input") else None
    for group in range(2):
        for gradient in gradients[group]:
            turned = gradient if left is None else left[group].T @ gradient
            expected[group] += (turned if right is None else turned @ right[group]) ** 2
    result = eigenvalues.squared_entries(gradients, left, right)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def multiplications(shared: int, d_out: int, d_in: int, vectors: int, route: Route) -> int:
    """Multiplications in the matrix products of a route, for one example."""
    total = shared * d_in**2 if route.rotate_activations else vectors * d_out * d_in**2
    total += vectors * (shared * d_out**2 if route.rotate_gradients else d_out**2 * d_in)
    factors = shared * (shared + 1) // 2 if route.kernel is Kernel.PAIRS else shared
    return total + vectors * d_out * d_in * factors


def elements_moved(shared: int, d_out: int, d_in: int, vectors: int, route: Route) -> int:
    """Elements that a route writes: all pairs of positions, or each form of the gradients."""
    if route.kernel is Kernel.PAIRS:
        return vectors * shared * (shared + 1) // 2 * (d_out + d_in)
    forms = 1 + (not route.rotate_activations) + (not route.rotate_gradients)
    return vectors * d_out * d_in * forms


@pytest.mark.parametrize("route", MANY_POSITIONS, ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 5, 1), (5, 8, 5, 3), (4, 3, 7, 2)], ids=str)
def test_multiplications_are_those_of_the_products(
    shape: tuple[int, int, int, int], route: Route
) -> None:
    """As PyTorch counts what runs; a multiplication and its addition are two operations."""

    def of_sum(total: Any, left: Any, right: Any, *rest: Any, **more: Any) -> int:
        return 2 * left[0] * left[1] * left[2] * right[2]

    shared, d_out, d_in, vectors = shape
    gradients = [seeded(1, 1, shared, d_out, seed=k) for k in range(vectors)]
    activations = seeded(1, 1, shared, d_in)
    bases = orthogonal(1, d_out, 1), orthogonal(1, d_in, 2)
    custom = {torch.ops.aten.baddbmm_: of_sum}
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        squared_projections(gradients, activations, *bases, route)
    assert counter.get_total_flops() == 2 * multiplications(*shape, route)


@pytest.mark.parametrize("vectors", [1, 3, 40])
@pytest.mark.parametrize("shared", [2, 3, 4, 5, 6, 8, 11, 16, 23, 40, 100, 1000])
def test_cheapest_route_costs_least(shared: int, vectors: int) -> None:
    """Of operations, where an element that is moved counts as twenty, at sizes of all ratios."""

    def cost(d_out: int, d_in: int, route: Route) -> int:
        shape = (shared, d_out, d_in, vectors)
        return 2 * multiplications(*shape, route) + 20 * elements_moved(*shape, route)

    sizes = [1, 2, 3, 5, 8, 13, 20, 27, 32, 50, 64, 90, 128, 200, 288, 400, 512, 784, 1024]
    for d_out, d_in in product(sizes, repeat=2):
        chosen = cost(d_out, d_in, cheapest_route(shared, d_out, d_in, vectors))
        assert chosen == min(cost(d_out, d_in, route) for route in MANY_POSITIONS), (d_out, d_in)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 400, 784, 1), Route(Kernel.SINGLE)),
        ((2, 512, 512, 1), Route(Kernel.PAIRS)),
        ((1024, 32, 27, 1), Route(Kernel.EXAMPLES, False, False)),  # first layer of a CNN
        ((256, 64, 288, 1), Route(Kernel.EXAMPLES, False, True)),
        ((16, 128, 576, 9), Route(Kernel.EXAMPLES, True, True)),
        ((128, 768, 256, 1), Route(Kernel.EXAMPLES, True, True)),  # tokens
    ],
)
def test_routes_of_familiar_layers(shape: tuple[int, int, int, int], expected: Route) -> None:
    assert cheapest_route(*shape) == expected


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", [3, 255, 256, 403])
@pytest.mark.parametrize("shared", [1, 5, 500])
def test_covariance_by_panels(groups: int, size: int, shared: int) -> None:
    vectors = seeded(groups, 3, shared, size)
    start = seeded(groups, size, size, seed=1)
    expected = start + torch.einsum("gnsi,gnsj->gij", vectors, vectors)
    for layout in (vectors, positions_together(vectors)):
        total = start.clone()
        add_covariance_(total, layout)
        torch.testing.assert_close(total.triu(), expected.triu(), rtol=1e-11, atol=1e-11)


def test_eigenbasis_looks_at_the_upper_triangle_alone() -> None:
    root = seeded(2, 5, 5)
    covariance = root @ root.mT
    below = torch.full_like(covariance, 7.0).tril(-1)
    basis = eigh.eigenbasis(covariance.triu() + below)
    rotated = basis.mT @ covariance @ basis
    diagonal = torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(rotated, diagonal, atol=1e-12, rtol=0.0)


def test_chunks_are_larger_on_accelerators() -> None:
    on_cpu = eigenvalues.chunk_bytes(torch.device("cpu"))
    assert on_cpu < eigenvalues.chunk_bytes(torch.device("cuda"))


def test_eigenbases_in_threads_are_those_of_one_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each belongs to its own matrix, also of several groups, and threads are set as before."""
    monkeypatch.setattr(eigh, "_SMALLEST_IN_THREADS", 4)
    plain, seen = eigh.decomposed, []

    def watched(covariance: Tensor, label: str) -> tuple[Tensor, str]:
        seen.append((covariance.shape[1], get_ident() != caller, torch.get_num_threads()))
        return plain(covariance, label)

    monkeypatch.setattr(eigh, "decomposed", watched)
    caller, sizes = get_ident(), ((1, 6), (2, 7), (1, 8), (1, 20), (1, 8), (1, 5), (1, 6))
    covariances = [root @ root.mT for root in (seeded(g, size, size) for g, size in sizes)]
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        bases = eigh.eigenbases(covariances)
        # The others would wait for the largest, which therefore gets all threads.
        assert seen[0] == (20, False, 3)
        assert sorted(seen[1:]) == [(size, True, 1) for size in (5, 6, 6, 7, 8, 8)]
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(threads)
    for covariance, basis in zip(covariances, bases, strict=True):
        rotated = basis.mT @ covariance @ basis
        diagonal = torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))
        torch.testing.assert_close(rotated, diagonal, atol=1e-11, rtol=0.0)


@pytest.mark.parametrize(
    ("sizes", "smallest", "in_threads"),
    [
        ((8, 8, 8), 8, 3),  # as large as is worth a thread
        ((8, 8, 7), 8, 3),  # two are enough
        ((8, 7, 7), 8, 0),  # one is not
        ((9, 9, 9), 10, 0),
        ((12, 8, 8), 4, 0),  # half of the work or more: 1728 of 2752, and then 512 of 1024
        ((10, 9, 9), 4, 3),
        ((8, 8), 4, 0),  # exactly half
        ((8,), 4, 0),
    ],
)
def test_threads_only_where_they_gain(
    sizes: tuple[int, ...], smallest: int, in_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two threads: a matrix of half of the work or more gets both, small ones get none."""
    plain, caller, found = eigh.decomposed, get_ident(), []

    def watched(covariance: Tensor, label: str) -> tuple[Tensor, str]:
        found.append(get_ident())
        sleep(0.01)  # so that further threads, if there were any, would take the next
        return plain(covariance, label)

    monkeypatch.setattr(eigh, "decomposed", watched)
    monkeypatch.setattr(eigh, "_SMALLEST_IN_THREADS", smallest)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        eigh.eigenbases([seeded(1, size, size) for size in sizes])
    finally:
        torch.set_num_threads(threads)
    assert len(found) == len(sizes)
    others = [thread for thread in found if thread != caller]
    assert len(others) == in_threads
    assert len(set(others)) <= 2


def test_what_fails_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(covariance: Tensor, label: str) -> tuple[Tensor, str]:
        if get_ident() == caller:
            pytest.fail("expected to be called in a thread")
        raise ValueError(f"no basis of size {covariance.shape[1]}")

    monkeypatch.setattr(eigh, "_SMALLEST_IN_THREADS", 4)
    monkeypatch.setattr(eigh, "decomposed", fails)
    caller, threads = get_ident(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="no basis of size 6"):
            eigh.eigenbases([seeded(1, 5, 5), seeded(1, 6, 6), seeded(1, 5, 5)])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
