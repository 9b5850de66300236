"""pycls, CLIP and RegNet: loops over children, average pools as strides, named Sequentials; norms with a ReLU."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.styles.style import CLASSES, SmallResNet, Style, conv1x1, conv3x3, conv_norm, global_pool


class BasicTransform(nn.Module):
    """pycls: the layers run in the order in which they were assigned."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.a = conv3x3(in_channels, out_channels, stride)
        self.a_bn = nn.BatchNorm2d(out_channels)
        self.a_relu = nn.ReLU(inplace=True)
        self.b = conv3x3(out_channels, out_channels)
        self.b_bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class PyclsBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.proj_block = in_channels != out_channels or stride != 1
        if self.proj_block:
            self.proj = conv1x1(in_channels, out_channels, stride)
            self.bn = nn.BatchNorm2d(out_channels)
        self.f = BasicTransform(in_channels, out_channels, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.proj(x)) + self.f(x) if self.proj_block else x + self.f(x)
        return self.relu(x)


class PyclsStem(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class PyclsHead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avg_pool(x)
        return self.fc(x.view(x.size(0), -1))


class PyclsResNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = PyclsStem(width)
        self.s1 = nn.Sequential(PyclsBlock(width, width, 1), PyclsBlock(width, width, 1))
        self.s2 = nn.Sequential(PyclsBlock(width, 2 * width, 2), PyclsBlock(2 * width, 2 * width, 1))
        self.head = PyclsHead(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


class ClipBottleneck(nn.Module):
    """CLIP's image encoder: one ReLU per position; strides are average pools in the branch and in the shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        planes = out_channels // 4
        self.conv1 = conv1x1(in_channels, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = conv1x1(planes, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu3 = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or in_channels != out_channels:
            layers = {
                "-1": nn.AvgPool2d(stride),
                "0": conv1x1(in_channels, out_channels),
                "1": nn.BatchNorm2d(out_channels),
            }
            self.downsample = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.avgpool(out)
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu3(out)
        return out


class ClipResNet(nn.Module):
    """The stem, a function inside the forward, has three convolutions and an average pool."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, width // 2, 2)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width // 2, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(2)
        self.layer1 = nn.Sequential(ClipBottleneck(width, 2 * width, 1), ClipBottleneck(2 * width, 2 * width, 1))
        self.layer2 = nn.Sequential(ClipBottleneck(2 * width, 4 * width, 2), ClipBottleneck(4 * width, 4 * width, 1))
        self.proj = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        def stem(x: Tensor) -> Tensor:
            x = self.relu1(self.bn1(self.conv1(x)))
            x = self.relu2(self.bn2(self.conv2(x)))
            return self.avgpool(x)

        x = x.type(self.conv1.weight.dtype)
        x = stem(x)
        x = self.layer1(x)
        x = self.layer2(x)
        return self.proj(global_pool(x))


class RegNetBlock(nn.Module):
    """torchvision's RegNet: the branch is a Sequential with names, of Sequentials of convolution, norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        resized = in_channels != out_channels or stride != 1
        self.proj = conv_norm(in_channels, out_channels, 1, stride) if resized else None
        planes = out_channels // 4
        layers = {
            "a": nn.Sequential(conv1x1(in_channels, planes), nn.BatchNorm2d(planes), nn.ReLU(inplace=True)),
            "b": nn.Sequential(conv3x3(planes, planes, stride), nn.BatchNorm2d(planes), nn.ReLU(inplace=True)),
            "c": nn.Sequential(conv1x1(planes, out_channels), nn.BatchNorm2d(out_channels)),
        }
        self.f = nn.Sequential(OrderedDict(layers))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.proj is not None:
            return self.activation(self.proj(x) + self.f(x))
        return self.activation(x + self.f(x))


class NormAct(nn.BatchNorm2d):
    """A norm that contains its ReLU, and implements the statistics itself."""

    def __init__(self, channels: int, apply_act: bool = True) -> None:
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True) if apply_act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, factor, self.eps
        )
        return self.act(x)


class NormActBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        resized = in_channels != out_channels or stride != 1
        self.norm1 = NormAct(in_channels)
        self.downsample = conv1x1(in_channels, out_channels, stride) if resized else None
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.norm2 = NormAct(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x_preact = self.norm1(x)
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(x_preact)
        x = self.conv1(x_preact)
        x = self.conv2(self.norm2(x))
        return x + shortcut


STYLES = (
    Style("pycls", PyclsResNet, "loops over children(), bn(proj(x)) + f(x)", twin="torchvision-basic"),
    Style("clip", ClipResNet, "relu1 to relu3, average pools as strides, a stem function in the forward"),
    Style(
        "regnet",
        lambda width: SmallResNet(RegNetBlock, width, expansion=2),
        "a Sequential of named Sequentials",
        twin="torchvision-bottleneck-3x3",
    ),
    # The norms are of a subclass with a forward of its own, so none of them has to be fused.
    Style(
        "norm-act-subclass",
        lambda width: SmallResNet(NormActBlock, width),
        "BatchNorm2d subclass with a ReLU inside, pre-activation",
        share=0.0,
    ),
)
