"""The networks of the study: residual and plain ones, shortcuts of other spans, and deepened copies."""

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
    """A network for small images: a 3x3 convolution, three stages of blocks, global average pooling, a classifier.

    Args:
        kind: ``"residual"``, or ``"plain"`` for the counterpart without shortcuts.
        depth: number of weighted layers, 3n * span + 2.
        width: channels of the first stage, doubled in each further one.
        span: number of layers that a shortcut spans; 2 in He et al. 2015 and :func:`fused_res.models.cifar_resnet`.
        norm: whether the network has batch norms.
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
        """Build the network with newly initialized weights from PyTorch's global generator."""
        plain, norm_layer = self.kind == "plain", None if self.norm else nn.Identity
        if self.span == 2:
            return cifar_resnet(self.depth, classes, plain, self.width, norm_layer=norm_layer, backend=backend)
        width, blocks = self.width, (self.depth - 2) // (3 * self.span)
        return ResidualNetwork(
            span_block_class(self.span),
            [Stage(width, blocks), Stage(2 * width, blocks, 2), Stage(4 * width, blocks, 2)],
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            None,
            classes,
            norm_layer=norm_layer,
            plain=plain,
            backend=backend,
        )


def span_block_class(span: int) -> type[ResidualBlock]:
    """Return a block class like :class:`fused_res.nn.BasicBlock`, with `span` 3x3 convolutions instead of two.

    Its constructor has the signature that :class:`ResidualNetwork` expects.
    """

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
            **options: str,
        ) -> None:
            *_, norm_layer = rest  # after groups, width and dilation, which have their defaults in small networks
            channels, strides = [inplanes, *[planes] * span], [stride, *[1] * (span - 1)]
            convolutions = [nn.Conv2d(channels[i], planes, 3, strides[i], padding=1, bias=False) for i in range(span)]
            super().__init__(
                [(convolution, norm_layer(planes)) for convolution in convolutions],
                downsample if downsample is not None else "identity" if shortcut else "none",
                **options,
            )

    return SpanBlock


def layers(model: nn.Module) -> list[nn.Conv2d]:
    """Return the 3x3 convolutions from input to output: all weighted layers except projections and classifier."""
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]


def blocks(model: nn.Module) -> list[ResidualBlock]:
    """Return the residual blocks from input to output."""
    return [module for module in model.modules() if isinstance(module, ResidualBlock)]


def zero_last_norm(block: ResidualBlock) -> ResidualBlock:
    """Set weight and bias of the block's last norm to zero, which makes its residual branch zero."""
    *_, last = [module for module in block.children() if isinstance(module, nn.BatchNorm2d)]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return block


def deepen(model: ResidualNetwork, count: int, backend: str = "auto") -> ResidualNetwork:
    """Copy a network of basic blocks and append `count` blocks with a zeroed last norm to each stage.

    Blocks that are appended to a plain network are plain.
    """
    deeper = copy.deepcopy(model)
    for name in STAGES:
        stage = getattr(deeper, name)
        channels = stage[-1].conv2.out_channels
        for _ in range(count):
            block = BasicBlock(channels, channels, shortcut=not model.plain, backend=backend)
            stage.append(zero_last_norm(block).train(model.training))
    return deeper
