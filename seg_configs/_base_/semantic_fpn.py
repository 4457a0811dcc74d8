# Semantic FPN (Kirillov et al., "Panoptic Feature Pyramid Networks") on EfficientFormerV2.
_base_ = './segmentor.py'

model = dict(
    neck=dict(type='FPN', out_channels=256, num_outs=4),
    decode_head=dict(
        type='FPNHead',
        in_channels=[256, 256, 256, 256],
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=128,
    ),
)
