"""ResNet, ResNeXt and Wide ResNet for ImageNet, with torchvision's signatures and state_dict keys.

ResNet: He et al. 2015, https://arxiv.org/abs/1512.03385, with a bottleneck's stride at its 3x3 convolution (the variant
known as v1.5). ResNeXt: Xie et al. 2016, https://arxiv.org/abs/1611.05431. Wide ResNet: Zagoruyko & Komodakis 2016,
https://arxiv.org/abs/1605.07146.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fused_res.models.network import Block, ResidualNetwork, Stage
from fused_res.nn import BasicBlock, Bottleneck
from fused_res.nn.fusable_module import NormLayer


class ResNet(ResidualNetwork):
    """ResNet for images ``(N, 3, H, W)``, designed for 224x224; returns logits ``(N, num_classes)``.

    Has torchvision's arguments in torchvision's order, then ``plain``, ``backend`` and ``recompute``; torchvision's
    state_dict keys; and, with the same seed, torchvision's initial weights.

    Args:
        block: the class :class:`fused_res.nn.BasicBlock` or :class:`fused_res.nn.Bottleneck`.
        layers: number of blocks of each of the four stages.
        num_classes: number of outputs of the classifier, default 1000.
        zero_init_residual: initialize every block's last norm weight to zero, so that every block initially
            outputs ``relu(shortcut(x))``.
        groups, width_per_group: number and width of the groups of the bottlenecks' 3x3 convolution, default 1 and 64.
        replace_stride_with_dilation: three bools, for ``layer2`` to ``layer4``: preserve the resolution and dilate
            instead. Default None: no dilation.
        norm_layer: constructs a norm from its number of channels; :class:`torch.nn.BatchNorm2d` if None.
        plain: omit all shortcuts, including projections, as in the plain networks that He et al. compare with.
        backend, recompute: see :func:`fused_res.functional.residual_block`.

    Raises:
        ValueError, TypeError, NotImplementedError: an argument is invalid.
        BackendUnavailableError: the explicitly selected backend cannot run here.
    """

    def __init__(
        self,
        block: Block,
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
        *,
        plain: bool = False,
        backend: str = "auto",
        recompute: str = "none",
    ) -> None:
        dilate = replace_stride_with_dilation or (False, False, False)
        if not isinstance(dilate, (tuple, list)) or len(dilate) != 3:
            raise ValueError(
                "replace_stride_with_dilation must be None or a sequence of one bool for each of layer2, layer3 and "
                f"layer4, got {replace_stride_with_dilation}"
            )
        if not isinstance(layers, (tuple, list)) or [isinstance(n, int) and n > 0 for n in layers] != [True] * 4:
            raise ValueError(f"layers must be the number of blocks of each of 4 stages, got {layers!r}")
        super().__init__(
            block,
            [Stage(64 << i, layers[i], 1 if i == 0 else 2, i > 0 and dilate[i - 1]) for i in range(4)],
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            nn.MaxPool2d(3, stride=2, padding=1),
            num_classes,
            zero_init_residual=zero_init_residual,
            groups=groups,
            width_per_group=width_per_group,
            norm_layer=norm_layer,
            plain=plain,
            backend=backend,
            recompute=recompute,
        )


def _build(block: Block, layers: Sequence[int], weights: Any, progress: bool, kwargs: dict[str, Any]) -> ResNet:
    if weights is None:
        return ResNet(block, layers, **kwargs)
    if not hasattr(weights, "get_state_dict"):
        raise ValueError(
            "weights must be None or a member of one of torchvision's weights enums, such as "
            f"torchvision.models.ResNet50_Weights.DEFAULT, got {weights!r}; "
            "for another checkpoint use load_state_dict"
        )
    if kwargs.get("plain"):
        raise ValueError("weights must be None for a plain network: torchvision's networks all have shortcuts")
    classes = len(weights.meta["categories"])
    if kwargs.setdefault("num_classes", classes) != classes:
        raise ValueError(f"num_classes must be {classes} for these weights, got {kwargs['num_classes']}")
    model = ResNet(block, layers, **kwargs)
    model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
    return model


def resnet18(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return a ResNet-18 (He et al. 2015, https://arxiv.org/abs/1512.03385).

    Args:
        weights: pretrained weights, a member of one of torchvision's weights enums such as
            ``torchvision.models.ResNet18_Weights.DEFAULT``, downloaded unless cached by torch.hub. Default None: random
            initialization.
        progress: show a progress bar of the download, default True.
        kwargs: arguments of :class:`ResNet` other than ``block`` and ``layers``.

    Returns:
        The network, in training mode.

    Raises:
        ValueError, TypeError, NotImplementedError: an argument is invalid.
        BackendUnavailableError: the explicitly selected backend cannot run here.
    """
    return _build(BasicBlock, (2, 2, 2, 2), weights, progress, kwargs)


def resnet34(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return a ResNet-34; arguments of :func:`resnet18`."""
    return _build(BasicBlock, (3, 4, 6, 3), weights, progress, kwargs)


def resnet50(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return a ResNet-50; arguments of :func:`resnet18`."""
    return _build(Bottleneck, (3, 4, 6, 3), weights, progress, kwargs)


def resnet101(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return a ResNet-101; arguments of :func:`resnet18`."""
    return _build(Bottleneck, (3, 4, 23, 3), weights, progress, kwargs)


def resnet152(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return a ResNet-152; arguments of :func:`resnet18`."""
    return _build(Bottleneck, (3, 8, 36, 3), weights, progress, kwargs)


def resnext50_32x4d(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return a ResNeXt-50 with 32 groups of 4 channels (Xie et al. 2016, https://arxiv.org/abs/1611.05431).

    Arguments are those of :func:`resnet18`.
    """
    return _build(Bottleneck, (3, 4, 6, 3), weights, progress, {"groups": 32, "width_per_group": 4, **kwargs})


def wide_resnet50_2(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return a Wide ResNet-50-2, whose 3x3 convolutions have twice the channels of ResNet-50's (Zagoruyko & Komodakis
    2016, https://arxiv.org/abs/1605.07146).

    Arguments are those of :func:`resnet18`.
    """
    return _build(Bottleneck, (3, 4, 6, 3), weights, progress, {"width_per_group": 128, **kwargs})
