"""Every shipped config loads, builds, trains a step and predicts; configs inherit both ways."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch.nn.modules.batchnorm import _BatchNorm

from backbones import ARCHITECTURES
from backbones.engine.config import load_config

ROOT = Path(__file__).resolve().parents[2]
KINDS = ('det_configs/retinanet', 'det_configs/mask_rcnn', 'seg_configs/fpn', 'seg_configs/ham')
RECIPES = [f'{kind}_effv2_{arch}.py' for kind in KINDS for arch in ARCHITECTURES]
# Of those for one use in several sizes, one.
OTHERS = [
    str(path)
    for path in sorted([*ROOT.glob('det_configs/*.py'), *ROOT.glob('seg_configs/*.py')])
    if not re.search(r'_effv2_(s1|s2|l|l_.*|(s1|s2)_neck.*)$', path.stem)
]
VARIANTS = [
    pytest.param(path, *match.groups(), id=path.stem)
    for path in sorted(ROOT.glob('*_configs/*.py'))
    if (match := re.fullmatch(r'(\w+_effv2_(?:s0|s1|s2|l))_(authors|search|neck\d+)', path.stem))
]


def build_from_nothing(config: Config) -> torch.nn.Module:
    config.model.backbone.init_cfg = None
    init_default_scope(config.default_scope)
    model = revert_sync_batchnorm(MODELS.build(config.model))
    model.init_weights()
    return model


def sample_of(scope: str, height: int, width: int) -> dict:
    """A batch of one image with ground truth, as a data loader hands it over."""
    if scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        return demo_mm_inputs(1, (3, height, width), with_mask=True, use_box_type=True)
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    image = torch.randint(0, 255, (3, height, width), dtype=torch.uint8)
    sample = SegDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width)))
    sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, height, width)))
    return dict(inputs=[image], data_samples=[sample])


@pytest.mark.parametrize('path', RECIPES)
def test_recipe(path):
    config = Config.fromfile(ROOT / path)
    task, arch = Path(path).stem.split('_effv2_')
    batch, learning_rate, weight_decay = {
        'retinanet': (16, 1e-4, 1e-4),
        'mask_rcnn': (16, 2e-4, 0.05),
        'fpn': (32, 2e-4, 1e-4),
        'ham': (16, 6e-5, 0.01),
    }[task]
    optimizer = config.optim_wrapper.optimizer
    expected = ('AdamW', learning_rate, weight_decay)
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == expected
    assert config.auto_scale_lr.base_batch_size == batch == 8 * config.train_dataloader.batch_size
    assert config.model.backbone.norm_eval
    checkpoint = config.model.backbone.init_cfg.checkpoint
    assert checkpoint == f'timm://efficientformerv2_{arch}.snap_dist_in1k'
    if task == 'ham':
        head = config.model.decode_head
        assert tuple(head.in_channels) == ARCHITECTURES[arch]['channels'][1:]
        assert head.in_index == [1, 2, 3] and head.channels == head.ham_channels
        assert config.train_cfg.max_iters == config.param_scheduler[-1].end == 160_000
        assert config.param_scheduler[0].end == config.param_scheduler[1].begin == 1500
        return
    assert tuple(config.model.neck.in_channels) == ARCHITECTURES[arch]['channels']
    if task == 'fpn':
        assert config.train_cfg.max_iters == config.param_scheduler[-1].end == 40_000
        assert config.param_scheduler[-1].power == 0.9
        assert config.param_scheduler[-1].eta_min == 1e-6
    else:
        assert config.train_cfg.max_epochs == 12
        assert config.param_scheduler[-1].milestones == [8, 11]


@pytest.mark.parametrize(('path', 'recipe', 'kind'), VARIANTS)
def test_a_variant_is_its_recipe_but_for_what_its_name_says(path, recipe, kind):
    config, base = (Config.fromfile(each) for each in (path, path.with_name(f'{recipe}.py')))
    model, is_segmentor = base.model, recipe.startswith('fpn')
    if kind == 'authors':
        # Else their checkpoints load, and compute something else.
        model.backbone.update(pretrain_img_size=512 if is_segmentor else 800, bias_resize='matrix')
        if is_segmentor:
            multiple = dict(type='ResizeToMultiple', size_divisor=32)
            base.test_dataloader.dataset.pipeline.insert(2, multiple)
    elif kind == 'search':
        assert config.search == {}
    else:
        width = int(kind.removeprefix('neck'))
        model.neck.out_channels = width
        if is_segmentor:
            model.decode_head.update(in_channels=[width] * 4, channels=width // 2)
        else:
            model.bbox_head.update(in_channels=width, feat_channels=width)
    assert config.model.to_dict() == model.to_dict()
    for part in ('train_dataloader', 'test_dataloader', 'optim_wrapper', 'train_cfg'):
        assert config[part].to_dict() == base[part].to_dict()


def test_the_light_head_learns_ten_times_as_fast_as_the_backbone():
    """Talking heads of the backbone are none; norms outside the head are not decayed."""
    config = Config.fromfile(ROOT / 'seg_configs/ham_effv2_s0.py')
    model = build_from_nothing(config)
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    norms = {
        id(p) for m in model.backbone.modules() if isinstance(m, _BatchNorm) for p in m.parameters()
    }
    assert len(groups) == len(named) and norms
    for (name, parameter), group in zip(named, groups, strict=True):
        assert group['params'][0] is parameter
        assert group['lr'] == pytest.approx(6e-4 if name.startswith('decode_head') else 6e-5)
        assert group['weight_decay'] == (0 if id(parameter) in norms else 0.01)


# The other sizes differ in what test_recipe reads.
@pytest.mark.parametrize('path', [path for path in RECIPES if path.endswith('_s0.py')])
def test_predicts_and_trains(path):
    torch.manual_seed(0)
    config = Config.fromfile(ROOT / path)
    model = build_from_nothing(config)
    scope = config.default_scope
    model.train()
    data = model.data_preprocessor(sample_of(scope, 96, 128), training=True)
    losses, _ = model.parse_losses(model(**data, mode='loss'))
    losses.backward()
    assert losses.isfinite()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []

    model.eval()
    with torch.no_grad():
        result = model.test_step(sample_of(scope, 75, 101))[0]
    if scope == 'mmseg':
        assert result.pred_sem_seg.data.shape == (1, 75, 101)
    else:
        assert len(result.pred_instances.bboxes) == len(result.pred_instances.scores)
        assert ('masks' in result.pred_instances) == ('mask_rcnn' in path)


@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
def test_the_readmes_configs_put_the_backbone_under_models_of_theirs(library, tmp_path):
    readme = (ROOT / 'README.md').read_text()
    (text,) = re.findall(rf"```python\n(_base_ = '{library}::.*?)```", readme, re.DOTALL)
    path = tmp_path / 'theirs.py'
    path.write_text(text)
    config = load_config(str(path))
    model = build_from_nothing(config).eval()
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    # UPerNet's schedule ends at a learning rate that is as high as AdamW begins with.
    last = config.param_scheduler[-1]
    assert last.get('eta_min', 0) < 0.1 * optimizer.defaults['lr']
    with torch.no_grad():
        result = model.test_step(sample_of(config.default_scope, 61, 90))[0]
    assert result.ori_shape == (61, 90)


# The configs are read before anything of ours is imported, as mmdet's and mmseg's own tools do it.
INFERENCE = """\
import functools, sys
from mmengine import Config
from mmengine.config import utils
# Of which mmengine reads a hundred for each of mmdet's configs.
utils.load = functools.cache(utils.load)
for path in sys.argv[1:]:
    Config.fromfile(path)
import numpy as np, torch
torch.set_num_threads(1)
image = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
untrained = {{'model.backbone.init_cfg': None}}

def detect():
    from mmdet.apis import inference_detector, init_detector
    if 'detector' not in globals():
        globals()['detector'] = init_detector('{det}', device='cpu', palette='random',
            cfg_options={{**untrained, 'test_dataloader.dataset.pipeline.1.scale': (160, 160)}})
    return inference_detector(detector, image).pred_instances.scores

def segment():
    from mmseg.apis import inference_model, init_model
    if 'segmentor' not in globals():
        globals()['segmentor'] = init_model('{seg}', device='cpu',
            cfg_options=untrained)
    return inference_model(segmentor, image).pred_sem_seg.data

for call in ({order}) * 2:
    call()
"""


@pytest.mark.parametrize(
    'order', ['detect, segment', pytest.param('segment, detect', marks=pytest.mark.slow)]
)
def test_all_configs_load_and_detector_and_segmentor_live_in_one_process(order):
    """In a process of its own, from another folder."""
    script = INFERENCE.format(
        det=ROOT / 'det_configs/retinanet_effv2_s0.py',
        seg=ROOT / 'seg_configs/fpn_effv2_s0.py',
        order=order,
    )
    done = subprocess.run(
        [sys.executable, '-c', script, *OTHERS],
        capture_output=True,
        text=True,
        cwd=Path(sys.executable).parent,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_inferencers(tmp_path):
    from mmdet.apis import DetInferencer
    from mmseg.apis import MMSegInferencer

    image = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    for inferencer, path in (
        (DetInferencer, 'det_configs/mask_rcnn_effv2_s0.py'),
        (MMSegInferencer, 'seg_configs/fpn_effv2_s0.py'),
    ):
        config = Config.fromfile(ROOT / path)
        config.model.backbone.init_cfg = None
        if 'mask_rcnn' in path:
            config.test_dataloader.dataset.pipeline[1].scale = (160, 160)
        config.dump(tmp_path / 'config.py')
        run = inferencer(str(tmp_path / 'config.py'), device='cpu')
        assert run(image, out_dir='')['predictions'] is not None


def test_a_crop_leaves_no_object_without_pixels(tmp_path):
    """Its box would have no area, and the loss of a detector with masks would be NaN."""
    for folder in ('train', 'annotations'):
        (tmp_path / folder).mkdir()
    cv2.imwrite(str(tmp_path / 'train' / 'a.png'), np.zeros((100, 100, 3), np.uint8))
    # Along the left and the upper border; its box is the whole image.
    corner = [0, 0, 100, 0, 100, 4, 4, 4, 4, 100, 0, 100]
    annotation = dict(id=1, image_id=1, category_id=1, iscrowd=0, area=784)
    annotation |= dict(segmentation=[corner], bbox=[0, 0, 100, 100])
    image = dict(id=1, file_name='a.png', height=100, width=100)
    truth = dict(images=[image], annotations=[annotation], categories=[dict(id=1, name='corner')])
    (tmp_path / 'annotations' / 'instances_train.json').write_text(json.dumps(truth))
    options = dict(data_root=f'{tmp_path}/', image_size=100, pretrained=False)
    config = load_config(str(ROOT / 'det_configs' / 'mask_rcnn_effv2_small.py'), options)
    config.train_dataloader.dataset.metainfo = dict(classes=('corner',))
    init_default_scope('mmdet')
    dataset = DATASETS.build(config.train_dataloader.dataset)
    np.random.seed(0)
    found = [dataset[0]['data_samples'].gt_instances for _ in range(40)]
    # Crops of an enlarged image miss it now and then.
    assert {len(each) for each in found} == {0, 1}
    boxes = torch.cat([each.bboxes.tensor for each in found])
    assert ((boxes[:, 2:] - boxes[:, :2]) >= 1).all()
