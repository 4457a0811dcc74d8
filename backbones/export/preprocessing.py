"""What happens to pixels before the network."""

import torch.nn.functional as F
from torch import Tensor, nn


class Preprocessing(nn.Module):
    """What the model's data preprocessor does at test time: normalise, then pad with zeros.

    Args:
        preprocessor: The model's ``data_preprocessor``.
        pad_divisor: Height and width are padded, right and below, to a multiple of this.
    """

    def __init__(self, preprocessor: nn.Module, pad_divisor: int) -> None:
        super().__init__()
        self.pad_divisor = pad_divisor
        mean, std = preprocessor.mean.flatten(), preprocessor.std.flatten()
        self.flips_channels = flips_channels(preprocessor)
        self.register_buffer('mean', mean.view(1, -1, 1, 1).clone())
        self.register_buffer('std', std.view(1, -1, 1, 1).clone())

    def forward(self, pictures: Tensor) -> Tensor:
        if self.flips_channels:
            pictures = pictures.flip(1)
        pictures = (pictures - self.mean) / self.std
        if self.pad_divisor == 1:
            return pictures
        height, width = pictures.shape[-2:]
        right, below = (missing_to_multiple(n, self.pad_divisor) for n in (width, height))
        return F.pad(pictures, (0, right, 0, below))


def flips_channels(preprocessor: nn.Module) -> bool:
    """Whether a data preprocessor turns BGR into RGB, or the reverse."""
    # mmseg before 1.4 has a name of its own for it.
    if hasattr(preprocessor, 'channel_conversion'):
        return preprocessor.channel_conversion
    return preprocessor._channel_conversion


def missing_to_multiple(size: int, divisor: int) -> int:
    """How much is missing from a size to the next multiple.

    Nothing in it is negative: ONNX rounds quotients towards zero, Python down.
    """
    return (size + divisor - 1) // divisor * divisor - size
