"""The last step of a segmentor in exported files: the class with the highest resized logit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exporting import needs_export
from torch import Tensor, nn

from backbones.export.formats import write
from backbones.inference.exported_file import Description, open_exported

pytestmark = needs_export


class LastStep(nn.Module):
    """Logits at a quarter of the size of the images, a third of the classes copies of others."""

    def __init__(self, classes: int, align_corners: bool) -> None:
        super().__init__()
        self.copies = classes // 3
        self.logits = nn.Conv2d(3, classes - self.copies, 1)
        self.align_corners = align_corners

    def forward(self, images: Tensor) -> Tensor:
        logits = self.logits(F.avg_pool2d((images - 127) / 16, 4, ceil_mode=True))
        logits = torch.cat([logits, logits[:, : self.copies]], dim=1)
        resize = dict(mode='bilinear', align_corners=self.align_corners)
        return F.interpolate(logits, images.shape[-2:], **resize).argmax(dim=1).to(torch.int32)


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Path]:
    def make(step: nn.Module, suffix: str, **settings: object) -> Path:
        description = dict(task='segmentation', outputs=['segmentation_map'], model='', classes=())
        description |= dict(palette=None, resize=[], mean=(), std=(), pad_pixel=())
        description |= dict(missing_transforms=[], min_size=17)
        path = tmp_path / f'model{suffix}'
        write(step, path, Description(**description, **settings))
        return path

    return make


@pytest.mark.parametrize('suffix', ['.onnx', '.xml'])
@pytest.mark.parametrize('dynamic', [False, True])
@pytest.mark.parametrize(
    ('classes', 'align_corners'),
    [
        (2, False),
        pytest.param(19, True, marks=pytest.mark.slow),
        pytest.param(150, False, marks=pytest.mark.slow),
        (150, True),
        pytest.param(300, False, marks=pytest.mark.slow),
    ],
)
def test_maps_are_those_of_interpolate_and_argmax(
    exported, suffix, dynamic, classes, align_corners
):
    torch.manual_seed(0)
    step = LastStep(classes, align_corners).eval()
    size, batch = (None, None) if dynamic else ((64, 96), 2)
    run = open_exported(exported(step, suffix, size=size, batch=batch), 'cpu')
    # In float32 torch resizes equal channels of small maps to unequal ones.
    step.double()
    for shape in [(2, 3, 64, 96), *([(1, 3, 97, 203), (3, 3, 17, 34)] if dynamic else [])]:
        images = torch.rand(shape) * 255
        with torch.no_grad():
            expected = step(images.double()).numpy()
        found = run(images.numpy())['segmentation_map']
        assert found.dtype == np.int32
        # Rounding decides between classes that are nearly equal.
        assert np.sum(found != expected) <= 2 + 1e-4 * found.size
        assert len(np.unique(found)) > 1 and found.max() < classes


def test_maps_in_mixed_precision(exported):
    torch.manual_seed(0)
    step = LastStep(150, False).eval()
    path = exported(step, '.xml', size=(64, 96), batch=1)
    images = torch.rand(1, 3, 64, 96) * 255
    with torch.no_grad():
        expected = step(images).numpy()
    found = open_exported(path, 'cpu', amp=True)(images.numpy())['segmentation_map']
    assert np.mean(found == expected) >= 0.9
