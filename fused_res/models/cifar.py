"""The small residual networks of He et al. 2015 (https://arxiv.org/abs/1512.03385, section 4.2) for 32x32
images."""

from __future__ import annotations

from typing import Any

from torch import nn

from fused_res.models.network import ResidualNetwork, Stage
from fused_res.nn import BasicBlock
from fused_res.nn.configured import NormLayer


class CifarResNet(ResidualNetwork):
    """A residual network of ``depth`` = 6n + 2 weighted layers for small images.

    A 3x3 convolution, three stages of n basic blocks with ``width``, 2 and 4 times ``width`` channels at full, half
    and quarter size, the mean over space, a linear classifier: ``(N, 3, H, W)`` to ``(N, num_classes)``. Where the
    shape changes, the shortcut is a projection (a 1x1 convolution and its norm: the paper's option B; its own CIFAR
    networks pad with zeros instead, option A, which has a few thousand parameters less).

    Args:
        depth: 20, 32, 44, 56 and 110 in the paper.
        num_classes: outputs of the classifier.
        plain: the twin without shortcuts and projections that the paper compares with.
        width: channels of the first stage.
        zero_init_residual: start with every block's last norm at zero, so that blocks start as their shortcut.
        norm_layer: makes a norm from its number of channels; :class:`torch.nn.BatchNorm2d` if None.
        backend, recompute: see :func:`fused_res.functional.residual_block`.

    Raises:
        ValueError, TypeError: an argument does not fit.
        BackendUnavailableError: the backend was asked for by name and cannot run here.
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
            raise ValueError(f"width must be a whole number of at least 1, got {width!r}")
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
    """:class:`CifarResNet`, of whose further arguments ``kwargs`` are; ``cifar_resnet(20)`` is the paper's smallest."""
    return CifarResNet(depth, num_classes, plain, width, **kwargs)
