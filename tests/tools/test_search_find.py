"""tools/search.py find and take, as a user runs them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from searching import prepared, write_latency, write_search_config, write_supernet
from tiny import draw_shapes
from tool_process import TOOLS, run_in_two, run_tool

from backbones.engine.config import load_config

ARGUMENTS = ('tiny_fpn.py', 'supernet.pth', '--work-dir', 'work')
TARGETS = ('--max-latency', 110, '--max-parameters', '1e5', '--evaluations', 40)


@pytest.fixture(scope='module')
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny_fpn.py, supernet.pth, a model of latency and what a search wrote."""
    folder = tmp_path_factory.mktemp('searched')
    shapes = draw_shapes(folder / 'many', train=24, val=4, size=64)
    path = write_search_config(folder, 'fpn', shapes)
    write_supernet(prepared(path), folder / 'supernet.pth')
    write_latency(load_config(str(path)), folder / 'work')
    done = run_tool(folder, 'search.py', 'find', *ARGUMENTS, *TARGETS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f'number {results(folder)[0]["found"]}' in done.stdout and 'left' in done.stdout
    return folder


@pytest.fixture
def folder(searched: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(searched, tmp_path / 'copy'))


def results(folder: Path) -> tuple[dict, list[str]]:
    """front.json, and the evaluations."""
    (log,) = (folder / 'work' / 'search').glob('evaluations_*.jsonl')
    front = json.loads((folder / 'work' / 'search' / 'front.json').read_text())
    return front, log.read_text().splitlines()


def test_find_goes_on_after_it_was_killed(folder):
    front, lines = results(folder)
    found = front['networks'][front['found'] - 1]
    assert found['latency_ms'] <= 110 and found['parameters'] <= 1e5
    assert len(set(lines)) == len(lines) and 'supernet.pth' in front['notes'][0]
    (log,) = (folder / 'work' / 'search').glob('evaluations_*.jsonl')
    whole = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b''.join(whole[:-4]) + whole[-4][:30])
    (folder / 'work' / 'search' / 'front.json').unlink()
    again = run_tool(folder, 'search.py', 'find', *ARGUMENTS, *TARGETS)
    assert again.returncode == 0, again.stderr[-3000:]
    assert results(folder) == (front, lines)


@pytest.mark.slow
def test_find_in_two_processes_is_as_in_one(folder):
    alone = results(folder)
    shutil.rmtree(folder / 'work' / 'search')
    command = [TOOLS / 'search.py', 'find', *ARGUMENTS, *TARGETS, '--launcher', 'pytorch']
    done, _ = run_in_two(folder, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(folder) == alone


def test_a_taken_network_is_an_ordinary_one(folder):
    front, _ = results(folder)
    take, number = ('search.py', 'take', *ARGUMENTS), ('--number', front['found'])
    out = ('--out', 'nets/mine.py')
    done = run_tool(folder, *take, *number, *out)
    assert done.returncode == 0, done.stderr[-3000:]

    config = load_config(str(folder / 'nets' / 'mine.py'))
    assert config.search is None and config.load_from == 'nets/mine.pth'
    choice = front['networks'][front['found'] - 1]['choice']
    assert list(config.model.backbone.arch.channels) == choice['channels']
    assert config.model.neck.out_channels == choice['neck'] == config.model.decode_head.channels

    # On the hold-out it has the metric that the search has seen.
    holdout = (
        f'test_dataloader.dataset.ann_file={folder}/work/search/holdout_0.txt',
        'test_dataloader.dataset.data_prefix.img_path=images/training',
        'test_dataloader.dataset.data_prefix.seg_map_path=annotations/training',
    )
    test = ('test.py', 'nets/mine.py', 'nets/mine.pth', '--out', 'metrics.json')
    done = run_tool(folder, *test, '--cfg-options', *holdout)
    assert done.returncode == 0, done.stderr[-3000:]
    metric = json.loads((folder / 'metrics.json').read_text())['mIoU']
    assert metric == pytest.approx(front['networks'][front['found'] - 1]['metric'], abs=0.01)
    done = run_tool(folder, 'train.py', 'nets/mine.py', '--seed', 0)
    assert done.returncode == 0, done.stderr[-3000:]

    weights = torch.load(folder / 'supernet.pth')
    weights['state_dict'] = {name: 2 * each for name, each in weights['state_dict'].items()}
    torch.save(weights, folder / 'nets' / 'other.pth')
    other = ('search.py', 'take', 'tiny_fpn.py', 'nets/other.pth', '--work-dir', 'work')
    for command, problem in (
        ((*take, *number, *out), '--out'),
        ((*take, '--number', 99, '--out', 'other.py'), '--number'),
        ((*other, *number, '--out', 'other.py'), '--cfg-options'),
    ):
        done = run_tool(folder, *command)
        assert done.returncode == 1 and problem in done.stderr
