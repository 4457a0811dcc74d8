"""Relative position bias on token grids of any size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Cache, is_compiling, version_of

BIAS_RESIZE_MODES = ('offset', 'matrix')


class RelativePositionBias(nn.Module):
    """What the distance between a query and a key adds to their score, learned for each head.

    The table (num_heads, height, width) has an entry for every offset (|dy|, |dx|) on the token
    grid of pre-training (LeViT's attention bias, which the paper takes over). For another grid

    - 'offset' resizes the table (bicubic; offset 0 and the largest offset stay what they are) and
      looks up in the result. Exact where the grids agree, and cheap.
    - 'matrix' looks up for the grid of pre-training and resizes the matrix of queries and keys as
      if it were an image. The authors' published COCO and ADE20K models were trained so; it
      serves them alone.

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
        """Bias (num_heads, query rows, query columns, *grid) for keys on ``grid`` (height, width).

        The keys are from last to first, see :func:`look_up`; ``dtype`` is that of the scores.
        """
        if self.training or torch.is_grad_enabled() or is_compiling():
            return self._look_up(grid, dtype)
        # A CUDA graph would keep reading what was cached when it was recorded. Asked last, since
        # torch.compile cannot ask it.
        if self.table.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._look_up(grid, dtype)
        key = (tuple(grid), dtype, self.table.device, *version_of(self.table))
        return self._cache(key, lambda: self._look_up(grid, dtype))

    def train(self, mode: bool = True) -> 'RelativePositionBias':
        # Writing to a parameter's `data`, as moving averages do, leaves no trace in its version.
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
    """A table (num_heads, height, width) laid out for another grid; itself where they agree."""
    # An exported network must not depend on the grid of the image that it was exported with.
    if not is_compiling() and tuple(table.shape[1:]) == tuple(grid):
        return table
    precise = at_least_float32(table[None])
    resized = F.interpolate(precise, tuple(grid), mode='bicubic', align_corners=True)
    return resized[0].to(table.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision has no bicubic kernel on every device."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def look_up(table: Tensor, query_stride: int) -> Tensor:
    """Spread a table (num_heads, height, width) over the pairs of queries and keys of its grid.

    The table is mirrored first, so that along an axis of length n place i is offset i - (n - 1),
    negative ones included. The query at q has the offsets q - (n - 1), to the last key, to q, to
    the first one: the window of n places from q on, with the keys from last to first.

    Returns:
        (num_heads, query rows, query columns, height, width): entry (qy, qx, y, x) is of the query
        at ``query_stride`` * (qy, qx) and the key at (height - 1 - y, width - 1 - x). A view of
        the mirrored table.
    """
    num_heads, height, width = table.shape
    if is_compiling():
        # Exporters know gathering with sizes that vary better than mirroring and windows.
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
