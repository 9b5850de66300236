"""torchvision's spelling in one's own file: the twins of the other styles, and networks derived from it."""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.styles.style import CLASSES, Style, conv1x1, conv3x3


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride, groups)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes, groups=groups)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = conv1x1(inplanes, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride, groups)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)
        out = self.conv3(out)
        out = self.bn3(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class ResNet(nn.Module):
    """Two stages of two blocks.

    Args:
        block: class of the blocks.
        width: channels of the stem; a bottleneck's inner convolutions have half as many in the first stage.
        stem: kernel size of the first convolution; 3 also replaces the max pool by an identity, as people do for small
            images.
        groups: groups of the 3x3 convolutions.
    """

    def __init__(self, block: Any, width: int, stem: int = 7, groups: int = 1) -> None:
        super().__init__()
        self.inplanes = width
        planes = width if block.expansion == 1 else width // 2
        self.conv1 = nn.Conv2d(3, width, stem, 2 if stem == 7 else 1, stem // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == 7 else nn.Identity()
        self.layer1 = self._make_layer(block, planes, 1, groups)
        self.layer2 = self._make_layer(block, 2 * planes, 2, groups)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, CLASSES)

    def _make_layer(self, block: Any, planes: int, stride: int, groups: int) -> nn.Sequential:
        downsample = None
        if stride != 1 or self.inplanes != planes * block.expansion:
            downsample = nn.Sequential(
                conv1x1(self.inplanes, planes * block.expansion, stride), nn.BatchNorm2d(planes * block.expansion)
            )
        layers = [block(self.inplanes, planes, stride, downsample, groups)]
        self.inplanes = planes * block.expansion
        layers.append(block(self.inplanes, planes, groups=groups))
        return nn.Sequential(*layers)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


class QuantizableBasicBlock(BasicBlock):
    """Written for quantization, used in float: the addition is a module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_relu = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        return self.add_relu.add_relu(out, identity)


class QuantizableBottleneck(Bottleneck):
    """Adds with `FloatFunctional.add`; the ReLU is a module of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skip_add = torch.ao.nn.quantized.FloatFunctional()
        self.relu1 = nn.ReLU(inplace=False)
        self.relu2 = nn.ReLU(inplace=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        return self.relu(self.skip_add.add(out, identity))


class TimmBasicBlock(BasicBlock):
    """Optional layers that are None or an identity."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop_block = nn.Identity()
        self.act1 = nn.ReLU(inplace=True)
        self.aa = nn.Identity()
        self.se: nn.Module | None = None
        self.act2 = nn.ReLU(inplace=True)
        self.drop_path: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.aa(x)
        x = self.conv2(x)
        x = self.bn2(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        x = self.act2(x)
        return x


STYLES = (
    Style("torchvision-basic", lambda width: ResNet(BasicBlock, width), "a copy: one ReLU used twice, out += identity"),
    Style("torchvision-bottleneck", lambda width: ResNet(Bottleneck, width), "a copy: one ReLU used three times"),
    Style(
        "torchvision-basic-3x3", lambda width: ResNet(BasicBlock, width, stem=3), "an identity replaces the max pool"
    ),
    Style("torchvision-bottleneck-3x3", lambda width: ResNet(Bottleneck, width, stem=3), "the same with bottlenecks"),
    Style("torchvision-resnext", lambda width: ResNet(Bottleneck, width, groups=4), "grouped convolutions"),
    Style(
        "quantizable-basic",
        lambda width: ResNet(QuantizableBasicBlock, width),
        "FloatFunctional.add_relu",
        twin="torchvision-basic",
    ),
    Style(
        "quantizable-bottleneck",
        lambda width: ResNet(QuantizableBottleneck, width),
        "FloatFunctional.add, then a ReLU module",
        twin="torchvision-bottleneck",
    ),
    Style(
        "timm-basic",
        lambda width: ResNet(TimmBasicBlock, width),
        "optional layers that are None or an identity",
        twin="torchvision-basic",
    ),
)
