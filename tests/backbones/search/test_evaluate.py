"""Evaluating a network: as mmengine's test of it, once, and never again."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from PIL import Image
from searching import prepared, write_search_config, write_supernet
from torch import nn

from backbones.engine.runner import ReliableRunner
from backbones.errors import CheckpointError, ConfigError, DataError
from backbones.search.evaluate import (
    Evaluator,
    calibrate,
    calibration_batches,
    load_supernet,
    stack,
)
from backbones.search.space import Space


def make_evaluator(tmp_path: Path, shapes: Path, task: str = 'fpn') -> Evaluator:
    config = prepared(write_search_config(tmp_path, task, shapes))
    checkpoint = write_supernet(config, tmp_path / 'supernet.pth')
    return Evaluator(config, *load_supernet(config, str(checkpoint)))


@pytest.mark.parametrize('task', ['fpn', 'mask_rcnn'])
def test_as_a_test_of_the_same_weights(task, tmp_path, many_shapes):
    """Not folded, by mmengine's own runner and metric."""
    evaluator = make_evaluator(tmp_path, many_shapes, task)
    largest = evaluator.layout.space.largest
    (found,) = evaluator.evaluate([largest])
    config = evaluator.config
    path = tmp_path / 'network.pth'
    torch.save({'state_dict': evaluator.calibrated_state_dict(largest), 'meta': {}}, path)
    config.merge_from_dict(dict(load_from=str(path), test_dataloader=config.val_dataloader))
    config.test_evaluator = config.val_evaluator
    config.launcher = 'none'
    expected = ReliableRunner.from_cfg(config).test()
    assert found == pytest.approx(expected[evaluator.metric], abs=0.02)
    assert task != 'fpn' or found > 0


def test_calibration_by_hand(tmp_path, many_shapes):
    """The statistics of the first norm are those of what is put into it."""
    evaluator = make_evaluator(tmp_path, many_shapes)
    state_dict = evaluator.calibrated_state_dict(evaluator.layout.space.largest)
    (batch,) = evaluator.batches
    assert batch['inputs'].shape == (6, 3, 64, 64)
    model = MODELS.build(evaluator.config.model)
    model.load_state_dict(evaluator.state_dict)
    outputs = model.backbone.stem.conv1.conv(batch['inputs'])
    name = 'backbone.stem.conv1.norm.running_{}'
    torch.testing.assert_close(state_dict[name.format('mean')], outputs.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(state_dict[name.format('var')], outputs.var(dim=(0, 2, 3)))


@pytest.mark.parametrize('skip_bad', [False, True])
def test_calibration_without_an_unreadable_image(skip_bad, tmp_path, many_shapes):
    shapes = Path(shutil.copytree(many_shapes, tmp_path / 'shapes'))
    options = {'skip_bad': skip_bad, 'search.calibration_images': 99}
    config = prepared(write_search_config(tmp_path, 'fpn', shapes), **options)
    names = Path(config.train_dataloader.dataset.ann_file).read_text().split()
    (image,) = (shapes / 'ade' / 'images' / 'training').glob(f'{names[0]}.*')
    image.write_bytes(b'no image')
    preprocessor = MODELS.build(config.model.data_preprocessor)
    if skip_bad:
        batches = calibration_batches(config, preprocessor)
        assert sum(len(batch['inputs']) for batch in batches) == len(names) - 1
    else:
        with pytest.raises(DataError, match=image.name):
            calibration_batches(config, preprocessor)


@pytest.mark.parametrize(('images', 'expected'), [(9, [3, 3, 3]), (8, [4, 4])])
def test_no_calibration_batch_is_a_rest_of_one(
    images, expected, tmp_path, many_shapes, monkeypatch
):
    monkeypatch.setattr('backbones.search.evaluate.CALIBRATION_BATCH', 4)
    options = {'search.calibration_images': images}
    config = prepared(write_search_config(tmp_path, 'fpn', many_shapes), **options)
    batches = calibration_batches(config, MODELS.build(config.model.data_preprocessor))
    assert [len(batch['inputs']) for batch in batches] == expected


def test_calibration_is_the_mean_over_batches_and_leaves_other_norms():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.BatchNorm2d(2), nn.BatchNorm2d(2)

        def forward(self, inputs, data_samples, mode):
            assert not self.training and mode == 'tensor'
            return self.used(inputs)

    model, images = Model(), [torch.randn(1, 2, size, 5) for size in (4, 4, 6, 3)]
    nn.init.normal_(model.unused.running_mean)
    before = model.unused.running_mean.clone()
    batches = [stack([(image, None) for image in images[:2]]), stack([(images[2], None)])]
    calibrate(model, batches)
    means = [batch['inputs'].mean(dim=(0, 2, 3)) for batch in batches]
    torch.testing.assert_close(model.used.running_mean, sum(means) / 2)
    assert torch.equal(model.unused.running_mean, before) and model.used.momentum == 0.1
    assert not model.used.training
    padded = stack([(image, None) for image in images])['inputs']
    assert padded.shape == (4, 2, 6, 5) and (padded[3, :, 3:] == 0).all()


def test_nothing_is_evaluated_twice(tmp_path, many_shapes, monkeypatch):
    evaluator = make_evaluator(tmp_path, many_shapes)
    space = evaluator.layout.space
    choices = [space.largest, space.smallest, replace(space.largest, neck=8)]
    found = evaluator.evaluate([*choices, space.largest])
    lines = evaluator.path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3 and found[0] == found[3]

    # Killed while the second line was being written.
    evaluator.path.write_bytes(lines[0] + lines[1][:20])
    again = make_evaluator(tmp_path, many_shapes)
    assert again.path == evaluator.path and list(again.known) == choices[:1]
    measured = []
    measure = again.measure
    monkeypatch.setattr(again, 'measure', lambda one: measured.append(one) or measure(one))
    assert again.evaluate(choices) == found[:3] and measured == choices[1:]
    assert len(again.path.read_bytes().splitlines()) == 3


def test_whatever_changes_a_result_is_another_file(tmp_path, many_shapes):
    first = make_evaluator(tmp_path, many_shapes)
    config = prepared(tmp_path / 'tiny_fpn.py', **{'search.seed': 1})
    weights = {name: tensor + 1 for name, tensor in first.state_dict.items()}
    others = [
        Evaluator(config, first.layout, first.state_dict),
        Evaluator(first.config, first.layout, weights),
    ]
    found = [evaluator.path.name for evaluator in (first, *others)]
    for change in (
        {'val_evaluator.iou_metrics': ['mDice']},
        {'val_dataloader.dataset.pipeline.0.imdecode_backend': 'pillow'},
        {'model.decode_head.align_corners': True},
        {'search.calibration_images': 5},
    ):
        other = copy.copy(first)
        other.config = copy.deepcopy(first.config)
        other.config.merge_from_dict(change)
        found.append(f'evaluations_{other.fingerprint()}.jsonl')
    for split in ('val', 'train'):
        names = Path(first.config[f'{split}_dataloader'].dataset.ann_file)
        names.write_text(names.read_text().partition('\n')[2])
        found.append(f'evaluations_{first.fingerprint()}.jsonl')
    assert len(set(found)) == len(found) == 9


def test_corrected_labels_are_other_evaluations(tmp_path, many_shapes):
    """A list of names stays the same when the maps change."""
    shapes = Path(shutil.copytree(many_shapes, tmp_path / 'shapes'))
    evaluator = make_evaluator(tmp_path, shapes)
    before = evaluator.fingerprint()
    assert evaluator.fingerprint() == before
    name = Path(evaluator.config.val_dataloader.dataset.ann_file).read_text().split()[-1]
    (seg_map,) = (shapes / 'ade' / 'annotations' / 'training').glob(f'{name}.*')
    Image.fromarray(np.asarray(Image.open(seg_map))[::-1]).save(seg_map)
    assert evaluator.fingerprint() != before


def test_a_supernet_of_another_space(tmp_path, many_shapes):
    path = write_search_config(tmp_path, 'fpn', many_shapes)
    checkpoint = write_supernet(prepared(path), tmp_path / 'supernet.pth')
    config = prepared(path, **{'search.ratios': [1, 2]})
    with pytest.raises(CheckpointError, match='another space'):
        load_supernet(config, str(checkpoint))


@pytest.mark.parametrize('options', [{'search.seed': 1}, {'search.holdout': 0.4}])
def test_a_supernet_that_was_trained_on_the_hold_out(options, tmp_path, many_shapes):
    path = write_search_config(tmp_path, 'fpn', many_shapes)
    checkpoint = write_supernet(prepared(path), tmp_path / 'supernet.pth')
    with pytest.raises(ConfigError, match=next(iter(options))):
        load_supernet(prepared(path, **options), str(checkpoint))
    # A part of the one that was left out in training.
    load_supernet(prepared(path, **{'search.holdout': 0.32}), str(checkpoint))


def test_an_ordinary_model_is_sorted(tmp_path, many_shapes, capsys):
    config = prepared(write_search_config(tmp_path, 'fpn', many_shapes))
    checkpoint = write_supernet(config, tmp_path / 'model.pth', space=False)
    layout, state_dict = load_supernet(config, str(checkpoint))
    assert 'slimming' in capsys.readouterr().err
    expected = MODELS.build(config.model)
    expected.load_state_dict(torch.load(checkpoint)['state_dict'])
    layout.sort_channels(expected)
    assert all(torch.equal(state_dict[name], t) for name, t in expected.state_dict().items())
    evaluator = Evaluator(config, layout, state_dict)
    small = layout.space.smallest
    extracted = evaluator.calibrated_state_dict(small)
    assert Space.from_config(config) == layout.space
    assert extracted['neck.lateral_convs.0.conv.weight'].shape[0] == 8


def test_a_deployed_model_is_refused(tmp_path, many_shapes):
    from backbones.deploy import switch_to_deploy

    config = prepared(write_search_config(tmp_path, 'fpn', many_shapes))
    model = switch_to_deploy(MODELS.build(config.model))
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, tmp_path / 'deployed.pth')
    with pytest.raises(CheckpointError, match='deploy'):
        load_supernet(config, str(tmp_path / 'deployed.pth'))
