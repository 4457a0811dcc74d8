"""What a model says in PyTorch, by mmdet's and mmseg's own functions."""

import copy

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import nn

from backbones.deploy import expect_contiguous
from backbones.inference.masks import keep_masks_small

from .agreement import Results
from .description import Description
from .exportable import is_segmentor


class Reference:
    """A model as mmdet and mmseg run it, with the inputs and outputs of an exported file.

    Args:
        model: In evaluation mode, on the CPU.
        description: Of the file.
    """

    def __init__(self, model: nn.Module, description: Description) -> None:
        self.description = description
        self.model = expect_contiguous(copy.deepcopy(model))
        if not is_segmentor(model):
            keep_masks_small(self.model)

    @torch.inference_mode()
    def __call__(self, inputs: np.ndarray) -> list[Results]:
        """The results for each of the pictures (batch, 3, height, width)."""
        samples = [self._sample(inputs.shape[2:]) for _ in inputs]
        data = {'inputs': list(torch.from_numpy(inputs)), 'data_samples': samples}
        data = self.model.data_preprocessor(data, False)
        if self.description.task == 'backbone':
            maps = [batch.numpy() for batch in self.model.backbone(data['inputs'])]
            names = self.description.outputs
            return [dict(zip(names, each, strict=True)) for each in zip(*maps, strict=True)]
        if self.description.task == 'segmentation':
            predicted = self.model.predict(data['inputs'], data['data_samples'])
            return [self._segmentation(sample) for sample in predicted]
        predicted = self.model.predict(data['inputs'], data['data_samples'], rescale=False)
        return [self._detections(sample.pred_instances) for sample in predicted]

    def _sample(self, size: tuple[int, int]) -> BaseDataElement:
        meta = dict(img_shape=tuple(size), ori_shape=tuple(size), scale_factor=(1.0, 1.0))
        if is_segmentor(self.model):
            from mmseg.structures import SegDataSample

            return SegDataSample(metainfo=meta)
        from mmdet.structures import DetDataSample

        return DetDataSample(metainfo=meta)

    def _segmentation(self, sample: BaseDataElement) -> Results:
        if self.description.logits:
            return {'logits': sample.seg_logits.data.numpy()}
        return {'label_map': sample.pred_sem_seg.data[0].numpy().astype(np.int32)}

    def _detections(self, instances: BaseDataElement) -> Results:
        names = {'boxes': 'bboxes', 'scores': 'scores', 'labels': 'labels', 'masks': 'masks'}
        return {name: instances[names[name]].numpy() for name in self.description.outputs}
