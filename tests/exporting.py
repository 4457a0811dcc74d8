"""Which tests need a torch that can export."""

import pytest
import torch
from torch.torch_version import TorchVersion

from backbones.export.formats import LEAST_TORCH

needs_export = pytest.mark.skipif(
    TorchVersion(torch.__version__) < LEAST_TORCH, reason=f'exporting needs torch {LEAST_TORCH}'
)
