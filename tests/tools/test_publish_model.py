"""What is left of a training checkpoint when it is published, and under which name."""

import hashlib
from pathlib import Path

import pytest
import torch
from mmengine.logging import HistoryBuffer
from searching import SPACE

from backbones.weights import load_checkpoint, read_checkpoint

AVERAGE = {'backbone.a': torch.full((2,), 1.0), 'head.b': torch.full((3,), 2.0)}
PLAIN = {'backbone.a': torch.full((2,), 10.0), 'head.b': torch.full((3,), 20.0)}
CONFIG = """
model = dict(type='EncoderDecoder', backbone=dict(arch='s0', out_indices=(0, 1, 2, 3)))
optim_wrapper = dict(optimizer=dict(lr=-1e-4, betas=dict({'a': 0.9, '0.1': [1, dict(b=2)]})))
work_dir = '/home/somebody/secret'
load_from = None
resume = True
"""
DATASET = {'classes': ['disc', 'ring'], 'palette': [[1, 2, 3], [4, 5, 6]]}


def save_training(path: Path, ema: bool = False, config: str = CONFIG) -> None:
    """As mmengine saves a training: with EMAHook, both kinds of weights have changed places."""
    checkpoint = {
        'meta': {'cfg': config, 'dataset_meta': DATASET, 'iter': 7, 'experiment_name': 'x'},
        'state_dict': AVERAGE if ema else PLAIN,
        'optimizer': {'state': {0: torch.ones(100_000)}},
        'param_schedulers': [{'last_step': 7}],
        'message_hub': {'log_scalars': {'loss': HistoryBuffer([1.0], [1])}},
    }
    if ema:
        checkpoint['ema_state_dict'] = {
            'steps': torch.tensor(7),
            **{f'module.{key}': tensor for key, tensor in PLAIN.items()},
        }
    torch.save(checkpoint, path)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def publish(call_tool, folder: Path, suffix: str = '.pth') -> Path:
    code, said = call_tool('publish_model.py', 'in.pth', f'out{suffix}')
    assert code == 0, said
    (path,) = folder.glob(f'out-*{suffix}')
    return path


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_weights_config_and_classes_are_all_that_is_published(suffix, call_tool, tmp_path):
    save_training(tmp_path / 'in.pth')
    path = publish(call_tool, tmp_path, suffix)
    assert publish(call_tool, tmp_path, suffix) == path, 'the same weights, the same name'
    assert path.stem == f'out-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}'
    assert path.stat().st_size < 10_000
    published = read_checkpoint(path)
    assert set(published) == {'meta', 'state_dict'}
    torch.testing.assert_close(published['state_dict'], PLAIN)
    assert set(published['meta']) == {'cfg', 'dataset_meta', 'iter'}
    assert published['meta']['dataset_meta'] == DATASET
    values = {}
    exec(published['meta']['cfg'], values)
    assert values['model']['backbone'] == {'arch': 's0', 'out_indices': (0, 1, 2, 3)}
    betas = {'a': 0.9, '0.1': [1, {'b': 2}]}
    assert values['optim_wrapper']['optimizer'] == {'lr': -1e-4, 'betas': betas}
    assert not {'work_dir', 'load_from', 'resume'} & set(values)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_supernet_stays_one(suffix, call_tool, tmp_path):
    save_training(tmp_path / 'in.pth')
    supernet = {**read_checkpoint(tmp_path / 'in.pth'), 'search_space': SPACE.to_json()}
    torch.save(supernet, tmp_path / 'in.pth')
    published = load_checkpoint(str(publish(call_tool, tmp_path, suffix)))
    assert SPACE.check_checkpoint(published)


def test_the_moving_average_is_published(call_tool, tmp_path):
    save_training(tmp_path / 'in.pth', ema=True)
    published = read_checkpoint(publish(call_tool, tmp_path))
    torch.testing.assert_close(published['state_dict'], AVERAGE)


@pytest.mark.parametrize(
    ('config', 'out', 'said'),
    [
        (CONFIG, 'out.ckpt', '.pth or .safetensors'),
        ("a = __import__('os').getcwd()", 'out.pth', 'is not plain data'),
        ("a = dict(**{'b': 1})", 'out.pth', 'is not plain data'),
        ('import os', 'out.pth', 'is not plain data: line 1 is no assignment'),
    ],
)
def test_what_cannot_be_published(config, out, said, call_tool, tmp_path):
    save_training(tmp_path / 'in.pth', config=config)
    code, text = call_tool('publish_model.py', 'in.pth', out)
    assert code == 1
    assert said in text and 'Traceback' not in text
    assert [path.name for path in tmp_path.iterdir()] == ['in.pth']
