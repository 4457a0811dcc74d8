"""The layers of EfficientFormerV2 other than attention, and helpers that its modules share.

All feature maps are (batch, channels, height, width).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2: images to (batch, channels, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, in_channels: int, channels: int, norm_cfg: dict) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, channels // 2, 3, norm_cfg, stride=2)
        self.conv2 = ConvNorm(channels // 2, channels, 3, norm_cfg, stride=2)
        self.act = GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv2(self.act(self.conv1(x))))

    def switch_to_deploy(self) -> None:
        """Let the convolutions compute the activations too, if their norms are folded."""
        if fuse_gelu(self.conv1, self.conv2):
            self.act = nn.Identity()


class Downsample(nn.Module):
    """3x3 convolution of stride 2, plus the result of a downsampling attention if there is one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_cfg: dict,
        attention: nn.Module | None,
    ) -> None:
        super().__init__()
        self.conv = ConvNorm(in_channels, out_channels, 3, norm_cfg, stride=2)
        self.attn = attention

    def forward(self, x: Tensor) -> Tensor:
        if self.attn is None:
            return self.conv(x)
        return add(self.conv(x), self.attn(x))


class FeedForward(nn.Module):
    """Pointwise expansion, depthwise 3x3, pointwise projection (the paper's FFN, section 3.1)."""

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
        """Let the convolutions compute the activations too, if their norms are folded."""
        if fuse_gelu(self.fc1, self.mid):
            self.act = nn.Identity()


class ConvNorm(nn.Sequential):
    """Convolution with a bias, then a norm.

    Padding keeps the size at stride 1 and gives ceil(size / 2) at stride 2, for every size.
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
        padding = kernel_size // 2
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups
        )
        self.norm = build_norm_layer(norm_cfg, out_channels)[1]


class LayerScale(nn.Module):
    """A learned factor for each channel (Touvron et al., arXiv 2103.17239)."""

    def __init__(self, channels: int, init_value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), float(init_value)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma[:, None, None]


class GELU(nn.Module):
    """GELU that overwrites its input if no gradient needs it, to save memory traffic."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)


def gelu(x: Tensor) -> Tensor:
    """Return the GELU (erf) of x and overwrite x, which nothing else may use, as :func:`add`."""
    return F.gelu(x) if x.requires_grad else torch.ops.aten.gelu_(x)


def add(x: Tensor, y: Tensor) -> Tensor:
    """Return x + y and overwrite x, which nothing else may use, if no gradient needs it."""
    if x.requires_grad or y.requires_grad or x.dtype != y.dtype:
        return x + y
    return x.add_(y)


def fuse_gelu(*layers: nn.Module) -> bool:
    """Let layers also compute the GELU after them, if all of them can (:class:`.cpu.FusedConv`)."""
    can_fuse = all(hasattr(layer, 'gelu') for layer in layers)
    for layer in layers if can_fuse else ():
        layer.gelu = True
    return can_fuse


# Before torch 2.3 it was in torch._dynamo.
is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._dynamo.is_compiling


class Cache:
    """A cache of one result, which is kept until its key changes.

    Copies begin empty: a weight packed for oneDNN can be neither copied nor saved.
    """

    def __init__(self) -> None:
        self.kept: tuple[tuple, Tensor] | None = None

    def __call__(self, key: tuple, compute: Callable[[], Tensor]) -> Tensor:
        # Read only once, since another thread may replace it.
        kept = self.kept
        if kept is None or kept[0] != key:
            kept = self.kept = key, compute()
        return kept[1]

    def __reduce__(self) -> tuple:
        return Cache, ()


def version_of(parameter: Tensor) -> tuple[int, int]:
    """Return a key that changes whenever a parameter does, except through its ``data``."""
    version = 0 if parameter.is_inference() else parameter._version
    return version, parameter.data_ptr()


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return channels last if x is in that format only, else contiguous."""
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_channels_last else torch.contiguous_format
