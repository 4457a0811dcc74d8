"""Preprocessing of pixels inside an exported file, before the network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.errors import ConfigError


class Preprocessing(nn.Module):
    """The work of a model's ``data_preprocessor`` in testing: normalize colors by ``mean`` and
    ``std`` (1, 3, 1, 1) in the network's channel order, then pad with ``pad_value`` to multiples
    of ``pad_divisor``, right and below. Raises ConfigError if it pads to a fixed size."""

    def __init__(self, preprocessor: nn.Module) -> None:
        super().__init__()
        # A preprocessor that does not normalize has no mean and std.
        for name, default in (('mean', torch.zeros(3)), ('std', torch.ones(3))):
            values = getattr(preprocessor, name, default).detach().clone()
            self.register_buffer(name, values.view(1, -1, 1, 1))
        # mmseg's name, else mmengine's, which mmdet inherits.
        conversion = getattr(preprocessor, 'channel_conversion', None)
        self.flips_channels = preprocessor._channel_conversion if conversion is None else conversion
        if not hasattr(preprocessor, 'pad_val'):
            self.pad_value = float(preprocessor.pad_value)
            self.pad_divisor = preprocessor.pad_size_divisor
            return
        settings = preprocessor.test_cfg or {}
        if settings.get('size'):
            raise ConfigError(
                'data_preprocessor.test_cfg pads images to a fixed size, but an exported file '
                'cannot: use --cfg-options model.data_preprocessor.test_cfg=None and --size'
            )
        self.pad_value = float(preprocessor.pad_val)
        self.pad_divisor = settings.get('size_divisor') or 1

    def forward(self, images: Tensor) -> Tensor:
        if self.flips_channels:
            images = images.flip(1)
        images = (images - self.mean) / self.std
        if self.pad_divisor == 1:
            return images
        height, width = images.shape[-2:]
        right, below = (missing_to_multiple(n, self.pad_divisor) for n in (width, height))
        return F.pad(images, (0, right, 0, below), value=self.pad_value)

    def pad_pixel(self) -> list[float]:
        """Return the pixel (B, G, R) that :meth:`forward` maps to ``pad_value``."""
        pixel = (self.mean + self.std * self.pad_value).flatten().tolist()
        return pixel[::-1] if self.flips_channels else pixel


def missing_to_multiple(size: int, divisor: int) -> int:
    """Return how much a size lacks to the next multiple."""
    # Without negative numbers, which ONNX rounds towards zero and Python rounds down.
    return (size + divisor - 1) // divisor * divisor - size
