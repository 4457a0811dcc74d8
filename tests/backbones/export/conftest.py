"""Tiny models whose random weights find something in a picture and nothing in a blank one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from tiny import write_tiny_config
from torch import nn

from backbones.data.classes import set_classes
from backbones.engine.config import fit_to_device, load_config
from backbones.export.export import Options, export
from backbones.inference.model import TorchModel

# What takes time is the number of operators.
FEWER_BLOCKS = """\
    model['backbone']['arch'].update(depths=(1, 1, 1, 1), mlp_ratios=((2,), (2,), (2,), (2,)))
    """


# One of each kind; every export is shared by the tests of this folder.
EXPORTS = {
    'fpn': ('fpn', 'fpn.onnx', dict(dynamic=True, batch=None)),
    'retinanet': ('retinanet', 'retinanet.onnx', dict(batch=2)),
    'mask_rcnn': ('mask_rcnn', 'mask_rcnn.onnx', dict(dynamic=True)),
    'openvino': ('fpn', 'fpn.xml', dict(size=(160, 160), logits=True)),
    'pt2': ('retinanet', 'retinanet.pt2', dict(size=(160, 160))),
    'core_ml': ('fpn', 'fpn.mlpackage', dict(size=(64, 64))),
}


@dataclass(frozen=True)
class TinyModel:
    """A config, a checkpoint, and the score that only boxes of a picture with contents reach."""

    config: str
    checkpoint: str
    cfg_options: dict


@dataclass
class Exported:
    """A file, the lines that were printed, and the model that it was made from."""

    path: Path
    lines: list[str]
    model: TorchModel


@pytest.fixture(scope='session')
def pictures(shapes: Path) -> list[np.ndarray]:
    """Three pictures of one size, BGR."""
    paths = sorted((shapes / 'ade' / 'images' / 'validation').iterdir())[:3]
    return [cv2.imread(str(path)) for path in paths]


@pytest.fixture(scope='session')
def tiny_model(
    tmp_path_factory: pytest.TempPathFactory, shapes: Path, pictures: list[np.ndarray]
) -> Callable[[str], TinyModel]:
    """Makes the model of a task, once."""
    made = {}

    def make(task: str) -> TinyModel:
        if task not in made:
            made[task] = make_tiny_model(tmp_path_factory.mktemp(task), task, shapes, pictures)
        return made[task]

    return make


def make_tiny_model(folder: Path, task: str, shapes: Path, pictures: list[np.ndarray]) -> TinyModel:
    config = write_tiny_config(folder, task, shapes, FEWER_BLOCKS)
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
    learn_statistics(model, pictures)
    checkpoint = folder / 'tiny.pth'
    meta = {'dataset_meta': {'classes': classes, 'palette': cfg.palette}}
    torch.save({'state_dict': model.state_dict(), 'meta': meta}, checkpoint)
    if task == 'fpn':
        return TinyModel(str(config), str(checkpoint), {})
    key = 'model.test_cfg.rcnn.score_thr' if task == 'mask_rcnn' else 'model.test_cfg.score_thr'
    unlimited = TorchModel(str(config), str(checkpoint), cfg_options={key: 0.0})
    blank = np.random.default_rng(0).normal(114, 8, pictures[0].shape).astype(np.uint8)
    sure = max(max(found.scores) for found in predictions(unlimited, pictures))
    unsure = max(predictions(unlimited, [blank])[0].scores)
    assert sure > unsure, 'the weights see more in a blank picture'
    return TinyModel(str(config), str(checkpoint), {key: float(sure + 3 * unsure) / 4})


def learn_statistics(model: nn.Module, pictures: list[np.ndarray]) -> None:
    """Let BatchNorm know the pictures, without which random features are all but constant."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    inputs = [torch.from_numpy(picture.transpose(2, 0, 1).copy()) for picture in pictures]
    model.train()
    with torch.no_grad():
        model.backbone(
            model.data_preprocessor({'inputs': inputs, 'data_samples': None}, False)['inputs']
        )


@pytest.fixture(scope='session')
def exported(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable,
    pictures: list[np.ndarray],
) -> Callable[[str], Exported]:
    """Makes an entry of EXPORTS, once."""
    made = {}
    folder = tmp_path_factory.mktemp('exported')
    picture = folder / 'picture.png'
    cv2.imwrite(str(picture), pictures[1])

    def make(kind: str) -> Exported:
        if kind not in made:
            task, name, options = EXPORTS[kind]
            tiny = tiny_model(task)
            lines = []
            export(
                tiny.config,
                tiny.checkpoint,
                folder / name,
                Options(**options, picture=str(picture)),
                tiny.cfg_options,
                report=lines.append,
            )
            model = TorchModel(tiny.config, tiny.checkpoint, cfg_options=tiny.cfg_options)
            made[kind] = Exported(folder / name, lines, model)
        return made[kind]

    return make


@pytest.fixture(scope='session')
def predict() -> Callable[..., list]:
    """What a TorchModel or an ExportedModel says: ``predict(model, pictures of one size)``."""
    return predictions


def predictions(model: object, pictures: list[np.ndarray]) -> list:
    """What a TorchModel or an ExportedModel says about pictures of one size."""
    raws = model.predict([model.preprocess(picture) for picture in pictures])
    return [model.postprocess(raw, p.shape[:2]) for raw, p in zip(raws, pictures, strict=True)]
