"""What is drawn over a picture, and what is left as it was."""

import numpy as np
import pytest

from backbones.inference import drawing
from backbones.inference.drawing import Artist, label_size, place_labels, readable_on
from backbones.inference.legend import SteadyClasses
from backbones.inference.prediction import CroppedMask, Detections, Segmentation
from backbones.inference.text import fit_text, paint, render_text

NAMES = ['cat', 'dog', 'größe']
PALETTE = [(200, 30, 40), (20, 180, 60), (240, 230, 90)]


def artist(names=NAMES, palette=PALETTE, **options):
    return Artist(names, palette, **options)


def picture_of(height, width, seed=0):
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


def test_nothing_found_leaves_the_picture_as_it_is():
    picture = picture_of(90, 120)
    result = artist().draw_detections(picture, detections_of([]))
    assert np.array_equal(result, picture)
    assert not np.shares_memory(result, picture)


def test_a_mask_is_tinted_in_its_class_colour_and_the_rest_is_not():
    picture = np.full((240, 320, 3), 100, np.uint8)
    mask = np.zeros((60, 80), bool)
    mask[:, :40] = True
    objects = detections_of([(100, 120, 180, 180)], [1], masks=[CroppedMask(100, 120, mask)])
    result = artist(opacity=0.25).draw_detections(picture, objects)
    assert np.abs(result[150, 120] - np.array([60, 180, 20]) * 0.25 - 75).max() <= 1
    assert np.array_equal(result[150, 160], picture[150, 160])


def test_nothing_changes_far_from_box_and_label():
    picture = picture_of(240, 320)
    result = artist().draw_detections(picture, detections_of([(150, 120, 220, 180)]))
    assert changed(picture, result)[120:180, 150:220].any()
    label_height, label_width = label_size(render_text('cat 0.99', 9).shape)
    near = np.zeros((240, 320), bool)
    near[120 - label_height : 180, 150 : max(220, 150 + label_width)] = True
    assert not changed(picture, result)[~near].any()
    assert changed(picture, result)[120 - label_height : 119].any()


def test_the_input_is_not_changed_and_drawing_again_gives_the_same():
    picture = picture_of(200, 300)
    picture.setflags(write=False)
    mask = CroppedMask(20, 30, np.ones((50, 60), bool))
    objects = detections_of([(20, 30, 80, 80), (60, 40, 200, 180)], [0, 2], masks=[mask, mask])
    labels = Segmentation(np.arange(60000, dtype=np.uint8).reshape(200, 300) % 3)
    for draw in (
        lambda: artist().draw_detections(picture, objects),
        lambda: artist().draw_segmentation(picture, labels),
    ):
        assert np.array_equal(draw(), draw())


def test_the_surest_object_lies_on_top():
    box = (40, 60, 200, 180)
    result = artist().draw_detections(picture_of(240, 320), detections_of([box, box], [1, 0]))
    assert tuple(result[179, 120]) == (60, 180, 20)


def test_neighbours_of_one_class_are_parted_by_an_outline():
    picture = np.full((240, 320, 3), 90, np.uint8)
    boxes = [(40, 60, 120, 180), (120, 60, 200, 180)]
    masks = [CroppedMask(x, 60, np.ones((120, 80), bool)) for x in (40, 120)]
    objects = detections_of(boxes, masks=masks)
    row = artist().draw_detections(picture, objects)[120].astype(int)
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
def test_any_box_in_any_picture(shape, masks):
    picture = picture_of(*shape)
    empty = [np.zeros((0, 0), bool), np.zeros((0, 1), bool), np.ones((1, 1), bool)] * 3
    objects = detections_of(
        BOXES, masks=[CroppedMask(0, 0, pixels) for pixels in empty[:8]] if masks else None
    )
    result = artist().draw_detections(picture, objects)
    assert result.shape == picture.shape
    assert changed(picture, result).any()


def test_a_box_outside_the_picture_is_not_drawn():
    picture = picture_of(120, 160)
    objects = detections_of([(170, 10, 200, 50), (-40, -40, -1, -1), (10, 130, 60, 180)])
    assert np.array_equal(artist().draw_detections(picture, objects), picture)


def test_labels_stay_inside_the_picture():
    picture = np.empty((200, 300, 3), np.uint8)
    corners = [(0, 0, 9, 9), (291, 0, 300, 9), (0, 191, 9, 200), (291, 191, 300, 200)]
    places = place_labels(np.array(corners), [(12, 100)] * 4, picture)
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


def test_long_names_are_cut_and_small_pictures_have_no_text():
    name = 'a very long name ' * 30
    picture = picture_of(160, 160)
    one = Artist([name], PALETTE[:1])
    result = one.draw_detections(picture, detections_of([(80, 80, 90, 90)]))
    columns = np.flatnonzero(changed(picture, result).any(axis=0))
    assert columns[-1] - columns[0] < 90
    tiny = picture_of(50, 50)
    result = one.draw_detections(tiny, detections_of([(20, 20, 40, 40)]))
    assert not changed(tiny, result)[:20].any()


@pytest.mark.parametrize('shape', [(720, 1280), (3000, 4000), (6000, 8000), (20_000, 20_000)])
def test_text_can_be_read_where_the_whole_picture_is_shown_on_a_screen(shape):
    picture = np.broadcast_to(np.uint8(0), (*shape, 3))
    shown = min(1280 / shape[1], 960 / shape[0], 1)
    assert drawing.font_size(picture) * shown >= 9
    assert drawing.line_width(picture) * shown >= 1


def test_text_is_readable_on_light_and_on_dark_colours():
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


def test_paint_leaves_out_what_is_outside():
    picture = np.zeros((10, 12, 3), np.uint8)
    bitmap = np.full((6, 6), 255, np.uint8)
    for x, y in [(-3, -3), (9, 7), (50, 50), (-50, 2)]:
        paint(picture, bitmap, x, y, (1, 2, 3))
    assert (picture[:3, :3] == (1, 2, 3)).all() and (picture[7:, 9:] == (1, 2, 3)).all()
    assert changed(picture, np.zeros_like(picture)).sum() == 18


def halves(height, width, dtype=np.uint8):
    """The left half class 0, the right half class 1."""
    label_map = np.zeros((height, width), dtype)
    label_map[:, width // 2 :] = 1
    return label_map


def test_regions_are_blended_with_their_colours():
    picture = np.full((120, 160, 3), 100, np.uint8)
    result = artist(opacity=0.25).draw_segmentation(picture, Segmentation(halves(120, 160)), 'none')
    assert np.abs(result[60, 20] - np.array([40, 30, 200]) * 0.25 - 75).max() <= 1
    assert np.abs(result[60, 140] - np.array([60, 180, 20]) * 0.25 - 75).max() <= 1


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_what_was_not_asked_for_keeps_its_colours(dtype):
    picture, label_map = picture_of(120, 160), halves(120, 160, dtype)
    label_map[30:90, 40:120] = np.iinfo(dtype).max
    result = artist().draw_segmentation(picture, Segmentation(label_map), 'none')
    unasked = label_map == np.iinfo(dtype).max
    assert np.array_equal(result[unasked], picture[unasked])
    assert changed(picture, result)[~unasked].mean() > 0.95


def test_nothing_asked_for_leaves_the_picture_as_it_is():
    picture = picture_of(120, 160)
    nothing = Segmentation(np.full((120, 160), 255, np.uint8))
    for legend in ('below', 'inside', 'none'):
        assert np.array_equal(artist().draw_segmentation(picture, nothing, legend), picture)


def test_label_maps_of_8_and_16_bits_look_the_same():
    picture = picture_of(120, 160)
    results = [
        artist().draw_segmentation(picture, Segmentation(halves(120, 160, dtype)))
        for dtype in (np.uint8, np.uint16)
    ]
    assert np.array_equal(*results)


@pytest.mark.parametrize('side', [180, 900])
def test_work_in_strips_shows_no_seams(monkeypatch, side):
    picture = picture_of(side, side)
    label_map = np.random.default_rng(1).integers(0, 3, (side // 10, side // 10), dtype=np.uint8)
    segmentation = Segmentation(np.kron(label_map, np.ones((10, 10), np.uint8)))
    mask = CroppedMask(20, 20, segmentation.label_map[:100, :100] > 0)
    objects = detections_of([(20, 20, 120, 120)], masks=[mask])

    def draw():
        segmented = artist().draw_segmentation(picture, segmentation)
        return segmented, artist().draw_detections(picture, objects)

    whole = draw()
    monkeypatch.setattr(drawing, 'STRIP_PIXELS', side)
    for before, after in zip(whole, draw(), strict=True):
        assert np.array_equal(before, after)


def test_the_legend_below_leaves_the_picture_alone():
    picture, segmentation = picture_of(240, 320), Segmentation(halves(240, 320))
    alone = artist().draw_segmentation(picture, segmentation, 'none')
    result = artist().draw_segmentation(picture, segmentation, 'below')
    assert result.shape[0] > 240 and result.shape[1] == 320
    assert np.array_equal(result[:240], alone)


def swatches(legend):
    """Which classes' colours a legend shows, by (first row, first column)."""
    found = {}
    for name, (red, green, blue) in zip(NAMES, PALETTE, strict=True):
        pixels = np.argwhere((legend == (blue, green, red)).all(axis=2))
        if len(pixels) > 20:
            found[name] = tuple(pixels.min(axis=0))
    return found


def test_the_legend_below_names_the_classes_that_are_there_the_largest_first():
    label_map = np.full((240, 320), 2, np.uint8)
    label_map[:80] = 0
    result = artist().draw_segmentation(picture_of(240, 320), Segmentation(label_map))
    found = swatches(result[240:])
    assert set(found) == {'cat', 'größe'}
    assert found['größe'][::-1] < found['cat'][::-1]


def test_the_legend_inside_takes_the_lower_left_corner_only():
    picture, label_map = picture_of(240, 320), np.full((240, 320), 2, np.uint8)
    label_map[:20] = 0
    alone = artist().draw_segmentation(picture, Segmentation(label_map), 'none')
    result = artist().draw_segmentation(picture, Segmentation(label_map), 'inside')
    assert result.shape == picture.shape
    rows, columns = np.nonzero(changed(alone, result))
    assert rows.min() > 120 and columns.max() < 160
    found = swatches(result)
    assert set(found) == {'cat', 'größe'}
    assert found['cat'][0] < found['größe'][0]


def test_a_legend_of_hundreds_of_classes_is_cut():
    names = [f'class {index}' for index in range(250)]
    crowded = Artist(names, [(index, 90, 255 - index) for index in range(250)])
    picture = picture_of(250, 250)
    everything = Segmentation(np.arange(62500, dtype=np.uint32).reshape(250, 250) % 250)
    everything = Segmentation(everything.label_map.astype(np.uint8))
    assert 250 < crowded.draw_segmentation(picture, everything).shape[0] <= 375
    assert crowded.draw_segmentation(picture, everything, 'inside').shape == picture.shape


@pytest.mark.parametrize('shape', [(1, 1), (1, 60), (60, 1), (80, 80), (90, 2000), (2000, 90)])
@pytest.mark.parametrize('legend', ['below', 'inside', 'none'])
def test_a_segmentation_of_any_size(shape, legend):
    one = Artist(['a name that is far too long for a small picture'], PALETTE[:1])
    picture = picture_of(*shape)
    result = one.draw_segmentation(picture, Segmentation(np.zeros(shape, np.uint8)), legend)
    assert result.shape[1] == shape[1] and result.shape[0] >= shape[0]
    assert changed(picture, result[: shape[0]]).any()


def test_views_of_other_arrays_can_be_drawn_on():
    picture, label_map = picture_of(120, 160), halves(160, 120).T
    mask = np.tile([True, False, False], (100, 50))[:60, ::2]
    objects = detections_of([(10, 10, 85, 70)], masks=[CroppedMask(10, 10, mask)])
    for view in (picture[..., ::-1], picture[::-1]):
        copy = np.ascontiguousarray(view)
        for draw in (
            lambda pixels: artist().draw_detections(pixels, objects),
            lambda pixels: artist().draw_segmentation(pixels, Segmentation(label_map)),
        ):
            assert np.array_equal(draw(view), draw(copy))


def test_a_class_stays_in_a_video_legend_for_a_while():
    steady = SteadyClasses(hold=3, min_share=0.01)
    assert steady.update({4: 0.5, 1: 0.2, 7: 0.001}) == [1, 4]
    assert steady.update({4: 0.5}) == [1, 4]
    assert steady.update({4: 0.5, 1: 0.001}) == [1, 4]
    assert [steady.update({4: 0.5}) for _ in range(3)] == [[1, 4], [1, 4], [4]]


def test_a_steady_legend_lists_what_is_missing_for_a_moment():
    picture, steady = picture_of(240, 320), SteadyClasses()
    both, one = Segmentation(halves(240, 320)), Segmentation(np.zeros((240, 320), np.uint8))
    artist().draw_segmentation(picture, both, 'inside', steady)
    assert set(swatches(artist().draw_segmentation(picture, one, 'inside', steady))) == {
        'cat',
        'dog',
    }
    assert set(swatches(artist().draw_segmentation(picture, one, 'inside'))) == {'cat'}
