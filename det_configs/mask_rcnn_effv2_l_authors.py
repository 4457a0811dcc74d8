# For the authors' own COCO checkpoint: bias tables for 800x800, resized in the authors' way.
_base_ = './mask_rcnn_effv2_l.py'

model = dict(backbone=dict(pretrain_img_size=800, bias_resize='matrix'))
