"""How near is near enough."""

from torch import Tensor


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Compare relative to the largest entry that is expected.

    Args:
        actual: What came out.
        expected: What must come out; not all zeros, which would make any comparison with it vain.
        tolerance: Largest difference, relative to the largest expected entry.
    """
    assert actual.shape == expected.shape
    assert expected.abs().max() > 0
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
