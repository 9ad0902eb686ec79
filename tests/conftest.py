"""What holds for all tests."""

import gc


def pytest_collection_finish() -> None:
    """Leave out of later collections of garbage what has been imported, and all tests.

    To walk through these takes the better part of a second, and some tests collect on purpose.
    """
    gc.collect()
    gc.freeze()
