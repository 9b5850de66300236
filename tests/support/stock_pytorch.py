"""Stock PyTorch implementations of the public functions, with the same arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fused_res import BlockSpec

#: The convolution function by the rank of the input.
CONV_BY_RANK = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    activation: str,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
) -> Tensor:
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None and residual_scale is not None and residual_shift is not None:
        scale, shift = (t.to(input.dtype).view(-1, *(1,) * (input.dim() - 2)) for t in (residual_scale, residual_shift))
        residual = residual * scale + shift
    y = y if residual is None else y + residual
    return activate(y, activation, negative_slope)


def activate(y: Tensor, activation: str, negative_slope: float = 0.01) -> Tensor:
    """Compute an activation by name with PyTorch's functions."""
    functions = {"identity": lambda y: y, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}
    return F.leaky_relu(y, negative_slope) if activation == "leaky_relu" else functions[activation](y)


def residual_block(
    x: Tensor,
    spec: BlockSpec,
    tensors: Sequence[Any],
    training: bool | Sequence[bool] = True,
    momentum: float | Sequence[float] = 0.1,
) -> Tensor:
    flags, momenta = spec.per_unit(training, "training"), spec.per_unit(momentum, "momentum")

    def unit(index: int, x: Tensor) -> Tensor:
        u, (weight, bias, *norm, mean, var) = spec.convolutions[index], tensors[6 * index : 6 * index + 6]
        z = CONV_BY_RANK[x.dim()](x, weight, bias, u.stride, u.padding, u.dilation, u.groups)
        return F.batch_norm(z, mean, var, *norm, flags[index], momenta[index], u.eps)

    y = x
    for index, u in enumerate(spec.units):
        y = unit(index, y)
        if index == len(spec.units) - 1 and spec.shortcut != "none":
            y = y + (x if spec.projection is None else unit(index + 1, x))
        y = activate(y, u.activation, u.negative_slope)
    if spec.pool is not None:
        y = F.max_pool2d(y, spec.pool.kernel_size, spec.pool.stride, spec.pool.padding)
    return y


def conv_bias_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
    **options: Any,
) -> Tensor:
    y = CONV_BY_RANK[input.dim()](input, weight, bias, **options)
    y = y if residual is None else y + residual
    return F.relu(y) if activation == "relu" else y
