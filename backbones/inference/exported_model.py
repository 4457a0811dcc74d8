"""An exported file as a model that makes predictions."""

import os
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch

from backbones.errors import ExportError

from .exported_file import open_exported
from .masks import paste_masks
from .results import Detections, Segmentation
from .seg_maps import Logits, seg_map_of


class ExportedModel:
    """A file that tools/export.py wrote, with the methods of :class:`.model.TorchModel`.

    Args:
        path: The file; all arguments and errors as in :func:`.exported_file.open_exported`.
        device: Where it runs.
        amp: Mixed precision.

    Raises:
        ExportError: The file holds only a backbone.
    """

    def __init__(
        self, path: str | os.PathLike, device: str | None = None, amp: bool = False
    ) -> None:
        self.runner = open_exported(path, device, amp=amp)
        self.description = self.runner.description
        if self.description.task == 'backbone':
            raise ExportError(f'{path} holds only a backbone, which makes no predictions')
        self.task = self.description.task
        self.classes = self.description.classes
        self.palette = self.description.palette

    def preprocess(self, image: np.ndarray) -> dict[str, Any]:
        """An image as an input, and height and width of the image in it: see
        :meth:`.exported_file.Description.fit`."""
        inputs, fitted = self.description.fit(image)
        return dict(inputs=inputs, fitted=fitted)

    def predict(self, prepared: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Run the file on prepared images, all of one size: its outputs for each, by name."""
        step = self.description.batch or max(len(prepared), 1)
        raws = []
        for first in range(0, len(prepared), step):
            chunk = prepared[first : first + step]
            inputs = np.stack([item['inputs'] for item in chunk])
            if self.description.batch:
                # A file of a fixed batch takes no smaller one.
                rest = [(0, self.description.batch - len(chunk))] + [(0, 0)] * 3
                inputs = np.pad(inputs, rest)
            outputs = self.runner(inputs)
            raws += [
                {name: values[i] for name, values in outputs.items()} | {'fitted': item['fitted']}
                for i, item in enumerate(chunk)
            ]
        return raws

    def postprocess(self, raw: dict[str, Any], size: tuple[int, int]) -> Detections | Segmentation:
        """Turn a result of :meth:`predict` into a prediction in pixels of an image of that size."""
        if self.task == 'segmentation':
            return Segmentation(self._seg_map(raw, size))
        fitted_height, fitted_width = raw['fitted']
        limits = np.array([fitted_width, fitted_height] * 2, np.float32)
        kept = (raw['boxes'][:, :2] < limits[:2]).all(axis=1) & (raw['labels'] >= 0)
        scale = np.array([size[1] / fitted_width, size[0] / fitted_height] * 2, np.float32)
        boxes = raw['boxes'][kept]
        masks = None
        if 'masks' in raw:
            # A mask covers the whole box, whose part in the padding is cut off below.
            threshold = self.description.mask_threshold
            masks = paste_masks(raw['masks'][kept], boxes * scale, size, threshold)
        boxes = np.minimum(boxes, limits) * scale
        return Detections(boxes, raw['scores'][kept], raw['labels'][kept].astype(np.int64), masks)

    def _seg_map(self, raw: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
        height, width = raw['fitted']
        dtype = np.uint8 if len(self.classes) <= 255 else np.uint16
        if self.description.logits:
            logits = Logits.of(torch.from_numpy(raw['logits'][:, :height, :width]))
            logits = logits.resize(size, self.description.align_corners)
            labels = seg_map_of(logits, self.description.binary_threshold)
            return labels.numpy().astype(dtype)
        labels = raw['segmentation_map'][:height, :width].astype(dtype)
        return cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
