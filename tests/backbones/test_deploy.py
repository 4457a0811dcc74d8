"""What switch_to_deploy() leaves computes the same, for the backbone and for whole models."""

import copy
from pathlib import Path

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import load_state_dict
from tiny import TINY_ARCH, write_tiny_config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from backbones import CheckpointError, EfficientFormerV2
from backbones.deploy import fold_norms, switch_to_deploy
from backbones.efficientformer_v2.attention import DownsamplingAttention, TalkingHeadAttention
from backbones.efficientformer_v2.layers import LayerScale

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.1}


def with_random_weights(model: nn.Module) -> nn.Module:
    """Such that no layer scale is small, and no norm does nothing."""
    for name, parameter in model.named_parameters():
        if name.endswith('table'):
            nn.init.normal_(parameter)
        elif name.endswith('gamma') or parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.3, 1.0)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def tiny_backbone(**arguments) -> EfficientFormerV2:
    torch.manual_seed(0)
    return with_random_weights(EfficientFormerV2(**{'arch': TINY_ARCH, **arguments}))


def assert_same(found, expected, tolerance: float = 1e-4) -> None:
    """Equal within a part of the largest value, through lists of lists."""
    if isinstance(expected, torch.Tensor):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        difference = (found - expected).abs().max()
        assert difference <= tolerance * expected.abs().max()
        return
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b, tolerance)


def assert_deploys(backbone: EfficientFormerV2, size: tuple[int, int], batch: int = 1) -> None:
    dtype = backbone.stem.conv1.conv.weight.dtype
    picture = torch.rand(batch, 3, *size, dtype=dtype)
    with torch.no_grad():
        expected = backbone(picture)
        switch_to_deploy(backbone)
        found = backbone(picture)
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
def test_features_stay_the_same(arguments):
    # A BatchNorm without statistics of its own needs more than one pixel to take them from.
    assert_deploys(tiny_backbone(**arguments), (70, 101), batch=2)


@pytest.mark.parametrize('size', [(1, 1), (32, 32), (33, 200)])
def test_features_stay_the_same_at_every_size(size):
    assert_deploys(tiny_backbone(), size)


@pytest.mark.parametrize('dtype', TOLERANCE)
def test_data_type_is_kept(dtype):
    backbone = tiny_backbone().to(dtype)
    assert_deploys(backbone, (64, 80))
    assert {p.dtype for p in backbone.parameters()} == {dtype}


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
    picture = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = backbone(picture)
        assert_same(switch_to_deploy(backbone.train())(picture), expected)


def test_is_not_trained_afterwards():
    backbone = switch_to_deploy(tiny_backbone())
    assert backbone.eval() is backbone
    with pytest.raises(RuntimeError, match=r'switch_to_deploy\(\)'):
        backbone.train()
    with pytest.raises(RuntimeError, match=r'switch_to_deploy\(\)'):
        nn.ModuleDict(dict(backbone=backbone)).train()


def test_gradients_reach_the_picture():
    backbone = tiny_backbone()
    gradients = []
    for model in (copy.deepcopy(backbone), switch_to_deploy(backbone)):
        picture = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64).requires_grad_()
        sum(feature.square().mean() for feature in model(picture)).backward()
        gradients.append(picture.grad)
    assert_same(gradients[1], gradients[0], 1e-3)


def test_weights_are_saved_and_loaded_deployed():
    saved = switch_to_deploy(tiny_backbone())
    loaded = switch_to_deploy(EfficientFormerV2(TINY_ARCH))
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    picture = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert_same(loaded(picture), saved(picture), 0)


@pytest.mark.parametrize('strict', [True, False])
def test_weights_do_not_pass_between_plain_and_deployed(strict):
    plain, deployed = tiny_backbone(), switch_to_deploy(tiny_backbone())
    with pytest.raises(CheckpointError, match='load the checkpoint first'):
        load_state_dict(deployed, copy.deepcopy(plain.state_dict()), strict)
    with pytest.raises(CheckpointError, match=r'saved after switch_to_deploy\(\)'):
        load_state_dict(plain, copy.deepcopy(deployed.state_dict()), strict)


def test_channels_leave_first_as_roi_align_needs_them():
    with torch.no_grad():
        features = switch_to_deploy(tiny_backbone())(torch.rand(1, 3, 96, 64))
    assert all(feature.is_contiguous() for feature in features)


def test_autocast_stays_close():
    backbone = tiny_backbone()
    picture = torch.rand(1, 3, 96, 128)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        expected = [feature.float() for feature in backbone(picture)]
        found = [feature.float() for feature in switch_to_deploy(backbone)(picture)]
    assert_same(found, expected, 0.1)


def test_compiles_into_one_graph():
    backbone = switch_to_deploy(tiny_backbone())
    compiled = torch.compile(copy.deepcopy(backbone), backend='eager', fullgraph=True)
    with torch.no_grad():
        for size in ((64, 64), (50, 77)):
            picture = torch.rand(2, 3, *size)
            assert_same(compiled(picture), backbone(picture))


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
            picture = torch.rand(size)
            assert_same(exported(picture), backbone(picture))


def test_what_records_operators_sees_public_ones():
    backbone = switch_to_deploy(tiny_backbone())
    picture = torch.rand(1, 3, 64, 80)
    with torch.no_grad():
        expected = backbone(picture)
        traced = torch.jit.trace(backbone, picture)
        assert_same(traced(picture), expected)
        with FlopCounterMode(display=False) as counter:
            backbone(picture)
        with FlopCounterMode(display=False) as plain_counter, torch.enable_grad():
            backbone(picture)
    assert counter.get_total_flops() == plain_counter.get_total_flops() > 0


def build(task: str, folder: Path, shapes: Path) -> nn.Module:
    config = Config.fromfile(write_tiny_config(folder, task, shapes))
    scope = config.default_scope
    init_default_scope(scope)
    if scope == 'mmdet':
        from mmdet.registry import MODELS
    else:
        from mmseg.registry import MODELS
    return with_random_weights(MODELS.build(config.model))


@pytest.mark.parametrize('task', ['fpn', 'retinanet', 'mask_rcnn'])
def test_whole_models_stay_the_same(task, tmp_path, shapes):
    model = build(task, tmp_path, shapes)
    assert any(isinstance(module, _BatchNorm) for module in model.modules())
    picture = torch.rand(2, 3, 96, 128)

    def outputs() -> list:
        features = model.extract_feat(picture)
        if task == 'fpn':
            return [features, model.decode_head(features)]
        if task == 'retinanet':
            return [features, model.bbox_head(features)]
        boxes = torch.tensor([[0, 5.0, 7, 60, 50], [1, 20, 30, 90, 80]])
        regions = model.roi_head.bbox_roi_extractor(features[:4], boxes)
        masks = model.roi_head.mask_head(model.roi_head.mask_roi_extractor(features[:4], boxes))
        boxes = model.roi_head.bbox_head(regions)
        return [features, model.rpn_head(features), regions, boxes, masks]

    with torch.no_grad():
        expected = outputs()
        assert switch_to_deploy(model) is model
        assert_same(outputs(), expected)
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())
    assert not model.training


class SharedConv(nn.Module):
    """One convolution with a norm for each of two levels, as in RetinaNet's SepBN head."""

    def __init__(self) -> None:
        super().__init__()
        norm = dict(type='BN')
        self.levels = nn.ModuleList(ConvModule(4, 4, 3, norm_cfg=norm) for _ in range(2))
        self.levels[1].conv = self.levels[0].conv

    def forward(self, x):
        return [level(x) for level in self.levels]


@pytest.mark.parametrize(
    ('model', 'norms_left'),
    [
        (SharedConv(), 0),
        (ConvModule(4, 4, 3, norm_cfg=dict(type='BN'), order=('norm', 'conv', 'act')), 1),
        (ConvModule(4, 4, 3, norm_cfg=dict(type='BN'), order=('conv', 'act', 'norm')), 1),
        (ConvModule(4, 4, 3, norm_cfg=dict(type='BN'), with_spectral_norm=True), 1),
        (ConvModule(4, 4, 3, conv_cfg=dict(type='ConvWS'), norm_cfg=dict(type='BN')), 1),
        (ConvModule(4, 4, 3, norm_cfg=dict(type='GN', num_groups=2)), 0),
        (ConvModule(4, 4, 3), 0),
        (nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), 1),
    ],
    ids=['shared', 'norm first', 'act first', 'spectral', 'ConvWS', 'GN', 'no norm', 'two norms'],
)
def test_only_norms_behind_their_own_convolution_are_folded(model, norms_left):
    with_random_weights(model)
    x = torch.randn(2, 4, 7, 9)
    with torch.no_grad():
        expected = model(x)
        fold_norms(model)
        assert_same(model(x), expected)
    assert sum(isinstance(module, _BatchNorm) for module in model.modules()) == norms_left
