# Semantic FPN with 96 channels in the neck instead of 256.
_base_ = './fpn_effv2_s2.py'

model = dict(neck=dict(out_channels=96), decode_head=dict(in_channels=[96] * 4, channels=48))
