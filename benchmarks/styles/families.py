"""Other families of networks with batch norm and ReLU: concatenations, aggregation, scaled additions, shuffles."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.styles.style import (
    CLASSES,
    SmallResNet,
    Style,
    classifier,
    conv1x1,
    conv3x3,
    conv_norm,
    conv_norm_relu,
    global_pool,
)


class DlaBlock(nn.Module):
    """The residual is an argument. Yu et al., Deep layer aggregation, 2018."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            residual = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out += residual
        out = self.relu(out)
        return out


class DlaRoot(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, residual: bool) -> None:
        super().__init__()
        self.conv = conv1x1(in_channels, out_channels)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.residual = residual

    def forward(self, *x: Tensor) -> Tensor:
        children = x
        out = self.conv(torch.cat(x, 1))
        out = self.bn(out)
        if self.residual:
            out += children[0]
        out = self.relu(out)
        return out


class DlaTree(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, residual: bool) -> None:
        super().__init__()
        self.tree1 = DlaBlock(in_channels, out_channels, stride)
        self.tree2 = DlaBlock(out_channels, out_channels)
        self.root = DlaRoot(2 * out_channels, out_channels, residual)
        self.downsample = nn.MaxPool2d(stride, stride) if stride > 1 else None
        self.project = conv_norm(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, residual: Tensor | None = None, children: list[Tensor] | None = None) -> Tensor:
        children = [] if children is None else children
        bottom = self.downsample(x) if self.downsample else x
        residual = self.project(bottom) if self.project else bottom
        x1 = self.tree1(x, residual)
        x2 = self.tree2(x1)
        return self.root(x2, x1, *children)


class Dla(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.base_layer = conv_norm_relu(3, width, 7)
        self.level0 = DlaTree(width, width, 1, residual=False)
        self.level1 = DlaTree(width, 2 * width, 2, residual=True)
        self.fc = nn.Conv2d(2 * width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.base_layer(x)
        for i in range(2):
            x = getattr(self, f"level{i}")(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1)).flatten(1)


class CspStage(nn.Module):
    """Half of the channels bypass the blocks. Wang et al., CSPNet, 2020."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.downsample_conv = conv_norm_relu(in_channels, out_channels, stride=stride)
        self.split_conv0 = conv_norm_relu(out_channels, half, 1)
        self.split_conv1 = conv_norm_relu(out_channels, half, 1)
        self.blocks_conv = nn.Sequential(DlaBlock(half, half), DlaBlock(half, half), conv_norm_relu(half, half, 1))
        self.concat_conv = conv_norm_relu(out_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample_conv(x)
        x0 = self.split_conv0(x)
        x1 = self.split_conv1(x)
        x1 = self.blocks_conv(x1)
        x = torch.cat([x1, x0], dim=1)
        return self.concat_conv(x)


class Csp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList([CspStage(3, width, 2), CspStage(width, 2 * width, 2)])
        self.classifier = classifier(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.classifier(x)


class BasicConv2d(nn.Module):
    """Convolution, norm and ReLU of GoogLeNet and Inception."""

    def __init__(self, in_channels: int, out_channels: int, **kwargs: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x)
        return F.relu(x, inplace=True)


class Inception(nn.Module):
    """Szegedy et al., Going deeper with convolutions, 2015."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        part = out_channels // 4
        self.branch1 = BasicConv2d(in_channels, part, kernel_size=1, stride=stride)
        self.branch2 = nn.Sequential(
            BasicConv2d(in_channels, part, kernel_size=1),
            BasicConv2d(part, part, kernel_size=3, stride=stride, padding=1),
        )
        self.branch3 = nn.Sequential(
            BasicConv2d(in_channels, part, kernel_size=1),
            BasicConv2d(part, part, kernel_size=5, stride=stride, padding=2),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=stride, padding=1), BasicConv2d(in_channels, part, kernel_size=1)
        )

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]

    def forward(self, x: Tensor) -> Tensor:
        outputs = self._forward(x)
        return torch.cat(outputs, 1)


class InceptionResNetBlock(nn.Module):
    """The branch is scaled before the addition. Szegedy et al., Inception-v4, 2017."""

    def __init__(self, channels: int, scale: float, relu: bool = True) -> None:
        super().__init__()
        part = channels // 2
        self.scale = scale
        self.branch0 = BasicConv2d(channels, part, kernel_size=1)
        self.branch1 = nn.Sequential(
            BasicConv2d(channels, part, kernel_size=1),
            BasicConv2d(part, part, kernel_size=(1, 7), padding=(0, 3)),
            BasicConv2d(part, part, kernel_size=(7, 1), padding=(3, 0)),
        )
        self.conv2d = nn.Conv2d(2 * part, channels, kernel_size=1)
        self.relu = nn.ReLU(inplace=False) if relu else None

    def forward(self, x: Tensor) -> Tensor:
        x0 = self.branch0(x)
        x1 = self.branch1(x)
        out = torch.cat((x0, x1), 1)
        out = self.conv2d(out)
        out = out * self.scale + x
        if self.relu is not None:
            out = self.relu(out)
        return out


class InceptionResNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv2d_1a = BasicConv2d(3, width, kernel_size=3, stride=2)
        self.repeat_1 = nn.Sequential(InceptionResNetBlock(width, 0.17), InceptionResNetBlock(width, 0.17))
        self.conv2d_2a = BasicConv2d(width, 2 * width, kernel_size=3, stride=2)
        self.repeat_2 = nn.Sequential(InceptionResNetBlock(2 * width, 0.1), InceptionResNetBlock(2 * width, 1.0, False))
        self.last_linear = nn.Linear(2 * width, CLASSES, bias=False)
        self.last_bn = nn.BatchNorm1d(CLASSES, eps=0.001, momentum=0.1, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.repeat_1(self.conv2d_1a(x))
        x = self.repeat_2(self.conv2d_2a(x))
        x = self.last_linear(global_pool(x))
        return self.last_bn(x)


class DenseLayer(nn.Module):
    """Norm, ReLU, convolution on a list of all earlier features. Huang et al., DenseNet, 2017."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv1x1(in_channels, 2 * growth)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(2 * growth, growth)
        self.drop_rate = 0.0

    def bn_function(self, inputs: list[Tensor]) -> Tensor:
        concated_features = torch.cat(inputs, 1)
        return self.conv1(self.relu1(self.norm1(concated_features)))

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        prev_features = [input] if isinstance(input, Tensor) else input
        bottleneck_output = self.bn_function(prev_features)
        new_features = self.conv2(self.relu2(self.norm2(bottleneck_output)))
        if self.drop_rate > 0:
            new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
        return new_features


class DenseBlock(nn.ModuleDict):
    def __init__(self, in_channels: int, growth: int, layers: int) -> None:
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", DenseLayer(in_channels + i * growth, growth))

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for _, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        growth = width // 2
        self.features = nn.Sequential()
        self.features.add_module("conv0", conv3x3(3, width, 2))
        self.features.add_module("norm0", nn.BatchNorm2d(width))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("denseblock1", DenseBlock(width, growth, 2))
        transition = nn.Sequential(nn.BatchNorm2d(2 * width), nn.ReLU(inplace=True), conv1x1(2 * width, width))
        self.features.add_module("transition1", transition.append(nn.AvgPool2d(2, 2)))
        self.features.add_module("denseblock2", DenseBlock(width, growth, 2))
        self.features.add_module("norm5", nn.BatchNorm2d(2 * width))
        self.classifier = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        out = F.relu(features, inplace=True)
        return self.classifier(global_pool(out))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """Ma et al., ShuffleNet V2, 2018."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                conv3x3(in_channels, in_channels, stride, groups=in_channels),
                nn.BatchNorm2d(in_channels),
                *conv_norm_relu(in_channels, half, 1),
            )
        self.stride = stride
        self.branch2 = nn.Sequential(
            *conv_norm_relu(in_channels if stride > 1 else half, half, 1),
            conv3x3(half, half, stride, groups=half),
            nn.BatchNorm2d(half),
            *conv_norm_relu(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class InvertedResidual(nn.Module):
    """No activation after the addition. Sandler et al., MobileNetV2, 2018, with ReLU in place of ReLU6."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        hidden = 2 * in_channels
        self.use_res_connect = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            conv_norm_relu(in_channels, hidden, 1),
            nn.Sequential(
                conv3x3(hidden, hidden, stride, groups=hidden), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)
            ),
            conv1x1(hidden, out_channels),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


def vgg(width: int) -> nn.Module:
    """Return VGG with batch norm, convolutions with bias. Simonyan and Zisserman, 2015."""
    layers: list[nn.Module] = []
    channels = 3
    for size in (width, "M", 2 * width, 2 * width, "M"):
        if isinstance(size, str):
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        else:
            layers += [conv3x3(channels, size, bias=True), nn.BatchNorm2d(size), nn.ReLU(inplace=True)]
            channels = size
    return nn.Sequential(*layers, *classifier(channels))


class AlphaZero(nn.Module):
    """A tower of blocks whose convolutions have biases, with a policy and a value. Silver et al., 2017."""

    board = 16  # squares in a row: the height and width of the input

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv3x3(3, width, bias=True)
        self.bn = nn.BatchNorm2d(width)
        self.res_blocks = nn.ModuleList([TowerBlock(width), TowerBlock(width)])
        self.policy_conv = nn.Conv2d(width, 2, 1)
        self.policy_bn = nn.BatchNorm2d(2)
        self.policy_fc = nn.Linear(2 * self.board**2, CLASSES)
        self.value_conv = nn.Conv2d(width, 1, 1)
        self.value_bn = nn.BatchNorm2d(1)
        self.value_fc1 = nn.Linear(self.board**2, width)
        self.value_fc2 = nn.Linear(width, 1)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.bn(self.conv(state)))
        for block in self.res_blocks:
            x = block(x)
        p = F.relu(self.policy_bn(self.policy_conv(x)))
        p = F.log_softmax(self.policy_fc(torch.flatten(p, 1)), dim=1)
        v = F.relu(self.value_bn(self.value_conv(x)))
        v = F.relu(self.value_fc1(torch.flatten(v, 1)))
        return p, torch.tanh(self.value_fc2(v))


class TowerBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, channels, bias=True)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, bias=True)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x += residual
        return F.relu(x)


STYLES = (
    Style("dla", Dla, "forward(x, residual=None), a root that concatenates *x"),
    Style("csp", Csp, "half of the channels bypass the blocks"),
    Style("googlenet", lambda width: SmallResNet(Inception, width), "F.relu(x, inplace=True) in BasicConv2d, cat"),
    Style("inception-resnet", InceptionResNet, "out * self.scale + x"),
    Style("densenet", DenseNet, "norm, ReLU, convolution on a concatenation of a list"),
    Style("shufflenet", lambda width: SmallResNet(ShuffleUnit, width), "chunk, cat, channel shuffle"),
    Style("mobilenet-v2", lambda width: SmallResNet(InvertedResidual, width), "no activation after the addition"),
    Style("vgg", vgg, "one Sequential, convolutions with bias"),
    Style("alphazero", AlphaZero, "convolutions with bias, a policy and a value"),
)
