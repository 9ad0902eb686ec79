"""Eigenvectors of one or several symmetric matrices, with fallbacks if `eigh` fails.

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

# Added to a diagonal, relative to its mean, if `eigh` converges in no other way. The eigenvectors
# are then slightly wrong, but eigenvalues are exact in any basis.
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
        covariance: `[groups, d, d]`; only its upper triangle is read.
        label: Its name in messages.

    Returns:
        Orthonormal columns `[groups, d, d]`. If `eigh` does not converge, it is repeated in
        float64, and then with a slightly changed diagonal; a warning says so.

    Raises:
        ValueError: If it does not converge then either. The message names the matrix.
        MemoryError: If there is not enough memory. The message names the matrix.
    """
    return eigenbases([covariance], [label])[0]


def decomposed(covariance: Tensor, label: str) -> tuple[Eigenpairs, str]:
    """Decompose a matrix as `eigenbasis` does, but return the text of the warning with the result.

    Rows of zeros, such as those of inputs that are always zero, get unit vectors as eigenvectors.
    `eigh` would mix them with other directions that have almost no variance, and steps in the
    eigenbasis would then move weights that the data say nothing about.
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
    """Return which rows and columns are zero in all groups, according to the upper triangles."""
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
    """Yield the matrices to try in turn, each after a few words that describe it."""
    yield "", covariance
    covariance = covariance.double()
    yield "in float64", covariance
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    # Different for each entry: one number for all would not change the eigenvectors.
    steps = torch.linspace(0, _JITTER, diagonal.shape[1], dtype=torch.float64)
    jitter = diagonal.mean(dim=1, keepdim=True) * steps.to(covariance.device)
    yield (
        f"in float64 with its diagonal raised by up to {_JITTER:g} of its mean",
        covariance + torch.diag_embed(jitter),
    )


def eigenbases(covariances: Sequence[Tensor], labels: Sequence[str] | None = None) -> list[Tensor]:
    """Return the eigenvectors of several symmetric matrices, each as `eigenbasis` does.

    Args:
        covariances: `[groups, d, d]` each; only upper triangles are read.
        labels: Their names in messages.
    """
    return [pairs.vectors for pairs in eigenpairs(covariances, labels)]


def eigenpairs(
    covariances: Sequence[Tensor], labels: Sequence[str] | None = None
) -> list[Eigenpairs]:
    """Return eigenvalues and eigenvectors of several symmetric matrices.

    On a CPU, one `eigh` gains little from more threads, but several can run at the same time. A
    matrix gets all threads only if it is so large that all others would have to wait for it.

    Args:
        covariances: `[groups, d, d]` each; only upper triangles are read.
        labels: Their names in messages.
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
    """Whether the two largest matrices, first in the order, are both worth a thread."""
    largest = [covariances[i] for i in order[:2]]
    return len(largest) == 2 and all(
        c.device.type == "cpu" and c.shape[1] >= _SMALLEST_IN_THREADS for c in largest
    )


def _use_one_thread() -> None:
    """Make the new thread that runs this compute without further threads.

    `torch.set_num_threads` also sets the number with which all later threads of the process start,
    including the user's. A helper thread, whose own number does not matter, restores it.
    """
    with _SETTING_THREADS:
        inherited = torch.get_num_threads()
        torch.set_num_threads(1)
        helper = Thread(target=torch.set_num_threads, args=(inherited,))
        helper.start()
        helper.join()
