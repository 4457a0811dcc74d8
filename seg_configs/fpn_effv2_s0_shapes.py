# The demo: Semantic FPN from scratch on the dataset that tools/make_shapes.py draws.
_base_ = './fpn_effv2_s0.py'

classes = 'data/shapes/classes.txt'
palette = [
    (60, 60, 60),
    (230, 80, 50),
    (60, 90, 230),
    (60, 190, 80),
    (240, 200, 40),
    (200, 70, 200),
    (50, 200, 210),
]
data_root = 'data/shapes/ade'
crop_size = (128, 128)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=8, num_workers=1, dataset=dict(data_root=data_root, pipeline=train_pipeline)
)
val_dataloader = dict(num_workers=1, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader

# From scratch, every block has to contribute from the start, and BatchNorm has to learn.
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(init_cfg=None, norm_eval=False, layer_scale_init_value=1.0),
)
max_iters = 1200
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=60, by_epoch=False),
    dict(type='PolyLR', power=0.9, begin=60, end=max_iters, eta_min=1e-6, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=300)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=300))
