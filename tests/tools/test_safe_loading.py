"""No tool lets a checkpoint run code, and what a run starts from is checked before data are."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from corrupt import RunsCode
from mmengine.config import Config
from mmengine.registry import MODELS

from backbones import CheckpointError
from backbones.engine.checkpoints import read_resumable
from backbones.engine.config import fit_to_device, load_config
from backbones.engine.preflight import check_classes, check_start, load_whole

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'seg_configs' / 'fpn_effv2_s0_shapes.py'

COMMANDS = {
    'train, backbone': [
        *('train.py', ROOT / 'seg_configs' / 'fpn_effv2_s0.py'),
        *('--cfg-options', 'model.backbone.init_cfg.checkpoint=in.pth'),
    ],
    'train, load_from': ['train.py', CONFIG, '--cfg-options', 'load_from=in.pth'],
    'train, resume': ['train.py', CONFIG, '--resume', 'in.pth'],
    'train, resume the newest': ['train.py', CONFIG, '--resume', '--work-dir', '.'],
    'test': ['test.py', CONFIG, 'in.pth'],
    'infer': ['infer.py', CONFIG, 'in.pth', 'image.jpg'],
    'export': ['export.py', CONFIG, 'in.pth', 'out.onnx'],
    'convert': ['convert_checkpoint.py', 'in.pth', 'out.pth'],
    'publish': ['publish_model.py', 'in.pth', 'out.pth'],
}


def read_config() -> Config:
    config = load_config(str(CONFIG))
    fit_to_device(config)
    return config


config = pytest.fixture(read_config)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope='module')
def model_tensors() -> dict[str, torch.Tensor]:
    return dict(MODELS.build(read_config().model).state_dict())


@pytest.fixture
def evil(tmp_path: Path, model_tensors: dict) -> Path:
    """A marker that reading in.pth, a model that fits, would create."""
    marker = tmp_path / 'marker'
    checkpoint = {'meta': {}, 'state_dict': model_tensors, 'message_hub': RunsCode(marker)}
    torch.save(checkpoint, tmp_path / 'in.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'in.pth'))
    return marker


@pytest.mark.parametrize('command', COMMANDS.values(), ids=COMMANDS)
def test_no_tool_runs_the_code_in_a_checkpoint_that_is_not_trusted(
    command, evil, call_tool, run_tool
):
    code, said = call_tool(*command)
    assert code == 1
    assert 'posix.mkdir' in said and '--trust-checkpoint' in said
    assert 'Traceback' not in said
    assert not evil.exists()
    if command[0] != 'train.py' or command is COMMANDS['train, resume']:
        run_tool(*command, '--trust-checkpoint')
        assert evil.exists()


def half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensors[key] for key in list(tensors)[: len(tensors) // 2]}


@pytest.mark.parametrize(
    ('name', 'change', 'said'),
    [
        # In an empty folder: an error about missing data would come if data were read first.
        ('train, load_from', half, 'lacks'),
        ('test', half, 'lacks'),
        ('train, resume', dict, 'cannot be resumed'),
    ],
)
def test_checkpoints_are_checked(name, change, said, model_tensors, call_tool, tmp_path):
    torch.save({'state_dict': change(model_tensors), 'meta': {}}, tmp_path / 'in.pth')
    code, text = call_tool(*COMMANDS[name])
    assert code == 1
    assert said in text and 'in.pth' in text
    assert 'Traceback' not in text


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (half, 'lacks'),
        (lambda tensors: {'layer1.weight': torch.ones(1)}, r'lacks (\d+) of the \1 tensors'),
        (
            lambda tensors: {k: torch.cat([t, t]) if t.dim() else t for k, t in tensors.items()},
            'another architecture',
        ),
        (
            lambda tensors: {**tensors, NORM: torch.full((16,), torch.nan)},
            'NaN.*running_var',
        ),
    ],
    ids=['half a backbone', 'another network', 'another architecture', 'NaN'],
)
def test_a_backbone_that_does_not_fit_is_an_error(change, said, config, model_tensors, tmp_path):
    config.load_from = str(tmp_path / 'in.pth')
    torch.save(change(model_tensors), config.load_from)
    with pytest.raises(CheckpointError, match=said) as error:
        check_start(config)
    assert 'in.pth' in str(error.value)


NORM = 'backbone.stem.conv1.norm.running_var'


def test_a_backbone_alone_is_not_tested(config, model_tensors):
    tensors = {key: value for key, value in model_tensors.items() if key.startswith('backbone.')}
    with pytest.raises(CheckpointError, match=r'neck\.'):
        load_whole(MODELS.build(config.model), {'state_dict': tensors}, 'in.pth')


def test_classes_are_compared_where_the_config_knows_them():
    check_classes('in.pth', ('a', 'b'), ())
    check_classes('in.pth', ('a', 'b'), ('c', 'd'))
    for other in (('a',), ('b', 'a')):
        with pytest.raises(CheckpointError, match='number and order'):
            check_classes('in.pth', ('a', 'b'), other)


@pytest.mark.parametrize(
    ('key', 'is_used'), [(NORM, True), ('decode_head.conv_seg.bias', True), ('unused', False)]
)
def test_nan_is_an_error_where_the_model_uses_it(
    key, is_used, config, model_tensors, tmp_path, capsys
):
    given = model_tensors.get(key, torch.zeros(1))
    tensors = {**model_tensors, key: torch.full_like(given, torch.nan)}
    with (
        pytest.raises(CheckpointError, match=key.removeprefix('backbone.'))
        if is_used
        else nullcontext()
    ):
        load_whole(MODELS.build(config.model), {'state_dict': tensors, 'meta': {}}, 'in.pth')
    if 'backbone' not in key:
        # A training may drop heads, of other classes for instance, so that they are named only.
        config.load_from = str(tmp_path / 'in.pth')
        torch.save(tensors, config.load_from)
        check_start(config)
        assert key in capsys.readouterr().err


def test_a_training_with_nan_is_not_resumed(tmp_path):
    content = {'state_dict': {'x': torch.tensor(torch.nan)}, 'optimizer': {}, 'message_hub': {}}
    torch.save(content, tmp_path / 'in.pth')
    with pytest.raises(CheckpointError, match=r'in\.pth.*contain NaN.*x'):
        read_resumable(tmp_path / 'in.pth')
