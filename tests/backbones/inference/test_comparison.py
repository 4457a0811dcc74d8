"""test.py --show-dir: ground truth left, prediction right, each in the color of its class."""

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample

from backbones.inference.comparison import GAP, ComparisonHook, draw_comparison
from backbones.inference.drawing import Visualizer

NAMES = ['cat', 'dog']
WHITE = (255, 255, 255)
IMAGE = np.full((300, 400, 3), 128, np.uint8)


def halves(drawing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two drawings without captions and legend."""
    top = len(drawing) - len(IMAGE)
    assert drawing.shape[1] == 2 * 400 + GAP
    return drawing[top:, :400], drawing[top:, 400 + GAP :]


def test_boxes():
    sample = DetDataSample()
    sample.gt_instances = InstanceData(
        bboxes=HorizontalBoxes(torch.tensor([[100.0, 100, 200, 200]])), labels=torch.tensor([0])
    )
    sample.pred_instances = InstanceData(
        bboxes=torch.tensor([[150.0, 100, 250, 200], [10, 200, 60, 250]]),
        scores=torch.tensor([0.9, 0.4]),
        labels=torch.tensor([1, 1]),
    )
    visualizer = Visualizer(NAMES, [(255, 0, 0), (0, 255, 0)])
    left, right = halves(draw_comparison(visualizer, IMAGE, sample))
    red, green, gray = (0, 0, 255), (0, 255, 0), (128, 128, 128)
    assert tuple(left[150, 100]) == red and tuple(left[150, 150]) == gray
    assert tuple(right[150, 150]) == green and tuple(right[150, 100]) == gray
    assert tuple(right[225, 10]) == gray, 'below the threshold'


@pytest.fixture
def runner(tmp_path: Path) -> SimpleNamespace:
    """A test of images that lie in a folder."""
    meta = {'classes': NAMES, 'palette': [(255, 0, 0), (0, 255, 0)]}
    dataset = SimpleNamespace(metainfo=meta, data_prefix={'img': str(tmp_path / 'images')})
    return SimpleNamespace(test_dataloader=SimpleNamespace(dataset=dataset))


def empty_sample(path: Path) -> DetDataSample:
    """An image without objects, which is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), IMAGE)
    sample = DetDataSample(metainfo={'img_path': str(path)})
    sample.gt_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0).long())
    sample.pred_instances = sample.gt_instances.clone()
    sample.pred_instances.scores = torch.zeros(0)
    return sample


def test_each_image_has_a_drawing_of_its_own(tmp_path: Path, runner: SimpleNamespace):
    names = ['a.jpg', 'a.png', 'b/a.jpg']
    hook = ComparisonHook(tmp_path / 'drawn')
    hook.before_test(runner)
    samples = [empty_sample(tmp_path / 'images' / name) for name in names]
    hook.after_test_iter(runner, 0, {}, samples)
    drawings = [path for path in (tmp_path / 'drawn').rglob('*') if path.is_file()]
    found = sorted(path.relative_to(tmp_path / 'drawn').as_posix() for path in drawings)
    assert found == ['a.jpg', 'a.png.jpg', 'b/a.jpg']


def test_images_of_several_folders(tmp_path: Path, runner: SimpleNamespace, monkeypatch):
    """As of a ConcatDataset, which has no image folder of its own."""
    monkeypatch.chdir(tmp_path)
    del runner.test_dataloader.dataset.data_prefix
    hook = ComparisonHook('drawn')
    hook.before_test(runner)
    samples = [empty_sample(Path(name)) for name in ('night/1.jpg', 'day/1.jpg')]
    hook.after_test_iter(runner, 0, {}, samples)
    found = sorted(path.as_posix() for path in Path('drawn').rglob('*.jpg'))
    assert found == ['drawn/day/1.jpg', 'drawn/night/1.jpg']


def test_segmentation_maps():
    ground_truth = torch.full((1, 300, 400), 255)
    ground_truth[:, :, :100] = 1
    sample = SegDataSample()
    sample.gt_sem_seg = PixelData(data=ground_truth)
    sample.pred_sem_seg = PixelData(data=torch.zeros(1, 300, 400, dtype=torch.int64))
    visualizer = Visualizer(NAMES, [(255, 0, 0), (0, 255, 0)], opacity=1)
    drawing = draw_comparison(visualizer, IMAGE, sample)
    caption_height = next(row for row in range(99) if tuple(drawing[row, 300]) == (128, 128, 128))
    left = drawing[caption_height:, :400]
    right = drawing[caption_height:, 400 + GAP :]
    assert tuple(left[150, 50]) == (0, 255, 0)
    assert tuple(left[150, 300]) == (128, 128, 128), 'ignored pixels stay as they are'
    assert tuple(right[150, 50]) == (0, 0, 255)
    assert len(drawing) > 300 + caption_height, 'the legend'


def test_maps_of_many_classes():
    visualizer = Visualizer([f'class {n}' for n in range(300)], [(0, 0, 0)] * 256 + [WHITE] * 44, 1)
    sample = SegDataSample()
    sample.gt_sem_seg = PixelData(data=torch.full((1, 300, 400), 65535))
    sample.pred_sem_seg = PixelData(data=torch.full((1, 300, 400), 256))
    drawing = draw_comparison(visualizer, IMAGE, sample)
    assert tuple(drawing[150, 50]) == (128, 128, 128)
    assert tuple(drawing[150, 600]) == WHITE
