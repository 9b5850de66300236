"""The stock models that everything is compared with: torchvision's, or without it the same networks of ours,
switched to the layers they are made of."""

from torch import nn

from fused_res import models, unfuse
from fused_res.testing import stub_torchvision_operators

MODELS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "wide_resnet50_2",
)


def stock_model(name: str) -> nn.Module:
    """A fresh model with random weights, from PyTorch's global generator."""
    stub_torchvision_operators()
    try:
        import torchvision.models
    except ImportError:
        model: nn.Module = getattr(models, name)()
        unfuse(model)
        return model
    return getattr(torchvision.models, name)()
