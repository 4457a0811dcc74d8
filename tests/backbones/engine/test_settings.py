"""Names at the top of a config: everything that is computed from them follows."""

from pathlib import Path

import pytest
from mmengine.config import Config

from backbones.data.labels import set_ignored_label
from backbones.engine.config import load_config
from backbones.engine.preflight import check_start, is_ours
from backbones.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
SMALL = ['seg_configs/fpn', 'det_configs/retinanet', 'det_configs/mask_rcnn']


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def inherit(folder: Path, base: str, extra: str = '') -> str:
    return write(folder / 'mine.py', f'_base_ = "{ROOT}/{base}_effv2_small.py"\n{extra}')


def figures(config: Config) -> dict:
    """What has to follow the settings, as it stands in the parts that are built."""
    steps = {step.type: step for step in config.train_dataloader.dataset.pipeline}
    scale = min(config.test_dataloader.dataset.pipeline[1].scale)
    assert min(steps['RandomResize'].scale) == steps['RandomCrop'].crop_size[0] == scale
    if config.default_scope == 'mmseg':
        assert config.model.data_preprocessor.size == (scale, scale)
    warmup, decay = config.param_scheduler
    assert warmup.end == decay.begin and config.train_cfg.max_epochs == decay.end
    assert config.train_cfg.val_interval == config.default_hooks.checkpoint.interval
    assert config.auto_scale_lr.base_batch_size == config.train_dataloader.batch_size
    return {
        'image_size': scale,
        'batch_size': config.train_dataloader.batch_size,
        'epochs': decay.end,
        'warmup': warmup.end,
        'interval': config.train_cfg.val_interval,
        'learning_rate': config.optim_wrapper.optimizer.lr,
        'arch': config.model.backbone.arch,
        'channels': config.model.neck.in_channels[0],
        'data_root': config.val_dataloader.dataset.data_root,
    }


SET = {
    'image_size': 320, 'batch_size': 3, 'epochs': 40, 'learning_rate': 0.25, 'arch': 'l',
    'data_root': 'data/cells/',
}  # fmt: skip
EXPECTED = {**SET, 'warmup': 2, 'interval': 2, 'channels': 40}


def test_settings_may_come_from_mmengines_variables_and_have_types(tmp_path, monkeypatch):
    lines = "data_root = '{{ fileDirname }}/cells/'\nimage_size: int = 320\n"
    lines += "arch = '{{$ARCH:s2}}'\nepochs = {{'$EPOCHS:40'}}\n"
    monkeypatch.setenv('ARCH', 'l')
    found = figures(load_config(inherit(tmp_path, SMALL[0], lines)))
    assert found['data_root'] == f'{tmp_path}/cells/'
    assert (found['image_size'], found['arch'], found['epochs']) == (320, 'l', 40)


@pytest.mark.parametrize('base', SMALL)
def test_the_small_data_configs_follow_their_settings(base, tmp_path):
    lines = '\n'.join(f'{name} = {value!r}' for name, value in SET.items())
    assert figures(load_config(inherit(tmp_path, base), SET)) == EXPECTED
    assert figures(load_config(inherit(tmp_path, base, lines))) == EXPECTED
    # The command line comes last, and nothing stays changed for the next config.
    config = load_config(inherit(tmp_path, base, lines), {'image_size': 224, 'epochs': 1})
    changed = {'image_size': 224, 'epochs': 2, 'warmup': 1, 'interval': 1}
    assert config.image_size == 224 and config.train_cfg.max_epochs == 1
    config.train_cfg.max_epochs = 2
    assert figures(config) == {**EXPECTED, **changed}
    assert figures(load_config(str(ROOT / f'{base}_effv2_small.py')))['image_size'] > 320


@pytest.mark.parametrize('base', SMALL)
def test_from_nothing_the_backbone_and_the_learning_rate_change(base, tmp_path):
    config = load_config(inherit(tmp_path, base), {'pretrained': False})
    backbone = config.model.backbone
    assert (backbone.init_cfg, backbone.norm_eval) == (None, False)
    assert config.optim_wrapper.optimizer.lr > 5e-4
    assert ('segm' in config.val_evaluator.get('metric', '')) == ('mask' in base)


BASE = 'settings = ["size"]\nsize = 8\nother = 1\nscale = (size, other)\npart = dict(scale=scale)\n'


def load_mine(folder: Path, mine: str, options: dict | None = None, base: str = BASE) -> Config:
    write(folder / 'base.py', f'default_scope = "mmseg"\n{base}')
    write(folder / 'middle.py', '_base_ = "./base.py"\nsize = 16\n')
    return load_config(write(folder / 'mine.py', f'_base_ = "./middle.py"\n{mine}'), options)


def test_only_what_a_base_lists_follows_an_inheriting_config(tmp_path):
    config = load_mine(tmp_path, 'size = 2 * 16\nother = 5\nhalf = size // 2')
    assert (config.part.scale, config.size, config.other, config.half) == ((32, 1), 32, 5, 16)
    assert load_mine(tmp_path, '').part.scale == (16, 1)
    config = load_mine(tmp_path, 'size = 32', {'size': 64, 'other': [7, 'a'], 'part.more': 1})
    assert config.part == {'scale': (64, [7, 'a']), 'more': 1}
    # What was computed is not replaced where it is computed.
    assert load_mine(tmp_path, '', {'scale': 3}).part.scale == (16, 1)


@pytest.mark.parametrize(
    'lines', ['side = size = 32', 'size: int = 32', 'k = 4\nsize = k * 8'], ids=repr
)
def test_however_a_setting_is_assigned_it_is_followed(lines, tmp_path):
    config = load_mine(tmp_path, f'{lines}\nhalf = size // 2')
    assert (config.part.scale, config.size, config.half) == ((32, 1), 32, 16)
    config = load_mine(tmp_path, f'{lines}\nhalf = size // 2', {'size': 64})
    assert (config.part.scale, config.size, config.half) == ((64, 1), 64, 32)


def test_what_cannot_be_followed_is_refused(tmp_path):
    saved = tmp_path / 'saved.py'
    load_mine(tmp_path, '').dump(saved)
    assert load_config(str(saved), {'part.scale': 1}).part.scale == 1
    with pytest.raises(ConfigError, match='size'):
        load_config(str(saved), {'size': 4})


@pytest.mark.parametrize('base', SMALL)
def test_a_misspelled_setting_is_named(base, tmp_path):
    for name, meant in (('epoch', 'epochs'), ('imagesize', 'image_size'), ('archs', 'arch')):
        with pytest.raises(ConfigError, match=f"'{meant}'"):
            load_config(inherit(tmp_path, base), {name: 3})
        with pytest.raises(ConfigError, match=f"'{meant}'"):
            load_config(inherit(tmp_path, base, f'{name} = 3'))
    # Names that mean something else, and those that a config computes with.
    other = {'palette': [], 'search': {}, 'load_from': 'x', 'work_dir': 'x', 'custom_hooks': []}
    lines = 'image_sizes = [320, 640]\nimage_size = image_sizes[0]'
    assert load_config(inherit(tmp_path, base, lines), other).image_size == 320


@pytest.mark.parametrize('base', SMALL)
def test_a_value_of_another_kind_is_refused_with_its_setting(base, tmp_path):
    wrong = {
        'batch_size': [2, 'epochs=1'], 'epochs': ['20', 'image_size=320'], 'image_size': '640x640',
        'learning_rate': 'low', 'pretrained': 'no', 'arch': ['s0', 'epochs=1'], 'patience': None,
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ConfigError, match=name):
            load_config(inherit(tmp_path, base), {name: value})
        with pytest.raises(ConfigError, match=name):
            load_config(inherit(tmp_path, base, f'{name} = {value!r}'))
    right = {'learning_rate': 1, 'pretrained': 0, 'test_split': 2024, 'arch': 's1'}
    assert load_config(inherit(tmp_path, base), right).optim_wrapper.optimizer.lr == 1


@pytest.mark.parametrize('base', SMALL)
@pytest.mark.parametrize('pretrained', [True, False])
def test_an_unknown_arch_is_refused_before_anything_is_fetched(base, pretrained, tmp_path):
    config = load_config(inherit(tmp_path, base), {'arch': 'S0', 'pretrained': pretrained})
    with pytest.raises(ConfigError, match="'s0', 's1', 's2', 'l'"):
        check_start(config)


PURE_PYTHON = """
from mmcv.ops import RoIAlign, nms
from mmseg.datasets import BaseSegDataset
from mmseg.evaluation import IoUMetric
from mmseg.models import EncoderDecoder
from mmseg.models.decode_heads import FCNHead
from backbones.efficientformer_v2.backbone import EfficientFormerV2
default_scope = None
model = dict(type=EncoderDecoder, backbone=dict(type=EfficientFormerV2),
             decode_head=dict(type=FCNHead, num_classes=2))
test_cfg = dict(nms=dict(type=nms), roi_layer=dict(type=RoIAlign))
val_dataloader = dict(dataset=dict(type=BaseSegDataset, ignore_index=7))
val_evaluator = dict(type=IoUMetric, iou_metrics=['mIoU'])
"""


def test_a_config_with_classes_for_types_is_read_like_any_other(tmp_path):
    config = load_config(write(tmp_path / 'mine.py', PURE_PYTHON), {'model.backbone.arch': 's1'})
    assert is_ours(config.model.backbone) and config.model.backbone.arch == 's1'
    assert config.default_scope == 'mmseg'
    set_ignored_label(config)
    assert config.model.decode_head.ignore_index == config.val_evaluator.ignore_index == 7
    # mmcv and mmdet do not find them by more than their names.
    assert (config.test_cfg.nms.type, config.test_cfg.roi_layer.type) == ('nms', 'RoIAlign')
    config.dump(tmp_path / 'saved.py')
    assert load_config(str(tmp_path / 'saved.py'))._cfg_dict == config._cfg_dict
