"""Norm operators with activations that a backend's kernels do not have: the norm by the kernel, then ATen's activation.

The norm's output is written and read once more; values and gradients are rounded to the input's dtype in between, as by
stock PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_res.backends.reference.batch_norm_act import activate
from fused_res.dispatch.backend import Kernels


def with_all_activations(kernels: Kernels) -> Kernels:
    """Return ``kernels`` with operators of batch norm that accept every activation.

    An activation of ``kernels.activations`` is passed to the kernel; any other is computed in pieces, without residual
    and ReLU mask, which support ReLU and identity only.
    """
    own, activations = Kernels(**vars(kernels)), frozenset(kernels.activations)

    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *operands, activation, save_mask, negative_slope = _with_slope(args, 12)
        if activation in activations or save_mask or operands[1] is not None:
            return own.batch_norm_act_forward(*args)
        output, stats, mask = own.batch_norm_act_forward(*operands, "identity", False)
        return activate(output, activation, negative_slope), stats, mask

    def apply(*args: Any) -> tuple[Tensor, Tensor]:
        *operands, activation, save_mask, negative_slope = _with_slope(args, 7)
        if activation in activations or save_mask or operands[2] is not None:
            return own.batch_norm_act_apply(*args)
        output, mask = own.batch_norm_act_apply(*operands, "identity", False)
        return activate(output, activation, negative_slope), mask

    def inference(*args: Any) -> None:
        *operands, activation, negative_slope = _with_slope(args, 10)
        if activation in activations or operands[1] is not None:
            own.batch_norm_act_inference_(*args)
            return
        own.batch_norm_act_inference_(*operands, "identity")
        operands[0].copy_(activate(operands[0], activation, negative_slope))

    def output_grad(
        grad_output: Tensor, input: Tensor, stats: Tensor, relu_mask: Tensor | None, activation: str, slope: float
    ) -> Tensor | None:
        """Return the gradient with respect to the norm's output; None if the kernel computes it."""
        if activation in activations or relu_mask is not None:
            return None
        z, _ = own.batch_norm_act_apply(input, stats, None, None, "identity", False)
        return _ATEN_BACKWARD[activation](grad_output, z, slope)

    def backward(*args: Any) -> tuple[Tensor, ...]:
        grad_output, input, weight, stats, mask, training, activation, output_mask, slope = _with_slope(args, 9)
        dz = output_grad(grad_output, input, stats, mask, activation, slope)
        if dz is None:
            return own.batch_norm_act_backward(*args)
        return own.batch_norm_act_backward(dz, input, weight, stats, None, training, "identity", output_mask)

    def sums(*args: Any) -> Tensor:
        grad_output, input, stats, mask, activation, residual, _, slope = _with_slope(args, 8)
        dz = None if residual is not None else output_grad(grad_output, input, stats, mask, activation, slope)
        if dz is None:
            return own.batch_norm_sums(*args)
        return own.batch_norm_sums(dz, input, stats, None, "identity", None, None)

    def dx(*args: Any) -> Tensor:
        grad_output, input, stats, mask, activation, gradient_sums, count, slope = _with_slope(args, 8)
        dz = output_grad(grad_output, input, stats, mask, activation, slope)
        if dz is None:
            return own.batch_norm_act_dx(*args)
        return own.batch_norm_act_dx(dz, input, stats, None, "identity", gradient_sums, count)

    operators: dict[str, Callable[..., Any]] = {
        "batch_norm_act_forward": forward,
        "batch_norm_act_apply": apply,
        "batch_norm_act_inference_": inference,
        "batch_norm_act_backward": backward,
        "batch_norm_sums": sums,
        "batch_norm_act_dx": dx,
    }
    return Kernels(**(vars(kernels) | operators))


_ATEN_BACKWARD: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "relu6": lambda dy, z, slope: torch.ops.aten.hardtanh_backward(dy, z, 0, 6),
    "leaky_relu": lambda dy, z, slope: torch.ops.aten.leaky_relu_backward(dy, z, slope, False),
    "silu": lambda dy, z, slope: torch.ops.aten.silu_backward(dy, z),
}


def _with_slope(args: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """Return an operator's ``count`` arguments, with the default of ``negative_slope``."""
    return args if len(args) == count else (*args, 0.01)
