"""Residual networks built from :mod:`fused_res.nn` blocks: images ``(N, 3, H, W)`` to logits ``(N, num_classes)``."""

from fused_res.models.cifar import CifarResNet, cifar_resnet
from fused_res.models.resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    wide_resnet50_2,
)

__all__ = [
    "CifarResNet",
    "ResNet",
    "cifar_resnet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "wide_resnet50_2",
]
