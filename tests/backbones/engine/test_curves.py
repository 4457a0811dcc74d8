"""Curves are drawn over iterations, whatever a training counts in."""

import json

import pytest

from backbones.engine.curves import draw_curves, read_log


def write_log(folder, *entries) -> None:
    (folder / 'vis_data').mkdir(parents=True)
    lines = '\n'.join(map(json.dumps, entries))
    (folder / 'vis_data/scalars.json').write_text(f'{lines}\n{{"cut sho')


@pytest.mark.parametrize('validated_at', [(25, 50), (1, 2)], ids=['iterations', 'epochs'])
def test_metrics_lie_at_the_iteration_of_their_validation(validated_at, tmp_path):
    first, second = validated_at
    write_log(
        tmp_path / '1',
        {'lr': 0.1, 'loss': 2.0, 'iter': 20, 'step': 20},
        {'mIoU': 30.0, 'step': first},
        {'lr': 0.1, 'loss': 1.0, 'iter': 40, 'step': 40},
        {'mIoU': 50.0, 'step': second},
    )
    training, validation = read_log(str(tmp_path))
    assert training['loss'] == [(20, 2.0), (40, 1.0)]
    assert validation['mIoU'] == [(max(20, first), 30.0), (max(40, second), 50.0)]


def test_a_validation_caught_up_after_resuming_lies_at_the_end_of_its_epoch(tmp_path):
    write_log(
        tmp_path / '1',
        {'lr': 0.1, 'loss': 2.0, 'epoch': 1, 'step': 50},
        {'bbox_mAP': 0.3, 'step': 1},
        {'lr': 0.1, 'loss': 1.5, 'epoch': 2, 'step': 75},
        {'lr': 0.1, 'loss': 1.0, 'epoch': 2, 'step': 100},
    )
    write_log(tmp_path / '2', {'bbox_mAP': 0.5, 'step': 2})
    assert read_log(str(tmp_path))[1]['bbox_mAP'] == [(50, 0.3), (100, 0.5)]


def test_a_resumed_run_replaces_what_it_did_again(tmp_path):
    assert draw_curves(str(tmp_path)) is None
    for name, loss in (('20260101_000000', 2.0), ('20260102_000000', 1.5)):
        write_log(tmp_path / name, {'lr': 0.1, 'loss': loss, 'step': 20})
    assert read_log(str(tmp_path))[0]['loss'] == [(20, 1.5)]
    assert draw_curves(str(tmp_path)).read_bytes().startswith(b'\x89PNG')
