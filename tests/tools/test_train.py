"""tools/train.py by its command line, on tiny models."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from _arguments import add_launcher, parse
from tiny import TINY_ARCH, write_tiny_config
from tool_process import TOOLS, launch, run_in_two
from trained_tiny import write_trained

from backbones.engine.config import load_config

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


def test_training_leaves_what_a_user_looks_for(trained):
    task, config, work_dir, _ = trained
    assert list(work_dir.glob(f'best_{BEST[task].replace("/", "_")}_iter_2.pth'))
    assert (work_dir / 'curves.png').read_bytes().startswith(b'\x89PNG')
    assert list(work_dir.glob('*/vis_data/events.out.tfevents.*'))
    lines = next(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry['step'] for entry in entries if 'loss' in entry] == [1, 2]
    # Two processes of two images.
    recipe = load_config(str(config))
    share = 2 * 2 / recipe.auto_scale_lr.base_batch_size
    assert entries[0]['lr'] == pytest.approx(share * recipe.optim_wrapper.optimizer.lr)
    assert 0 < entries[-1]['val/loss'] < 100
    # Of a segmentor with the background.
    assert f'num_classes={7 if task == "fpn" else 6}' in (work_dir / config.name).read_text()
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
train_dataloader = dict(num_workers=0, dataset=dict(data_root=root))
val_dataloader = dict(num_workers=0, dataset=dict(data_root=root))
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


def test_a_whole_model_of_other_classes_is_a_start(shapes, tmp_path, run_tool):
    """What fits is taken over; layers of another number of classes begin anew."""
    _, checkpoint = write_trained(tmp_path, 'retinanet', shapes)
    config = write_tiny_config(tmp_path, 'retinanet', shapes, "classes = ['disc', 'ring']\n")
    # Nothing but the statistics of norms moves.
    options = (f'load_from={checkpoint}', 'train_cfg.max_iters=1', 'optim_wrapper.optimizer.lr=0')
    done = run_tool('train.py', config, '--work-dir', 'run', '--cfg-options', *options)
    assert done.returncode == 0, done.stderr[-3000:]
    given, found = (
        torch.load(path, weights_only=False)['state_dict']
        for path in (checkpoint, tmp_path / 'run/iter_1.pth')
    )
    assert given.keys() == found.keys()
    for name, tensor in given.items():
        if name.startswith('bbox_head.retina_cls.'):
            assert len(CLASSES) * len(found[name]) == 2 * len(tensor)
        elif 'running_' not in name and 'num_batches' not in name:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ('variables', 'options', 'launcher'),
    [
        (['TORCHELASTIC_RUN_ID', 'WORLD_SIZE'], [], 'pytorch'),
        (['TORCHELASTIC_RUN_ID'], ['--launcher', 'none'], 'none'),
        (['SLURM_NTASKS', 'SLURM_PROCID', 'OMPI_COMM_WORLD_SIZE', 'WORLD_SIZE'], [], 'none'),
    ],
)
def test_torchrun_is_known_as_a_launcher(variables, options, launcher, monkeypatch):
    """Each of its processes would otherwise be a training of its own, in the same folder."""
    for name in variables:
        monkeypatch.setenv(name, '2')
    monkeypatch.setenv('LOCAL_RANK', '1')
    monkeypatch.setattr('sys.argv', ['train.py', *options])
    add_launcher(parser := argparse.ArgumentParser())
    assert parse(parser).launcher == launcher


@pytest.mark.parametrize(
    'script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh']
)
def test_launchers_explain_themselves(script, tmp_path):
    done = launch(script, cwd=tmp_path)
    assert done.returncode == 2
    assert f'tools/{script} ' in done.stderr
