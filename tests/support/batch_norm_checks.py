"""batch_norm_act under the precision contract: float64 says what is right, stock PyTorch how far off one may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fused_res import ops
from fused_res.backends.reference.batch_norm_act import batch_norm_act as definition
from fused_res.functional import batch_norm_act
from fused_res.testing import assert_as_exact_as
from tests.support import stock_pytorch as stock

Tensors = dict[str, Tensor | None]


def gradients(output: Tensor, tensors: Tensors, grad: Tensor) -> dict[str, Tensor]:
    wanted = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
    if not wanted:
        return {}
    return dict(zip(wanted, torch.autograd.grad(output, list(wanted.values()), grad), strict=True))


def exact(
    tensors: Tensors,
    running: Tensors,
    grad: Tensor,
    training: bool,
    mask: Tensor | None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output and gradients in float64, for a given ReLU mask (None: no ReLU)."""
    wide: Any = {k: None if t is None else t.detach().double().requires_grad_() for k, t in tensors.items()}
    state = {k: None if t is None else t.double() for k, t in running.items()}
    y, *_ = definition(**wide, **state, training=training, eps=eps, relu=False)
    pre = y.detach()
    y = y if mask is None else y * mask
    return pre, y.detach(), gradients(y, wide, grad.double())


def gate(pre: Tensor, y: Tensor) -> Tensor:
    """What passes the ReLU: within rounding of zero each side may decide as it likes, and is judged by its own mask."""
    largest = pre.abs().max() if pre.numel() else 0.0
    near = pre.abs() <= 64 * torch.finfo(y.dtype).eps * (1 + largest)
    return torch.where(near, y.detach() > 0, pre > 0).double()


def rounding_of_sums(
    x: Tensor, running: Tensors, training: bool, grad: Tensor, grad_bias: Tensor, eps: float = 1e-5
) -> float:
    """What a channel's sums may be off by, whoever adds them: M terms as large as the gradients, each rounded; and in
    `grad weight`, the saved mean, which is rounded to the statistics' dtype, times the sum of the gradients. In one
    channel or a few, stock may by luck be far better than that."""
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


def copies(tensors: Tensors, wanted: Iterable[str]) -> Tensors:
    """The same tensors in the same memory layout, of which some learn."""
    return {k: None if t is None else t.detach().requires_grad_(k in wanted) for k, t in tensors.items()}


def check(
    tensors: Tensors,
    running: Tensors,
    grad: Tensor,
    training: bool,
    activation: str,
    backend: str,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    wanted: Iterable[str] | None = None,
) -> None:
    """Output, the gradients of what is ``wanted`` (all of it), and running statistics, which are not written to here.

    ``tensors``: input, residual, weight, bias and, where it has them, residual_scale and residual_shift.
    """
    x = tensors["input"]
    assert x is not None
    wanted = set(tensors if wanted is None else wanted)
    # Stock 2.13 reads strided running statistics as if they were dense, in the backward of an evaluation.
    dense = {k: t if t is None or t.dim() > 1 else t.contiguous() for k, t in (tensors | running).items()}
    functions: list[tuple[Callable[..., Tensor], Tensors, Tensors]] = [
        (lambda **kw: batch_norm_act(**kw, backend=backend), tensors, running),
        (stock.batch_norm_act, {k: dense[k] for k in tensors}, {k: dense[k] for k in running}),
    ]
    given = {k: t.detach().clone() for k, t in (tensors | {"grad": grad}).items() if t is not None}
    results = []
    for function, its_tensors, its_running in functions:
        mine = copies(its_tensors, wanted)
        state = {k: None if t is None else clone(t) for k, t in its_running.items()}
        y = function(**mine, **state, training=training, activation=activation, momentum=momentum, eps=eps)
        y_gradients = gradients(y, mine, grad)
        for name, value in given.items():
            now = (tensors | {"grad": grad})[name]
            assert now is not None and same_bits(now, value), f"{name} has been written"
        mask = None
        if activation == "relu":
            mask = gate(exact(tensors, running, grad, training, None, eps)[0], y)
        right = exact(tensors, running, grad, training, mask, eps)
        results.append((y.detach(), y_gradients, state, right))
    (ours, our_grads, our_state, (_, y, grads)), (theirs, their_grads, their_state, (_, y_stock, grads_stock)) = results
    assert ours.stride() == torch.empty_like(x).stride()
    assert our_grads.keys() == their_grads.keys()
    if x.numel() == 0:  # stock's gradients of parameters are NaN or arbitrary then
        assert all(not t.isnan().any() and not t.any() for t in our_grads.values())
        assert all(t is None or torch.equal(t, our_state[k]) for k, t in running.items())
        return
    assert_as_exact_as("output", ours, theirs, y, y_stock)
    for name in our_grads:
        floor = 0.0
        if name in ("weight", "bias", "residual_shift"):
            floor = rounding_of_sums(x, running, training, grad, grads["bias" if "bias" in grads else name], eps)
        if name == "residual_scale":  # a sum of products as large as the residual
            residual = tensors["residual"]
            assert residual is not None
            values, largest = x.numel() / x.shape[1], residual.double().abs().max().item()
            floor = torch.finfo(ops.stats_dtype(x.dtype)).eps * values**0.5 * largest
        assert_as_exact_as(f"grad {name}", our_grads[name], their_grads[name], grads[name], grads_stock[name], floor)
    check_running(x, running, our_state, their_state, training, momentum)


def check_running(
    x: Tensor, running: Tensors, ours: Tensors, theirs: Tensors, training: bool, momentum: float = 0.1
) -> None:
    for name, value in running.items():
        mine, other = ours[name], theirs[name]
        if value is None or mine is None or other is None:
            continue
        expected, floor = value.double(), 0.0
        if training and x.numel():
            var, mean = torch.var_mean(x.double(), [0, *range(2, x.dim())])
            expected = (1 - momentum) * expected + momentum * (mean if name == "running_mean" else var)
            if name == "running_mean":
                # A mean is a sum of values as large as the deviation, which may cancel.
                floor = momentum * torch.finfo(ops.stats_dtype(x.dtype)).eps * var.max().sqrt().item()
        assert_as_exact_as(name, mine, other, expected, floor=floor)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN included."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def clone(tensor: Tensor) -> Tensor:
    """A copy that lies in its memory as the tensor does in its own."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    copy = tensor.new_zeros(elements).as_strided(tensor.shape, tensor.stride())
    return copy.copy_(tensor)
