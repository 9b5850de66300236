"""ResidualNetwork, the base class of the ImageNet and CIFAR networks: stages of blocks, initialization and forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_res.nn import BasicBlock, Bottleneck, chain
from fused_res.nn.fusable_module import FusableModule, NormLayer, norm_layer_or_default

Block = type[BasicBlock] | type[Bottleneck]


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks of equal width.

    Args:
        planes: width of the blocks, the ``planes`` argument of the block class.
        blocks: number of blocks.
        stride: stride of the first block, default 1.
        dilate: replace the stride by a dilation: the first block preserves the resolution, the following ones dilate.
    """

    planes: int
    blocks: int
    stride: int = 1
    dilate: bool = False


class ResidualNetwork(FusableModule):
    """Residual network: stem, stages of residual blocks, global average pooling and a linear classifier.

    Children are created in torchvision's order, on which both the state_dict's order and the random numbers of the
    initialization depend.

    Args:
        block: the class :class:`fused_res.nn.BasicBlock` or :class:`fused_res.nn.Bottleneck`.
        stages: the stages ``layer1``, ``layer2``, ...
        stem: the first convolution.
        pool: pooling after the stem's ReLU, or None.
        num_classes: number of outputs of the classifier.
        zero_init_residual: initialize every block's last norm weight to zero, so that every block initially
            outputs ``relu(shortcut(x))`` (Goyal et al. 2017, https://arxiv.org/abs/1706.02677).
        groups, width_per_group: number and width of the groups of the bottlenecks' 3x3 convolution.
        norm_layer: constructs a norm from its number of channels; :class:`torch.nn.BatchNorm2d` if None.
        plain: omit all shortcuts, including projections.
        backend, recompute: see :func:`fused_res.functional.residual_block`.

    Raises:
        ValueError, TypeError: an argument is invalid.
        BackendUnavailableError: the explicitly selected backend cannot run here.
    """

    def __init__(
        self,
        block: Block,
        stages: Sequence[Stage],
        stem: nn.Conv2d,
        pool: nn.Module | None,
        num_classes: int,
        *,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        norm_layer: NormLayer | None = None,
        plain: bool = False,
        backend: str = "auto",
        recompute: str = "none",
    ) -> None:
        super().__init__()
        self.configure(backend, recompute)
        if not (isinstance(block, type) and issubclass(block, nn.Module) and hasattr(block, "expansion")):
            raise TypeError(f"block must be the class fused_res.nn.BasicBlock or Bottleneck, got {block!r}")
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes must be a non-negative integer, got {num_classes!r}")
        if plain and zero_init_residual:
            raise ValueError("zero_init_residual needs shortcuts: a plain network would output zeros")
        self.plain = plain
        self.groups = groups
        self.base_width = width_per_group
        self._norm_layer = norm_layer_or_default(norm_layer)

        self.inplanes = stem.out_channels
        self.dilation = 1
        self.conv1 = stem
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = pool
        self._stage_names = tuple(f"layer{index}" for index in range(1, len(stages) + 1))
        for name, stage in zip(self._stage_names, stages, strict=True):
            self.add_module(name, self._make_stage(block, stage))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)
        self._initialize(zero_init_residual)

    def _make_stage(self, block: Block, stage: Stage) -> nn.Sequential:
        stride, first_dilation = stage.stride, self.dilation
        if stage.dilate:
            self.dilation *= stride
            stride = 1
        outplanes = stage.planes * block.expansion
        blocks = []
        for index in range(stage.blocks):
            stride, dilation = (stride, first_dilation) if index == 0 else (1, self.dilation)
            # Created before the block's convolutions, as in torchvision: the order determines the initial weights.
            downsample = None
            if not self.plain and (stride != 1 or self.inplanes != outplanes):
                downsample = nn.Sequential(
                    nn.Conv2d(self.inplanes, outplanes, 1, stride, bias=False), self._norm_layer(outplanes)
                )
            arguments = self.inplanes, stage.planes, stride, downsample, self.groups, self.base_width, dilation
            options: dict[str, Any] = {"shortcut": not self.plain, "backend": self.backend, "recompute": self.recompute}
            blocks.append(block(*arguments, self._norm_layer, **options))
            self.inplanes = outplanes
        return nn.Sequential(*blocks)

    def _initialize(self, zero_init_residual: bool) -> None:
        """Initialize as He et al. 2015, https://arxiv.org/abs/1502.01852, with fan-out scaling."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and module.affine:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, (BasicBlock, Bottleneck)):
                    last = module.get_submodule("bn3" if isinstance(module, Bottleneck) else "bn2")
                    if isinstance(weight := getattr(last, "weight", None), Tensor):
                        nn.init.zeros_(weight)

    def layers(self) -> chain.Layers:
        """Return the modules of the stem."""
        return chain.Layers([(self.conv1, self.bn1, self.relu)], "none", self.maxpool)

    def unsupported_reason(self) -> chain.Unsupported | None:
        return self.layers().find_unsupported()

    def fused_children(self) -> tuple[str, ...]:
        stem = ("conv1", "bn1", "relu")
        return stem if self.maxpool is None else (*stem, "maxpool")

    def forward(self, x: Tensor) -> Tensor:
        output = self.layers().run_fused(x, self.backend, self.recompute, self.tune) if self.fused else None
        return self.stock_forward(x) if output is None else self._classify(output)

    def stock_forward(self, x: Tensor) -> Tensor:
        """Compute the forward with the stem's modules called one by one."""
        x = self.relu(self.bn1(self.conv1(x)))
        return self._classify(x if self.maxpool is None else self.maxpool(x))

    def _classify(self, x: Tensor) -> Tensor:
        for name in self._stage_names:
            x = getattr(self, name)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def extra_repr(self) -> str:
        return f"plain={self.plain}{self.settings_repr()}"
