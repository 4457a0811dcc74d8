"""What mmseg's segmentors need to be asked for, to make label maps in little time and memory."""

from collections.abc import Sequence

from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.segmentors import EncoderDecoder
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from .label_map import label_map_of
from .logits import Logits


def keep_logits_small(model: nn.Module) -> None:
    """Have a segmentor's head return logits at the head's own size.

    mmseg resizes them to the size of the network's input, which at 512x512 and 150 classes takes
    longer than an EfficientFormerV2-S0; :func:`label_maps` does so strip by strip.

    Args:
        model: A segmentor, changed in place, or left as it is where other code than mmseg's own
            or the seams of a sliding window need the logits at full size.
    """
    head = getattr(model, 'decode_head', None)
    if (
        type(model) is EncoderDecoder
        and model.test_cfg.get('mode', 'whole') == 'whole'
        and isinstance(head, BaseDecodeHead)
        and type(head).predict is BaseDecodeHead.predict
        and type(head).predict_by_feat is BaseDecodeHead.predict_by_feat
    ):
        head.predict_by_feat = as_they_are


def as_they_are(seg_logits: Tensor, batch_img_metas: list[dict]) -> Tensor:
    """Stands in for a head's ``predict_by_feat``, with its arguments."""
    return seg_logits


def label_maps(model: nn.Module, inputs: Tensor, samples: Sequence[SegDataSample]) -> list[Tensor]:
    """What a segmentor sees in pictures.

    Args:
        model: A segmentor of mmseg's in evaluation mode.
        inputs: (batch, 3, height, width), preprocessed.
        samples: The pictures' own.

    Returns:
        For each picture what :func:`.label_map.label_map_of` returns.
    """
    head = model.decode_head
    last_head = head[-1] if isinstance(head, nn.ModuleList) else head
    threshold = last_head.threshold if model.out_channels == 1 else None
    maps = []
    batch = model.inference(inputs, [sample.metainfo for sample in samples])
    for each, sample in zip(batch, samples, strict=True):
        meta = sample.metainfo
        padding = meta.get('img_padding_size', meta.get('padding_size', [0] * 4))
        logits = Logits.of(each.float()).resize(inputs.shape[2:], model.align_corners)
        logits = logits.crop(*padding).resize(meta['ori_shape'][:2], model.align_corners)
        maps.append(label_map_of(logits, threshold))
    return maps
