# Segmentation on a dataset of tens to a few thousand images: data, augmentation and schedule.
_base_ = './default_runtime.py'
custom_imports = dict(imports=['backbones'], allow_failed_imports=False)

# The rest depends on these settings; set them by name in an inheriting config or --cfg-options.
settings = [
    *['data_root', 'arch', 'pretrained', 'image_size', 'batch_size', 'epochs', 'learning_rate'],
    *['patience', 'num_workers', 'img_suffix', 'test_split'],
]
# It has classes.txt, images/{training,validation}, and annotations/{training,validation} with PNGs,
# in which 0 means unlabeled and k + 1 means class k.
data_root = 'data/mine/'
arch = 's0'  # s0, s1, s2 or l
pretrained = True  # start from ImageNet weights; False: train from scratch
image_size = 512  # shorter side, in pixels; training uses crops of this size
batch_size = 4  # per GPU; larger batches give too few steps on a small dataset
epochs = 120
learning_rate = 3e-4 if pretrained else 1.5e-3
patience = 12  # end after so many validations, of about 20, without a better result
num_workers = 2
img_suffix = '.jpg'
test_split = 'validation'  # test.py reads images/{test_split}

classes = data_root + '/classes.txt'
interval = max(epochs // 20, 1)
crop_size = (image_size, image_size)
scale = (4 * image_size, image_size)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=scale, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    # After Resize: predictions are compared at the original size.
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
# With a scope, so that a detector in the same process does not change where types are looked up.
test_pipeline = [dict(transform, _scope_='mmseg') for transform in test_pipeline]
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=num_workers,
    persistent_workers=num_workers > 0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='ADE20KDataset',
        data_root=data_root,
        img_suffix=img_suffix,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=num_workers,
    persistent_workers=num_workers > 0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='ADE20KDataset',
        data_root=data_root,
        img_suffix=img_suffix,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    val_dataloader,
    dataset=dict(
        val_dataloader['dataset'],
        data_prefix=dict(img_path=f'images/{test_split}', seg_map_path=f'annotations/{test_split}'),
    ),
)
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=learning_rate, weight_decay=0.05),
)
warmup = max(epochs // 20, 1)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, end=warmup, convert_to_iter_based=True),
    dict(
        type='PolyLR',
        power=0.9,
        begin=warmup,
        end=max(epochs, warmup + 1),
        eta_min=1e-6,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=interval)
auto_scale_lr = dict(enable=False, base_batch_size=batch_size)

default_hooks = dict(
    logger=dict(interval=20, log_metric_by_epoch=True),
    checkpoint=dict(by_epoch=True, interval=interval, max_keep_ckpts=2),
)
custom_hooks = [dict(type='EarlyStoppingHook', monitor='mIoU', min_delta=0.1, patience=patience)]
log_processor = dict(by_epoch=True)
