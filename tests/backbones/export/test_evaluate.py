"""tools/test.py with an exported file in place of the checkpoint."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
from corrupt import cut
from exporting import needs_export
from own_truth import use_predictions
from tool_process import run_tool

from backbones.data.classes import set_classes
from backbones.engine.config import load_config
from backbones.errors import DataError
from backbones.export import evaluate
from backbones.export.export import Options, export

pytestmark = needs_export

# Of files of any size, and one of the size that all images have.
METRICS = {
    'fpn': ('mIoU', 'aAcc', 'IoU/disc'),
    'single': ('coco/bbox_mAP', 'coco/bbox_mAP_75'),
    'mask_rcnn': ('coco/bbox_mAP', 'coco/segm_mAP', 'coco/segm_mAP_75'),
}


@pytest.fixture
def options_of(exported, predict, shapes, tmp_path) -> Callable[[str], list[str]]:
    """Options of test.py for which half of what a detector finds is the ground truth."""

    def annotate(kind: str) -> list[str]:
        made = exported(kind)
        options = ['--cfg-options', 'test_dataloader.batch_size=2']
        options += options_with('test_dataloader', made.tiny)
        if kind == 'fpn':
            return options
        return options + use_predictions(
            tmp_path / 'own.json',
            shapes,
            lambda path: predict(made.model, [cv2.imread(str(path))])[0],
            every=2,
        )

    return annotate


def options_with(prefix: str, tiny: object) -> list[str]:
    """The options of a tiny model that are about its data, or about the model."""
    return [f'{k}={value}' for k, value in tiny.cfg_options.items() if k.startswith(prefix)]


@pytest.fixture
def metrics_of(tmp_path) -> Callable[..., dict]:
    """Runs test.py and returns the metrics that it wrote."""

    def run(*arguments: object) -> dict:
        done = run_tool(tmp_path, 'test.py', *arguments, '--out', 'metrics.json')
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((tmp_path / 'metrics.json').read_text())

    return run


@pytest.mark.parametrize('kind', METRICS)
def test_a_file_has_the_metrics_of_its_checkpoint(kind, exported, options_of, metrics_of, tmp_path):
    tiny, options = exported(kind).tiny, options_of(kind)
    # A file has its own.
    model_options = options_with('model', tiny)
    expected = metrics_of(tiny.config, tiny.checkpoint, *options, *model_options)
    assert expected[METRICS[kind][0]] > 0.1
    for file in map(exported, [kind] if kind == 'single' else [kind, f'{kind}_xml']):
        pages = ['--show-dir', 'drawn', '--report', 'report.html']
        found = metrics_of(tiny.config, file.path, *pages, *options)
        # A file gives maps, without the logits that confidence is computed from.
        page = (tmp_path / 'report.html').read_text()
        assert ', exported</dd>' in page and ('Not measured' in page) == (kind == 'fpn')
        scale = 100 if kind == 'fpn' else 1
        for name in METRICS[kind]:
            assert found[name] / scale == pytest.approx(expected[name] / scale, abs=2e-3), name
    drawn = sorted((tmp_path / 'drawn').iterdir())
    assert [path.name for path in drawn] == [f'val_{n:06d}.jpg' for n in range(1, 6)]
    # The prediction beside the ground truth is at the image's own size.
    assert cv2.imread(str(drawn[0])).shape[1] == 2 * 128 + 4


def test_another_size_than_the_images(exported, metrics_of):
    tiny = exported('logits').tiny
    expected = metrics_of(tiny.config, tiny.checkpoint)['mIoU']
    # Compared at the size of the ground truth.
    found = metrics_of(tiny.config, exported('logits').path)['mIoU']
    assert 0 < found != pytest.approx(expected, abs=0.01)
    assert found == pytest.approx(expected, abs=5)


def fails(folder: Path, *arguments: object) -> str:
    done: subprocess.CompletedProcess = run_tool(folder, 'test.py', *arguments)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    return done.stderr


def test_files_and_options_that_do_not_fit(exported, tmp_path):
    made = exported('fpn')
    config, checkpoint, path = made.tiny.config, made.tiny.checkpoint, made.path
    of_detector = exported('single')
    assert 'detection' in fails(tmp_path, config, of_detector.path)
    masks = exported('mask_rcnn').tiny.config
    assert 'no masks' in fails(tmp_path, masks, of_detector.path)
    fewer = "classes=('background','disc')"
    assert 'classes' in fails(tmp_path, config, path, '--cfg-options', fewer)
    assert 'cannot be run here' in fails(tmp_path, config, 'fpn.mlpackage')
    assert 'there is no model none.onnx' in fails(tmp_path, config, 'none.onnx')
    for options in (['--tta'], ['--no-deploy'], ['--cfg-options', 'model.test_cfg.mode=slide']):
        assert 'exported' in fails(tmp_path, config, path, *options)
    assert '--amp' in fails(tmp_path, config, path, '--amp')
    assert '--amp' in fails(tmp_path, config, checkpoint, '--amp')


class Perfect:
    """A model that predicts the ground truth."""

    def __init__(self, path: str) -> None:
        self.path = path

    def test_step(self, data: dict) -> list:
        for sample in data['data_samples']:
            sample.pred_sem_seg = sample.gt_sem_seg
        return data['data_samples']


def test_int8_is_measured_on_data_as_test_py_reads_them(tiny_config, shapes, tmp_path, monkeypatch):
    """Without workers too; a truncated image, which decoders fill in, is an error."""
    monkeypatch.setattr(evaluate, 'InferencerModel', Perfect)
    data = Path(shutil.copytree(shapes, tmp_path / 'shapes'))
    loader = 'val_dataloader.update(num_workers=0, persistent_workers=True)\n'
    config = load_config(str(tiny_config('fpn', loader, shapes=data)))
    set_classes(config, ('test',))
    assert evaluate.measure(config, 'fpn.onnx', 'float')['mIoU'] == 100
    image = next((data / 'ade' / 'images' / 'validation').iterdir())
    cut(image)
    with pytest.raises(DataError, match=f'{image.name}.*the file is truncated'):
        evaluate.measure(config, 'fpn.onnx', 'float')


def test_a_backbone_makes_no_predictions(tiny_model, tmp_path):
    tiny = tiny_model('fpn')
    path = tmp_path / 'backbone.onnx'
    options = Options(size=(64, 64), backbone_only=True)
    export(tiny.config, tiny.checkpoint, path, options, report=lambda line: None)
    assert 'backbone' in fails(tmp_path, tiny.config, path)


def test_same_names_in_another_order_are_refused(exported, tmp_path, shapes):
    made = exported('fpn')
    names = (shapes / 'classes.txt').read_text().split('\n')[:-1]
    reordered = tmp_path / 'reordered.py'
    reordered.write_text(f"_base_ = '{made.tiny.config}'\nclasses = {names[::-1]}\n")
    for path in (made.tiny.checkpoint, made.path):
        assert 'order' in fails(tmp_path, reordered, path)
