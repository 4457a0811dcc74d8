"""What loads, from which layout, and what is refused."""

import re
from pathlib import Path

import pytest
import torch
from golden import published
from mmengine.registry import MODELS
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


@pytest.mark.parametrize(
    'wrap',
    [
        pytest.param(lambda t: t, id='bare'),
        pytest.param(lambda t: {'model': t}, id='under-model'),
        pytest.param(lambda t: {'state_dict': t, 'meta': {}}, id='under-state_dict'),
        pytest.param(
            lambda t: {'state_dict': {f'backbone.{k}': v for k, v in t.items()}
                       | {'neck.lateral_convs.0.conv.weight': torch.ones(1)}},
            id='whole-model',
        ),
    ],
)  # fmt: skip
def test_wrappers_are_looked_through(wrap, snap, backbone, tmp_path):
    torch.save(wrap(snap), tmp_path / 'a.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'))
    loaded = EfficientFormerV2('s0', init_cfg=init_cfg)
    loaded.init_weights()
    assert_equal_weights(backbone, loaded)
    plain = EfficientFormerV2('s0')
    plain.load_state_dict(torch.load(tmp_path / 'a.pth'))
    assert_equal_weights(backbone, plain)


def test_prefix_takes_the_backbone_out_of_a_whole_model(snap, backbone, tmp_path):
    torch.save({'state_dict': {f'backbone.{k}': v for k, v in snap.items()}}, tmp_path / 'a.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'), prefix='backbone.')
    loaded = EfficientFormerV2('s0', init_cfg=init_cfg)
    loaded.init_weights()
    assert_equal_weights(backbone, loaded)


def test_inside_a_model_the_layouts_load_as_well(snap, backbone):
    model = nn.Module()
    model.backbone = EfficientFormerV2('s0')
    model.load_state_dict({f'backbone.{key}': value for key, value in snap.items()})
    assert_equal_weights(backbone, model.backbone)


def test_own_layout_loads_and_saves(backbone, tmp_path):
    torch.save(backbone.state_dict(), tmp_path / 'own.pth')
    loaded = EfficientFormerV2('s0')
    assert loaded.load_state_dict(torch.load(tmp_path / 'own.pth')).missing_keys == []
    assert_equal_weights(backbone, loaded)


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


@pytest.mark.parametrize('load', [load_with_mmengine, load_with_torch])
class TestRefused:
    def test_nothing_fits(self, load, tmp_path):
        with pytest.raises(CheckpointError, match=r'nothing in the checkpoint.*conv1\.weight'):
            load({'conv1.weight': torch.ones(1)}, tmp_path)

    def test_part_is_missing(self, load, snap, tmp_path):
        partial = {k: v for k, v in snap.items() if not k.startswith('network.6.3.mlp.fc1')}
        with pytest.raises(CheckpointError, match=r'lacks \d+ of .*stages.3.blocks.3.mlp.fc1'):
            load(partial, tmp_path)

    def test_another_arch(self, load, snap, tmp_path):
        with pytest.raises(CheckpointError, match=re.escape('channels [32, 64, 144, 288]')):
            load(snap, tmp_path, arch='s2')

    def test_shape_differs(self, load, backbone, tmp_path):
        wrong = backbone.state_dict() | {'stem.conv1.conv.weight': torch.ones(8, 3, 3, 3)}
        with pytest.raises(CheckpointError, match=r'stem\.conv1\.conv\.weight'):
            load(wrong, tmp_path)


def test_unknown_keys_are_reported(backbone):
    with pytest.raises(RuntimeError, match=r'stem\.surprise'):
        EfficientFormerV2('s0').load_state_dict(
            backbone.state_dict() | {'stem.surprise': torch.ones(1)}
        )
