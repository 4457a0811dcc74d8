# Semantic FPN with 128 channels in the neck instead of 256.
_base_ = './fpn_effv2_s0.py'

model = dict(neck=dict(out_channels=128), decode_head=dict(in_channels=[128] * 4, channels=64))
