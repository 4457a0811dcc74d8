"""What an exported file says about itself: how to feed it, and what its results mean."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from mmcv.image import imresize, rescale_size

# Under this name it is in ONNX's metadata_props, OpenVINO's rt_info, Core ML's user-defined
# metadata and, with .json, the extra files of a .pt2.
METADATA_KEY = 'efficientformer_v2_dense'
LAYOUT = 'float32 (batch, 3, height, width), BGR, 0 to 255; normalised inside the file'


@dataclass(frozen=True)
class Description:
    """The metadata of an exported file.

    Attributes:
        task: 'segmentation', 'detection' or 'backbone'.
        model: Name of the config.
        classes: Class names, in the order of the labels.
        palette: (R, G, B) of each class, or None.
        size: Height and width of the input; None where the file takes any.
        min_size: Least height and width of the input; what is smaller is padded.
        batch: Pictures at once; None where the file takes any number.
        resize: ``scale`` (width, height) and ``keep_ratio``, as mmcv's Resize takes them, for
            pictures before they are fed; None: as they are.
        mean: (R, G, B) that is subtracted inside the file.
        std: (R, G, B) by which is divided inside the file.
        pad_pixel: (B, G, R) to pad pictures with, on the right and below.
        outputs: The meaning of each output, by name.
        logits: Whether a segmentor gives logits instead of labels.
        binary_threshold: Of a segmentor with one logit: the probability of class 1 above which a
            pixel belongs to it.
        score_threshold: Detections that are not surer are not given.
        max_per_picture: How many detections a picture can have.
        mask_threshold: Probability from which on a pixel belongs to an instance.
        pad_divisor: To what multiple height and width are padded inside the file.
        align_corners: Of a segmentor's resizing.
        deployed: Whether the network was folded for inference.
        layout: Of the input.
        version: Of this project.
    """

    task: str
    model: str
    classes: tuple[str, ...]
    palette: list[list[int]] | None
    size: tuple[int, int] | None
    min_size: int
    batch: int | None
    resize: dict[str, Any] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad_pixel: tuple[float, ...]
    outputs: dict[str, str]
    logits: bool = False
    binary_threshold: float | None = None
    score_threshold: float | None = None
    max_per_picture: int | None = None
    mask_threshold: float | None = None
    pad_divisor: int = 1
    align_corners: bool = False
    deployed: bool = True
    layout: str = LAYOUT
    version: str = ''

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> 'Description':
        """Read what :meth:`to_json` wrote; entries of later versions are left out.

        Raises:
            ValueError: It is something else.
        """
        try:
            values = json.loads(text)
            known = {field.name for field in fields(cls)}
            values = {key: value for key, value in values.items() if key in known}
            for key in ('classes', 'mean', 'std', 'pad_pixel'):
                values[key] = tuple(values[key])
            values['size'] = values['size'] and tuple(values['size'])
            return cls(**values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'no description of an exported model: {error}') from error

    def fit(self, picture: np.ndarray) -> 'FittedPicture':
        """Resize a picture as the config's test pipeline does, and make it an input of the file.

        What is too large for a file of a fixed size is made smaller in the same proportions;
        what is too small is padded on the right and below.

        Args:
            picture: (height, width, 3), uint8, BGR.
        """
        height, width = self._size_inside(*picture.shape[:2])
        if (height, width) != picture.shape[:2]:
            picture = imresize(picture, (width, height))
        rows, columns = self.size or (max(height, self.min_size), max(width, self.min_size))
        inputs = np.empty((3, rows, columns), np.float32)
        inputs[:] = np.array(self.pad_pixel, np.float32)[:, None, None]
        inputs[:, :height, :width] = picture.transpose(2, 0, 1)
        return FittedPicture(inputs, (height, width))

    def _size_inside(self, height: int, width: int) -> tuple[int, int]:
        size = (width, height)
        if self.resize:
            scale = tuple(self.resize['scale'])
            size = rescale_size(size, scale) if self.resize['keep_ratio'] else scale
        if self.size and (size[0] > self.size[1] or size[1] > self.size[0]):
            ratio = min(self.size[1] / size[0], self.size[0] / size[1])
            size = tuple(max(1, int(n * ratio + 0.5)) for n in size)
        return size[1], size[0]


@dataclass(frozen=True)
class FittedPicture:
    """A picture as an exported file takes it.

    Attributes:
        inputs: (3, height, width), float32, BGR, 0 to 255.
        size: Height and width of the picture inside; the rest is padding.
    """

    inputs: np.ndarray
    size: tuple[int, int]
