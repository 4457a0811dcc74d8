"""The published networks and ours compute the same from the same weights.

``tests/data/golden`` holds checkpoints in the published layouts, described key by key, and what
the authors' network and timm's compute from them.
"""

import numpy as np
import pytest
import torch
from golden import GOLDEN, published_file
from make_checkpoint import make_input

from backbones import EfficientFormerV2

PRETRAIN_SIZE = {'imagenet': 224, 'coco': 800, 'ade20k': 512}


def golden_cases() -> list:
    cases = []
    for path in sorted(GOLDEN.glob('*.npz')):
        layout, arch, dataset, size = path.stem.split('_')
        height, width = map(int, size.split('x'))
        modes = ['offset'] if dataset == 'imagenet' else ['matrix']
        if dataset != 'imagenet' and height == width == PRETRAIN_SIZE[dataset]:
            modes.append('offset')
        cases += [
            pytest.param(layout, arch, dataset, (height, width), mode, id=f'{path.stem}-{mode}')
            for mode in modes
        ]
    return cases


@pytest.mark.parametrize(('layout', 'arch', 'dataset', 'size', 'bias_resize'), golden_cases())
def test_features_equal_the_published_network(layout, arch, dataset, size, bias_resize, tmp_path):
    checkpoint = tmp_path / 'published.pth'
    torch.save(published_file(f'{layout}_{arch}_{dataset}'), checkpoint)
    backbone = EfficientFormerV2(
        arch,
        pretrain_img_size=PRETRAIN_SIZE[dataset],
        bias_resize=bias_resize,
        init_cfg=dict(type='Pretrained', checkpoint=str(checkpoint)),
    )
    backbone.init_weights()
    backbone.eval()
    with torch.no_grad():
        features = backbone(torch.from_numpy(make_input(*size)))
    expected = np.load(GOLDEN / f'{layout}_{arch}_{dataset}_{size[0]}x{size[1]}.npz')
    for stage, feature in enumerate(features):
        assert list(feature.shape) == expected[f'stage{stage}_shape'].tolist()
        values = feature.flatten().numpy()[expected[f'stage{stage}_index']]
        tolerance = 1e-4 * float(expected[f'stage{stage}_std'])
        np.testing.assert_allclose(values, expected[f'stage{stage}_value'], rtol=0, atol=tolerance)
        assert feature.mean().item() == pytest.approx(
            float(expected[f'stage{stage}_mean']), abs=tolerance
        )
