"""tools/test.py by its command line, on tiny models: metrics, drawings, and pages in a browser."""

import errno
import json
import os
import re
import runpy
from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
import tool_process
import torch.nn.functional as F
from browser import open_browser
from mmengine.config import Config
from mmseg.apis import inference_model, init_model
from tool_process import TOOLS, launch, run_in_two
from trained_tiny import write_trained

from backbones.report.blocks import Block
from backbones.report.page import render

BEST = {'fpn': 'mIoU', 'mask_rcnn': 'coco/segm_mAP'}
CLASSES = ('disc', 'square', 'triangle', 'star', 'cross', 'ring')
# Lines of the charts, of which each class has one, and the table of classes.
EXPECTED = {
    'fpn': (['Segmentation', 'Worst images', 'Training'], 0, 7),
    'mask_rcnn': (['Boxes', 'Masks', 'Worst images', 'Training'], 2 * 3 * 7, 6),
}
LOG = [
    {'lr': 0.1, 'loss': 2.0, 'loss_a': 1.5, 'loss_b': 0.5, 'step': 20},
    {'lr': 0.1, 'loss': 1.0, 'loss_a': 0.5, 'loss_b': 0.5, 'step': 40},
    {'mIoU': 30.0, 'step': 40},
]
LOG_LINES = 3 + 1 + 1


@pytest.fixture(scope='module', params=BEST)
def tested(request, tmp_path_factory, shapes) -> tuple[str, Path, Path, dict]:
    """A task, a config, a checkpoint, and the metrics of test.py in one process.

    Beside the checkpoint are ``out/report.html``, ``drawn`` and the log of its training.
    """
    folder = tmp_path_factory.mktemp(f'tested_{request.param}')
    config, checkpoint = write_trained(folder, request.param, shapes)
    log = folder / '20260101_000000/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text('\n'.join(map(json.dumps, LOG)))
    options = ['--show-dir', 'drawn', '--report', 'out/report.html']
    done = tool_process.run_tool(folder, 'test.py', config, checkpoint, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f'{BEST[request.param]} ' in done.stdout
    assert 'UserWarning' not in done.stderr
    metrics = figures(folder / 'work_dirs' / config.stem / 'metrics.json')
    return request.param, config, checkpoint, metrics


def figures(path: Path) -> dict[str, float]:
    """Written metrics without times."""
    metrics = json.loads(path.read_text())
    return {name: value for name, value in metrics.items() if not name.endswith('time')}


def shown_figures(report: Path) -> list[float]:
    """The numbers in the tables and matrices of a page."""
    keys = re.findall(r'(?:data-key="|--v:)([-+.e0-9]+)[";]', report.read_text())
    return [float(key) for key in keys]


def test_two_processes_test_as_one(tested, tmp_path):
    """There are five images: none may be left out or counted twice."""
    task, config, checkpoint, metrics = tested
    options = ['--out', 'two.json', '--report', 'two.html', '--launcher', 'pytorch']
    done, _ = run_in_two(tmp_path, TOOLS / 'test.py', config, checkpoint, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert figures(tmp_path / 'two.json') == pytest.approx(metrics, nan_ok=True)
    assert metrics[BEST[task]] > 0
    one = shown_figures(checkpoint.parent / 'out/report.html')
    assert len(one) > 100
    assert shown_figures(tmp_path / 'two.html') == pytest.approx(one, abs=2e-3)


def test_every_class_has_metrics_and_every_image_a_drawing(tested):
    task, _, checkpoint, metrics = tested
    prefix = 'IoU' if task == 'fpn' else 'coco/segm_AP'
    assert {f'{prefix}/{name}' for name in CLASSES} <= set(metrics)
    drawn = sorted(path.name for path in (checkpoint.parent / 'drawn').iterdir())
    assert drawn == [f'val_{number:06d}.jpg' for number in range(1, 6)]


def test_outputs_that_cannot_be_written_are_refused_before_the_test(tested, tmp_path, call_tool):
    _, config, checkpoint, _ = tested
    (tmp_path / 'file').touch()
    for option, path in (('--out', ''), ('--report', 'file/a.html')):
        code, said = call_tool('test.py', config, checkpoint, option, tmp_path / path)
        assert code == 1 and 'Traceback' not in said
        assert str(tmp_path / path).removesuffix('/a.html') in said
        assert 'test batch' not in said


def test_a_full_disk_ends_in_a_message(tested, tmp_path, call_tool, monkeypatch):
    _, config, checkpoint, _ = tested

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr('test.write_metrics', fail)
    monkeypatch.chdir(tmp_path)
    code, said = call_tool('test.py', config, checkpoint)
    assert code == 1 and 'No space left' in said


def test_folding_changes_no_metric(tested, tmp_path, run_tool):
    """Also where a moving average of the weights was trained."""
    _, config, checkpoint, metrics = tested
    averaged = tmp_path / 'averaged.py'
    averaged.write_text(f"_base_ = '{config}'\ncustom_hooks = [dict(type='EMAHook')]\n")
    done = run_tool('test.py', averaged, checkpoint, '--no-deploy', '--out', 'out.json')
    assert done.returncode == 0, done.stderr[-3000:]
    assert figures(tmp_path / 'out.json') == pytest.approx(metrics, abs=2e-3, nan_ok=True)


@pytest.mark.parametrize('ratios', [(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), (1.0,)], ids=str)
def test_tta(ratios, shapes, call_tool, tmp_path, monkeypatch):
    """The mean over the sizes and their mirror images, each as mmseg's own inference has it."""
    config, checkpoint = write_trained(tmp_path, 'fpn', shapes)
    if len(ratios) == 1:
        without = Config.fromfile(config)
        without.pop('tta_pipeline'), without.pop('tta_model')
        without.dump(config)
    saved = tmp_path / 'work_dirs' / config.stem / config.name
    saved.parent.mkdir(parents=True)
    saved.write_text('of the training')
    monkeypatch.chdir(tmp_path)
    code, said = call_tool('test.py', config, checkpoint, '--tta', '--out', 'tta.json')
    # All weights come from the checkpoint, under other names.
    assert code == 0 and 'random' not in said, said
    assert saved.read_text() == 'of the training'

    model = init_model(str(config), str(checkpoint), device='cpu')
    counts = np.zeros((7, 7))
    for path in sorted((shapes / 'ade/images/validation').iterdir()):
        image = cv2.imread(str(path))
        size, total = image.shape[:2], 0
        for ratio in ratios:
            side = round(128 * ratio)
            resized = mmcv.imresize(image, (side, side))
            for mirror in (1, -1):
                given = np.ascontiguousarray(resized[:, ::mirror])
                logits = inference_model(model, given).seg_logits.data[None]
                logits = logits.flip(3) if mirror < 0 else logits
                total = total + F.interpolate(logits, size, mode='bilinear')[0].softmax(dim=0)
        annotation = shapes / 'ade/annotations/validation' / f'{path.stem}.png'
        truth = cv2.imread(str(annotation), cv2.IMREAD_UNCHANGED).astype(int) - 1
        np.add.at(counts, (truth, total.argmax(dim=0).numpy()), 1)
    both = counts.diagonal()
    expected = 100 * np.nanmean(both / (counts.sum(0) + counts.sum(1) - both))
    assert figures(tmp_path / 'tta.json')['mIoU'] == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize(
    ('environment', 'expected'),
    [
        ({}, '--nnodes 1 --node_rank 0 --standalone '),
        ({'PORT': '29'}, '--nnodes 1 --node_rank 0 --master_addr 127.0.0.1 --master_port 29 '),
        (
            {'NNODES': '2', 'NODE_RANK': '1', 'MASTER_ADDR': '10.0.0.1'},
            '--nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 29500 ',
        ),
    ],
    ids=['one machine', 'a port', 'two machines'],
)
def test_dist_test_starts_test_under_torchrun(environment, expected, tmp_path):
    """With a Python that says what it was to run."""
    python = tmp_path / 'python'
    python.write_text('#!/usr/bin/env bash\necho "$@"\n')
    python.chmod(0o755)
    arguments = ('my config.py', 'model.pth', 2, '--out', 'two.json')
    done = launch('dist_test.sh', *arguments, cwd=tmp_path, PYTHON=str(python), **environment)
    assert done.returncode == 0, done.stderr
    assert f'-m torch.distributed.run --nproc_per_node 2 {expected}' in done.stdout
    assert done.stdout.endswith(
        'tools/test.py my config.py model.pth --out two.json --launcher pytorch\n'
    )


def test_slurm_test_starts_test_under_srun(tmp_path):
    """With a srun that says what it was to run."""
    (tmp_path / 'srun').write_text('#!/usr/bin/env bash\necho "$@"\n')
    (tmp_path / 'srun').chmod(0o755)
    path = f'{tmp_path}:{os.environ["PATH"]}'
    arguments = ('gpu', 'job', 'my config.py', 'model.pth', '--out', 'a.json')
    done = launch('slurm_test.sh', *arguments, cwd=tmp_path, PATH=path, GPUS='16')
    assert done.returncode == 0, done.stderr
    asked = '--partition gpu --job-name job --ntasks 16 --ntasks-per-node 8 --gres gpu:8 '
    # Nothing is saved when its time is over.
    assert done.stdout.startswith(asked) and '--signal' not in done.stdout
    assert done.stdout.endswith(
        'tools/test.py my config.py model.pth --out a.json --launcher slurm\n'
    )


# The report in a browser.


@pytest.fixture(scope='module')
def browser():
    with open_browser() as opened:
        yield opened


def open_page(browser, path: Path, width: int = 1400, **options):
    """The page, and a list of what it complains about or fetches."""
    context = browser.new_context(viewport={'width': width, 'height': 900}, offline=True, **options)
    page, troubles = context.new_page(), []
    page.on('console', lambda message: troubles.append(message.text))
    page.on('pageerror', lambda error: troubles.append(str(error)))
    page.on('request', lambda request: troubles.append(request.url[:60]))
    page.goto(path.as_uri())
    own, *others = troubles
    assert own.startswith('file:')
    return page, [one for one in others if not one.startswith('data:')]


def test_figures_marks_and_images_of_the_report(tested, browser):
    task, _, checkpoint, metrics = tested
    titles, lines, classes = EXPECTED[task]
    page, troubles = open_page(browser, checkpoint.parent / 'out/report.html')
    assert [heading.text_content() for heading in page.query_selector_all('h2')] == titles
    tiles = dict(page.eval_on_selector_all(
        'header .tiles div', 'all => all.map(one => [...one.children].map(e => e.textContent))'
    ))  # fmt: skip
    name = 'mIoU' if task == 'fpn' else 'segm_mAP'
    printed = metrics[name if task == 'fpn' else f'coco/{name}']
    assert float(tiles[name]) == pytest.approx(printed, abs=5e-4)

    rows = page.query_selector_all('.card:has(h3:text-is("Classes")) tbody tr')
    assert len(rows) == classes * (len(titles) - 2)
    for row in rows[-classes:]:
        cells = [cell.text_content() for cell in row.query_selector_all('th, td')]
        measured = metrics[f'IoU/{cells[0]}' if task == 'fpn' else f'coco/segm_AP/{cells[0]}']
        shown = cells[1].removesuffix('%') if task == 'fpn' else cells[2]
        assert float(shown.replace('–', 'nan')) == pytest.approx(measured, abs=2e-3, nan_ok=True)

    assert len(page.query_selector_all('.charts figure > svg .line')) == lines + LOG_LINES
    assert len(page.query_selector_all('rect.mark')) >= len(titles) - 2
    widths = page.eval_on_selector_all('.images img', 'all => all.map(one => one.naturalWidth)')
    assert len(widths) == 5 and min(widths) > 600
    assert not troubles


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_a_narrow_window_does_not_scroll_sideways(tested, browser, scheme):
    page, troubles = open_page(
        browser, tested[2].parent / 'out/report.html', 360, color_scheme=scheme
    )
    page.eval_on_selector_all('details', 'all => all.forEach(one => one.open = true)')
    page.check('.images input >> nth=0')
    assert page.evaluate('document.documentElement.scrollWidth') <= 360
    dark = page.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(17, 21, 28)'
    assert dark == (scheme == 'dark') and not troubles


def test_a_long_name_leaves_the_figures_in_sight(browser, tmp_path):
    columns = ('class', *(f'AP {number}' for number in range(9)))
    blocks = [
        Block('Classes', '', columns, [['x' * 200, *(0.1 * i for i in range(9))]]),
        Block('Pairs', '', ('a', 'b', 'n', 'of'), [['x y' * 40, 'z ' * 60, 3, 0.5]], half=True),
    ]
    (tmp_path / 'report.html').write_text(render('', {}, {}, [('Boxes', blocks)]))
    page, _ = open_page(browser, tmp_path / 'report.html', 1366)
    hidden = page.eval_on_selector_all(
        '.scroll', 'all => all.map(e => e.scrollWidth - e.clientWidth)'
    )
    assert hidden == [0, 0]
    assert page.locator('tbody th').first.get_attribute('title') == 'x' * 200


def test_tables_are_sorted_with_the_keyboard_and_are_there_without_scripts(tested, browser):
    page, troubles = open_page(browser, tested[2].parent / 'out/report.html')
    table = page.locator('table.sortable').first
    for order in (sorted, lambda keys: sorted(keys, reverse=True)):
        table.locator('th button').nth(1).focus()
        page.keyboard.press('Enter')
        keys = table.locator('tbody tr td:nth-child(2)')
        found = keys.evaluate_all('all => all.map(one => Number(one.dataset.key))')
        assert found == order(found) or found == order(found)[::-1]
    assert found == sorted(found)
    plain, _ = open_page(browser, tested[2].parent / 'out/report.html', java_script_enabled=False)
    assert plain.locator('table.sortable').first.locator('tbody tr').count() == len(found)
    assert not troubles


@pytest.mark.parametrize('given', [None, 'ACTIVE'])
@pytest.mark.parametrize('tool', ['infer.py', 'test.py'])
def test_what_infers_for_long_leaves_the_cores_to_others(tool, given, monkeypatch):
    monkeypatch.setenv('OMP_WAIT_POLICY', given or '')
    if given is None:
        monkeypatch.delenv('OMP_WAIT_POLICY')
    runpy.run_path(str(TOOLS / tool))
    assert os.environ['OMP_WAIT_POLICY'] == (given or 'PASSIVE')
