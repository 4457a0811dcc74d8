"""What loads, from which layout, and what is refused."""

from pathlib import Path

import pytest
import torch
from golden import published
from mmengine.registry import MODELS
from tiny import TINY_ARCH
from torch import nn

from backbones import CheckpointError, EfficientFormerV2


@pytest.fixture(scope='module')
def snap() -> dict[str, torch.Tensor]:
    return published('snap_s0_imagenet')


@pytest.fixture(scope='module')
def backbone(snap) -> EfficientFormerV2:
    backbone = EfficientFormerV2('s0')
    backbone.load_state_dict(snap)
    return backbone


def assert_equal_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, expected), found in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=name)


# How published files and our own wrap their tensors; the argument has those of a backbone.
WRAPPERS = {
    'bare': lambda t: t,
    'under model': lambda t: {'model': t},
    'under state_dict': lambda t: {'state_dict': t, 'meta': {}},
    'distributed': lambda t: {'model': {f'module.{k}': v for k, v in t.items()}},
    'whole model': lambda t: {
        'state_dict': {f'backbone.{k}': v for k, v in t.items()} | {'neck.x': torch.ones(1)}
    },
}


@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_looked_through(wrap, snap, backbone, tmp_path):
    torch.save(wrap(snap), tmp_path / 'a.pth')
    prefixes = [{}, {'prefix': 'backbone.'}] if wrap is WRAPPERS['whole model'] else [{}]
    for prefix in prefixes:
        init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'), **prefix)
        loaded = EfficientFormerV2('s0', init_cfg=init_cfg)
        loaded.init_weights()
        assert_equal_weights(backbone, loaded)
    plain = EfficientFormerV2('s0')
    plain.load_state_dict(wrap(snap))
    assert_equal_weights(backbone, plain)


def test_inside_a_model_the_layouts_load_as_well(snap, backbone):
    for tensors in (snap, backbone.state_dict()):
        model = nn.Module()
        model.backbone = EfficientFormerV2('s0')
        found = model.load_state_dict({f'backbone.{key}': value for key, value in tensors.items()})
        assert found.missing_keys == []
        assert_equal_weights(backbone, model.backbone)


def test_timms_feature_extractors_load():
    """features_only=True flattens the list of stages."""
    tensors = published('timm_s0_imagenet')
    flat = {key.replace('stages.', 'stages_', 1): value for key, value in tensors.items()}
    expected, found = EfficientFormerV2('s0'), EfficientFormerV2('s0')
    expected.load_state_dict(tensors)
    found.load_state_dict(flat)
    assert_equal_weights(expected, found)


def test_files_without_the_counters_of_norms_load(snap, backbone):
    """As torch before 0.4.1 saved them."""
    loaded = EfficientFormerV2('s0')
    kept = {k: v for k, v in snap.items() if not k.endswith('num_batches_tracked')}
    assert len(kept) < len(snap)
    loaded.load_state_dict(kept)
    assert_equal_weights(backbone, loaded)


def gray_features(in_channels: int, weights: dict) -> list[torch.Tensor]:
    backbone = EfficientFormerV2('s0', in_channels=in_channels).eval()
    backbone.load_state_dict(weights)
    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone(image.expand(-1, in_channels, -1, -1))


@pytest.mark.parametrize('in_channels', [1, 6])
def test_weights_of_rgb_are_spread_over_other_channels(in_channels, snap):
    for expected, found in zip(
        gray_features(3, snap), gray_features(in_channels, snap), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_other_channels_is_its_own(tmp_path):
    saved, loaded = (EfficientFormerV2(TINY_ARCH, in_channels=4) for _ in range(2))
    loaded.load_state_dict(saved.state_dict())
    assert_equal_weights(saved, loaded)
    with pytest.raises(CheckpointError, match=r'stem\.conv1'):
        EfficientFormerV2(TINY_ARCH).load_state_dict(saved.state_dict())


def test_downstream_files_use_the_table_that_was_trained():
    loaded = EfficientFormerV2('s0', pretrain_img_size=800)
    tensors = published('snap_s0_coco')
    loaded.load_state_dict(tensors)
    table = loaded.stages[3].downsample.attn.relative_position_bias.table
    expected = tensors['network.5.attn.attention_biases_seg'].view(8, 50, 50)
    torch.testing.assert_close(table.data, expected)


@pytest.mark.parametrize('size', [512, (800, 1344), 64])
def test_tables_for_another_grid_are_resized(size, snap):
    loaded = EfficientFormerV2('s0', pretrain_img_size=size)
    loaded.load_state_dict(snap)
    height, width = (size, size) if isinstance(size, int) else size
    table = loaded.stages[3].blocks[-1].token_mixer.relative_position_bias.table
    assert table.shape == (8, -(-height // 32), -(-width // 32))
    original = snap['network.6.3.token_mixer.attention_biases'].view(8, 7, 7)
    torch.testing.assert_close(table.data[:, 0, 0], original[:, 0, 0])
    torch.testing.assert_close(table.data[:, -1, -1], original[:, -1, -1])


def load_with_mmengine(tensors: dict, tmp_path: Path, **arguments) -> None:
    torch.save(tensors, tmp_path / 'a.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'))
    MODELS.build(dict(type='EfficientFormerV2', init_cfg=init_cfg, **arguments)).init_weights()


def load_with_torch(tensors: dict, tmp_path: Path, **arguments) -> None:
    EfficientFormerV2(**arguments).load_state_dict(tensors, strict=False)


def changed(tensors: dict, what: str) -> dict:
    """What is given in place of the authors' tensors."""
    if what == 'nothing fits':
        return {'conv1.weight': torch.ones(1)}
    if what == 'part is missing':
        return {k: v for k, v in tensors.items() if not k.startswith('network.6.3.mlp.fc1')}
    if what == 'shape differs':
        return {**tensors, 'patch_embed.0.weight': torch.ones(8, 3, 3, 3)}
    if what == 'NaN':
        return {**tensors, 'patch_embed.0.weight': tensors['patch_embed.0.weight'] * torch.nan}
    return tensors


@pytest.mark.parametrize('load', [load_with_mmengine, load_with_torch])
@pytest.mark.parametrize(
    ('change', 'arch', 'message'),
    [
        ('nothing fits', 's0', r'lacks .*; it has conv1\.weight'),
        ('part is missing', 's0', r'lacks \d+ of .*stages.3.blocks.3.mlp.fc1'),
        ('another arch', 's2', r'channels \[32, 64, 144, 288\]'),
        ('shape differs', 's0', r'stem\.conv1\.conv\.weight'),
        ('NaN', 's0', r'stem\.conv1\.conv\.weight'),
    ],
)
def test_refused(change, arch, message, load, snap, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load(changed(snap, change), tmp_path, arch=arch)


def test_unknown_keys_are_reported(backbone):
    tensors = backbone.state_dict() | {'stem.surprise': torch.ones(1)}
    with pytest.raises(RuntimeError, match=r'stem\.surprise'):
        EfficientFormerV2('s0').load_state_dict(tensors)
