"""What the models on a command line are, and opening a checkpoint alone."""

import pytest
import torch
from trained_tiny import write_trained

from backbones.app.models import name_models, open_models, pair_up
from backbones.errors import CheckpointError, ConfigError


def test_configs_checkpoints_and_exported_files_mix():
    given = ['a.py', 'a.pth', 'b.onnx', 'runs/c.pth', 'd.py', 'd.safetensors', 'e.xml']
    models = [
        ('a.py', 'a.pth'),
        ('b.onnx', None),
        (None, 'runs/c.pth'),
        ('d.py', 'd.safetensors'),
        ('e.xml', None),
    ]
    assert pair_up(given) == models
    assert name_models(models) == ['a', 'b', 'c', 'd', 'e']


@pytest.mark.parametrize('given', [['a.py'], ['a.py', 'b.onnx'], ['a.py', 'b.py', 'b.pth']])
def test_a_config_needs_its_checkpoint(given):
    with pytest.raises(ConfigError, match=r'a\.py'):
        pair_up(given)


def test_no_two_names_are_the_same():
    models = [('a.py', 'one/best.pth'), ('a.py', 'two/best.pth'), (None, 'two/best.pth')]
    names = name_models([*models, *models])
    expected = ['one best', 'two best', 'two best #2', 'one best #2', 'two best #3', 'two best #4']
    assert names == expected


def test_exported_files_beside_their_checkpoint_have_their_suffix(tmp_path, monkeypatch):
    (tmp_path / 'runs').mkdir()
    monkeypatch.chdir(tmp_path / 'runs')
    models = [('m.py', 'm.pth'), ('m.xml', None), ('m.onnx', None)]
    assert name_models(models) == ['runs m', 'm.xml', 'm.onnx']


def test_a_checkpoint_brings_its_config(tmp_path, shapes):
    config, checkpoint = write_trained(tmp_path, 'fpn', shapes)
    with pytest.raises(ConfigError, match='CONFIG'):
        open_models([(None, str(checkpoint))])
    saved = torch.load(checkpoint, weights_only=True)
    saved['meta']['cfg'] = config.read_text()
    torch.save(saved, checkpoint)
    config.unlink()
    models = open_models([(None, str(checkpoint))], device='cpu')
    assert models['fpn'].task == 'segmentation'
    with pytest.raises(CheckpointError, match='missing'):
        open_models([(None, str(tmp_path / 'missing.pth'))])
