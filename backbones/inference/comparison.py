"""Ground truth and prediction side by side, drawn while tools/test.py tests."""

from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner
from pycocotools import mask as coco_mask

from .drawing import Visualizer, font_size, has_room_for_text
from .legend import INK, PAPER, Entry, legend_band
from .masks import crop_masks
from .output import encode_drawing
from .output_paths import mirrored_path
from .palette import choose_palette
from .results import Detections, Segmentation
from .text import line_height, paint, render_text

CAPTIONS = ('ground truth', 'prediction')
GAP = 4
# Detections below this are not drawn.
SCORE_THR = 0.5


class ComparisonHook(Hook):
    """Draws every test image twice, with its ground truth to the left of its prediction.

    Drawings go into ``folder``, at the images' paths below the dataset's image folder, or if it has
    none, at those that infer.py gives them: ``a.jpg`` for ``a.jpg``, but ``a.png.jpg`` for
    ``a.png``, since both may exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def before_test(self, runner: Runner) -> None:
        meta = runner.test_dataloader.dataset.metainfo
        palette = choose_palette(None, meta['classes'], meta.get('palette'))
        self.visualizer = Visualizer(meta['classes'], palette)

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict, outputs: list[Any]
    ) -> None:
        prefix = getattr(runner.test_dataloader.dataset, 'data_prefix', {})
        root = prefix.get('img_path') or prefix.get('img')
        for sample in outputs:
            image = Path(sample.img_path)
            is_below = root and image.is_relative_to(root)
            name = image.relative_to(root) if is_below else mirrored_path(sample.img_path)
            path = self.folder / name
            drawing = draw_comparison(self.visualizer, mmcv.imread(sample.img_path), sample.cpu())
            suffix, encoded = encode_drawing(drawing)
            if path.suffix != suffix:
                path = path.with_name(path.name + suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded)


def draw_comparison(visualizer: Visualizer, image: np.ndarray, sample: Any) -> np.ndarray:
    """Call :func:`draw_pair` for a DetDataSample or SegDataSample on the CPU, at image size."""
    if 'pred_sem_seg' in sample:
        count = len(visualizer.class_names)
        both = [to_map(pixels, count) for pixels in (sample.gt_sem_seg, sample.pred_sem_seg)]
        return draw_pair(visualizer, image, *both)
    prediction = to_detections(sample.pred_instances).select(SCORE_THR, None)
    return draw_pair(visualizer, image, to_detections(sample.gt_instances), prediction)


def draw_pair(
    visualizer: Visualizer,
    image: np.ndarray,
    ground_truth: Detections | Segmentation,
    prediction: Detections | Segmentation,
) -> np.ndarray:
    """Draw ground truth and prediction side by side, with captions and a legend; return BGR."""
    size, both = font_size(image), (ground_truth, prediction)
    drawings = [visualizer.draw(image, one, legend=False) for one in both]
    entries = []
    if isinstance(prediction, Segmentation):
        shares = visualizer.class_shares(np.hstack([one.seg_map for one in both]))
        entries = [
            Entry(visualizer.class_names[label], visualizer.colors[label])
            for label in sorted(shares, key=lambda label: -shares[label])
        ]
    body = cv2.hconcat([drawings[0], np.full((len(image), GAP, 3), PAPER, np.uint8), drawings[1]])
    if not has_room_for_text(image):
        return body
    width = body.shape[1]
    band = np.full((line_height(size) + size // 2, width, 3), PAPER, np.uint8)
    for caption, x in zip(CAPTIONS, (0, image.shape[1] + GAP), strict=True):
        paint(band, render_text(caption, size), x + size // 2, size // 4, INK)
    return cv2.vconcat([band, body, legend_band(entries, width, len(image), size)])


def to_map(pixels: Any, num_classes: int) -> Segmentation:
    """Convert a PixelData to a segmentation; ignored pixels get no class."""
    labels, dtype = pixels.data.squeeze(0).numpy(), np.uint8 if num_classes <= 255 else np.uint16
    return Segmentation(np.where(labels < num_classes, labels, np.iinfo(dtype).max).astype(dtype))


def to_detections(instances: Any) -> Detections:
    """Convert an InstanceData to detections; ground truth has no scores, smallest objects first."""
    boxes = instances.get('bboxes')
    boxes = getattr(boxes, 'tensor', boxes).numpy().astype(np.float32).reshape(-1, 4)
    labels = instances.labels.numpy()
    masks = instances.get('masks')
    if masks is not None:
        if isinstance(masks, list):
            # Run-length encoded.
            pixels = [coco_mask.decode(mask) for mask in masks]
        else:
            pixels = masks.to_ndarray() if hasattr(masks, 'to_ndarray') else masks.numpy()
        masks = crop_masks(pixels)
    scores = instances.get('scores')
    if scores is None:
        found = Detections(boxes, None, labels, masks)
        return found.at(np.argsort(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)))
    return Detections(boxes, scores.numpy().astype(np.float32), labels, masks)
