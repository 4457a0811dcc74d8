_base_ = './_base_/mask_rcnn_effv2.py'

model = dict(
    backbone=dict(
        arch='s0',
        init_cfg=dict(checkpoint='timm://efficientformerv2_s0.snap_dist_in1k'),
    ),
    neck=dict(in_channels=[32, 48, 96, 176]),
)
