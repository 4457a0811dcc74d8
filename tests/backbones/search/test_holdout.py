"""The hold-out: no image of it is trained on, and every other one is."""

import json
import shutil
from pathlib import Path

import pytest
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS
from mmseg.datasets import ADE20KDataset
from searching import prepared, write_search_config

from backbones.data.classes import set_classes
from backbones.data.config_datasets import datasets_of
from backbones.engine.config import load_config
from backbones.engine.preflight import check_training
from backbones.errors import ConfigError, DataError
from backbones.search.holdout import leave_out_holdout, prepare_holdout, use_holdout

TASKS = ('fpn', 'retinanet')
COCO = dict(type='mmdet.CocoDataset')
TWO = dict(type='ConcatDataset', datasets=[COCO, COCO], _delete_=True)


def images(dataset: ConfigDict) -> list[str]:
    built = DATASETS.build(dataset)
    paths = [Path(built.get_data_info(index)['img_path']) for index in range(len(built))]
    assert all(path.is_file() for path in paths)
    return [path.name for path in paths]


def all_images(shapes: Path) -> list[str]:
    return sorted(path.name for path in (shapes / 'ade' / 'images' / 'training').iterdir())


def parts_of(config: Config) -> list[ConfigDict]:
    """The hold-out and the rest."""
    return [config.val_dataloader.dataset, config.train_dataloader.dataset]


@pytest.mark.parametrize('task', TASKS)
def test_holdout_and_rest_are_disjoint_and_complete(task, tmp_path, many_shapes):
    config = prepared(write_search_config(tmp_path, task, many_shapes))
    held_out = images(config.val_dataloader.dataset)
    rest = images(config.train_dataloader.dataset)
    assert len(held_out) == 8
    assert sorted(held_out + rest) == all_images(many_shapes)

    path = str(tmp_path / f'tiny_{task}.py')
    alone = load_config(path)
    alone.work_dir = str(tmp_path / 'other')
    leave_out_holdout(alone)
    set_classes(alone, ('train',))
    assert images(alone.train_dataloader.dataset) == rest
    other = prepared(Path(path), **{'search.seed': 1})
    assert set(images(other.val_dataloader.dataset)) != set(held_out)


@pytest.mark.parametrize('task', TASKS)
def test_what_was_split_is_not_split_again(task, tmp_path, many_shapes):
    """The training of a supernet saves its config, which then lacks the hold-out."""
    path = write_search_config(tmp_path, task, many_shapes)
    config = load_config(str(path))
    config.work_dir = str(tmp_path / 'work')
    leave_out_holdout(config)
    config.dump(tmp_path / 'work' / path.name)
    saved = load_config(str(tmp_path / 'work' / path.name))
    with pytest.raises(ConfigError, match='without the hold-out'):
        leave_out_holdout(saved)


def test_skip_bad_splits_what_training_does(tmp_path, many_shapes):
    shapes = Path(shutil.copytree(many_shapes, tmp_path / 'shapes'))
    path = write_search_config(tmp_path, 'fpn', shapes)
    config = prepared(path)
    bad = {images(dataset)[0] for dataset in parts_of(config)}
    for name in bad:
        segmentation_map = shapes / 'ade' / 'annotations' / 'training' / name
        segmentation_map.with_suffix('.png').write_bytes(b'no image')

    larger = {'search.holdout': 0.4}
    trained, searched, strict = (load_config(str(path), larger) for _ in range(3))
    for name, each in dict(trained=trained, searched=searched, strict=strict).items():
        each.work_dir, each.skip_bad = str(tmp_path / name), each is not strict
    check_training(trained)
    # In the work folder of the training, which keeps what it has written.
    searched.work_dir = trained.work_dir
    written = {path: path.read_bytes() for path in Path(trained.work_dir).rglob('*.*')}
    assert len(written) == 2
    leave_out_holdout(trained)
    trained_on = images(trained.train_dataloader.dataset)
    prepare_holdout(searched)
    assert all(path.read_bytes() == content for path, content in written.items())
    held_out, rest = map(images, parts_of(searched))
    assert rest == trained_on
    assert sorted(held_out + rest) == sorted(set(all_images(shapes)) - bad)
    with pytest.raises(DataError):
        prepare_holdout(strict)


@pytest.mark.parametrize('task', TASKS)
def test_validation_is_through_the_test_pipeline(task, tmp_path, many_shapes):
    path = write_search_config(tmp_path, task, many_shapes)
    config, before = prepared(path), load_config(str(path))
    dataset = config.val_dataloader.dataset
    assert dataset.test_mode and 'filter_cfg' not in dataset
    assert dataset.pipeline == before.val_dataloader.dataset.pipeline
    assert len(images(config.test_dataloader.dataset)) == 4
    if task == 'retinanet':
        content = json.loads(Path(config.val_evaluator.ann_file).read_text())
        assert len(content['images']) == 8
        ids = {one['id'] for one in content['images']}
        assert {one['image_id'] for one in content['annotations']} <= ids


@pytest.mark.parametrize('first', [12, 23])
def test_datasets_inside_of_wrappers(first, tmp_path, many_shapes):
    """Two parts of the data, one of them repeated; of a single image none is held out."""
    config = load_config(str(write_search_config(tmp_path, 'fpn', many_shapes)))
    config.work_dir = str(tmp_path)
    whole, names, halves = config.train_dataloader.dataset, all_images(many_shapes), []
    for half, part in enumerate((names[:first], names[first:])):
        file = tmp_path / f'half{half}.txt'
        file.write_text('\n'.join(name[:-4] for name in part))
        halves.append(ConfigDict(whole, ann_file=str(file)))
    halves[0] = ConfigDict(type='RepeatDataset', times=2, dataset=halves[0])
    config.train_dataloader.dataset = ConfigDict(type='ConcatDataset', datasets=halves)
    set_classes(config, ('train', 'val'))
    use_holdout(config)
    held_out = [name for part in datasets_of(config, ('val',)) for name in images(part)]
    repeated, other = config.train_dataloader.dataset.datasets
    rest = images(repeated.dataset) + images(other)
    assert len(held_out) == 8 and sorted(held_out + rest) == names
    assert len(DATASETS.build(config.val_dataloader.dataset)) == 8


def test_a_class_that_is_not_in_it_is_named(tmp_path, many_shapes, capsys):
    path = write_search_config(tmp_path, 'fpn', many_shapes)
    classes = (many_shapes / 'classes.txt').read_text().split()
    (tmp_path / 'more.txt').write_text('\n'.join([*classes, 'unicorn']))
    palette = [(index, 0, 0) for index in range(len(classes) + 1)]
    config = prepared(path, classes=str(tmp_path / 'more.txt'), palette=palette)
    assert config.unseen_classes == ['unicorn']
    assert 'unicorn' in capsys.readouterr().err


def test_the_classes_may_be_those_of_the_type(tmp_path, many_shapes):
    config = prepared(write_search_config(tmp_path, 'fpn', many_shapes), classes=None)
    known = ADE20KDataset.METAINFO['classes']
    assert set(known[7:]) <= set(config.unseen_classes) < set(known)


@pytest.mark.parametrize(
    ('options', 'word'),
    [
        ({'search.holdout': 0.1}, '0.34'),
        ({'search.holdout': 2}, 'holdout'),
        ({'search.holdout': 'abc'}, 'holdout.*abc'),
        ({'search.holdout': 0.99}, 'none to train on'),
        ({'train_dataloader.dataset.type': 'mmdet.LVISV1Dataset'}, 'LVISV1Dataset'),
        ({'train_dataloader.dataset': TWO}, 'one COCO dataset'),
    ],
)
def test_errors(options: dict, word: str, tmp_path, many_shapes):
    config: Config = load_config(str(write_search_config(tmp_path, 'retinanet', many_shapes)))
    config.merge_from_dict(options)
    config.work_dir = str(tmp_path)
    with pytest.raises(ConfigError, match=word):
        leave_out_holdout(config)
