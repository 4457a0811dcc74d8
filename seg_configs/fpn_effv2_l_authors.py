# For the authors' own ADE20K checkpoint: bias tables for 512x512, resized in the authors' way, and
# test images stretched to a multiple of 32, which their network needs.
_base_ = './fpn_effv2_l.py'

model = dict(backbone=dict(pretrain_img_size=512, bias_resize='matrix'))
test_pipeline = list(_base_.test_pipeline)
test_pipeline.insert(2, dict(type='ResizeToMultiple', size_divisor=32))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
