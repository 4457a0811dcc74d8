"""Stem and feed-forward block: everything in EfficientFormerV2 that is not attention.

All feature maps are (batch, channels, height, width).
"""

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from .cpu import FusedConv, gelu


class ConvNorm(nn.Sequential):
    """Convolution with a bias, followed by a normalisation layer.

    Padding keeps the size at stride 1 and gives ceil(size / 2) at stride 2, for every size.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the kernel, an odd number.
        norm_cfg: Normalisation layer in mmcv's notation, ``dict(type='BN')`` for instance.
        stride: Stride of the convolution.
        groups: Groups of the convolution; ``in_channels`` makes it depthwise.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        norm_cfg: dict,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
        )
        self.norm = build_norm_layer(norm_cfg, out_channels)[1]


class GELU(nn.Module):
    """GELU that overwrites its input wherever no gradient needs it, to save memory traffic."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)


class LayerScale(nn.Module):
    """A learned factor for each channel (Touvron et al., "Going deeper with Image Transformers").

    Args:
        channels: Channels of the input.
        init_value: What every factor starts from.
    """

    def __init__(self, channels: int, init_value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), float(init_value)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma[:, None, None]


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2: from the picture to (batch, channels, H/4, W/4).

    Args:
        channels: Channels of the output; between the convolutions there are half as many.
        norm_cfg: Normalisation layer in mmcv's notation.
    """

    def __init__(self, channels: int, norm_cfg: dict) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, channels // 2, 3, norm_cfg, stride=2)
        self.conv2 = ConvNorm(channels // 2, channels, 3, norm_cfg, stride=2)
        self.act = GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv2(self.act(self.conv1(x))))

    def switch_to_deploy(self) -> None:
        """Make the activations part of the convolutions, where no norm is in between."""
        if fuse_gelu(self.conv1, self.conv2):
            self.act = nn.Identity()


class FeedForward(nn.Module):
    """Pointwise expansion, depthwise 3x3, pointwise projection (the paper's unified FFN, 3.1).

    Args:
        channels: Channels of input and output.
        mlp_ratio: Channels in between, as a multiple of ``channels``.
        norm_cfg: Normalisation layer in mmcv's notation.
    """

    def __init__(self, channels: int, mlp_ratio: float, norm_cfg: dict) -> None:
        super().__init__()
        hidden = int(channels * mlp_ratio)
        self.fc1 = ConvNorm(channels, hidden, 1, norm_cfg)
        self.mid = ConvNorm(hidden, hidden, 3, norm_cfg, groups=hidden)
        self.fc2 = ConvNorm(hidden, channels, 1, norm_cfg)
        self.act = GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x))
        x = self.act(self.mid(x))
        return self.fc2(x)

    def switch_to_deploy(self) -> None:
        """Make the activations part of the convolutions, where no norm is in between."""
        if fuse_gelu(self.fc1, self.mid):
            self.act = nn.Identity()


def fuse_gelu(*layers: nn.Module) -> bool:
    """Let layers do the GELU behind them, if all are convolutions and nothing else."""
    if not all(isinstance(layer, FusedConv) for layer in layers):
        return False
    for layer in layers:
        layer.gelu = True
    return True
