"""Attention of EfficientFormerV2 on token grids of any size.

The two kinds of attention come first, then what both compute with, a part of the queries at a
time. :mod:`.position_bias` has what both add to their scores, :mod:`.cpu` how the same is computed
at inference on most CPUs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu import FusedConv, add_attention, can_use_onednn, split_queries
from .fold import JoinedConvs, scale_channels
from .layers import GELU, ConvNorm, add, is_compiling
from .position_bias import RelativePositionBias

# Bytes that the scores of a part of the queries may take at inference: on a CPU they are to stay in
# its cache (where oneDNN is used, see .cpu), elsewhere they only have to fit in memory.
SCORE_BUDGET = 128 * 2**20
SCORE_BUDGET_CPU = 3 * 2**20


class TalkingHeadAttention(nn.Module):
    """Attention of stages 3 and 4, with heads that talk to each other (the paper's MHSA, 3.3).

    Maps (batch, channels, height, width) to the same shape. With stride 2 (stage 3, the paper's
    stride attention, 3.4) tokens are at half the size and the result is upsampled; with stride 1
    (stage 4) every pixel is a token. ``table_size`` is the token grid (height, width) of
    pre-training.

    The second talking head comes after the softmax and has a bias, so that a constant times the
    sum of all values is part of every result. That sum grows with the grid, while the statistics
    of the norms behind it stay: a network trained on small crops fails on whole images. With
    'offset', the bias is therefore scaled by the tokens of the table's grid over those of the
    image's, which makes it a multiple of the values' mean. Nothing changes where the grids agree.
    'matrix' leaves it as it is: the authors' COCO and ADE20K models were trained so.
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
        self.qkv: JoinedConvs | None = None
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
        bias = self.relative_position_bias(x.shape[-2:], q.dtype)
        x = self.v_local(v)
        if can_use_onednn(x):
            heads = (self.talking_head1.weight[:, :, 0, 0], self.talking_head2.weight[:, :, 0, 0])
            x = add_attention(x, q, k, v, bias, heads, self.constant_part(v).flatten(1))
        else:
            x = add(x, attend_in_parts(self.attend, q, k, v, bias))
            x = add(x, self.constant_part(v))
        if self.stride_conv is not None:
            x = F.interpolate(x, size, mode='bilinear', align_corners=False)
        return self.proj(self.act(x))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, times ``key_dim**-0.5``, keys and values, as feature maps."""
        if self.qkv is not None:
            return self.qkv(x)
        return self.q(x) * self.scale, self.k(x), self.v(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = add_bias(q @ k.transpose(-2, -1), bias)
        scores = mix_heads(scores, self.talking_head1)
        if scores.requires_grad:
            # The softmax cancels it, but DistributedDataParallel waits for its gradient.
            scores = scores + self.talking_head1.bias[:, None, None]
        return mix_heads(scores.softmax(dim=-1), self.talking_head2) @ v

    def constant_part(self, v: Tensor) -> Tensor:
        """What the second talking head's bias, which `attend` leaves out, makes of all values.

        Maps values (batch, channels, height, width) to (batch, channels, 1, 1).
        """
        bias = self.talking_head2.bias
        bias = bias.repeat_interleave(v.shape[1] // len(bias), dim=0)[:, None, None]
        tokens = self.table_tokens if self.scales_bias else v.shape[2] * v.shape[3]
        return v.mean(dim=(2, 3), keepdim=True) * bias * tokens

    @property
    def table_tokens(self) -> int:
        """Tokens of the grid that the bias table is laid out for."""
        return self.relative_position_bias.table[0].numel()

    def switch_to_deploy(self) -> None:
        """Make q, k and v one convolution, where they are nothing else by now."""
        if self.qkv is None and all(isinstance(m, nn.Conv2d) for m in (self.q, self.k, self.v)):
            scale_channels(self.q, self.scale)
            self.qkv = JoinedConvs((self.q, self.k, self.v))
            del self.q, self.k, self.v

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        table = state_dict.get(f'{prefix}relative_position_bias.table')
        key = f'{prefix}talking_head2.bias'
        if self.scales_bias and table is not None and key in state_dict:
            # Where the table is resized, the bias has to stand for as many values as before.
            state_dict[key] = state_dict[key] * (table[0].numel() / self.table_tokens)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class DownsamplingAttention(nn.Module):
    """Attention between stages 3 and 4, whose queries are at half the size (the paper's 3.5).

    Maps (batch, in_channels, height, width) to (batch, out_channels, ceil(height / 2),
    ceil(width / 2)). ``table_size`` is the grid (height, width) of the keys in pre-training.
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
        self.kv: JoinedConvs | None = None
        self.v_local = ConvNorm(values, values, 3, norm_cfg, stride=2, groups=values)
        self.relative_position_bias = RelativePositionBias(num_heads, table_size, 2, bias_resize)
        self.act = GELU()
        self.proj = ConvNorm(values, out_channels, 1, norm_cfg)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        bias = self.relative_position_bias(x.shape[-2:], q.dtype)
        x = self.v_local(v)
        if can_use_onednn(x):
            x = add_attention(x, q, k, v, bias)
        else:
            x = add(x, attend_in_parts(self.attend, q, k, v, bias))
        return self.proj(self.act(x))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, times ``key_dim**-0.5``, keys and values, as feature maps."""
        if self.kv is not None:
            return self.q(self.q_local(x)), *self.kv(x)
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
            self.q_local = FusedConv(self.q_local)
            self.kv = JoinedConvs((self.k, self.v))
            del self.k, self.v


def attend_in_parts(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
) -> Tensor:
    """Attend with as many queries at a time as the budget of the device has room for.

    With gradients all are taken at once, since the backward pass needs all scores. ``attend`` maps
    tokens (batch, num_heads, tokens, dim) of queries, keys and values, and the bias of these
    queries, to their results. q, k, v and the returned results are feature maps, ``bias`` is what
    :class:`RelativePositionBias` returns.
    """
    num_heads = bias.shape[0]
    height, width = q.shape[2:]
    # Keys are in the order of the bias, from last to first.
    k, v = [to_tokens(x, num_heads).flip(2).contiguous() for x in (k, v)]
    if q.requires_grad or is_compiling():
        return to_feature_map(attend(to_tokens(q, num_heads), k, v, bias), (height, width))
    budget = SCORE_BUDGET_CPU if q.device.type == 'cpu' else SCORE_BUDGET
    bytes_per_query = k[:, :, :, 0].numel() * q.element_size()
    out = v.new_empty(len(q), height, width, num_heads, v.shape[3])
    for part in split_queries(height, width, budget, bytes_per_query):
        queries = q[:, :, part.rows, part.columns]
        mixed = attend(to_tokens(queries, num_heads), k, v, bias[:, part.rows, part.columns])
        out[:, part.rows, part.columns] = mixed.transpose(1, 2).unflatten(1, queries.shape[2:])
    return out.flatten(3).permute(0, 3, 1, 2)


def mix_heads(scores: Tensor, talking_head: nn.Conv2d) -> Tensor:
    """What a talking head makes of (batch, num_heads, queries, keys), without its bias."""
    # The convolution itself would copy the scores to its own memory layout, and back.
    weight = talking_head.weight[:, :, 0, 0].expand(scores.shape[0], -1, -1)
    return torch.bmm(weight, scores.flatten(2)).view_as(scores)


def add_bias(scores: Tensor, bias: Tensor) -> Tensor:
    """Add (num_heads, query rows, query columns, key rows, key columns) to scores
    (batch, num_heads, queries, keys)."""
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
