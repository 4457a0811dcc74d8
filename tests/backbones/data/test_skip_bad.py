"""Bad samples are named; with --skip-bad a training goes on without them, and counts them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from corrupt import cut, edit
from mmengine.config import Config
from mmengine.dataset import BaseDataset, RepeatDataset, pseudo_collate
from mmengine.registry import DATASETS
from torch.utils.data import DataLoader

from backbones.data.classes import set_classes
from backbones.data.skip_bad import (
    SampleError,
    base_datasets,
    count_skipped,
    guard,
    leave_out_bad,
)
from backbones.engine.config import load_config
from backbones.errors import DataError

TRAIN = 'coco/annotations/instances_train2017.json'
IMAGE = 'coco/train2017/train_000001.jpg'
VAL_IMAGE = 'coco/val2017/val_000001.jpg'
LABELS = 'ade/annotations/training/train_000001.png'


@pytest.fixture
def config(data: Path, tiny_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Config]:
    """Reads a tiny config of the set, ``config(task, extra='')``, with its classes."""

    def read(task: str, extra: str = '') -> Config:
        config = load_config(str(tiny_config(task, extra, shapes=data)))
        set_classes(config, ('train', 'val'))
        config.work_dir = str(tmp_path / 'run')
        return config

    return read


def read_record(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def build(config: Config) -> BaseDataset:
    return DATASETS.build(config.train_dataloader.dataset)


@pytest.mark.parametrize(
    ('task', 'corrupt', 'file', 'reason'),
    [
        ('retinanet', cut, IMAGE, 'truncated'),
        ('retinanet', lambda path: path.write_bytes(b''), IMAGE, 'empty'),
        ('retinanet', Path.unlink, IMAGE, 'No such file'),
        ('fpn', Path.unlink, LABELS, 'No such file'),
        ('fpn', cut, LABELS, 'truncated'),
    ],
)
def test_a_bad_sample_is_named(task, corrupt, file, reason, data, config):
    corrupt(data / file)
    dataset = build(config(task))
    guard(dataset)
    with pytest.raises(SampleError, match=f'{data / file}.*{reason}'):
        dataset[0]
    dataset[1]


def test_worker_processes_skip_and_count_together(data, config, tmp_path):
    for number in (1, 2):
        cut(data / f'coco/train2017/train_00000{number}.jpg')
    dataset = RepeatDataset(build(config('retinanet')), times=5)
    record = tmp_path / 'skipped.jsonl'
    for inner in base_datasets(dataset):
        guard(inner, record)
    samples = [
        sample
        for batch in DataLoader(dataset, 2, num_workers=2, collate_fn=pseudo_collate)
        for sample in batch['data_samples']
    ]
    assert len(samples) == 40, 'others were drawn in their place'
    assert not {1, 2} & {sample.img_id for sample in samples}
    skipped = read_record(record)
    assert {Path(one['file']).name for one in skipped} == {'train_000001.jpg', 'train_000002.jpg'}
    assert len(skipped) >= 10 and all('truncated' in one['reason'] for one in skipped)
    assert count_skipped(record) == 2


def test_images_with_faults_are_left_out_of_detection(data, config):
    cut(data / VAL_IMAGE)
    edit(data / TRAIN, lambda c: c['annotations'][0].pop('bbox'))
    edit(data / TRAIN, lambda c: c['annotations'][-1].update(image_id=99))
    of_both = config('mask_rcnn')
    leave_out_bad(of_both, ('train', 'val'))
    training, validation = (
        json.loads(Path(loader.dataset.ann_file).read_text())
        for loader in (of_both.train_dataloader, of_both.val_dataloader)
    )
    assert [image['id'] for image in training['images']] == [2, 3, 4, 5, 6, 7, 8]
    assert {annotation['image_id'] for annotation in training['annotations']} <= set(range(2, 9))
    assert len(validation['images']) == 4
    # What is not shown to the model does not count as missed.
    assert of_both.val_evaluator.ann_file == of_both.val_dataloader.dataset.ann_file
    assert len(build(of_both)) == 7
    skipped = read_record(Path(of_both.work_dir) / 'skipped.jsonl')
    assert len({one['image'] for one in skipped if one['image']}) == 2
    assert str(data / VAL_IMAGE) in [one['file'] for one in skipped]
    assert count_skipped(Path(of_both.work_dir) / 'skipped.jsonl') == 0


def test_what_is_wrong_with_the_whole_set_still_stops(data, config):
    edit(data / TRAIN, lambda c: c['images'][1].update(width=-1))
    of_both = config('retinanet')
    edit(data / TRAIN, lambda c: c['categories'][1].update(id=1))
    with pytest.raises(DataError, match="'disc' and 'square'"):
        leave_out_bad(of_both, ('train', 'val'))


@pytest.mark.parametrize('options', [[], ['--skip-bad']])
def test_training_names_bad_images_or_goes_on_without(
    options, data, tiny_config, run_tool, tmp_path
):
    cut(data / IMAGE)
    if options:
        cut(data / VAL_IMAGE)
        edit(data / TRAIN, lambda c: c['annotations'][-1].pop('bbox'))
    path = tiny_config('retinanet', "train_dataloader['num_workers'] = 2\n", shapes=data)
    run = ['--work-dir', 'run', '--cfg-options', 'train_cfg.max_iters=8']
    done = run_tool('train.py', path, *options, *run)
    assert done.returncode == (0 if options else 1), done.stderr
    if not options:
        assert f'{data / IMAGE}: the file is truncated' in done.stderr
        assert 'Traceback' not in done.stderr
        return
    record = tmp_path / 'run/skipped.jsonl'
    kinds = {one['kind'] for one in read_record(record) if one['file'] == str(data / IMAGE)}
    assert kinds == {'skipped in training'}
    assert (
        f'--skip-bad: 1 image skipped in training, named in {record}' in done.stdout + done.stderr
    )
