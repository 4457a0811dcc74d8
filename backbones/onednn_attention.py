"""Attention for inference on a CPU, its matrix products as convolutions with a group for each head.

In a channels-last feature map the heads of a query lie side by side, and so do its scores where
keys are a convolution's output channels. So nothing is transposed, talking heads mix what is close
together, and a part of the queries stays in the processor's cache from the scores to the result.
"""

import torch
from torch import Tensor

from .onednn import add_convolution_, pack
from .query_parts import split_queries

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
