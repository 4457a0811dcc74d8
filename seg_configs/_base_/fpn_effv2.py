# Semantic FPN on ADE20K: the authors' recipe, 40k iterations of 32 crops (8 GPUs with 4 each). The
# learning rate falls with power 0.9 to 1e-6.
_base_ = ['./semantic_fpn.py', './ade20k.py', './default_runtime.py']
custom_imports = dict(imports=['backbones'], allow_failed_imports=False)

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-4, weight_decay=1e-4),
)
param_scheduler = [
    dict(type='PolyLR', power=0.9, begin=0, end=40000, eta_min=1e-6, by_epoch=False),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=40000, val_interval=4000)
auto_scale_lr = dict(enable=False, base_batch_size=32)
