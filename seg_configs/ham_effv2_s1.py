_base_ = './_base_/ham_effv2.py'

model = dict(
    backbone=dict(
        arch='s1',
        init_cfg=dict(checkpoint='timm://efficientformerv2_s1.snap_dist_in1k'),
    ),
    decode_head=dict(in_channels=[48, 120, 224]),
)
