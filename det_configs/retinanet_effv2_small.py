# RetinaNet on your own small dataset; _base_/small_data.py lists the settings.
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', './_base_/small_data.py']

model = dict(
    backbone=dict(_delete_=True, **_base_.backbone),
    neck=dict(in_channels=_base_.channels, out_channels=128, norm_cfg=_base_.neck_norm),
    bbox_head=dict(in_channels=128, feat_channels=128),
)
