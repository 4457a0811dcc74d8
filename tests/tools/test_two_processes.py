"""Two processes train, validate and fail as one would."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mmengine.registry import DATASETS, MODELS
from tiny import TINY_ARCH, write_tiny_config
from tool_process import launch, run_in_two
from web import Server, serve

from backbones import EfficientFormerV2
from backbones.data.classes import set_classes
from backbones.engine.config import fit_to_device, load_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def served() -> Iterator[Server]:
    """A web server with a backbone's weights."""
    content = io.BytesIO()
    torch.save(EfficientFormerV2(TINY_ARCH).state_dict(), content)
    with serve({'/weights.pth': content.getvalue()}) as server:
        yield server


def test_metrics_are_those_of_the_saved_model_and_one_process_downloads(
    served, shapes, tmp_path, run_tool, monkeypatch
):
    """BatchNorm's means differ from process to process; what is validated is what is saved."""
    extra = (
        "model['backbone']['init_cfg'] = "
        f"dict(_delete_=True, type='Pretrained', checkpoint='{served.url}/weights.pth')\n"
    )
    config = write_tiny_config(tmp_path, 'fpn', shapes, extra)
    run_folder = tmp_path / 'run'
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    options = ['--seed', 0, '--val-loss', '--work-dir', run_folder, '--launcher', 'pytorch']
    done, _ = run_in_two(tmp_path, ROOT / 'tools' / 'train.py', config, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert served.asked == ['/weights.pth']

    log = next(run_folder.glob('*/vis_data/scalars.json')).read_text().splitlines()
    validated = json.loads(log[-1])
    tested = run_tool('test.py', config, run_folder / 'iter_2.pth', '--out', 'metrics.json')
    assert tested.returncode == 0, tested.stderr[-3000:]
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    figures = {name: value for name, value in validated.items() if name in metrics}
    figures = {name: value for name, value in figures.items() if 'time' not in name}
    assert figures['aAcc'] > 0
    assert figures == pytest.approx({name: metrics[name] for name in figures}, nan_ok=True)
    assert validated['val/loss'] == pytest.approx(loss_of(config, run_folder / 'iter_2.pth'))


def loss_of(path: Path, checkpoint: Path) -> float:
    """The mean of a segmentor's loss over all five validation images, one by one."""
    config = load_config(str(path))
    set_classes(config, ('val',))
    fit_to_device(config)
    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=False)['state_dict'])
    losses = []
    for sample in DATASETS.build(config.val_dataloader.dataset):
        batch = {name: [value] for name, value in sample.items()}
        with torch.no_grad():
            found = model(**model.data_preprocessor(batch, False), mode='loss')
        losses.append(float(found['decode.loss_ce']))
    assert len(losses) == 5
    return sum(losses) / 5


@pytest.mark.slow
def test_one_that_fails_takes_the_other_down_and_its_error_is_shown(shapes, tmp_path):
    """After steps in which the images of the two had different sizes."""
    config = write_tiny_config(
        tmp_path,
        'retinanet',
        shapes,
        """\
        custom_imports = dict(imports=['backbones', 'toy_training'], allow_failed_imports=False)
        train_pipeline = [
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='RandomResize', scale=(128, 128), ratio_range=(0.5, 2.0), keep_ratio=True),
            dict(type='PackDetInputs'),
        ]
        train_dataloader['dataset']['pipeline'] = train_pipeline
        train_cfg = dict(max_iters=100, val_interval=100)
        custom_hooks = [dict(type='Disturb', step=4, what='fail_in_second_process')]
        """,
    )
    path = f'{ROOT}:{ROOT / "tests"}'
    done = launch('dist_train.sh', config, 2, '--seed', 0, cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode not in (0, 75)
    assert 'the second process has had enough' in done.stderr
    log = next((tmp_path / 'work_dirs').glob('*/*/vis_data/scalars.json'))
    steps = [json.loads(line)['step'] for line in log.read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
