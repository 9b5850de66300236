"""Residual networks of other inputs than images: signals, videos, volumes and vectors."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.styles.style import CLASSES, Style, conv_norm_relu, global_pool
from benchmarks.styles.torchvision_like import BasicBlock as ImageBlock

# Signals


class SignalBlock(nn.Module):
    """A basic block of 1-D convolutions with a wide kernel, as for electrocardiograms and speech.

    Wang et al., Time series classification from scratch with deep neural networks, 2017.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, kernel: int = 7) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm1d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv1d(out_channels, out_channels, kernel, 1, padding="same", bias=False)
        self.bn2 = nn.BatchNorm1d(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            convolution = nn.Conv1d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm1d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class PreActSignalBlock(nn.Module):
    """Pre-activation with dropout, max pooling in the shortcut and padded channels.

    Hannun et al., Cardiologist-level arrhythmia detection in ambulatory electrocardiograms, 2019.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, kernel: int = 7) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm1d(in_channels)
        self.conv1 = nn.Conv1d(in_channels, out_channels, kernel, stride, kernel // 2)
        self.bn2 = nn.BatchNorm1d(out_channels)
        self.dropout = nn.Dropout(0.2)
        self.conv2 = nn.Conv1d(out_channels, out_channels, kernel, 1, kernel // 2)
        self.pool = nn.MaxPool1d(stride, ceil_mode=True)
        self.missing = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(self.dropout(F.relu(self.bn2(out))))
        shortcut = F.pad(self.pool(x), (0, 0, 0, self.missing))
        return out + shortcut


class SignalNet(nn.Module):
    """A stem and four blocks for signals ``(N, C, L)``."""

    def __init__(self, block: Any, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv1d(3, width, 15, 2, 7, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.MaxPool1d(3, 2, 1)
        )
        self.layer1 = nn.Sequential(block(width, width), block(width, width))
        self.layer2 = nn.Sequential(block(width, 2 * width, 2), block(2 * width, 2 * width))
        self.fc = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(x.mean(dim=-1))


# Videos


class FactorizedConv(nn.Sequential):
    """A convolution over space, norm and ReLU, then a convolution over time.

    Tran et al., A closer look at spatiotemporal convolutions for action recognition, 2018.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        middle = in_channels * out_channels * 27 // (in_channels * 9 + 3 * out_channels)
        super().__init__(
            nn.Conv3d(in_channels, middle, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
            nn.BatchNorm3d(middle),
            nn.ReLU(inplace=True),
            nn.Conv3d(middle, out_channels, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
        )


class SimpleConv(nn.Conv3d):
    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, (3, 3, 3), stride, 1, bias=False)


class VideoBlock(nn.Module):
    """A basic block whose convolutions are in Sequentials with their norms."""

    def __init__(self, conv: Any, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            conv(in_channels, out_channels, stride), nn.BatchNorm3d(out_channels), nn.ReLU(inplace=True)
        )
        self.conv2 = nn.Sequential(conv(out_channels, out_channels), nn.BatchNorm3d(out_channels))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            convolution = nn.Conv3d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm3d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.conv1(x)
        out = self.conv2(out)
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        out = self.relu(out)
        return out


class VideoNet(nn.Module):
    """A stem and four blocks for videos ``(N, C, T, H, W)``."""

    def __init__(self, conv: Any, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, width, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
        )
        self.layer1 = nn.Sequential(VideoBlock(conv, width, width), VideoBlock(conv, width, width))
        self.layer2 = nn.Sequential(VideoBlock(conv, width, 2 * width, 2), VideoBlock(conv, 2 * width, 2 * width))
        self.avgpool = nn.AdaptiveAvgPool3d((1, 1, 1))
        self.fc = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.layer2(self.layer1(x))
        x = self.avgpool(x)
        return self.fc(x.flatten(1))


# Volumes


class VolumeBottleneck(nn.Module):
    """A bottleneck whose layers come from a table by the number of dimensions, as in libraries for medical images."""

    expansion = 2

    def __init__(self, in_channels: int, planes: int, dimensions: int, stride: int = 1) -> None:
        super().__init__()
        conv: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        norm: Any = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dimensions]
        out_channels = planes * self.expansion
        self.conv1, self.norm1 = conv(in_channels, planes, kernel_size=1, bias=False), norm(planes)
        self.conv2, self.norm2 = conv(planes, planes, 3, stride, 1, bias=False), norm(planes)
        self.conv3, self.norm3 = conv(planes, out_channels, kernel_size=1, bias=False), norm(out_channels)
        self.act = nn.ReLU(inplace=True)
        self.downsample = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(conv(in_channels, out_channels, 1, stride, bias=True), norm(out_channels))  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        residual = self.downsample(x)
        out = self.act(self.norm1(self.conv1(x)))
        out = self.act(self.norm2(self.conv2(out)))
        out = self.norm3(self.conv3(out))
        return self.act(out + residual)


class VolumeNet(nn.Module):
    """A stem with max pooling and four bottlenecks for volumes ``(N, C, D, H, W)``."""

    def __init__(self, width: int, dimensions: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, width, 7, 1, 3, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.act = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d(3, 2, 1)
        self.layer1 = nn.Sequential(
            VolumeBottleneck(width, width, dimensions), VolumeBottleneck(2 * width, width, dimensions)
        )
        self.layer2 = nn.Sequential(
            VolumeBottleneck(2 * width, 2 * width, dimensions, 2), VolumeBottleneck(4 * width, 2 * width, dimensions)
        )
        self.fc = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.act(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        x = F.adaptive_avg_pool3d(x, 1)
        return self.fc(x.view(x.size(0), -1))


# Vectors


class LinearBlock(nn.Module):
    """A residual block of linear layers.

    Martinez et al., A simple yet effective baseline for 3D human pose estimation, 2017.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.w1, self.batch_norm1 = nn.Linear(features, features), nn.BatchNorm1d(features)
        self.w2, self.batch_norm2 = nn.Linear(features, features), nn.BatchNorm1d(features)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.relu(self.batch_norm1(self.w1(x))))
        y = self.dropout(self.relu(self.batch_norm2(self.w2(y))))
        return x + y


class ResidualMLP(nn.Module):
    """Vectors ``(N, C)``. The last block adds to its norm's output, before the ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 4 * width), nn.BatchNorm1d(4 * width), nn.ReLU())
        self.blocks = nn.Sequential(LinearBlock(4 * width), LinearBlock(4 * width))
        self.last, self.norm = nn.Linear(4 * width, 4 * width, bias=False), nn.BatchNorm1d(4 * width)
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = F.relu(self.norm(self.last(x)) + x)
        return self.head(x)


class ProjectionHead(nn.Module):
    """An image network with a projection head of 1-D norms, the last without scale and shift.

    Chen & He, Exploring simple Siamese representation learning, 2021.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv_norm_relu(3, width), ImageBlock(width, width), ImageBlock(width, width))
        self.projector = nn.Sequential(
            nn.Linear(width, 2 * width, bias=False),
            nn.BatchNorm1d(2 * width),
            nn.ReLU(inplace=True),
            nn.Linear(2 * width, 2 * width, bias=False),
            nn.BatchNorm1d(2 * width, affine=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(torch.relu(global_pool(self.encoder(x))))


STYLES = (
    Style("signal-1d", lambda width: SignalNet(SignalBlock, width), "1-D convolutions and norms", shape=(3, 96)),
    Style(
        "signal-1d-pre",
        lambda width: SignalNet(PreActSignalBlock, width),
        "1-D pre-activation, dropout, max pooling in the shortcut",
        shape=(3, 96),
    ),
    Style("video-3d", lambda width: VideoNet(SimpleConv, width), "a subclass of Conv3d", shape=(3, 4, 16, 16)),
    Style(
        "video-2plus1d",
        lambda width: VideoNet(FactorizedConv, width),
        "a Sequential of two 3-D convolutions in place of each",
        shape=(3, 4, 16, 16),
    ),
    Style("monai", VolumeNet, "layers by the number of dimensions, x.view(x.size(0), -1)", shape=(3, 8, 8, 8)),
    Style("mlp-bn", ResidualMLP, "linear layers with BatchNorm1d", shape=(3,)),
    Style("projection-head", ProjectionHead, "2-D norms, then 1-D norms on vectors"),
)
