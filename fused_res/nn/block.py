"""Residual blocks (He et al. 2015, https://arxiv.org/abs/1512.03385) with a fused forward and backward."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fused_res.nn import chain
from fused_res.nn.fusable_module import FusableModule, NormLayer, norm_layer_or_default


class ResidualBlock(FusableModule):
    """Compute ``relu(units(x) + shortcut(x))`` with any number of units, each a convolution, batch norm and ReLU.

    The residual block of He et al. 2015, https://arxiv.org/abs/1512.03385. The last unit's ReLU follows the addition.
    Children are called ``conv1, bn1, conv2, bn2, ...``, ``relu`` and ``downsample``. ``forward(x)`` maps
    ``(N, C, H, W)`` to the block's output ``(N, K, H', W')``.

    Args:
        units: a (convolution, norm) pair of modules for each unit.
        shortcut: ``"identity"``, ``"none"``, or a module that projects the input to the output's shape.
        backend, recompute: see :func:`fused_res.functional.residual_block`.

    Raises:
        ValueError, TypeError: an argument is invalid.
        BackendUnavailableError: the explicitly selected backend cannot run here.
    """

    def __init__(
        self,
        units: Sequence[tuple[nn.Module, nn.Module]],
        shortcut: str | nn.Module = "identity",
        *,
        backend: str = "auto",
        recompute: str = "none",
    ) -> None:
        super().__init__()
        self.configure(backend, recompute)
        try:
            pairs = [tuple(unit) for unit in units]
        except TypeError:
            pairs = []
        if not pairs or any(len(p) != 2 or not all(isinstance(m, nn.Module) for m in p) for p in pairs):
            raise ValueError(f"units must be a sequence of at least one (convolution, norm) pair, got {units!r}")
        if not isinstance(shortcut, nn.Module) and shortcut not in ("none", "identity"):
            raise ValueError(f"shortcut must be 'none', 'identity' or a module, got {shortcut!r}")
        for index, (conv, norm) in enumerate(pairs, start=1):
            self.add_module(f"conv{index}", conv)
            self.add_module(f"bn{index}", norm)
        self.relu = nn.ReLU()
        self.downsample = shortcut if isinstance(shortcut, nn.Module) else None
        self.has_shortcut = shortcut != "none"
        self._unit_names = tuple((f"conv{i}", f"bn{i}") for i in range(1, len(pairs) + 1))

    def layers(self) -> chain.Layers:
        """Return the modules of the block."""
        children = self._modules
        relu = children["relu"]
        units = [(children[conv], children[norm], relu) for conv, norm in self._unit_names]
        downsample = children.get("downsample")
        return chain.Layers(units, downsample or ("identity" if self.has_shortcut else "none"))

    def forward(self, x: Tensor) -> Tensor:
        output = self.layers().run_fused(x, self.backend, self.recompute, self.tune) if self.fused else None
        return self._run_layers(x, _add) if output is None else output

    def stock_forward(self, x: Tensor) -> Tensor:
        """Compute the forward by calling the modules one by one, for recording."""
        return self._run_layers(x, operator.iadd)

    def _run_layers(self, x: Tensor, add: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        children: dict[str, Any] = self._modules
        *first, (last_conv, last_norm) = self._unit_names
        y = x
        for conv, norm in first:
            y = children["relu"](children[norm](children[conv](y)))
        y = children[last_norm](children[last_conv](y))
        if self.downsample is not None:
            y = add(y, self.downsample(x))
        elif self.has_shortcut:
            y = add(y, x)
        return children["relu"](y)

    def extra_repr(self) -> str:
        shortcut = "projection" if self.downsample is not None else "identity" if self.has_shortcut else "none"
        return f"shortcut={shortcut!r}{self.settings_repr()}"

    def unsupported_reason(self) -> chain.Unsupported | None:
        return self.layers().find_unsupported()

    def fused_children(self) -> tuple[str, ...]:
        return tuple(self._modules)


def _add(y: Tensor, shortcut: Tensor) -> Tensor:
    """Return what ``y += shortcut`` computes, also if `y` is from a module with a backward hook, which forbids writes.

    Like the in-place addition of other residual networks, it preserves the main path's dtype under autocast.
    """
    return (y + shortcut).to(y.dtype)


def _conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


def _conv1x1(inplanes: int, planes: int) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 1, bias=False)


class BasicBlock(ResidualBlock):
    """Residual block of two 3x3 convolutions, with the arguments and state_dict keys of torchvision's BasicBlock.

    He et al. 2015, https://arxiv.org/abs/1512.03385, figure 5 left. Maps ``(N, inplanes, H, W)`` to ``(N, planes, H /
    stride, W / stride)``, sizes rounded up.

    Args:
        inplanes, planes: channels of the input, and of both convolutions.
        stride: stride of the first convolution, default 1.
        downsample: module that projects the input to the output's shape; None adds the input itself.
        groups, base_width, dilation: 1, 64 and 1 only, present because :class:`Bottleneck` has them.
        norm_layer: constructs a norm from its number of channels; :class:`torch.nn.BatchNorm2d` if None.
        shortcut: False omits the addition; ``downsample`` must then be None.
        backend, recompute: see :func:`fused_res.functional.residual_block`.

    Raises:
        ValueError, TypeError, NotImplementedError: an argument is invalid.
        BackendUnavailableError: the explicitly selected backend cannot run here.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        *,
        shortcut: bool = True,
        backend: str = "auto",
        recompute: str = "none",
    ) -> None:
        if groups != 1 or base_width != 64:
            raise ValueError(f"BasicBlock supports groups=1 and base_width=64 only, got {groups} and {base_width}")
        if dilation != 1:
            raise NotImplementedError(f"BasicBlock supports dilation=1 only, got {dilation}")
        norm = norm_layer_or_default(norm_layer)
        super().__init__(
            [(_conv3x3(inplanes, planes, stride), norm(planes)), (_conv3x3(planes, planes), norm(planes))],
            _resolve_shortcut(shortcut, downsample),
            backend=backend,
            recompute=recompute,
        )
        self.stride = stride


class Bottleneck(ResidualBlock):
    """Residual block of 1x1, 3x3 and 1x1 convolutions, with arguments and state_dict keys of torchvision's Bottleneck.

    He et al. 2015, https://arxiv.org/abs/1512.03385, figure 5 right; with ``groups`` > 1, Xie et al. 2016,
    https://arxiv.org/abs/1611.05431. The 3x3 convolution has the stride. Maps ``(N, inplanes, H, W)`` to ``(N, 4 *
    planes, H / stride, W / stride)``, sizes rounded up.

    Args:
        inplanes: channels of the input.
        planes: a quarter of the output's channels.
        stride, dilation, groups: stride, dilation and number of groups of the 3x3 convolution, default 1.
        base_width: width of a group for ``planes`` 64: the 3x3 convolution has ``planes * base_width / 64 * groups``
            channels. Default 64.
        downsample, norm_layer, shortcut, backend, recompute: arguments of :class:`BasicBlock`.

    Raises:
        ValueError, TypeError: an argument is invalid.
        BackendUnavailableError: the explicitly selected backend cannot run here.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        *,
        shortcut: bool = True,
        backend: str = "auto",
        recompute: str = "none",
    ) -> None:
        norm = norm_layer_or_default(norm_layer)
        width = int(planes * base_width / 64) * groups
        outplanes = planes * self.expansion
        super().__init__(
            [
                (_conv1x1(inplanes, width), norm(width)),
                (_conv3x3(width, width, stride, groups, dilation), norm(width)),
                (_conv1x1(width, outplanes), norm(outplanes)),
            ],
            _resolve_shortcut(shortcut, downsample),
            backend=backend,
            recompute=recompute,
        )
        self.stride = stride


def _resolve_shortcut(enabled: bool, downsample: nn.Module | None) -> str | nn.Module:
    if not isinstance(enabled, bool):
        raise TypeError(f"shortcut must be True or False, got {enabled!r}")
    if not isinstance(downsample, nn.Module | None):
        raise TypeError(f"downsample must be a torch.nn.Module or None, got {downsample!r}")
    if not enabled and downsample is not None:
        raise ValueError("downsample must be None if shortcut is False")
    if downsample is not None:
        return downsample
    return "identity" if enabled else "none"
