"""Tiny models whose random weights find something in an image and nothing in a blank one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from exporting import FEWER_BLOCKS
from mmengine.registry import MODELS
from tiny import write_tiny_config
from tool_process import Started
from torch import nn

from backbones.data.classes import set_classes
from backbones.engine.config import fit_to_device, load_config
from backbones.export.export import Options, export
from backbones.export.formats import onnx_to_openvino
from backbones.inference.exported_file import open_exported
from backbones.inference.model import TorchModel

# Objects larger than 224 pixels, whose features come from the upper levels of the pyramid.
LARGE = {'test_dataloader.dataset.pipeline.1.scale': (512, 512)}
# The authors' segmentors, whose biases fit multiples of 32 only.
MULTIPLES = """
model['backbone'].update(bias_resize='matrix', pretrain_img_size=128)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(300, 100), keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.0),
    dict(type='PackSegInputs'),
]
val_dataloader['dataset']['pipeline'] = test_pipeline
test_dataloader = val_dataloader
"""

# One of each kind, made once for all tests of this folder.
EXPORTS = {
    'fpn': ('fpn', 'fpn.onnx', dict(dynamic=True, batch=None)),
    'retinanet': ('retinanet', 'retinanet.onnx', dict(size=(131, 135), batch=2)),
    'mask_rcnn': ('mask_rcnn', 'mask_rcnn.onnx', dict(size=(512, 512))),
    'mask_rcnn_open': ('mask_rcnn', 'mask_rcnn_open.onnx', dict(dynamic=True)),
    'logits': ('fpn', 'logits.xml', dict(size=(160, 160), logits=True, batch=2)),
    'single': ('retinanet', 'single.onnx', dict()),
    'fixed': ('fpn', 'fixed.onnx', dict()),
    'core_ml': ('fpn', 'fpn.mlpackage', dict(size=(64, 64))),
    'ham': ('ham', 'ham.onnx', dict(dynamic=True, batch=None)),
    'ham_fixed': ('ham', 'ham.xml', dict(size=(128, 160))),
    'multiples': ('multiples', 'multiples.onnx', dict(dynamic=True)),
}
# Its size is not a multiple of 32, to which the model pads: a file with other padding differs.
CFG_OPTIONS = {'retinanet': {'model.data_preprocessor.pad_value': 2}}
# Detectors need no mmseg, segmentors no mmdet: these are exported where it cannot be imported.
UNWANTED = {'single': 'mmseg', 'fixed': 'mmdet'}
EXPORT_ALONE = """
import sys
for name in [*sys.modules, {unwanted!r}]:
    if name.partition('.')[0] == {unwanted!r}:
        sys.modules[name] = None
from backbones.export.export import Options, export
export(*{arguments!r}, Options(**{options!r}), {cfg_options!r})
"""


@dataclass(frozen=True)
class TinyModel:
    """A config, a checkpoint, and options with a score threshold that only objects reach."""

    config: str
    checkpoint: str
    cfg_options: dict


@dataclass
class Exported:
    """A file, the lines that were printed, and the model that it was made from."""

    path: Path
    lines: list[str]
    tiny: TinyModel
    model: TorchModel


@pytest.fixture(scope='session')
def images(shapes: Path) -> list[np.ndarray]:
    """Three images of one size, BGR."""
    paths = sorted((shapes / 'ade' / 'images' / 'validation').iterdir())[:3]
    return [cv2.imread(str(path)) for path in paths]


@pytest.fixture(scope='session')
def tiny_model(
    tmp_path_factory: pytest.TempPathFactory, shapes: Path, images: list[np.ndarray]
) -> Callable[[str], TinyModel]:
    """Makes the model of a task, once."""
    made = {}

    def make(task: str) -> TinyModel:
        if task not in made:
            made[task] = make_tiny_model(tmp_path_factory.mktemp(task), task, shapes, images)
        return made[task]

    return make


def make_tiny_model(folder: Path, task: str, shapes: Path, images: list[np.ndarray]) -> TinyModel:
    is_segmentor = task in ('fpn', 'ham', 'multiples')
    extra = FEWER_BLOCKS + (MULTIPLES if task == 'multiples' else '')
    config = write_tiny_config(folder, 'fpn' if task == 'multiples' else task, shapes, extra)
    cfg = load_config(str(config))
    fit_to_device(cfg)
    classes = set_classes(cfg, ('test',))
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for name, module in model.named_modules():
        # So that scores differ from place to place and from class to class.
        if hasattr(module, 'weight') and name.endswith(('_cls', '_reg', 'conv_logits')):
            nn.init.normal_(module.weight, std=0.1)
    learn_statistics(model, images)
    checkpoint = folder / 'tiny.pth'
    meta = {'dataset_meta': {'classes': classes, 'palette': cfg.palette}}
    torch.save({'state_dict': model.state_dict(), 'meta': meta}, checkpoint)
    if is_segmentor:
        return TinyModel(str(config), str(checkpoint), {})
    key, size = 'model.test_cfg.score_thr', {}
    if task == 'mask_rcnn':
        key, size = 'model.test_cfg.rcnn.score_thr', LARGE
    unlimited = TorchModel(str(config), str(checkpoint), cfg_options={key: 0.0} | size)
    blank = np.random.default_rng(0).normal(114, 8, images[0].shape).astype(np.uint8)
    of_images = max(max(found.scores) for found in predictions(unlimited, images))
    of_blank = max(predictions(unlimited, [blank])[0].scores)
    assert of_images > of_blank, 'the weights find more in a blank image'
    threshold = float(of_images + 3 * of_blank) / 4
    return TinyModel(str(config), str(checkpoint), {key: threshold} | size)


def learn_statistics(model: nn.Module, images: list[np.ndarray]) -> None:
    """Give BatchNorm the statistics of the images, without which random features are constant."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    inputs = [torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in images]
    model.train()
    with torch.no_grad():
        model.backbone(
            model.data_preprocessor({'inputs': inputs, 'data_samples': None}, False)['inputs']
        )


@pytest.fixture(scope='session')
def exported(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable,
    images: list[np.ndarray],
) -> Callable[[str], Exported]:
    """Makes an entry of EXPORTS, once; with ``_xml`` behind its name, in OpenVINO's format."""
    made = {}
    folder = tmp_path_factory.mktemp('exported')
    image = folder / 'image.png'
    # Neither square nor of a size that a file of a fixed size takes without padding.
    cv2.imwrite(str(image), images[1][:100])

    def make(kind: str) -> Exported:
        if kind not in made and kind.endswith('_xml'):
            onnx = make(kind.removesuffix('_xml'))
            path = onnx.path.with_suffix('.xml')
            onnx_to_openvino(onnx.path, path, open_exported(onnx.path, 'cpu').description)
            made[kind] = Exported(path, [], onnx.tiny, onnx.model)
        elif kind not in made:
            task, name, options = EXPORTS[kind]
            tiny = tiny_model(task)
            tiny = replace(tiny, cfg_options=tiny.cfg_options | CFG_OPTIONS.get(kind, {}))
            arguments = (tiny.config, tiny.checkpoint, str(folder / name))
            options = options | {'image': str(image)}
            lines = []
            if kind in UNWANTED:
                script = folder / f'export_{kind}.py'
                script.write_text(
                    EXPORT_ALONE.format(
                        unwanted=UNWANTED[kind],
                        arguments=arguments,
                        options=options,
                        cfg_options=tiny.cfg_options,
                    )
                )
                ended = Started(folder, [script]).wait()
                assert ended.returncode == 0, ended.stderr[-1500:]
                lines = ended.stdout.splitlines()
            else:
                export(*arguments, Options(**options), tiny.cfg_options, lines.append)
            model = TorchModel(
                tiny.config, tiny.checkpoint, deploy=False, cfg_options=tiny.cfg_options
            )
            made[kind] = Exported(folder / name, lines, tiny, model)
        return made[kind]

    return make


@pytest.fixture(scope='session')
def predict() -> Callable[..., list]:
    """Predictions of a TorchModel or an ExportedModel: ``predict(model, images of one size)``."""
    return predictions


def predictions(model: object, images: list[np.ndarray]) -> list:
    """Predictions of a TorchModel or an ExportedModel for images of one size."""
    raws = model.predict([model.preprocess(image) for image in images])
    return [model.postprocess(raw, i.shape[:2]) for raw, i in zip(raws, images, strict=True)]
