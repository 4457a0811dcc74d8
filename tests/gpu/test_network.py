"""The backbone on a GPU."""

import copy

import numpy as np
import pytest
import torch
from golden import GOLDEN, published_file
from make_checkpoint import make_input
from tiny import TINY_ARCH, assert_same, with_random_weights

from backbones import EfficientFormerV2
from backbones.deploy import switch_to_deploy

ARCHS = ['s0', 's1', 's2', 'l']


def random_backbone(arch: str | dict) -> EfficientFormerV2:
    torch.manual_seed(0)
    return with_random_weights(EfficientFormerV2(arch))


@torch.no_grad()
def on_cpu(backbone: EfficientFormerV2, images: torch.Tensor) -> list[torch.Tensor]:
    return [stage.cpu() for stage in backbone.cuda()(images.cuda())]


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('arch', ['s0', 's2'])
def test_features_equal_the_published_network(arch, deploy, tmp_path):
    paths = sorted(GOLDEN.glob(f'snap_{arch}_imagenet_*.npz'))
    assert paths
    torch.save(published_file(f'snap_{arch}_imagenet'), tmp_path / 'published.pth')
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'published.pth'))
    backbone = EfficientFormerV2(arch, init_cfg=init)
    backbone.init_weights()
    backbone = switch_to_deploy(backbone) if deploy else backbone.eval()
    for path in paths:
        height, width = map(int, path.stem.split('_')[-1].split('x'))
        expected = np.load(path)
        features = on_cpu(backbone, torch.from_numpy(make_input(height, width)))
        for stage, feature in enumerate(features):
            values = feature.flatten().numpy()[expected[f'stage{stage}_index']]
            tolerance = 1e-4 * float(expected[f'stage{stage}_std'])
            np.testing.assert_allclose(
                values, expected[f'stage{stage}_value'], rtol=0, atol=tolerance
            )


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('arch', ARCHS)
def test_features_equal_those_of_a_cpu_in_both_memory_formats(arch, deploy):
    images = torch.rand(2, 3, 150, 211)
    backbone = random_backbone(arch)
    with torch.no_grad():
        expected = backbone(images)
    if deploy:
        switch_to_deploy(backbone)
    assert_same(on_cpu(backbone, images), expected)
    backbone.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    assert_same(on_cpu(backbone, images), expected)


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize('arch', ARCHS)
def test_mixed_precision_is_close(arch, dtype, tolerance, deploy):
    images = torch.rand(1, 3, 224, 320)
    backbone = random_backbone(arch)
    for name, parameter in backbone.named_parameters():
        if name.endswith('gamma'):
            # As trained: sums of many blocks stay far below float16's largest number.
            parameter.data *= 0.1
    expected = on_cpu(backbone, images)
    if deploy:
        switch_to_deploy(backbone)
    with torch.autocast('cuda', dtype):
        found = on_cpu(backbone, images)
    for feature, exact in zip(found, expected, strict=True):
        assert feature.isfinite().all()
        assert (feature.float() - exact).square().mean().sqrt() <= tolerance * exact.std()


def test_gradients_equal_those_of_a_cpu():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 70, 101, dtype=torch.float64)
    backbone = random_backbone(TINY_ARCH).double().train()
    other = copy.deepcopy(backbone).cuda()
    sum(feature.square().mean() for feature in backbone(images)).backward()
    sum(feature.square().mean() for feature in other(images.cuda())).backward()
    gradients = {name: weight.grad for name, weight in backbone.named_parameters()}
    assert any(gradient is not None for gradient in gradients.values())
    for name, weight in other.named_parameters():
        torch.testing.assert_close(weight.grad.cpu(), gradients[name], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize('deploy', [False, True])
def test_compiles_into_one_graph(deploy):
    backbone = random_backbone(TINY_ARCH).cuda()
    if deploy:
        switch_to_deploy(backbone)
    compiled = torch.compile(copy.deepcopy(backbone), backend='eager', fullgraph=True)
    images = torch.rand(2, 3, 70, 101, device='cuda')
    for with_gradients in (False, True):
        with torch.set_grad_enabled(with_gradients):
            assert_same(compiled(images), backbone(images))


def test_one_backbone_serves_several_sizes_and_devices():
    backbone = switch_to_deploy(random_backbone(TINY_ARCH))
    sizes = [(64, 96), (130, 70), (64, 96)]
    with torch.no_grad():
        expected = [backbone(torch.ones(1, 3, *size)) for size in sizes]
        for size, features in zip(sizes, expected, strict=True):
            assert_same(on_cpu(backbone, torch.ones(1, 3, *size)), features)
        backbone.cpu()
        assert_same(backbone(torch.ones(1, 3, *sizes[0])), expected[0])
