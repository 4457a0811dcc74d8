"""A backbone as one function that can be traced."""

from torch import Tensor, nn

from .preprocessing import Preprocessing


class ExportableBackbone(nn.Module):
    """Normalisation, padding and the backbone alone: from pixels to feature maps."""

    def __init__(self, model: nn.Module, pad_divisor: int) -> None:
        super().__init__()
        self.preprocessing = Preprocessing(model.data_preprocessor, pad_divisor)
        self.backbone = model.backbone

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        return self.backbone(self.preprocessing(pictures))
