"""What is drawn over a image, and what is left as it was."""

import tracemalloc

import numpy as np
import pytest

from backbones.inference import drawing
from backbones.inference.drawing import (
    Visualizer,
    assign_shades,
    label_size,
    place_labels,
    readable_on,
    shade_of,
)
from backbones.inference.legend import SteadyClasses
from backbones.inference.masks import CroppedMask
from backbones.inference.results import Detections, Segmentation
from backbones.inference.text import fit_text, render_text

NAMES = ['cat', 'dog', 'größe']
PALETTE = [(200, 30, 40), (20, 180, 60), (240, 230, 90)]


def visualizer(names=NAMES, palette=PALETTE, **options):
    return Visualizer(names, palette, **options)


def image_of(height, width, seed=0):
    return np.random.default_rng(seed).integers(60, 200, (height, width, 3), dtype=np.uint8)


def detections_of(boxes, labels=None, scores=None, masks=None):
    count = len(boxes)
    return Detections(
        boxes=np.array(boxes, np.float32).reshape(count, 4),
        scores=np.linspace(0.99, 0.3, count, dtype=np.float32) if scores is None else scores,
        labels=np.zeros(count, np.int64) if labels is None else np.array(labels, np.int64),
        masks=masks,
    )


def changed(before, after):
    return (before != after).any(axis=2)


def test_nothing_found_leaves_the_image_as_it_is():
    image = image_of(90, 120)
    result = visualizer().draw_detections(image, detections_of([]))
    assert np.array_equal(result, image)
    assert not np.shares_memory(result, image)


def test_a_mask_is_tinted_in_its_class_color_and_the_rest_is_not():
    image = np.full((240, 320, 3), 100, np.uint8)
    mask = np.zeros((60, 80), bool)
    mask[:, :40] = True
    objects = detections_of([(100, 120, 180, 180)], [1], masks=[CroppedMask(100, 120, mask)])
    result = visualizer(opacity=0.25).draw_detections(image, objects)
    assert np.abs(result[150, 120] - np.array([60, 180, 20]) * 0.25 - 75).max() <= 1
    assert np.array_equal(result[150, 160], image[150, 160])


def test_nothing_changes_far_from_box_and_label():
    image = image_of(240, 320)
    result = visualizer().draw_detections(image, detections_of([(150, 120, 220, 180)]))
    assert changed(image, result)[120:180, 150:220].any()
    label_height, label_width = label_size(render_text('cat 0.99', 9).shape)
    near = np.zeros((240, 320), bool)
    near[120 - label_height : 180, 150 : max(220, 150 + label_width)] = True
    assert not changed(image, result)[~near].any()
    assert changed(image, result)[120 - label_height : 119].any()


def test_the_input_is_not_changed_and_drawing_again_gives_the_same():
    image = image_of(200, 300)
    image.setflags(write=False)
    mask = CroppedMask(20, 30, np.ones((50, 60), bool))
    objects = detections_of([(20, 30, 80, 80), (60, 40, 200, 180)], [0, 2], masks=[mask, mask])
    labels = Segmentation(np.arange(60000, dtype=np.uint8).reshape(200, 300) % 3)
    for draw in (
        lambda: visualizer().draw_detections(image, objects),
        lambda: visualizer().draw_segmentation(image, labels),
    ):
        assert np.array_equal(draw(), draw())


def test_the_surest_object_lies_on_top():
    box = (40, 60, 200, 180)
    result = visualizer().draw_detections(image_of(240, 320), detections_of([box, box], [1, 0]))
    assert tuple(result[179, 120]) == (60, 180, 20)


def test_instances_that_touch_have_different_shades_of_their_class():
    boxes = np.array([(0, 0, 50, 50), (40, 0, 90, 50), (80, 0, 130, 50), (300, 0, 350, 50)])
    shades = assign_shades(boxes, np.zeros(4, int))
    assert shades[0] == shades[3] == 0
    assert len({shades[0], shades[1]}) == len({shades[1], shades[2]}) == 2
    assert assign_shades(boxes, np.arange(4)) == [0] * 4
    colors = [shade_of((60, 180, 20), shade) for shade in range(5)]
    assert colors[0] == (60, 180, 20)
    differences = [np.abs(np.subtract(a, b)).max() for a in colors for b in colors if a is not b]
    assert min(differences) > 25


def test_thousands_of_objects_are_drawn_in_bounded_memory():
    rng = np.random.default_rng(0)
    starts, labels = rng.integers(0, 900, (4000, 2)), rng.integers(0, 3, 4000)
    boxes = np.hstack([starts, starts + rng.integers(4, 60, (4000, 2))])
    tracemalloc.start()
    visualizer().draw_detections(image_of(960, 960), detections_of(boxes, labels))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A fourth of the bytes that one number for each pair takes.
    assert peak < 2 * 4000**2 * 4
    assert len(set(assign_shades(boxes, labels))) == 5


def test_labels_never_cover_the_whole_image():
    objects = detections_of([(0, 0, 30, 30)] * 400)
    texts = visualizer()._label_texts(objects, np.arange(400), image_of(400, 400))
    assert len(texts) < 400
    assert 70_000 < sum(text.size for text in texts) < 90_000


def test_neighbors_of_one_class_are_parted_by_an_outline():
    image = np.full((240, 320, 3), 90, np.uint8)
    boxes = [(40, 60, 120, 180), (120, 60, 200, 180)]
    masks = [CroppedMask(x, 60, np.ones((120, 80), bool)) for x in (40, 120)]
    objects = detections_of(boxes, masks=masks)
    row = visualizer().draw_detections(image, objects)[120].astype(int)
    assert np.abs(row[119] - row[100]).max() > 30
    assert np.abs(row[120] - row[140]).max() > 30


BOXES = [
    (0, 0, 1, 1),
    (-50, -50, 20, 20),
    (5, 5, 5, 5),
    (5, 5, 5, 60),
    (30, 3, 10, 1),
    (1e9, 1e9, 2e9, 2e9),
    (-1e9, -1e9, 1e9, 1e9),
    (-20, -20, -10, -10),
]


@pytest.mark.parametrize('shape', [(1, 1), (1, 60), (60, 1), (3, 3), (80, 80), (100, 3000)])
@pytest.mark.parametrize('masks', [False, True])
def test_any_box_in_any_image(shape, masks):
    image = image_of(*shape)
    empty = [np.zeros((0, 0), bool), np.zeros((0, 1), bool), np.ones((1, 1), bool)] * 3
    objects = detections_of(
        BOXES, masks=[CroppedMask(0, 0, pixels) for pixels in empty[:8]] if masks else None
    )
    result = visualizer().draw_detections(image, objects)
    assert result.shape == image.shape
    assert changed(image, result).any()


def test_a_box_outside_the_image_is_not_drawn():
    image = image_of(120, 160)
    objects = detections_of([(170, 10, 200, 50), (-40, -40, -1, -1), (10, 130, 60, 180)])
    assert np.array_equal(visualizer().draw_detections(image, objects), image)


def test_labels_stay_inside_the_image():
    image = np.empty((200, 300, 3), np.uint8)
    corners = [(0, 0, 9, 9), (291, 0, 300, 9), (0, 191, 9, 200), (291, 191, 300, 200)]
    places = place_labels(np.array(corners), [(12, 100)] * 4, image)
    height, width = label_size((12, 100))
    assert all(0 <= x <= 300 - width and 0 <= y <= 200 - height for x, y in places)


def test_labels_avoid_each_other():
    boxes = np.array([(80, 80, 200, 140)] * 4)
    height, width = label_size((12, 60))
    places = place_labels(boxes, [(12, 60)] * 4, np.empty((300, 400, 3), np.uint8))
    covered = np.zeros((300, 400), int)
    for x, y in places:
        covered[y : y + height, x : x + width] += 1
    assert covered.max() == 1


def test_a_label_does_not_hide_a_small_object():
    (x, y), *_ = place_labels(
        np.array([(100, 100, 110, 108)]), [(12, 60)], np.empty((300, 400, 3), np.uint8)
    )
    height, width = label_size((12, 60))
    assert y + height <= 100 or y >= 108 or x + width <= 100 or x >= 110


def test_long_names_are_cut_and_small_images_have_no_text():
    name = 'a very long name ' * 30
    image = image_of(160, 160)
    one = Visualizer([name], PALETTE[:1])
    result = one.draw_detections(image, detections_of([(80, 80, 90, 90)]))
    columns = np.flatnonzero(changed(image, result).any(axis=0))
    assert columns[-1] - columns[0] < 90
    tiny = image_of(50, 50)
    result = one.draw_detections(tiny, detections_of([(20, 20, 40, 40)]))
    assert not changed(tiny, result)[:20].any()


@pytest.mark.parametrize('shape', [(720, 1280), (3000, 4000), (6000, 8000), (20_000, 20_000)])
def test_text_can_be_read_where_the_whole_image_is_shown_on_a_screen(shape):
    image = np.broadcast_to(np.uint8(0), (*shape, 3))
    shown = min(1280 / shape[1], 960 / shape[0], 1)
    assert drawing.font_size(image) * shown >= 9
    assert drawing.line_width(image) * shown >= 1


def test_text_is_readable_on_light_and_on_dark_colors():
    assert readable_on((0, 0, 70)) == (255, 255, 255)
    assert readable_on((20, 20, 230)) == (255, 255, 255)
    assert readable_on((200, 255, 250)) == (0, 0, 0)


@pytest.mark.parametrize(('one', 'other'), [('é', 'ü'), ('λ', 'μ'), ('ж', 'я')])
def test_letters_beyond_ascii_are_drawn(one, other):
    assert render_text(one, 20).any()
    assert not np.array_equal(render_text(one, 20), render_text(other, 20))
    missing = render_text('\U000f0000', 20)
    assert not np.array_equal(render_text(one, 20), missing)


@pytest.mark.parametrize('text', ['', ' \n\t', '猫 and 犬', '\ud800', '🚀', 'a\x00b'])
def test_any_text_is_drawn_on_one_line(text):
    assert render_text(text, 14).shape[0] == render_text('person', 14).shape[0]


@pytest.mark.parametrize('width', [0, 5, 20, 60, 400])
def test_fitted_text_is_as_long_as_it_can_be(width):
    fitted = fit_text('traffic light', 14, width)
    if fitted:
        assert render_text(fitted, 14).shape[1] <= width
        assert fitted == 'traffic light' or fitted.endswith('…')
    else:
        assert width < render_text('t…', 14).shape[1]


def halves(height, width, dtype=np.uint8):
    """The left half class 0, the right half class 1."""
    seg_map = np.zeros((height, width), dtype)
    seg_map[:, width // 2 :] = 1
    return seg_map


def test_regions_are_blended_with_their_colors():
    image = np.full((120, 160, 3), 100, np.uint8)
    result = visualizer(opacity=0.25).draw_segmentation(
        image, Segmentation(halves(120, 160)), False
    )
    assert np.abs(result[60, 20] - np.array([40, 30, 200]) * 0.25 - 75).max() <= 1
    assert np.abs(result[60, 140] - np.array([60, 180, 20]) * 0.25 - 75).max() <= 1


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_what_was_not_asked_for_keeps_its_colors(dtype):
    image, seg_map = image_of(120, 160), halves(120, 160, dtype)
    seg_map[30:90, 40:120] = np.iinfo(dtype).max
    result = visualizer().draw_segmentation(image, Segmentation(seg_map), False)
    unasked = seg_map == np.iinfo(dtype).max
    assert np.array_equal(result[unasked], image[unasked])
    assert changed(image, result)[~unasked].mean() > 0.95


@pytest.mark.parametrize('side', [180, 900])
def test_work_in_strips_shows_no_seams(monkeypatch, side):
    image = image_of(side, side)
    seg_map = np.random.default_rng(1).integers(0, 3, (side // 10, side // 10), dtype=np.uint8)
    segmentation = Segmentation(np.kron(seg_map, np.ones((10, 10), np.uint8)))
    mask = CroppedMask(20, 20, segmentation.seg_map[:100, :100] > 0)
    objects = detections_of([(20, 20, 120, 120)], masks=[mask])

    def draw():
        segmented = visualizer().draw_segmentation(image, segmentation)
        return segmented, visualizer().draw_detections(image, objects)

    whole = draw()
    monkeypatch.setattr(drawing, 'STRIP_PIXELS', side)
    for before, after in zip(whole, draw(), strict=True):
        assert np.array_equal(before, after)


def test_the_legend_below_leaves_the_image_alone():
    image, segmentation = image_of(240, 320), Segmentation(halves(240, 320))
    alone = visualizer().draw_segmentation(image, segmentation, False)
    result = visualizer().draw_segmentation(image, segmentation)
    assert result.shape[0] > 240 and result.shape[1] == 320
    assert np.array_equal(result[:240], alone)


def swatches(legend):
    """Which classes' colors a legend shows, by (first row, first column)."""
    found = {}
    for name, (red, green, blue) in zip(NAMES, PALETTE, strict=True):
        pixels = np.argwhere((legend == (blue, green, red)).all(axis=2))
        if len(pixels) > 20:
            found[name] = tuple(pixels.min(axis=0))
    return found


def test_the_legend_below_names_the_classes_that_are_there_the_largest_first():
    seg_map = np.full((240, 320), 2, np.uint8)
    seg_map[:80] = 0
    result = visualizer().draw_segmentation(image_of(240, 320), Segmentation(seg_map))
    found = swatches(result[240:])
    assert set(found) == {'cat', 'größe'}
    assert found['größe'][::-1] < found['cat'][::-1]


def test_the_legend_inside_takes_the_lower_left_corner_only():
    image, seg_map = image_of(240, 320), np.full((240, 320), 2, np.uint8)
    seg_map[:20] = 0
    alone = visualizer().draw_segmentation(image, Segmentation(seg_map), False)
    result = alone.copy()
    visualizer().draw_legend(result, [0, 2])
    assert result.shape == image.shape
    rows, columns = np.nonzero(changed(alone, result))
    assert rows.min() > 120 and columns.max() < 160
    found = swatches(result)
    assert set(found) == {'cat', 'größe'}
    assert found['cat'][0] < found['größe'][0]


def test_a_legend_of_hundreds_of_classes_is_cut():
    names = [f'class {index}' for index in range(250)]
    crowded = Visualizer(names, [(index, 90, 255 - index) for index in range(250)])
    image = image_of(250, 250)
    everything = Segmentation(np.arange(62500, dtype=np.uint32).reshape(250, 250) % 250)
    everything = Segmentation(everything.seg_map.astype(np.uint8))
    assert 250 < crowded.draw_segmentation(image, everything).shape[0] <= 375
    crowded.draw_legend(image, range(250))


@pytest.mark.parametrize('shape', [(1, 1), (1, 60), (60, 1), (80, 80), (90, 2000), (2000, 90)])
@pytest.mark.parametrize('legend', [True, False])
def test_a_segmentation_of_any_size(shape, legend):
    one = Visualizer(['a name that is far too long for a small image'], PALETTE[:1])
    image = image_of(*shape)
    result = one.draw_segmentation(image, Segmentation(np.zeros(shape, np.uint8)), legend)
    one.draw_legend(image.copy(), [0])
    assert result.shape[1] == shape[1] and result.shape[0] >= shape[0]
    assert changed(image, result[: shape[0]]).any()


def test_a_class_stays_in_a_video_legend_for_a_while():
    steady = SteadyClasses(hold=3, min_share=0.01)
    assert steady.update({4: 0.5, 1: 0.2, 7: 0.001}) == [1, 4]
    assert steady.update({4: 0.5}) == [1, 4]
    assert steady.update({4: 0.5, 1: 0.001}) == [1, 4]
    assert [steady.update({4: 0.5}) for _ in range(3)] == [[1, 4], [1, 4], [4]]


def test_letters_that_no_font_has_are_said():
    with pytest.warns(UserWarning, match='font'):
        render_text('\U0010fffd', 12)
