"""tools/train.py and tools/test.py by their command lines, on tiny models."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny import TINY_ARCH, write_tiny_config
from tool_process import TOOLS, launch, run_in_two
from tool_process import run_tool as run_tool_in
from trained_tiny import write_trained

ROOT = Path(__file__).resolve().parents[2]
TASKS = ('fpn', 'mask_rcnn')
BEST = {'fpn': 'mIoU', 'mask_rcnn': 'coco/segm_mAP'}
CLASSES = ('disc', 'square', 'triangle', 'star', 'cross', 'ring')


@pytest.fixture(scope='module', params=TASKS)
def trained(request, tmp_path_factory, shapes) -> tuple[str, Path, Path, str]:
    """A task, its config, the work folder of a training in two processes, and what it printed."""
    folder = tmp_path_factory.mktemp(request.param)
    config = write_tiny_config(folder, request.param, shapes)
    options = ['--seed', 0, '--amp', '--val-loss', '--auto-scale-lr']
    frozen = ['--cfg-options', 'model.backbone.frozen_stages=1']
    options += ['--launcher', 'pytorch']
    done, _ = run_in_two(folder, TOOLS / 'train.py', config, *options, *frozen)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, config, folder / 'work_dirs' / config.stem, done.stdout


@pytest.fixture(scope='module', params=TASKS)
def tested(request, tmp_path_factory, shapes) -> tuple[str, Path, Path, dict]:
    """A task, a config, a checkpoint, and the metrics of test.py in one process."""
    folder = tmp_path_factory.mktemp(f'tested_{request.param}')
    config, checkpoint = write_trained(folder, request.param, shapes)
    options = ['--show-dir', 'drawn', '--report', 'report.html']
    done = run_tool_in(folder, 'test.py', config, checkpoint, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f'{BEST[request.param]} ' in done.stdout
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
    options = ['--out', 'two.json', '--report', 'two.html']
    if task == 'fpn':
        done = launch('dist_test.sh', config, checkpoint, 2, *options, cwd=tmp_path)
    else:
        options += ['--launcher', 'pytorch']
        done, _ = run_in_two(tmp_path, TOOLS / 'test.py', config, checkpoint, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert figures(tmp_path / 'two.json') == pytest.approx(metrics, nan_ok=True)
    assert metrics[BEST[task]] > 0
    one = shown_figures(checkpoint.parent / 'report.html')
    assert len(one) > 100
    assert shown_figures(tmp_path / 'two.html') == pytest.approx(one, abs=2e-3)


def test_every_class_has_metrics_and_every_image_a_drawing(tested):
    task, _, checkpoint, metrics = tested
    prefix = 'IoU' if task == 'fpn' else 'coco/segm_AP'
    assert {f'{prefix}/{name}' for name in CLASSES} <= set(metrics)
    drawn = sorted(path.name for path in (checkpoint.parent / 'drawn').iterdir())
    assert drawn == [f'val_{number:06d}.jpg' for number in range(1, 6)]


def test_outputs_that_cannot_be_written_are_refused_before_the_test(tested, tmp_path, run_tool):
    _, config, checkpoint, _ = tested
    for option in ('--out', '--report'):
        done = run_tool('test.py', config, checkpoint, option, tmp_path)
        assert done.returncode == 1 and option in done.stderr and 'Traceback' not in done.stderr


def test_folding_changes_no_metric(tested, tmp_path, run_tool):
    """Also where a moving average of the weights was trained."""
    _, config, checkpoint, metrics = tested
    averaged = tmp_path / 'averaged.py'
    averaged.write_text(f"_base_ = '{config}'\ncustom_hooks = [dict(type='EMAHook')]\n")
    done = run_tool('test.py', averaged, checkpoint, '--no-deploy', '--out', 'out.json')
    assert done.returncode == 0, done.stderr[-3000:]
    assert figures(tmp_path / 'out.json') == pytest.approx(metrics, abs=2e-3, nan_ok=True)


def test_training_leaves_what_a_user_looks_for(trained):
    task, config, work_dir, _ = trained
    assert list(work_dir.glob(f'best_{BEST[task].replace("/", "_")}_iter_2.pth'))
    assert (work_dir / 'curves.png').read_bytes().startswith(b'\x89PNG')
    assert list(work_dir.glob('*/vis_data/events.out.tfevents.*'))
    lines = next(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry['step'] for entry in entries if 'loss' in entry] == [1, 2]
    assert 0 < entries[-1]['val/loss'] < 100
    assert 'num_classes=6' in (work_dir / config.name).read_text().replace('7', '6')
    meta = torch.load(work_dir / 'iter_2.pth', weights_only=False)['meta']
    assert set(CLASSES) <= set(meta['dataset_meta']['classes'])


def test_the_console_shows_what_matters_and_the_log_file_everything(trained):
    _, _, work_dir, console = trained
    for text in ('8 images', '5 images', 'ring', '2 images x 2 processes', 'scaled', 'mixed'):
        assert text in console
    assert 'iteration 1/2' in console and 'iteration 2/2' in console
    assert 'OneDL' not in console and 'optim_wrapper' not in console
    assert len(console.splitlines()) < 60
    log = next(work_dir.glob('*/*.log')).read_text()
    assert 'optim_wrapper' in log
    # Gradients are averaged: both processes train one model.
    assert 'Distributed training: True' in log and 'GPU number: 2' in log
    # Its name began with 'val', so mmengine logged it as a metric, one validation late.
    assert 'validated_at' not in log


def test_resuming_in_one_process(trained, tmp_path, run_tool):
    _, config, work_dir, _ = trained
    options = ['--resume', work_dir / 'iter_2.pth', '--cfg-options', 'train_cfg.max_iters=4']
    done = run_tool('train.py', config, '--work-dir', 'run', *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / 'run' / 'iter_4.pth').is_file()
    assert 'iteration 1/4' not in done.stdout and 'iteration 3/4' in done.stdout


def test_saved_config_serves_mmdets_and_mmsegs_own_inference(trained, shapes):
    task, config, work_dir, _ = trained
    saved, checkpoint = str(work_dir / config.name), str(work_dir / 'iter_2.pth')
    image = str(shapes / 'coco' / 'val2017' / 'val_000001.jpg')
    if task == 'fpn':
        from mmseg.apis import inference_model, init_model

        result = inference_model(init_model(saved, checkpoint, device='cpu'), image)
        assert result.pred_sem_seg.data.shape == (1, 128, 128)
    else:
        from mmdet.apis import inference_detector, init_detector

        model = init_detector(saved, checkpoint, device='cpu')
        assert model.dataset_meta['classes'] == CLASSES
        assert 'bboxes' in inference_detector(model, image).pred_instances


def test_a_config_without_hooks_trains_to_its_end(tiny_config, run_tool, tmp_path):
    config = tmp_path / 'no_hooks.py'
    config.write_text(f"_base_ = '{tiny_config('fpn')}'\ndefault_hooks = dict(_delete_=True)\n")
    done = run_tool('train.py', config, '--cfg-options', 'train_cfg.max_iters=1')
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_work_folder_that_is_a_file(tiny_config, run_tool, tmp_path):
    (tmp_path / 'run').touch()
    done = run_tool('train.py', tiny_config('fpn'), '--work-dir', 'run')
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert str(tmp_path / 'run') in done.stderr


FASTER_RCNN = f"""\
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['backbones'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True,
        type='EfficientFormerV2',
        arch={TINY_ARCH},
        norm_eval=True,
        init_cfg=[dict(type='Kaiming', layer='Conv2d')],
    ),
    neck=dict(in_channels=[4, 8, 8, 16], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16),
    ),
)
root = 'SHAPES/coco/'
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=root))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=root))
train_cfg = dict(max_epochs=1)
"""


def test_any_model_of_mmdet_trains_and_keeps_its_best(shapes, tmp_path, run_tool):
    """A config of mmdet's alone says nothing of TensorBoard or a best checkpoint; this metric
    takes 'bbox' by default."""
    evaluator = """\
val_evaluator = dict(
    _delete_=True, type='CocoMetric', ann_file=root + 'annotations/instances_val2017.json')
"""
    config = tmp_path / 'faster_rcnn.py'
    config.write_text(FASTER_RCNN.replace('SHAPES', str(shapes)) + evaluator)
    size = 'train_dataloader.dataset.pipeline.2.scale="(128,128)"'
    done = run_tool('train.py', config, '--work-dir', 'run', '--cfg-options', size)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'warning' in done.stderr and 'norm_eval=False' in done.stderr
    assert list((tmp_path / 'run').glob('best_coco_bbox_mAP_epoch_1.pth'))
    assert list((tmp_path / 'run').glob('*/vis_data/events.out.tfevents.*'))


@pytest.mark.parametrize(('task', 'metric'), [('fpn', 'mIoU'), ('retinanet', 'coco/bbox_mAP')])
def test_tta(task, metric, shapes, run_tool, tmp_path):
    config, checkpoint = write_trained(tmp_path, task, shapes)
    done = run_tool('test.py', config, checkpoint, '--tta', '--out', 'tta.json')
    assert done.returncode == 0, done.stderr[-3000:]
    assert figures(tmp_path / 'tta.json')[metric] >= 0


@pytest.mark.parametrize(
    'script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh']
)
def test_launchers_explain_themselves(script, tmp_path):
    done = launch(script, cwd=tmp_path)
    assert done.returncode == 2
    assert f'tools/{script} ' in done.stderr
