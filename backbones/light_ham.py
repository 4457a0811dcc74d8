"""SegNeXt's light head, with the same results at every call and in every backend.

It approximates a feature map by the product of two non-negative matrices of low rank (Geng et al.,
"Is Attention Better Than Matrix Decomposition?", ICLR 2021), in a few steps from given bases. mmseg
draws new bases for every image, at inference too. With its ``rand_init=False`` the first call draws
them, even after a checkpoint was loaded, so that every process has other bases.

Configs import this module with ``custom_imports``, since it needs mmseg and ``backbones`` does not.
"""

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from mmseg.models.decode_heads.ham_head import NMF2D, LightHamHead
from torch import Tensor


class FixedNMF2D(NMF2D):
    """mmseg's matrix decomposition in float32, from bases that are part of the model."""

    def __init__(self, channels: int, options: dict) -> None:
        super().__init__(dict(rand_init=False, **options))
        generator = torch.Generator().manual_seed(0)
        bases = torch.rand(self.S, channels // self.S, self.R, generator=generator)
        self.register_buffer('bases', F.normalize(bases, dim=1))

    def forward(self, x: Tensor, return_bases: bool = False) -> Tensor:
        # Sums over all pixels and their quotients exceed float16's range.
        with torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False):
            # Unlike mmseg's view(), reshape() accepts channels last for any MD_S.
            batch, channels = x.shape[:2]
            values = x.float().reshape(batch * self.S, channels // self.S, -1)
            bases, coef = self.local_inference(values, self.bases.repeat(batch, 1, 1))
            coef = self.compute_coef(values, bases, coef)
            return torch.bmm(bases, coef.transpose(1, 2)).reshape(x.shape)


@MODELS.register_module()
class FixedLightHamHead(LightHamHead):
    """mmseg's LightHamHead with fixed bases, which are saved in its checkpoints."""

    def __init__(self, ham_channels: int = 512, ham_kwargs: dict | None = None, **kwargs) -> None:
        super().__init__(ham_channels, **kwargs)
        self.hamburger.ham = FixedNMF2D(ham_channels, ham_kwargs or {})
