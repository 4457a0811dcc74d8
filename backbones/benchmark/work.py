"""The work that is measured, as functions without arguments."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import Tensor, nn

from backbones.deploy import expect_contiguous, replace_roi_align, switch_to_deploy
from backbones.engine.amp import features_in_bfloat16, inference_precision
from backbones.export.check import make_sample, photograph
from backbones.export.exportable import exportable, is_segmentor
from backbones.inference.cuda_graphs import Recorded, use_cuda_graphs
from backbones.inference.exported_file import RUNNABLE
from backbones.inference.masks import keep_masks_small
from backbones.inference.seg_maps import keep_logits_small, predict_logits, seg_map_of

from .candidates import Candidate

PARTS = ('backbone', 'model')
SUFFIXES = {'onnxruntime': '.onnx', 'openvino': '.xml'}
BACKENDS = ('torch', 'compile', *SUFFIXES)
# Without RoI heads, since the number of regions differs between images.
COMPILED = ('backbone', 'neck', 'decode_head', 'rpn_head', 'bbox_head')
NUM_OBJECTS = 8


@dataclass(frozen=True)
class Setting:
    """The setting at which models are compared with each other."""

    part: str = 'model'  # 'backbone', or 'model' for the whole model with post-processing
    step: str = 'predict'  # or 'train': forward and backward pass and the optimizer's step
    backend: str = 'torch'  # one of BACKENDS
    # (height, width) of the images; None: (512, 512) in mmseg, (800, 1333) in mmdet
    size: tuple[int, int] | None = None
    batch: int = 1  # images at once
    deploy: bool = True  # fold the networks for inference, also the peers'
    amp: bool = False  # mixed precision, as in infer.py and train.py
    device: str = 'cpu'  # or for example 'cuda:0'
    threads: int = 1  # on the CPU


def make_runner(
    model: nn.Module | None, setting: Setting, file: Path | None = None
) -> Callable[[], Any]:
    """Return a function that does the work once, with a model (modified) or an exported file."""
    if file is not None:
        return file_runner(file, setting)
    model = expect_contiguous(model.to(setting.device))
    if setting.step == 'train':
        replace_roi_align(model)
        return train_runner(model, setting)
    if setting.deploy:
        model = switch_to_deploy(model)
        if not hasattr(model.backbone, 'switch_to_deploy'):
            # On a CPU this makes ResNets and MobileNets faster by half; ours uses it by itself.
            model.backbone.to(memory_format=torch.channels_last)
    if setting.backend != 'compile':
        return predict_runner(model, setting)
    model.requires_grad_(False)
    for name in COMPILED if setting.part == 'model' else COMPILED[:1]:
        module = getattr(model, name, None)
        if module is not None:
            module.forward = torch.compile(module.forward, dynamic=False)
    from torch._inductor import config

    run = predict_runner(model, setting)
    # As an option of torch.compile it has no effect, since tracing, which comes first, ignores it.
    with config.patch(freezing=True):
        run()
    return run


def predict_runner(model: nn.Module, setting: Setting) -> Callable[[], Any]:
    """Return a function that computes feature maps, or predictions as infer.py does."""
    context = partial(precision, model, setting) if setting.amp else nullcontext
    on_gpu = setting.device.startswith('cuda')
    uses_graphs = on_gpu and setting.deploy and setting.backend == 'torch'
    if setting.part == 'backbone':
        # Only the backbone is referenced, so that the memory is only the backbone's.
        backbone = Recorded(model.backbone) if uses_graphs else model.backbone
        run = partial(backbone, make_batch(model, setting)[0])
    else:
        (keep_logits_small if is_segmentor(model) else keep_masks_small)(model)
        if uses_graphs:
            use_cuda_graphs(model)
        predict = partial(predict_seg_maps, model) if is_segmentor(model) else model.predict
        images = make_images(model, setting)
        run = lambda: predict(*preprocess(model, images))  # noqa: E731

    @torch.inference_mode()
    def runner() -> Any:
        with context():
            return run()

    return runner


def predict_seg_maps(model: nn.Module, inputs: Tensor, samples: list) -> list[Tensor]:
    return [seg_map_of(logits) for logits in predict_logits(model, inputs, samples)]


def precision(model: nn.Module, setting: Setting) -> AbstractContextManager[None]:
    """Return a context of mixed precision as in infer.py and train.py."""
    kind = torch.device(setting.device).type
    if setting.part == 'backbone':
        return torch.autocast(kind, torch.bfloat16 if kind == 'cpu' else torch.float16)
    if setting.step == 'train' and kind == 'cpu':
        return features_in_bfloat16(model)
    return inference_precision(model, setting.device)


def make_images(model: nn.Module, setting: Setting) -> dict[str, list]:
    """Return copies of a photograph and their samples, as input of the data preprocessor."""
    image = torch.from_numpy(make_image(setting.size).transpose(2, 0, 1).copy())
    return dict(
        inputs=[image.to(model.data_preprocessor.device)] * setting.batch,
        data_samples=[make_sample(model, setting.size) for _ in range(setting.batch)],
    )


def preprocess(model: nn.Module, images: dict[str, list]) -> tuple[Tensor, list]:
    data = model.data_preprocessor(images, False)
    return data['inputs'], data['data_samples']


def make_batch(model: nn.Module, setting: Setting) -> tuple[Tensor, list]:
    return preprocess(model, make_images(model, setting))


def make_image(size: tuple[int, int]) -> np.ndarray:
    """Return a photograph (height, width, 3), uint8, BGR."""
    return cv2.resize(photograph(), size[::-1], interpolation=cv2.INTER_AREA)


def train_runner(model: nn.Module, setting: Setting) -> Callable[[], Any]:
    """Return a function that trains for one step, with learning rate 0 so it can be repeated."""
    inputs, samples = make_batch(model, setting)
    trained = model.backbone if setting.part == 'backbone' else model
    model.train()
    if trained is model:
        for sample in samples:
            add_ground_truth(model, sample, tuple(inputs.shape[2:]))
        samples = [sample.to(inputs.device) for sample in samples]
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.0)
    # float16 needs loss scaling; bfloat16, used on a CPU, does not.
    scales = setting.amp and setting.device != 'cpu'
    wrapper = AmpOptimWrapper(optimizer=optimizer) if scales else OptimWrapper(optimizer)

    def run() -> Tensor:
        with precision(trained, setting) if setting.amp else nullcontext():
            if setting.part == 'backbone':
                loss = sum(features.float().mean() for features in trained(inputs))
            else:
                loss = trained.parse_losses(trained.loss(inputs, samples))[0]
        wrapper.update_params(loss)
        return loss.detach()

    return run


def add_ground_truth(model: nn.Module, sample: BaseDataElement, size: tuple[int, int]) -> None:
    """Add a segmentation map of blocks, or eight objects with boxes and masks, to a sample."""
    rng = np.random.default_rng(0)
    height, width = size
    if is_segmentor(model):
        shape = (-(-height // 32), -(-width // 32))
        blocks = rng.integers(0, model.decode_head.num_classes, shape)
        labels = np.kron(blocks, np.ones((32, 32), np.int64))[:height, :width]
        sample.gt_sem_seg = PixelData(data=torch.from_numpy(labels)[None])
        return
    from mmdet.structures.mask import BitmapMasks

    corner = rng.uniform(0, 0.5, (NUM_OBJECTS, 2))
    corners = np.concatenate([corner, corner + rng.uniform(0.1, 0.5, corner.shape)], axis=1)
    boxes = corners * [width, height, width, height]
    masks = np.zeros((NUM_OBJECTS, height, width), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int), strict=True):
        mask[top : bottom + 1, left : right + 1] = 1
    sample.gt_instances = InstanceData(
        bboxes=torch.from_numpy(boxes).float(),
        labels=torch.zeros(NUM_OBJECTS, dtype=torch.long),
        masks=BitmapMasks(masks, height, width),
    )
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))


def export_model(candidate: Candidate, model: nn.Module, setting: Setting, path: Path) -> None:
    """Export a model for one size and batch, in the format of a path's suffix."""
    from backbones.export.export import Options, describe
    from backbones.export.formats import check_packages, write

    check_packages(path.suffix)
    is_backbone = setting.part == 'backbone'
    options = Options(
        # By itself, the backbone gets the size after the preprocessor's padding in every backend.
        size=tuple(make_batch(model, setting)[0].shape[2:]) if is_backbone else setting.size,
        batch=setting.batch,
        backbone_only=is_backbone,
        deploy=setting.deploy,
    )
    description = describe(candidate.load(), model, options, candidate.name, (), None)
    open_sizes = path.suffix in RUNNABLE
    traceable = model.backbone if is_backbone else exportable(model, open_sizes=open_sizes)
    write(switch_to_deploy(traceable) if setting.deploy else traceable, path, description)


def file_runner(path: Path, setting: Setting) -> Callable[[], Any]:
    """Return a function that runs an exported file on a photograph."""
    from backbones.inference.exported_file import open_exported

    runner = open_exported(path, setting.device, setting.threads, setting.amp)
    description = runner.description
    image = make_image(description.size).astype(np.float32)
    if setting.part == 'backbone':
        image = (image[:, :, ::-1] - description.mean) / description.std
    inputs = np.stack([image.transpose(2, 0, 1)] * setting.batch).astype(np.float32)
    return partial(runner, np.ascontiguousarray(inputs))
