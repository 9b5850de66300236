"""``batch_norm_act`` as an autograd Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fused_res.backends import registry
from fused_res.backends.reference.batch_norm_act import batch_norm_act as reference
from fused_res.backends.reference.batch_norm_act import unpack_mask
from fused_res.ops import MEAN, VAR


class BatchNormAct(Function):
    """Returns the output and ``stats``; running statistics are the caller's to update."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        eps: float,
        relu: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        kernels = registry.resolve(backend, input.device)
        save_mask = relu and residual is not None
        output, stats, mask = kernels.batch_norm_act_forward(
            input, residual, weight, bias, running_mean, running_var, training, eps, relu, save_mask
        )
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, stats, mask if save_mask else None)
        ctx.options = training, eps, relu, backend
        return output, stats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 10
        input, weight, stats, mask = ctx.saved_tensors
        training, _, relu, backend = ctx.options
        kernels = registry.resolve(backend, input.device)
        wanted = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _differentiable_backward(grad_output, input, weight, stats, mask, ctx.options, wanted, kernels)
        else:
            grads = kernels.batch_norm_act_backward(grad_output, input, weight, stats, mask, training, relu, wanted)
        return *(grad if flag else None for grad, flag in zip(grads, wanted, strict=True)), *(None,) * 6


def _differentiable_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    mask: Tensor | None,
    options: tuple[bool, float, bool, str],
    wanted: tuple[bool, ...],
    kernels: registry.Backend,
) -> tuple[Tensor | None, ...]:
    """The gradients as a graph that can be differentiated again (eager only).

    The ReLU's second derivative is zero, so its mask is a constant and the residual's values are not needed.
    """
    training, eps, relu, _ = options
    dy = grad_output
    if mask is not None:
        dy = dy * unpack_mask(mask, input)
    elif relu:
        with torch.no_grad():
            passes = ~(kernels.batch_norm_act_apply(input, stats, False) <= 0)
        dy = dy * passes
    y, *_ = reference(input, stats[MEAN], stats[VAR], weight, None, None, training, eps, relu=False)
    sources = [
        t if flag and t is not None else None for t, flag in zip((input, weight), wanted[:1] + wanted[2:3], strict=True)
    ]
    asked = [source for source in sources if source is not None]
    made = iter(torch.autograd.grad(y, asked, dy, create_graph=True) if asked else ())
    grad_input, grad_weight = (None if source is None else next(made) for source in sources)
    reduced = [0, *range(2, input.dim())]
    grad_bias = dy.to(stats.dtype).sum(reduced)
    return grad_input, dy, grad_weight, grad_bias
