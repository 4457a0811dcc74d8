_base_ = './_base_/mask_rcnn_effv2.py'

model = dict(
    backbone=dict(
        arch='l',
        init_cfg=dict(checkpoint='timm://efficientformerv2_l.snap_dist_in1k'),
    ),
    neck=dict(in_channels=[40, 80, 192, 384]),
)
