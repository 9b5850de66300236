"""The networks of the study: residual ones, their plain twins, other spans of the shortcut, deeper copies."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from fused_res.models import cifar_resnet
from fused_res.models.network import ResidualNetwork, Stage
from fused_res.nn import BasicBlock, ResidualBlock

KINDS = ("plain", "residual")
STAGES = ("layer1", "layer2", "layer3")


@dataclass(frozen=True)
class Network:
    """A network for small images: a 3x3 convolution, three stages of blocks, the mean over space, a classifier.

    Args: kind: ``"residual"``, or ``"plain"``: the twin without shortcuts. depth: weighted layers, 3n * span + 2.
    width: channels of the first stage, doubled in each further one. span: layers that a shortcut passes over; two in
    He et al. and in :func:`fused_res.models.cifar_resnet`. norm: False leaves out the batch norms.
    """

    kind: str
    depth: int
    width: int
    span: int = 2
    norm: bool = True

    def __post_init__(self) -> None:
        blocks, rest = divmod(self.depth - 2, 3 * self.span)
        if rest or blocks < 1:
            raise ValueError(f"depth must be {3 * self.span}n + 2 with n >= 1, got {self.depth}")

    @property
    def label(self) -> str:
        return f"{self.kind}-{self.depth}" + (f"-span-{self.span}" if self.span != 2 else "")

    def build(self, classes: int, backend: str = "auto") -> ResidualNetwork:
        """With fresh weights from PyTorch's global generator."""
        plain, norm_layer = self.kind == "plain", None if self.norm else nn.Identity
        if self.span == 2:
            return cifar_resnet(self.depth, classes, plain, self.width, norm_layer=norm_layer, backend=backend)
        width, blocks = self.width, (self.depth - 2) // (3 * self.span)
        return ResidualNetwork(
            block_over(self.span),
            [Stage(width, blocks), Stage(2 * width, blocks, 2), Stage(4 * width, blocks, 2)],
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            None,
            classes,
            norm_layer=norm_layer,
            plain=plain,
            backend=backend,
        )


def block_over(span: int) -> type[ResidualBlock]:
    """A block like :class:`fused_res.nn.BasicBlock`, of `span` 3x3 convolutions instead of two, as a
    :class:`ResidualNetwork` makes its blocks."""

    class SpanBlock(ResidualBlock):
        expansion = 1

        def __init__(
            self,
            inplanes: int,
            planes: int,
            stride: int,
            downsample: nn.Module | None,
            *rest: Any,
            shortcut: bool,
            **how: str,
        ) -> None:
            *_, norm_layer = rest  # behind groups, width and dilation, of which small networks have the usual ones
            channels, strides = [inplanes, *[planes] * span], [stride, *[1] * (span - 1)]
            convolutions = [nn.Conv2d(channels[i], planes, 3, strides[i], padding=1, bias=False) for i in range(span)]
            super().__init__(
                [(convolution, norm_layer(planes)) for convolution in convolutions],
                downsample if downsample is not None else "identity" if shortcut else "none",
                **how,
            )

    return SpanBlock


def layers(model: nn.Module) -> list[nn.Conv2d]:
    """The 3x3 convolutions from the input to the output: all weighted layers but projections and classifier."""
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]


def blocks(model: nn.Module) -> list[ResidualBlock]:
    """From the input to the output."""
    return [module for module in model.modules() if isinstance(module, ResidualBlock)]


def zero_last_norm(block: ResidualBlock) -> ResidualBlock:
    """Sets weight and bias of the block's last norm to zero, so that nothing but the shortcut is left of it."""
    *_, last = [module for module in block.children() if isinstance(module, nn.BatchNorm2d)]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return block


def deepened(model: ResidualNetwork, count: int, backend: str = "auto") -> ResidualNetwork:
    """A copy of a network of basic blocks with `count` more behind each stage, the last norm of each at zero.

    Plain networks get plain blocks.
    """
    deeper = copy.deepcopy(model)
    for name in STAGES:
        stage = getattr(deeper, name)
        channels = stage[-1].conv2.out_channels
        for _ in range(count):
            block = BasicBlock(channels, channels, shortcut=not model.plain, backend=backend)
            stage.append(zero_last_norm(block).train(model.training))
    return deeper
