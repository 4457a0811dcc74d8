# Mask R-CNN on your own small dataset; _base_/small_data.py lists the settings.
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', './_base_/small_data.py']

with_mask = True
model = dict(
    backbone=dict(_delete_=True, **_base_.backbone),
    neck=dict(in_channels=_base_.channels, norm_cfg=_base_.neck_norm),
    # Number of regions per image in training: a quarter of COCO's, since few images have hundreds
    # of objects, and a CPU spends most of its time on the regions.
    train_cfg=dict(rcnn=dict(sampler=dict(num=128))),
)
