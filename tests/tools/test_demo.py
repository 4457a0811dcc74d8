"""The demo's commands are those of its tools; its search goes on where it stopped."""

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path

import cv2
import demo
import numpy as np
import pytest
from searching import write_latency

from backbones.engine.config import load_config

NUMBER = 2


def leave(tool: str, args: Namespace, root: Path) -> None:
    """What the demo looks for after a tool; what it gives one to read has to be there."""
    work_dir = root / (getattr(args, 'work_dir', None) or '.')
    work_dir.mkdir(parents=True, exist_ok=True)
    match tool if tool != 'search.py' else args.run.__name__:
        case 'latency':
            write_latency(load_config(str(root / args.config)), work_dir)
        case 'train.py':
            (work_dir / 'best_mIoU_iter_1.pth').touch()
            (work_dir / 'last_checkpoint').write_text('iter_1.pth')
        case 'find':
            assert args.max_latency > 0
            (work_dir / 'search').mkdir()
            (work_dir / 'search' / 'front.json').write_text(json.dumps({'found': NUMBER}))
            (work_dir / 'search' / 'front.md').write_text('the front')
        case 'take':
            assert args.number == NUMBER
        case 'test.py':
            (root / args.out).write_text('{"mIoU": 85.0}')
            if args.show_dir:
                (root / args.show_dir).mkdir()
                cv2.imwrite(str(root / args.show_dir / 'a.jpg'), np.zeros((40, 60, 3), np.uint8))
        case 'infer.py':
            assert args.inputs and all((root / path).is_file() for path in args.inputs)


# Other tasks have the same commands.
@pytest.mark.parametrize('task', ['fpn', demo.SEARCH])
def test_its_tools_take_the_commands_of_the_demo(task, tmp_path, monkeypatch, capsys):
    """A demo takes ten minutes; here, tools parse what they are given, and do nothing."""
    for folder in ('det_configs', 'seg_configs'):
        (tmp_path / folder).symlink_to(demo.ROOT / folder)
    used = []

    def run(title: str, tool: str, *arguments: object) -> None:
        used.append(tool)
        if tool != 'make_shapes.py':
            monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
            leave(tool, importlib.import_module(tool.removesuffix('.py')).parse_args(), tmp_path)

    monkeypatch.setattr(demo, 'ROOT', tmp_path)
    monkeypatch.setattr(demo, 'run', run)
    monkeypatch.setattr(sys, 'argv', ['demo.py', task])
    demo.main()
    assert {'make_shapes.py', 'train.py', 'test.py'} <= set(used)
    assert 'mIoU 85' in capsys.readouterr().out
    assert (tmp_path / f'work_dirs/demo_{task}/sheet.png').is_file() == (task != demo.SEARCH)


def test_a_sheet_of_images_of_different_heights(tmp_path):
    folder = tmp_path / 'drawn'
    folder.mkdir()
    for number, height in enumerate((40, 56, 40)):
        cv2.imwrite(str(folder / f'{number}.jpg'), np.zeros((height, 60, 3), np.uint8))
    demo.draw_sheet(folder, tmp_path / 'sheet.png')
    sheet = cv2.imread(str(tmp_path / 'sheet.png'))
    dark = (sheet < 128).all(axis=2).sum()
    assert dark == 60 * (40 + 56 + 40)


@pytest.mark.parametrize(('noise', 'measured'), [(0.0, 1), (3.0, 4)])
def test_a_search_is_not_measured_again_once_it_can_be_trusted(
    tmp_path, monkeypatch, noise, measured
):
    """Else a second call may find another network, and resume the training of the first."""
    config, ran = load_config(str(demo.ROOT / demo.SEARCH_CONFIG)), []
    folder = tmp_path / 'work_dirs' / 'demo_search'

    def run(title, tool, command='', *arguments):
        ran.append((tool, command))
        if command == 'latency':
            write_latency(config, folder, noise)
        elif tool == 'train.py':
            sys.exit('interrupted')

    monkeypatch.setattr(demo, 'run', run)
    monkeypatch.setattr(demo, 'ROOT', tmp_path)
    monkeypatch.setattr(demo, 'SEARCH_CONFIG', config.filename)
    for _ in range(2):
        with pytest.raises(SystemExit):
            demo.demonstrate_search()
    assert ran.count(('search.py', 'latency')) == measured
