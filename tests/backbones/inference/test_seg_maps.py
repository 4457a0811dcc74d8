"""Segmentation maps are those of mmseg's whole resize."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from mmseg.models.decode_heads import FCNHead
from mmseg.structures import SegDataSample

from backbones.inference import seg_maps
from backbones.inference.seg_maps import Logits, keep_logits_small, predict_seg_maps, seg_map_of


def random_logits(classes: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(classes, height, width, generator=torch.Generator().manual_seed(0))


def in_strips(logits: Logits, rows: int = 7) -> torch.Tensor:
    """All rows, made a few at a time, as (classes, height, width)."""
    height = logits.size[0]
    strips = [logits.rows(top, min(top + rows, height)) for top in range(0, height, rows)]
    return torch.cat([strip(slice(None)) for strip in strips], dim=1)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('size', [(100, 200), (33, 50), (64, 97), (1, 1), (300, 3)])
def test_strips_are_rows_of_the_whole(size, align_corners):
    logits = random_logits(5, 64, 97)
    whole = F.interpolate(logits[None], size, mode='bilinear', align_corners=align_corners)[0]
    strips = in_strips(Logits.of(logits).resize(size, align_corners))
    torch.testing.assert_close(strips, whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize('align_corners', [False, True])
def test_resized_cropped_and_resized_again_is_the_same_in_strips(align_corners):
    logits = random_logits(3, 16, 24)
    resize = dict(mode='bilinear', align_corners=align_corners)
    padded = F.interpolate(logits[None], (64, 96), **resize)
    whole = F.interpolate(padded[:, :, 3:60, 2:91], (80, 70), **resize)[0]
    strips = Logits.of(logits).resize((64, 96), align_corners).crop(2, 5, 3, 4)
    assert strips.size == (57, 89)
    torch.testing.assert_close(
        in_strips(strips.resize((80, 70), align_corners)), whole, atol=2e-5, rtol=0
    )


def test_the_number_of_strips_changes_nothing(monkeypatch):
    logits = Logits.of(random_logits(5, 31, 40)).resize((90, 77), False)
    at_once = seg_map_of(logits, None)
    monkeypatch.setattr(seg_maps, 'CPU_VALUES', 1000)
    assert seg_map_of(logits, None).equal(at_once)
    blended = replace(logits, source=None)
    assert seg_map_of(blended, None).equal(at_once)
    monkeypatch.setattr(seg_maps, 'CPU_STRIP_PIXELS', 77 * 3)
    assert seg_map_of(blended, None).equal(at_once)
    assert at_once.dtype == torch.uint8


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('final', [(150, 260), (40, 90), (64, 96), (7, 5)])
def test_what_is_resized_twice_is_that_of_all_logits(final, align_corners):
    resize = dict(mode='bilinear', align_corners=align_corners)
    logits = F.interpolate(random_logits(20, 4, 6)[None], (16, 24), **resize)[0]
    padded = F.interpolate(logits[None], (64, 96), **resize)[:, :, 3:60, 2:91]
    expected = F.interpolate(padded, final, **resize)[0].argmax(dim=0)
    twice = Logits.of(logits).resize((64, 96), align_corners).crop(2, 5, 3, 4)
    found = seg_map_of(twice.resize(final, align_corners), None)
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
    labels = seg_map_of(Logits.of(logits).resize((96, 131), align_corners), None)
    assert (labels == expected).float().mean() >= 0.9999
    assert labels.max() < classes - classes // 2 or classes % 2
    assert seg_map_of(Logits.of(logits), None).equal(logits.argmax(dim=0).to(labels.dtype))
    assert logits.equal(before)


def test_one_class_has_a_threshold_and_many_classes_fit():
    single = seg_map_of(Logits.of(torch.tensor([[[-1.0, 3.0]]])), 0.3)
    assert single.tolist() == [[0, 1]]
    many = torch.zeros(300, 1, 1)
    many[299] = 1
    assert seg_map_of(Logits.of(many), None).item() == 299


class OwnResizeHead(FCNHead):
    """A head that changes the logits at full size."""

    def predict_by_feat(self, seg_logits, batch_img_metas):
        return super().predict_by_feat(seg_logits, batch_img_metas) * -1


def segmentor(head=FCNHead, **test_cfg) -> torch.nn.Module:
    torch.manual_seed(0)
    config = dict(
        type='mmseg.EncoderDecoder',
        data_preprocessor=dict(type='mmseg.SegDataPreProcessor', size_divisor=32),
        backbone=dict(type='EfficientFormerV2', arch='s0', out_indices=(0,)),
        decode_head=dict(
            type=head,
            in_channels=32,
            channels=8,
            num_convs=1,
            num_classes=7,
            dropout_ratio=0,
            align_corners=False,
            loss_decode=dict(type='mmseg.CrossEntropyLoss', use_sigmoid=False),
        ),
        test_cfg=test_cfg or dict(mode='whole'),
    )
    return MODELS.build(ConfigDict(config)).eval()


@pytest.mark.parametrize(
    ('options', 'small'),
    [
        (dict(), True),
        (dict(head=OwnResizeHead), False),
        (dict(mode='slide', crop_size=(64, 64), stride=(40, 40)), False),
    ],
    ids=['whole', 'own resize', 'slide'],
)
@torch.inference_mode()
def test_maps_are_mmsegs(options, small):
    model = segmentor(**options)
    image = torch.randint(0, 256, (3, 90, 121), generator=torch.Generator().manual_seed(0))
    sample = SegDataSample(metainfo=dict(img_shape=(90, 121), ori_shape=(60, 200)))
    data = model.data_preprocessor(dict(inputs=[image], data_samples=[sample]), False)
    expected = model.predict(**data)[0].pred_sem_seg.data[0]

    keep_logits_small(model)
    labels = predict_seg_maps(model, data['inputs'], data['data_samples'])[0]

    assert (labels == expected).float().mean() > 0.999
    assert len(expected.unique()) > 1
    logits = model.inference(data['inputs'], [sample.metainfo])
    assert (logits.shape[2:] < data['inputs'].shape[2:]) == small
