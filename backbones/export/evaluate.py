"""Metrics of an exported file: its predictions in the evaluator and on the test data of a config.

Images go through the file's own resizing, as in infer.py, and predictions are compared with ground
truth at the size of the image, so that metrics are comparable with those of a checkpoint.
"""

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from torch import nn

from backbones.data.check import refuse_errors
from backbones.data.classes import set_classes
from backbones.data.config_datasets import datasets_of, walk
from backbones.engine.console import evaluation_of, prints_to, quiet
from backbones.engine.preflight import check_classes
from backbones.errors import ConfigError
from backbones.inference.exported_file import ExportedModel
from backbones.inference.masks import encode_mask
from backbones.inference.results import Segmentation

# Transforms of a test pipeline that leave the image as it is.
HARMLESS_TRANSFORMS = ('LoadImage', 'LoadAnnotations', 'LoadPanopticAnnotations', 'Pack')
TASKS = {'mmseg': 'segmentation', 'mmdet': 'detection'}
# Of mmdet's configs; AP counts detections below it for nothing.
USUAL_SCORE_THRESHOLD = 0.05


@MODELS.register_module()
class ExportedFile(BaseModel):
    """An exported file with the interface of a model that mmengine tests.

    Args:
        path: The file.
        amp: Mixed precision, see :func:`backbones.inference.exported_file.open_exported`.

    Attributes:
        summary: What a test prints of its model.
    """

    def __init__(self, path: str, amp: bool = False) -> None:
        super().__init__()
        self.exported = ExportedModel(path, amp=amp)
        runtime = 'OpenVINO' if path.endswith('.xml') else 'onnxruntime'
        self.summary = {
            'model': f'{self.exported.description.model}, exported',
            'weights': path,
            'device': f'{runtime}, mixed precision' if amp else runtime,
        }
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
        prepared = [self.exported.preprocess(image) for image in images]
        batches = groupby(prepared, key=lambda item: item['inputs'].shape)
        raws = (raw for _, batch in batches for raw in self.exported.predict(list(batch)))
        for raw, image in zip(raws, images, strict=True):
            yield self.exported.postprocess(raw, image.shape[:2])

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError('an exported file cannot be trained')


def use_exported(config: Config, path: str | Path, amp: bool = False) -> None:
    """Put a file in place of a config's model, and its resizing in place of the test pipeline's."""
    config.model = ConfigDict(type='ExportedFile', path=str(path), amp=amp)
    config.load_from, config.resume = None, False
    for dataset in datasets_of(config, ('test',)):
        dataset.pipeline = [
            step
            for step in dataset.get('pipeline') or ()
            if str(step.type).rpartition('.')[2].startswith(HARMLESS_TRANSFORMS)
        ]


def check_exported_test(config: Config) -> None:
    """Check the file of :func:`use_exported` and the data of a test, and fit the config to them.

    Raises:
        ExportError: The file cannot be run, or is a backbone.
        CheckpointError: It has other classes than the data.
        ConfigError: It is of another task, or gives no masks where the config measures them.
        DataError: The data have errors.
    """
    path = config.model.path
    about = ExportedModel(path, amp=config.model.amp).description
    task = TASKS[config.default_scope]
    if about.task != task:
        raise ConfigError(f'{path} was exported for {about.task}, the config is for {task}')
    classes = set_classes(config, ('test',), keep_files=True)
    check_classes(path, about.classes, classes)
    if 'masks' not in about.outputs and any(
        'segm' in (node.get('metric') or ()) for node in walk(config.test_evaluator)
    ):
        raise ConfigError(
            f'{path} gives no masks, which test_evaluator of the config measures: test it with the '
            'config that it was exported with, or --cfg-options test_evaluator.metric=bbox'
        )
    if (about.score_threshold or 0) > USUAL_SCORE_THRESHOLD:
        print(
            f'note: {path} leaves out detections with scores below {about.score_threshold:g}, '
            'which lowers AP',
            file=sys.stderr,
        )
    refuse_errors(config, ('test',))
    if (about.batch or 1) > 1:
        config.test_dataloader.batch_size = about.batch


def measure(config: Config, path: str | Path, title: str) -> dict[str, float]:
    """The metrics of a file, by a config that :func:`check_exported_test` was called with."""
    logger = MMLogger.get_current_instance()
    quiet(logger)
    model = ExportedFile(str(path))
    with prints_to(logger):
        loader = Runner.build_dataloader(config.test_dataloader)
        evaluator = Evaluator(config.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    progress = evaluation_of(loader, title)
    for batch in loader:
        evaluator.process(model.test_step(batch), batch)
        progress.step()
    progress.close()
    with prints_to(logger):
        return evaluator.evaluate(len(loader.dataset))
