"""The backbone takes images of any size, in any batch and precision, folded or not."""

from functools import cache

import torch
from fuzzing import inputs
from hypothesis import given
from hypothesis import strategies as st
from tiny import TINY_ARCH

from backbones import EfficientFormerV2

ARCHS = {
    'tiny': TINY_ARCH,
    'attends everywhere': dict(TINY_ARCH, depths=(1, 2, 1, 1), num_attention_blocks=1,
                               mlp_ratios=((1,), (2, 3), (2,), (3,)), drop_path_rate=0.3),
    'no attention': dict(TINY_ARCH, channels=(6, 4, 10, 4), num_attention_blocks=0),
    's0': 's0',
}  # fmt: skip
# Half precision's own rounding, through all layers; the others are compared as users are promised.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.1}
STRIDES = (4, 8, 16, 32)

sides = st.integers(1, 70)
settings_of_a_backbone = st.fixed_dictionaries(
    {
        # The family's smallest takes as long as the others together.
        'arch': st.sampled_from([*3 * ['tiny', 'attends everywhere', 'no attention'], 's0']),
        'out_indices': st.sets(st.integers(0, 3), min_size=1).map(sorted).map(tuple),
        'bias_resize': st.sampled_from(['offset', 'matrix']),
        'norm_eval': st.booleans(),
        'with_cp': st.booleans(),
    }
)


@cache
def state_of(arch: str) -> dict[str, torch.Tensor]:
    """Weights, and running statistics that differ from what they start with."""
    torch.manual_seed(0)
    backbone = EfficientFormerV2(ARCHS[arch], layer_scale_init_value=0.5)
    backbone.train()
    with torch.no_grad():
        for _ in range(3):
            backbone(torch.rand(4, 3, 64, 64))
    return backbone.state_dict()


def build(arch: str, out_indices: tuple[int, ...], **options: object) -> EfficientFormerV2:
    backbone = EfficientFormerV2(ARCHS[arch], out_indices=out_indices, **options)
    built = backbone.state_dict()
    backbone.load_state_dict({key: state_of(arch)[key] for key in built})
    return backbone


def check_features(features: tuple[torch.Tensor, ...], images: torch.Tensor, options: dict):
    channels = state_channels(options['arch'])
    assert len(features) == len(options['out_indices'])
    for stage, feature in zip(options['out_indices'], features, strict=True):
        sides = (-(-side // STRIDES[stage]) for side in images.shape[2:])
        assert feature.shape == (len(images), channels[stage], *sides)
        assert feature.dtype == images.dtype
        assert feature.isfinite().all()


def state_channels(arch: str) -> tuple[int, ...]:
    return (32, 48, 96, 176) if arch == 's0' else ARCHS[arch]['channels']


def drawn_images(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash(shape) % 2**31)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


@inputs(30, 800)
@given(
    options=settings_of_a_backbone,
    batch=st.integers(1, 3),
    height=sides,
    width=sides,
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
    scale=st.sampled_from([0.0, 1.0, 50.0]),
    order=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_evaluation_and_deployment(options, batch, height, width, dtype, scale, order):
    if dtype is torch.bfloat16:
        # torch's own convolutions of images a pixel or two wide now and then read memory that
        # nothing was written to.
        height, width = height + 15, width + 15
    images = drawn_images((batch, 3, height, width), dtype, scale)
    backbone = build(**options).to(dtype).eval()
    with torch.no_grad():
        plain = backbone(images.contiguous(memory_format=order))
        check_features(plain, images, options)
        backbone.switch_to_deploy()
        deployed = backbone(images)
    check_features(deployed, images, options)
    for one, other in zip(plain, deployed, strict=True):
        largest = one.abs().max().clamp(min=1e-6)
        assert ((one - other).abs().max() / largest).item() < TOLERANCE[dtype]


@inputs(20, 500)
@given(
    options=settings_of_a_backbone,
    batch=st.integers(1, 3),
    height=sides,
    width=sides,
    dtype=st.sampled_from([torch.float32, torch.float64]),
    frozen_stages=st.integers(-1, 4),
)
def test_training(options, batch, height, width, dtype, frozen_stages):
    torch.manual_seed(0)  # of the paths that are dropped
    backbone = build(**options, frozen_stages=frozen_stages).to(dtype).train()
    if batch * -(-height // 32) * -(-width // 32) == 1 and not options['norm_eval']:
        batch = 2  # PyTorch's BatchNorm asks for two values, and divides by what they differ.
    images = drawn_images((batch, 3, height, width), dtype, 1.0)
    features = backbone(images)
    check_features(features, images, options)
    loss = sum(feature.square().mean() for feature in features)
    if not loss.requires_grad:
        assert frozen_stages >= max(options['out_indices']) + 1
        return
    loss.backward()
    gradients = [p.grad for p in backbone.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
