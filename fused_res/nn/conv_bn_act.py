"""Fused convolution, batch norm and activation as one layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fused_res.nn import chain
from fused_res.nn.fusable_module import FusableModule, NormLayer, norm_layer_or_default
from fused_res.ops.checks import Activation, check_activation

_ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
}


class ConvBNAct2d(FusableModule):
    """Compute ``activation(norm(conv(x)))`` with the children ``conv``, ``bn`` and ``act``.

    ``forward(x)`` maps ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: arguments of
            :class:`torch.nn.Conv2d`. The default ``padding``, None, preserves the spatial size for odd kernels and
            stride 1.
        activation: ``"identity"``, ``"relu"``, ``"relu6"``, ``"leaky_relu"`` (with slope 0.01) or ``"silu"``.
        norm_layer: constructs the norm from its number of channels; :class:`torch.nn.BatchNorm2d` if None.
        backend, recompute: see :func:`fused_res.functional.residual_block`.

    Raises:
        ValueError, TypeError: an argument is invalid.
        BackendUnavailableError: the explicitly selected backend cannot run here.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        activation: Activation = "relu",
        norm_layer: NormLayer | None = None,
        backend: str = "auto",
        recompute: str = "none",
    ) -> None:
        super().__init__()
        self.configure(backend, recompute)
        check_activation(activation)
        if padding is None:
            kernel, dilations = _pair(kernel_size, "kernel_size"), _pair(dilation, "dilation")
            padding = (dilations[0] * (kernel[0] - 1) // 2, dilations[1] * (kernel[1] - 1) // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.bn = norm_layer_or_default(norm_layer)(out_channels)
        self.act = _ACTIVATION_MODULES[activation]()

    def forward(self, x: Tensor) -> Tensor:
        output = self.layers().run_fused(x, self.backend, self.recompute, self.tune) if self.fused else None
        return self.stock_forward(x) if output is None else output

    def stock_forward(self, x: Tensor) -> Tensor:
        """Compute the forward by calling the modules one by one."""
        return self.act(self.bn(self.conv(x)))

    def layers(self) -> chain.Layers:
        """Return the modules of the unit."""
        children = self._modules
        return chain.Layers([(children["conv"], children["bn"], children["act"])])

    def unsupported_reason(self) -> chain.Unsupported | None:
        return self.layers().find_unsupported()

    def fused_children(self) -> tuple[str, ...]:
        return tuple(self._modules)

    def extra_repr(self) -> str:
        return self.settings_repr().removeprefix(", ")


def _pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(one, int) for one in pair):
        raise TypeError(f"{name} must be an integer or a pair of integers, got {value!r}")
    return pair
