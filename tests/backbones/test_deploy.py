"""Whole models after switch_to_deploy(), and what reaches mmcv's operators in them."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmcv import ops
from mmcv.cnn import ConvModule
from mmdet.models.necks import FPN
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from tiny import assert_same, with_random_weights, write_tiny_config
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from backbones.deploy import expect_contiguous, fold_norms, put_channels_last, switch_to_deploy

FPN_CONFIG = dict(type='FPN', in_channels=[4, 8, 8, 16], out_channels=16, num_outs=5)
BFP_CONFIG = dict(type='BFP', in_channels=16, num_levels=5, refine_level=2)
UPER_HEAD = """\
    model.update(neck=None, decode_head=dict(
        _delete_=True, type='UPerHead', in_channels=[4, 8, 8, 16], in_index=[0, 1, 2, 3],
        channels=8, num_classes=7, align_corners=False, dropout_ratio=0,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False)))
    """
# A task, and what its tiny config gets at its end.
KINDS = {
    'fpn': ('fpn', ''),
    'uper_head': ('fpn', UPER_HEAD),
    'ham': ('ham', ''),
    'retinanet': ('retinanet', ''),
    'mask_rcnn': ('mask_rcnn', ''),
    'list_neck': ('retinanet', f"model['neck'] = [{FPN_CONFIG}, {BFP_CONFIG}]"),
}
IMAGES = torch.linspace(0, 99, 2 * 3 * 96 * 128).sin().view(2, 3, 96, 128)


@pytest.fixture
def build(tmp_path: Path, shapes: Path) -> Callable[[str], nn.Module]:
    """Makes one of KINDS, with random weights."""

    def make(kind: str) -> nn.Module:
        task, extra = KINDS[kind]
        config = Config.fromfile(write_tiny_config(tmp_path, task, shapes, extra))
        init_default_scope(config.default_scope)
        torch.manual_seed(0)
        return with_random_weights(MODELS.build(config.model))

    return make


def in_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def outputs(model: nn.Module) -> list:
    """What the parts of a model compute."""
    features = model.extract_feat(IMAGES)
    if hasattr(model, 'decode_head'):
        return [features, model.decode_head(features)]
    if not hasattr(model, 'roi_head'):
        return [features, model.bbox_head(features)]
    boxes = torch.tensor([[0, 5.0, 7, 60, 50], [1, 20, 30, 90, 80]])
    regions = model.roi_head.bbox_roi_extractor(features[:4], boxes)
    masks = model.roi_head.mask_head(model.roi_head.mask_roi_extractor(features[:4], boxes))
    return [features, model.rpn_head(features), model.roi_head.bbox_head(regions), masks]


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_whole_models_stay_the_same(kind, build):
    model = build(kind)
    expected = outputs(model)
    assert switch_to_deploy(model) is model
    assert_same(outputs(model), expected)
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())
    assert not model.training
    # Its convolutions are 1x1: channels last makes it no faster.
    if kind == 'ham':
        return
    weights = [p for name, p in model.named_parameters() if not name.startswith('backbone')]
    assert any(in_channels_last(weight) for weight in weights)


@pytest.mark.parametrize('wrap', [lambda m: m, lambda m: nn.ModuleDict(dict(student=m, teacher=m))])
@pytest.mark.parametrize(
    ('kind', 'stays'), [('retinanet', True), ('mask_rcnn', False), ('list_neck', False)]
)
@torch.no_grad()
def test_only_heads_that_are_known_meet_channels_last(kind, stays, wrap, build):
    model = build(kind)
    for _ in range(2):
        put_channels_last(wrap(model))
        # Smaller maps than the first are in both formats at once.
        for each in model.extract_feat(IMAGES)[:3]:
            assert in_channels_last(each) if stays else each.is_contiguous()
    neck = model.neck[0] if kind == 'list_neck' else model.neck
    assert len(neck._forward_hooks) == (0 if stays else 1)


@torch.no_grad()
def test_regions_are_taken_from_channels_last(build):
    model = build('mask_rcnn')
    expected = build('mask_rcnn').extract_feat(IMAGES)
    switch_to_deploy(model)
    found = model.extract_feat(IMAGES)
    assert all(map(in_channels_last, found[:3]))
    rois = torch.tensor([[0.0, 3, 5, 60, 50], [1, 10, 10, 20, 60], [1, 0, 0, 300, 200]])
    for name in ('bbox_roi_extractor', 'mask_roi_extractor'):
        extractors = [getattr(m.roi_head, name) for m in (model, build('mask_rcnn'))]
        assert {type(each).__module__ for each in extractors[0].roi_layers} == {
            'backbones.roi_align'
        }
        regions = [
            extract(maps[:4], rois)
            for extract, maps in zip(extractors, (found, expected), strict=True)
        ]
        assert_same(*regions)


@torch.no_grad()
def test_what_is_derived_from_a_known_part_is_left_alone(build):
    class OwnFPN(FPN):
        pass

    model = build('retinanet')
    model.neck.__class__ = OwnFPN
    put_channels_last(model)
    assert all(each.is_contiguous() for each in model.extract_feat(IMAGES))


@torch.no_grad()
def test_deformable_convolutions_inside_keep_their_weights_contiguous():
    neck = FPN([4, 8], 16, 2, conv_cfg=dict(type='DCNv2')).eval()
    maps = (torch.rand(2, 4, 12, 16), torch.rand(2, 8, 6, 8))
    expected = neck(maps)
    assert_same(switch_to_deploy(neck)(maps), expected)


def test_on_other_devices_nothing_changes(build):
    model = build('retinanet')
    model.neck.to('meta')
    put_channels_last(model)
    assert model.bbox_head.retina_cls.weight.is_contiguous()


X = torch.linspace(-1, 1, 2 * 8 * 12 * 15).sin().view(2, 8, 12, 15)
OFFSET, MASK = torch.randn(2, 18, 12, 15), torch.rand(2, 9, 12, 15)
REGIONS = torch.tensor([[0, 1.0, 2, 9, 10], [1, 0, 0, 14, 8]])
ROTATED = torch.tensor([[0, 6.0, 6, 5, 8, 0.3], [1, 4, 7, 6, 3, 1.0]])
OPERATORS = {
    'RoIAlign': (lambda: ops.RoIAlign(4, 0.5), (X, REGIONS)),
    'RoIAlign max': (lambda: ops.RoIAlign(4, 0.5, 2, 'max'), (X, REGIONS)),
    'RoIAlignRotated': (lambda: ops.RoIAlignRotated(4, 0.5, 2), (X, ROTATED)),
    'DeformConv2d': (lambda: ops.DeformConv2d(8, 6, 3, padding=1), (X, OFFSET)),
    'DeformConv2dPack': (lambda: ops.DeformConv2dPack(8, 6, 3, padding=1), (X,)),
    'ModulatedDeformConv2d': (
        lambda: ops.ModulatedDeformConv2d(8, 6, 3, padding=1),
        (X, OFFSET, MASK),
    ),
    'ModulatedDeformConv2dPack': (lambda: ops.ModulatedDeformConv2dPack(8, 6, 3, padding=1), (X,)),
    'SAConv2d': (lambda: ops.SAConv2d(8, 6, 3, padding=1, use_deform=True), (X,)),
    'PSAMask': (lambda: ops.PSAMask('collect', (7, 7)), (torch.randn(2, 49, 4, 4),)),
}


def in_other_memory(x: Tensor) -> Tensor:
    """The same values, in channels last or as a part of a larger tensor."""
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return torch.cat([x, x], dim=1)[:, : x.shape[1]]


@pytest.mark.parametrize(('make', 'inputs'), OPERATORS.values(), ids=OPERATORS)
def test_operators_of_mmcv_compute_the_same_in_any_memory(make: Callable, inputs: tuple):
    torch.manual_seed(0)
    plain = make()
    guarded = copy.deepcopy(plain)
    guarded.register_forward_pre_hook(lambda *inputs: None)  # as another library may have
    expect_contiguous(expect_contiguous(nn.ModuleList([guarded])))
    assert len(guarded._forward_pre_hooks) == 2
    expected = plain(*inputs)
    others = [in_other_memory(x) for x in inputs]
    assert not any(x.is_contiguous() for x in others)
    torch.testing.assert_close(guarded(*others), expected)
    named = dict(zip(inspect.signature(plain.forward).parameters, others, strict=True))
    torch.testing.assert_close(guarded(**named), expected)


class SharedConv(nn.Module):
    """One convolution with a norm for each of two levels, as in RetinaNet's SepBN head."""

    def __init__(self) -> None:
        super().__init__()
        norm = dict(type='BN')
        self.levels = nn.ModuleList(ConvModule(4, 4, 3, norm_cfg=norm) for _ in range(2))
        self.levels[1].conv = self.levels[0].conv

    def forward(self, x):
        return [level(x) for level in self.levels]


@pytest.mark.parametrize(
    ('model', 'norms_left'),
    [
        (SharedConv(), 0),
        (ConvModule(4, 4, 3, norm_cfg=dict(type='BN'), order=('norm', 'conv', 'act')), 1),
        (ConvModule(4, 4, 3, norm_cfg=dict(type='BN'), order=('conv', 'act', 'norm')), 1),
        (ConvModule(4, 4, 3, norm_cfg=dict(type='BN'), with_spectral_norm=True), 1),
        (ConvModule(4, 4, 3, conv_cfg=dict(type='ConvWS'), norm_cfg=dict(type='BN')), 1),
        (ConvModule(4, 4, 3, norm_cfg=dict(type='GN', num_groups=2)), 0),
        (ConvModule(4, 4, 3), 0),
        (nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), 1),
    ],
    ids=['shared', 'norm first', 'act first', 'spectral', 'ConvWS', 'GN', 'no norm', 'two norms'],
)
def test_only_norms_behind_their_own_convolution_are_folded(model, norms_left):
    with_random_weights(model)
    x = torch.randn(2, 4, 7, 9)
    with torch.no_grad():
        expected = model(x)
        fold_norms(model)
        assert_same(model(x), expected)
    assert sum(isinstance(module, _BatchNorm) for module in model.modules()) == norms_left
