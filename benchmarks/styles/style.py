"""Description of one style, and the parts that styles share where their spelling is not the point."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


@dataclass(frozen=True)
class Style:
    """One way in which residual networks are written, as a small network.

    Args:
        name: unique name.
        build: constructor; its argument is the number of channels of the stem, a multiple of 8.
        special: the property of its forward that distinguishes it.
        share: smallest share of its batch norms that must run fused.
        twin: name of the style with the same architecture (convolutions, norms, additions, ReLUs, parameter shapes) in
            torchvision's spelling; None: there is none.
        inputs: number of inputs.
        shape: shape of an input without the batch.
    """

    name: str
    build: Callable[[int], nn.Module]
    special: str
    share: float = 1.0
    twin: str | None = None
    inputs: int = 1
    shape: tuple[int, ...] = (3, 16, 16)


#: Constructor of a block: input channels, output channels, stride.
Block = Callable[[int, int, int], nn.Module]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, groups=groups, bias=bias)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def conv_norm(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


def conv_norm_relu(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return conv_norm(in_channels, out_channels, kernel, stride).append(nn.ReLU(inplace=True))


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Return the projection of a shortcut where the shape changes, else None."""
    if stride == 1 and in_channels == out_channels:
        return None
    return conv_norm(in_channels, out_channels, 1, stride)


def classifier(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class SmallResNet(nn.Module):
    """A 3x3 stem, two stages of two blocks each, and a classifier, all in Sequentials.

    Args:
        block: constructor of a block.
        width: channels of the stem.
        expansion: output channels of the first stage relative to the stem.
    """

    def __init__(self, block: Block, width: int, expansion: int = 1) -> None:
        super().__init__()
        first, second = width * expansion, 2 * width * expansion
        self.stem = conv_norm_relu(3, width)
        self.layer1 = nn.Sequential(block(width, first, 1), block(first, first, 1))
        self.layer2 = nn.Sequential(block(first, second, 2), block(second, second, 1))
        self.classifier = classifier(second)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layer2(self.layer1(self.stem(x))))


def global_pool(x: Tensor) -> Tensor:
    """Return the mean of each channel, of shape (N, C)."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)
