"""Attention of EfficientFormerV2 on token grids of any size.

The two kinds of attention come first, then the functions that both use. :mod:`.position_bias` has
the bias that both add to their scores, :mod:`.cpu` the faster computation at inference on x86 CPUs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu import FusedConv, add_attention, can_use_onednn, split_queries
from .fold import JoinedConvs, scale_channels
from .layers import GELU, ConvNorm, add, is_compiling
from .position_bias import RelativePositionBias

# Limits, in bytes, of the scores that attention computes at a time at inference (for a part of the
# queries). On a CPU they should stay in its cache (for oneDNN see .cpu), elsewhere fit in memory.
SCORE_BUDGET = 128 * 2**20
SCORE_BUDGET_CPU = 3 * 2**20


class TalkingHeadAttention(nn.Module):
    """Attention of stages 3 and 4, with talking heads (the paper's MHSA, section 3.3).

    The output has the shape of the input, (batch, channels, height, width). With stride 2 (stage
    3, the paper's stride attention, 3.4) the token grid has half the size of the feature map, and
    the result is upsampled. With stride 1 (stage 4) every pixel is a token. ``table_size`` is the
    token grid (height, width) of pre-training.

    The second talking head comes after the softmax and has a bias, which adds a constant times the
    sum of all values to every result. This sum grows with the number of tokens, but the running
    statistics of the norms after it do not: a network trained on small crops would fail on whole
    images. With 'offset', the bias is therefore multiplied by the number of tokens in the table's
    grid over that in the image's, which makes the constant part a multiple of the values' mean. If
    the grids are equal, nothing changes. 'matrix' does not scale the bias: the authors' COCO and
    ADE20K models were trained this way.
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
        """Compute queries (times ``key_dim**-0.5``), keys and values, as feature maps."""
        if self.qkv is not None:
            return self.qkv(x)
        return self.q(x) * self.scale, self.k(x), self.v(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = add_bias(q @ k.transpose(-2, -1), bias)
        scores = mix_heads(scores, self.talking_head1)
        if scores.requires_grad:
            # The softmax cancels this bias, but DistributedDataParallel waits for its gradient.
            scores = scores + self.talking_head1.bias[:, None, None]
        return mix_heads(scores.softmax(dim=-1), self.talking_head2) @ v

    def constant_part(self, v: Tensor) -> Tensor:
        """Compute what the second talking head's bias, left out by `attend`, adds to all results.

        Maps values (batch, channels, height, width) to (batch, channels, 1, 1).
        """
        bias = self.talking_head2.bias
        bias = bias.repeat_interleave(v.shape[1] // len(bias), dim=0)[:, None, None]
        tokens = self.table_tokens if self.scales_bias else v.shape[2] * v.shape[3]
        return v.mean(dim=(2, 3), keepdim=True) * bias * tokens

    @property
    def table_tokens(self) -> int:
        """Number of tokens in the grid of the bias table."""
        return self.relative_position_bias.table[0].numel()

    def switch_to_deploy(self) -> None:
        """Join q, k and v into one convolution, if their norms are folded."""
        if self.qkv is None and all(isinstance(m, nn.Conv2d) for m in (self.q, self.k, self.v)):
            scale_channels(self.q, self.scale)
            self.qkv = JoinedConvs((self.q, self.k, self.v))
            del self.q, self.k, self.v

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        table = state_dict.get(f'{prefix}relative_position_bias.table')
        key = f'{prefix}talking_head2.bias'
        if self.scales_bias and table is not None and key in state_dict:
            # The bias is multiplied by table_tokens at use; resizing must not change the product.
            state_dict[key] = state_dict[key] * (table[0].numel() / self.table_tokens)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class DownsamplingAttention(nn.Module):
    """Attention between stages 3 and 4, with queries at half the size (the paper's section 3.5).

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
        """Compute queries (times ``key_dim**-0.5``), keys and values, as feature maps."""
        if self.kv is not None:
            return self.q(self.q_local(x)), *self.kv(x)
        q = self.q(self.q_local(x) + x[:, :, ::2, ::2])
        return q * self.scale, self.k(x), self.v(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        if q.device.type == 'cpu':
            # CPUs have no fused kernel for values wider than keys.
            return add_bias(q @ k.transpose(-2, -1), bias).softmax(dim=-1) @ v
        bias = bias.flatten(3).flatten(1, 2)[None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Join k and v into one convolution and simplify q, if their norms are folded."""
        if self.kv is None and all(isinstance(m, nn.Conv2d) for m in (self.q, self.k, self.v)):
            scale_channels(self.q, self.scale)
            # x[:, :, ::2, ::2] is what the center of the strided kernel reads.
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
    """Compute attention for a part of the queries at a time, within the device's score budget.

    With gradients all queries are taken at once, since the backward pass needs all scores.
    ``attend`` maps tokens (batch, num_heads, tokens, dim) of queries, keys and values, and the bias
    of these queries, to their results. q, k, v and the returned results are feature maps. ``bias``
    is the output of :class:`RelativePositionBias`.
    """
    num_heads = bias.shape[0]
    height, width = q.shape[2:]
    # The bias has its keys from last to first.
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
    """Apply a talking head without its bias to scores (batch, num_heads, queries, keys)."""
    # Calling the convolution would copy the scores to another memory layout and back.
    weight = talking_head.weight[:, :, 0, 0].expand(scores.shape[0], -1, -1)
    return torch.bmm(weight, scores.flatten(2)).view_as(scores)


def add_bias(scores: Tensor, bias: Tensor) -> Tensor:
    """Add a bias (num_heads, query rows, query columns, key rows, key columns) to scores
    (batch, num_heads, queries, keys)."""
    if is_compiling():
        return scores + bias.flatten(3).flatten(1, 2)
    by_row = scores.unflatten(3, bias.shape[3:]).unflatten(2, bias.shape[1:3])
    return add(by_row, bias).view_as(scores)


def to_tokens(x: Tensor, num_heads: int) -> Tensor:
    """Reshape (batch, num_heads * dim, height, width) to (batch, num_heads, tokens, dim)."""
    return x.flatten(2).unflatten(1, (num_heads, -1)).transpose(-2, -1)


def to_feature_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Reshape (batch, num_heads, tokens, dim) to (batch, num_heads * dim, *grid)."""
    return tokens.transpose(-2, -1).flatten(1, 2).unflatten(2, tuple(grid))
