# The light head on ADE20K: SegNeXt's recipe, 160k iterations of 16 crops (8 GPUs with 2 each). The
# learning rate falls linearly to 0, and that of the head is ten times that of the backbone.
_base_ = ['./light_ham.py', './ade20k.py', './default_runtime.py']
custom_imports = dict(imports=['backbones', 'backbones.light_ham'], allow_failed_imports=False)

train_dataloader = dict(batch_size=2)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, weight_decay=0.01),
    # Not 'head' as in SegNeXt, which would match the backbone's talking heads too.
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys=dict(decode_head=dict(lr_mult=10.0))),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=1500, by_epoch=False),
    dict(type='PolyLR', power=1.0, begin=1500, end=160000, eta_min=0.0, by_epoch=False),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
auto_scale_lr = dict(enable=False, base_batch_size=16)
default_hooks = dict(checkpoint=dict(interval=16000))
