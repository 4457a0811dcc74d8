"""Attention of EfficientFormerV2 on token grids of any size.

The two kinds of attention come first, then the relative position bias that both add to their
scores, then how the queries are split so that a score matrix of a large picture fits in memory.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ConvNorm

# Where it has been since torch 2.3, and where it was before.
is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._dynamo.is_compiling

BIAS_RESIZE_MODES = ('offset', 'matrix')

# Queries are split when the scores of all of them would take more bytes than this.
SCORE_BUDGET = 128 * 2**20


class TalkingHeadAttention(nn.Module):
    """Attention of stages 3 and 4, with heads that talk to each other (the paper's MHSA, 3.3).

    The second talking head comes after the softmax and has a bias, so that a constant times the
    sum of all values is part of every result. That sum grows with the grid, while the statistics
    of the norms behind it stay: a network trained on small crops fails on whole pictures. With
    'offset', the bias is therefore scaled by the tokens of the table's grid over those of the
    picture's, which makes it a multiple of the values' mean. Nothing changes where the grids
    agree. The authors' COCO and ADE20K models were trained without, as 'matrix' is.

    Args:
        channels: Channels of input and output.
        stride: 2 makes tokens of every second pixel and upsamples the result (stage 3, the
            paper's "stride attention"), 1 makes them of all pixels (stage 4).
        table_size: Token grid (height, width) that the bias table is laid out for.
        bias_resize: 'offset' or 'matrix', see :class:`RelativePositionBias`.
        norm_cfg: Normalisation layer in mmcv's notation.
        num_heads: Attention heads.
        key_dim: Channels of a query or key, for each head.
        value_dim: Channels of a value, for each head.
    """

    def __init__(
        self,
        channels: int,
        stride: int,
        table_size: tuple[int, int],
        bias_resize: str,
        norm_cfg: dict,
        num_heads: int = 8,
        key_dim: int = 32,
        value_dim: int = 128,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = key_dim**-0.5
        self.scales_bias = bias_resize == 'offset'
        self.stride_conv = (
            ConvNorm(channels, channels, 3, norm_cfg, stride=stride, groups=channels)
            if stride > 1
            else None
        )
        values = num_heads * value_dim
        self.q = ConvNorm(channels, num_heads * key_dim, 1, norm_cfg)
        self.k = ConvNorm(channels, num_heads * key_dim, 1, norm_cfg)
        self.v = ConvNorm(channels, values, 1, norm_cfg)
        self.v_local = ConvNorm(values, values, 3, norm_cfg, groups=values)
        self.relative_position_bias = RelativePositionBias(num_heads, table_size, 1, bias_resize)
        self.talking_head1 = nn.Conv2d(num_heads, num_heads, 1)
        self.talking_head2 = nn.Conv2d(num_heads, num_heads, 1)
        self.act = nn.GELU()
        self.proj = ConvNorm(values, channels, 1, norm_cfg)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        if self.stride_conv is not None:
            x = self.stride_conv(x)
        grid = x.shape[-2:]
        q, k, v = self.q(x), self.k(x), self.v(x)
        mixed = attend_in_chunks(
            self.attend,
            *(to_tokens(t, self.num_heads) for t in (q, k, v)),
            grid,
            self.relative_position_bias,
        )
        x = to_feature_map(mixed, grid) + self.v_local(v)
        if self.stride_conv is not None:
            x = F.interpolate(x, size, mode='bilinear', align_corners=False)
        return self.proj(self.act(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = (q * self.scale) @ k.transpose(-2, -1) + bias
        weights = self.talking_head1(scores).softmax(dim=-1)
        if self.scales_bias:
            bias = self.talking_head2.bias * (self.table_tokens / k.shape[2])
            return F.conv2d(weights, self.talking_head2.weight, bias) @ v
        return self.talking_head2(weights) @ v

    @property
    def table_tokens(self) -> int:
        """Tokens of the grid that the bias table is laid out for."""
        return self.relative_position_bias.table[0].numel()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        table = state_dict.get(f'{prefix}relative_position_bias.table')
        key = f'{prefix}talking_head2.bias'
        if self.scales_bias and table is not None and key in state_dict:
            # Where the table is resized, the bias has to stand for as many values as before.
            state_dict[key] = state_dict[key] * (table[0].numel() / self.table_tokens)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class DownsamplingAttention(nn.Module):
    """Attention between stages 3 and 4, whose queries are at half the size (the paper's 3.3).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, which is (batch, out_channels, H/2, W/2).
        table_size: Token grid (height, width) of the keys that the bias table is laid out for.
        bias_resize: 'offset' or 'matrix', see :class:`RelativePositionBias`.
        norm_cfg: Normalisation layer in mmcv's notation.
        num_heads: Attention heads.
        key_dim: Channels of a query or key, for each head.
        value_dim: Channels of a value, for each head.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        table_size: tuple[int, int],
        bias_resize: str,
        norm_cfg: dict,
        num_heads: int = 8,
        key_dim: int = 16,
        value_dim: int = 64,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        values = num_heads * value_dim
        self.q_local = nn.Conv2d(
            in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels
        )
        self.q = ConvNorm(in_channels, num_heads * key_dim, 1, norm_cfg)
        self.k = ConvNorm(in_channels, num_heads * key_dim, 1, norm_cfg)
        self.v = ConvNorm(in_channels, values, 1, norm_cfg)
        self.v_local = ConvNorm(values, values, 3, norm_cfg, stride=2, groups=values)
        self.relative_position_bias = RelativePositionBias(num_heads, table_size, 2, bias_resize)
        self.act = nn.GELU()
        self.proj = ConvNorm(values, out_channels, 1, norm_cfg)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.q_local(x) + x[:, :, ::2, ::2])
        k, v = self.k(x), self.v(x)
        mixed = attend_in_chunks(
            self.attend,
            *(to_tokens(t, self.num_heads) for t in (q, k, v)),
            x.shape[-2:],
            self.relative_position_bias,
        )
        return self.proj(self.act(to_feature_map(mixed, q.shape[-2:]) + self.v_local(v)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])


class RelativePositionBias(nn.Module):
    """What the distance between a query and a key adds to their score, learned for each head.

    The table has an entry for every offset (|dy|, |dx|) on the token grid of pre-training
    (LeViT's attention bias, which the paper takes over). For another grid it is carried over by

    - 'offset': the table is resized (bicubic, offset 0 and the largest offset stay what they
      are) and then looked up. Exact where the grids agree, and cheap.
    - 'matrix': the table is looked up for the grid of pre-training and the matrix of queries
      and keys is resized as if it were a picture. The authors' published COCO and ADE20K
      models were trained with it; it serves them alone.

    At inference the bias of the last grid is kept until the table changes.

    Args:
        num_heads: Attention heads.
        table_size: Token grid (height, width) of the keys that the table is laid out for.
        query_stride: Queries are at every ``query_stride``-th key of both axes.
        resize: 'offset' or 'matrix'.
    """

    def __init__(
        self, num_heads: int, table_size: tuple[int, int], query_stride: int, resize: str
    ) -> None:
        super().__init__()
        self.query_stride = query_stride
        self.resize = resize
        self.table = nn.Parameter(torch.zeros(num_heads, *table_size))
        self._kept: tuple[tuple, Tensor] | None = None

    def forward(self, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Bias of all queries.

        Args:
            grid: Height and width of the keys, in tokens.
            dtype: What the scores are in, which autocast may have made another than the table's.

        Returns:
            (num_heads, queries, keys), both in row-major order.
        """
        if self.training or torch.is_grad_enabled() or is_compiling():
            return self._look_up(grid, dtype)
        described = (tuple(grid), dtype, self.table.device, self._table_version())
        if self._kept is None or self._kept[0] != described:
            self._kept = described, self._look_up(grid, dtype)
        return self._kept[1]

    def rows(self, grid: tuple[int, int], dtype: torch.dtype, queries: slice) -> Tensor:
        """Bias of some of the queries: ``forward(grid, dtype)[:, queries]`` without the others.

        The 'matrix' mode has to make the others as well.
        """
        if self.resize == 'matrix':
            return self._look_up(grid, dtype)[:, queries]
        table = resize_table(self.table, grid).to(dtype)
        return look_up_offsets(table, self.query_stride, queries)

    def train(self, mode: bool = True) -> 'RelativePositionBias':
        # Writing to a parameter's `data`, as moving averages do, leaves no trace in its version.
        self._kept = None
        return super().train(mode)

    def _look_up(self, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        if self.resize == 'offset':
            return look_up_offsets(resize_table(self.table, grid).to(dtype), self.query_stride)
        num_queries = -(-grid[0] // self.query_stride) * -(-grid[1] // self.query_stride)
        matrix = look_up_offsets(self.table, self.query_stride)[None]
        size = (num_queries, grid[0] * grid[1])
        resized = F.interpolate(matrix.float(), size, mode='bicubic', align_corners=False)
        return resized[0].to(dtype)

    def _table_version(self) -> tuple[int, int]:
        version = 0 if self.table.is_inference() else self.table._version
        return version, self.table.data_ptr()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        key = f'{prefix}table'
        loaded = state_dict.get(key)
        if loaded is not None and loaded.dim() == 3 and len(loaded) == len(self.table):
            state_dict[key] = resize_table(loaded, self.table.shape[1:])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._kept = None


def resize_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lay a table of offsets out for another grid.

    Args:
        table: (num_heads, height, width).
        grid: The new height and width.

    Returns:
        (num_heads, *grid); the table itself where the grids agree.
    """
    if tuple(table.shape[1:]) == tuple(grid):
        return table
    # In float32, since half precision has no bicubic kernel on every device.
    resized = F.interpolate(table[None].float(), tuple(grid), mode='bicubic', align_corners=True)
    return resized[0].to(table.dtype)


def look_up_offsets(table: Tensor, query_stride: int, queries: slice | None = None) -> Tensor:
    """Spread a table of offsets over the pairs of queries and keys of its grid.

    Args:
        table: (num_heads, height, width), entry (|dy|, |dx|).
        query_stride: Queries are at every ``query_stride``-th key of both axes.
        queries: Which queries, in row-major order. Default: all.

    Returns:
        (num_heads, queries, height * width).
    """
    num_heads, height, width = table.shape
    y = torch.arange(height, device=table.device)
    x = torch.arange(width, device=table.device)
    query_y, query_x = y[::query_stride], x[::query_stride]
    query_y, query_x = (
        query_y.repeat_interleave(len(query_x)),
        query_x.repeat(len(query_y)),
    )
    if queries is not None:
        query_y, query_x = query_y[queries], query_x[queries]
    dy = (query_y[:, None] - y).abs()
    dx = (query_x[:, None] - x).abs()
    index = dy[:, :, None] * width + dx[:, None, :]
    # On a CPU, index_select's backward takes an eighth of the time of indexing with a matrix.
    bias = table.flatten(1).index_select(1, index.flatten())
    return bias.view(num_heads, len(query_y), height * width)


def attend_in_chunks(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    bias: RelativePositionBias,
) -> Tensor:
    """Attend with as many queries at a time as SCORE_BUDGET has room for.

    A query's result depends on no other query, so splitting changes no result.

    Args:
        attend: Maps queries, keys, values and the bias of these queries to their results.
        q: (batch, num_heads, queries, key_dim).
        k: (batch, num_heads, keys, key_dim).
        v: (batch, num_heads, keys, value_dim).
        grid: Height and width of the keys, in tokens.
        bias: Gives the bias of all queries, or of some.

    Returns:
        (batch, num_heads, queries, value_dim).
    """
    batch, num_heads, num_queries, _ = q.shape
    bytes_per_query = batch * num_heads * k.shape[2] * q.element_size()
    chunk = max(1, SCORE_BUDGET // bytes_per_query)
    if chunk >= num_queries:
        return attend(q, k, v, bias(grid, q.dtype))
    chunks = [slice(start, start + chunk) for start in range(0, num_queries, chunk)]
    return torch.cat(
        [attend(q[:, :, rows], k, v, bias.rows(grid, q.dtype, rows)) for rows in chunks], dim=2
    )


def to_tokens(x: Tensor, num_heads: int) -> Tensor:
    """(batch, num_heads * dim, height, width) to (batch, num_heads, height * width, dim)."""
    return x.flatten(2).unflatten(1, (num_heads, -1)).transpose(-2, -1)


def to_feature_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(batch, num_heads, height * width, dim) to (batch, num_heads * dim, height, width)."""
    return tokens.transpose(-2, -1).flatten(1, 2).unflatten(2, tuple(grid))
