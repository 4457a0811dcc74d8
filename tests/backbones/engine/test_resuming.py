"""A training that is stopped at any step and resumed ends as one that was left alone."""

import logging
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmdet.engine.hooks import PipelineSwitchHook
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.runner import IterBasedTrainLoop
from torch.utils.data import BatchSampler, DataLoader, Dataset
from toy_training import EMA, PowerCut, ToyNumbers, differences, disturb, end_of, toy_config, train

from backbones.engine.checkpoints import STARTED, resume
from backbones.engine.hooks import ValLossHook
from backbones.engine.loops import ResumableIterLoop
from backbones.engine.preemption import Preempted, PreemptionHook
from backbones.engine.runner import ReliableRunner
from backbones.engine.sampler import ResumableLoader, ResumableSampler, SampleIndex, SeededDataset


def finish(folder: Path, **settings: Any) -> dict:
    """Resume a training by the tools' own way and let it come to its end."""
    config = toy_config(folder, **settings)
    resume(config, 'auto')
    train(config)
    return end_of(folder)


@pytest.fixture(scope='module', params=['iterations', 'epochs', 'workers', 'accumulating'])
def settings(request) -> dict:
    return {
        'iterations': {},
        'epochs': {'by_epoch': True},
        'workers': {
            'train_dataloader__num_workers': 2,
            'train_dataloader__persistent_workers': True,
        },
        'accumulating': {'optim_wrapper__accumulative_counts': 4},
    }[request.param]


@pytest.fixture(scope='module')
def alone(settings, tmp_path_factory) -> dict:
    """The end of a training that was left alone."""
    folder = tmp_path_factory.mktemp('alone')
    train(toy_config(folder, **settings))
    return end_of(folder)


def test_the_time_of_a_new_start_is_kept_until_it_is_resumed(tmp_path):
    train(toy_config(tmp_path))
    assert (tmp_path / STARTED).read_text() <= time.strftime('%Y%m%d_%H%M%S')
    finish(tmp_path)
    assert not (tmp_path / STARTED).exists()


def test_a_start_that_fails_leaves_the_training_before_it(tmp_path):
    with pytest.raises(FileNotFoundError):
        train(toy_config(tmp_path, load_from='missing.pth'))
    assert not (tmp_path / STARTED).exists()


@pytest.mark.parametrize('step', [0, 5, 13])
def test_sigterm_saves_the_step_and_nothing_is_lost(step, settings, alone, tmp_path):
    with pytest.raises(Preempted):
        train(toy_config(tmp_path, **settings, **disturb(step, 'send_sigterm')))
    saved = torch.load(tmp_path / 'preempted.pth', weights_only=False)['meta']['iter']
    accumulated = settings.get('optim_wrapper__accumulative_counts', 1)
    assert step < saved <= step + accumulated, 'stopped with the next update'
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not differences(finish(tmp_path, **settings), alone)


def test_sigterm_while_validating_is_not_kept_waiting(settings, alone, tmp_path):
    step = 20 if settings.get('by_epoch') else 12
    with pytest.raises(Preempted):
        train(toy_config(tmp_path, **settings, **disturb(step, 'send_sigterm', validation=True)))
    saved = torch.load(tmp_path / 'preempted.pth', weights_only=False)
    assert saved['meta']['iter'] == step
    assert not differences(finish(tmp_path, **settings), alone)


@pytest.mark.parametrize('validation', [False, True], ids=['training', 'validating'])
def test_what_was_due_when_the_power_went_is_caught_up(validation, settings, alone, tmp_path):
    """Step 12 is saved before its validation, as epoch 2, which ends with step 20."""
    step = 20 if settings.get('by_epoch') else 12
    step += 0 if validation else 3
    with pytest.raises(PowerCut):
        train(toy_config(tmp_path, **settings, **disturb(step, 'cut_power', validation)))
    assert not differences(finish(tmp_path, **settings), alone)


def test_a_corrupt_newest_checkpoint_costs_its_interval_only(settings, alone, tmp_path, capsys):
    with pytest.raises(PowerCut):
        train(toy_config(tmp_path, **settings, **disturb(22, 'cut_power')))
    newest = Path((tmp_path / 'last_checkpoint').read_text())
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert not differences(finish(tmp_path, **settings), alone)
    assert f'skipped: checkpoint {newest}' in capsys.readouterr().out


def test_a_drawn_seed_is_kept(tmp_path):
    """Without --seed the resumed training draws another one, unless the checkpoint's is used."""
    with pytest.raises(PowerCut):
        train(toy_config(tmp_path, randomness__seed=None, **disturb(15, 'cut_power')))
    (last,) = {torch.load(p, weights_only=False)['meta']['seed'] for p in tmp_path.glob('iter_*')}
    finish(tmp_path, randomness__seed=None)
    assert torch.load(tmp_path / 'iter_24.pth', weights_only=False)['meta']['seed'] == last


def test_a_loss_that_is_no_longer_computed_is_no_longer_logged(tmp_path):
    """mmengine logs the last one again with every validation."""
    runner = ReliableRunner.from_cfg(toy_config(tmp_path, **disturb(13, 'send_sigterm')))
    runner.register_hook(ValLossHook())
    with pytest.raises(Preempted):
        runner.train()
    finish(tmp_path)
    logs = ''.join(path.read_text() for path in sorted(tmp_path.glob('*/vis_data/scalars.json')))
    validations = [line for line in logs.splitlines() if 'toy/score' in line]
    assert ['val/loss' in line for line in validations] == [True, True, False, False]


def test_a_finished_training_stays_as_it_is(alone, settings, tmp_path):
    train(toy_config(tmp_path, **settings))
    assert not differences(finish(tmp_path, **settings), alone)


@pytest.mark.parametrize('by_epoch', [False, True])
def test_a_checkpoint_that_is_only_loaded_gives_its_weights(by_epoch, tmp_path):
    """One of another training, stopped in the middle of its second epoch."""
    with pytest.raises(Preempted):
        train(toy_config(tmp_path / 'other', by_epoch, **disturb(15, 'send_sigterm')))
    whole = torch.load(tmp_path / 'other' / 'preempted.pth', weights_only=False)
    torch.save({'state_dict': whole['state_dict'], 'meta': {}}, tmp_path / 'weights.pth')
    weights, again = tmp_path / 'weights', tmp_path / 'again'
    train(toy_config(weights, by_epoch, load_from=str(tmp_path / 'weights.pth')))
    load = {'load_from': str(tmp_path / 'other' / 'preempted.pth')}
    with pytest.raises(Preempted):
        train(toy_config(again, by_epoch, **load, **disturb(13, 'send_sigterm')))
    finish(again, by_epoch=by_epoch, **load)
    assert not differences(end_of(again), end_of(weights))


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'default_hooks__checkpoint__out_dir': 'disk'},
        {'default_hooks__checkpoint__save_best': 'auto'},
    ],
)
def test_a_copied_folder_continues_beside_the_first(options, tmp_path, monkeypatch):
    """Each of them keeps one best checkpoint, its own."""
    monkeypatch.chdir(tmp_path)
    first, second = tmp_path / 'first', tmp_path / 'second'
    train(toy_config(first, **options))
    disk = tmp_path / 'disk' if 'disk' in options.values() else tmp_path
    for folder in {tmp_path, disk}:
        shutil.copytree(folder / 'first', folder / 'second')
    (best,) = disk.glob('first/best_*')
    # So that there is a better one.
    settings = {'default_hooks__checkpoint__rule': 'less', 'train_cfg__max_iters': 30}
    finish(second, **options, **settings)
    assert best.is_file()
    (own,) = disk.glob('second/best_*')
    assert own.name != best.name


def test_a_best_checkpoint_by_what_is_not_measured(tmp_path):
    train(toy_config(tmp_path, default_hooks__checkpoint__save_best='toy/other'))
    (best,) = tmp_path.glob('best_*')
    assert best.name.startswith('best_toy_score')


def draws_of(rank: int, world_size: int, batch_size: int) -> list:
    """The first 24 images, and the numbers that their random ones come from."""
    sampler = InfiniteSampler(ToyNumbers(21), seed=0)
    draws = ResumableSampler(BatchSampler(sampler, batch_size, drop_last=False), endless=True)
    sampler.rank, sampler.world_size = rank, world_size
    draws.rank, draws.world_size = rank, world_size
    return [
        draw for _, batch in zip(range(24 // batch_size), draws, strict=False) for draw in batch
    ]


def test_two_processes_share_what_one_would_read():
    """The same images, with the same random numbers, over the ends of epochs too."""
    one = draws_of(0, 1, 4)
    two = [draws_of(rank, 2, 2)[:12] for rank in (0, 1)]
    assert [draw for pair in zip(*two, strict=True) for draw in pair] == one
    assert len({draw.index for draw in one[:21]}) == 21


def test_a_finite_sampler_begins_anew_in_another_order():
    sampler = ResumableSampler(BatchSampler(DefaultSampler(ToyNumbers(21), seed=0), 3, False), True)
    draws = [draw for _, batch in zip(range(14), sampler, strict=False) for draw in batch]
    assert [draw.epoch for draw in draws] == [0] * 21 + [1] * 21
    first, second = ([draw.index for draw in draws[at : at + 21]] for at in (0, 21))
    assert first != second and sorted(first) == sorted(second) == list(range(21))


def test_an_image_has_other_random_numbers_in_every_epoch_and_place():
    dataset = SeededDataset(ToyNumbers(), seed=0)
    places = [SampleIndex(5, epoch, number) for epoch in (0, 1) for number in (0, 1)]
    noise, again = ([float(dataset[place]['inputs'][1]) for place in places] for _ in range(2))
    assert len(set(noise)) == 4 and noise == again


def test_every_step_of_every_process_has_random_numbers_of_its_own(monkeypatch):
    seeds = []
    monkeypatch.setattr(
        IterBasedTrainLoop, 'run_iter', lambda *_: seeds.append(torch.initial_seed())
    )
    monkeypatch.setattr('backbones.engine.loops.may_save', lambda runner: False)
    loop = object.__new__(ResumableIterLoop)
    loop._runner = SimpleNamespace(seed=3)
    for rank in (0, 1):
        monkeypatch.setattr('mmengine.dist.get_rank', lambda rank=rank: rank)
        for loop._iter in (0, 1):
            loop.run_iter()
    assert len(set(seeds)) == 4


def test_skipping_reads_no_image():
    sampler = ResumableSampler(BatchSampler(InfiniteSampler(ToyNumbers(7), seed=0), 2, False), True)
    whole = [batch for _, batch in zip(range(10), sampler, strict=False)]
    again = ResumableSampler(BatchSampler(InfiniteSampler(ToyNumbers(7), seed=0), 2, False), True)
    again.start_at(0, 6)
    assert next(iter(again)) == whole[6]


class Numbers(Dataset):
    """Its own indices, through a pipeline."""

    pipeline = staticmethod(int)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        return self.pipeline(index)


@pytest.mark.parametrize('workers', [0, 1])
def test_a_hook_changes_the_pipeline(workers):
    """As RTMDet's and YOLOX's trainings do for their last epochs."""
    loader = DataLoader(Numbers(), num_workers=workers, persistent_workers=workers > 0)
    loader = ResumableLoader(loader, seed=0, endless=False)
    assert sorted(map(int, loader)) == [0, 1, 2, 3]
    switch = PipelineSwitchHook(1, [lambda number: number + 10])
    switch.before_train_epoch(
        SimpleNamespace(epoch=1, train_dataloader=loader, logger=logging.getLogger())
    )
    assert sorted(map(int, loader)) == [10, 11, 12, 13]


@pytest.mark.skipif(os.name == 'nt', reason='processes are not forked')
def test_a_process_forked_in_training_ends_by_sigterm():
    """As those in which VOCMetric computes: a training waited for them for ever."""
    hook = PreemptionHook()
    with hook.watch():
        forked = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
        forked.start()
        time.sleep(0.5)
        forked.terminate()
        forked.join(20)
        ended = forked.exitcode
        forked.kill()
        assert ended == -signal.SIGTERM
        assert not hook.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert hook.requested


def test_a_validation_is_stopped_at_a_batch_that_all_processes_have(monkeypatch):
    """A batch sampler of one's own may make different numbers of batches; ten for the other one."""
    asked = []

    def all_reduce(number: torch.Tensor, operation: str) -> None:
        asked.append(operation)
        if operation == 'min':
            number.fill_(10)

    monkeypatch.setattr('mmengine.dist.get_world_size', lambda: 2)
    monkeypatch.setattr('mmengine.dist.all_reduce', all_reduce)
    optim_wrapper = SimpleNamespace(should_update=lambda: True)
    loader = DataLoader(range(40), batch_sampler=[[0]] * 11)
    runner = SimpleNamespace(val_dataloader=loader, optim_wrapper=optim_wrapper)
    hook = PreemptionHook()
    hook.before_val(runner)
    for index in range(len(loader)):
        hook.after_val_iter(runner, index)
    assert asked == ['min', 'max']


def counting(patience: int) -> dict:
    """A hook that no result is good enough for, so that it counts every validation."""
    hook = {'type': 'EarlyStoppingHook', 'monitor': 'toy/score', 'rule': 'greater'}
    return {**hook, 'patience': patience, 'min_delta': 1e9}


@pytest.mark.parametrize('by_epoch', [False, True])
@pytest.mark.parametrize('stop', ['send_sigterm', 'cut_power'])
def test_early_stopping_counts_on_after_a_stop(stop, by_epoch, tmp_path):
    """The first validation is before the stop, and the second has to end the training."""
    settings = {'by_epoch': by_epoch, 'train_cfg__val_interval': 1 if by_epoch else 6}
    step, end = (15, 20) if by_epoch else (9, 12)
    hooks = disturb(step, stop)
    hooks['custom_hooks'].append(counting(patience=1))
    with pytest.raises(Preempted if stop == 'send_sigterm' else PowerCut):
        train(toy_config(tmp_path, **settings, **hooks))
    config = toy_config(tmp_path, **settings, custom_hooks=[EMA, counting(patience=1)])
    resume(config, 'auto')
    train(config)
    assert end_of(tmp_path)['place'][0] == end
