"""An exported file as something that turns pictures into predictions."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch

from backbones.errors import ExportError
from backbones.inference.masks import paste_masks
from backbones.inference.results import Detections, Segmentation
from backbones.inference.seg_maps import Logits, seg_map_of

from .runner import open_exported


@dataclass(frozen=True)
class RawResult:
    """A file's results for one picture.

    Attributes:
        outputs: By name, as the file gives them.
        fitted: Height and width of the picture inside the input.
    """

    outputs: dict[str, np.ndarray]
    fitted: tuple[int, int]


class ExportedModel:
    """A file that tools/export.py wrote, with the methods of
    :class:`backbones.inference.model.TorchModel`.

    Args:
        path: The file; it and the rest as in :func:`.runner.open_exported`, errors too.
        device: Where it runs.
        amp: Mixed precision.

    Attributes:
        description: What the file says about itself.
        task: 'detection' or 'segmentation'.
        classes: The class names.
        palette: (R, G, B) of each class, or None.

    Raises:
        ExportError: The file holds a backbone only.
    """

    def __init__(
        self, path: str | os.PathLike, device: str | None = None, amp: bool = False
    ) -> None:
        self.runner = open_exported(path, device, amp=amp)
        self.description = self.runner.description
        if self.description.task == 'backbone':
            raise ExportError(f'{path} holds a backbone only, which makes no predictions')
        self.task = self.description.task
        self.classes = self.description.classes
        self.palette = self.description.palette

    def preprocess(self, picture: np.ndarray) -> dict[str, Any]:
        """Resize a picture as the config's test pipeline does.

        Args:
            picture: (height, width, 3), uint8, BGR.

        Returns:
            ``inputs``, (3, height, width), float32, and ``fitted``, height and width of the
            picture inside.
        """
        fitted = self.description.fit(picture)
        return dict(inputs=fitted.inputs, fitted=fitted.size)

    def predict(self, prepared: Sequence[dict[str, Any]]) -> list[RawResult]:
        """Run the network on pictures that were prepared, all of one size.

        Raises:
            RuntimeError: It cannot be run, for want of memory perhaps.
        """
        step = self.description.batch or max(len(prepared), 1)
        raws = []
        for first in range(0, len(prepared), step):
            chunk = prepared[first : first + step]
            inputs = np.stack([item['inputs'] for item in chunk])
            if self.description.batch:
                # A file for so many pictures takes no fewer.
                rest = [(0, self.description.batch - len(chunk))] + [(0, 0)] * 3
                inputs = np.pad(inputs, rest)
            outputs = self.runner(inputs)
            raws += [
                RawResult({name: values[i] for name, values in outputs.items()}, item['fitted'])
                for i, item in enumerate(chunk)
            ]
        return raws

    def postprocess(self, raw: RawResult, size: tuple[int, int]) -> Detections | Segmentation:
        """Make a result a prediction in pixels of the picture.

        Args:
            raw: An entry of what :meth:`predict` returns.
            size: Height and width of the picture.
        """
        if self.task == 'segmentation':
            return Segmentation(self._label_map(raw, size))
        (height, width), (fitted_height, fitted_width) = size, raw.fitted
        limits = np.array([fitted_width, fitted_height] * 2, np.float32)
        inside = (raw.outputs['boxes'][:, :2] < limits[:2]).all(axis=1)
        kept = inside & (raw.outputs['labels'] >= 0)
        outputs = {name: values[kept] for name, values in raw.outputs.items()}
        scale = np.array([width / fitted_width, height / fitted_height] * 2, np.float32)
        boxes = np.minimum(outputs['boxes'], limits) * scale
        masks = None
        if 'masks' in outputs:
            # Where a box was cut at the picture's edge, its mask was not.
            whole = outputs['boxes'] * scale
            threshold = self.description.mask_threshold
            masks = paste_masks(outputs['masks'], whole, size, threshold)
        return Detections(boxes, outputs['scores'], outputs['labels'].astype(np.int64), masks)

    def _label_map(self, raw: RawResult, size: tuple[int, int]) -> np.ndarray:
        height, width = raw.fitted
        dtype = np.uint8 if len(self.classes) <= 255 else np.uint16
        if self.description.logits:
            logits = Logits.of(torch.from_numpy(raw.outputs['logits'][:, :height, :width]))
            logits = logits.resize(size, self.description.align_corners)
            labels = seg_map_of(logits, self.description.binary_threshold)
            return labels.numpy().astype(dtype)
        labels = raw.outputs['label_map'][:height, :width].astype(dtype)
        return cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
