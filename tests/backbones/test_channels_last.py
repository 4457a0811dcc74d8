"""Necks and heads in channels last compute the same; what was not tried so is left alone."""

import pytest
import torch
from mmdet.models.necks import FPN
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from backbones.deploy import TRIED, put_channels_last

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


@pytest.mark.parametrize(('scope', 'kind'), sorted(TRIED))
@torch.no_grad()
def test_every_part_that_counts_as_tried_computes_the_same(scope, kind):
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
    assert any(in_channels_last(tensor) for tensor in found)


@torch.no_grad()
def test_maps_reach_what_was_not_tried_with_the_channels_first():
    maps = random_maps(CHANNELS)
    tried = Model(build('mmdet', 'FPN'), bbox_head=build('mmdet', 'RetinaHead'))
    put_channels_last(tried)
    assert all(in_channels_last(each) for each in tried.neck(maps))

    partly = Model(
        build('mmdet', 'FPN'), rpn_head=build('mmdet', 'RPNHead'), roi_head=nn.Identity()
    )
    for _ in range(2):
        put_channels_last(partly)
        assert all(each.is_contiguous() for each in partly.neck(maps))
        assert len(partly.neck._forward_hooks) == 1
    assert in_channels_last(partly.rpn_head(partly.neck(maps)[:4])[1][0])


@torch.no_grad()
def test_what_is_derived_from_a_tried_part_is_left_alone():
    class OwnFPN(FPN):
        pass

    neck = OwnFPN(**PARTS['mmdet', 'FPN']).eval()
    put_channels_last(Model(neck, bbox_head=build('mmdet', 'RetinaHead')))
    assert all(each.is_contiguous() for each in neck(random_maps(CHANNELS)))


def test_on_a_gpu_nothing_changes():
    model = Model(build('mmdet', 'FPN').to('meta'), bbox_head=build('mmdet', 'RetinaHead'))
    put_channels_last(model)
    assert model.bbox_head.retina_cls.weight.is_contiguous()
