"""Fixtures for all tests; `tiny.py` has the shared detectors, scans and stores, and a list of what to import."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run a module's tests with one torch thread: `pytestmark = pytest.mark.usefixtures("one_thread")`.

    For tiny networks a second thread costs more than it brings, and on a busy machine the two wait for each other for minutes.
    Torch sums in another order with another number of threads, so tests that compare bits between processes need it too.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
