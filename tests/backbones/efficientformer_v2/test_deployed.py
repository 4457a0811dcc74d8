"""The backbone computes the same after switch_to_deploy()."""

import copy

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from tiny import TINY_ARCH, assert_same, with_random_weights
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from backbones import CheckpointError, EfficientFormerV2
from backbones.deploy import switch_to_deploy
from backbones.efficientformer_v2 import cpu
from backbones.efficientformer_v2.attention import DownsamplingAttention, TalkingHeadAttention
from backbones.efficientformer_v2.layers import LayerScale, add

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.1}


def tiny_backbone(**arguments) -> EfficientFormerV2:
    torch.manual_seed(0)
    return with_random_weights(EfficientFormerV2(**{'arch': TINY_ARCH, **arguments}))


def assert_deploys(backbone: EfficientFormerV2, size: tuple[int, int], batch: int = 1) -> None:
    dtype = backbone.stem.conv1.conv.weight.dtype
    image = torch.rand(batch, 3, *size, dtype=dtype)
    with torch.no_grad():
        expected = backbone(image)
        switch_to_deploy(backbone)
        found = backbone(image)
    assert_same(found, expected, TOLERANCE[dtype])


def kinds_of(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


@pytest.mark.parametrize('arch', ['s0', 's1', 's2', 'l'])
def test_features_of_every_arch_stay_the_same(arch):
    assert_deploys(with_random_weights(EfficientFormerV2(arch)), (75, 97))


@pytest.mark.parametrize(
    'arguments',
    [
        dict(),
        dict(bias_resize='matrix'),
        dict(pretrain_img_size=(96, 64)),
        dict(out_indices=(0, 2)),
        dict(frozen_stages=2, norm_eval=True),
        dict(drop_path_rate=0.3),
        dict(with_cp=True),
        dict(arch=dict(TINY_ARCH, num_attention_blocks=0)),
        dict(norm_cfg=dict(type='SyncBN')),
        dict(norm_cfg=dict(type='BN', affine=False)),
        dict(norm_cfg=dict(type='GN', num_groups=2)),
        dict(norm_cfg=dict(type='IN')),
        dict(norm_cfg=dict(type='BN', track_running_stats=False)),
    ],
    ids=str,
)
def test_features_stay_the_same(arguments, monkeypatch):
    # Strips of one row, as large images have strips of many.
    monkeypatch.setattr(cpu, 'STRIP_BUDGET', 1)
    # A BatchNorm without statistics of its own needs more than one pixel to take them from.
    assert_deploys(tiny_backbone(**arguments), (70, 101), batch=2)


def test_folds_half_precision_without_running_it():
    half = switch_to_deploy(tiny_backbone().half())
    for name, tensor in switch_to_deploy(tiny_backbone()).state_dict().items():
        found = half.state_dict()[name]
        assert found.dtype == torch.float16
        assert_same(found.float(), tensor, 2e-3)


def test_nothing_that_can_be_folded_is_left():
    backbone = switch_to_deploy(tiny_backbone(drop_path_rate=0.3))
    assert not kinds_of(backbone) & {'BatchNorm2d', 'ConvNorm', 'LayerScale', 'DropPath'}
    for module in backbone.modules():
        if isinstance(module, TalkingHeadAttention):
            assert not {'q', 'k', 'v'} & dict(module.named_children()).keys()
        if isinstance(module, DownsamplingAttention):
            assert not {'k', 'v'} & dict(module.named_children()).keys()


def test_norms_other_than_batch_norm_stay_and_take_the_layer_scales():
    backbone = switch_to_deploy(tiny_backbone(norm_cfg=dict(type='GN', num_groups=2)))
    assert 'GroupNorm' in kinds_of(backbone)
    assert not any(isinstance(module, LayerScale) for module in backbone.modules())


def test_a_second_call_changes_nothing():
    backbone = switch_to_deploy(tiny_backbone())
    before = copy.deepcopy(backbone.state_dict())
    assert switch_to_deploy(backbone) is backbone
    backbone.switch_to_deploy()
    assert backbone.state_dict().keys() == before.keys()
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_folds_the_running_statistics_also_of_a_model_in_training():
    backbone = tiny_backbone()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = backbone(image)
        assert_same(switch_to_deploy(backbone.train())(image), expected)


def test_is_not_trained_afterwards():
    backbone = switch_to_deploy(tiny_backbone())
    assert backbone.eval() is backbone
    with pytest.raises(RuntimeError, match=r'switch_to_deploy\(\)'):
        backbone.train()
    with pytest.raises(RuntimeError, match=r'switch_to_deploy\(\)'):
        nn.ModuleDict(dict(backbone=backbone)).train()


def test_gradients_reach_the_image():
    backbone = tiny_backbone()
    gradients = []
    for model in (copy.deepcopy(backbone), switch_to_deploy(backbone)):
        image = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64).requires_grad_()
        sum(feature.square().mean() for feature in model(image)).backward()
        gradients.append(image.grad)
    assert_same(gradients[1], gradients[0], 1e-3)


def test_weights_are_saved_and_loaded_deployed():
    saved = switch_to_deploy(tiny_backbone())
    loaded = switch_to_deploy(EfficientFormerV2(TINY_ARCH))
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert_same(loaded(image), saved(image), 0)


@pytest.mark.parametrize('strict', [True, False])
def test_weights_do_not_pass_between_plain_and_deployed(strict):
    plain, deployed = tiny_backbone(), switch_to_deploy(tiny_backbone())
    with pytest.raises(CheckpointError, match='load the checkpoint first'):
        load_state_dict(deployed, copy.deepcopy(plain.state_dict()), strict)
    with pytest.raises(CheckpointError, match=r'lacks .*; it has .*stem\.conv1\.weight'):
        load_state_dict(plain, copy.deepcopy(deployed.state_dict()), strict)


def test_autocast_stays_close():
    backbone = tiny_backbone()
    image = torch.rand(1, 3, 96, 128)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        expected = [feature.float() for feature in backbone(image)]
        found = [feature.float() for feature in switch_to_deploy(backbone)(image)]
    assert_same(found, expected, 0.1)


def test_a_sum_has_the_higher_precision():
    """Residuals are added in place, and under autocast the two differ."""
    half, whole = torch.tensor([256.0], dtype=torch.bfloat16), torch.tensor([0.5])
    torch.testing.assert_close(add(half, whole), torch.tensor([256.5]))


def test_compiles_into_one_graph():
    backbone = switch_to_deploy(tiny_backbone())
    compiled = torch.compile(copy.deepcopy(backbone), backend='eager', fullgraph=True)
    with torch.no_grad():
        for size in ((64, 64), (50, 77)):
            image = torch.rand(2, 3, *size)
            assert_same(compiled(image), backbone(image))


@pytest.mark.slow
@pytest.mark.parametrize('deployed', [False, True])
def test_exports_with_sizes_that_vary(deployed):
    from torch.export import Dim  # not in torch 2.1

    backbone = tiny_backbone()
    if deployed:
        switch_to_deploy(backbone)
    # torch tells a side of one pixel from others, and the last feature map is not to have one.
    sizes = {2: Dim('height', min=33, max=4096), 3: Dim('width', min=33, max=4096)}
    with torch.no_grad():
        exported = torch.export.export(
            backbone,
            (torch.rand(3, 3, 63, 95),),
            dynamic_shapes=({0: Dim('batch', max=64), **sizes},),
        ).module()
        # The tables are laid out for 224 x 224: what is exported is not to depend on that.
        for size in ((3, 3, 63, 95), (1, 3, 224, 224), (2, 3, 33, 200)):
            image = torch.rand(size)
            assert_same(exported(image), backbone(image))


def test_what_records_operators_sees_public_ones():
    backbone = switch_to_deploy(tiny_backbone())
    image = torch.rand(1, 3, 64, 80)
    with torch.no_grad():
        expected = backbone(image)
        traced = torch.jit.trace(backbone, image)
        assert_same(traced(image), expected)
        with FlopCounterMode(display=False) as counter:
            backbone(image)
        with FlopCounterMode(display=False) as plain_counter, torch.enable_grad():
            backbone(image)
    assert counter.get_total_flops() == plain_counter.get_total_flops() > 0
