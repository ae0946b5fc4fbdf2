"""For all tests of losses: one thread."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Matrices as small as these gain nothing by threads, and waiting for them on a busy machine costs minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
