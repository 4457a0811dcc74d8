"""mmseg's IoU metric with the IoU of every class."""

import torch
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS


@METRICS.register_module()
class ClasswiseIoUMetric(IoUMetric):
    """mIoU and its kin, with ``IoU/CLASS`` in per cent for every class in what it returns.

    A class that neither truth nor prediction shows has NaN.
    """

    def compute_metrics(self, results: list) -> dict[str, float]:
        metrics = super().compute_metrics(results)
        intersection = torch.stack([result[0] for result in results]).sum(0)
        union = torch.stack([result[1] for result in results]).sum(0)
        for name, iou in zip(self.dataset_meta['classes'], intersection / union, strict=True):
            metrics[f'IoU/{name}'] = round(100 * float(iou), 2)
        return metrics
