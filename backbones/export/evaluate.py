"""Metrics of an exported file, by the evaluator and the test data of a config."""

import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.runner import Runner

from backbones.data.check import refuse_errors
from backbones.data.classes import set_classes
from backbones.data.config_datasets import walk
from backbones.data.skip_bad import base_datasets, guard
from backbones.engine.console import evaluation_of, prints_to, quiet
from backbones.engine.preflight import check_classes
from backbones.errors import ConfigError
from backbones.inference.exported_file import ExportedModel
from backbones.inference.testing import InferencerModel

TASKS = {'mmseg': 'segmentation', 'mmdet': 'detection'}
# That of mmdet's configs, with which AP is usually computed.
USUAL_SCORE_THRESHOLD = 0.05


def check_exported_test(config: Config) -> None:
    """Check an exported file that replaces a config's model, and the test data; raise an error if
    the file cannot run or does not fit the data and metrics. Fits the config to both."""
    path = config.model.config
    about = ExportedModel(path, amp=config.model.get('amp', False)).description
    task = TASKS[config.default_scope]
    if about.task != task:
        raise ConfigError(f'{path} was exported for {about.task}, but the config is for {task}')
    classes = set_classes(config, ('test',), keep_files=True)
    check_classes(path, about.classes, classes)
    if 'masks' not in about.outputs and any(
        'segm' in (node.get('metric') or ()) for node in walk(config.test_evaluator)
    ):
        raise ConfigError(
            f'{path} has no masks, but test_evaluator of the config measures them: use the config '
            'that the file was exported with, or --cfg-options test_evaluator.metric=bbox'
        )
    if (about.score_threshold or 0) > USUAL_SCORE_THRESHOLD:
        print(
            f'note: {path} drops detections with scores below {about.score_threshold:g}, '
            'which lowers AP',
            file=sys.stderr,
        )
    refuse_errors(config, ('test',))
    if (about.batch or 1) > 1:
        config.test_dataloader.batch_size = about.batch


def measure(config: Config, path: str | Path, title: str) -> dict[str, float]:
    """Return the metrics of a file, for a config after :func:`check_exported_test`."""
    logger = MMLogger.get_current_instance()
    quiet(logger)
    model = InferencerModel(str(path))
    settings = dict(config.test_dataloader)
    if not settings.get('num_workers'):
        # torch raises an error for persistent workers if there are none.
        settings['persistent_workers'] = False
    with prints_to(logger):
        loader = Runner.build_dataloader(settings)
        evaluator = Evaluator(config.test_evaluator)
    for dataset in base_datasets(loader.dataset):
        guard(dataset)
    evaluator.dataset_meta = loader.dataset.metainfo
    progress = evaluation_of(loader, title)
    for batch in loader:
        evaluator.process(model.test_step(batch), batch)
        progress.step()
    progress.close()
    with prints_to(logger):
        return evaluator.evaluate(len(loader.dataset))
