"""What predicts here in place of a config's model, so that mmengine tests it.

Images go through the predictor's own resizing, as in infer.py, and predictions are compared with
ground truth at the size of the image, so that metrics are comparable with those of mmengine's way.
"""

from collections.abc import Iterator
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

from .masks import encode_mask
from .model import TorchModel
from .pipeline import Model
from .results import Segmentation
from .tiles import TiledModel

# Transforms of a test pipeline that leave the image as it is.
HARMLESS_TRANSFORMS = ('LoadImage', 'LoadAnnotations', 'LoadPanopticAnnotations', 'Pack')


class ImageModel(BaseModel):
    """A predictor with the interface of a model that mmengine tests.

    Attributes:
        predictor: For instance a :class:`.model.TorchModel`.
        summary: What a test prints of its model.
    """

    def __init__(self, predictor: Model, summary: dict[str, str]) -> None:
        super().__init__()
        self.predictor, self.summary = predictor, summary
        # DistributedDataParallel refuses a model without a parameter.
        self.unused = nn.Parameter(torch.zeros(()))

    def test_step(self, data: dict[str, Any]) -> list[Any]:
        """The samples of a batch of images in their own size, with predictions in them."""
        images = [
            np.ascontiguousarray(image.numpy().transpose(1, 2, 0)) for image in data['inputs']
        ]
        predictions = self.predict(images)
        for sample, image, prediction in zip(
            data['data_samples'], images, predictions, strict=True
        ):
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

    def predict(self, images: list[np.ndarray]) -> Iterator[Any]:
        """Predictions for images (height, width, 3), those of one size after another together."""
        prepared = [self.predictor.preprocess(image) for image in images]
        batches = groupby(prepared, key=lambda item: item['inputs'].shape)
        raws = (raw for _, batch in batches for raw in self.predictor.predict(list(batch)))
        for raw, image in zip(raws, images, strict=True):
            yield self.predictor.postprocess(raw, image.shape[:2])

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError('this model makes predictions only')


@MODELS.register_module()
class TiledCheckpoint(ImageModel):
    """A config and a checkpoint, for images in tiles.

    Arguments are those of :class:`.model.TorchModel` and :class:`.tiles.TiledModel`.
    """

    def __init__(
        self,
        config: str,
        checkpoint: str,
        deploy: bool,
        cfg_options: dict[str, Any],
        tile: int,
        overlap: float | None,
        batch_size: int,
    ) -> None:
        # mmengine has chosen the process's own GPU.
        device = f'cuda:{torch.cuda.current_device()}' if torch.cuda.is_available() else None
        model = TorchModel(config, checkpoint, device, False, deploy, cfg_options)
        millions = sum(parameter.numel() for parameter in model.model.parameters()) / 1e6
        name = f'{type(model.model).__name__}, {millions:.1f} M parameters'
        summary = {'model': f'{name}, in tiles of {tile}x{tile}', 'weights': checkpoint}
        super().__init__(TiledModel(model, tile, overlap, batch_size), summary)


def use_predictor(config: Config, model: dict[str, Any]) -> None:
    """Put an :class:`ImageModel` in place of a config's model, and images as they are before it."""
    config.model = ConfigDict(model)
    config.load_from, config.resume = None, False
    for dataset in datasets_of(config, ('test',)):
        dataset.pipeline = [
            step
            for step in dataset.get('pipeline') or ()
            if str(step.type).rpartition('.')[2].startswith(HARMLESS_TRANSFORMS)
        ]
