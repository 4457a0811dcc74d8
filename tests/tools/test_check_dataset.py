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
    corrupt, kind, code, data, tiny_config, call_tool, tmp_path
):
    corrupt(data)
    config = tiny_config('retinanet', shapes=data)
    out = tmp_path / 'out/found.json'
    ended, said = call_tool('check_dataset.py', config, '--split', 'train', '--json', out)
    assert ended == code, said
    file = str(data / 'coco/train2017/train_000001.jpg')
    assert file in said and kind in said
    written = json.loads(out.read_text())
    assert (written['errors'], written['warnings']) == (code, 1 - code)
    (found,) = written['findings']
    assert (found['file'], found['kind'], found['split']) == (file, kind, 'train')


def test_a_wrong_config_exits_with_2(call_tool):
    code, said = call_tool('check_dataset.py', 'nowhere.py')
    assert code == 2
    assert 'nowhere.py' in said and 'Traceback' not in said
