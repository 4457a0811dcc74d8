"""Which tests need a torch that can export, and what makes exporting a tiny model fast."""

import pytest
import torch
from torch.torch_version import TorchVersion

from backbones.export.formats import MIN_TORCH

needs_export = pytest.mark.skipif(
    TorchVersion(torch.__version__) < MIN_TORCH, reason=f'exporting needs torch {MIN_TORCH}'
)

# For the end of a config; export time is the number of operators.
FEWER_BLOCKS = """
model['backbone']['arch'].update(depths=(1, 1, 1, 1), mlp_ratios=((2,), (2,), (2,), (2,)))
"""
