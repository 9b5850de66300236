"""The CIFAR residual networks of He et al. 2015 (https://arxiv.org/abs/1512.03385, section 4.2), for 32x32 images."""

from __future__ import annotations

from typing import Any

from torch import nn

from fused_res.models.network import ResidualNetwork, Stage
from fused_res.nn import BasicBlock
from fused_res.nn.fusable_module import NormLayer


class CifarResNet(ResidualNetwork):
    """A residual network of ``depth`` = 6n + 2 weighted layers for small images.

    A 3x3 convolution, three stages of n basic blocks with ``width``, 2 and 4 times ``width`` channels at full, half
    and quarter resolution, global average pooling and a linear classifier: ``(N, 3, H, W)`` to ``(N, num_classes)``.
    Where the shape changes, the shortcut is a projection (a 1x1 convolution and a norm, the paper's option B). The
    paper's CIFAR networks use option A, zero padding, which has a few thousand fewer parameters.

    Args:
        depth: number of weighted layers, 6n + 2; 20, 32, 44, 56 and 110 in the paper.
        num_classes: number of outputs of the classifier, default 10.
        plain: True omits all shortcuts and projections, as in the paper's plain networks. Default False.
        width: channels of the first stage, default 16.
        zero_init_residual: initialize every block's last norm weight to zero, so that every block initially
            outputs ``relu(shortcut(x))``.
        norm_layer: constructs a norm from its number of channels; :class:`torch.nn.BatchNorm2d` if None.
        backend, recompute: see :func:`fused_res.functional.residual_block`.

    Raises:
        ValueError, TypeError: an argument is invalid.
        BackendUnavailableError: the explicitly selected backend cannot run here.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        plain: bool = False,
        width: int = 16,
        *,
        zero_init_residual: bool = False,
        norm_layer: NormLayer | None = None,
        backend: str = "auto",
        recompute: str = "none",
    ) -> None:
        blocks, rest = divmod(depth - 2, 6) if isinstance(depth, int) else (0, 0)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 2 with n >= 1 (20, 32, 44, 56, 110, ...), got {depth!r}")
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"width must be a positive integer, got {width!r}")
        super().__init__(
            BasicBlock,
            [Stage(width, blocks), Stage(2 * width, blocks, 2), Stage(4 * width, blocks, 2)],
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            None,
            num_classes,
            zero_init_residual=zero_init_residual,
            norm_layer=norm_layer,
            plain=plain,
            backend=backend,
            recompute=recompute,
        )
        self.depth = depth

    def extra_repr(self) -> str:
        return f"depth={self.depth}, {super().extra_repr()}"


def cifar_resnet(depth: int, num_classes: int = 10, plain: bool = False, width: int = 16, **kwargs: Any) -> CifarResNet:
    """Return a :class:`CifarResNet`; ``kwargs`` are its remaining arguments. The paper's smallest has depth 20."""
    return CifarResNet(depth, num_classes, plain, width, **kwargs)
