# The light head of SegNeXt (Guo et al., "SegNeXt: Rethinking Convolutional Attention Design for
# Semantic Segmentation") on the last three stages of EfficientFormerV2. BatchNorm replaces its
# GroupNorm, since it costs nothing at inference.
_base_ = './segmentor.py'

model = dict(
    decode_head=dict(
        type='FixedLightHamHead',
        in_index=[1, 2, 3],
        channels=256,
        ham_channels=256,
        ham_kwargs=dict(MD_R=16),
    ),
)
