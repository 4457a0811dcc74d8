"""What counts as the same results."""

from types import SimpleNamespace

import numpy as np
import pytest

from backbones.errors import ExportError
from backbones.export.compare import compare

# Of a description, what a comparison needs.
LIMITS = SimpleNamespace(score_threshold=0.05, max_per_image=4, mask_threshold=0.5)


def detections(*rows: tuple[float, float, float, float, float, int]) -> dict[str, np.ndarray]:
    """Rows of left, top, right, bottom, score, label."""
    values = np.array(rows, np.float32).reshape(-1, 6)
    return dict(boxes=values[:, :4], scores=values[:, 4], labels=values[:, 5].astype(np.int64))


ONE = (10, 10, 50, 40, 0.9, 1)
OTHER = (60, 10, 90, 70, 0.6, 0)


@pytest.mark.parametrize(
    'found',
    [
        pytest.param([ONE], id='lost'),
        pytest.param([ONE, OTHER, (0, 0, 9, 9, 0.3, 2)], id='new'),
        pytest.param([ONE, (60, 10, 90, 75, 0.6, 0)], id='box'),
        pytest.param([ONE, (60, 10, 90, 70, 0.61, 0)], id='score'),
        pytest.param([ONE, (60, 10, 90, 70, 0.6, 1)], id='label'),
        pytest.param([ONE, ONE], id='twice'),
    ],
)
def test_other_detections_do_not_agree(found):
    with pytest.raises(ExportError):
        compare(detections(ONE, OTHER), detections(*found), LIMITS)


def test_a_detection_out_of_nothing_does_not_agree():
    with pytest.raises(ExportError, match='1 are new'):
        compare(detections(), detections(ONE), LIMITS)


AT_THRESHOLD = (0, 0, 9, 9, 0.0501, 2)


@pytest.mark.parametrize(
    ('expected', 'found', 'figures'),
    [
        ([ONE, OTHER], [OTHER, ONE], '2 of 2'),
        ([], [], 'no detection'),
        # A score at the threshold may be missing.
        ([ONE, AT_THRESHOLD], [ONE], '1 of 2'),
        # So may the lowest of as many as are kept, for one with nearly its score.
        (
            [ONE, OTHER, (0, 0, 9, 9, 0.4, 2), (20, 0, 29, 9, 0.3, 2)],
            [ONE, OTHER, (0, 0, 9, 9, 0.4, 2), (40, 0, 49, 9, 0.3, 2)],
            '3 of 4',
        ),
        ([AT_THRESHOLD], [], 'no detection with a score above 0.051'),
    ],
)
def test_the_same_detections_agree(expected, found, figures):
    assert compare(detections(*expected), detections(*found), LIMITS).startswith(figures)


def test_boxes_that_rounding_leaves_without_area_agree():
    """As mmdet gives them where a box was clipped at the edge of the image."""
    at_edge = (199, 101.097, 199, 123, 0.95, 1)
    rounded = (198.995, 101.092, 199, 123, 0.95, 1)
    figures = compare(detections(ONE, at_edge), detections(ONE, rounded), LIMITS)
    assert figures.startswith('2 of 2')
    moved = (199, 90, 199, 112, 0.95, 1)
    with pytest.raises(ExportError):
        compare(detections(ONE, at_edge), detections(ONE, moved), LIMITS)


def test_masks_agree_by_their_pixels():
    masks = np.zeros((1, 28, 28), np.float32)
    masks[0, :14] = 0.9
    others = masks.copy()
    others[0, 14, 0] = 0.51
    with pytest.raises(ExportError, match='mask pixels'):
        compare({**detections(ONE), 'masks': masks}, {**detections(ONE), 'masks': others}, LIMITS)


def test_segmentation_maps_agree_at_999_of_1000_pixels():
    expected = np.zeros((100, 100), np.int32)
    found = expected.copy()
    found[0, :10] = 1
    assert (
        compare({'segmentation_map': expected}, {'segmentation_map': found}, LIMITS)
        == '99.9 % of pixels'
    )
    found[0, 10] = 1
    with pytest.raises(ExportError, match=r'99\.89 %'):
        compare({'segmentation_map': expected}, {'segmentation_map': found}, LIMITS)


def test_nan_does_not_agree():
    expected, found = np.ones((3, 4, 4), np.float32), np.ones((3, 4, 4), np.float32)
    found[0, 0, 0] = np.nan
    with pytest.raises(ExportError):
        compare({'logits': expected}, {'logits': found}, LIMITS)
