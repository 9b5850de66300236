"""A basic block with its layers, forward and shortcut organized in various ways; dropout, drop path, norm options."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.styles.style import CLASSES, Block, SmallResNet, Style, conv3x3, conv_norm, conv_norm_relu, projection


class ModuleDictBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                "conv1": conv3x3(in_channels, out_channels, stride),
                "bn1": nn.BatchNorm2d(out_channels),
                "conv2": conv3x3(out_channels, out_channels),
                "bn2": nn.BatchNorm2d(out_channels),
            }
        )
        if (shortcut := projection(in_channels, out_channels, stride)) is not None:
            self.layers["shortcut"] = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.layers["bn1"](self.layers["conv1"](x)))
        out = self.layers["bn2"](self.layers["conv2"](out))
        if "shortcut" in self.layers:
            x = self.layers["shortcut"](x)
        return F.relu(out + x)


class ModuleListBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([conv3x3(in_channels, out_channels, stride), conv3x3(out_channels, out_channels)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(out_channels), nn.BatchNorm2d(out_channels)])
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            out = norm(conv(out))
            if i < len(self.convs) - 1:
                out = F.relu(out)
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class NumberedBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.depth = 2
        for i in range(self.depth):
            first = i == 0
            convolution = conv3x3(in_channels if first else out_channels, out_channels, stride if first else 1)
            self.add_module(f"conv{i}", convolution)
            self.add_module(f"bn{i}", nn.BatchNorm2d(out_channels))
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i in range(self.depth):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            out = out if i == self.depth - 1 else F.relu(out)
        if self.shortcut is not None:
            x = self.shortcut(x)
        return F.relu(out + x)


class Residual(nn.Module):
    """Base class: the addition. Subclasses provide the branch and the ReLU."""

    def __init__(self, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.shortcut = shortcut

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + (x if self.shortcut is None else self.shortcut(x))


class SuperForwardBlock(Residual):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(projection(in_channels, out_channels, stride))
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def apply_norm_relu(x: Tensor, norm: nn.Module) -> Tensor:
    return F.relu(norm(x), inplace=True)


class HelperBlock(nn.Module):
    """The forward is split over two methods, a static method and a function of the file."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = projection(in_channels, out_channels, stride)

    def _residual(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(apply_norm_relu(self.conv1(x), self.bn1)))

    def _identity(self, x: Tensor) -> Tensor:
        return self.downsample(x) if self.downsample else x

    @staticmethod
    def _merge(a: Tensor, b: Tensor) -> Tensor:
        return (a + b).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self._merge(self._residual(x), self._identity(x))


class AnyShortcutBlock(nn.Module):
    """A shortcut that is None, an identity, an empty Sequential or a function.

    Args:
        identity: value of the attribute where the shape is kept.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, identity: Any = None) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride) or identity

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut:  # false for None and for an empty Sequential
            x = self.shortcut(x)
        return F.relu(x + out)


def any_shortcut() -> Block:
    """Return a constructor whose blocks alternate between an identity, an empty Sequential and a lambda."""
    kinds: list[Callable[[], Any]] = [nn.Identity, nn.Sequential, nn.Sequential, lambda: lambda x: x]

    def build(in_channels: int, out_channels: int, stride: int) -> nn.Module:
        return AnyShortcutBlock(in_channels, out_channels, stride, kinds.pop(0)())

    return build


class PropertyShortcutBlock(nn.Module):
    """The shortcut is a property, computed from the shapes at every call."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride
        self.blocks = nn.Sequential(
            *conv_norm_relu(in_channels, out_channels, stride=stride), *conv_norm(out_channels, out_channels)
        )
        self.activate = nn.ReLU(inplace=True)
        self.project = conv_norm(in_channels, out_channels, 1, stride) if self.should_apply_shortcut else nn.Identity()

    @property
    def should_apply_shortcut(self) -> bool:
        return self.in_channels != self.out_channels or self.stride != 1

    @property
    def shortcut(self) -> nn.Module:
        return self.project if self.should_apply_shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.shortcut(x)
        x = self.blocks(x)
        x += residual
        x = self.activate(x)
        return x


class NormOptionsBlock(nn.Module):
    """A cumulative average, a norm without parameters and one without running statistics."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels, momentum=None)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.03, affine=False)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride),
                nn.BatchNorm2d(out_channels, track_running_stats=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


def drop_path(x: Tensor, drop_prob: float, training: bool) -> Tensor:
    """Drop the branch of each sample with a probability. Huang et al., Deep networks with stochastic depth, 2016."""
    if drop_prob == 0.0 or not training:
        return x
    keep = 1 - drop_prob
    mask = keep + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
    return x.div(keep) * mask.floor_()


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training)


class DropPathBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride) or nn.Identity()
        self.drop_path = DropPath(0.3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.drop_path(self.bn2(self.conv2(out)))
        return self.act(self.shortcut(x) + out)


class StochasticDepthBlock(DropPathBlock):
    """The whole branch is skipped in some training steps, by the random number generator."""

    def forward(self, x: Tensor) -> Tensor:
        identity = self.shortcut(x)
        if self.training and torch.rand(()).item() < 0.3:
            return self.act(identity)
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.act(identity + out)


class DropoutBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.drop = nn.Dropout2d(0.2)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.drop(F.relu(self.bn1(self.conv1(x))))
        out = F.dropout(self.bn2(self.conv2(out)), 0.1, self.training)
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class SharedBlocks(nn.Module):
    """A recurrent network: the same block runs three times, so its norms see three batches in each step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = conv_norm_relu(3, width, stride=2)
        self.block = HelperBlock(width, width, 1)
        self.down = HelperBlock(width, 2 * width, 2)
        self.linear = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x)
        return self.linear(self.down(x).mean((2, 3)))


def structured(name: str, block: Block, special: str) -> Style:
    return Style(name, lambda width: SmallResNet(block, width), special, twin="torchvision-basic-3x3")


STYLES = (
    structured("module-dict", ModuleDictBlock, "layers in a ModuleDict, 'shortcut' in self.layers"),
    structured("module-list", ModuleListBlock, "a loop over zip of two ModuleLists"),
    structured("numbered-layers", NumberedBlock, 'add_module(f"conv{i}"), getattr'),
    structured("super-forward", SuperForwardBlock, "forward of a base class through super().forward"),
    structured("helper-functions", HelperBlock, "methods, a static method and a function of the file"),
    structured("shortcut-none", AnyShortcutBlock, "if self.shortcut, which is None"),
    Style(
        "shortcut-kinds",
        lambda width: SmallResNet(any_shortcut(), width),
        "a shortcut that is an identity, an empty Sequential or a lambda",
        twin="torchvision-basic-3x3",
    ),
    structured("shortcut-property", PropertyShortcutBlock, "the shortcut is computed in a property"),
    Style(
        "norm-options",
        lambda width: SmallResNet(NormOptionsBlock, width),
        "momentum=None, affine=False, track_running_stats=False",
    ),
    Style("drop-path", lambda width: SmallResNet(DropPathBlock, width), "drop path before the addition"),
    # In training the forward depends on a random number, so blocks run stock.
    Style(
        "stochastic-depth",
        lambda width: SmallResNet(StochasticDepthBlock, width),
        "the branch is skipped by a random number",
        share=0.0,
    ),
    Style("dropout", lambda width: SmallResNet(DropoutBlock, width), "Dropout2d and F.dropout in the block"),
    Style("shared-blocks", SharedBlocks, "one block runs three times"),
)
