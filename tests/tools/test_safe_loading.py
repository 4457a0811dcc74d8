"""No tool lets a checkpoint run code, and every one says what is wrong before it reads data."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS

from backbones import CheckpointError
from backbones.engine.checkpointing import read_resumable
from backbones.engine.config import fit_to_device, load_config
from backbones.engine.preflight import fit_whole

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'seg_configs' / 'fpn_effv2_s0_shapes.py'

COMMANDS = {
    'train, backbone': [
        'train.py',
        ROOT / 'seg_configs' / 'fpn_effv2_s0.py',
        '--cfg-options',
        'model.backbone.init_cfg.checkpoint=in.pth',
    ],
    'train, load_from': ['train.py', CONFIG, '--cfg-options', 'load_from=in.pth'],
    'train, resume': ['train.py', CONFIG, '--resume', 'in.pth'],
    'train, resume the newest': ['train.py', CONFIG, '--resume', '--work-dir', '.'],
    'test': ['test.py', CONFIG, 'in.pth'],
    'infer': ['infer.py', CONFIG, 'in.pth', 'picture.jpg'],
    'convert': ['convert_checkpoint.py', 'in.pth', 'out.pth'],
    'publish': ['publish_model.py', 'in.pth', 'out.pth'],
}


class RunsCode:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope='module')
def model_tensors() -> dict[str, torch.Tensor]:
    config = load_config(str(CONFIG))
    fit_to_device(config)
    return dict(MODELS.build(config.model).state_dict())


@pytest.fixture
def evil(tmp_path: Path, model_tensors: dict) -> Path:
    """A marker that reading in.pth, a model that fits, would create."""
    marker = tmp_path / 'marker'
    checkpoint = {'meta': {}, 'state_dict': model_tensors, 'message_hub': RunsCode(marker)}
    torch.save(checkpoint, tmp_path / 'in.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'in.pth'))
    return marker


@pytest.mark.parametrize('command', COMMANDS.values(), ids=COMMANDS)
def test_no_tool_runs_the_code_in_a_checkpoint(command, evil, run_tool):
    process = run_tool(*command)
    assert process.returncode == 1
    assert 'posix.mkdir' in process.stderr and '--trust-checkpoint' in process.stderr
    assert 'Traceback' not in process.stderr
    assert not evil.exists()


@pytest.mark.parametrize('command', COMMANDS.values(), ids=COMMANDS)
def test_trust_is_given_by_a_switch_that_every_tool_has(command, evil, run_tool):
    run_tool(*command, '--trust-checkpoint')
    assert evil.exists()


def broken(kind: str, tensors: dict[str, torch.Tensor]) -> object:
    match kind:
        case 'NaN in the backbone' | 'NaN in a head':
            module = 'backbone.stem.conv1.norm' if 'backbone' in kind else 'decode_head.conv_seg'
            part = f'{module}.bias'
            return {'state_dict': {**tensors, part: torch.full_like(tensors[part], torch.nan)}}
        case 'half a backbone':
            kept = list(tensors)[: len(tensors) // 2]
            return {'state_dict': {key: tensors[key] for key in kept}}
        case 'another network':
            return {'state_dict': {'layer1.weight': torch.ones(1)}}
        case 'another architecture':
            return {
                'state_dict': {
                    key: torch.cat([t, t]) if t.dim() else t for key, t in tensors.items()
                }
            }


# In an empty folder, so that an error about missing data would come if data were read first.
@pytest.mark.parametrize('command', ['train, load_from', 'test'])
@pytest.mark.parametrize(
    ('kind', 'said'),
    [
        ('NaN in the backbone', 'contain NaN'),
        ('NaN in a head', 'contain NaN'),
        ('half a backbone', 'lacks'),
        ('another network', 'nothing in the checkpoint belongs to an EfficientFormerV2'),
        ('another architecture', 'another architecture'),
        ('cut short', 'cut short'),
    ],
)
def test_checkpoints_are_checked_before_data(
    kind, said, command, model_tensors, run_tool, tmp_path
):
    torch.save(broken(kind, model_tensors), tmp_path / 'in.pth')
    if kind == 'cut short':
        torch.save(model_tensors, tmp_path / 'in.pth')
        (tmp_path / 'in.pth').write_bytes((tmp_path / 'in.pth').read_bytes()[:100_000])
    process = run_tool(*COMMANDS[command])
    assert process.returncode == 1
    assert said in process.stderr and 'in.pth' in process.stderr
    assert 'Traceback' not in process.stderr


@pytest.mark.parametrize(
    ('where', 'refused'), [('backbone.stem.conv1.norm.running_var', True), ('unused', False)]
)
def test_nan_is_refused_where_it_does_harm(where, refused, model_tensors):
    config = load_config(str(CONFIG))
    fit_to_device(config)
    tensors = {**model_tensors, where: torch.tensor([torch.nan] * 16)}
    with pytest.raises(CheckpointError, match=where) if refused else nullcontext():
        fit_whole(MODELS.build(config.model), {'state_dict': tensors, 'meta': {}}, 'in.pth')


def test_a_training_with_nan_is_not_resumed(tmp_path):
    content = {'state_dict': {'x': torch.tensor(torch.nan)}, 'optimizer': {}, 'message_hub': {}}
    torch.save(content, tmp_path / 'in.pth')
    with pytest.raises(CheckpointError, match=r'in\.pth.*contain NaN: x'):
        read_resumable(tmp_path / 'in.pth')


def test_a_backbone_alone_is_not_tested(model_tensors, shapes, run_tool, tmp_path):
    tensors = {key: t for key, t in model_tensors.items() if key.startswith('backbone.')}
    torch.save(tensors, tmp_path / 'in.pth')
    process = run_tool(
        'test.py', CONFIG, 'in.pth', '--cfg-options', f'classes={shapes / "classes.txt"}'
    )
    assert process.returncode == 1
    assert 'in.pth lacks' in process.stderr and 'neck.' in process.stderr


def test_what_has_no_training_in_it_is_not_resumed(model_tensors, run_tool, tmp_path):
    torch.save({'state_dict': model_tensors, 'meta': {}}, tmp_path / 'in.pth')
    process = run_tool(*COMMANDS['train, resume'])
    assert process.returncode == 1
    assert 'in.pth cannot be resumed' in process.stderr
