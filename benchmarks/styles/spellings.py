"""A basic block whose addition and ReLUs are spelled in every way that PyTorch offers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.styles.style import SmallResNet, Style, conv3x3, projection


class SpelledBlock(nn.Module):
    """The layers of a basic block; subclasses write the forward."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = projection(in_channels, out_channels, stride)

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)


class TorchAdd(SpelledBlock):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(torch.add(out, self.shortcut(x)))


class AddMethod(SpelledBlock):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out))
        out = out.add_(self.shortcut(x))
        return out.relu()


class Swapped(SpelledBlock):
    def forward(self, x: Tensor) -> Tensor:
        identity = self.shortcut(x)
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = identity + out
        return torch.relu(out)


class AugmentedAssignment(SpelledBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return y.relu_()


class TorchReluInPlace(SpelledBlock):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        torch.relu_(out)
        out = self.bn2(self.conv2(out))
        return torch.relu_(out.add(self.shortcut(x)))


class FunctionalInPlace(SpelledBlock):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x), inplace=True)


class ClampMin(SpelledBlock):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).clamp_min(0)
        out = self.bn2(self.conv2(out))
        return (out + self.shortcut(x)).clamp_min(0)


class Clamp(SpelledBlock):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.clamp(self.bn1(self.conv1(x)), min=0)
        out = self.bn2(self.conv2(out))
        return torch.clamp(out + self.shortcut(x), min=0)


class SharedRelu(SpelledBlock):
    """One ReLU module for all blocks of the process."""

    relu = nn.ReLU(inplace=True)

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.act = self.relu

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.act(out + self.shortcut(x))


def spelling(name: str, block: type[SpelledBlock], special: str) -> Style:
    return Style(name, lambda width: SmallResNet(block, width), special, twin="torchvision-basic-3x3")


STYLES = (
    spelling("torch-add", TorchAdd, "relu1, relu2, torch.add(out, identity)"),
    spelling("add-method", AddMethod, "out = out.add_(identity), x.relu()"),
    spelling("add-swapped", Swapped, "identity + out, the shortcut comes first, torch.relu"),
    spelling("add-augmented", AugmentedAssignment, "y += identity, x.relu_()"),
    spelling("torch-relu-in-place", TorchReluInPlace, "torch.relu_(out) as a statement, out.add(identity)"),
    spelling("functional-in-place", FunctionalInPlace, "F.relu_, F.relu(..., inplace=True)"),
    spelling("clamp-min", ClampMin, "x.clamp_min(0)"),
    spelling("clamp", Clamp, "torch.clamp(x, min=0)"),
    spelling("shared-relu", SharedRelu, "one ReLU module for all blocks of the process"),
)
