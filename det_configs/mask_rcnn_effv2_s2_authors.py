# For the authors' own COCO checkpoint: bias tables of 800x800, resized as they resize them.
_base_ = './mask_rcnn_effv2_s2.py'

model = dict(backbone=dict(pretrain_img_size=800, bias_resize='matrix'))
