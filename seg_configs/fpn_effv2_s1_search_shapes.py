# The demo of the search: a supernet from scratch on the dataset that tools/make_shapes.py draws.
_base_ = './fpn_effv2_s0_shapes.py'

search = dict()
# A neck of 128 channels, since two CPU cores have time for no more.
model = dict(
    backbone=dict(arch='s1'),
    neck=dict(in_channels=[32, 48, 120, 224], out_channels=128),
    decode_head=dict(in_channels=[128] * 4, channels=64),
)
