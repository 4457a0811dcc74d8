"""test.py --report: the page has the figures that were printed, and works in a browser."""

import json
from pathlib import Path

import pytest
from browser import open_browser
from tool_process import run_tool
from trained_tiny import write_trained

from backbones.report.charts import line_chart

CLASSES = 6
# Lines of the charts, of which each class has one, and the table of classes.
EXPECTED = {
    'fpn': (['Segmentation', 'Worst images', 'Training'], 0, CLASSES + 1),
    'mask_rcnn': (['Boxes', 'Masks', 'Worst images', 'Training'], 2 * 3 * (1 + CLASSES), CLASSES),
}
LOG = [
    {'lr': 0.1, 'loss': 2.0, 'loss_a': 1.5, 'loss_b': 0.5, 'step': 20},
    {'lr': 0.1, 'loss': 1.0, 'loss_a': 0.5, 'loss_b': 0.5, 'step': 40},
    {'mIoU': 30.0, 'step': 40},
]
LOG_LINES = 3 + 1 + 1


@pytest.fixture(scope='module', params=EXPECTED)
def report(request, tmp_path_factory, shapes) -> tuple[str, Path, dict[str, float]]:
    """A task, its page, and the metrics that were written beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    config, checkpoint = write_trained(folder, request.param, shapes)
    log = folder / '20260101_000000/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text('\n'.join(map(json.dumps, LOG)))
    options = ['--report', 'out/report.html', '--out', 'metrics.json']
    done = run_tool(folder, 'test.py', config, checkpoint, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    return (
        request.param,
        folder / 'out/report.html',
        json.loads((folder / 'metrics.json').read_text()),
    )


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


def test_figures_marks_and_images(report, browser):
    task, path, metrics = report
    titles, lines, classes = EXPECTED[task]
    page, troubles = open_page(browser, path)
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
        shown = cells[1] if task == 'fpn' else cells[2]
        assert float(shown.replace('–', 'nan')) == pytest.approx(measured, abs=2e-3, nan_ok=True)

    assert len(page.query_selector_all('.charts figure > svg .line')) == lines + LOG_LINES
    assert len(page.query_selector_all('rect.mark')) >= len(titles) - 2
    widths = page.eval_on_selector_all('.images img', 'all => all.map(one => one.naturalWidth)')
    assert len(widths) == 5 and min(widths) > 600
    assert not troubles


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_a_narrow_window_does_not_scroll_sideways(report, browser, scheme):
    page, troubles = open_page(browser, report[1], 360, color_scheme=scheme)
    page.eval_on_selector_all('details', 'all => all.forEach(one => one.open = true)')
    page.check('.images input >> nth=0')
    assert page.evaluate('document.documentElement.scrollWidth') <= 360
    dark = page.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(17, 21, 28)'
    assert dark == (scheme == 'dark') and not troubles


def test_tables_are_sorted_with_the_keyboard_and_are_there_without_scripts(report, browser):
    page, troubles = open_page(browser, report[1])
    table = page.locator('table.sortable').first
    for order in (sorted, lambda keys: sorted(keys, reverse=True)):
        table.locator('th button').nth(1).focus()
        page.keyboard.press('Enter')
        keys = table.locator('tbody tr td:nth-child(2)')
        found = keys.evaluate_all('all => all.map(one => Number(one.dataset.key))')
        assert found == order(found) or found == order(found)[::-1]
    assert found == sorted(found)
    plain, _ = open_page(browser, report[1], java_script_enabled=False)
    assert plain.locator('table.sortable').first.locator('tbody tr').count() == len(found)
    assert not troubles


def test_names_are_escaped():
    svg = line_chart('<b>', {'<i>': [(0, 1), (1, float('nan'))]}, ('x', '<u>')).svg
    assert '&lt;b&gt;' in svg and not {'<b>', '<i>', '<u>'} & set(svg.split('"'))
    assert 'nan' not in svg
