"""A segmentor as one function that can be traced."""

from functools import partial

import torch
import torch.nn.functional as F
from mmseg.models.utils import Upsample
from torch import Tensor, nn

from .preprocessing import Preprocessing


class ExportableSegmentor(nn.Module):
    """An mmseg EncoderDecoder in its 'whole' mode.

    Args:
        segmentor: The model.
        pad_divisor: See :class:`Preprocessing`.
        logits: Give the classes' logits instead of the surest class.
    """

    def __init__(self, segmentor: nn.Module, pad_divisor: int, logits: bool = False) -> None:
        super().__init__()
        self.preprocessing = Preprocessing(segmentor.data_preprocessor, pad_divisor)
        self.segmentor = segmentor
        for module in segmentor.modules():
            # Others make constants of their sizes, which is an error where those are open.
            if isinstance(module, Upsample) and float(module.scale_factor or 0.5).is_integer():
                module.forward = partial(upsample, module)
        self.logits = logits

    def forward(self, pictures: Tensor) -> Tensor:
        """(batch, 3, height, width) to label maps (batch, height, width), int32, or logits
        (batch, classes, height, width)."""
        height, width = pictures.shape[-2:]
        inputs = self.preprocessing(pictures)
        head = self.segmentor.decode_head
        logits = F.interpolate(
            head(self.segmentor.extract_feat(inputs)),
            size=inputs.shape[-2:],
            mode='bilinear',
            align_corners=head.align_corners,
        )
        if self.preprocessing.pad_divisor > 1:
            logits = logits[:, :, :height, :width]
        if self.logits:
            return logits
        if head.out_channels == 1:
            return (logits.sigmoid() > head.threshold).squeeze(1).to(torch.int32)
        return logits.argmax(dim=1).to(torch.int32)


def upsample(module: nn.Module, x: Tensor) -> Tensor:
    """mmseg's Upsample, whose ``int(size * factor)`` makes constants of the sizes."""
    size = [n * int(module.scale_factor) for n in x.shape[-2:]]
    return F.interpolate(x, size, mode=module.mode, align_corners=module.align_corners)
