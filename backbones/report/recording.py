"""Record what a report needs while tools/test.py runs; the metrics are computed only once."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.runner import Runner
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from backbones.engine.metrics import owner_of
from backbones.errors import ConfigError

from .detection import DetectionResults, summarize
from .segmentation import PixelMetric

# A function that computes metrics from results.
Compute = Callable[[list], dict[str, float]]


class ReportHook(Hook):
    """Records what :func:`backbones.report.page.write_report` shows, in any number of processes."""

    def before_test(self, runner: Runner) -> None:
        """Watch the metrics; ConfigError if a report supports none of them."""
        # Of boxes and of masks; filled after the test, in the first process.
        self.detections: list[DetectionResults] = []
        # Of a segmentor.
        self.pixels: PixelMetric | None = None
        evaluator = runner.test_evaluator
        classes, watched = evaluator.dataset_meta['classes'], False
        for metric in list(evaluator.metrics):
            owner = owner_of(metric)
            if owner == 'IoUMetric' and not metric.format_only:
                self.pixels = PixelMetric(classes, metric.ignore_index)
                evaluator.metrics.append(self.pixels)
            elif owner == 'CocoMetric' and not metric.format_only and kinds_of(metric):
                self.watch(metric)
            elif owner == 'VOCMetric' and metric.metric == 'mAP':
                boxes = voc_as_coco()
                boxes.dataset_meta = evaluator.dataset_meta
                evaluator.metrics.append(boxes)
                self.watch(boxes)
            else:
                continue
            watched = True
        if not watched:
            names = ', '.join(type(metric).__name__ for metric in evaluator.metrics)
            raise ConfigError(
                f'--report needs boxes or masks of CocoMetric, mAP of VOCMetric, or IoUMetric, but '
                f'test_evaluator of the config has {names}; test without --report'
            )

    def watch(self, metric: BaseMetric) -> None:
        """Add image and size to the results of a CocoMetric, and record what it evaluates."""
        process, compute = metric.process, metric.compute_metrics

        def process_with_paths(data_batch: Any, data_samples: Sequence[dict]) -> None:
            before = len(metric.results)
            process(data_batch, data_samples)
            for (truth, _), sample in zip(metric.results[before:], data_samples, strict=True):
                truth['image'] = (sample['img_path'], tuple(sample['ori_shape'][:2]))

        metric.process = process_with_paths
        metric.compute_metrics = partial(record_coco, metric, compute, self.detections)


def kinds_of(metric: BaseMetric) -> list[str]:
    """Return what a CocoMetric measures that has classes: 'bbox', 'segm'."""
    return [kind for kind in metric.metrics if kind in ('bbox', 'segm')]


def record_coco(
    metric: BaseMetric, compute: Compute, found: list[DetectionResults], results: list
) -> dict[str, float]:
    """Return the metrics that ``compute`` returns, and record its evaluations."""
    from mmdet.evaluation.metrics import coco_metric

    images = {truth['img_id']: truth['image'] for truth, _ in results}

    class Recorded(COCOeval):
        def summarize(self) -> None:
            super().summarize()
            if self.params.useCats:
                found.append(summarize(self, images))

    with patch.multiple(coco_metric, COCOeval=Recorded, COCOevalMP=Recorded):
        metrics = compute(results)
    # Without any detection mmdet evaluates nothing.
    for kind in kinds_of(metric)[len(found) :]:
        evaluation = Recorded(metric._coco_api, COCO(), kind)
        evaluation.params.catIds, evaluation.params.imgIds = metric.cat_ids, metric.img_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return metrics


def voc_as_coco() -> BaseMetric:
    """Return a metric that evaluates VOC's boxes as COCO does, difficult ones as crowd."""
    from mmdet.evaluation import CocoMetric

    class BoxesOfVOC(CocoMetric):
        def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
            # Images of several folders may have the same id.
            samples = [
                one | {'img_id': one['img_path'], 'instances': instances_of(one)}
                for one in data_samples
            ]
            super().process(data_batch, samples)

        def compute_metrics(self, results: list) -> dict[str, float]:
            super().compute_metrics(results)
            return {}

    return BoxesOfVOC(metric='bbox')


def instances_of(sample: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the ground truth of a sample in the layout of mmdet's datasets."""
    return [
        {'bbox': box, 'bbox_label': label, 'ignore_flag': is_difficult}
        for is_difficult, name in enumerate(('gt_instances', 'ignored_instances'))
        for box, label in zip(
            sample[name]['bboxes'].tolist(), sample[name]['labels'].tolist(), strict=True
        )
    ]
