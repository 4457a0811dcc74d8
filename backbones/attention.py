"""Attention of EfficientFormerV2 on token grids of any size.

The two kinds of attention come first, then the relative position bias that both add to their
scores, then how the queries are split so that the scores of a large picture fit in memory.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .deploy import join_convs, scale_channels
from .layers import GELU, ConvNorm, add

# Where it has been since torch 2.3, and where it was before.
is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._dynamo.is_compiling

BIAS_RESIZE_MODES = ('offset', 'matrix')

# At inference the queries are split when the scores of all of them would take more bytes than
# this. Elsewhere they only have to fit in memory; on a CPU they are to stay in its cache.
SCORE_BUDGET = 128 * 2**20
SCORE_BUDGET_CPU = 3 * 2**20

# Matrix products of fewer queries are slow.
FEWEST_QUERIES = 32


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
        self.scale = key_dim**-0.5
        self.scales_bias = bias_resize == 'offset'
        self.stride_conv = (
            ConvNorm(channels, channels, 3, norm_cfg, stride=stride, groups=channels)
            if stride > 1
            else None
        )
        keys, values = num_heads * key_dim, num_heads * value_dim
        self.q = ConvNorm(channels, keys, 1, norm_cfg)
        self.k = ConvNorm(channels, keys, 1, norm_cfg)
        self.v = ConvNorm(channels, values, 1, norm_cfg)
        self.qkv: nn.Conv2d | None = None
        self.qkv_channels = (keys, keys, values)
        self.v_local = ConvNorm(values, values, 3, norm_cfg, groups=values)
        self.relative_position_bias = RelativePositionBias(num_heads, table_size, 1, bias_resize)
        self.talking_head1 = nn.Conv2d(num_heads, num_heads, 1)
        self.talking_head2 = nn.Conv2d(num_heads, num_heads, 1)
        self.act = GELU()
        self.proj = ConvNorm(values, channels, 1, norm_cfg)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        if self.stride_conv is not None:
            x = self.stride_conv(x)
        q, k, v = self.project(x)
        # The first talking head mixes the scores in `attend`, the bias here: it is linear.
        bias = self.relative_position_bias(x.shape[-2:], q.dtype, self.talking_head1)
        x = add(self.v_local(v), attend_in_parts(self.attend, q, k, v, bias))
        x = add(x, self.constant_part(v))
        if self.stride_conv is not None:
            x = F.interpolate(x, size, mode='bilinear', align_corners=False)
        return self.proj(self.act(x))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, times ``key_dim**-0.5``, keys and values, as feature maps."""
        if self.qkv is not None:
            return self.qkv(x).split(self.qkv_channels, dim=1)
        return self.q(x) * self.scale, self.k(x), self.v(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = mix_heads(q @ k.transpose(-2, -1), self.talking_head1)
        weights = mix_heads(add_bias(scores, bias).softmax(dim=-1), self.talking_head2)
        return weights @ v

    def constant_part(self, v: Tensor) -> Tensor:
        """What the second talking head's bias, which `attend` leaves out, makes of all values.

        Args:
            v: Values, (batch, channels, height, width).

        Returns:
            (batch, channels, 1, 1).
        """
        bias = self.talking_head2.bias
        bias = bias.repeat_interleave(v.shape[1] // len(bias))[:, None, None]
        values = self.table_tokens if self.scales_bias else v.shape[2] * v.shape[3]
        return v.mean(dim=(2, 3), keepdim=True) * bias * values

    @property
    def table_tokens(self) -> int:
        """Tokens of the grid that the bias table is laid out for."""
        return self.relative_position_bias.table[0].numel()

    def switch_to_deploy(self) -> None:
        """Make q, k and v one convolution, where they are nothing else by now."""
        if self.qkv is None and all(isinstance(m, nn.Conv2d) for m in (self.q, self.k, self.v)):
            scale_channels(self.q, self.scale)
            self.qkv = join_convs((self.q, self.k, self.v))
            del self.q, self.k, self.v

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
        self.scale = key_dim**-0.5
        values = num_heads * value_dim
        self.q_local = nn.Conv2d(
            in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels
        )
        self.q = ConvNorm(in_channels, num_heads * key_dim, 1, norm_cfg)
        self.k = ConvNorm(in_channels, num_heads * key_dim, 1, norm_cfg)
        self.v = ConvNorm(in_channels, values, 1, norm_cfg)
        self.kv: nn.Conv2d | None = None
        self.kv_channels = (num_heads * key_dim, values)
        self.v_local = ConvNorm(values, values, 3, norm_cfg, stride=2, groups=values)
        self.relative_position_bias = RelativePositionBias(num_heads, table_size, 2, bias_resize)
        self.act = GELU()
        self.proj = ConvNorm(values, out_channels, 1, norm_cfg)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        bias = self.relative_position_bias(x.shape[-2:], q.dtype)
        x = add(self.v_local(v), attend_in_parts(self.attend, q, k, v, bias))
        return self.proj(self.act(x))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, times ``key_dim**-0.5``, keys and values, as feature maps."""
        if self.kv is not None:
            return self.q(self.q_local(x)), *self.kv(x).split(self.kv_channels, dim=1)
        q = self.q(self.q_local(x) + x[:, :, ::2, ::2])
        return q * self.scale, self.k(x), self.v(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        if q.device.type == 'cpu':
            # It has no fused kernel for values wider than keys.
            return add_bias(q @ k.transpose(-2, -1), bias).softmax(dim=-1) @ v
        bias = bias.flatten(3).flatten(1, 2)[None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Make k and v one convolution, where they are nothing else by now, and simplify q."""
        if self.kv is None and all(isinstance(m, nn.Conv2d) for m in (self.q, self.k, self.v)):
            scale_channels(self.q, self.scale)
            # Every second pixel is what the middle of the kernel sees.
            self.q_local.weight[:, :, 1, 1] += 1
            self.kv = join_convs((self.k, self.v))
            del self.k, self.v


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

    def forward(
        self, grid: tuple[int, int], dtype: torch.dtype, talking_head: nn.Conv2d | None = None
    ) -> Tensor:
        """Bias of all queries.

        With 'offset' it is a view of a table twice as wide and high, see :func:`look_up`: it
        takes no memory.

        Args:
            grid: Height and width of the keys, in tokens.
            dtype: What the scores are in, which autocast may have made another than the table's.
            talking_head: Mixes the bias of the heads. Default: they stay as they are.

        Returns:
            (num_heads, query rows, query columns, *grid), with the keys from last to first.
        """
        if self.training or torch.is_grad_enabled() or is_compiling():
            return self._look_up(grid, dtype, talking_head)
        used = [self.table] if talking_head is None else [self.table, *talking_head.parameters()]
        described = (tuple(grid), dtype, self.table.device, [version_of(p) for p in used])
        if self._kept is None or self._kept[0] != described:
            self._kept = described, self._look_up(grid, dtype, talking_head)
        return self._kept[1]

    def train(self, mode: bool = True) -> 'RelativePositionBias':
        # Writing to a parameter's `data`, as moving averages do, leaves no trace in its version.
        self._kept = None
        return super().train(mode)

    def _look_up(
        self, grid: tuple[int, int], dtype: torch.dtype, talking_head: nn.Conv2d | None
    ) -> Tensor:
        # To mix the table is to mix what is made of it: a talking head is linear, and where a
        # table is resized its values are averaged with weights of sum 1.
        table = self.table if talking_head is None else talking_head(self.table)
        if self.resize == 'offset':
            return look_up(resize_table(table, grid).to(dtype), self.query_stride)
        matrix = look_up(table, self.query_stride)
        queries = [-(-side // self.query_stride) for side in grid]
        matrix = matrix.flatten(3).flatten(1, 2)[None].float()
        size = (queries[0] * queries[1], grid[0] * grid[1])
        resized = F.interpolate(matrix, size, mode='bicubic', align_corners=False)[0].to(dtype)
        return resized.unflatten(2, tuple(grid)).unflatten(1, tuple(queries))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        key = f'{prefix}table'
        loaded = state_dict.get(key)
        if loaded is not None and loaded.dim() == 3 and len(loaded) == len(self.table):
            state_dict[key] = resize_table(loaded, self.table.shape[1:])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._kept = None


def version_of(parameter: Tensor) -> tuple[int, int]:
    """Something that changes when a parameter does."""
    version = 0 if parameter.is_inference() else parameter._version
    return version, parameter.data_ptr()


def resize_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lay a table of offsets out for another grid.

    Args:
        table: (num_heads, height, width).
        grid: The new height and width.

    Returns:
        (num_heads, *grid); the table itself where the grids agree.
    """
    # An exported network is not to depend on the grid of the picture that it was exported with.
    if not is_compiling() and tuple(table.shape[1:]) == tuple(grid):
        return table
    # In float32, since half precision has no bicubic kernel on every device.
    resized = F.interpolate(table[None].float(), tuple(grid), mode='bicubic', align_corners=True)
    return resized[0].to(table.dtype)


def look_up(table: Tensor, query_stride: int) -> Tensor:
    """Spread a table of offsets over the pairs of queries and keys of its grid.

    Beside its mirror images, so that entry (dy, dx) of all signs has a place of its own, the
    table holds what a query adds to all keys as a window of the grid's size, which moves with
    the query. It moves the other way than the keys run, so that they are taken backwards.

    Args:
        table: (num_heads, height, width), entry (|dy|, |dx|).
        query_stride: Queries are at every ``query_stride``-th key of both axes.

    Returns:
        (num_heads, query rows, query columns, height, width): entry (qy, qx, y, x) is of the key
        at (height - 1 - y, width - 1 - x). A view of the mirrored table.
    """
    num_heads, height, width = table.shape
    if is_compiling():
        # Exporters know gathering with sizes that vary better than mirroring and windows.
        dy, dx = (
            (
                torch.arange(0, side, query_stride, device=table.device)[:, None]
                + torch.arange(1 - side, 1, device=table.device)
            ).abs()
            for side in (height, width)
        )
        index = dy[:, None, :, None] * width + dx[:, None, :]
        gathered = table.flatten(1).index_select(1, index.flatten())
        return gathered.view(num_heads, *index.shape)
    mirrored = F.pad(table, (width - 1, 0, height - 1, 0), mode='reflect')
    return mirrored.unfold(1, height, query_stride).unfold(2, width, query_stride)


def attend_in_parts(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
) -> Tensor:
    """Attend with as many queries at a time as SCORE_BUDGET has room for.

    A query's result depends on no other query, so splitting changes no result. It is done only
    where no gradient is needed, since that would take the scores of all queries again.

    Args:
        attend: Maps tokens of queries, keys and values (batch, num_heads, tokens, dim), and the
            bias of these queries, to their results.
        q: (batch, num_heads * key_dim, query rows, query columns).
        k: (batch, num_heads * key_dim, height, width).
        v: (batch, num_heads * value_dim, height, width).
        bias: Of all queries, as :class:`RelativePositionBias` gives it.

    Returns:
        (batch, num_heads * value_dim, query rows, query columns).
    """
    num_heads = bias.shape[0]
    height, width = q.shape[2:]
    # Keys are in the order of the bias, from last to first.
    k, v = (to_tokens(x, num_heads).flip(2).contiguous() for x in (k, v))
    if q.requires_grad or is_compiling():
        return to_feature_map(attend(to_tokens(q, num_heads), k, v, bias), (height, width))
    budget = SCORE_BUDGET_CPU if q.device.type == 'cpu' else SCORE_BUDGET
    bytes_per_query = k[:, :, :, 0].numel() * q.element_size()
    queries = max(FEWEST_QUERIES, budget // bytes_per_query)
    rows, columns = max(1, queries // width), min(queries, width)
    out = v.new_empty(len(q), height, width, num_heads, v.shape[3])
    for y in range(0, height, rows):
        for x in range(0, width, columns):
            in_y, in_x = slice(y, y + rows), slice(x, x + columns)
            part = q[:, :, in_y, in_x]
            mixed = attend(to_tokens(part, num_heads), k, v, bias[:, in_y, in_x])
            out[:, in_y, in_x] = mixed.transpose(1, 2).unflatten(1, part.shape[2:])
    return out.flatten(3).permute(0, 3, 1, 2)


def mix_heads(scores: Tensor, talking_head: nn.Conv2d) -> Tensor:
    """What a talking head makes of (batch, num_heads, queries, keys), without its bias."""
    # The convolution itself would copy the scores to its own memory layout, and back.
    weight = talking_head.weight[:, :, 0, 0].expand(scores.shape[0], -1, -1)
    return torch.bmm(weight, scores.flatten(2)).view_as(scores)


def add_bias(scores: Tensor, bias: Tensor) -> Tensor:
    """Add a bias to scores.

    Args:
        scores: (batch, num_heads, queries, keys).
        bias: (num_heads, query rows, query columns, key rows, key columns).
    """
    if is_compiling():
        return scores + bias.flatten(3).flatten(1, 2)
    by_row = scores.unflatten(3, bias.shape[3:]).unflatten(2, bias.shape[1:3])
    return add(by_row, bias).view_as(scores)


def to_tokens(x: Tensor, num_heads: int) -> Tensor:
    """(batch, num_heads * dim, height, width) to (batch, num_heads, height * width, dim)."""
    return x.flatten(2).unflatten(1, (num_heads, -1)).transpose(-2, -1)


def to_feature_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(batch, num_heads, height * width, dim) to (batch, num_heads * dim, height, width)."""
    return tokens.transpose(-2, -1).flatten(1, 2).unflatten(2, tuple(grid))
