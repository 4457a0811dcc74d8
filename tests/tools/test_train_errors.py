"""Faulty configs and data end a training before it starts, with one message and no traceback.

tests/backbones/data has the faults that the checks find; here is one of each kind.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TRAIN = 'coco/annotations/instances_train2017.json'
VAL = 'coco/annotations/instances_val2017.json'


@pytest.fixture
def refused(call_tool, tmp_path, monkeypatch) -> Callable[..., str]:
    """Runs a tool in this process, in an empty folder; returns the message that it ends with."""

    def run(*arguments: object, tool: str = 'train.py', code: int = 1) -> str:
        monkeypatch.chdir(tmp_path)
        ended, said = call_tool(tool, *arguments)
        assert ended == code
        assert not (tmp_path / 'run').exists(), 'nothing was started'
        return said

    return run


def set_label(data: Path, label: int) -> None:
    path = min((data / 'ade' / 'annotations' / 'training').glob('*.png'))
    labels = np.array(Image.open(path))
    labels[:9, :9] = label
    Image.fromarray(labels).save(path)


# Task, what is done to the data, what is added to the config, and what the message has to name.
CASES = {
    'annotation file empty': ('retinanet', lambda d: (d / TRAIN).write_text(''), '', TRAIN),
    'images missing': (
        'retinanet', lambda d: (d / 'coco/train2017/train_000001.jpg').unlink(), '',
        'train_000001.jpg'),
    'head with another number of classes': (
        'retinanet', lambda d: None, "model['bbox_head']['num_classes'] = 5", 'num_classes=5'),
    'label of no class': ('fpn', lambda d: set_label(d, 9), '', '9'),
    'unknown scope': ('fpn', lambda d: None, "default_scope = 'mmpose'", 'mmpose'),
    'unknown dataset type': (
        'fpn', lambda d: None, "train_dataloader['dataset']['type'] = 'NoSuchSet'", 'NoSuchSet'),
    'config that is not Python': ('fpn', lambda d: None, 'model = dict(', 'cannot be read'),
}  # fmt: skip


@pytest.mark.parametrize('case', CASES)
def test_the_message_names_what_is_wrong(case, data, tiny_config, refused):
    task, corrupt, extra, message = CASES[case]
    corrupt(data)
    assert message in refused(tiny_config(task, extra, shapes=data), '--work-dir', 'run')


@pytest.mark.parametrize(
    ('extra', 'message'),
    [
        ("model['backbone']['pretrained'] = 'open-mmlab://resnet50_v1c'", 'pretrained'),
        ("model['backbone'] = dict(arch='s3')", 's3'),
        ("model['decode_head']['type'] = 'NoSuchHead'", 'NoSuchHead'),
        ("model['decode_head']['loss_decode'] = dict(class_weight=[1.0, 2.0])", 'class_weight of'),
        ("visualizer = dict(name='mine', vis_backends=[dict(type='WandbVisBackend')])", 'wandb'),
    ],
)
def test_what_cannot_be_built_is_named(
    extra, message, tiny_config, call_tool, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    monkeypatch.chdir(tmp_path)
    code, said = call_tool('train.py', tiny_config('fpn', extra), '--work-dir', 'run')
    assert code == 1 and message in said.rpartition('error: ')[2]


INIT_CFG = "model.backbone.init_cfg=dict(type='Pretrained',checkpoint='a')"


@pytest.mark.parametrize(
    ('arguments', 'message', 'code'),
    [
        (['nowhere.py'], 'nowhere.py', 1),
        (['{config}', '--resume', 'nowhere.pth'], 'nowhere.pth', 1),
        (['{config}', '--auto-scale-lr', '--cfg-options', 'auto_scale_lr=None'], 'base_batch', 1),
        (['{config}', '--cfg-options', INIT_CFG], 'one by one', 2),
        (['--cfg-options', 'a=1', '{config}'], 'KEY=VALUE', 2),
        (['{config}', '--cfg-options', 'a', '=', '1'], 'KEY=VALUE', 2),
        (['{config}', '--seed', '-1'], 'from 0', 2),
    ],
)
def test_wrong_arguments(arguments, message, code, tiny_config, refused):
    config = tiny_config('fpn')
    assert message in refused(
        *(argument.format(config=config) for argument in arguments), code=code
    )


@pytest.mark.parametrize(
    ('config', 'source'),
    [
        ('det_configs/retinanet_effv2_s0.py', 'cocodataset.org'),
        ('seg_configs/fpn_effv2_s0.py', 'ADEChallengeData2016'),
    ],
)
def test_missing_coco_and_ade20k_say_where_to_get_them(config, source, refused):
    options = ['--cfg-options', 'model.backbone.init_cfg=None']
    assert source in refused(ROOT / config, *options)


def test_test_refuses_a_missing_checkpoint(tiny_config, refused):
    assert 'nowhere.pth' in refused(tiny_config('fpn'), 'nowhere.pth', tool='test.py')


@pytest.mark.parametrize(
    'options',
    # Where mmdet's test.py writes predictions, and a folder that is not there yet.
    [('--out', 'results.pkl'), ('--out', 'results/'), ('--report', 'results/')],
)
def test_metrics_and_report_are_files(options, tiny_config, refused):
    said = refused(tiny_config('fpn'), 'nowhere.pth', *options, tool='test.py')
    assert ' '.join(options) in said
