"""Truth and prediction side by side, drawn while testing."""

import os
from pathlib import Path

import mmcv
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

# Below this many pixels a side, names and lines of the usual size would cover a picture.
SMALL_SIDE = 256


def draw_comparisons(config: Config, folder: str) -> None:
    """Have every test picture drawn into a folder, truth to the left and prediction to the right.

    Args:
        config: Changed in place: gets a hook.
        folder: Where the pictures go; made where it is missing.
    """
    hook = ConfigDict(type='ComparisonHook', folder=folder)
    config.custom_hooks = [*config.get('custom_hooks', []), hook]


@HOOKS.register_module()
class ComparisonHook(Hook):
    """Draw each test picture with the library's visualizer.

    Args:
        folder: Where the drawings go, under the pictures' own names.
        score_thr: Detections below this score are not drawn. Default: 0.5.
    """

    def __init__(self, folder: str, score_thr: float = 0.5) -> None:
        self.folder = Path(folder)
        self.score_thr = score_thr

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict, outputs: list[BaseDataElement]
    ) -> None:
        for sample in outputs:
            picture = mmcv.imread(sample.img_path, channel_order='rgb')
            small = min(picture.shape[:2]) < SMALL_SIDE
            if 'pred_instances' in sample:
                options = {'pred_score_thr': self.score_thr}
                runner.visualizer.line_width = 1 if small else 3
            else:
                options = {'with_labels': not small}
            runner.visualizer.add_datasample(
                Path(sample.img_path).name,
                picture,
                data_sample=sample.cpu(),
                out_file=str(self.drawing_of(sample.img_path, runner)),
                **options,
            )

    def drawing_of(self, img_path: str, runner: Runner) -> Path:
        """Where a picture's drawing goes: below the folder as the picture lies below the data's."""
        prefix = getattr(runner.test_dataloader.dataset, 'data_prefix', {})
        root = prefix.get('img_path') or prefix.get('img') or os.path.dirname(img_path)
        relative = os.path.relpath(img_path, root)
        inside = Path(img_path).name if relative.startswith(os.pardir) else relative
        return (self.folder / inside).with_suffix('.png')
