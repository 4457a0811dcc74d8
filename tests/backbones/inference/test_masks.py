"""Cropped masks have mmdet's pixels and COCO's run lengths."""

import tracemalloc

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from backbones.inference.masks import (
    CroppedMask,
    crop_masks,
    encode_mask,
    fill_empty_boxes,
    paste_masks,
)


def whole(mask: CroppedMask, size: tuple[int, int]) -> np.ndarray:
    image = np.zeros(size, np.uint8)
    height, width = mask.pixels.shape
    image[mask.y : mask.y + height, mask.x : mask.x + width] = mask.pixels
    return image


def random_boxes(generator: np.random.Generator, count: int, size: tuple[int, int]) -> np.ndarray:
    """Boxes that may lie partly or wholly outside the image."""
    y = np.sort(generator.uniform(-0.3, 1.3, (count, 2)), axis=1) * size[0]
    x = np.sort(generator.uniform(-0.3, 1.3, (count, 2)), axis=1) * size[1]
    return np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1).astype(np.float32)


@pytest.mark.parametrize('size', [(1, 1), (37, 60), (200, 3), (120, 90)])
def test_pasted_masks_are_mmdets(size):
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    generator = np.random.default_rng(0)
    boxes = random_boxes(generator, 30, size)
    probabilities = generator.random((30, 28, 28), dtype=np.float32)
    theirs, _ = _do_paste_mask(
        torch.from_numpy(probabilities)[:, None], torch.from_numpy(boxes), *size, skip_empty=False
    )
    for ours, expected in zip(
        paste_masks(probabilities, boxes, size, 0.5), (theirs >= 0.5).numpy(), strict=True
    ):
        np.testing.assert_array_equal(whole(ours, size), expected)


@pytest.mark.parametrize('size', [(1, 1), (5, 7), (64, 3), (33, 58)])
def test_run_lengths_are_pycocotools(size):
    generator = np.random.default_rng(1)
    boxes = random_boxes(generator, 20, size)
    masks = paste_masks(generator.random((20, 4, 4), dtype=np.float32), boxes, size, 0.4)
    masks.append(CroppedMask(0, 0, np.ones(size, bool)))
    masks.append(CroppedMask(0, 0, np.zeros((0, 0), bool)))
    for mask in masks:
        expected = coco_mask.encode(np.asfortranarray(whole(mask, size)))
        assert encode_mask(mask, size) == {
            'size': list(size),
            'counts': expected['counts'].decode(),
        }


def test_a_mask_in_a_huge_image_is_encoded_without_that_image():
    mask = CroppedMask(19_000, 18_000, np.ones((2, 3), bool))
    runs = encode_mask(mask, (20_000, 20_000))
    assert coco_mask.area(runs) == 6
    assert coco_mask.toBbox(runs).tolist() == [19_000, 18_000, 3, 2]


def test_a_huge_mask_is_encoded_in_a_few_bytes_for_a_pixel():
    mask = CroppedMask(0, 0, np.ones((2000, 3000), bool))
    tracemalloc.start()
    runs = encode_mask(mask, (2000, 3000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert coco_mask.area(runs) == mask.pixels.size and peak < 5 * mask.pixels.size


def test_masks_are_cropped_to_their_own_extent():
    """SOLO predicts masks alone: its boxes are zeros."""
    image = np.zeros((2, 40, 50), bool)
    image[0, 10:20, 30:45] = True
    image[0, 15, 29] = True
    masks = crop_masks(image)
    np.testing.assert_array_equal(whole(masks[0], (40, 50)), image[0])
    assert (masks[0].x, masks[0].y, *masks[0].pixels.shape) == (29, 10, 10, 16)
    assert masks[1].pixels.size == 0
    boxes = np.array([[0, 0, 0, 0], [1, 2, 3, 4]], np.float32)
    assert fill_empty_boxes(boxes, masks).tolist() == [[29, 10, 45, 20], [1, 2, 3, 4]]
