"""tools/train.py and tools/test.py by their command lines, on tiny models of the three tasks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TINY_ARCH, write_tiny_config

ROOT = Path(__file__).resolve().parents[2]
TASKS = ('fpn', 'retinanet', 'mask_rcnn')
BEST = {'fpn': 'mIoU', 'retinanet': 'coco/bbox_mAP', 'mask_rcnn': 'coco/segm_mAP'}
CLASSES = ('disc', 'square', 'triangle', 'star', 'cross', 'ring')


def dist(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run one of the launchers with this Python."""
    return subprocess.run(
        [str(part) for part in (ROOT / 'tools' / script, *arguments)],
        cwd=cwd,
        env={**os.environ, 'PYTHON': sys.executable},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope='module', params=TASKS)
def trained(request, tmp_path_factory, shapes) -> tuple[str, Path, Path]:
    """A task, its config, and the work folder of a training in two processes."""
    folder = tmp_path_factory.mktemp(request.param)
    config = write_tiny_config(folder, request.param, shapes)
    done = dist('dist_train.sh', config, 2, '--seed', 0, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, config, folder / 'work_dirs' / config.stem


def metrics_of(path: Path) -> dict:
    return json.loads(path.read_text())


def test_two_processes_test_as_one(trained, tmp_path, run_tool):
    """The pictures are an odd number: none may be left out or counted twice."""
    task, config, work_dir = trained
    checkpoint = work_dir / 'iter_2.pth'
    one = run_tool('test.py', config, checkpoint, '--out', 'one.json', '--show-dir', 'drawn')
    assert one.returncode == 0, one.stderr[-3000:]
    two = dist('dist_test.sh', config, checkpoint, 2, '--out', 'two.json', cwd=tmp_path)
    assert two.returncode == 0, two.stderr[-3000:]

    ignored = ('time', 'data_time')
    expected = {k: v for k, v in metrics_of(tmp_path / 'one.json').items() if k not in ignored}
    found = {k: v for k, v in metrics_of(tmp_path / 'two.json').items() if k not in ignored}
    assert found == pytest.approx(expected, nan_ok=True)
    assert BEST[task] in expected
    assert f'{BEST[task]} ' in one.stdout
    if task == 'fpn':
        assert {f'IoU/{name}' for name in ('background', *CLASSES)} <= set(expected)
    drawn = sorted(path.name for path in (tmp_path / 'drawn').glob('*.jpg'))
    assert drawn == [f'val_{number:06d}.jpg' for number in range(1, 6)]


def test_folding_changes_no_metric(trained, tmp_path, run_tool):
    """Also where a moving average of the weights was trained."""
    task, config, work_dir = trained
    averaged = tmp_path / 'averaged.py'
    averaged.write_text(f"_base_ = '{config}'\ncustom_hooks = [dict(type='EMAHook')]\n")
    metrics = {}
    for switch in ('--no-deploy', None):
        done = run_tool(
            *(
                'test.py',
                averaged,
                work_dir / 'iter_2.pth',
                '--work-dir',
                'run',
                '--out',
                'out.json',
            ),
            *([switch] if switch else []),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        metrics[switch] = metrics_of(tmp_path / 'out.json')
    figures = [key for key in metrics[None] if 'time' not in key]
    assert BEST[task] in figures
    for key in figures:
        assert metrics[None][key] == pytest.approx(
            metrics['--no-deploy'][key], abs=2e-3, nan_ok=True
        )


def test_training_leaves_what_a_user_looks_for(trained):
    task, config, work_dir = trained
    assert list(work_dir.glob(f'best_{BEST[task].replace("/", "_")}_iter_2.pth'))
    assert (work_dir / 'curves.png').read_bytes().startswith(b'\x89PNG')
    assert list(work_dir.glob('*/vis_data/events.out.tfevents.*'))
    log = next(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
    assert any('loss' in json.loads(line) for line in log)
    saved = (work_dir / config.name).read_text()
    assert 'num_classes=6' in saved or 'num_classes=7' in saved
    meta = torch.load(work_dir / 'iter_2.pth', weights_only=False)['meta']
    assert set(CLASSES) <= set(meta['dataset_meta']['classes'])


def test_both_processes_train_on_the_same_weights(trained):
    """Gradients were averaged: a training in one process of the same two batches would differ."""
    _, _, work_dir = trained
    log = next(work_dir.glob('*/*.log')).read_text()
    assert 'Distributed training: True' in log
    assert 'GPU number: 2' in log


@pytest.mark.parametrize('task', TASKS)
def test_every_option_at_once_and_resuming(task, tiny_config, tmp_path, run_tool):
    config = tiny_config(task)
    options = ['--work-dir', 'run', '--seed', 1]
    done = run_tool(
        'train.py', config, *options, '--amp', '--val-loss', '--auto-scale-lr',
        '--cfg-options', 'model.backbone.frozen_stages=1',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r'learning rate is [\d.e-]+, for 1 x 2 pictures', done.stdout)
    assert 'val/loss: ' in done.stdout
    loss = float(re.findall(r'val/loss: (\S+)', done.stdout)[-1])
    assert 0 < loss < 100

    resumed = run_tool(
        'train.py', config, *options, '--resume', '--cfg-options', 'train_cfg.max_iters=4'
    )
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert 'resumed epoch' in resumed.stdout
    assert (tmp_path / 'run' / 'iter_4.pth').is_file()
    assert not re.search(r'Iter\(train\)\s*\[1/4\]', resumed.stdout)


def test_any_model_of_mmdet_trains_and_keeps_its_best(shapes, tmp_path, run_tool):
    """A config that inherits from mmdet alone says nothing of TensorBoard or a best checkpoint."""
    config = tmp_path / 'faster_rcnn.py'
    config.write_text(f"""\
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['backbones'], allow_failed_imports=False)
model = dict(
    backbone=dict(_delete_=True, type='EfficientFormerV2', arch={TINY_ARCH}, norm_eval=True),
    neck=dict(in_channels=[4, 8, 8, 16], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16),
    ),
)
root = '{shapes}/coco/'
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=root))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=root))
val_evaluator = dict(ann_file=root + 'annotations/instances_val2017.json')
train_cfg = dict(max_epochs=1)
""")
    size = 'train_dataloader.dataset.pipeline.2.scale="(128,128)"'
    done = run_tool('train.py', config, '--work-dir', 'run', '--cfg-options', size)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / 'run').glob('best_coco_bbox_mAP_epoch_1.pth'))
    assert list((tmp_path / 'run').glob('*/vis_data/events.out.tfevents.*'))


def test_tta(trained, run_tool, tmp_path):
    task, config, work_dir = trained
    done = run_tool('test.py', config, work_dir / 'iter_2.pth', '--tta', '--out', 'tta.json')
    if task == 'mask_rcnn':
        assert done.returncode == 1
        assert 'mmdet merges boxes only' in done.stderr
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        assert BEST[task] in metrics_of(tmp_path / 'tta.json')


def test_saved_config_serves_mmdets_and_mmsegs_own_inference(trained, shapes):
    task, config, work_dir = trained
    saved, checkpoint = str(work_dir / config.name), str(work_dir / 'iter_2.pth')
    picture = str(shapes / 'coco' / 'val2017' / 'val_000001.jpg')
    if task == 'fpn':
        from mmseg.apis import inference_model, init_model

        result = inference_model(init_model(saved, checkpoint, device='cpu'), picture)
        assert result.pred_sem_seg.data.shape == (1, 128, 128)
    else:
        from mmdet.apis import inference_detector, init_detector

        model = init_detector(saved, checkpoint, device='cpu')
        assert model.dataset_meta['classes'] == CLASSES
        assert 'bboxes' in inference_detector(model, picture).pred_instances


def test_resuming_from_another_arch_is_refused(trained, tiny_config, run_tool):
    task, _, work_dir = trained
    config = tiny_config(task, "model['backbone']['arch']['channels'] = (4, 8, 8, 24)\n"
                               "model['neck']['in_channels'] = [4, 8, 8, 24]\n")  # fmt: skip
    done = run_tool('train.py', config, '--resume', work_dir / 'iter_2.pth')
    assert done.returncode == 1
    assert 'channels [4, 8, 8, 16]' in done.stderr
    assert 'Iter(train)' not in done.stdout


@pytest.mark.parametrize('tool', ['train.py', 'test.py', 'demo.py', 'make_shapes.py', 'doctor.py'])
def test_help_has_examples(tool, run_tool):
    done = run_tool(tool, '--help')
    assert done.returncode == 0
    assert 'examples:' in done.stdout.lower()


@pytest.mark.parametrize(
    'script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh']
)
def test_launchers_explain_themselves(script, tmp_path):
    done = dist(script, cwd=tmp_path)
    assert done.returncode == 2
    assert f'tools/{script} ' in done.stderr


def test_slurm_launcher_asks_for_what_it_was_told(tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    done = subprocess.run(
        [ROOT / 'tools' / 'slurm_train.sh', 'gpu', 'job', 'config.py', '--seed', '3'],
        env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'GPUS': '16'},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.split()
    assert words[words.index('--ntasks') + 1] == '16'
    assert words[words.index('--ntasks-per-node') + 1] == '8'
    assert words[-5:] == ['config.py', '--seed', '3', '--launcher', 'slurm']
