_base_ = './_base_/ham_effv2.py'

model = dict(
    backbone=dict(
        arch='s0',
        init_cfg=dict(checkpoint='timm://efficientformerv2_s0.snap_dist_in1k'),
    ),
    decode_head=dict(in_channels=[48, 96, 176]),
)
