"""Segmentation maps are those of mmseg's whole resize."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from mmseg.models.decode_heads import FCNHead
from mmseg.structures import SegDataSample

from backbones.inference import seg_maps
from backbones.inference.seg_maps import (
    Logits,
    argmax_of,
    keep_logits_small,
    predict_logits,
    seg_map_of,
)


def random_logits(classes: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(classes, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('size', [(100, 200), (33, 50), (64, 97), (1, 1), (300, 3)])
def test_planes_are_those_of_all_logits(size, align_corners):
    logits = random_logits(5, 64, 97)
    whole = F.interpolate(logits[None], size, mode='bilinear', align_corners=align_corners)[0]
    found = Logits.of(logits).resize(size, align_corners)
    assert found.size == size
    assert found.resized().equal(whole)
    torch.testing.assert_close(found.planes(), whole, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.planes(slice(2, 4)), whole[2:4], atol=2e-5, rtol=0)


@pytest.mark.parametrize('align_corners', [False, True])
def test_planes_are_resized_cropped_and_resized_again(align_corners):
    logits = random_logits(3, 16, 24)
    resize = dict(mode='bilinear', align_corners=align_corners)
    padded = F.interpolate(logits[None], (64, 96), **resize)
    whole = F.interpolate(padded[:, :, 3:60, 2:91], (80, 70), **resize)[0]
    found = Logits.of(logits).resize((64, 96), align_corners).crop(slice(3, 60), slice(2, 91))
    assert found.size == (57, 89)
    found = found.resize((80, 70), align_corners)
    assert found.resized().equal(whole)
    torch.testing.assert_close(found.planes(), whole, atol=2e-5, rtol=0)


def test_how_many_are_computed_at_once_changes_nothing(monkeypatch):
    logits = Logits.of(random_logits(5, 31, 40)).resize((90, 77), False)
    at_once = seg_map_of(logits)
    assert at_once.dtype == torch.uint8
    monkeypatch.setattr(seg_maps, 'CPU_VALUES', 1000)
    assert seg_map_of(logits).equal(at_once)
    for values in (1, 2 * 90 * 77, 10**6):
        monkeypatch.setattr(seg_maps, 'CPU_BYTES', 4 * values)
        for planes in (logits.planes, logits.resized):
            assert argmax_of(planes, 5, (90, 77), at_once.device).equal(at_once)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('final', [(150, 260), (40, 90), (64, 96), (7, 5)])
def test_what_is_resized_twice_is_that_of_all_logits(final, align_corners):
    resize = dict(mode='bilinear', align_corners=align_corners)
    logits = F.interpolate(random_logits(20, 4, 6)[None], (16, 24), **resize)[0]
    padded = F.interpolate(logits[None], (64, 96), **resize)[:, :, 3:60, 2:91]
    expected = F.interpolate(padded, final, **resize)[0].argmax(dim=0)
    twice = Logits.of(logits).resize((64, 96), align_corners).crop(slice(3, 60), slice(2, 91))
    found = seg_map_of(twice.resize(final, align_corners))
    assert (found == expected).float().mean() >= 0.9999


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('classes', [2, 7, 150, 300])
def test_the_highest_logit_wins_and_of_equal_ones_the_first(classes, align_corners):
    logits = random_logits(classes, 24, 33)
    # Integers tie, everywhere where a class is the copy of another.
    logits = logits.round() if classes == 7 else logits
    logits[classes // 2 :] = logits[: classes - classes // 2].clone()
    before = logits.clone()
    whole = F.interpolate(logits[None], (96, 131), mode='bilinear', align_corners=align_corners)[0]
    expected = whole.argmax(dim=0)
    labels = seg_map_of(Logits.of(logits).resize((96, 131), align_corners))
    assert (labels == expected).float().mean() >= 0.9999
    assert labels.max() < classes - classes // 2 or classes % 2
    assert seg_map_of(Logits.of(logits)).equal(logits.argmax(dim=0).to(labels.dtype))
    assert logits.equal(before)


def test_one_class_has_a_threshold_and_many_classes_fit():
    single = torch.tensor([[[-1.0, 3.0]]])
    assert seg_map_of(Logits.of(single, threshold=0.3)).tolist() == [[0, 1]]
    resized = Logits.of(single, threshold=0.3).resize((5, 7), False)
    probability = F.interpolate(single[None], (5, 7), mode='bilinear')[0, 0].sigmoid()
    assert seg_map_of(resized).equal((probability > 0.3).to(torch.uint8))
    many = torch.zeros(300, 1, 1)
    many[299] = 1
    assert seg_map_of(Logits.of(many)).item() == 299


class OwnResizeHead(FCNHead):
    """A head that changes the logits at full size."""

    def predict_by_feat(self, seg_logits, batch_img_metas):
        return super().predict_by_feat(seg_logits, batch_img_metas) * -1


def segmentor(head=FCNHead, one_logit=False, align_corners=False, **test_cfg) -> torch.nn.Module:
    torch.manual_seed(0)
    classes = (
        dict(num_classes=2, out_channels=1, threshold=0.4) if one_logit else dict(num_classes=7)
    )
    config = dict(
        type='mmseg.EncoderDecoder',
        data_preprocessor=dict(type='mmseg.SegDataPreProcessor', size_divisor=32),
        backbone=dict(type='EfficientFormerV2', arch='s0', out_indices=(0,)),
        decode_head=dict(
            type=head,
            in_channels=32,
            channels=8,
            num_convs=1,
            **classes,
            dropout_ratio=0,
            align_corners=align_corners,
            loss_decode=dict(type='mmseg.CrossEntropyLoss', use_sigmoid=one_logit),
        ),
        test_cfg=test_cfg or dict(mode='whole'),
    )
    return MODELS.build(ConfigDict(config)).eval()


@pytest.mark.parametrize(
    ('options', 'small'),
    [
        (dict(), True),
        (dict(align_corners=True), True),
        (dict(one_logit=True), True),
        (dict(head=OwnResizeHead), False),
        (dict(mode='slide', crop_size=(64, 64), stride=(40, 40)), False),
    ],
    ids=['whole', 'corners', 'one logit', 'own resize', 'slide'],
)
@torch.inference_mode()
def test_maps_are_mmsegs(options, small):
    model = segmentor(**options)
    image = torch.randint(0, 256, (3, 90, 121), generator=torch.Generator().manual_seed(0))
    sample = SegDataSample(metainfo=dict(img_shape=(90, 121), ori_shape=(60, 200)))
    data = model.data_preprocessor(dict(inputs=[image], data_samples=[sample]), False)
    expected = model.predict(**data)[0].pred_sem_seg.data[0]

    keep_logits_small(model)
    labels = seg_map_of(predict_logits(model, data['inputs'], data['data_samples'])[0])

    assert (labels == expected).float().mean() > 0.999
    assert len(expected.unique()) > 1
    logits = model.inference(data['inputs'], [sample.metainfo])
    assert (logits.shape[2:] < data['inputs'].shape[2:]) == small
