"""Parameters and multiply-adds."""

import copy
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backbones import ARCHITECTURES, EfficientFormerV2

HOW = (
    'Multiply-adds are half the FLOPs that torch.utils.flop_counter counts in convolutions and '
    'matrix products, those of attention included (scaled_dot_product_attention as its two '
    'products); norms, activations and resizing are not counted. They are those of one picture, '
    'and of the network before folding, as parameters are. Of a detector with RoI heads they leave '
    'these out, whose cost depends on the picture. Of a training step they are those of the '
    'forward pass.'
)
# Multiply-adds of s2 at 224x224, classifier included (the paper's Table 2).
PAPER_S2 = 1.25e9
NUM_IMAGENET_CLASSES = 1000


def count_parameters(model: nn.Module, part: str) -> int:
    """Numbers that are learned, in the backbone or in the whole model."""
    module = model.backbone if part == 'backbone' else model
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, part: str, size: tuple[int, int]) -> int:
    """Multiply-adds for one picture.

    Args:
        model: A model of mmdet or mmseg that was not folded.
        part: 'backbone', or 'model' for that with neck and dense heads.
        size: Height and width of the input.
    """
    # Nothing is computed on this device, shapes alone are.
    model = copy.deepcopy(model).to('meta')
    pictures = torch.zeros(1, 3, *size, device='meta')
    with (
        FlopCounterMode(display=False) as counter,
        patch.object(F, 'scaled_dot_product_attention', two_products),
    ):
        if part == 'backbone':
            model.backbone(pictures)
        else:
            features = model.extract_feat(pictures)
            for name in ('decode_head', 'rpn_head', 'bbox_head'):
                if hasattr(model, name):
                    getattr(model, name)(features)
    return counter.get_total_flops() // 2


def two_products(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The products of ``scaled_dot_product_attention``, whose kernels the counter may not know."""
    return (q @ k.transpose(-2, -1)) @ v


def check_against_paper() -> dict[str, float]:
    """What this way of counting gives for s2 at 224x224, and what the paper says."""
    holder = nn.Module()
    holder.backbone = EfficientFormerV2('s2').eval()
    counted = count_macs(holder, 'backbone', (224, 224))
    # Distillation gives it two classifiers.
    channels = ARCHITECTURES['s2']['channels'][-1]
    return dict(
        counted=counted,
        with_classifier=counted + 2 * channels * NUM_IMAGENET_CLASSES,
        paper=PAPER_S2,
    )
