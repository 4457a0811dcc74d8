"""Convolutions for inference on x86 processors, through the operators of torch's own compiler.

torch's ``conv2d`` reorders its weights at every call and leaves an activation to a second pass
over the result. oneDNN, which does the work, needs neither when it is asked through the operators
that torch.compile calls; they can be called without compiling anything.
"""

import platform
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Where it has been since torch 2.3, and where it was before.
is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._dynamo.is_compiling


def is_recording() -> bool:
    """Whether a compiler, an exporter, a tracer or a counter of FLOPs looks at every operator."""
    return is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def version_of(parameter: Tensor) -> tuple[int, int]:
    """Something that changes when a parameter does, but for what is written to its ``data``."""
    version = 0 if parameter.is_inference() else parameter._version
    return version, parameter.data_ptr()


def is_autocasting_on_cpu() -> bool:
    """Whether autocast is on for CPUs."""
    # Before torch 2.4 every device had a function of its own.
    if hasattr(torch, 'get_autocast_dtype'):
        return torch.is_autocast_enabled('cpu')
    return torch.is_autocast_cpu_enabled()


def gelu(x: Tensor) -> Tensor:
    """GELU (erf) of a new x."""
    return F.gelu(x) if x.requires_grad else torch.ops.aten.gelu_(x)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y for a new x."""
    if x.requires_grad or y.requires_grad or x.dtype != y.dtype:
        return x + y
    return x.add_(y)


# What the widest map inside may take, in bytes.
STRIP_BUDGET = 6 * 2**20


def in_strips(part: Callable[[Tensor], Tensor], x: Tensor, most_channels: int) -> Tensor:
    """What ``part`` makes of x, strip by strip where all of it would take too much.

    Args:
        part: Maps (batch, channels, height, width) to the same shape. A pixel's result depends on
            the pixel and its eight neighbours; beyond the edges it takes zeros for them. Needs no
            gradient.
        x: Channels last.
        most_channels: Channels of the widest map inside ``part``.
    """
    height, width = x.shape[2:]
    most = max(1, STRIP_BUDGET // (x.element_size() * most_channels * width))
    if len(x) * height <= most:
        return part(x)
    rows = even_step(height, most)
    # A row more on either side. All strips have the same size, for which weights are in order.
    window = min(height, rows + 2)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    for picture, result in zip(x.split(1), out.split(1), strict=True):
        for top in range(0, height, rows):
            bottom = min(height, top + rows)
            first = min(max(0, top - 1), height - window)
            strip = part(picture[:, :, first : first + window])
            result[:, :, top:bottom] = strip[:, :, top - first : bottom - first]
    return out


def even_step(length: int, most: int) -> int:
    """The step that divides a length into as few steps as possible, as alike as possible."""
    return -(-length // -(-length // most))


# Matrix products of fewer queries are slow.
FEWEST_QUERIES = 32


class Part(NamedTuple):
    """Some of the queries: rows of their grid, or a part of one row.

    Attributes:
        all: Their place among all queries.
        rows: Their place in the grid.
        columns: Their place in the grid.
    """

    all: slice
    rows: slice
    columns: slice

    @property
    def size(self) -> int:
        """How many they are."""
        return self.all.stop - self.all.start


def split_queries(rows: int, columns: int, budget: int, bytes_per_query: int) -> Iterator[Part]:
    """Split a grid of queries into parts of about the same size, the first the largest.

    Args:
        rows: Of the grid.
        columns: Of the grid.
        budget: What the scores of a part may take in bytes, if that is FEWEST_QUERIES at least.
        bytes_per_query: What the scores of a query take.
    """
    # A batch without images has queries that take nothing.
    most = max(FEWEST_QUERIES, budget // max(1, bytes_per_query))
    height = even_step(rows, max(1, most // columns))
    width = even_step(columns, min(most, columns))
    for top in range(0, rows, height):
        bottom = min(rows, top + height)
        for left in range(0, columns, width):
            right = min(columns, left + width)
            place = slice(top * columns + left, (bottom - 1) * columns + right)
            yield Part(place, slice(top, bottom), slice(left, right))


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


# What the scores of a part of the queries may take, in bytes: small enough for the cache, large
# enough that each of the keys and values is worth reading.
SCORE_BUDGET = 6 * 2**20


def add_attention(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    talking_heads: tuple[Tensor, Tensor] | None = None,
    constant: Tensor | None = None,
) -> Tensor:
    """x plus attention's result.

    Args:
        x: (batch, num_heads * value_dim, query rows, query columns), overwritten if it is
            channels last.
        q: Queries, scaled already, (batch, num_heads * key_dim, query rows, query columns).
        k: Keys, (batch, num_heads * key_dim, height, width).
        v: Values, (batch, num_heads * value_dim, height, width).
        bias: (num_heads, query rows, query columns, height, width), with the keys from last to
            first.
        talking_heads: Weights (num_heads, num_heads) that mix the heads before and after the
            softmax. Default: the heads stay as they are.
        constant: Added to the result of every query, (batch, num_heads * value_dim).
            Default: nothing.

    Returns:
        Of the shape of x, channels last.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    num_heads, rows, columns, height, width = bias.shape
    geometry = ((0, 0), (1, 1), (1, 1), num_heads)
    bias = bias.permute(1, 2, 0, 3, 4)
    bytes_per_query = num_heads * height * width * x.element_size()
    parts = list(split_queries(rows, columns, SCORE_BUDGET, bytes_per_query))
    # For all parts, since memory that is new costs more than what is computed in it.
    buffers = x.new_empty(2, parts[0].size, num_heads, height * width)
    for index in range(len(x)):
        queries, results = to_rows(q[index]), to_rows(x[index])
        of_picture = None if constant is None else constant[index]
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
            add_convolution_(
                to_picture(scores), to_picture(queries[part.all]), keys, None, geometry
            )
            if talking_heads is None:
                torch.softmax(scores, 2, out=weights)
            else:
                before, after = (head.expand(part.size, -1, -1) for head in talking_heads)
                torch.bmm(before, scores, out=weights)
                torch.softmax(weights, 2, out=scores)
                torch.bmm(after, scores, out=weights)
            add_convolution_(
                to_picture(results[part.all]), to_picture(weights), values, of_picture, geometry
            )
    return x


def as_weights(k: Tensor, v: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Weights of the convolutions from queries to scores, and from what keys count to results.

    Args:
        k: (num_heads * key_dim, height, width).
        v: (num_heads * value_dim, height, width).
        num_heads: Groups of the convolutions.

    Returns:
        (num_heads * keys, key_dim, 1, 1) and (num_heads * value_dim, keys, 1, 1), with the keys
        from last to first.
    """
    keys = to_rows(k).flip(0).unflatten(1, (num_heads, -1)).transpose(0, 1).flatten(0, 1)
    values = to_rows(v).flip(0).t().contiguous()
    return keys[:, :, None, None], values[:, :, None, None]


def to_rows(x: Tensor) -> Tensor:
    """(channels, height, width) to (height * width, channels), a view of channels last."""
    return x.permute(1, 2, 0).reshape(-1, len(x))


def to_picture(rows: Tensor) -> Tensor:
    """(pixels, ...) to a picture of one row, (1, channels, 1, pixels), channels last."""
    return rows.flatten(1).t()[None, :, None]
