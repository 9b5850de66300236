"""What the ImageNet and the CIFAR residual networks have in common: stages of blocks, initialisation, forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_res.nn import BasicBlock, Bottleneck, chain
from fused_res.nn.configured import Configured, NormLayer, norm_layer_or_default

Block = type[BasicBlock] | type[Bottleneck]


@dataclass(frozen=True)
class Stage:
    """A run of blocks; the first of them has the stride, or keeps the size and dilates those behind it."""

    planes: int
    blocks: int
    stride: int = 1
    dilate: bool = False


class ResidualNetwork(Configured):
    """Stem, stages, mean over space, linear classifier.

    Children are made in torchvision's order, which both the state_dict's order and the random numbers of the
    initialisation depend on.

    Args:
        block: :class:`fused_res.nn.BasicBlock` or :class:`fused_res.nn.Bottleneck`.
        stages: what ``layer1``, ``layer2``, ... consist of.
        stem: the first convolution.
        pool: follows the stem's ReLU.
        num_classes: outputs of the classifier.
        zero_init_residual: start with every block's last norm at zero, so that blocks start as their shortcut (Goyal
            et al. 2017, https://arxiv.org/abs/1706.02677).
        groups, width_per_group: of the bottlenecks' 3x3 convolution.
        norm_layer: makes a norm from its number of channels; :class:`torch.nn.BatchNorm2d` if None.
        plain: leave out all shortcuts, and so all projections.
        backend, recompute: see :func:`fused_res.functional.residual_block`.

    Raises:
        ValueError, TypeError: an argument does not fit.
        BackendUnavailableError: the backend was asked for by name and cannot run here.
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
            raise TypeError(f"block must be fused_res.nn.BasicBlock or Bottleneck, the class, got {block!r}")
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes must be a whole number, 0 or more, got {num_classes!r}")
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
        self._initialise(zero_init_residual)

    def _make_stage(self, block: Block, stage: Stage) -> nn.Sequential:
        stride, first_dilation = stage.stride, self.dilation
        if stage.dilate:
            self.dilation *= stride
            stride = 1
        outplanes = stage.planes * block.expansion
        blocks = []
        for index in range(stage.blocks):
            stride, dilation = (stride, first_dilation) if index == 0 else (1, self.dilation)
            # Before the block's own convolutions: the random numbers are drawn in this order.
            downsample = None
            if not self.plain and (stride != 1 or self.inplanes != outplanes):
                downsample = nn.Sequential(
                    nn.Conv2d(self.inplanes, outplanes, 1, stride, bias=False), self._norm_layer(outplanes)
                )
            shape = self.inplanes, stage.planes, stride, downsample, self.groups, self.base_width, dilation
            how: dict[str, Any] = {"shortcut": not self.plain, "backend": self.backend, "recompute": self.recompute}
            blocks.append(block(*shape, self._norm_layer, **how))
            self.inplanes = outplanes
        return nn.Sequential(*blocks)

    def _initialise(self, zero_init_residual: bool) -> None:
        """He et al. 2015, https://arxiv.org/abs/1502.01852, by the number of outputs."""
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

    def _stem_units(self) -> list[chain.Unit]:
        return [(self.conv1, self.bn1, self.relu)]

    def _stem(self, x: Tensor) -> Tensor:
        units = self._stem_units()
        if self.fused:
            output = chain.run(x, units, "none", self.maxpool, self.backend, self.recompute, self.tune)
            if output is not None:
                return output
        return chain.run_stock(x, units, "none", self.maxpool)

    def refusal(self) -> chain.Refusal | None:
        return chain.refusal_of(self._stem_units(), "none", self.maxpool)

    def covered(self) -> tuple[str, ...]:
        stem = ("conv1", "bn1", "relu")
        return stem if self.maxpool is None else (*stem, "maxpool")

    def forward(self, x: Tensor) -> Tensor:
        x = self._stem(x)
        for name in self._stage_names:
            x = getattr(self, name)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def extra_repr(self) -> str:
        return f"plain={self.plain}{self.settings_repr()}"
