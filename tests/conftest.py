"""What every test shares."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors of the tests are too small to share: on a busy machine threads would only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
