# Mask R-CNN on COCO: mmdet's model and 1x schedule, with the authors' optimizer.
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['backbones'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='EfficientFormerV2',
        norm_eval=True,
        init_cfg=dict(type='Pretrained'),
    ),
)
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, weight_decay=0.05))
# Transforms from `_base_` carry their library's scope, so that a segmentor in the same process does
# not change where they are looked up.
val_dataloader = dict(dataset=dict(pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='coco/segm_mAP', rule='greater'))
