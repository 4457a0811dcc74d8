"""A config and a checkpoint, ready to predict."""

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config, ConfigDict
from torch import Tensor

from backbones.data.classes import class_list, set_classes, set_num_classes
from backbones.data.config_datasets import dataset_class, datasets_of, test_pipeline
from backbones.deploy import expect_contiguous, switch_to_deploy
from backbones.engine.amp import inference_precision
from backbones.engine.config import fit_to_device, load_config
from backbones.engine.preflight import build, load_whole
from backbones.errors import ConfigError, DataError
from backbones.weights import load_checkpoint

from .cuda_graphs import use_cuda_graphs
from .masks import crop_masks, fill_empty_boxes, keep_masks_small, paste_masks
from .results import NMS_THRESHOLD, Detections, Segmentation
from .seg_maps import Logits, keep_logits_small, predict_logits, seg_map_of

# Transforms that read files.
LOADING_STEPS = ('LoadImage', 'LoadAnnotations', 'LoadPanopticAnnotations', 'InferencerLoader')


class TorchModel:
    """A detector or segmentor of mmdet or mmseg, ready to predict; threads may share it."""

    # Whether a segmentor has :meth:`predict_logits`.
    gives_logits = True

    def __init__(
        self,
        config: str,
        checkpoint: str,
        device: str | None = None,
        amp: bool = False,
        deploy: bool = True,
        cfg_options: dict | None = None,
    ) -> None:
        self.device = choose_device(device)
        self.amp = amp
        # CUDA graphs, and mixed precision on a CPU, write to state that threads would share.
        takes_turns = amp or self.device.type == 'cuda'
        self._turn = threading.Lock() if takes_turns else nullcontext()
        cfg = load_config(config, cfg_options)
        expect_objects(cfg.model)
        loaded = load_checkpoint(checkpoint)
        self.classes, self.palette = classes_and_palette(cfg, loaded)
        set_num_classes(cfg, len(self.classes))
        fit_to_device(cfg)
        self.task = 'segmentation' if cfg.default_scope == 'mmseg' else 'detection'
        self.model = build_model(cfg, loaded, checkpoint).eval().to(self.device)
        expect_contiguous(self.model)
        if deploy:
            switch_to_deploy(self.model)
        if self.task == 'segmentation':
            keep_logits_small(self.model)
        else:
            keep_masks_small(self.model)
            settings = getattr(self.model, 'test_cfg', None) or {}
            nms = (settings.get('rcnn') or settings).get('nms') or {}
            self.nms_threshold = nms.get('iou_threshold', nms.get('iou_thr', NMS_THRESHOLD))
        if deploy and self.device.type == 'cuda':
            use_cuda_graphs(self.model)
        self.transform = Compose(transforms_of(cfg, config))
        self.as_float = any(step.get('to_float32') for step in test_pipeline(cfg))
        millions = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        self.about = {'model': f'{type(self.model).__name__}, {millions:.1f} M parameters'}

    def preprocess(self, image: np.ndarray) -> dict[str, Any]:
        """Resize an image, (height, width, 3), uint8, BGR, as the config's test pipeline does."""
        size = image.shape[:2]
        if self.as_float:
            image = image.astype(np.float32)
        # The keys that the libraries' own loading transforms would add.
        return self.transform(
            dict(img=image, img_id=0, img_path=None, img_shape=size, ori_shape=size)
        )

    @torch.inference_mode()
    def predict(self, batch: Sequence[dict[str, Any]]) -> list[Any]:
        """Run the network on preprocessed images, all of one size."""
        with self._running(batch) as (inputs, samples):
            if self.task == 'detection':
                return [
                    sample.pred_instances.to('cpu')
                    for sample in self.model.predict(inputs, samples, rescale=True)
                ]
            found = predict_logits(self.model, inputs, samples)
        return [seg_map_of(logits).cpu() for logits in found]

    @torch.inference_mode()
    def predict_logits(self, batch: Sequence[dict[str, Any]]) -> list[Logits]:
        """Return the logits of preprocessed images, all of one size, from a segmentor."""
        with self._running(batch) as (inputs, samples):
            return predict_logits(self.model, inputs, samples)

    @contextmanager
    def _running(self, batch: Sequence[dict[str, Any]]) -> Iterator[tuple[Tensor, list]]:
        """Yield the network's inputs and samples, within the precision that it runs in."""
        data = self.model.data_preprocessor(
            {key: [item[key] for item in batch] for key in ('inputs', 'data_samples')}, False
        )
        precision = inference_precision(self.model, self.device) if self.amp else nullcontext()
        with self._turn, precision:
            yield data['inputs'], data['data_samples']

    def postprocess(self, raw: Any, size: tuple[int, int]) -> Detections | Segmentation:
        """Convert an entry of what :meth:`predict` returns; ``size``: height, width."""
        if self.task == 'segmentation':
            dtype = np.uint8 if raw.dtype == torch.uint8 else np.uint16
            return Segmentation(raw.numpy().astype(dtype, copy=False))
        boxes = raw.bboxes.numpy().astype(np.float32)
        masks = raw.get('masks')
        # The type tells, not the size: an image can be as small as a head's 28x28 cells.
        if masks is not None and masks.is_floating_point():
            threshold = self.model.test_cfg['rcnn']['mask_thr_binary']
            masks = paste_masks(masks.float().numpy(), boxes, size, threshold)
        elif masks is not None:
            masks = crop_masks(masks.numpy())
            boxes = fill_empty_boxes(boxes, masks)
        return Detections(boxes, raw.scores.numpy().astype(np.float32), raw.labels.numpy(), masks)


def choose_device(name: str | None) -> torch.device:
    """Return the device of that name, or raise ConfigError; default: the first GPU, else CPU."""
    if name is None:
        return torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f'device {name!r} cannot be used here: {reason}') from error
    return device


def expect_objects(model: ConfigDict) -> None:
    """Raise ConfigError for a detector that predicts no objects from an image alone."""
    if 'language_model' in model:
        raise ConfigError(f'{model.type} needs a text with every image, which is not supported')
    if 'panoptic_fusion_head' in model and not (model.get('test_cfg') or {}).get('instance_on'):
        raise ConfigError(f'{model.type} predicts panoptic maps, not objects')


def classes_and_palette(config: Config, checkpoint: dict) -> tuple[tuple[str, ...], Any]:
    """Return class names and colors: the checkpoint's, else the config's, else its dataset's."""
    meta = checkpoint['meta'].get('dataset_meta') or {}
    if meta.get('classes'):
        return tuple(meta['classes']), meta.get('palette')
    datasets = list(datasets_of(config, ('test', 'val', 'train')))
    for dataset in datasets:
        named = dataset.get('metainfo') or {}
        if named.get('classes'):
            return class_list(named['classes']), named.get('palette')
    if datasets:
        known = dataset_class(datasets[0]).METAINFO
        try:
            return set_classes(config, ('test',)), config.get('palette') or known.get('palette')
        except DataError:
            if known.get('classes'):
                return tuple(known['classes']), known.get('palette')
    raise ConfigError(
        'neither the checkpoint nor the config says which classes the model has: add '
        "classes = ['...'] to the config"
    )


def build_model(config: Config, checkpoint: dict, source: str) -> torch.nn.Module:
    """Build the model of a config with the weights of a checkpoint."""
    for part in (config.model, config.model.get('backbone', {})):
        part.pop('init_cfg', None)
        part.pop('pretrained', None)
    with warnings.catch_warnings():
        # This warning of mmseg's is about a loss.
        warnings.filterwarnings('ignore', 'Default ``avg_non_ignore``', UserWarning)
        model = build(config.model)
    load_whole(model, checkpoint, source)
    return model


def transforms_of(config: Config, path: str) -> list[ConfigDict]:
    """Return the test pipeline without transforms that read files: images come as arrays."""
    pipeline = test_pipeline(config)
    if not pipeline:
        raise ConfigError(f'{path} has no test_dataloader, so how to resize images is unknown')
    steps = [step for step in pipeline if not any(n in str(step.type) for n in LOADING_STEPS)]
    for step in steps:
        step.setdefault('_scope_', config.default_scope)
    return steps
