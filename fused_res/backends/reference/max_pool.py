"""Max pooling with 1-byte indices and an optional norm-ReLU prologue, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_res import _torch_compat
from fused_res.backends.reference.batch_norm_act import apply_prologue


def max_pool_forward(
    input: Tensor, stats: Tensor | None, relu: bool, kernel_size: list[int], stride: list[int], padding: list[int]
) -> tuple[Tensor, Tensor]:
    x = apply_prologue(input, stats, relu)
    if input.numel() == 0:
        output = F.max_pool2d(x, kernel_size, stride, padding)
        return output, torch.empty_like(output, dtype=torch.uint8)
    output, flat = F.max_pool2d(x, kernel_size, stride, padding, return_indices=True)
    # PyTorch's index is h * W + w in the input. Here it is the position inside the window, which fits into a byte.
    top, left = _window_origins(output, stride, padding)
    window = (flat // input.shape[3] - top) * kernel_size[1] + (flat % input.shape[3] - left)
    return output, _torch_compat.copy_to_new(torch.empty_like(output, dtype=torch.uint8), window)


def max_pool_backward(
    grad_output: Tensor, indices: Tensor, input: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    top, left = _window_origins(grad_output, stride, padding)
    window = indices.long()
    flat = (window // kernel_size[1] + top) * input.shape[3] + window % kernel_size[1] + left
    grad = torch.zeros((*input.shape[:2], input.shape[2] * input.shape[3]), dtype=input.dtype, device=input.device)
    grad.scatter_add_(2, flat.flatten(2), grad_output.flatten(2))
    return _torch_compat.copy_to_new(torch.empty_like(input), grad.view(input.shape))


def _window_origins(output: Tensor, stride: list[int], padding: list[int]) -> tuple[Tensor, Tensor]:
    """Return row and column of the first input position of each output position's window."""
    rows = torch.arange(output.shape[2], device=output.device) * stride[0] - padding[0]
    columns = torch.arange(output.shape[3], device=output.device) * stride[1] - padding[1]
    return rows[:, None], columns
