"""Recording what a model computes, for pictures of one size or of any."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from backbones.efficientformer_v2.position_bias import RelativePositionBias

# Nothing is computed from these: they only tell a size that is left open from one that is not.
LARGEST_SIZE = 16384
LARGEST_BATCH = 1024


def trace(
    model: nn.Module,
    size: tuple[int, int] | None,
    batch: int | None,
    min_size: int = 1,
    keep_biases: bool = False,
) -> ExportedProgram:
    """Record a model that maps pictures (batch, 3, height, width) to tensors.

    Args:
        model: In evaluation mode, on the CPU.
        size: Height and width; None leaves both open.
        batch: Pictures at once; None leaves it open.
        min_size: Where the size is open, the least height and width.
        keep_biases: Where the size is fixed, record the relative position biases as constants,
            for formats that cannot resize tables.

    Raises:
        torch._dynamo.exc.UserError: The model computes something from a size that is to be open.
    """
    # Sizes that are open have names, so that one that becomes a constant is an error.
    open_sizes = {}
    if batch is None:
        open_sizes[0] = Dim('batch', max=LARGEST_BATCH)
    if size is None:
        open_sizes[2] = Dim('height', min=min_size, max=LARGEST_SIZE)
        open_sizes[3] = Dim('width', min=min_size, max=LARGEST_SIZE)
    # Sizes of the example that are small or alike look to torch as if they always were.
    height, width = size or (2 * min_size + 61, 2 * min_size + 93)
    example = torch.zeros(batch or 3, 3, height, width)
    biases = biases_kept(model, example) if keep_biases else nullcontext()
    with torch.no_grad(), biases:
        return torch.export.export(
            model,
            (example,),
            dynamic_shapes=(open_sizes,),
            # What is true of every size but beyond its algebra becomes an assertion.
            prefer_deferred_runtime_asserts_over_guards=True,
        )


@contextmanager
def biases_kept(model: nn.Module, example: Tensor) -> Iterator[None]:
    """Relative position biases as what they are for the grids of an example."""
    model(example)
    kept = {
        module: module._kept[1].contiguous()
        for module in model.modules()
        if isinstance(module, RelativePositionBias)
    }

    def kept_bias(module: RelativePositionBias, *args: object) -> Tensor:
        return kept[module]

    with patch.object(RelativePositionBias, 'forward', kept_bias):
        yield
