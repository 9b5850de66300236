"""ResNets for CIFAR as most repositories write them, and pre-activation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.styles.style import CLASSES, SmallResNet, Style, conv1x1, conv3x3, conv_norm, conv_norm_relu


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_planes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(conv1x1(in_planes, planes, stride), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        out_planes = self.expansion * planes
        self.conv1 = conv1x1(in_planes, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, out_planes)
        self.bn3 = nn.BatchNorm2d(out_planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != out_planes:
            self.shortcut = nn.Sequential(conv1x1(in_planes, out_planes, stride), nn.BatchNorm2d(out_planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


class PreActBlock(nn.Module):
    """Pre-activation: norm and ReLU before each convolution, and no shortcut attribute where the shape is kept.

    He et al., Identity mappings in deep residual networks, 2016.
    """

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = conv3x3(in_planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(conv1x1(in_planes, planes, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class LambdaLayer(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class OptionABlock(BasicBlock):
    """The shortcut has no parameters: it drops every second pixel and appends channels of zeros."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__(in_planes, planes, stride)
        if stride != 1 or in_planes != planes:
            half = (planes - in_planes) // 2
            self.shortcut = LambdaLayer(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half)))  # type: ignore[assignment]


class ResNet(nn.Module):
    """A stem with `F.relu`, stages of blocks, and average pooling over all pixels.

    Args:
        block: class of the blocks.
        width: channels of the stem.
        planes: planes of each stage.
        depth: blocks of each stage.
    """

    def __init__(self, block: Any, width: int, planes: tuple[int, ...], depth: int = 2) -> None:
        super().__init__()
        self.in_planes = width
        self.conv1 = conv3x3(3, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layers = nn.Sequential(
            *(self._make_layer(block, size, depth, 1 if index == 0 else 2) for index, size in enumerate(planes))
        )
        self.linear = nn.Linear(self.in_planes, CLASSES)

    def _make_layer(self, block: Any, planes: int, depth: int, stride: int) -> nn.Sequential:
        layers = []
        for one in [stride] + [1] * (depth - 1):
            layers.append(block(self.in_planes, planes, one))
            self.in_planes = planes * block.expansion
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layers(out)
        out = F.avg_pool2d(out, out.size()[3])
        out = out.view(out.size(0), -1)
        return self.linear(out)


def resnet20(width: int = 16) -> ResNet:
    """Return ResNet-20 for CIFAR-10, with projections. He et al., Deep residual learning, 2015, section 4.2."""
    return ResNet(BasicBlock, width, (width, 2 * width, 4 * width), depth=3)


class WideBlock(nn.Module):
    """A pre-activation block with dropout. Zagoruyko and Komodakis, Wide residual networks, 2016."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv3x3(in_planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.droprate = 0.3
        self.equalInOut = in_planes == planes
        self.convShortcut = (not self.equalInOut and conv1x1(in_planes, planes, stride)) or None

    def forward(self, x: Tensor) -> Tensor:
        if not self.equalInOut:
            x = self.relu1(self.bn1(x))
        else:
            out = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(out if self.equalInOut else x)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, training=self.training)
        out = self.conv2(out)
        return torch.add(x if self.convShortcut is None else self.convShortcut(x), out)


class WideResNet(nn.Module):
    """The norm and ReLU after the last block belong to the network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, width)
        self.block1 = nn.Sequential(WideBlock(width, 2 * width, 1), WideBlock(2 * width, 2 * width, 1))
        self.block2 = nn.Sequential(WideBlock(2 * width, 4 * width, 2), WideBlock(4 * width, 4 * width, 1))
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block2(self.block1(self.conv1(x)))
        out = self.relu(self.bn1(out))
        return self.fc(out.mean((2, 3)))


class ReluMadeInForward(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.residual_function = nn.Sequential(
            conv3x3(in_channels, out_channels, stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            conv3x3(out_channels, out_channels),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return nn.ReLU(inplace=True)(self.residual_function(x) + self.shortcut(x))


class ResNet9(nn.Module):
    """Convolution, norm, ReLU and pooling in Sequentials; residual branches are added without a ReLU after them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = conv_norm_relu(3, width)
        self.conv2 = conv_norm_relu(width, 2 * width).append(nn.MaxPool2d(2))
        self.res1 = nn.Sequential(conv_norm_relu(2 * width, 2 * width), conv_norm_relu(2 * width, 2 * width))
        self.conv3 = conv_norm_relu(2 * width, 4 * width).append(nn.MaxPool2d(2))
        self.res2 = nn.Sequential(conv_norm_relu(4 * width, 4 * width), conv_norm_relu(4 * width, 4 * width))
        self.classifier = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4 * width, CLASSES))

    def forward(self, xb: Tensor) -> Tensor:
        out = self.conv1(xb)
        out = self.conv2(out)
        out = self.res1(out) + out
        out = self.conv3(out)
        out = self.res2(out) + out
        return self.classifier(out)


class ConvPath(nn.Module):
    """fastai's ResBlock: both paths are Sequentials; a strided identity path averages pixels, then projects."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.convpath = nn.Sequential(
            conv_norm_relu(in_channels, out_channels, stride=stride), conv_norm(out_channels, out_channels)
        )
        idpath: list[nn.Module] = []
        if in_channels != out_channels:
            idpath.append(conv_norm(in_channels, out_channels, 1))
        if stride != 1:
            idpath.insert(0, nn.AvgPool2d(2, ceil_mode=True))
        self.idpath = nn.Sequential(*idpath)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.convpath(x) + self.idpath(x))


STYLES = (
    Style(
        "cifar-basic",
        lambda width: ResNet(BasicBlock, width, (width, 2 * width)),
        "F.relu; out += self.shortcut(x), an empty Sequential as identity",
        twin="torchvision-basic-3x3",
    ),
    Style(
        "cifar-bottleneck",
        lambda width: ResNet(Bottleneck, width, (width // 2, width)),
        "the same with bottlenecks",
        twin="torchvision-bottleneck-3x3",
    ),
    Style(
        "cifar-option-a",
        lambda width: ResNet(OptionABlock, width, (width, 2 * width)),
        "the shortcut is a lambda that slices and pads",
    ),
    Style(
        "pre-activation",
        lambda width: ResNet(PreActBlock, width, (width, 2 * width)),
        "F.relu(bn(x)) before each convolution, hasattr(self, 'shortcut')",
    ),
    Style("wide-resnet", WideResNet, "pre-activation, dropout in the block, torch.add, norm and ReLU at the end"),
    Style(
        "relu-made-in-forward",
        lambda width: SmallResNet(ReluMadeInForward, width),
        "nn.ReLU(inplace=True)(self.residual_function(x) + self.shortcut(x))",
        twin="torchvision-basic-3x3",
    ),
    Style("resnet-9", ResNet9, "res(out) + out between Sequentials with max pooling"),
    Style("fastai", lambda width: SmallResNet(ConvPath, width), "act(convpath(x) + idpath(x))"),
)
