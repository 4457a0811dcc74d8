"""Relative position bias on token grids of any size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Cache, is_compiling, version_of

BIAS_RESIZE_MODES = ('offset', 'matrix')


class RelativePositionBias(nn.Module):
    """A learned bias for each head and offset between a query and a key, added to their score.

    The table (num_heads, height, width) has an entry for every offset (|dy|, |dx|) on the token
    grid of pre-training (LeViT's attention bias, which the paper adopts). On another grid

    - 'offset' resizes the table (bicubic; the values at offset 0 and at the largest offset stay)
      and looks up the offsets in the result. It is exact if the grids are equal, and cheap.
    - 'matrix' builds the matrix of all queries and keys on the grid of pre-training and resizes it
      like an image. Use it only for the authors' COCO and ADE20K models, which were trained so.

    At inference the bias of the last grid is cached until the table changes.
    """

    def __init__(
        self, num_heads: int, table_size: tuple[int, int], query_stride: int, resize: str
    ) -> None:
        super().__init__()
        self.query_stride = query_stride
        self.resize = resize
        self.table = nn.Parameter(torch.zeros(num_heads, *table_size))
        self._cache = Cache()

    def forward(self, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return the bias (num_heads, query rows, query columns, *grid) for a grid of keys.

        ``grid`` is (height, width). The keys are ordered from last to first, see :func:`look_up`.
        """
        if self.training or torch.is_grad_enabled() or is_compiling():
            return self._look_up(grid, dtype)
        # A CUDA graph would always read the bias that was cached when it was recorded. Checked
        # after is_compiling(), since torch.compile cannot trace this check.
        if self.table.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._look_up(grid, dtype)
        key = (tuple(grid), dtype, self.table.device, *version_of(self.table))
        return self._cache(key, lambda: self._look_up(grid, dtype))

    def train(self, mode: bool = True) -> 'RelativePositionBias':
        # Writing to a parameter's `data`, as moving averages do, does not change its version.
        self._cache = Cache()
        return super().train(mode)

    def _look_up(self, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        if self.resize == 'offset':
            return look_up(resize_table(self.table, grid).to(dtype), self.query_stride)
        matrix = look_up(self.table, self.query_stride)
        queries = [-(-side // self.query_stride) for side in grid]
        matrix = at_least_float32(matrix.flatten(3).flatten(1, 2)[None])
        size = (queries[0] * queries[1], grid[0] * grid[1])
        resized = F.interpolate(matrix, size, mode='bicubic', align_corners=False)[0].to(dtype)
        return resized.unflatten(2, tuple(grid)).unflatten(1, tuple(queries))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        key = f'{prefix}table'
        loaded = state_dict.get(key)
        if loaded is not None and loaded.dim() == 3 and len(loaded) == len(self.table):
            state_dict[key] = resize_table(loaded, self.table.shape[1:])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._cache = Cache()


def resize_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a table (num_heads, height, width) to a grid; if it has that size, return it as is."""
    # An exported network must not depend on the grid of the image it was exported with.
    if not is_compiling() and tuple(table.shape[1:]) == tuple(grid):
        return table
    precise = at_least_float32(table[None])
    resized = F.interpolate(precise, tuple(grid), mode='bicubic', align_corners=True)
    return resized[0].to(table.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert to float32 or better: some devices have no bicubic kernel for half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def look_up(table: Tensor, query_stride: int) -> Tensor:
    """Look up the bias of all pairs of a query and a key on the grid of a table.

    The table (num_heads, height, width) is first mirrored to cover negative offsets: on an axis of
    length n, index i then has offset i - (n - 1). A query at q has offsets from q - (n - 1), to the
    last key, up to q, to the first key. These are the n entries from index q on, so the bias of a
    query is a window of the mirrored table, with the keys from last to first.

    Returns:
        (num_heads, query rows, query columns, height, width), a view of the mirrored table. Entry
        (qy, qx, y, x) belongs to the query at ``query_stride`` * (qy, qx) and the key at
        (height - 1 - y, width - 1 - x).
    """
    num_heads, height, width = table.shape
    if is_compiling():
        # With dynamic sizes, exporters support gathering better than mirroring and windows.
        dy, dx = [
            (
                torch.arange(0, side, query_stride, device=table.device)[:, None]
                + torch.arange(1 - side, 1, device=table.device)
            ).abs()
            for side in (height, width)
        ]
        index = dy[:, None, :, None] * width + dx[:, None, :]
        gathered = table.flatten(1).index_select(1, index.flatten())
        return gathered.view(num_heads, *index.shape)
    mirrored = F.pad(table, (width - 1, 0, height - 1, 0), mode='reflect')
    return mirrored.unfold(1, height, query_stride).unfold(2, width, query_stride)
