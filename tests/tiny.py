"""The smallest models of the three tasks and of the light head, in which every part occurs."""

import atexit
import shutil
import subprocess
import sys
import tempfile
import textwrap
from functools import cache
from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

ROOT = Path(__file__).resolve().parents[1]

TINY_ARCH = dict(
    channels=(4, 8, 8, 16),
    depths=(1, 1, 2, 2),
    num_attention_blocks=1,
    mlp_ratios=((2,), (2,), (2, 2), (2, 2)),
    drop_path_rate=0.0,
)

# The demo's configs with a small network and heads as small.
TINY_CONFIGS = {
    'fpn': """\
        _base_ = '{root}/seg_configs/fpn_effv2_s0_shapes.py'
        classes = '{shapes}/classes.txt'
        data_root = '{shapes}/ade'
        train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False,
                                dataset=dict(data_root=data_root))
        val_dataloader = dict(num_workers=0, persistent_workers=False,
                              dataset=dict(data_root=data_root))
        model = dict(
            data_preprocessor=dict(size=(128, 128)),
            backbone=dict(arch={arch}),
            neck=dict(in_channels=[4, 8, 8, 16], out_channels=16),
            decode_head=dict(in_channels=[16] * 4, channels=16),
        )
        """,
    'retinanet': """\
        _base_ = '{retinanet}'
        model = dict(
            backbone=dict(arch={arch}),
            neck=dict(in_channels=[4, 8, 8, 16], out_channels=16),
            bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1),
        )
        """,
    'mask_rcnn': """\
        _base_ = '{mask_rcnn}'
        model = dict(
            backbone=dict(arch={arch}),
            neck=dict(in_channels=[4, 8, 8, 16], out_channels=16),
            rpn_head=dict(in_channels=16, feat_channels=16),
            roi_head=dict(
                bbox_roi_extractor=dict(out_channels=16),
                bbox_head=dict(in_channels=16, fc_out_channels=16),
                mask_roi_extractor=dict(out_channels=16),
                mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1),
            ),
        )
        """,
}
TINY_CONFIGS['ham'] = (
    TINY_CONFIGS['fpn']
    + """custom_imports = dict(imports=['backbones.light_ham'])
        model.update(neck=None, decode_head=dict(
            _delete_=True, type='FixedLightHamHead', in_channels=[8, 8, 16], in_index=[1, 2, 3],
            channels=16, ham_channels=16, ham_kwargs=dict(MD_R=4, eval_steps=2), num_classes=7,
            align_corners=False, norm_cfg=dict(type='SyncBN'),
            loss_decode=dict(type='CrossEntropyLoss')))
        """
)
TINY_DETECTION_DATA = """\
        data_root = '{shapes}/coco/'
        train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False,
                                dataset=dict(data_root=data_root))
        val_dataloader = dict(num_workers=0, persistent_workers=False,
                              dataset=dict(data_root=data_root))
        val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
        test_evaluator = val_evaluator
        """
TINY_RUN = """\
        test_dataloader = val_dataloader
        train_cfg = dict(max_iters=2, val_interval=2)
        param_scheduler = [dict(type='ConstantLR', factor=1, by_epoch=False)]
        default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
        """


def draw_shapes(out: Path, train: int = 8, val: int = 5, size: int = 128) -> Path:
    """Draw a tiny set of shapes, in COCO's layout (``coco``) and ADE20K's (``ade``)."""
    command = [sys.executable, ROOT / 'tools' / 'make_shapes.py', out]
    options = ['--train', train, '--val', val, '--size', f'{size}x{size}']
    subprocess.run([*command, *map(str, options)], check=True, capture_output=True)
    return out


def write_tiny_config(folder: Path, task: str, shapes: Path, extra: str = '') -> Path:
    """A config that trains a tiny model for two iterations; ``extra`` is put at its end."""
    data = '' if task in ('fpn', 'ham') else TINY_DETECTION_DATA
    text = ''.join(map(textwrap.dedent, (TINY_CONFIGS[task], data, TINY_RUN)))
    bases = {} if task in ('fpn', 'ham') else {task: without_bases(task)}
    arch = {'_delete_': True, **TINY_ARCH}
    text = text.format(root=ROOT, shapes=shapes, arch=arch, **bases)
    path = folder / f'tiny_{task}.py'
    path.write_text(text + textwrap.dedent(extra))
    return path


@cache
def without_bases(task: str) -> Path:
    """The demo's config of a detector in one file: mmengine needs a second to find mmdet's."""
    folder = Path(tempfile.mkdtemp(prefix='tiny_'))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = ROOT / 'det_configs' / f'{task}_effv2_s0_shapes.py'
    Config.fromfile(path, import_custom_modules=False).dump(folder / path.name)
    return folder / path.name


def with_random_weights(model: nn.Module) -> nn.Module:
    """Such that no layer scale is small, and no norm does nothing."""
    for name, parameter in model.named_parameters():
        if name.endswith('table'):
            nn.init.normal_(parameter)
        elif name.endswith('gamma') or parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.3, 1.0)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def assert_same(found, expected, tolerance: float = 1e-4) -> None:
    """Equal within a part of the largest value, through lists of lists."""
    if isinstance(expected, torch.Tensor):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        difference = (found - expected).abs().max()
        assert difference <= tolerance * expected.abs().max()
        return
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b, tolerance)
