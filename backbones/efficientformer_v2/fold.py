"""Folding norms and scales into convolutions, and joining convolutions, for inference."""

import copy
from collections.abc import Sequence

import torch
from mmcv.cnn import Conv2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .layers import ConvNorm, LayerScale


def can_fold(conv: nn.Module, norm: nn.Module) -> bool:
    """Return whether :func:`fold_norm` can fold a norm into the convolution before it."""
    return (
        # Subclasses may change their weights before they convolve, as ConvWS2d does.
        type(conv) in (nn.Conv2d, Conv2d)
        # Spectral norm computes the weight from another parameter at every call.
        and isinstance(conv.weight, nn.Parameter)
        and isinstance(norm, _BatchNorm)
        # Without running statistics a BatchNorm uses those of the batch.
        and norm.running_mean is not None
        and norm.num_features == conv.out_channels
    )


def fold_norm(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """Return a new convolution equal to ``conv`` and then a BatchNorm in evaluation mode.

    Its weights are computed in float32 or better and have the data type of ``conv``.
    """
    dtype = conv.weight.dtype
    precise = torch.promote_types(dtype, torch.float32)
    conv, norm = (copy.deepcopy(layer).eval().to(precise) for layer in (conv, norm))
    return fuse_conv_bn_eval(conv, norm).to(dtype)


@torch.no_grad()
def scale_channels(affine: nn.Module, factor: Tensor | float) -> None:
    """Scale a convolution's or norm's weights, so its output is times a number or (channels,)."""
    affine.bias.mul_(factor)
    if isinstance(factor, Tensor):
        factor = factor.view(-1, *[1] * (affine.weight.dim() - 1))
    affine.weight.mul_(factor)


class JoinedConvs(nn.Module):
    """Convolutions with biases of the same input, joined; only ``out_channels`` may differ."""

    @torch.no_grad()
    def __init__(self, convs: Sequence[nn.Conv2d]) -> None:
        super().__init__()
        self.channels = [conv.out_channels for conv in convs]
        joined = copy.deepcopy(convs[0])
        joined.out_channels = sum(self.channels)
        joined.weight = nn.Parameter(torch.cat([conv.weight for conv in convs]))
        joined.bias = nn.Parameter(torch.cat([conv.bias for conv in convs]))
        self.convs = nn.ModuleList([joined])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if len(self.convs) == 1:
            return self.convs[0](x).split(self.channels, dim=1)
        return tuple(conv(x) for conv in self.convs)

    def separate(self) -> None:
        """Undo the joining, for runtimes that copy the parts of a split."""
        if len(self.convs) == 1:
            joined = self.convs[0]
            self.convs = nn.ModuleList(copy.deepcopy(joined) for _ in self.channels)
            for name in ('weight', 'bias'):
                parts = getattr(joined, name).detach().split(self.channels)
                for conv, part in zip(self.convs, parts, strict=True):
                    conv.out_channels = len(part)
                    setattr(conv, name, nn.Parameter(part.clone()))


def fold_scale(layer: ConvNorm | nn.Conv2d, scale: LayerScale | nn.Identity) -> bool:
    """Fold a layer scale into the layer before it; return False if one of them has no weights."""
    affine = layer.norm if isinstance(layer, ConvNorm) else layer
    if isinstance(scale, nn.Identity) or getattr(affine, 'weight', None) is None:
        return False
    scale_channels(affine, scale.gamma)
    return True
