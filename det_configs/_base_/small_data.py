# Detection on a dataset of tens to a few thousand images: data, augmentation and schedule.
_base_ = 'mmdet::_base_/default_runtime.py'
custom_imports = dict(imports=['backbones'], allow_failed_imports=False)

# The rest depends on these settings; set them by name in an inheriting config or --cfg-options.
settings = [
    *['data_root', 'arch', 'pretrained', 'image_size', 'batch_size', 'epochs', 'learning_rate'],
    *['patience', 'num_workers', 'with_mask', 'test_split'],
]
data_root = 'data/mine/'  # with annotations/instances_{train,val}.json, train/ and val/
arch = 's0'  # s0, s1, s2 or l
pretrained = True  # start from ImageNet weights; False: train from scratch
image_size = 640  # longer side, in pixels
batch_size = 4  # per GPU; larger batches give too few steps on a small dataset
epochs = 60
learning_rate = 3e-4 if pretrained else 1e-3
patience = 12  # end after so many validations, of about 20, without a better result
num_workers = 2
with_mask = False
test_split = 'val'  # test.py reads annotations/instances_{test_split}.json

channels = dict(
    s0=[32, 48, 96, 176], s1=[32, 48, 120, 224], s2=[32, 64, 144, 288], l=[40, 80, 192, 384]
).get(arch)
checkpoint = f'timm://efficientformerv2_{arch}.snap_dist_in1k'
backbone = dict(
    type='EfficientFormerV2',
    arch=arch,
    norm_eval=pretrained,  # from scratch, BatchNorm has to learn
    init_cfg=dict(type='Pretrained', checkpoint=checkpoint) if pretrained else None,
)
neck_norm = None if pretrained else dict(type='BN', requires_grad=True)
interval = max(epochs // 20, 1)
metric = 'coco/segm_mAP' if with_mask else 'coco/bbox_mAP'
scale = (image_size, image_size)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=with_mask),
    dict(type='RandomResize', scale=scale, ratio_range=(0.6, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=scale, allow_negative_crop=True, recompute_bbox=with_mask),
    # If only a corner of an object is inside, its box may have no area left.
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1), keep_empty=False),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion', swap_channels=False),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    # After Resize: predictions are compared at the original size.
    dict(type='LoadAnnotations', with_bbox=True, with_mask=with_mask),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
# With a scope, so that a segmentor in the same process does not change where types are looked up.
test_pipeline = [dict(transform, _scope_='mmdet') for transform in test_pipeline]
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=num_workers,
    persistent_workers=num_workers > 0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    batch_sampler=dict(type='AspectRatioBatchSampler'),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        # Images without objects teach the background.
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=num_workers,
    persistent_workers=num_workers > 0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    val_dataloader,
    dataset=dict(
        val_dataloader['dataset'],
        ann_file=f'annotations/instances_{test_split}.json',
        data_prefix=dict(img=f'{test_split}/'),
    ),
)
val_evaluator = dict(
    type='CocoMetric',
    ann_file=data_root + '/annotations/instances_val.json',
    metric=['bbox', 'segm'] if with_mask else 'bbox',
)
test_evaluator = dict(
    val_evaluator, ann_file=data_root + f'/annotations/instances_{test_split}.json'
)

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=learning_rate, weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0,
        bias_decay_mult=0,
        custom_keys=dict(layer_scale=dict(decay_mult=0), table=dict(decay_mult=0)),
    ),
    clip_grad=dict(max_norm=5),
)
warmup = max(epochs // 20, 1)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, end=warmup, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        begin=warmup,
        end=max(epochs, warmup + 1),
        eta_min=learning_rate / 100,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=interval)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(enable=False, base_batch_size=batch_size)

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=interval, max_keep_ckpts=2, save_best=metric, rule='greater'),
)
custom_hooks = [dict(type='EarlyStoppingHook', monitor=metric, min_delta=0.001, patience=patience)]
