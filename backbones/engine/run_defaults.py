"""What a training does unless its config says otherwise: keep the best, log to TensorBoard.

Our configs say so themselves; one that inherits from mmdet or mmseg directly does not.
"""

from mmengine.config import Config, ConfigDict

from backbones.data.config_datasets import walk


def keep_best_checkpoint(config: Config) -> None:
    """Keep the checkpoint that is best by the task's metric, where the config names none."""
    hook = config.get('default_hooks', {}).get('checkpoint')
    if hook is None or hook.get('save_best') or not config.get('val_evaluator'):
        return
    hook.save_best, hook.rule = task_metric(config), 'greater'


def task_metric(config: Config) -> str:
    """What models of a task are compared by: mask AP, box AP or mIoU; 'auto' for other tasks."""
    for evaluator in walk(config.val_evaluator):
        kind = str(evaluator.get('type')).rpartition('.')[2]
        if kind.endswith('CocoMetric'):
            return 'coco/segm_mAP' if 'segm' in evaluator.metric else 'coco/bbox_mAP'
        if kind.endswith('IoUMetric'):
            return 'mIoU'
    return 'auto'


def log_to_tensorboard(config: Config) -> None:
    """Add TensorBoard to where a config logs to."""
    visualizer = config.setdefault('visualizer', ConfigDict(type='Visualizer'))
    backends = visualizer.get('vis_backends') or [ConfigDict(type='LocalVisBackend')]
    if not any('Tensorboard' in str(backend.type) for backend in backends):
        visualizer.vis_backends = [*backends, ConfigDict(type='TensorboardVisBackend')]
