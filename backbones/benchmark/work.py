"""One thing to measure, and how to make a function of it."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import Tensor, nn

from backbones.deploy import switch_to_deploy
from backbones.engine.amp import features_in_bfloat16, inference_precision
from backbones.export.example_picture import example_picture
from backbones.export.exportable import is_segmentor
from backbones.inference.masks import keep_masks_small
from backbones.inference.seg_maps import keep_logits_small, predict_seg_maps

PARTS = ('backbone', 'model')
BACKENDS = ('torch', 'compile', 'onnxruntime', 'openvino')
# Not heads of regions, whose number differs from picture to picture.
COMPILED = ('backbone', 'neck', 'decode_head', 'rpn_head', 'bbox_head')


@dataclass(frozen=True)
class Setting:
    """What all models that are compared with each other have in common.

    Attributes:
        part: 'backbone', or 'model' for all of it, post-processing included.
        step: 'predict', or 'train' for forward and backward pass and the optimizer's step.
        backend: One of ``BACKENDS``.
        size: Height and width of the pictures.
        batch: Pictures at once.
        deploy: Fold the networks for inference.
        amp: Mixed precision.
        device: For instance 'cuda:0'.
        threads: Of the processor.
    """

    part: str
    step: str
    backend: str
    size: tuple[int, int]
    batch: int
    deploy: bool
    amp: bool
    device: str
    threads: int

    def described(self) -> dict[str, Any]:
        """The entries that differ within a run."""
        names = ('part', 'step', 'backend', 'size', 'batch')
        return {name: value for name, value in asdict(self).items() if name in names}


@dataclass
class Ready:
    """A function that does the work once.

    Attributes:
        run: Does it; what it returns is on the device.
        setup_seconds: What compiling or exporting took; None where there was none.
    """

    run: Callable[[], Any]
    setup_seconds: float | None = None


def prepare(model: nn.Module, setting: Setting) -> Ready:
    """Make a model ready to be run in torch.

    Args:
        model: What :meth:`.candidates.Candidate.build` returns; changed in place.
        setting: What is to be done with it.
    """
    model = model.to(setting.device)
    if setting.deploy and setting.step == 'predict':
        model = switch_to_deploy(model)
        if setting.device == 'cpu' and not hasattr(model.backbone, 'switch_to_deploy'):
            # It makes a CPU's ResNets and MobileNets faster by half; our backbone does so itself.
            model.backbone.to(memory_format=torch.channels_last)
    if setting.step == 'train':
        return Ready(train_step(model, setting))
    if setting.backend == 'compile':
        return compiled(model, setting)
    return Ready(predict_step(model, setting))


def make_pictures(model: nn.Module, setting: Setting) -> dict[str, list]:
    """Copies of a photograph on the model's device, and the samples of mmdet or mmseg that go with
    them: what a model's data preprocessor takes."""
    if is_segmentor(model):
        from mmseg.structures import SegDataSample as Sample
    else:
        from mmdet.structures import DetDataSample as Sample
    meta = dict(img_shape=setting.size, ori_shape=setting.size, scale_factor=(1.0, 1.0))
    picture = torch.from_numpy(photograph(setting.size).transpose(2, 0, 1).copy())
    return dict(
        inputs=[picture.to(model.data_preprocessor.device)] * setting.batch,
        data_samples=[Sample(metainfo=meta) for _ in range(setting.batch)],
    )


def make_batch(model: nn.Module, setting: Setting) -> tuple[Tensor, list]:
    """The same pictures, preprocessed."""
    data = model.data_preprocessor(make_pictures(model, setting), False)
    return data['inputs'], data['data_samples']


def photograph(size: tuple[int, int]) -> np.ndarray:
    """A picture of that height and width, (height, width, 3), uint8, BGR."""
    return cv2.resize(example_picture(), size[::-1], interpolation=cv2.INTER_AREA)


def predict_step(model: nn.Module, setting: Setting) -> Callable[[], Any]:
    """A function that makes feature maps, or predictions."""
    if setting.part == 'backbone':
        inputs, _ = make_batch(model, setting)
        # The rest of the model is not kept, so that memory is the backbone's.
        run = torch.inference_mode()(partial(model.backbone, inputs))
    else:
        keep_logits_small(model)
        keep_masks_small(model)
        run = partial(predict, model, make_pictures(model, setting))
    return partial(run_in, partial(precision, model, setting), run) if setting.amp else run


def precision(model: nn.Module, setting: Setting) -> AbstractContextManager[None]:
    """Mixed precision as infer.py and train.py have it."""
    kind = torch.device(setting.device).type
    if setting.part == 'backbone':
        return torch.autocast(kind, torch.bfloat16 if kind == 'cpu' else torch.float16)
    if setting.step == 'train' and kind == 'cpu':
        return features_in_bfloat16(model)
    return inference_precision(model, setting.device)


def run_in(context: Callable[[], AbstractContextManager[None]], run: Callable[[], Any]) -> Any:
    """Run within a context."""
    with context():
        return run()


@torch.inference_mode()
def predict(model: nn.Module, pictures: dict[str, list]) -> list:
    """What infer.py has a model do, and what an exported file does: from pixels to label maps, or
    to instances with mask probabilities inside their boxes."""
    data = model.data_preprocessor(pictures, False)
    inputs, samples = data['inputs'], data['data_samples']
    if not is_segmentor(model):
        return [sample.pred_instances for sample in model.predict(inputs, samples)]
    return predict_seg_maps(model, inputs, samples)


def compiled(model: nn.Module, setting: Setting) -> Ready:
    """The same, after torch.compile of backbone, neck and dense heads, weights frozen into the
    code."""
    from torch._inductor import config

    model.requires_grad_(False)
    for name in COMPILED if setting.part == 'model' else COMPILED[:1]:
        module = getattr(model, name, None)
        if module is not None:
            module.forward = torch.compile(module.forward, dynamic=False)
    run = predict_step(model, setting)
    start = time.perf_counter()
    # As an option of torch.compile it has no effect: tracing, which comes first, does not see it.
    with config.patch(freezing=True):
        run()
    return Ready(run, time.perf_counter() - start)


def train_step(model: nn.Module, setting: Setting) -> Callable[[], Any]:
    """A function that trains for a step, with a learning rate of 0 so that it can be repeated."""
    from .targets import add_targets

    inputs, samples = make_batch(model, setting)
    model.train()
    if setting.part == 'backbone':
        trained, loss_of = model.backbone, mean_loss
    else:
        add_targets(model, samples, tuple(inputs.shape[2:]), inputs.device)
        trained, loss_of = model, partial(task_loss, samples=samples)
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.0)
    # float16 needs its losses scaled; bfloat16, on a CPU, does not.
    scales = setting.amp and setting.device != 'cpu'
    wrapper = AmpOptimWrapper(optimizer=optimizer) if scales else OptimWrapper(optimizer)

    def run() -> Tensor:
        with precision(trained, setting) if setting.amp else nullcontext():
            loss = loss_of(trained, inputs)
        wrapper.update_params(loss)
        return loss.detach()

    return run


def mean_loss(backbone: nn.Module, inputs: Tensor) -> Tensor:
    """A loss that reaches all of a backbone."""
    return sum(features.float().mean() for features in backbone(inputs))


def task_loss(model: nn.Module, inputs: Tensor, samples: list) -> Tensor:
    """What mmdet or mmseg minimises."""
    return model.parse_losses(model.loss(inputs, samples))[0]
