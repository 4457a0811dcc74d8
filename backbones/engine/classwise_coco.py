"""mmdet's COCO metric with the AP of every class, for boxes and masks apart."""

from mmdet.evaluation import CocoMetric
from mmdet.registry import METRICS

SUFFIX = '_precision'


@METRICS.register_module()
class ClasswiseCocoMetric(CocoMetric):
    """COCO's AP, with ``{bbox,segm}_AP/CLASS`` for every class in what it returns.

    mmdet names a class's AP the same for boxes and masks, so that the latter replace the former,
    and returns nothing where nothing was detected, which ends a training that keeps the best
    checkpoint. Here that is an AP of 0.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{**kwargs, 'classwise': True})

    def compute_metrics(self, results: list) -> dict[str, float]:
        kinds, everything = self.metrics, {}
        for kind in kinds:
            self.metrics = [kind]
            found = {f'{kind}_{name}': 0.0 for name in ('mAP', 'mAP_50', 'mAP_75')}
            found |= super().compute_metrics(results)
            for name, value in found.items():
                if name.endswith(SUFFIX):
                    name = f'{kind}_AP/{name.removesuffix(SUFFIX)}'
                everything[name] = value
        self.metrics = kinds
        return everything
