"""What every test shares."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is decorated
    os.environ["TRITON_INTERPRET"] = "1"


# The tensors of the tests are too small to share: on a busy machine threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """What a test does to the number of threads ends with it."""
    yield
    torch.set_num_threads(1)
