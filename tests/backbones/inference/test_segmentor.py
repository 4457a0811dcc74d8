"""Label maps are mmseg's own, whichever way the logits get to the picture's size."""

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from mmseg.models.decode_heads import FCNHead
from mmseg.structures import SegDataSample

from backbones.inference.segmentor import keep_logits_small, label_maps


class OwnResizeHead(FCNHead):
    """A head whose logits something is done to at full size."""

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
def test_label_maps_are_mmsegs(options, small):
    model = segmentor(**options)
    picture = torch.randint(0, 256, (3, 90, 121), generator=torch.Generator().manual_seed(0))
    sample = SegDataSample(metainfo=dict(img_shape=(90, 121), ori_shape=(60, 200)))
    data = model.data_preprocessor(dict(inputs=[picture], data_samples=[sample]), False)
    expected = model.predict(**data)[0].pred_sem_seg.data[0]

    keep_logits_small(model)
    labels = label_maps(model, data['inputs'], data['data_samples'])[0]

    assert (labels == expected).float().mean() > 0.999
    assert len(expected.unique()) > 1
    logits = model.inference(data['inputs'], [sample.metainfo])
    assert (logits.shape[2:] < data['inputs'].shape[2:]) == small
