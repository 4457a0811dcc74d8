"""The backbone as a user of mmdet and mmseg meets it."""

import copy

import pytest
import torch
from mmengine.registry import MODELS
from tiny import TINY_ARCH
from torch import nn

from backbones import ARCHITECTURES, EfficientFormerV2

# As published, classifier included: a BatchNorm and two heads of 1000 classes.
PARAMETERS = {'s0': 3_600_256, 's1': 6_185_560, 's2': 12_710_112, 'l': 26_322_288}


def halved(size: int, times: int) -> int:
    for _ in range(times):
        size = (size + 1) // 2
    return size


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_parameters_are_those_published(arch):
    channels = ARCHITECTURES[arch]['channels'][-1]
    classifier = 2 * channels + 2 * (channels * 1000 + 1000)
    backbone = EfficientFormerV2(arch)
    assert sum(p.numel() for p in backbone.parameters()) + classifier == PARAMETERS[arch]


@pytest.mark.parametrize('bias_resize', ['offset', 'matrix'])
@pytest.mark.parametrize(
    'size', [(1, 1), (1, 7), (2, 3), (31, 33), (32, 32), (37, 200), (225, 223), (512, 683)]
)
def test_every_size_is_halved_rounding_up(size, bias_resize):
    backbone = EfficientFormerV2(TINY_ARCH, bias_resize=bias_resize).eval()
    with torch.no_grad():
        features = backbone(torch.rand(1, 3, *size))
    for stage, feature in enumerate(features):
        assert feature.shape[-2:] == (halved(size[0], stage + 2), halved(size[1], stage + 2))
        assert feature.isfinite().all()


@pytest.mark.parametrize('out_indices', [(0,), (1, 3), (0, 1, 2), [2]])
def test_only_what_out_indices_needs_is_built(out_indices):
    backbone = EfficientFormerV2(TINY_ARCH, out_indices=out_indices).eval()
    everything = EfficientFormerV2(TINY_ARCH).eval()
    backbone.load_state_dict(everything.state_dict())
    assert len(backbone.stages) == max(out_indices) + 1
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        features, all_features = backbone(image), everything(image)
    assert len(features) == len(out_indices)
    for index, feature in zip(out_indices, features, strict=True):
        torch.testing.assert_close(feature, all_features[index], rtol=0, atol=0)


@pytest.mark.parametrize(
    ('arguments', 'named'),
    [
        (dict(arch='s3'), "'s0', 's1', 's2', 'l'"),
        (dict(arch=dict(TINY_ARCH, depth=3)), 'depths'),
        (dict(arch=dict(TINY_ARCH, depths=(1, 1, 2, 3))), 'mlp_ratios'),
        (dict(arch=dict(TINY_ARCH, mlp_ratios=(2, 2, 2, 2))), 'each block'),
        (dict(arch=dict(TINY_ARCH, depths=3)), '4 stages'),
        (dict(arch=dict(TINY_ARCH, channels=(4, 8, 8))), '4 stages'),
        (dict(arch=dict(TINY_ARCH, num_attention_blocks=3)), r'\(2, 2\)'),
        (dict(arch=dict(TINY_ARCH, num_attention_blocks=(1, 3))), r'\(2, 2\)'),
        (dict(arch=dict(TINY_ARCH, num_attention_blocks=(1, 1, 1))), 'pair'),
        (dict(out_indices=(0, 4)), r'\(0, 1, 2, 3\)'),
        (dict(out_indices=(1, 0)), 'rising'),
        (dict(out_indices=()), 'rising'),
        (dict(out_indices=2), 'rising'),
        (dict(bias_resize='bilinear'), "'offset', 'matrix'"),
        (dict(frozen_stages=5), '-1 to 4'),
        (dict(drop_path_rate=1.0), 'below 1'),
        (dict(pretrain_img_size=0), 'positive'),
        (dict(pretrain_img_size=(224, 224, 3)), 'height, width'),
    ],
)
def test_wrong_arguments_name_what_is_allowed(arguments, named):
    with pytest.raises(ValueError, match=named):
        EfficientFormerV2(**arguments)


def test_a_pair_gives_stages_3_and_4_attention_of_their_own():
    pair = EfficientFormerV2(dict(TINY_ARCH, num_attention_blocks=[0, 2]))
    attends = [[b.token_mixer is not None for b in stage.blocks] for stage in pair.stages]
    assert attends == [[False], [False], [False, False], [True, True]]
    for number in (0, 1, 2):
        one = EfficientFormerV2(dict(TINY_ARCH, num_attention_blocks=number))
        two = EfficientFormerV2(dict(TINY_ARCH, num_attention_blocks=(number, number)))
        assert one.state_dict().keys() == two.state_dict().keys()


def test_is_found_by_mmdet_and_mmseg():
    from mmdet.registry import MODELS as DETECTION_MODELS
    from mmseg.registry import MODELS as SEGMENTATION_MODELS

    for registry in (MODELS, DETECTION_MODELS, SEGMENTATION_MODELS):
        backbone = registry.build(dict(type='EfficientFormerV2', arch=TINY_ARCH))
        assert isinstance(backbone, EfficientFormerV2)


def batch_norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def test_norm_eval_keeps_statistics_and_still_learns():
    backbone = EfficientFormerV2(TINY_ARCH, norm_eval=True).train()
    before = {name: b.clone() for name, b in backbone.named_buffers()}
    sum(f.mean() for f in backbone(torch.rand(2, 3, 64, 64))).backward()
    for name, buffer in backbone.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)
    assert all(norm.weight.requires_grad for norm in batch_norms(backbone))


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 4])
def test_frozen_stages_do_not_learn(frozen_stages):
    backbone = EfficientFormerV2(TINY_ARCH, frozen_stages=frozen_stages).train()
    parts = [backbone.stem, *backbone.stages]
    for number, part in enumerate(parts):
        frozen = number <= frozen_stages
        assert all(p.requires_grad != frozen for p in part.parameters())
        assert all(norm.training != frozen for norm in batch_norms(part))


def test_with_cp_gives_the_same_gradients():
    torch.manual_seed(0)
    plain = EfficientFormerV2(TINY_ARCH, layer_scale_init_value=1.0).train()
    checkpointed = EfficientFormerV2(TINY_ARCH, with_cp=True).train()
    checkpointed.load_state_dict(plain.state_dict())
    image = torch.rand(2, 3, 64, 64)
    for backbone in (plain, checkpointed):
        sum(f.square().mean() for f in backbone(image)).backward()
    for expected, found in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_every_parameter_gets_a_gradient():
    """What DistributedDataParallel asks for without find_unused_parameters."""
    backbone = EfficientFormerV2(TINY_ARCH, layer_scale_init_value=1.0).train()
    sum(f.square().mean() for f in backbone(torch.rand(2, 3, 70, 90))).backward()
    unused = [name for name, p in backbone.named_parameters() if p.grad is None]
    assert unused == []


def test_drop_path_rises_to_the_last_block():
    rates = [
        getattr(block.drop_path, 'drop_prob', 0.0)
        for stage in EfficientFormerV2('l').stages
        for block in stage.blocks
    ]
    assert rates[0] == 0
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.1)
    none = EfficientFormerV2('l', drop_path_rate=0.0)
    assert not any('DropPath' in type(m).__name__ for m in none.modules())


def test_layer_scale_init_value():
    backbone = EfficientFormerV2(TINY_ARCH, layer_scale_init_value=0.5)
    scales = [p for name, p in backbone.named_parameters() if name.endswith('gamma')]
    assert scales and all((p == 0.5).all() for p in scales)


def test_bfloat16_autocast_stays_close():
    torch.manual_seed(0)
    backbone = EfficientFormerV2('s0', layer_scale_init_value=0.1).eval()
    image = torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        expected = backbone(image)
        with torch.autocast('cpu', torch.bfloat16):
            found = backbone(image)
    for a, b in zip(expected, found, strict=True):
        assert (a - b.float()).abs().max() < 0.1 * a.std()


def test_bfloat16_autocast_trains():
    backbone = EfficientFormerV2(TINY_ARCH, layer_scale_init_value=1.0).train()
    with torch.autocast('cpu', torch.bfloat16):
        loss = sum(f.float().square().mean() for f in backbone(torch.rand(2, 3, 64, 64)))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in backbone.parameters())


def test_deepcopy_is_a_network_of_its_own():
    backbone = EfficientFormerV2(TINY_ARCH).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = backbone(image)
        copied = copy.deepcopy(backbone)
        for p in backbone.parameters():
            p.zero_()
        found = copied(image)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize('training', [False, True])
def test_compiles_into_one_graph(training):
    torch.manual_seed(0)
    backbone = EfficientFormerV2(TINY_ARCH).train(training)
    compiled = torch.compile(copy.deepcopy(backbone), backend='eager', fullgraph=True)
    for size in ((64, 64), (50, 77)):
        image = torch.rand(2, 3, *size)
        torch.testing.assert_close(compiled(image), backbone(image))


def test_another_network_of_the_family_needs_no_code():
    backbone = MODELS.build(
        dict(type='EfficientFormerV2', arch=TINY_ARCH, pretrain_img_size=(96, 64))
    )
    table = backbone.stages[3].blocks[-1].token_mixer.relative_position_bias.table
    assert table.shape == (8, 3, 2)


@pytest.mark.parametrize('gradients', [False, True])
@pytest.mark.parametrize('deployed', [False, True])
@pytest.mark.parametrize('bias_resize', ['offset', 'matrix'])
def test_an_empty_batch_gives_empty_maps(bias_resize, deployed, gradients):
    backbone = EfficientFormerV2(TINY_ARCH, bias_resize=bias_resize).eval()
    if deployed:
        backbone.switch_to_deploy()
    with torch.set_grad_enabled(gradients):
        features = backbone(torch.rand(0, 3, 50, 77))
        shapes = [feature.shape[1:] for feature in backbone(torch.rand(1, 3, 50, 77))]
    assert [feature.shape for feature in features] == [(0, *shape) for shape in shapes]


@pytest.mark.parametrize('deployed', [False, True])
def test_built_and_run_on_the_meta_device(deployed):
    with torch.device('meta'):
        backbone = EfficientFormerV2('s0').eval()
    loaded = EfficientFormerV2('s0').eval()
    if deployed:
        backbone.switch_to_deploy()
        loaded.switch_to_deploy()
    image = torch.rand(1, 3, 50, 77)
    with torch.no_grad():
        shapes = [feature.shape for feature in backbone(image.to('meta'))]
        expected = loaded(image)
        backbone.load_state_dict(loaded.state_dict(), assign=True)
        found = backbone(image)
    assert shapes == [feature.shape for feature in expected]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('deployed', [False, True])
@pytest.mark.parametrize('onednn', [False, True])
@pytest.mark.parametrize('gradients', [False, True])
@pytest.mark.parametrize('order', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('weights', [torch.contiguous_format, torch.channels_last])
def test_maps_are_in_the_memory_format_of_the_image(deployed, onednn, gradients, order, weights):
    """mmcv's RoIAlign would read others as if they were contiguous."""
    backbone = EfficientFormerV2(TINY_ARCH).eval()
    image = torch.rand(2, 3, 75, 160)
    expected = backbone(image)
    backbone.to(memory_format=weights)
    if deployed:
        backbone.switch_to_deploy()
    with torch.set_grad_enabled(gradients), torch.backends.mkldnn.flags(enabled=onednn):
        found = backbone(image.contiguous(memory_format=order))
    assert all(each.is_contiguous(memory_format=order) for each in found)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('deployed', [False, True])
def test_maps_of_images_with_one_channel_are_contiguous(deployed):
    """Such an image is in both memory formats."""
    backbone = EfficientFormerV2(TINY_ARCH, in_channels=1).eval()
    if deployed:
        backbone.switch_to_deploy()
    with torch.no_grad():
        assert all(each.is_contiguous() for each in backbone(torch.rand(1, 1, 75, 160)))
