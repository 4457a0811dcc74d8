"""Convolutions for inference on x86 processors, through the operators of torch's own compiler.

torch's ``conv2d`` reorders its weights at every call and leaves an activation to a second pass
over the result. oneDNN, which does the work, needs neither when it is asked through the operators
that torch.compile calls; they can be called without compiling anything.
"""

import platform

import torch
from torch import Tensor, nn

from .inplace import gelu
from .torch_state import is_autocasting_on_cpu, is_recording, version_of

HAS_OPERATORS = (
    platform.machine().lower() in ('x86_64', 'amd64')
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, '_convolution_pointwise')
    and hasattr(torch.ops.mkldnn, '_reorder_convolution_weight')
)

# Padding, stride, dilation and groups of a convolution.
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


def can_use_onednn(x: Tensor) -> bool:
    """Whether what is computed from x may be computed by the functions of this module."""
    return (
        HAS_OPERATORS
        and x.device.type == 'cpu'
        and x.dtype == torch.float32
        and x.numel() > 0
        # What records operators knows torch's public ones.
        and not is_recording()
        and not torch.is_grad_enabled()
        and not is_autocasting_on_cpu()
        # torch.backends.mkldnn.flags(enabled=False) turns it off, as it does for conv2d.
        and torch.backends.mkldnn.enabled
    )


class FusedConv(nn.Conv2d):
    """A convolution of a network for inference, and the GELU behind it if there is one.

    Where oneDNN can be used the result is in channels last.

    Args:
        conv: The convolution, whose weights and bias are shared. Its padding is a number of
            zeros.
        gelu: Whether a GELU follows.
    """

    def __init__(self, conv: nn.Conv2d, gelu: bool = False) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            device='meta',
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.gelu = gelu
        self._packed = PackedWeight()

    def forward(self, x: Tensor) -> Tensor:
        if not can_use_onednn(x):
            x = super().forward(x)
            return gelu(x) if self.gelu else x
        x = x.contiguous(memory_format=torch.channels_last)
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        weight = self._packed(self.weight, geometry, x.shape)
        activation = 'gelu' if self.gelu else 'none'
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, self.bias, *geometry, activation, [], 'none'
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + ', gelu=True' * self.gelu

    def _apply(self, *args, **kwargs) -> 'FusedConv':
        self._packed = PackedWeight()
        return super()._apply(*args, **kwargs)


class PackedWeight:
    """Keeps a weight in oneDNN's own order until the weight or the size of the input changes.

    A copy begins empty: what is kept can be neither copied nor saved.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple, Tensor] | None = None

    def __call__(self, weight: Tensor, geometry: Geometry, input_size: torch.Size) -> Tensor:
        # Which order is best depends on the size, and oneDNN is slow to mend one that is not.
        described = (*version_of(weight), input_size)
        if self._kept is None or self._kept[0] != described:
            self._kept = described, pack(weight, geometry, input_size)
        return self._kept[1]

    def __deepcopy__(self, memo: dict) -> 'PackedWeight':
        return PackedWeight()

    def __reduce__(self) -> tuple:
        return PackedWeight, ()


def pack(weight: Tensor, geometry: Geometry, input_size: tuple[int, ...]) -> Tensor:
    """A weight in the order that oneDNN reads it in.

    Args:
        weight: (out_channels, in_channels / groups, height, width).
        geometry: Of the convolution.
        input_size: (batch, channels, height, width) that the order is best for.
    """
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight.detach(), *geometry, list(input_size)
    )


def add_convolution_(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
) -> None:
    """Add a convolution's result to ``out``, in place.

    Args:
        out: (batch, out_channels, height, width), channels last.
        x: (batch, channels, height, width), channels last.
        weight: What :func:`pack` returns.
        bias: (out_channels,) or None.
        geometry: Of the convolution.
    """
    torch.ops.mkldnn._convolution_pointwise_.binary(
        out, x, weight, bias, *geometry, 'add', 1.0, None, [], None
    )
