"""Made-up truth for a training step."""

import numpy as np
import torch
from torch import nn

NUM_OBJECTS = 8


def add_targets(
    model: nn.Module, samples: list, size: tuple[int, int], device: torch.device
) -> None:
    """Give every sample a label map of blocks, or eight objects with boxes and masks.

    Args:
        model: Of mmdet or mmseg.
        samples: Changed in place.
        size: Height and width of the network's input.
        device: Where the truth goes.
    """
    generator = np.random.default_rng(0)
    for sample in samples:
        if hasattr(model, 'decode_head'):
            add_label_map(sample, size, model.decode_head.num_classes, generator)
        else:
            add_objects(sample, size, generator)
        sample.to(device)


def add_label_map(
    sample: object, size: tuple[int, int], num_classes: int, generator: np.random.Generator
) -> None:
    from mmengine.structures import PixelData

    blocks = generator.integers(0, num_classes, (-(-size[0] // 32), -(-size[1] // 32)))
    labels = np.kron(blocks, np.ones((32, 32), np.int64))[: size[0], : size[1]]
    sample.gt_sem_seg = PixelData(data=torch.from_numpy(labels)[None])


def add_objects(sample: object, size: tuple[int, int], generator: np.random.Generator) -> None:
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    height, width = size
    corner = generator.uniform(0, 0.5, (NUM_OBJECTS, 2))
    extent = generator.uniform(0.1, 0.5, (NUM_OBJECTS, 2))
    boxes = np.concatenate([corner, corner + extent], axis=1) * [width, height, width, height]
    masks = np.zeros((NUM_OBJECTS, height, width), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int), strict=True):
        mask[top : bottom + 1, left : right + 1] = 1
    sample.gt_instances = InstanceData(
        bboxes=torch.from_numpy(boxes).float(),
        labels=torch.zeros(NUM_OBJECTS, dtype=torch.long),
        masks=BitmapMasks(masks, height, width),
    )
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
