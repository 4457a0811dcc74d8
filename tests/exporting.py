"""Which tests need a torch that can export."""

import pytest
import torch
from torch.torch_version import TorchVersion

from backbones.export.formats import MIN_TORCH

needs_export = pytest.mark.skipif(
    TorchVersion(torch.__version__) < MIN_TORCH, reason=f'exporting needs torch {MIN_TORCH}'
)
