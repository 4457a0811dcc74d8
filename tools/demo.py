"""The demo: draw a dataset, train a model on it from scratch, test it, and run it.

Or search for a network: measure this machine, train a supernet, and train the network found.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

from _requirements import explain_missing

with explain_missing():
    import av
    import cv2
    import numpy as np
    import skimage
    from _arguments import make_parser
    from make_shapes import draw_image

    from backbones.engine.config import load_config
    from backbones.search.find import latency_model
    from backbones.search.latency import LatencyModel

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
CONFIGS = {
    'fpn': 'seg_configs/fpn_effv2_s0_shapes.py',
    'retinanet': 'det_configs/retinanet_effv2_s0_shapes.py',
    'mask_rcnn': 'det_configs/mask_rcnn_effv2_s0_shapes.py',
}
SEARCH = 'search'
SEARCH_CONFIG = 'seg_configs/fpn_effv2_s1_search_shapes.py'
# The search looks for a network that is better and as fast, and tries so many.
BASELINE = 's0, neck 96'
EVALUATIONS = 80
# Iterations for which the found network is trained by itself.
FINE_TUNING = 300
# The model was trained on drawings, and its predictions on photographs are less certain.
SCORE_THR = 0.6
SHEET_ROWS, SHEET_COLUMNS = 4, 2
# The size of the scenes. The clip moves over a wider one, by CLIP_STEP pixels per frame.
HEIGHT, WIDTH, WIDER = 214, 320, 480
CLIP_STEP, CLIP_RATE = 4, 10
EXAMPLES = """\
examples:
  python tools/demo.py              Semantic FPN
  python tools/demo.py mask_rcnn    Mask R-CNN
  python tools/demo.py search       a search for a better Semantic FPN
Run it again to continue an interrupted demo. Files go to data/shapes and work_dirs/demo_TASK.
"""


def main() -> None:
    parser = make_parser(__doc__, EXAMPLES)
    tasks = (*CONFIGS, SEARCH)
    parser.add_argument('task', nargs='?', choices=tasks, default='fpn', help='default: fpn')
    task = parser.parse_args().task
    if task == SEARCH:
        demonstrate_search()
    else:
        demonstrate(task)


def demonstrate(task: str) -> None:
    """Train, test and predict."""
    config, work_dir = CONFIGS[task], Path('work_dirs') / f'demo_{task}'
    drawn, predictions = work_dir / 'drawn', work_dir / 'predictions'

    run('1/4 drawing the dataset', 'make_shapes.py')
    train = ('train.py', config, '--work-dir', work_dir, '--seed', 0, '--resume')
    run(f'2/4 training {config} from scratch', *train)
    checkpoint = best_checkpoint(work_dir)
    metrics, report = work_dir / 'metrics.json', work_dir / 'report.html'
    test = ('test.py', config, checkpoint, '--work-dir', work_dir, '--out', metrics)
    run(
        '3/4 testing on images that it has not seen', *test, '--show-dir', drawn, '--report', report
    )
    draw_sheet(ROOT / drawn, ROOT / work_dir / 'sheet.png')
    scenes = [path.relative_to(ROOT) for path in draw_scenes(ROOT / work_dir / 'scenes')]
    infer = ('infer.py', config, checkpoint, *scenes, '--out-dir', predictions, '--overwrite')
    run('4/4 predicting on photographs and a clip', *infer, '--score-thr', SCORE_THR)

    print(
        f'\n{headline(metrics)} on images that the model has not seen\n'
        f'checkpoint:  {checkpoint}\n'
        f'images:      {work_dir}/sheet.png, ground truth beside prediction\n'
        f'curves:      {work_dir}/curves.png\n'
        f'report:      {report}, where it is right and where it fails\n'
        f'predictions: {predictions}'
    )


def demonstrate_search() -> None:
    """Measure this machine, train a supernet, search it, and train and test what is found."""
    work_dir = Path('work_dirs') / f'demo_{SEARCH}'
    found = work_dir / 'found.py'
    where = ('--work-dir', work_dir)
    run('1/6 drawing the dataset', 'make_shapes.py')
    latency = ('search.py', 'latency', SEARCH_CONFIG, *where, '--networks', 30, '--seconds', 2)
    # Measuring again could find another network, while the training of the last one is resumed.
    for title in ('measuring networks on this machine', 'again: other programs were running'):
        if not read_latency(work_dir):
            run(f'2/6 {title}', *latency)
    model = read_latency(work_dir)
    if not model:
        sys.exit('error: other programs run on this machine; try again when they have ended')
    train = ('train.py', SEARCH_CONFIG, *where, '--seed', 0, '--resume')
    run('3/6 training the supernet', *train)
    supernet = (ROOT / work_dir / 'last_checkpoint').read_text()
    # Rounded up, so that the baseline meets its own target.
    milliseconds = math.ceil(100 * model.predict(model.space.published()[BASELINE])) / 100
    find = ('search.py', 'find', SEARCH_CONFIG, supernet, *where, '--max-latency', milliseconds)
    title = f'4/6 searching for a network better than {BASELINE} and as fast'
    run(title, *find, '--evaluations', EVALUATIONS)
    front = json.loads((ROOT / work_dir / 'search/front.json').read_text())
    for old in (found, found.with_suffix('.pth')):
        (ROOT / old).unlink(missing_ok=True)
    take = ('search.py', 'take', SEARCH_CONFIG, supernet, *where)
    run('5/6 writing its config and weights', *take, '--number', front['found'], '--out', found)
    options = (f'train_cfg.max_iters={FINE_TUNING}', f'param_scheduler.1.end={FINE_TUNING}')
    own = ('--work-dir', work_dir / 'found')
    train = ('train.py', found, *own, '--seed', 0, '--resume', '--cfg-options', *options)
    run('6/6 training it by itself, and testing it', *train)
    checkpoint, metrics = best_checkpoint(work_dir / 'found'), work_dir / 'found/metrics.json'
    run('testing', 'test.py', found, checkpoint, *own, '--out', metrics)
    print(
        f'\n{(ROOT / work_dir / "search/front.md").read_text()}\n'
        f'trained by itself: {headline(metrics)} on images that the model has not seen\n'
        f'config:     {found}\n'
        f'checkpoint: {checkpoint}\n'
        f'front:      {work_dir}/search/front.png'
    )


def read_latency(work_dir: Path) -> LatencyModel | None:
    """Return the latency model that `search.py latency` wrote, or None if it is not usable."""
    config = load_config(str(ROOT / SEARCH_CONFIG))
    config.work_dir = str(ROOT / work_dir)
    return latency_model(config, backend=None, is_needed=False)


def best_checkpoint(work_dir: Path) -> Path:
    best = sorted((ROOT / work_dir).glob('best_*.pth'), key=lambda path: path.stat().st_mtime)
    if not best:
        sys.exit(f'error: training left no best_*.pth in {work_dir}; delete it and start again')
    return best[-1].relative_to(ROOT)


def headline(metrics: Path) -> str:
    """Return the main metrics of a test as text."""
    names = ('mIoU', 'coco/bbox_mAP_50', 'coco/bbox_mAP', 'coco/segm_mAP')
    measured = json.loads((ROOT / metrics).read_text())
    return ', '.join(f'{name} {measured[name]:.3g}' for name in names if name in measured)


def run(title: str, tool: str, *arguments: object) -> None:
    """Run one of our tools from the root of the project; end the demo if it fails."""
    print(f'\n=== {title}\n', flush=True)
    command = [sys.executable, TOOLS / tool, *arguments]
    code = subprocess.run([str(part) for part in command], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def draw_sheet(drawn: Path, path: Path) -> None:
    """Put some of test.py's drawings on one sheet; their legends differ in height."""
    files = sorted(drawn.rglob('*.jpg'))[: SHEET_ROWS * SHEET_COLUMNS]
    images = [cv2.imread(str(file)) for file in files]
    height, width = (max(image.shape[axis] for image in images) + 12 for axis in (0, 1))
    sheet = np.full((SHEET_ROWS * height, SHEET_COLUMNS * width, 3), 255, np.uint8)
    for number, image in enumerate(images):
        y, x = number // SHEET_COLUMNS * height + 6, number % SHEET_COLUMNS * width + 6
        sheet[y : y + image.shape[0], x : x + image.shape[1]] = image
    cv2.imwrite(str(path), sheet)


def draw_scenes(folder: Path) -> list[Path]:
    """Draw shapes on two photographs of scikit-image, and a clip that moves over a third."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    paths = [folder / 'chelsea.png', folder / 'camera.png', folder / 'clip.mp4']
    for path in paths[:2]:
        cv2.imwrite(str(path), draw_scene(rng, path.name, WIDTH))
    scene = draw_scene(rng, 'rocket.jpg', WIDER)
    with av.open(str(paths[2]), 'w') as file:
        stream = file.add_stream('libx264', rate=CLIP_RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, 'yuv420p'
        for x in range(0, WIDER - WIDTH, CLIP_STEP):
            frame = np.ascontiguousarray(scene[:, x : x + WIDTH])
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='bgr24')))
        file.mux(stream.encode())
    return paths


def draw_scene(rng: np.random.Generator, name: str, width: int) -> np.ndarray:
    """Draw shapes on a photograph in the dataset's muted colors: (HEIGHT, width, 3) uint8 BGR."""
    photograph = cv2.imread(str(Path(skimage.data_dir) / name)).astype(np.float32) / 255
    gray = photograph.mean(axis=2, keepdims=True)
    muted = cv2.resize(
        gray + 0.3 * (photograph - gray), (width, HEIGHT), interpolation=cv2.INTER_AREA
    )
    return draw_image(rng, HEIGHT, width, muted)[0]


if __name__ == '__main__':
    main()
