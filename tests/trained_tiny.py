"""Checkpoints of the tiny models, as a training leaves them, without the training."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from mmengine.registry import MODELS
from tiny import write_tiny_config

from backbones.data.classes import set_classes
from backbones.engine.config import fit_to_device, load_config

# What keeps scores between 0 and 1, and boxes from covering everything.
HEAD_GAIN = {'fpn': 1.0, 'ham': 1.0, 'retinanet': 0.35, 'mask_rcnn': 0.35}
SCORES = {
    'retinanet': "model['test_cfg'] = dict(score_thr=0.0, max_per_img=10)\n",
    'mask_rcnn': "model['test_cfg'] = dict(rcnn=dict(score_thr=0.0, max_per_img=10))\n",
    'fpn': '',
    'ham': '',
}


def write_trained(folder: Path, task: str, shapes: Path, extra: str = '') -> tuple[Path, Path]:
    """The config that a training would save, and a checkpoint with the shapes' class names.

    The weights are random but lively: predictions differ from place to place.
    """
    return tuple(Path(shutil.copy(path, folder)) for path in make_trained(task, shapes, extra))


@cache
def make_trained(task: str, shapes: Path, extra: str) -> tuple[Path, Path]:
    """What :func:`write_trained` copies: making a model takes seconds."""
    folder = Path(tempfile.mkdtemp(prefix='trained_'))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config_path = write_tiny_config(folder, task, shapes, extra)
    with config_path.open('a') as file:
        file.write(SCORES[task])
    config = load_config(str(config_path))
    classes = set_classes(config, ('test',))
    fit_to_device(config)
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
            if not name.startswith('backbone'):
                module.weight.data *= HEAD_GAIN[task]
    # For BatchNorm's statistics, without which numbers would explode.
    images = torch.nn.functional.interpolate(torch.randn(8, 3, 16, 16), 128, mode='bilinear')
    with torch.no_grad():
        for _ in range(20):
            features = model.train().extract_feat(images)
            if task in ('fpn', 'ham'):
                model.decode_head(features)
        if task in ('fpn', 'ham'):
            # No class wins everywhere.
            logits = model.eval().decode_head(model.extract_feat(images))
            model.decode_head.conv_seg.bias -= logits.mean(dim=(0, 2, 3))
    palette = [list(colour) for colour in config.palette] if 'palette' in config else None
    meta = {'dataset_meta': {'classes': classes, 'palette': palette}}
    checkpoint = folder / f'{task}.pth'
    torch.save({'state_dict': model.state_dict(), 'meta': meta}, checkpoint)
    saved = folder / f'saved_{task}.py'
    config.dump(saved)
    return saved, checkpoint
