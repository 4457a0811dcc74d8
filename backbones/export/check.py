"""Comparison of an exported file with the model that it was made from."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib import cbook
from mmcv.image import imread, imresize
from mmengine.config import Config
from mmengine.structures import BaseDataElement
from torch import nn

from backbones.data.config_datasets import build_images, datasets_of
from backbones.deploy import expect_contiguous
from backbones.errors import DataError, ExportError
from backbones.inference.exported_file import Description, ExportedModel, Runner
from backbones.inference.model import TorchModel
from backbones.inference.results import Segmentation

from .compare import Results, compare, pair, percent
from .exportable import is_segmentor
from .preprocessing import Preprocessing, missing_to_multiple


def check_file(run: Runner, model: nn.Module, image: np.ndarray) -> Iterator[str]:
    """Compare a file with its model, which is modified, on an image (at two sizes, if the file's is
    dynamic) and on noise. Yields a line per comparison; raises ExportError if results differ."""
    description = run.description
    expect_contiguous(model)
    if description.task == 'detection':
        from backbones.inference.masks import keep_masks_small

        keep_masks_small(model)
    for case, inputs in cases(image, description):
        try:
            found = split(run(inputs), description)
        except RuntimeError as error:
            raise ExportError(f'{case}: the file does not run: {error}') from error
        for number, expected in enumerate(predict(model, description, inputs)):
            name = case if len(inputs) == 1 else f'{case}, {number + 1} of a batch'
            try:
                yield f'{name}: {compare(expected, found[number], description)}'
            except ExportError as error:
                raise ExportError(f'{name}: {error}') from error


def cases(image: np.ndarray, description: Description) -> Iterator[tuple[str, np.ndarray]]:
    """Yield inputs and their names: the image, the image at another size if allowed, and noise."""
    if description.size:
        # Equal results on padding would hide differences on the image.
        image = imresize(image, description.size[::-1])
        description = replace(description, resize=[])
    # Different images in a batch show whether results of one image affect those of another.
    flipped = [image, image[:, ::-1], image[::-1], image[::-1, ::-1]]
    batch = description.batch or 2
    yield make_case('the image', [flipped[i % 4] for i in range(batch)], description)
    if description.size is None:
        # Not square, and without size_divisor no multiple of any stride.
        size = tuple(
            n + missing_to_multiple(n, description.size_divisor)
            for n in (description.min_size + 134, description.min_size + 58)
        )
        other = imresize(image, size)
        yield make_case('another size', [other] * batch, replace(description, resize=[]))
    # In an image of one color, all positions would have equal scores, in arbitrary order.
    noise = np.random.default_rng(0).normal(114, 8, image.shape)
    blank = noise.clip(0, 255).astype(np.uint8)
    yield make_case('a blank image', [blank] * batch, description)


def make_case(
    name: str, images: list[np.ndarray], description: Description
) -> tuple[str, np.ndarray]:
    """Return images of one size as an input (batch, 3, height, width), and a name for it."""
    inputs = np.stack([description.fit(image)[0] for image in images])
    return f'{name} at {inputs.shape[2]}x{inputs.shape[3]}', inputs


def split(results: dict[str, np.ndarray], description: Description) -> list[Results]:
    """Split the results of a batch by image and drop the rows that only pad detections."""
    batch = len(next(iter(results.values())))
    each = [{name: values[i] for name, values in results.items()} for i in range(batch)]
    if description.task != 'detection':
        return each
    return [{name: values[r['labels'] >= 0] for name, values in r.items()} for r in each]


@torch.inference_mode()
def predict(model: nn.Module, description: Description, inputs: np.ndarray) -> list[Results]:
    """Predict each image of an exported file's input with mmdet or mmseg, by output name."""
    names, size = description.outputs, tuple(inputs.shape[2:])
    samples = [make_sample(model, size) for _ in inputs]
    images = list(torch.from_numpy(inputs))
    data = model.data_preprocessor({'inputs': images, 'data_samples': samples}, False)
    if description.task == 'backbone':
        maps = [batch.numpy() for batch in model.backbone(data['inputs'])]
        return [dict(zip(names, each, strict=True)) for each in zip(*maps, strict=True)]
    if description.task == 'detection':
        found = model.predict(data['inputs'], data['data_samples'], rescale=False)
        keys = {name: 'bboxes' if name == 'boxes' else name for name in names}
        return [
            {name: each.pred_instances[key].numpy() for name, key in keys.items()} for each in found
        ]
    found = model.predict(data['inputs'], data['data_samples'])
    if description.logits:
        return [{'logits': each.seg_logits.data.numpy()} for each in found]
    return [
        {'segmentation_map': each.pred_sem_seg.data[0].numpy().astype(np.int32)} for each in found
    ]


def make_sample(model: nn.Module, size: tuple[int, int]) -> BaseDataElement:
    """Return the data sample of an image of that height and width, as if never resized."""
    if is_segmentor(model):
        from mmseg.structures import SegDataSample as Sample
    else:
        from mmdet.structures import DetDataSample as Sample
    return Sample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)))


def pipeline_difference(exported: ExportedModel, model: TorchModel, image: np.ndarray) -> str:
    """Describe how results change because the file resizes and pads unlike PyTorch's pipeline."""
    found, expected = (
        each.postprocess(each.predict([each.preprocess(image)])[0], image.shape[:2])
        for each in (exported, model)
    )
    if isinstance(expected, Segmentation):
        return f'{percent(expected.seg_map == found.seg_map)} of pixels are the same'
    pairs = pair(vars(expected), vars(found), min_iou=0.5)
    total = max(len(expected.scores), len(found.scores))
    text = f'{len(pairs)} of {total} detections are the same objects'
    if not pairs:
        return text
    worst = max(pairs, key=lambda p: p.score_difference)
    before, after = expected.scores[worst.expected], found.scores[worst.found]
    return f'{text}, scores differ by up to {abs(after - before):.3f} ({before:.3f} -> {after:.3f})'


def size_in_pytorch(model: TorchModel, image: np.ndarray) -> tuple[int, int]:
    """Return an image's height and width after the test pipeline and the detector's padding."""
    divisor = Preprocessing(model.model.data_preprocessor).pad_divisor
    sides = model.preprocess(image)['inputs'].shape[1:]
    return tuple(side + missing_to_multiple(side, divisor) for side in sides)


def example_image(path: str | None, config: Config) -> np.ndarray:
    """Return the image of a file, else the first validation image of a config, else a photograph.

    The photograph comes last: if it has no object of the model's classes, a detector may find many
    false detections with nearly equal scores, in arbitrary order.
    """
    if path is not None:
        image = imread(path) if Path(path).is_file() else None
        if image is None:
            raise DataError(f'there is no image {path}, or it cannot be read')
        return image
    # A model can be exported without its data, whatever is wrong with them.
    with suppress(Exception):
        sample = build_images(next(datasets_of(config, ('val', 'test'))))[0]
        return sample['img'].astype(np.uint8)
    return photograph()


def photograph() -> np.ndarray:
    """Return a portrait that comes with matplotlib, (600, 512, 3), uint8, BGR."""
    return imread(cbook.get_sample_data('grace_hopper.jpg', asfileobj=False))
