# The demo of the search: a supernet from scratch on the dataset that tools/make_shapes.py draws.
_base_ = './fpn_effv2_s0_shapes.py'

# Fewer images, a neck of 128 channels and fewer iterations save time on two CPU cores.
search = dict(calibration_images=32)
model = dict(
    backbone=dict(arch='s1'),
    neck=dict(in_channels=[32, 48, 120, 224], out_channels=128),
    decode_head=dict(in_channels=[128] * 4, channels=64),
)
max_iters = 320
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=60, by_epoch=False),
    dict(type='PolyLR', power=0.9, begin=60, end=max_iters, eta_min=1e-6, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(checkpoint=dict(interval=160))
