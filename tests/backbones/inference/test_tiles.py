"""Large images in tiles, compared with what numpy computes for the whole image."""

import copy
import json
import math
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from own_truth import use_predictions
from tool_process import run_tool
from trained_tiny import write_trained

from backbones.errors import ConfigError
from backbones.inference import CroppedMask, Detections, Inferencer, Segmentation
from backbones.inference.masks import CompressedMask, encode_mask
from backbones.inference.seg_maps import Logits
from backbones.inference.tile_merging import in_tile, merge, uncut
from backbones.inference.tiles import Axis, TiledModel, enlarge


class Segmentor:
    """The channels of an image are its logits, plus what ``change`` adds to those of a tile."""

    task, classes = 'segmentation', ('blue', 'green', 'red')

    def __init__(self, gives_logits: bool = True, change=None) -> None:
        self.gives_logits, self.change = gives_logits, change

    def preprocess(self, image):
        logits = image.transpose(2, 0, 1).astype(np.float32)
        return dict(inputs=logits + self.change(image) if self.change else logits)

    def predict(self, batch):
        return [item['inputs'] for item in batch]

    def predict_logits(self, batch):
        return [Logits.of(torch.from_numpy(raw)) for raw in self.predict(batch)]

    def postprocess(self, raw, size):
        return Segmentation(raw.argmax(axis=0).astype(np.uint8))


class Detector:
    """Finds the rectangles of one color, one for each gray level, where they are visible."""

    task, classes, nms_threshold = 'detection', ('rectangle',), 0.5

    def __init__(self, has_masks: bool = False) -> None:
        self.has_masks, self.sizes = has_masks, []

    def preprocess(self, image):
        self.sizes.append(image.shape[:2])
        return dict(inputs=image)

    def predict(self, batch):
        return [item['inputs'] for item in batch]

    def postprocess(self, raw, size):
        levels = [level for level in np.unique(raw) if level]
        rects = [cv2.boundingRect((raw[..., 0] == level).view(np.uint8)) for level in levels]
        boxes = np.float32([(x, y, x + w, y + h) for x, y, w, h in rects]).reshape(-1, 4)
        masks = [CroppedMask(x, y, raw[y : y + h, x : x + w, 0] == level)
                 for level, (x, y, w, h) in zip(levels, rects, strict=True)]  # fmt: skip
        scores = np.float32([0.5 + level / 1000 for level in levels])
        labels = np.zeros(len(levels), np.int64)
        return Detections(boxes, scores, labels, masks if self.has_masks else None)


def run(model, image, *args, **kwargs):
    tiled = TiledModel(model, *args, **kwargs)
    return tiled.postprocess(tiled.predict([tiled.preprocess(image)])[0], image.shape[:2])


@pytest.mark.parametrize('length', [100, 101, 333, 1000])
@pytest.mark.parametrize(('tile', 'overlap'), [(100, 0), (100, 0.2), (64, 0.6), (70, 0.89)])
def test_tiles_cover_a_side_evenly_and_weigh_less_towards_their_borders(length, tile, overlap):
    axis = Axis(length, tile, overlap)
    starts = [each.start for each in axis.tiles]
    assert starts[0] == 0 and axis.tiles[-1].stop == length
    assert {each.stop - each.start for each in axis.tiles} == {min(tile, length)}
    steps = np.diff(starts)
    assert len(steps) == 0 or (steps.max() <= tile * (1 - overlap) + 1 and np.ptp(steps) <= 1)
    assert [each.start for each in axis.beginnings] == starts
    assert [each.stop for each in axis.beginnings] == [*starts[1:], length]
    # Only the image's own edge is no border.
    assert axis.weights[0, 0] == axis.weights[0].max()
    assert axis.weights[-1, -1] == axis.weights[-1].max()
    if len(steps):
        assert axis.weights[1, 0] == axis.weights[0, -1] == 0.5


@pytest.mark.parametrize('gives_logits', [True, False])
@pytest.mark.parametrize(('tile', 'overlap'), [(100, 0), (128, 0.25), (64, 0.85), (299, 0.2)])
def test_what_a_pixel_alone_decides_is_the_same_in_tiles(gives_logits, tile, overlap):
    image = np.random.default_rng(0).permutation(3 * 201 * 300).reshape(201, 300, 3)
    image = (image % 256).astype(np.uint8)
    found = run(Segmentor(gives_logits), image, tile, overlap, batch_size=3)
    distinct = (np.sort(image, axis=2)[..., 1:] > np.sort(image, axis=2)[..., :-1])[..., -1]
    np.testing.assert_array_equal(found.seg_map[distinct], image.argmax(axis=2)[distinct])


def disagree(image):
    """Each tile's own weights for its three classes, told by its first pixel."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width] / 37
    seed = int(image[0, 0, 0])
    return np.stack([np.sin(seed + k + x * (k + 1) + y) for k in range(3)]).astype(np.float32)


def test_logits_are_averaged_by_the_distance_from_the_border():
    image = np.zeros((150, 230, 3), np.uint8)
    image[..., 0] = np.arange(230)
    image = image // 9 * 9
    model = Segmentor(change=lambda tile: disagree(tile) * 50)
    tile, overlap = 100, 0.3
    found = run(model, image, tile, overlap).seg_map
    # As the definition says, over the whole image.
    total = np.zeros((3, 150, 230))
    weights = np.zeros((150, 230))
    for top in (0, 50):
        for left in (0, 65, 130):
            part = image[top : top + tile, left : left + tile]
            y, x = np.mgrid[:tile, :tile] + 0.5
            down = tile - y if top == 0 else y
            across = {0: tile - x, 65: np.minimum(x, tile - x), 130: x}[left]
            place = np.s_[top : top + tile, left : left + tile]
            total[(slice(None), *place)] += down * across * model.preprocess(part)['inputs']
            weights[place] += down * across
    logits = total / weights
    best = np.sort(logits, axis=0)
    clear = best[-1] - best[-2] > 1e-2
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(found[clear], logits.argmax(axis=0)[clear])


def test_of_class_maps_the_tile_in_whose_middle_a_pixel_lies_decides():
    image = np.zeros((100, 180, 3), np.uint8)
    image[:, 80:, 1] = 1
    # The second tile, from column 80 on, sees the third class everywhere.
    model = Segmentor(False, lambda tile: (tile[0, 0, 1] * np.float32([0, 0, 9]))[:, None, None])
    found = run(model, image, 100, 0.2).seg_map
    # Without it the second class would win from there on.
    np.testing.assert_array_equal(found, np.tile(np.repeat([0, 1, 2], [80, 10, 90]), (100, 1)))


def test_an_image_no_larger_than_a_tile_is_left_alone():
    image = np.random.default_rng(0).integers(0, 255, (128, 100, 3), np.uint8)
    tiled = TiledModel(Segmentor(), 128)
    np.testing.assert_array_equal(
        tiled.preprocess(image)['inputs'], Segmentor().preprocess(image)['inputs']
    )


def rectangles(*places: tuple[int, int, int, int], size: int = 400) -> np.ndarray:
    """A black image with a rectangle, (left, top, right, bottom), for each gray level."""
    image = np.zeros((size, size, 3), np.uint8)
    for level, (left, top, right, bottom) in enumerate(places, 1):
        image[top:bottom, left:right] = 10 * level
    return image


# Tiles of 100 begin at 0, 75, 150, 225 and 300: 25 pixels are shared.
PLACES = {
    'inside a tile': (10, 10, 50, 60),
    'seen whole by two tiles': (78, 20, 96, 40),
    'cut by one border': (60, 20, 120, 60),
    'cut by borders of four tiles': (50, 50, 130, 140),
    'over three tiles': (40, 20, 240, 60),
    'over nine tiles, larger than any': (60, 60, 260, 270),
    'the whole image': (0, 0, 400, 400),
}


@pytest.mark.parametrize('has_masks', [False, True])
@pytest.mark.parametrize('place', PLACES.values(), ids=PLACES)
def test_an_object_is_found_once_wherever_borders_cut_it(place, has_masks):
    image = rectangles(place)
    model = Detector(has_masks)
    found = run(model, image, 100, 0.2)
    np.testing.assert_array_equal(found.boxes, [place])
    assert found.labels.tolist() == [0] and found.scores[0] == np.float32(0.51)
    if has_masks:
        whole = encode_mask(CroppedMask(0, 0, image[..., 0] > 0), (400, 400))
        assert encode_mask(found.masks[0], (400, 400)) == whole
        assert isinstance(found.masks[0], CompressedMask)
    # Twenty-five tiles, then the whole.
    assert model.sizes == [(100, 100)] * 25 + [(400, 400)]


def test_neighbors_of_one_class_stay_two():
    # The border at 100 cuts both; they lie below each other.
    places = [(60, 10, 140, 40), (60, 42, 140, 72)]
    found = run(Detector(has_masks=True), rectangles(*places), 100, 0.2)
    assert sorted(found.boxes.tolist()) == [list(place) for place in places]


# Of an image of 100x180 pixels.
TWO_TILES = np.array([(0, 0, 100, 100), (80, 0, 180, 100)])


def merge_two(left: Detections, right: Detections, nms_threshold: float = 0.5) -> Detections:
    """What is found in two tiles, where the pass over the whole image finds nothing."""
    both = ((0, left), (1, right))
    pieces = [in_tile(found, tile, TWO_TILES, (100, 180)) for tile, found in both]
    return merge(pieces, TWO_TILES, nms_threshold)


def found_at(*boxes: list[float], score: float = 0.6, label: int = 2) -> Detections:
    count = len(boxes)
    return Detections(np.float32(boxes), np.float32([score] * count), np.int64([label] * count))


def test_parts_without_the_whole_are_joined():
    found = merge_two(found_at([60, 10, 99, 50]), found_at([0, 12, 70, 52], score=0.8))
    assert found.boxes.tolist() == [[60, 10, 150, 52]]
    assert found.scores.tolist() == [np.float32(0.8)] and found.labels.tolist() == [2]


def test_duplicates_are_the_same_whatever_the_number_of_the_class():
    """Small objects in a large image, of the first class and of one of LVIS's last."""
    start = np.random.default_rng(0).uniform(15_000, 19_000, (500, 2))
    boxes = np.vstack([np.hstack([start + shift, start + shift + 10]) for shift in (0, 3.3)])
    first, last = (
        merge([uncut(found_at(*boxes, label=label))], np.array([[0, 0, 20_000, 20_000]]), 0.3)
        for label in (0, 1202)
    )
    np.testing.assert_array_equal(first.boxes, last.boxes)


@pytest.mark.parametrize('change', ['class', 'place', 'not cut'])
def test_what_does_not_match_is_not_joined(change):
    second = {'class': [0, 12, 70, 52], 'place': [0, 42, 70, 82], 'not cut': [8, 12, 78, 52]}
    other = found_at(second[change], label=3 if change == 'class' else 2)
    assert len(merge_two(found_at([60, 10, 99, 50]), other).boxes) == 2


@pytest.mark.parametrize(
    ('score', 'label', 'remains'),
    [(0.9, 2, False), (0.5, 2, False), (0.3, 2, True), (0.9, 3, True)],
)
def test_parts_in_a_better_detection_go(score, label, remains):
    """Score 0.8 for the parts: a whole that is as good as half of it is better."""
    parts = found_at([85, 10, 100, 40], [85, 60, 100, 90], score=0.8)
    wholes = found_at([5, 10, 70, 40], [5, 60, 70, 90], score=score, label=label)
    assert len(merge_two(parts, wholes).boxes) == (4 if remains else 2)


@pytest.mark.parametrize(('label', 'threshold', 'count'), [(2, 0.5, 1), (2, 0.95, 2), (3, 0.5, 2)])
def test_suppression_is_by_the_models_threshold_and_within_a_class(label, threshold, count):
    """Boxes with an IoU of 0.9."""
    left, right = found_at([85, 10, 95, 50]), found_at([5, 10, 14, 50], label=label)
    assert len(merge_two(left, right, threshold).boxes) == count


class WholeDetector(Detector):
    """Finds two objects, a small and a large one, in the whole image alone."""

    def postprocess(self, raw, size):
        boxes = np.float32([[10, 10, 34, 34], [10, 10, 300, 34]])
        found = Detections(boxes, np.float32([0.9, 0.8]), np.int64([0, 0]))
        return found if size == (400, 400) else found.at(np.arange(0))


def test_small_objects_of_the_whole_image_do_not_count():
    """Made smaller, they are worse than those of the tiles."""
    found = run(WholeDetector(), rectangles(), 100, 0.2)
    assert found.boxes.tolist() == [[10, 10, 300, 34]]


def test_a_very_large_image_is_made_smaller_for_the_whole(monkeypatch):
    monkeypatch.setattr('backbones.inference.tiles.MAX_WHOLE', 256)
    place = (440, 80, 500, 300)
    model = Detector(has_masks=True)
    found = run(model, rectangles(place, size=512)[:400], 100, 0.2)
    assert model.sizes[-1] == (200, 256)
    np.testing.assert_array_equal(found.boxes, [place])
    assert found.masks[0].pixels.all() and found.masks[0].shape == (220, 60)


def test_what_is_found_in_a_smaller_image_is_enlarged():
    masks = [CroppedMask(30, 5, np.ones((10, 20), bool))]
    found = Detections(np.float32([[30, 5, 50, 15]]), np.float32([0.5]), np.int64([0]), masks)
    large = enlarge(found, (20, 50), (61, 150))
    np.testing.assert_allclose(large.boxes, [[90, 15.25, 150, 45.75]])
    (mask,) = large.masks
    assert (mask.x, mask.y, mask.shape) == (90, 15, (30, 60)) and mask.pixels.all()


@pytest.mark.parametrize('is_terminal', [True, False])
def test_a_terminal_shows_how_many_tiles_are_done(is_terminal, monkeypatch, capsys):
    monkeypatch.setattr('backbones.inference.tiles.BAR_DELAY', 0)
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: is_terminal)
    run(Detector(), rectangles(), 100)
    assert ('/25 ' in capsys.readouterr().err) == is_terminal


def test_nothing_found_is_no_detection():
    found = run(Detector(has_masks=True), rectangles(), 100, 0.2)
    assert found.boxes.shape == (0, 4) and len(found.scores) == 0


def test_a_compressed_mask_is_the_same():
    pixels = np.random.default_rng(0).random((37, 53)) > 0.5
    mask = copy.deepcopy(CompressedMask(CroppedMask(3, 4, pixels)))
    assert isinstance(mask, CroppedMask)
    assert (mask.x, mask.y, mask.shape) == (3, 4, (37, 53))
    np.testing.assert_array_equal(mask.pixels, pixels)
    assert CompressedMask(CroppedMask(0, 0, pixels[:0])).pixels.shape == (0, 53)


@pytest.mark.parametrize('tile', [-1, 16, 63])
def test_a_tile_that_is_too_small_is_refused(tile):
    with pytest.raises(ConfigError, match='too small'):
        TiledModel(Segmentor(), tile)


@pytest.mark.parametrize('overlap', [-0.1, 0.9, 1.5, math.nan])
def test_an_overlap_that_cannot_work_is_refused(overlap):
    with pytest.raises(ConfigError, match='overlap'):
        TiledModel(Segmentor(), 128, overlap)


@pytest.mark.parametrize('task', ['fpn', 'mask_rcnn'])
def test_a_network_in_tiles(task, tmp_path, shapes):
    """Small images are as without tiles, also in a batch with large ones; large ones are whole."""
    model = write_trained(tmp_path, task, shapes)
    rng = np.random.default_rng(0)
    small = [rng.integers(0, 255, (96, 128, 3), np.uint8) for _ in range(2)]
    large = cv2.resize(small[0], (300, 200))
    options = dict(score_thr=0.0, batch_size=2)
    plain = [result.prediction for result in Inferencer(*model, **options)(small)]
    tiled = [
        result.prediction for result in Inferencer(*model, tile=128, **options)([*small, large])
    ]
    for one, other in zip(plain, tiled[:2], strict=True):
        if task == 'fpn':
            np.testing.assert_array_equal(one.seg_map, other.seg_map)
            continue
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.scores, other.scores)
    if task == 'fpn':
        assert tiled[2].seg_map.shape == (200, 300) and len(np.unique(tiled[2].seg_map)) > 1
        return
    # More than the ten of one image.
    assert len(tiled[2].boxes) > 10 and (np.diff(tiled[2].scores) <= 0).all()
    assert (tiled[2].boxes.min(axis=0) >= 0).all()
    assert (tiled[2].boxes.max(axis=0) <= (300, 200, 300, 200)).all()
    for mask in tiled[2].masks:
        assert mask.x + mask.shape[1] <= 300 and mask.y + mask.shape[0] <= 200


@pytest.mark.parametrize('task', ['fpn', 'mask_rcnn'])
def test_a_test_in_tiles_measures_the_predictions_of_infer(task, tmp_path, shapes):
    config, checkpoint = write_trained(tmp_path, task, shapes)
    inferencer = Inferencer(config, checkpoint, tile=96, overlap=0.3, score_thr=0.0)
    options = ['--tile', '96', '--overlap', '0.3', '--out', 'metrics.json']
    if task == 'fpn':
        images = sorted((shapes / 'ade/images/validation').iterdir())
        counts = np.zeros((7, 7))
        for result in inferencer(images):
            annotation = shapes / 'ade/annotations/validation' / f'{Path(result.source).stem}.png'
            truth = cv2.imread(str(annotation), cv2.IMREAD_UNCHANGED).astype(int) - 1
            np.add.at(counts, (truth, result.prediction.seg_map), 1)
        both = counts.diagonal()
        name, expected = 'mIoU', 100 * (both / (counts.sum(0) + counts.sum(1) - both)).mean()
    else:
        options.append('--cfg-options')
        options += use_predictions(
            tmp_path / 'own.json', shapes, lambda path: next(inferencer(path)).prediction
        )
        name, expected = 'coco/segm_mAP', 1.0
    done = run_tool(tmp_path, 'test.py', config, checkpoint, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics[name] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ('tool', 'options'),
    [
        ('test.py', ['--tile', '96', '--tta']),
        ('test.py', ['--overlap', '0.3']),
        ('infer.py', ['image.jpg', '--overlap', '0.3']),
    ],
)
def test_options_that_need_or_exclude_tiles(tool, options, tmp_path, shapes):
    """An overlap is never ignored."""
    config, checkpoint = write_trained(tmp_path, 'fpn', shapes)
    cv2.imwrite(str(tmp_path / 'image.jpg'), rectangles())
    done = run_tool(tmp_path, tool, config, checkpoint, *options)
    assert done.returncode == 1 and '--tile' in done.stderr and 'Traceback' not in done.stderr
