_base_ = './_base_/fpn_effv2.py'

model = dict(
    backbone=dict(
        arch='s1',
        init_cfg=dict(checkpoint='timm://efficientformerv2_s1.snap_dist_in1k'),
    ),
    neck=dict(in_channels=[32, 48, 120, 224]),
)
