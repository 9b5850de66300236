"""The one list of adapters."""

from __future__ import annotations

from torch import nn

from fused_res.fusion import sequential, timm_resnet, torchvision_resnet
from fused_res.fusion.adapter import Adapter

ADAPTERS: tuple[type[Adapter], ...] = (
    sequential.Sequential,
    torchvision_resnet.BasicBlock,
    torchvision_resnet.Bottleneck,
    torchvision_resnet.ResNet,
    timm_resnet.BasicBlock,
    timm_resnet.Bottleneck,
    timm_resnet.ResNet,
)


def adapter_for(cls: type[nn.Module]) -> type[Adapter] | None:
    """The adapter that knows exactly what this class does."""
    return next((adapter for adapter in ADAPTERS if adapter.knows(cls)), None)
