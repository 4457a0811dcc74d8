"""The report of a test as one HTML page that needs no other file and no network."""

import base64
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import cv2
import jinja2
import mmcv
from mmengine.runner import Runner

from backbones.engine.console import summarize_run
from backbones.engine.curves import panels_of
from backbones.engine.metrics import figure, is_of_size, overall
from backbones.files import atomic_write
from backbones.inference.comparison import draw_pair
from backbones.inference.drawing import Visualizer
from backbones.inference.palette import choose_palette
from backbones.inference.results import Detections, Segmentation

from .blocks import Block, shown_size
from .charts import line_chart
from .detection import detection_blocks
from .recording import ReportHook
from .segmentation import pixel_blocks

NAMES = {'bbox': 'Boxes', 'segm': 'Masks'}
JPEG_QUALITY = 82
SIDES = 'Ground truth is on the left, the prediction on the right.'

Prediction = Detections | Segmentation
# A title and the blocks below it.
Section = tuple[str, list[Block]]


def write_report(
    path: Path, runner: Runner, recorded: ReportHook, metrics: dict[str, object]
) -> None:
    """Write the page of a test that ``runner`` has run, with ``metrics``; whole or not at all."""
    about = summarize_run(runner, is_training=False) | {'date': f'{datetime.now():%Y-%m-%d %H:%M}'}
    about.pop('log')
    shown = {
        name.rpartition('/')[2]: 'none' if value == -1 else figure(value).strip()
        for name, value in overall(metrics).items()
        if not is_of_size(name)
    }
    title = f'Test of {Path(runner.cfg.filename or "model").stem}'
    sections = sections_of(runner, recorded, Path(about['weights']).parent)
    with atomic_write(path) as partial:
        partial.write_text(render(title, shown, about, sections), encoding='utf-8')


def render(
    title: str, metrics: dict[str, str], about: dict[str, str], sections: list[Section]
) -> str:
    """Return the page as HTML."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name('page.html').read_text('utf-8'))
    return template.render(title=title, metrics=metrics, about=about, sections=sections)


def sections_of(runner: Runner, recorded: ReportHook, work_dir: Path) -> list[Section]:
    """Return all sections of the page."""
    sections = [(NAMES[one.kind], detection_blocks(one)) for one in recorded.detections]
    meta = runner.test_dataloader.dataset.metainfo
    palette = choose_palette(None, meta['classes'], meta.get('palette'))
    if recorded.detections:
        last = recorded.detections[-1]
        note = f'Lowest F1 first (score at least {last.score_thr:.3f}), then most errors. {SIDES}'
        colors = dict(zip(meta['classes'], palette, strict=True))
        visualizer = Visualizer(last.classes, [colors[name] for name in last.classes])
        sections.append(image_section(visualizer, last.worst, note))
    if recorded.pixels is not None:
        sections.append(('Segmentation', pixel_blocks(recorded.pixels)))
        note = f'Lowest mean IoU over the classes of the ground truth first. {SIDES}'
        visualizer = Visualizer(meta['classes'], palette)
        sections.append(image_section(visualizer, recorded.pixels.worst, note))
    curves = [
        line_chart(title, lines, ('iteration', ''))
        for title, lines in panels_of(str(work_dir)).items()
    ]
    if curves:
        note = 'From the log beside the checkpoint.'
        sections.append(('Training', [Block('Curves', note, charts=curves)]))
    return sections


def image_section(
    visualizer: Visualizer, worst: Sequence[tuple[str, str, Prediction, Prediction]], note: str
) -> Section:
    """Return a section of images with ground truth and prediction, embedded as JPEG."""
    images = []
    for path, caption, *both in worst:
        image = mmcv.imread(path)
        size = shown_size(*image.shape[:2])
        drawing = draw_pair(
            visualizer, cv2.resize(image, size, interpolation=cv2.INTER_AREA), *both
        )
        _, data = cv2.imencode('.jpg', drawing, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        images.append(
            {
                'name': Path(path).name,
                'caption': caption,
                'uri': f'data:image/jpeg;base64,{base64.b64encode(data).decode()}',
                'size': drawing.shape[1::-1],
            }
        )
    return 'Worst images', [Block('', note if images else 'No errors.', images=images)]
