"""Check batch_norm_act by the accuracy criterion: compared with float64, errors may be twice stock PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fused_res import ops
from fused_res.backends.reference.batch_norm_act import batch_norm_act as reference_batch_norm_act
from fused_res.functional import batch_norm_act
from fused_res.testing import assert_within_stock_error
from tests.support import stock_pytorch as stock

Tensors = dict[str, Tensor | None]


def gradients(output: Tensor, tensors: Tensors, grad: Tensor) -> dict[str, Tensor]:
    """Return the gradients of all `tensors` that require grad, by name, for the output gradient `grad`."""
    differentiable = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
    if not differentiable:
        return {}
    return dict(zip(differentiable, torch.autograd.grad(output, list(differentiable.values()), grad), strict=True))


def float64_reference(
    tensors: Tensors,
    running: Tensors,
    grad: Tensor,
    training: bool,
    mask: Tensor | None,
    eps: float = 1e-5,
    **activation: Any,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Compute the reference in float64.

    Args:
        tensors: input, residual, weight, bias and, for a normalized residual, residual_scale and residual_shift.
        running: running_mean and running_var.
        grad: gradient of the output.
        training: whether to normalize with batch statistics.
        mask: ReLU mask, or None for no ReLU.
        eps: epsilon of the norm.
        activation: name and negative slope of an activation other than ReLU; default none.

    Returns:
        The output before the ReLU, the output, and the gradients by name.
    """
    wide: Any = {k: None if t is None else t.detach().double().requires_grad_() for k, t in tensors.items()}
    state = {k: None if t is None else t.double() for k, t in running.items()}
    y, *_ = reference_batch_norm_act(**wide, **state, training=training, eps=eps, activation="identity")
    pre = y.detach()
    y = y if mask is None else y * mask
    y = stock.activate(y, **activation) if activation else y
    return pre, y.detach(), gradients(y, wide, grad.double())


def expected_relu_mask(pre: Tensor, y: Tensor) -> Tensor:
    """Return the ReLU mask that the output `y` should have, as float64 0 or 1.

    Within rounding of zero either value is correct, and the mask is taken from `y` itself.

    Args:
        pre: float64 reference of the output before the ReLU.
        y: the output under test.
    """
    largest = pre.abs().max() if pre.numel() else 0.0
    near = pre.abs() <= 64 * torch.finfo(y.dtype).eps * (1 + largest)
    return torch.where(near, y.detach() > 0, pre > 0).double()


def reduction_error_bound(
    x: Tensor, running: Tensors, training: bool, grad: Tensor, grad_bias: Tensor, eps: float = 1e-5
) -> float:
    """Return a bound on the rounding error of a channel's reductions that is valid for any summation order.

    A reduction adds N*H*W rounded terms of the size of the gradients; `grad weight` also has the rounding error of the
    saved mean (in the statistics' dtype) times the sum of the gradients. With one channel or a few, stock PyTorch's
    error can by chance be far below this bound.
    """
    dims = [0, *range(2, x.dim())]
    wide = x.double()
    mean, var = running["running_mean"], running["running_var"]
    if training:
        var, mean = torch.var_mean(wide, dims, correction=0)
    assert mean is not None and var is not None
    size = max(float(grad.double().square().mean().sqrt()), torch.finfo(ops.stats_dtype(x.dtype)).smallest_normal)
    terms = (x.numel() / x.shape[1]) ** 0.5 * size
    rounded = (mean.double() / (var.double() + eps).sqrt() * grad_bias).abs().max().item()
    return torch.finfo(ops.stats_dtype(x.dtype)).eps * (terms + rounded)


def detach_with_grad(tensors: Tensors, grad_names: Iterable[str]) -> Tensors:
    """Return detached aliases of `tensors`, of which those in `grad_names` require grad."""
    return {k: None if t is None else t.detach().requires_grad_(k in grad_names) for k, t in tensors.items()}


def check_batch_norm_act(
    tensors: Tensors,
    running: Tensors,
    grad: Tensor,
    training: bool,
    activation: str,
    backend: str,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
    grad_names: Iterable[str] | None = None,
) -> None:
    """Check output, gradients and updated running statistics of batch_norm_act on a backend.

    No argument is written to: the running statistics are copied first.

    Args:
        tensors: input, residual, weight, bias and, for a normalized residual, residual_scale and residual_shift.
        running: running_mean and running_var.
        grad: gradient of the output.
        training: whether to normalize with batch statistics.
        activation: name of the activation. With ReLU6 and leaky ReLU, `grad` must be zero near the kinks, where either
            derivative is correct.
        backend: name of the backend.
        momentum, eps: parameters of the norm.
        negative_slope: slope of a leaky ReLU.
        grad_names: names of the tensors that require grad; default all.
    """
    x = tensors["input"]
    assert x is not None
    grad_names = set(tensors if grad_names is None else grad_names)
    # PyTorch 2.13 reads strided running statistics as if they were contiguous, in the backward pass of evaluation mode.
    dense = {k: t if t is None or t.dim() > 1 else t.contiguous() for k, t in (tensors | running).items()}
    functions: list[tuple[Callable[..., Tensor], Tensors, Tensors]] = [
        (lambda **kw: batch_norm_act(**kw, backend=backend), tensors, running),
        (stock.batch_norm_act, {k: dense[k] for k in tensors}, {k: dense[k] for k in running}),
    ]
    given = {k: t.detach().clone() for k, t in (tensors | {"grad": grad}).items() if t is not None}
    results = []
    for function, function_tensors, function_running in functions:
        leaves = detach_with_grad(function_tensors, grad_names)
        state = {k: None if t is None else clone_strided(t) for k, t in function_running.items()}
        options = {"activation": activation, "negative_slope": negative_slope}
        y = function(**leaves, **state, training=training, momentum=momentum, eps=eps, **options)
        y_gradients = gradients(y, leaves, grad)
        for name, value in given.items():
            now = (tensors | {"grad": grad})[name]
            assert now is not None and equal_including_nan(now, value), f"{name} was modified"
        mask = None
        if activation == "relu":
            mask = expected_relu_mask(float64_reference(tensors, running, grad, training, None, eps)[0], y)
        smooth = {} if activation == "relu" else options
        reference = float64_reference(tensors, running, grad, training, mask, eps, **smooth)
        results.append((y.detach(), y_gradients, state, reference))
    # Each has a reference of its own: the ReLU masks differ where the values before the ReLU are zero up to rounding.
    (actual, actual_grads, actual_state, (_, y, grads)), (stock_y, stock_grads, stock_state, (_, y_2, grads_2)) = (
        results
    )
    assert actual.stride() == torch.empty_like(x).stride()
    assert actual_grads.keys() == stock_grads.keys()
    if x.numel() == 0:  # stock PyTorch's parameter gradients are NaN or arbitrary for an empty batch
        assert all(not t.isnan().any() and not t.any() for t in actual_grads.values())
        assert all(t is None or torch.equal(t, actual_state[k]) for k, t in running.items())
        return
    assert_within_stock_error("output", actual, stock_y, y, y_2)
    for name in actual_grads:
        floor = 0.0
        if name in ("weight", "bias", "residual_shift"):
            floor = reduction_error_bound(x, running, training, grad, grads["bias" if "bias" in grads else name], eps)
        if name == "residual_scale":  # a reduction of terms as large as the residual
            residual = tensors["residual"]
            assert residual is not None
            values, largest = x.numel() / x.shape[1], residual.double().abs().max().item()
            floor = torch.finfo(ops.stats_dtype(x.dtype)).eps * values**0.5 * largest
        assert_within_stock_error(
            f"grad {name}", actual_grads[name], stock_grads[name], grads[name], grads_2[name], floor
        )
    check_running_stats(x, running, actual_state, stock_state, training, momentum)


def check_running_stats(
    x: Tensor, running: Tensors, actual_state: Tensors, stock_state: Tensors, training: bool, momentum: float = 0.1
) -> None:
    """Check updated running statistics; `running` are their values before the update."""
    for name, value in running.items():
        actual, other = actual_state[name], stock_state[name]
        if value is None or actual is None or other is None:
            continue
        expected, floor = value.double(), 0.0
        if training and x.numel():
            var, mean = torch.var_mean(x.double(), [0, *range(2, x.dim())])
            expected = (1 - momentum) * expected + momentum * (mean if name == "running_mean" else var)
            if name == "running_mean":
                # A mean is a sum of terms as large as the standard deviation, which can cancel.
                floor = momentum * torch.finfo(ops.stats_dtype(x.dtype)).eps * var.max().sqrt().item()
        assert_within_stock_error(name, actual, other, expected, floor=floor)


def equal_including_nan(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal, with NaN equal to NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def clone_strided(tensor: Tensor) -> Tensor:
    """Return a copy with the same strides, overlapping ones included."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    copy = tensor.new_zeros(elements).as_strided(tensor.shape, tensor.stride())
    return copy.copy_(tensor)
