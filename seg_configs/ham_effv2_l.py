_base_ = './_base_/ham_effv2.py'

model = dict(
    backbone=dict(
        arch='l',
        init_cfg=dict(checkpoint='timm://efficientformerv2_l.snap_dist_in1k'),
    ),
    # As wide as in the SegNeXt of this size.
    decode_head=dict(
        in_channels=[80, 192, 384],
        channels=512,
        ham_channels=512,
        ham_kwargs=dict(MD_R=64),
    ),
)
