# The light head on ADE20K: SegNeXt's recipe, 160k iterations of 16 crops (8 GPUs with 2 each).
_base_ = ['./light_ham.py', './ade20k.py', './schedule_160k.py', './default_runtime.py']
custom_imports = dict(imports=['backbones', 'backbones.light_ham'], allow_failed_imports=False)

train_dataloader = dict(batch_size=2)
default_hooks = dict(checkpoint=dict(interval=16000))
