"""tools/check_dataset.py: what it prints and writes, and its exit codes."""

import json

import pytest
from corrupt import cut, detach, edit

TRAIN = 'coco/annotations/instances_train2017.json'


@pytest.mark.parametrize(
    ('corrupt', 'kind', 'code'),
    [
        (lambda data: cut(data / 'coco/train2017/train_000001.jpg'), 'unreadable image', 1),
        (lambda data: edit(data / TRAIN, detach), 'image without objects', 0),
    ],
)
def test_findings_are_printed_and_written_and_errors_exit_with_1(
    corrupt, kind, code, data, tiny_config, run_tool, tmp_path
):
    corrupt(data)
    config = tiny_config('retinanet', shapes=data)
    done = run_tool('check_dataset.py', config, '--split', 'train', '--json', 'out/found.json')
    assert done.returncode == code, done.stderr
    file = str(data / 'coco/train2017/train_000001.jpg')
    assert file in done.stdout and kind in done.stdout
    written = json.loads((tmp_path / 'out/found.json').read_text())
    assert (written['errors'], written['warnings']) == (code, 1 - code)
    (found,) = written['findings']
    assert (found['file'], found['kind'], found['split']) == (file, kind, 'train')


def test_a_wrong_config_exits_with_2(run_tool):
    done = run_tool('check_dataset.py', 'nowhere.py')
    assert done.returncode == 2
    assert 'nowhere.py' in done.stderr and 'Traceback' not in done.stderr
