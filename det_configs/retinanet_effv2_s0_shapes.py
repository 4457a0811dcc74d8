# The demo: RetinaNet from scratch on the dataset that tools/make_shapes.py draws.
_base_ = './retinanet_effv2_s0.py'

data_root = 'data/shapes/coco/'
palette = [
    (230, 80, 50),
    (60, 90, 230),
    (60, 190, 80),
    (240, 200, 40),
    (200, 70, 200),
    (50, 200, 210),
]
train_pipeline = [step for step in _base_.train_pipeline if step.type != 'Resize']
test_pipeline = [
    dict(step, scale=(160, 160)) if step.type == 'Resize' else step for step in _base_.test_pipeline
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(data_root=data_root, pipeline=train_pipeline),
)
val_dataloader = dict(num_workers=1, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

# From scratch, every block has to contribute from the start, and BatchNorm has to learn.
model = dict(backbone=dict(init_cfg=None, norm_eval=False, layer_scale_init_value=1.0))
max_iters = 600
optim_wrapper = dict(optimizer=dict(lr=5e-4, weight_decay=0.05), clip_grad=dict(max_norm=10))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=60, by_epoch=False),
    dict(type='PolyLR', power=0.9, begin=60, end=max_iters, eta_min=1e-6, by_epoch=False),
]
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=max_iters, val_interval=200)
default_hooks = dict(
    logger=dict(interval=20, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=200),
)
log_processor = dict(by_epoch=False)
