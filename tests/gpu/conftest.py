"""What runs on a GPU computes what a CPU does; every test here skips where there is none."""

from collections.abc import Iterator

import pytest
import torch


# Of the session, so that no model is made first where there is no GPU.
@pytest.fixture(scope='session', autouse=True)
def cuda_in_full_precision() -> Iterator[None]:
    """Skip without a GPU; with one, convolutions do not round to TensorFloat-32."""
    if not torch.cuda.is_available():
        pytest.skip('needs a GPU, and `pytest tests/gpu`')
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed
