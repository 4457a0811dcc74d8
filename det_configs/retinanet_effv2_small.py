# RetinaNet on your own small dataset; _base_/small_data.py lists the settings.
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', './_base_/small_data.py']

channels = dict(
    s0=[32, 48, 96, 176], s1=[32, 48, 120, 224], s2=[32, 64, 144, 288], l=[40, 80, 192, 384]
)
checkpoint = f'timm://efficientformerv2_{_base_.arch}.snap_dist_in1k'
model = dict(
    backbone=dict(
        _delete_=True,
        type='EfficientFormerV2',
        arch=_base_.arch,
        norm_eval=_base_.pretrained,  # from scratch, BatchNorm has to learn
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint) if _base_.pretrained else None,
    ),
    neck=dict(
        in_channels=channels.get(_base_.arch),
        out_channels=128,
        norm_cfg=None if _base_.pretrained else dict(type='BN', requires_grad=True),
    ),
    bbox_head=dict(in_channels=128, feat_channels=128),
)
