"""tools/test.py with an exported file in place of the checkpoint."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
from exporting import FEWER_BLOCKS, needs_export
from tool_process import run_tool
from trained_tiny import write_trained

from backbones.export.export import Options, export
from backbones.export.formats import onnx_to_openvino
from backbones.inference.model import TorchModel
from backbones.inference.results import coco_results

pytestmark = needs_export

METRICS = {
    'fpn': ('mIoU', 'aAcc', 'IoU/disc'),
    'retinanet': ('coco/bbox_mAP', 'coco/bbox_mAP_75'),
    'mask_rcnn': ('coco/bbox_mAP', 'coco/segm_mAP', 'coco/segm_mAP_75'),
}


@pytest.fixture(scope='module')
def files(tmp_path_factory, shapes) -> Callable[[str], tuple[Path, Path]]:
    """Makes config, checkpoint and, beside it, .onnx and .xml of any size of a task, once."""
    made = {}

    def make(task: str) -> tuple[Path, Path]:
        if task not in made:
            folder = tmp_path_factory.mktemp(task)
            config, checkpoint = write_trained(folder, task, shapes, FEWER_BLOCKS)
            made[task] = config, checkpoint
            path = checkpoint.with_suffix('.onnx')
            options = Options(dynamic=True, batch=None if task == 'fpn' else 1)
            description = export(config, checkpoint, path, options, report=lambda line: None)
            onnx_to_openvino(path, path.with_suffix('.xml'), description)
        return made[task]

    return make


@pytest.fixture
def own_objects(files, shapes, tmp_path) -> Callable[[str], list[str]]:
    """Makes every other detection of a detector ground truth, and returns the options for that."""

    def annotate(task: str) -> list[str]:
        config, checkpoint = files(task)
        if task == 'fpn':
            return []
        model = TorchModel(str(config), str(checkpoint))
        truth = json.loads((shapes / 'coco/annotations/instances_val2017.json').read_text())
        rows = []
        for image in truth['images']:
            pixels = cv2.imread(str(shapes / 'coco/val2017' / image['file_name']))
            (raw,) = model.predict([model.preprocess(pixels)])
            found = model.postprocess(raw, pixels.shape[:2])
            about = {'image_id': image['id'], 'iscrowd': 0}
            rows += coco_results(found, pixels.shape[:2], about, truth['categories'])[::2]
        for number, row in enumerate(rows, 1):
            row |= {'id': number, 'area': row['bbox'][2] * row['bbox'][3]}
        path = tmp_path / 'own.json'
        path.write_text(json.dumps(truth | {'annotations': rows}))
        return [f'test_evaluator.ann_file={path}', f'test_dataloader.dataset.ann_file={path}']

    return annotate


@pytest.fixture
def metrics_of(tmp_path) -> Callable[..., dict]:
    """Runs test.py and returns the metrics that it wrote."""

    def run(*arguments: object) -> dict:
        done = run_tool(tmp_path, 'test.py', *arguments, '--out', 'metrics.json')
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((tmp_path / 'metrics.json').read_text())

    return run


@pytest.mark.parametrize('task', METRICS)
def test_a_file_has_the_metrics_of_its_checkpoint(task, files, own_objects, metrics_of, tmp_path):
    config, checkpoint = files(task)
    # Batches have images of one size here, which the segmentor's file takes at once.
    options = ['--cfg-options', 'test_dataloader.batch_size=2', *own_objects(task)]
    expected = metrics_of(config, checkpoint, *options)
    assert expected[METRICS[task][0]] > 0.1
    for suffix in ('.onnx', '.xml'):
        pages = ['--show-dir', 'drawn', '--report', 'report.html']
        found = metrics_of(config, checkpoint.with_suffix(suffix), *pages, *options)
        # A file gives maps, without the logits that confidence is computed from.
        page = (tmp_path / 'report.html').read_text()
        assert ', exported</dd>' in page and ('Not measured' in page) == (task == 'fpn')
        scale = 100 if task == 'fpn' else 1
        for name in METRICS[task]:
            assert found[name] / scale == pytest.approx(expected[name] / scale, abs=2e-3), name
    drawn = sorted((tmp_path / 'drawn').iterdir())
    assert [path.name for path in drawn] == [f'val_{n:06d}.jpg' for n in range(1, 6)]
    # The prediction beside the ground truth is at the image's own size.
    assert cv2.imread(str(drawn[0])).shape[1] == 2 * 128 + 4


def test_a_fixed_size_and_batch_and_logits(files, metrics_of, shapes):
    config, checkpoint = files('fpn')
    expected = metrics_of(config, checkpoint)
    path = checkpoint.with_name('fixed.onnx')
    # The last of three batches is not full: there are five images.
    options = Options(size=(128, 128), batch=2, logits=True)
    export(config, checkpoint, path, options, report=lambda line: None)
    found = metrics_of(config, path)
    assert found['mIoU'] == pytest.approx(expected['mIoU'], abs=0.1)
    other = checkpoint.with_name('small.onnx')
    export(config, checkpoint, other, Options(size=(64, 64)), report=lambda line: None)
    # Resized to a quarter of the pixels, and compared at the size of the ground truth.
    assert 0 < metrics_of(config, other)['mIoU'] != pytest.approx(expected['mIoU'], abs=0.1)


def fails(folder: Path, *arguments: object) -> str:
    done: subprocess.CompletedProcess = run_tool(folder, 'test.py', *arguments)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    return done.stderr


def test_files_and_options_that_do_not_fit(files, tmp_path):
    config, checkpoint = files('fpn')
    path = checkpoint.with_suffix('.onnx')
    _, of_detector = files('retinanet')
    assert 'detection' in fails(tmp_path, config, of_detector.with_suffix('.onnx'))
    masks, _ = files('mask_rcnn')
    assert 'no masks' in fails(tmp_path, masks, of_detector.with_suffix('.xml'))
    fewer = "classes=('background','disc')"
    assert 'classes' in fails(tmp_path, config, path, '--cfg-options', fewer)
    assert 'cannot be run here' in fails(tmp_path, config, 'fpn.mlpackage')
    assert 'there is no model none.onnx' in fails(tmp_path, config, 'none.onnx')
    for options in (['--tta'], ['--no-deploy'], ['--cfg-options', 'model.test_cfg.mode=slide']):
        assert 'exported' in fails(tmp_path, config, path, *options)
    assert '--amp' in fails(tmp_path, config, path, '--amp')
    assert '--amp' in fails(tmp_path, config, checkpoint, '--amp')


def test_a_backbone_makes_no_predictions(files, tmp_path):
    config, checkpoint = files('fpn')
    path = tmp_path / 'backbone.onnx'
    options = Options(size=(64, 64), backbone_only=True)
    export(config, checkpoint, path, options, report=lambda line: None)
    assert 'backbone' in fails(tmp_path, config, path)


def test_same_names_in_another_order_are_refused(files, tmp_path, shapes):
    config, checkpoint = files('fpn')
    names = (shapes / 'classes.txt').read_text().split('\n')[:-1]
    reordered = tmp_path / 'reordered.py'
    reordered.write_text(f"_base_ = '{config}'\nclasses = {names[::-1]}\n")
    for path in (checkpoint, checkpoint.with_suffix('.onnx')):
        assert 'order' in fails(tmp_path, reordered, path)
