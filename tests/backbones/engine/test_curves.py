"""Curves are drawn over iterations, whatever a training counts in."""

import json

from backbones.engine.curves import draw_curves, read_log


def write_log(folder, entries) -> None:
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, entries)))


def test_metrics_lie_at_the_iteration_of_their_validation(tmp_path):
    write_log(
        tmp_path / 'iterations' / '1' / 'vis_data',
        [
            {'lr': 0.1, 'loss': 2.0, 'iter': 20, 'step': 20},
            {'mIoU': 30.0, 'step': 25},
            {'lr': 0.1, 'loss': 1.0, 'iter': 40, 'step': 40},
            {'mIoU': 50.0, 'step': 50},
        ],
    )
    training, validation = read_log(str(tmp_path / 'iterations'))
    assert training['loss'] == [(20, 2.0), (40, 1.0)]
    assert validation['mIoU'] == [(25, 30.0), (50, 50.0)]

    write_log(
        tmp_path / 'epochs' / '1' / 'vis_data',
        [
            {'lr': 0.1, 'loss': 2.0, 'epoch': 1, 'iter': 100, 'step': 100},
            {'coco/bbox_mAP': 0.2, 'step': 1},
            {'lr': 0.1, 'loss': 1.0, 'epoch': 2, 'iter': 200, 'step': 200},
            {'coco/bbox_mAP': 0.3, 'step': 2},
        ],
    )
    _, validation = read_log(str(tmp_path / 'epochs'))
    assert validation['coco/bbox_mAP'] == [(100, 0.2), (200, 0.3)]


def test_a_resumed_run_replaces_what_it_did_again(tmp_path):
    for name, loss in (('20260101_000000', 2.0), ('20260102_000000', 1.5)):
        entries = [{'lr': 0.1, 'loss': loss, 'step': 20}]
        write_log(tmp_path / name / 'vis_data', entries)
    assert read_log(str(tmp_path))[0]['loss'] == [(20, 1.5)]
    assert draw_curves(str(tmp_path)).read_bytes().startswith(b'\x89PNG')


def test_nothing_logged_draws_nothing(tmp_path):
    assert draw_curves(str(tmp_path)) is None
