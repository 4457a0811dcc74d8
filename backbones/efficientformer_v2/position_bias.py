"""Relative position bias on token grids of any size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu import is_compiling, version_of

BIAS_RESIZE_MODES = ('offset', 'matrix')


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

        With 'offset' it is a view of a table twice as wide and high, see :func:`look_up`: it
        takes no memory.

        Args:
            grid: Height and width of the keys, in tokens.
            dtype: What the scores are in, which autocast may have made another than the table's.

        Returns:
            (num_heads, query rows, query columns, *grid), with the keys from last to first.
        """
        if self.training or torch.is_grad_enabled() or is_compiling():
            return self._look_up(grid, dtype)
        described = (tuple(grid), dtype, self.table.device, *version_of(self.table))
        if self._kept is None or self._kept[0] != described:
            self._kept = described, self._look_up(grid, dtype)
        return self._kept[1]

    def train(self, mode: bool = True) -> 'RelativePositionBias':
        # Writing to a parameter's `data`, as moving averages do, leaves no trace in its version.
        self._kept = None
        return super().train(mode)

    def _look_up(self, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        if self.resize == 'offset':
            return look_up(resize_table(self.table, grid).to(dtype), self.query_stride)
        matrix = look_up(self.table, self.query_stride)
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
