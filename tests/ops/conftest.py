import pytest
import torch
from hypothesis import settings

# The same examples on every run; compiling and first calls take longer than hypothesis' deadline.
settings.register_profile("ops", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("ops")


@pytest.fixture(autouse=True)
def _one_seed_and_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
