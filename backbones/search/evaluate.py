"""Evaluation of networks with the weights of a supernet, on the hold-out.

A network is taken out of the supernet, the statistics of its BatchNorms are computed again, and it
is folded and evaluated like any other. Every evaluation is saved as a line of a file, so none is
repeated, even after the search was killed.
"""

import copy
import hashlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine import dist
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.evaluator import Evaluator as Metrics
from mmengine.evaluator.metric import _to_cpu
from mmengine.logging import MMLogger
from mmengine.model import stack_batch
from mmengine.registry import DATASETS, MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from backbones.data.config_datasets import annotation_file, datasets_of, walk
from backbones.data.skip_bad import SampleError, base_datasets, guard
from backbones.deploy import expect_contiguous, switch_to_deploy
from backbones.engine.config import use_batch_norm
from backbones.engine.console import quiet
from backbones.engine.metrics import add_per_class, main_metrics
from backbones.engine.preflight import load_whole
from backbones.weights import load_checkpoint

from .elastic import Layout, build_network
from .holdout import as_test, check_holdout, join_datasets, label_files
from .space import Choice, Space, search_options

# With fewer images, variances would miss the differences between images.
CALIBRATION_BATCH = 16


def load_supernet(config: Config, source: str) -> tuple[Layout, dict[str, Tensor]]:
    """Read the weights that the networks of a config's space share, and their layout.

    ``source`` is a checkpoint of its supernet, or of an ordinary training, whose channels are then
    sorted by importance. Raises CheckpointError if it is of another model or space.
    """
    quiet(MMLogger.get_instance('search', log_level='WARNING'))
    space = Space.from_config(config)
    use_batch_norm(config)
    checkpoint = load_checkpoint(source)
    is_supernet = space.check_checkpoint(checkpoint)
    model = MODELS.build(config.model)
    layout = Layout(model, space, config)
    load_whole(model, checkpoint, source)
    if is_supernet:
        check_holdout(config, checkpoint)
    else:
        if dist.is_main_process():
            print(
                f'note: {source} is an ordinary model, not a supernet (plain slimming): smaller '
                'networks in it were never trained. If it was trained on all training images, '
                'these include the hold-out, and metrics are too high',
                file=sys.stderr,
            )
        layout.sort_channels(model)
    return layout, model.state_dict()


class Evaluator:
    """An evaluator of networks; several processes share the work.

    Args:
        config: A config whose classes are set, after :func:`~.holdout.use_holdout`.
            Evaluations are kept in ``search`` in its work folder.
        layout: The layout of the tensors.
        state_dict: The supernet's weights.
    """

    def __init__(self, config: Config, layout: Layout, state_dict: dict[str, Tensor]) -> None:
        self.config, self.layout, self.state_dict = config, layout, state_dict
        # Called with every requested choice, its metric and whether it is new.
        self.report: Callable[[Choice, float, bool], None] = lambda *result: None
        self.device = torch.device(get_device())
        self.holdout = build_dataset(config.val_dataloader.dataset)
        workers = config.val_dataloader.get('num_workers', 0)
        self.loader = DataLoader(
            self.holdout,
            batch_size=config.val_dataloader.get('batch_size', 1),
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=pseudo_collate,
        )
        self.batches: list[dict[str, Any]] = []
        self.path = Path(config.work_dir) / 'search' / f'evaluations_{self.fingerprint()}.jsonl'
        records = [read_records(self.path) if dist.is_main_process() else None]
        dist.broadcast_object_list(records)
        # The metric of every network that was evaluated, now or in an earlier run.
        self.known: dict[Choice, float] = {
            Choice.from_dict(record['choice']): record['metric'] for record in records[0]
        }
        # The name of the metric; empty before the first evaluation.
        self.metric = next((record['name'] for record in records[0]), '')

    def fingerprint(self) -> str:
        """Return 8 hexadecimal digits that differ if evaluations would have other results."""
        config, digest = self.config, hashlib.sha256()
        for name, tensor in sorted(self.state_dict.items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        for dataset in datasets_of(config, ('val', 'train')):
            digest.update(annotation_file(dataset).read_bytes())
        for dataset in datasets_of(config, ('val',)):
            for path in label_files(dataset, config):
                digest.update(path.read_bytes())
        evaluator = copy.deepcopy(config.val_evaluator)
        for node in walk(evaluator):
            node.pop('ann_file', None)
        pipeline = next(datasets_of(config, ('val',))).pipeline
        others = [config.model, evaluator, pipeline, search_options(config)]
        digest.update(json.dumps(others, default=str).encode())
        digest.update(self.layout.space.to_json().encode())
        return digest.hexdigest()[:8]

    def evaluate(self, choices: Sequence[Choice]) -> list[float]:
        """Return the metric of each network; all processes must pass the same networks in order."""
        asked = dict.fromkeys(choices)
        todo = [choice for choice in asked if choice not in self.known]
        for choice in asked.keys() & self.known.keys():
            self.report(choice, self.known[choice], False)
        rank, processes = dist.get_rank(), dist.get_world_size()
        for start in range(0, len(todo), processes):
            # One for each process; at the end some processes get none.
            own = todo[start : start + processes][rank : rank + 1]
            results = [(choice, self.measure(choice)) for choice in own]
            for choice, metric in chain.from_iterable(dist.all_gather_object(results)):
                self.known[choice] = metric
                self.report(choice, metric, True)
                if dist.is_main_process():
                    record = dict(choice=asdict(choice), metric=metric, name=self.metric)
                    append_record(self.path, record)
        return [self.known[choice] for choice in choices]

    @torch.no_grad()
    def measure(self, choice: Choice) -> float:
        """Return the metric of a network."""
        model = switch_to_deploy(self.calibrated(choice))
        # Hide the tables that mmdet and mmseg print.
        with redirect_stdout(io.StringIO()):
            metrics = Metrics(copy.deepcopy(self.config.val_evaluator))
            metrics.dataset_meta = self.holdout.metainfo
            for batch in self.loader:
                metrics.process(data_samples=model.val_step(batch), data_batch=batch)
            found = compute(metrics)
        self.metric = main_metrics(found)[0]
        return float(found[self.metric])

    def calibrated(self, choice: Choice) -> nn.Module:
        """Return a network with the supernet's weights and its own norms, in evaluation mode."""
        model = build_network(self.config, self.layout.space.options(choice, self.config))
        model.load_state_dict(self.layout.extract(self.state_dict, choice))
        expect_contiguous(model).to(self.device)
        self.batches = self.batches or calibration_batches(self.config, model.data_preprocessor)
        return calibrate(model, self.batches)

    def calibrated_state_dict(self, choice: Choice) -> dict[str, Tensor]:
        """Return the weights of a network by itself, from which its training can start."""
        return {name: tensor.cpu() for name, tensor in self.calibrated(choice).state_dict().items()}


def build_dataset(dataset: dict) -> Any:
    """Build a dataset that names the file of an image that it cannot read."""
    # Hide what pycocotools prints.
    with redirect_stdout(io.StringIO()):
        built = DATASETS.build(dataset)
    for part in base_datasets(built):
        guard(part)
    return built


def calibration_batches(config: Config, preprocessor: nn.Module) -> list[dict[str, Any]]:
    """Return training images that are not held out, the same for every call, batched by size."""
    options = search_options(config)
    parts = [as_test(dataset, config) for dataset in datasets_of(config, ('train',))]
    dataset = build_dataset(join_datasets(parts))
    rng = np.random.default_rng([options['seed'], 1])
    samples = []
    for index in rng.permutation(len(dataset)).tolist():
        if len(samples) == options['calibration_images']:
            break
        try:
            item = dataset[index]
        except SampleError:
            if not config.get('skip_bad'):
                raise
            continue
        batch = preprocessor(pseudo_collate([item]), False)
        (sample,) = batch['data_samples']
        samples.append((batch['inputs'], type(sample)(metainfo=sample.metainfo)))
    samples.sort(key=lambda pair: tuple(pair[0].shape))
    # Of about the same size: a rest of one image would count as much as all others.
    number = math.ceil(len(samples) / CALIBRATION_BATCH)
    parts = np.array_split(np.arange(len(samples)), number)
    return [stack([samples[index] for index in part]) for part in parts]


def stack(samples: list[tuple[Tensor, Any]]) -> dict[str, Any]:
    """Return one batch of images, which are padded to the largest."""
    images, data_samples = zip(*samples, strict=True)
    return dict(inputs=stack_batch([image[0] for image in images]), data_samples=list(data_samples))


@torch.no_grad()
def calibrate(model: nn.Module, batches: list[dict[str, Any]]) -> nn.Module:
    """Set the running statistics of a model's BatchNorms to the mean over some batches.

    The statistics in a supernet are those of its largest network. Norms that the batches do not
    reach keep theirs. The model is left in evaluation mode.
    """
    model.eval()
    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        # Without momentum, torch averages all batches since this count was 0.
        norm.momentum = None
        norm.num_batches_tracked.zero_()
        norm.train()
    for batch in batches:
        model(**batch, mode='tensor')
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def compute(metrics: Metrics) -> dict[str, float]:
    """Return the metrics of this process only; mmengine's own would collect those of all."""
    found = {}
    for metric in metrics.metrics:
        add_per_class(metric)
        values = metric.compute_metrics(_to_cpu(metric.results))
        prefix = f'{metric.prefix}/' if metric.prefix else ''
        found.update({f'{prefix}{name}': value for name, value in values.items()})
    return found


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a JSON Lines file; an incomplete last line is removed from it."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b'\n') + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a line to a JSON Lines file and write it to disk, to survive a loss of power."""
    with path.open('ab', buffering=0) as file:
        file.write(json.dumps(record).encode() + b'\n')
        os.fsync(file.fileno())
