"""An :class:`.Inferencer` in place of a config's model, so that mmengine tests it.

Images go through its own resizing, as in infer.py, and predictions are compared with ground truth
at the size of the image, so that metrics are comparable with those of mmengine's own test.
"""

from itertools import groupby
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.structures import InstanceData, PixelData
from torch import nn

from backbones.data.config_datasets import datasets_of

from .inferencer import Inferencer
from .masks import encode_mask
from .results import Segmentation

# Transforms of a test pipeline that leave the image as it is.
HARMLESS_TRANSFORMS = ('LoadImage', 'LoadAnnotations', 'LoadPanopticAnnotations', 'Pack')


@MODELS.register_module()
class InferencerModel(BaseModel):
    """An :class:`.Inferencer` as mmengine's model; a test prints its ``summary``."""

    def __init__(
        self, config: str, checkpoint: str | None = None, tile: int | None = None, **options: Any
    ) -> None:
        super().__init__()
        # mmengine has chosen the process's own GPU; an exported file finds it by itself.
        if checkpoint and torch.cuda.is_available():
            options['device'] = f'cuda:{torch.cuda.current_device()}'
        self.inferencer = Inferencer(config, checkpoint, score_thr=0.0, tile=tile, **options)
        self.summary = {'weights': checkpoint or config, **self.inferencer.about}
        if tile:
            self.summary['model'] += f', in tiles of {tile}x{tile}'
        # DistributedDataParallel refuses a model without a parameter.
        self.unused = nn.Parameter(torch.zeros(()))

    def test_step(self, data: dict[str, Any]) -> list[Any]:
        """Add predictions to the samples of a batch of images at their own size; return them."""
        images = [
            np.ascontiguousarray(image.numpy().transpose(1, 2, 0)) for image in data['inputs']
        ]
        prepared = [self.inferencer.preprocess(image) for image in images]
        batches = groupby(prepared, key=lambda item: item['inputs'].shape)
        raws = [raw for _, batch in batches for raw in self.inferencer.predict(list(batch))]
        for sample, image, raw in zip(data['data_samples'], images, raws, strict=True):
            prediction = self.inferencer.postprocess(raw, image.shape[:2])
            if isinstance(prediction, Segmentation):
                seg_map = torch.from_numpy(prediction.seg_map.astype(np.int64))
                sample.pred_sem_seg = PixelData(data=seg_map[None])
                continue
            found = InstanceData(
                bboxes=torch.from_numpy(prediction.boxes),
                scores=torch.from_numpy(prediction.scores),
                labels=torch.from_numpy(prediction.labels),
            )
            if prediction.masks is not None:
                found.masks = [encode_mask(mask, image.shape[:2]) for mask in prediction.masks]
            sample.pred_instances = found
        return data['data_samples']

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError('this model makes predictions only')


def use_inferencer(config: Config, arguments: dict[str, Any]) -> None:
    """Put an :class:`InferencerModel` in place of a config's model; images keep their size."""
    config.model = ConfigDict(type='InferencerModel', **arguments)
    config.load_from, config.resume = None, False
    for dataset in datasets_of(config, ('test',)):
        dataset.pipeline = [
            step
            for step in dataset.get('pipeline') or ()
            if str(step.type).rpartition('.')[2].startswith(HARMLESS_TRANSFORMS)
        ]
