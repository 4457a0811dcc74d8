"""mmdet's COCO metric with the AP of every class, for boxes and masks apart."""

from mmdet.evaluation import CocoMetric
from mmdet.registry import METRICS

SUFFIX = '_precision'


@METRICS.register_module()
class ClasswiseCocoMetric(CocoMetric):
    """COCO's AP, with ``{bbox,segm}_AP/CLASS`` for every class in what it returns.

    mmdet names a class's AP the same for boxes and masks, so that the latter replace the former.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{**kwargs, 'classwise': True})

    def compute_metrics(self, results: list) -> dict[str, float]:
        kinds, everything = self.metrics, {}
        for kind in kinds:
            self.metrics = [kind]
            for name, value in super().compute_metrics(results).items():
                if name.endswith(SUFFIX):
                    name = f'{kind}_AP/{name.removesuffix(SUFFIX)}'
                everything[name] = value
        self.metrics = kinds
        return everything
