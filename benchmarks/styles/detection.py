"""detectron2 and YOLO: a convolution that holds its norm, a module of convolution, norm and activation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.styles.style import CLASSES, Style, global_pool


class NormedConv2d(nn.Conv2d):
    """detectron2: a subclass of Conv2d that holds its norm and its activation, a function."""

    def __init__(self, *args: Any, norm: nn.Module, activation: Any = None) -> None:
        super().__init__(*args, bias=False)  # type: ignore[misc]
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0 and self.training:
            raise ValueError("a norm cannot train on an empty batch")
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class Detectron2Bottleneck(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        planes = out_channels // 4
        self.shortcut = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = NormedConv2d(in_channels, out_channels, 1, stride, norm=nn.BatchNorm2d(out_channels))
        self.conv1 = NormedConv2d(in_channels, planes, 1, norm=nn.BatchNorm2d(planes))
        self.conv2 = NormedConv2d(planes, planes, 3, stride, 1, norm=nn.BatchNorm2d(planes))
        self.conv3 = NormedConv2d(planes, out_channels, 1, norm=nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = F.relu_(out)
        out = self.conv2(out)
        out = F.relu_(out)
        out = self.conv3(out)
        shortcut = self.shortcut(x) if self.shortcut is not None else x
        out += shortcut
        out = F.relu_(out)
        return out


class Detectron2BasicStem(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = NormedConv2d(3, width, 7, 2, 3, norm=nn.BatchNorm2d(width), activation=F.relu)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class Detectron2ResNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = Detectron2BasicStem(width)
        self.stages = []
        for name, inner, outer, stride in (("res2", width, 2 * width, 1), ("res3", 2 * width, 4 * width, 2)):
            stage = nn.Sequential(Detectron2Bottleneck(inner, outer, stride), Detectron2Bottleneck(outer, outer, 1))
            self.add_module(name, stage)
            self.stages.append(name)
        self.linear = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"x: expected shape (N, C, H, W), got {tuple(x.shape)}")
        outputs = {}
        x = self.stem(x)
        for name in self.stages:
            x = getattr(self, name)(x)
            outputs[name] = x
        return self.linear(global_pool(outputs["res3"]))


class Conv(nn.Module):
    """YOLO: `act(bn(conv(x)))`; the default activation is a class attribute, one module for the whole process."""

    default_act: nn.Module = nn.ReLU()

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, act: bool | nn.Module = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = self.default_act if act is True else act if isinstance(act, nn.Module) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class YoloBottleneck(nn.Module):
    def __init__(self, c1: int, c2: int, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1 = Conv(c1, c2 // 2, 1)
        self.cv2 = Conv(c2 // 2, c2, 3)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C3(nn.Module):
    def __init__(self, c1: int, c2: int, shortcut: bool = True) -> None:
        super().__init__()
        hidden = c2 // 2
        self.cv1 = Conv(c1, hidden)
        self.cv2 = Conv(c1, hidden)
        self.cv3 = Conv(2 * hidden, c2)
        self.m = nn.Sequential(YoloBottleneck(hidden, hidden, shortcut), YoloBottleneck(hidden, hidden, shortcut))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class Yolo(nn.Module):
    """Layers know from which earlier outputs they read; one output is kept for a later concatenation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = (
            (-1, Conv(3, width, 3, 2)),
            (-1, C3(width, 2 * width)),
            (-1, Conv(2 * width, 2 * width, 3, 2)),
            (-1, C3(2 * width, 2 * width, shortcut=False)),
            (-1, nn.Upsample(scale_factor=2, mode="nearest")),
            (1, Conv(2 * width, CLASSES)),
        )
        self.model = nn.Sequential(*(layer for _, layer in layers))
        layer: Any
        for layer, (source, _) in zip(self.model, layers, strict=True):
            layer.f = source
        self.save = (1,)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        m: Any
        y: list[Any] = []
        for i, m in enumerate(self.model):
            if m.f != -1:
                top, x = x, y[m.f]
            x = m(x)
            y.append(x if i in self.save else None)
        return x, top


STYLES = (
    Style(
        "detectron2",
        Detectron2ResNet,
        "a Conv2d subclass with norm and activation, F.relu_, x.numel() == 0",
        twin="torchvision-bottleneck",
    ),
    Style("yolo", Yolo, "x + cv2(cv1(x)) if self.add else ..., C3 with concatenation, layers that name their source"),
)
