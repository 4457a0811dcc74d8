# Semantic FPN on ADE20K: the authors' recipe, 40k iterations of 32 crops (8 GPUs with 4 each).
_base_ = ['./semantic_fpn.py', './ade20k.py', './schedule_40k.py', './default_runtime.py']
custom_imports = dict(imports=['backbones'], allow_failed_imports=False)
