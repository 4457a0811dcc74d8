"""The demo: draw a picture set, train a model on it from nothing, test it, and let it look."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from _requirements import explain_missing

with explain_missing():
    import cv2
    import numpy as np
    from _demo_scenes import draw_scenes
    from mmengine.config import Config

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
CONFIGS = {
    'fpn': 'seg_configs/fpn_effv2_s0_shapes.py',
    'retinanet': 'det_configs/retinanet_effv2_s0_shapes.py',
    'mask_rcnn': 'det_configs/mask_rcnn_effv2_s0_shapes.py',
}
# What the last lines report: the metric's name, what to call it, and what makes it per cent.
HEADLINES = {
    'fpn': (('mIoU', 'mIoU', 1),),
    'retinanet': (('coco/bbox_mAP_50', 'box AP50', 100), ('coco/bbox_mAP', 'box AP', 100)),
    'mask_rcnn': (
        ('coco/bbox_mAP_50', 'box AP50', 100),
        ('coco/bbox_mAP', 'box AP', 100),
        ('coco/segm_mAP', 'mask AP', 100),
    ),
}
# On photographs the model is less sure of itself than on the pictures it was trained for.
SCORE_THR = 0.6
SHEET_ROWS, SHEET_PAIRS = 4, 2
TILE = 200
EXAMPLES = """\
examples:
  python tools/demo.py              Semantic FPN
  python tools/demo.py mask_rcnn    Mask R-CNN
An interrupted demo goes on where it stopped. Everything is in data/shapes and work_dirs/demo_TASK.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('task', nargs='?', choices=CONFIGS, default='fpn', help='default: fpn')
    task = parser.parse_args().task
    work_dir = Path('work_dirs') / f'demo_{task}'

    step('1/4', 'drawing the pictures')
    run('make_shapes.py')
    step('2/4', f'training {CONFIGS[task]} from nothing')
    run('train.py', CONFIGS[task], '--work-dir', work_dir, '--seed', 0, '--resume')
    step('3/4', 'testing on pictures that it has not seen')
    checkpoint = best_checkpoint(ROOT / work_dir)
    drawn = work_dir / 'drawn'
    run(
        *('test.py', CONFIGS[task], checkpoint, '--work-dir', work_dir),
        *('--out', work_dir / 'metrics.json', '--show-dir', drawn),
    )
    sheet = draw_sheet(task, ROOT / drawn, ROOT / work_dir / 'sheet.png')
    step('4/4', 'looking at two photographs with shapes on them, and at a clip')
    scenes = draw_scenes(ROOT / work_dir / 'scenes')
    run(
        *('infer.py', CONFIGS[task], checkpoint, *(path.relative_to(ROOT) for path in scenes)),
        *('--out-dir', work_dir / 'predictions', '--score-thr', SCORE_THR, '--overwrite'),
    )
    report(task, ROOT / work_dir, checkpoint, sheet)


def step(number: str, what: str) -> None:
    print(f'\n=== {number} {what}\n', flush=True)


def run(tool: str, *arguments: object) -> None:
    """Run one of our tools from the root of the project; end the demo where it fails."""
    command = [sys.executable, TOOLS / tool, *arguments]
    code = subprocess.run([str(part) for part in command], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def best_checkpoint(work_dir: Path) -> Path:
    """The best checkpoint that training kept."""
    found = sorted(work_dir.glob('best_*.pth'), key=lambda path: path.stat().st_mtime)
    if not found:
        sys.exit(f'error: training left no best_*.pth in {work_dir}; delete it and start again')
    return found[-1].relative_to(ROOT)


def draw_sheet(task: str, drawn: Path, path: Path) -> Path:
    """Put pictures, truths and predictions together on one sheet.

    Args:
        task: A key of ``CONFIGS``.
        drawn: Where test.py drew truth and prediction side by side.
        path: Where the sheet goes.

    Returns:
        ``path``.
    """
    config = Config.fromfile(ROOT / CONFIGS[task])
    data = config.test_dataloader.dataset
    pictures = ROOT / data.data_root / (data.data_prefix.get('img_path') or data.data_prefix['img'])
    tiles = []
    for file in sorted(drawn.glob('*.png'))[: SHEET_ROWS * SHEET_PAIRS]:
        picture = cv2.imread(str(pictures / f'{file.stem}.jpg'))
        truth, prediction = np.hsplit(cv2.imread(str(file)), 2)
        tiles.append(np.hstack([framed(image) for image in (picture, truth, prediction)]))
    rows = [np.hstack(tiles[i : i + SHEET_PAIRS]) for i in range(0, len(tiles), SHEET_PAIRS)]
    titles = np.hstack([title(text) for text in ('input', 'truth', 'prediction')] * SHEET_PAIRS)
    cv2.imwrite(str(path), np.vstack([titles, *rows]))
    return path


def framed(image: np.ndarray) -> np.ndarray:
    """A picture at the tiles' size with a white frame."""
    image = cv2.resize(image, (TILE, TILE), interpolation=cv2.INTER_AREA)
    return cv2.copyMakeBorder(image, 3, 3, 3, 3, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def title(text: str) -> np.ndarray:
    """A column's heading."""
    band = np.full((28, TILE + 6, 3), 255, np.uint8)
    cv2.putText(band, text, (6, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (40, 40, 40), 1, cv2.LINE_AA)
    return band


def report(task: str, work_dir: Path, checkpoint: Path, sheet: Path) -> None:
    """The demo's last lines: figures, and where everything is."""
    metrics = json.loads((work_dir / 'metrics.json').read_text())
    figures = ', '.join(
        f'{label} {factor * metrics[name]:.1f}' for name, label, factor in HEADLINES[task]
    )
    print(
        f'\n{figures} on pictures that the model has not seen\n'
        f'checkpoint:    {checkpoint}\n'
        f'picture sheet: {sheet.relative_to(ROOT)}\n'
        f'curves:        {(work_dir / "curves.png").relative_to(ROOT)}\n'
        f'predictions:   {(work_dir / "predictions" / "drawn").relative_to(ROOT)}'
    )


if __name__ == '__main__':
    main()
