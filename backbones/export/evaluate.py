"""Metrics of an exported file, with the evaluator and the test data of a config."""

import sys
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from mmengine.runner import Runner

from backbones.data.check import refuse_errors
from backbones.data.classes import set_classes
from backbones.data.config_datasets import walk
from backbones.engine.console import evaluation_of, prints_to, quiet
from backbones.engine.preflight import check_classes
from backbones.errors import ConfigError
from backbones.inference.exported_file import ExportedModel
from backbones.inference.testing import ImageModel, use_predictor
from backbones.inference.tiles import TiledModel

TASKS = {'mmseg': 'segmentation', 'mmdet': 'detection'}
# Of mmdet's configs; AP counts detections below it for nothing.
USUAL_SCORE_THRESHOLD = 0.05


@MODELS.register_module()
class ExportedFile(ImageModel):
    """An exported file with the interface of a model that mmengine tests; with a ``tile``, in
    tiles, with the options of :class:`backbones.inference.tiles.TiledModel`."""

    def __init__(
        self, path: str, amp: bool = False, tile: int | None = None, **options: Any
    ) -> None:
        model = ExportedModel(path, amp=amp)
        runtime = 'OpenVINO' if path.endswith('.xml') else 'onnxruntime'
        in_tiles = f', in tiles of {tile}x{tile}' if tile else ''
        summary = {
            'model': f'{model.description.model}, exported{in_tiles}',
            'weights': path,
            'device': f'{runtime}, mixed precision' if amp else runtime,
        }
        super().__init__(TiledModel(model, tile, **options) if tile else model, summary)


def use_exported(config: Config, path: str | Path, amp: bool = False, **tiles: Any) -> None:
    """Put an :class:`ExportedFile` in place of a config's model."""
    use_predictor(config, dict(type='ExportedFile', path=str(path), amp=amp, **tiles))


def check_exported_test(config: Config) -> None:
    """Refuse a config's :class:`ExportedFile` that cannot be run or does not fit the data and
    metrics of its test, and data with errors; fit the config to them."""
    path = config.model.path
    about = ExportedModel(path, amp=config.model.amp).description
    task = TASKS[config.default_scope]
    if about.task != task:
        raise ConfigError(f'{path} was exported for {about.task}, the config is for {task}')
    classes = set_classes(config, ('test',), keep_files=True)
    check_classes(path, about.classes, classes)
    if 'masks' not in about.outputs and any(
        'segm' in (node.get('metric') or ()) for node in walk(config.test_evaluator)
    ):
        raise ConfigError(
            f'{path} gives no masks, which test_evaluator of the config measures: test it with the '
            'config that it was exported with, or --cfg-options test_evaluator.metric=bbox'
        )
    if (about.score_threshold or 0) > USUAL_SCORE_THRESHOLD:
        print(
            f'note: {path} leaves out detections with scores below {about.score_threshold:g}, '
            'which lowers AP',
            file=sys.stderr,
        )
    refuse_errors(config, ('test',))
    if (about.batch or 1) > 1:
        config.test_dataloader.batch_size = about.batch


def measure(config: Config, path: str | Path, title: str) -> dict[str, float]:
    """The metrics of a file, by a config that :func:`check_exported_test` was called with."""
    logger = MMLogger.get_current_instance()
    quiet(logger)
    model = ExportedFile(str(path))
    with prints_to(logger):
        loader = Runner.build_dataloader(config.test_dataloader)
        evaluator = Evaluator(config.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    progress = evaluation_of(loader, title)
    for batch in loader:
        evaluator.process(model.test_step(batch), batch)
        progress.step()
    progress.close()
    with prints_to(logger):
        return evaluator.evaluate(len(loader.dataset))
