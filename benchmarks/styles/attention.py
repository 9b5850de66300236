"""Blocks with gates and with split channels: foreign operators between fused chains."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.styles.style import SmallResNet, Style, conv1x1, conv3x3, conv_norm, projection


class SqueezeExcitation(nn.Module):
    """Hu et al., Squeeze-and-excitation networks, 2018."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // 2), nn.ReLU(inplace=True), nn.Linear(channels // 2, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class SEBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.se = SqueezeExcitation(out_channels)
        self.downsample = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.se(out)
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        out = self.relu(out)
        return out


class InlineSEBlock(nn.Module):
    """Pre-activation, with the gate in the block's own forward."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.fc1 = nn.Conv2d(out_channels, out_channels // 2, 1)
        self.fc2 = nn.Conv2d(out_channels // 2, out_channels, 1)
        if stride != 1 or in_channels != out_channels:
            self.shortcut = conv1x1(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        w = F.avg_pool2d(out, out.size(2))
        w = F.relu(self.fc1(w))
        w = self.fc2(w).sigmoid()
        out = out * w
        out += shortcut
        return out


class Res2NetBlock(nn.Module):
    """Channels are split, and each part adds the previous part's output. Gao et al., Res2Net, 2019."""

    scale = 4

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.width = out_channels // 4
        self.conv1 = conv1x1(in_channels, self.width * self.scale)
        self.bn1 = nn.BatchNorm2d(self.width * self.scale)
        self.pool = nn.AvgPool2d(3, stride, 1) if stride != 1 else None
        self.convs = nn.ModuleList(conv3x3(self.width, self.width, stride) for _ in range(self.scale - 1))
        self.bns = nn.ModuleList(nn.BatchNorm2d(self.width) for _ in range(self.scale - 1))
        self.conv3 = conv1x1(self.width * self.scale, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        spx = torch.split(out, self.width, 1)
        sp = spx[0]
        for i in range(self.scale - 1):
            sp = self.convs[i](sp if i == 0 else spx[i] if self.pool is not None else sp + spx[i])
            sp = self.relu(self.bns[i](sp))
            out = sp if i == 0 else torch.cat((out, sp), 1)
        last = spx[self.scale - 1]
        out = torch.cat((out, last if self.pool is None else self.pool(last)), 1)
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)


class SplitAttention(nn.Module):
    """A grouped convolution of which a softmax weighs the groups. Zhang et al., ResNeSt, 2020."""

    radix = 2

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv = conv3x3(channels, channels * self.radix, stride, groups=self.radix)
        self.bn0 = nn.BatchNorm2d(channels * self.radix)
        self.fc1 = nn.Conv2d(channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc2 = nn.Conv2d(channels, channels * self.radix, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn0(x)
        x = self.relu(x)
        batch = x.shape[0]
        splits = torch.split(x, self.channels, dim=1)
        gap = F.adaptive_avg_pool2d(torch.stack(splits).sum(0), 1)
        gap = self.fc1(gap)
        gap = self.bn1(gap)
        gap = self.relu(gap)
        atten = F.softmax(self.fc2(gap).view(batch, self.radix, self.channels), dim=1).view(batch, -1, 1, 1)
        attens = torch.split(atten, self.channels, dim=1)
        out = attens[0] * splits[0] + attens[1] * splits[1]
        return out.contiguous()


class ResNeStBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        planes = out_channels // 4
        self.conv1 = conv1x1(in_channels, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = SplitAttention(planes, stride)
        self.conv3 = conv1x1(planes, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
            self.downsample = nn.Sequential(pool, *conv_norm(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.conv2(out)
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)


STYLES = (
    Style("se-module", lambda width: SmallResNet(SEBlock, width), "a gate module before the addition"),
    Style("se-inline", lambda width: SmallResNet(InlineSEBlock, width), "a gate in the block's forward"),
    Style("res2net", lambda width: SmallResNet(Res2NetBlock, width, 4), "split, a chain of convolutions, cat"),
    Style("resnest", lambda width: SmallResNet(ResNeStBlock, width, 4), "split attention, norms of single pixels"),
)
