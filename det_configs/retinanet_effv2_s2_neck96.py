# RetinaNet with 96 channels in neck and head instead of 256.
_base_ = './retinanet_effv2_s2.py'

model = dict(neck=dict(out_channels=96), bbox_head=dict(in_channels=96, feat_channels=96))
