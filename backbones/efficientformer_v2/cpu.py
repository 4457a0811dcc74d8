"""The fast path for inference on x86 CPUs: oneDNN through the operators of torch's own compiler.

torch's ``conv2d``, which calls oneDNN, reorders its weights at every call and leaves an activation
to a second pass over the result. The operators that torch.compile uses call oneDNN without either,
and work without compiling anything. Results too large for the processor's cache are computed in
strips of a feature map and in parts of the queries.

In this file: the conditions for this path, convolutions, strips, attention, and last torch's
private operators, which are tested before they are used.
"""

import math
import platform
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Cache, gelu, is_compiling, version_of


def can_use_onednn(x: Tensor) -> bool:
    """Return whether the functions of this module may be used for x."""
    return (
        x.device.type == 'cpu'
        and x.dtype == torch.float32
        and x.numel() > 0
        # Recorders know only torch's public operators.
        and not is_recording()
        and not torch.is_grad_enabled()
        and not is_autocasting_on_cpu()
        # torch.backends.mkldnn.flags(enabled=False) turns oneDNN off, as it does for conv2d.
        and torch.backends.mkldnn.enabled
        and has_operators()
    )


def is_recording() -> bool:
    """Return whether a compiler, exporter, tracer or FLOP counter records every operator."""
    return is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def is_autocasting_on_cpu() -> bool:
    """Return whether autocast is on for CPUs."""
    # Before torch 2.4 every device had its own function.
    if hasattr(torch, 'get_autocast_dtype'):
        return torch.is_autocast_enabled('cpu')
    return torch.is_autocast_cpu_enabled()


class FusedConv(nn.Conv2d):
    """A convolution for inference, if ``gelu`` with a GELU after it; oneDNN uses channels last."""

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
        self._packed = Cache()

    def forward(self, x: Tensor) -> Tensor:
        if not can_use_onednn(x):
            x = super().forward(x)
            return gelu(x) if self.gelu else x
        x = x.contiguous(memory_format=torch.channels_last)
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        # The best weight order depends on the input size, and oneDNN is slow to reorder any other.
        key = (*version_of(self.weight), x.shape)
        weight = self._packed(key, lambda: pack(self.weight, geometry, x.shape))
        return convolve(x, weight, self.bias, geometry, self.gelu)

    def extra_repr(self) -> str:
        return super().extra_repr() + ', gelu=True' * self.gelu

    def _apply(self, *args, **kwargs) -> 'FusedConv':
        self._packed = Cache()
        return super()._apply(*args, **kwargs)


# Padding, stride, dilation and groups of a convolution.
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


# Bytes for the feature map with most channels inside a strip.
STRIP_BUDGET = 6 * 2**20


def in_strips(part: Callable[[Tensor], Tensor], x: Tensor, max_channels: int) -> Tensor:
    """Return ``part(x)`` for x in channels last, computed strip by strip if STRIP_BUDGET needs it.

    ``part`` keeps the shape and needs no gradient. A pixel's result depends only on the pixel and
    its eight neighbors, which are zeros outside the map. ``max_channels`` is the number of channels
    of the widest map inside ``part``.
    """
    height, width = x.shape[2:]
    max_rows = max(1, STRIP_BUDGET // (x.element_size() * max_channels * width))
    if len(x) * height <= max_rows:
        return part(x)
    rows = even_step(height, max_rows)
    # One more row on either side. Strips of equal size share the weights packed for that size.
    window = min(height, rows + 2)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    for image, result in zip(x.split(1), out.split(1), strict=True):
        for top in range(0, height, rows):
            bottom = min(height, top + rows)
            first = min(max(0, top - 1), height - window)
            strip = part(image[:, :, first : first + window])
            result[:, :, top:bottom] = strip[:, :, top - first : bottom - first]
    return out


def even_step(length: int, max_step: int) -> int:
    """Return the step, at most ``max_step``, that splits a length into few and equal parts."""
    return -(-length // -(-length // max_step))


# Bytes for the scores of a part of the queries: small enough for the cache, large enough that
# reading all keys and values again for each part costs little.
SCORE_BUDGET_ONEDNN = 6 * 2**20


def add_attention(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    talking_heads: tuple[Tensor, Tensor] | None = None,
    constant: Tensor | None = None,
) -> Tensor:
    """Return x + attention, as two grouped convolutions with keys and values as weights.

    Args:
        x: (batch, num_heads * value_dim, query rows, query columns). The result has this shape,
            is in channels last, and may share the memory of x.
        q: Scaled queries, (batch, num_heads * key_dim, query rows, query columns).
        k: Keys, (batch, num_heads * key_dim, height, width).
        v: Values, (batch, num_heads * value_dim, height, width).
        bias: (num_heads, query rows, query columns, height, width), keys from last to first.
        talking_heads: Weights (num_heads, num_heads) that mix the heads, before and after the
            softmax. Default: None, heads are not mixed.
        constant: Added to the result of every query, (batch, num_heads * value_dim). Default: None.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    num_heads, rows, columns, height, width = bias.shape
    geometry = ((0, 0), (1, 1), (1, 1), num_heads)
    bias = bias.permute(1, 2, 0, 3, 4)
    bytes_per_query = num_heads * height * width * x.element_size()
    parts = list(split_queries(rows, columns, SCORE_BUDGET_ONEDNN, bytes_per_query))
    # Shared by all parts, since allocating memory costs more than computing in it.
    buffers = x.new_empty(2, parts[0].size, num_heads, height * width)
    for index in range(len(x)):
        queries, results = to_rows(q[index]), to_rows(x[index])
        of_image = None if constant is None else constant[index]
        keys, values = as_weights(k[index], v[index], num_heads)
        packed = {
            size: (
                pack(keys, geometry, (1, queries.shape[1], 1, size)),
                pack(values, geometry, (1, len(keys), 1, size)),
            )
            for size in {part.size for part in parts}
        }
        for part in parts:
            keys, values = packed[part.size]
            scores, weights = buffers[:, : part.size]
            of_part = bias[part.rows, part.columns]
            scores.view(of_part.shape).copy_(of_part)
            add_convolution_(to_map(scores), to_map(queries[part.all]), keys, None, geometry)
            if talking_heads is None:
                torch.softmax(scores, 2, out=weights)
            else:
                before, after = (head.expand(part.size, -1, -1) for head in talking_heads)
                torch.bmm(before, scores, out=weights)
                torch.softmax(weights, 2, out=scores)
                torch.bmm(after, scores, out=weights)
            add_convolution_(to_map(results[part.all]), to_map(weights), values, of_image, geometry)
    return x


def as_weights(k: Tensor, v: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Return keys and values as weights of convolutions with ``num_heads`` groups.

    Maps (channels, height, width) to (num_heads * keys, key_dim, 1, 1), from queries to scores,
    and (num_heads * value_dim, keys, 1, 1), from scores to results; keys from last to first.
    """
    keys = to_rows(k).flip(0).unflatten(1, (num_heads, -1)).transpose(0, 1).flatten(0, 1)
    values = to_rows(v).flip(0).t().contiguous()
    return keys[:, :, None, None], values[:, :, None, None]


def to_rows(x: Tensor) -> Tensor:
    """Reshape (channels, height, width) to (height * width, channels); a view in channels last."""
    return x.permute(1, 2, 0).reshape(-1, len(x))


def to_map(rows: Tensor) -> Tensor:
    """Reshape (pixels, ...) to a map of one row, (1, channels, 1, pixels), in channels last."""
    return rows.flatten(1).t()[None, :, None]


class Part(NamedTuple):
    """A part of the queries: rows of their grid, or a part of one row."""

    all: slice
    rows: slice
    columns: slice

    @property
    def size(self) -> int:
        """Number of queries."""
        return self.all.stop - self.all.start


# Matrix products of fewer queries are slow.
MIN_QUERIES = 32


def split_queries(rows: int, columns: int, budget: int, bytes_per_query: int) -> Iterator[Part]:
    """Split a grid of queries into parts of about the same size; the first is the largest.

    The scores of a part take at most ``budget`` bytes, but a part may have MIN_QUERIES in any case.
    """
    # An empty batch has 0 bytes per query.
    max_queries = max(MIN_QUERIES, budget // max(1, bytes_per_query))
    height = even_step(rows, max(1, max_queries // columns))
    width = even_step(columns, min(max_queries, columns))
    for top in range(0, rows, height):
        bottom = min(rows, top + height)
        for left in range(0, columns, width):
            right = min(columns, left + width)
            place = slice(top * columns + left, (bottom - 1) * columns + right)
            yield Part(place, slice(top, bottom), slice(left, right))


def pack(weight: Tensor, geometry: Geometry, input_size: tuple[int, ...]) -> Tensor:
    """Return a weight in the order that oneDNN reads fastest for inputs of that size."""
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight.detach(), *geometry, list(input_size)
    )


def convolve(
    x: Tensor, packed: Tensor, bias: Tensor | None, geometry: Geometry, gelu: bool
) -> Tensor:
    """Return the convolution of x, which is in channels last, with a GELU after it if asked for."""
    activation = 'gelu' if gelu else 'none'
    return torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, *geometry, activation, [], 'none'
    )


def add_convolution_(
    out: Tensor, x: Tensor, packed: Tensor, bias: Tensor | None, geometry: Geometry
) -> None:
    """Add the convolution of x to ``out``, in place; both are in channels last."""
    torch.ops.mkldnn._convolution_pointwise_.binary(
        out, x, packed, bias, *geometry, 'add', 1.0, None, [], None
    )


@cache
def has_operators() -> bool:
    """Return whether the three operators above exist and agree with conv2d; tested once only."""
    is_x86 = platform.machine().lower() in ('x86_64', 'amd64')
    if not is_x86 or not torch.backends.mkldnn.is_available():
        return False
    try:
        agree = operators_agree_with_conv2d()
    except (AttributeError, RuntimeError, TypeError, ValueError):
        agree = False
    if not agree:
        warnings.warn(
            f'the oneDNN operators of torch {torch.__version__} do not work as expected: inference '
            'on the CPU uses conv2d instead, which is slower and gives the same results',
            stacklevel=2,
        )
    return agree


def operators_agree_with_conv2d() -> bool:
    """Test the operators on a small convolution with two groups and stride 2."""

    def waves(*shape: int) -> Tensor:
        return torch.arange(math.prod(shape), dtype=torch.float32, device='cpu').sin().view(shape)

    x = waves(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    weight, bias = waves(6, 2, 3, 3), waves(6)
    geometry = padding, stride, dilation, groups = (1, 1), (2, 2), (1, 1), 2
    expected = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    packed = pack(weight, geometry, x.shape)
    fused = convolve(x, packed, bias, geometry, gelu=True)
    added = torch.ones_like(expected, memory_format=torch.channels_last)
    add_convolution_(added, x, packed, bias, geometry)
    # The tolerance leaves room for reduced precision of matrix products, which users may allow.
    return torch.allclose(fused, F.gelu(expected), atol=0.05) and torch.allclose(
        added, expected + 1, atol=0.05
    )
