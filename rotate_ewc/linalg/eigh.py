"""Eigenvectors of symmetric matrices, with fallbacks if `eigh` fails, and of several at a time.

Matrices are `[groups, d, d]`, as in `rotate_ewc.linalg.kronecker`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock, Thread
from typing import Final, NamedTuple

import torch
from torch import Tensor

from rotate_ewc._utils.out_of_memory import naming_matrix
from rotate_ewc._utils.warnings import warn_user

# What is added to a diagonal, relative to its mean, where nothing else makes `eigh` converge. The
# eigenvectors are then a little off; the eigenvalues are exact in whatever basis comes out.
_JITTER: Final = 1e-6

# Below this, starting a thread costs more than it gains.
_SMALLEST_IN_THREADS: Final = 128
_SETTING_THREADS: Final = Lock()


class Eigenpairs(NamedTuple):
    """Eigenvalues `[groups, d]` in ascending order, and eigenvectors `[groups, d, d]`."""

    values: Tensor
    vectors: Tensor


def eigenbasis(covariance: Tensor, label: str = "factor") -> Tensor:
    """Return the eigenvectors of symmetric matrices, in ascending order of eigenvalue.

    Args:
        covariance: `[groups, d, d]`; only its upper triangle is looked at.
        label: What to call it in messages.

    Returns:
        Orthonormal columns `[groups, d, d]`. Where `eigh` fails to converge, it is tried again in
        float64, and then with the diagonal slightly changed; a warning says so.

    Raises:
        ValueError: If nothing helps, naming the matrix.
        MemoryError: If there is not enough memory, likewise.
    """
    return eigenbases([covariance], [label])[0]


def decomposed(covariance: Tensor, label: str) -> tuple[Eigenpairs, str]:
    """Return eigenvectors as `eigenbasis` does, and what there is to warn of, without a warning.

    Rows that are zero, such as those of inputs that are never on, have unit vectors of their own.
    `eigh` would mix them with whatever else has next to no variance, and steps in the eigenbasis
    would then move weights of which nothing is known.
    """
    zero = _zero_rows(covariance)
    if not bool(zero.any()):
        return _decomposed(covariance, label)
    rest = (~zero).nonzero().flatten()
    basis = torch.zeros_like(covariance)
    values = torch.zeros_like(covariance[:, 0])
    count = len(zero) - len(rest)
    basis[:, zero.nonzero().flatten(), torch.arange(count, device=zero.device)] = 1.0
    if not len(rest):
        return Eigenpairs(values, basis), ""
    found, remark = _decomposed(covariance[:, rest[:, None], rest], label)
    values[:, count:], basis[:, rest, count:] = found
    return Eigenpairs(values, basis), remark


def _zero_rows(covariance: Tensor) -> Tensor:
    """Return which rows, and columns, are zero in all groups, going by upper triangles."""
    zero = (covariance.diagonal(dim1=1, dim2=2) == 0).all(dim=0)
    if bool(zero.any()):
        # Squares may underflow where products do not.
        upper = covariance.triu() != 0
        zero &= ~(upper.any(dim=1) | upper.any(dim=2)).any(dim=0)
    return zero


def _decomposed(covariance: Tensor, label: str) -> tuple[Eigenpairs, str]:
    dtype, size = covariance.dtype, covariance.shape[1]
    remark = ""
    for changed, attempt in _attempts(covariance):
        try:
            with naming_matrix(f"the decomposition of the {label}", size, dtype):
                values, basis = (t.to(dtype) for t in torch.linalg.eigh(attempt, UPLO="U"))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            pass
        else:
            if bool(torch.isfinite(basis.sum())):
                return Eigenpairs(values, basis), remark and f"{remark} {changed}"
        remark = f"eigh of the {size} × {size} {label} did not converge in {dtype}; it did"
    raise ValueError(
        f"eigh of the {size} × {size} {label} did not converge, neither in {dtype} nor in float64, "
        f"nor with its diagonal changed by up to {_JITTER:g} of its mean; leave the parameter out "
        f"(exclude, or params)"
    )


def _attempts(covariance: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what to decompose, one after the other until it succeeds, and how to speak of it."""
    yield "", covariance
    covariance = covariance.double()
    yield "in float64", covariance
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    # Different for each entry: the same for all would leave the eigenvectors as they were.
    steps = torch.linspace(0, _JITTER, diagonal.shape[1], dtype=torch.float64)
    jitter = diagonal.mean(dim=1, keepdim=True) * steps.to(covariance.device)
    yield (
        f"in float64 with its diagonal raised by up to {_JITTER:g} of its mean",
        covariance + torch.diag_embed(jitter),
    )


def eigenbases(covariances: Sequence[Tensor], labels: Sequence[str] | None = None) -> list[Tensor]:
    """Return the eigenvectors of several symmetric matrices, each as `eigenbasis` does.

    Args:
        covariances: `[groups, d, d]` each; only upper triangles are looked at.
        labels: What to call them in messages.
    """
    return [pairs.vectors for pairs in eigenpairs(covariances, labels)]


def eigenpairs(
    covariances: Sequence[Tensor], labels: Sequence[str] | None = None
) -> list[Eigenpairs]:
    """Return eigenvalues and eigenvectors of several symmetric matrices.

    On a CPU, one `eigh` gains little from further threads, but several can run at the same time.
    Only matrices that are so large that all others would wait for them get all threads.

    Args:
        covariances: `[groups, d, d]` each; only upper triangles are looked at.
        labels: What to call them in messages.
    """
    found = _all_decomposed(covariances, labels or ["factor"] * len(covariances))
    for _, remark in found:
        if remark:
            warn_user(remark, RuntimeWarning)
    return [pairs for pairs, _ in found]


def _all_decomposed(
    covariances: Sequence[Tensor], labels: Sequence[str]
) -> list[tuple[Eigenpairs, str]]:
    threads = torch.get_num_threads()
    order = sorted(range(len(covariances)), key=lambda i: -covariances[i].shape[1])
    bases: dict[int, tuple[Eigenpairs, str]] = {}
    work = [covariances[i].shape[1] ** 3 for i in order]
    while order and (work[0] * threads >= sum(work) or not _gains_from_company(covariances, order)):
        bases[order[0]] = decomposed(covariances[order[0]], labels[order[0]])
        del order[0], work[0]
    if order:
        with ThreadPoolExecutor(threads, initializer=_use_one_thread) as pool:
            arguments = [covariances[i] for i in order], [labels[i] for i in order]
            found = pool.map(decomposed, *arguments)
            bases.update(zip(order, found, strict=True))
    return [bases[i] for i in range(len(covariances))]


def _gains_from_company(covariances: Sequence[Tensor], order: Sequence[int]) -> bool:
    """Whether at least two of some matrices, the largest first, are worth a thread of their own."""
    largest = [covariances[i] for i in order[:2]]
    return len(largest) == 2 and all(
        c.device.type == "cpu" and c.shape[1] >= _SMALLEST_IN_THREADS for c in largest
    )


def _use_one_thread() -> None:
    """Let the new thread that runs this compute by itself.

    `torch.set_num_threads` also sets the number with which all later threads of the process begin,
    and those may be the user's. A helper thread, whose own number does not matter, restores it.
    """
    with _SETTING_THREADS:
        inherited = torch.get_num_threads()
        torch.set_num_threads(1)
        helper = Thread(target=torch.set_num_threads, args=(inherited,))
        helper.start()
        helper.join()
