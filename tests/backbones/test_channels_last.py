"""Maps in channels last: necks and heads compute the same, mmcv's operators get contiguous ones."""

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
from mmcv import ops
from mmdet.models.necks import FPN
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope
from tiny import TINY_ARCH
from torch import Tensor, nn

from backbones import EfficientFormerV2
from backbones.deploy import (
    WORKS_CHANNELS_LAST,
    expect_contiguous,
    put_channels_last,
    switch_to_deploy,
)

CHANNELS = [8, 8, 16, 16]
LOSS = dict(type='mmseg.CrossEntropyLoss', use_sigmoid=False)
HEAD = dict(channels=8, num_classes=3, dropout_ratio=0, align_corners=False, loss_decode=LOSS)
ANCHORS = dict(type='mmdet.AnchorGenerator', scales=[8], ratios=[1.0], strides=[4, 8, 16, 32])
PARTS = {
    ('mmdet', 'FPN'): dict(in_channels=CHANNELS, out_channels=8, num_outs=5),
    ('mmdet', 'RPNHead'): dict(in_channels=8, feat_channels=8, anchor_generator=ANCHORS),
    ('mmdet', 'RetinaHead'): dict(
        num_classes=3, in_channels=8, feat_channels=8, anchor_generator=ANCHORS
    ),
    ('mmdet', 'FCNMaskHead'): dict(in_channels=8, conv_out_channels=8, num_classes=3),
    ('mmseg', 'FPN'): dict(in_channels=CHANNELS, out_channels=8, num_outs=4),
    ('mmseg', 'FPNHead'): dict(
        HEAD, in_channels=[8] * 4, in_index=[0, 1, 2, 3], feature_strides=[4, 8, 16, 32]
    ),
    ('mmseg', 'UPerHead'): dict(HEAD, in_channels=CHANNELS, in_index=[0, 1, 2, 3]),
}


class Model(nn.Module):
    """What a detector or segmentor looks like from outside."""

    def __init__(self, neck: nn.Module, **heads: nn.Module) -> None:
        super().__init__()
        self.data_preprocessor = nn.Identity()
        self.backbone = nn.Identity()
        self.neck = neck
        for name, head in heads.items():
            setattr(self, name, head)


def build(scope: str, kind: str) -> nn.Module:
    torch.manual_seed(0)
    init_default_scope(scope)
    return MODELS.build(ConfigDict(type=f'{scope}.{kind}', **PARTS[scope, kind])).eval()


def random_maps(channels: list[int]) -> tuple[Tensor, ...]:
    sizes = ((24, 31), (12, 16), (6, 8), (3, 4))
    return tuple(torch.randn(2, c, *size) for c, size in zip(channels, sizes, strict=True))


def flat(outputs: Tensor | tuple | list) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for each in outputs for tensor in flat(each)]


def in_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@pytest.mark.parametrize(('scope', 'kind'), sorted(WORKS_CHANNELS_LAST))
@torch.no_grad()
def test_parts_in_channels_last_compute_the_same(scope, kind):
    part = build(scope, kind)
    wanted = PARTS[scope, kind]['in_channels']
    inputs = random_maps(wanted if isinstance(wanted, list) else [wanted] * 4)
    if kind == 'FCNMaskHead':
        inputs = inputs[0]
    expected = flat(part(inputs))
    put_channels_last(part)
    found = flat(part(inputs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert kind == 'FPN' or any(in_channels_last(tensor) for tensor in found)


def fpn_and(**heads: nn.Module) -> Model:
    return Model(build('mmdet', 'FPN'), **heads)


@pytest.mark.parametrize('wrap', [lambda m: m, nn.Sequential, lambda m: Model(None, detector=m)])
@pytest.mark.parametrize(
    ('make', 'stays'),
    [
        (lambda: fpn_and(bbox_head=build('mmdet', 'RetinaHead')), True),
        (lambda: fpn_and(rpn_head=build('mmdet', 'RPNHead'), roi_head=nn.Identity()), False),
        (lambda: fpn_and(), False),
        (
            lambda: Model(
                nn.Sequential(build('mmdet', 'FPN')), bbox_head=build('mmdet', 'RetinaHead')
            ),
            False,
        ),
    ],
    ids=['known heads', 'unknown head', 'no head', 'list of necks'],
)
@torch.no_grad()
def test_only_heads_that_are_known_meet_channels_last(make, stays, wrap):
    model = make()
    for _ in range(2):
        put_channels_last(wrap(model))
        for each in model.neck(random_maps(CHANNELS)):
            assert in_channels_last(each) if stays else each.is_contiguous()
    if hasattr(model, 'rpn_head'):
        maps = model.neck(random_maps(CHANNELS))
        assert in_channels_last(model.rpn_head(maps[:4])[1][0])


@torch.no_grad()
def test_what_is_derived_from_a_known_part_is_left_alone():
    class OwnFPN(FPN):
        pass

    neck = OwnFPN(**PARTS['mmdet', 'FPN']).eval()
    put_channels_last(Model(neck, bbox_head=build('mmdet', 'RetinaHead')))
    assert all(each.is_contiguous() for each in neck(random_maps(CHANNELS)))


@torch.no_grad()
def test_deformable_convolutions_inside_keep_their_weights_contiguous():
    init_default_scope('mmdet')
    deformable = dict(PARTS['mmdet', 'FPN'], type='mmdet.FPN', conv_cfg=dict(type='DCNv2'))
    neck = MODELS.build(ConfigDict(deformable)).eval()
    maps = random_maps(CHANNELS)
    expected = neck(maps)
    switch_to_deploy(neck)
    for a, b in zip(neck(maps), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_on_a_gpu_nothing_changes():
    model = Model(build('mmdet', 'FPN').to('meta'), bbox_head=build('mmdet', 'RetinaHead'))
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
    guarded = expect_contiguous(expect_contiguous(nn.ModuleList([copy.deepcopy(plain)])))[0]
    assert len(guarded._forward_pre_hooks) == 1
    expected = plain(*inputs)
    others = [in_other_memory(x) for x in inputs]
    assert not any(x.is_contiguous() for x in others)
    torch.testing.assert_close(guarded(*others), expected)
    named = dict(zip(inspect.signature(plain.forward).parameters, others, strict=True))
    torch.testing.assert_close(guarded(**named), expected)


@pytest.mark.parametrize('deployed', [False, True])
@pytest.mark.parametrize('onednn', [False, True])
@pytest.mark.parametrize('gradients', [False, True])
@pytest.mark.parametrize('order', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('weights', [torch.contiguous_format, torch.channels_last])
def test_maps_of_the_backbone_are_in_the_memory_format_of_the_image(
    deployed, onednn, gradients, order, weights
):
    backbone = EfficientFormerV2(TINY_ARCH).eval().to(memory_format=weights)
    if deployed:
        backbone.switch_to_deploy()
    image = torch.rand(2, 3, 128, 160).contiguous(memory_format=order)
    with torch.set_grad_enabled(gradients), torch.backends.mkldnn.flags(enabled=onednn):
        maps = backbone(image)
    assert all(each.is_contiguous(memory_format=order) for each in maps)
