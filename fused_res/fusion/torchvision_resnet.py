"""torchvision's ResNet, ResNeXt and Wide ResNet: blocks and stem."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_res.fusion.adapter import BlockAdapter, Fused, Parts, StemAdapter, shortcut_of
from fused_res.nn.chain import Unit, Unsupported


class BasicBlock(BlockAdapter):
    home = "torchvision.models.resnet"
    name = "BasicBlock"
    reads = (("forward", "conv1 bn1 relu conv2 bn2 downsample"),)

    @classmethod
    def parts(cls, module: Any) -> Parts | Unsupported:
        get = module._modules.get
        relu = get("relu")
        units = (get("conv1"), get("bn1"), relu), (get("conv2"), get("bn2"), relu)
        return Parts(units, shortcut_of(module))


class Bottleneck(BlockAdapter):
    home = "torchvision.models.resnet"
    name = "Bottleneck"
    reads = (("forward", "conv1 bn1 relu conv2 bn2 conv3 bn3 downsample"),)

    @classmethod
    def parts(cls, module: Any) -> Parts | Unsupported:
        get = module._modules.get
        relu = get("relu")
        first, second = (get("conv1"), get("bn1"), relu), (get("conv2"), get("bn2"), relu)
        return Parts((first, second, (get("conv3"), get("bn3"), relu)), shortcut_of(module))


class FusedResNet(Fused):
    def _forward_impl(self: Any, x: Tensor) -> Tensor:
        stem = ResNet.run(x, self, self.maxpool)
        if stem is None:
            return super()._forward_impl(x)  # type: ignore[misc]
        x = self.layer4(self.layer3(self.layer2(self.layer1(stem))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class ResNet(StemAdapter):
    home = "torchvision.models.resnet"
    name = "ResNet"
    reads = (
        ("forward", "_forward_impl"),
        ("_forward_impl", "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool torch flatten fc"),
    )
    front = FusedResNet
    children = ("conv1", "bn1", "relu")

    @classmethod
    def units(cls, module: Any) -> tuple[Unit, ...] | Unsupported:
        get = module._modules.get
        return ((get("conv1"), get("bn1"), get("relu")),)
