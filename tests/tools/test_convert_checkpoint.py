"""Published checkpoints, converted by the command line, compute what they computed before."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden import published
from mmengine.registry import MODELS

from backbones import EfficientFormerV2
from backbones.data.classes import set_num_classes
from backbones.engine.config import fit_to_device, load_config
from backbones.weights import load_checkpoint, read_checkpoint

ROOT = Path(__file__).parents[2]
CONFIGS = {
    'mask_rcnn': 'det_configs/mask_rcnn_effv2_s0.py',
    'fpn': 'seg_configs/fpn_effv2_s0.py',
}
BACKBONES = {'mask_rcnn': 'coco', 'fpn': 'ade20k'}
SIZES = {'coco': 800, 'ade20k': 512}


def build(task: str, num_classes: int, backbone: dict | None = None) -> torch.nn.Module:
    """The model of a config, with a backbone of other arguments."""
    config = load_config(str(ROOT / CONFIGS[task]))
    config.model.backbone.update(init_cfg=None, **backbone or {})
    set_num_classes(config, num_classes)
    fit_to_device(config)
    return MODELS.build(config.model)


def heads_of(task: str, num_classes: int) -> dict[str, torch.Tensor]:
    """Neck and heads as mmdet 2.19 and mmseg 0.19, which the authors used, name them."""
    tensors = build(task, num_classes).state_dict()
    return {key: tensor for key, tensor in tensors.items() if not key.startswith('backbone.')}


def save_whole(path: Path, task: str, num_classes: int = 5, **meta: object) -> dict:
    """A whole model as the authors publish it."""
    backbone = published(f'snap_s0_{BACKBONES[task]}')
    heads = heads_of(task, num_classes)
    tensors = {**{f'backbone.{key}': tensor for key, tensor in backbone.items()}, **heads}
    torch.save({'meta': meta, 'state_dict': tensors, 'optimizer': {'state': {}}}, path)
    return heads


@pytest.mark.parametrize(
    ('name', 'wrapper', 'suffix'),
    [('snap_s0_imagenet', 'model', '.safetensors'), ('timm_s0_imagenet', None, '.pth')],
)
def test_imagenet_weights(name, wrapper, suffix, run_tool, tmp_path):
    tensors = published(name)
    torch.save({wrapper: tensors} if wrapper else tensors, tmp_path / 'in.pth')
    process = run_tool('convert_checkpoint.py', 'in.pth', f'out{suffix}')
    assert process.returncode == 0, process.stderr
    assert 'EfficientFormerV2 s0' in process.stdout and '224x224' in process.stdout
    assert '559 tensors (backbone 559)' in process.stdout
    assert '9 tensors, the ImageNet classifier' in process.stdout
    expected, found = EfficientFormerV2('s0'), EfficientFormerV2('s0')
    expected.load_state_dict(tensors)
    out = read_checkpoint(tmp_path / f'out{suffix}')['state_dict']
    assert set(out) == set(found.state_dict())
    found.load_state_dict(out)
    torch.testing.assert_close(dict(found.state_dict()), dict(expected.state_dict()))


@pytest.mark.parametrize('task', CONFIGS)
def test_whole_models(task, run_tool, tmp_path):
    classes = [f'class {i}' for i in range(5)]
    heads = save_whole(tmp_path / 'in.pth', task, CLASSES=classes, mmdet_version='2.19.0')
    process = run_tool('convert_checkpoint.py', 'in.pth', 'out.pth')
    assert process.returncode == 0, process.stderr
    size = SIZES[BACKBONES[task]]
    assert f'bias tables for images of {size}x{size}' in process.stdout
    assert '10 tensors, index tables' in process.stdout
    assert f'tools/test.py {CONFIGS[task]} out.pth' in process.stdout

    converted = load_checkpoint(str(tmp_path / 'out.pth'))
    assert converted['meta']['dataset_meta']['classes'] == classes
    assert not set(converted) - {'meta', 'state_dict'}
    for key, tensor in heads.items():
        torch.testing.assert_close(converted['state_dict'][key], tensor)

    # With the authors' way of resizing, as their configs have it.
    backbone = {'bias_resize': 'matrix', 'pretrain_img_size': size}
    missing, unexpected = build(task, 5, backbone).load_state_dict(converted['state_dict'])
    assert not missing and not unexpected


def test_the_backbone_of_a_whole_model(run_tool, tmp_path):
    heads = save_whole(tmp_path / 'in.pth', 'fpn')
    process = run_tool('convert_checkpoint.py', 'in.pth', 'out.pth', '--task', 'backbone')
    assert process.returncode == 0, process.stderr
    assert f'{len(heads)} tensors, neck and heads' in process.stdout
    out = read_checkpoint(tmp_path / 'out.pth')['state_dict']
    assert set(out) == set(EfficientFormerV2('s0').state_dict())


@pytest.fixture
def refused(call_tool, tmp_path, monkeypatch) -> Callable[[str], str]:
    """What is said of why in.pth is not written to a path."""

    def refuse(out: str) -> str:
        monkeypatch.chdir(tmp_path)
        code, said = call_tool('convert_checkpoint.py', 'in.pth', out)
        assert code == 1 and 'Traceback' not in said
        return said

    return refuse


def test_nothing_is_overwritten_unasked(refused, run_tool, tmp_path):
    torch.save(published('timm_s0_imagenet'), tmp_path / 'in.pth')
    (tmp_path / 'out.pth').write_text('precious')
    assert '--overwrite' in refused('out.pth')
    assert (tmp_path / 'out.pth').read_text() == 'precious'
    process = run_tool('convert_checkpoint.py', 'in.pth', 'out.pth', '--overwrite')
    assert process.returncode == 0, process.stderr
    assert read_checkpoint(tmp_path / 'out.pth')


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path:
    """A segmentor's checkpoint."""
    path = tmp_path_factory.mktemp('whole') / 'in.pth'
    save_whole(path, 'fpn')
    return path


def without(key: str) -> Callable[[dict], object]:
    return lambda checkpoint: checkpoint['state_dict'].pop(key)


BIAS = 'decode_head.conv_seg.bias'


@pytest.mark.parametrize(
    ('change', 'out', 'said'),
    [
        (dict, 'out.ckpt', '.pth or .safetensors'),
        (without('backbone.network.0.0.mlp.fc1.weight'), 'out.pth', 'lacks 1 of the'),
        (lambda c: c['state_dict'][BIAS].fill_(torch.nan), 'out.pth', 'NaN'),
        (lambda c: c.update(state_dict={'backbone.layer1.weight': torch.ones(1)}), 'out.pth',
         'no EfficientFormerV2 is recognized'),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_written(
    change, out, said, whole, refused, tmp_path
):
    checkpoint = torch.load(whole)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / 'in.pth')
    assert said in refused(out)
    assert [path.name for path in tmp_path.iterdir()] == ['in.pth']
