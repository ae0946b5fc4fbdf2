"""For all tests of losses: one thread."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _alone(one_thread):
    """Matrices as small as these gain nothing by threads, and waiting for them on a busy machine costs minutes."""
