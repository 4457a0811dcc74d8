"""The runner's own config, whose text is that of mmengine's, and what it says as it loads."""

import contextlib
import copy
import io
import os
import pty

import pytest
import torch
from golden import published
from mmengine.config import Config
from mmengine.dataset import BaseDataset, RepeatDataset
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from toy_training import PowerCut, ToyModel, ToyNumbers, disturb, toy_config, train

from backbones import EfficientFormerV2
from backbones.engine.checkpoints import resume
from backbones.engine.console import Progress, source_of
from backbones.engine.runner import FormattedConfig, ReliableRunner
from backbones.engine.sampler import SeededDataset
from backbones.weights import config_of


def test_the_text_is_mmengines_and_kept():
    config = Config(dict(model=dict(type='A', sizes=[1, 2]), work_dir='here'))
    formatted = FormattedConfig()
    formatted.__setstate__(config.__getstate__())
    # As mmengine's Runner does with its config.
    formatted = copy.deepcopy(formatted)
    assert formatted.pretty_text == config.pretty_text
    assert formatted.pretty_text is formatted.pretty_text
    assert 'pretty_text' not in formatted


@pytest.mark.parametrize(('counts', 'rate'), [(1, 0.00125), (4, 0.005)])
def test_averaged_gradients_count_for_the_learning_rate(counts, rate, tmp_path, capsys):
    """Two images a batch where 16 are meant for 0.01; the saved config keeps the 16."""
    config = toy_config(tmp_path, train_cfg__max_iters=4, optim_wrapper__accumulative_counts=counts)
    config.auto_scale_lr = dict(enable=True, base_batch_size=16)
    runner = ReliableRunner.from_cfg(config)
    runner.train()
    assert runner.optim_wrapper.param_groups[0]['initial_lr'] == pytest.approx(rate)
    assert runner.cfg.auto_scale_lr.base_batch_size == 16
    assert ('of 4 batches' in capsys.readouterr().out) == (counts == 4)


@MODELS.register_module(force=True)
class ToyWithBackbone(ToyModel):
    """One whose backbone has pretrained weights that cannot be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = BaseModule(dict(type='Pretrained', checkpoint='missing.pth'))


def test_the_saved_config_of_a_resumed_training_starts_a_new_one(tmp_path):
    """From the weights that the first run started from, which are not fetched to resume."""
    train(toy_config(tmp_path / 'other'))
    options = dict(model__type='ToyWithBackbone', load_from=str(tmp_path / 'other/iter_24.pth'))
    with pytest.raises(PowerCut):
        train(toy_config(tmp_path / 'run', **options, **disturb(15, 'cut_power')))
    config = toy_config(tmp_path / 'run', **options)
    resume(config, 'auto')
    assert config.load_from == str(tmp_path / 'run/iter_12.pth')
    train(config)
    saved = Config.fromfile(max((tmp_path / 'run').glob('*.py')))
    last = torch.load(tmp_path / 'run/iter_24.pth', weights_only=False)
    for each in (saved, config_of(last)):
        assert each.load_from == options['load_from'] and not each.resume
        assert 'started_from' not in each


@pytest.mark.parametrize('change', [None, 'lacks', 'other shape'])
def test_what_a_checkpoint_does_not_give_is_named(change, tmp_path, capsys):
    """The backbone, in the authors' layout, is all there."""
    runner = ReliableRunner.from_cfg(toy_config(tmp_path, custom_hooks=[]))
    runner.model.backbone = EfficientFormerV2('s0')
    weights = runner.model.layers.state_dict(prefix='layers.')
    weights |= {f'backbone.{key}': value for key, value in published('snap_s0_imagenet').items()}
    del weights['layers.1.num_batches_tracked']
    if change == 'lacks':
        del weights['layers.0.weight']
    elif change:
        weights['layers.3.weight'] = torch.zeros(3, 8)
    torch.save({'state_dict': weights}, tmp_path / 'weights.pth')
    runner.load_checkpoint(str(tmp_path / 'weights.pth'))
    said = capsys.readouterr().err
    assert ('layers.0.weight' in said) == (change == 'lacks')
    assert ('layers.3.weight' in said) == (change == 'other shape')
    assert ('random' in said) == bool(change) and 'backbone' not in said


def test_the_source_of_images_is_found_inside_wrappers():
    """A training's dataset is always in one."""
    cells = BaseDataset('train.json', data_root='cells', lazy_init=True)
    cells = RepeatDataset(cells, 2, lazy_init=True)
    assert source_of(SeededDataset(cells, 0)) == 'cells/train.json'
    assert source_of(SeededDataset(ToyNumbers(), 0)) == 'ToyNumbers'


def test_the_time_left_is_seen_in_a_narrow_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr('sys.stdout', terminal)
    monkeypatch.setenv('COLUMNS', '79')
    progress = Progress('iteration', 40000, 12000)
    progress.start_t -= 1.3
    progress.step('loss 0.1234, lr 9.876e-05')
    assert '10:06:' in str(progress) and len(str(progress)) <= 79


def test_there_is_progress_in_a_terminal_of_unknown_size(monkeypatch):
    """A new pseudo terminal has 0 rows and 0 columns."""
    reader, writer = pty.openpty()
    with os.fdopen(writer, 'w') as terminal:
        monkeypatch.setattr('sys.stdout', terminal)
        Progress('iteration', 3).step()
    shown = b''
    with contextlib.suppress(OSError):  # that is how the other end hears of the closing
        while part := os.read(reader, 1000):  # what was written may come in parts
            shown += part
    os.close(reader)
    assert b'iteration' in shown
