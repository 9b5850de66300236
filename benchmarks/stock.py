"""The baseline models: torchvision's, or without torchvision those of fused_res, unfused into their stock layers."""

from types import ModuleType

from torch import nn

from fused_res import models, unfuse
from fused_res.testing import stub_torchvision_operators

stub_torchvision_operators()
torchvision_models: ModuleType | None
try:
    from torchvision import models as torchvision_models
except ImportError:
    torchvision_models = None

MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2")


def stock_model(name: str) -> nn.Module:
    """Return a newly initialized model, with weights from PyTorch's global generator."""
    if torchvision_models is None:
        return unfuse(getattr(models, name)())
    return getattr(torchvision_models, name)()
