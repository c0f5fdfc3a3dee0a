"""For the tests of all folders."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> None:
    """Leave what has been imported so far out of garbage collections.

    There are millions of such objects, and some code under test, and of Lightning's, collects on purpose: 0.15 s each.
    """
    gc.collect()
    gc.freeze()
