"""AOT manifest: the operator calls of ResNet-18 and ResNet-50, on meta tensors, for ahead-of-time compilation.

The launchers select tiles, warps and stages as they do on a GPU, so :mod:`fused_res.backends.triton.aot` compiles the
kernels that the networks run at batch sizes 256 and 1, and further variants: contiguous memory, float16 and float32,
unaligned sizes, 64-bit offsets and the remaining flags. Each call listed here compiles to a distinct variant: it
differs in flags, tile size, dtype or offset width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fused_res.backends import implicit_gemm
from fused_res.backends.triton.aot import KernelReport, compile_launches
from fused_res.backends.triton.batch_norm_act import (
    add_masked_,
    batch_norm_act_apply,
    batch_norm_act_backward,
    batch_norm_act_backward_pair,
    batch_norm_act_forward,
    batch_norm_act_inference_,
    batch_norm_stats,
    update_running_stats,
)
from fused_res.backends.triton.conv_bias_act import conv_bias_act
from fused_res.backends.triton.conv_bn_stats import conv_bn_stats
from fused_res.backends.triton.conv_dgrad import conv_dgrad
from fused_res.backends.triton.conv_wgrad import conv_wgrad
from fused_res.backends.triton.max_pool import max_pool_backward, max_pool_forward
from fused_res.ops import stats_dtype
from fused_res.ops.checks import ACTIVATIONS, RELU_OR_IDENTITY
from fused_res.ops.memory_format import conv_output_shape, relu_mask_shape

_HALF, _SINGLE = torch.float16, torch.float32
_EPS = 1e-5
#: Batch size at which 256 x 56 x 56 activations exceed 2^31 elements and offsets need 64 bits.
_INT64_BATCH = 2752


def _meta_nchw(
    batch: int, channels: int, size: int, dtype: torch.dtype = torch.bfloat16, channels_last: bool = True
) -> Tensor:
    """Return a meta tensor ``(batch, channels, size, size)``."""
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((batch, channels, size, size), dtype=dtype, device="meta", memory_format=format)


def _stats(x: Tensor) -> Tensor:
    return x.new_empty((5, x.shape[1]), dtype=stats_dtype(x.dtype))


def _mask(x: Tensor) -> Tensor:
    return x.new_empty(relu_mask_shape(x), dtype=torch.uint8)


def _training_norm(x: Tensor) -> None:
    """Call the norms of a training step: alone, and followed by the addition of an identity shortcut."""
    stats, vector = _stats(x), _stats(x)[0]
    batch_norm_act_forward(x, None, None, vector, vector, None, None, True, _EPS, "relu", False)
    batch_norm_act_apply(x, stats, x, None, "relu", True)
    batch_norm_act_backward(x, x, vector, stats, None, True, "relu", [True, False, True, True])
    batch_norm_act_backward(x, x, vector, stats, _mask(x), True, "relu", [True] * 4)
    for norms in (1, 2, 3, 4):
        update_running_stats([vector] * norms, [vector] * norms, [stats] * norms, [0.1] * norms)


def _projection(x: Tensor) -> None:
    """Call the pair of batch norms of a block with a projection shortcut, whose outputs are added."""
    stats, vector = _stats(x), _stats(x)[0]
    batch_norm_act_apply(x, stats, x, stats, "relu", True)
    batch_norm_act_backward_pair(x, x, vector, stats, x, vector, stats, _mask(x), True, True, [True] * 6)
    add_masked_(x, x, _mask(x))


def _inference(x: Tensor) -> None:
    stats, running = _stats(x), [_stats(x)[0]] * 4
    batch_norm_act_inference_(x, None, None, *running, _EPS, "relu")
    batch_norm_act_inference_(x, x, None, *running, _EPS, "relu")
    batch_norm_act_inference_(x, x, stats, *running, _EPS, "relu")


def _remaining_norm_flags(x: Tensor) -> None:
    """Call the remaining combinations of flags: without ReLU, without mask, with running statistics."""
    stats, mask, vector = _stats(x), _mask(x), _stats(x)[0]
    running = [vector] * 4
    batch_norm_stats(x, *running, False, _EPS)
    batch_norm_act_inference_(x, None, None, *running, _EPS, "identity")
    batch_norm_act_apply(x, stats, None, None, "identity", False)
    for residual_stats in (None, stats):
        for activation in RELU_OR_IDENTITY:
            batch_norm_act_apply(x, stats, x, residual_stats, activation, False)
        batch_norm_act_forward(x, x, residual_stats, *running, False, _EPS, "relu", True)
    batch_norm_act_forward(x, None, None, *running, False, _EPS, "relu", False)
    batch_norm_act_backward(x, x, vector, stats, None, True, "identity", [True] * 4)
    for relu_mask in (None, mask):
        batch_norm_act_backward(x, x, vector, stats, relu_mask, False, "relu", [True] * 4)
        batch_norm_act_backward_pair(x, x, vector, stats, x, vector, stats, relu_mask, True, False, [True] * 6)
    batch_norm_act_backward_pair(x, x, vector, stats, x, vector, stats, mask, False, False, [True] * 6)
    add_masked_(x, x, None)


def _activations(x: Tensor) -> None:
    """Call the norm of a training step and of inference with each activation but ReLU and identity."""
    stats, vector = _stats(x), _stats(x)[0]
    for activation in ACTIVATIONS[len(RELU_OR_IDENTITY) :]:
        batch_norm_act_forward(x, None, None, vector, vector, None, None, True, _EPS, activation, False)
        batch_norm_act_backward(x, x, vector, stats, None, True, activation, [True, False, True, True])
        batch_norm_act_inference_(x, None, None, *[vector] * 4, _EPS, activation)


def _max_pool(x: Tensor) -> None:
    window = [3, 3], [2, 2], [1, 1]
    max_pool_forward(x, None, False, *window)
    y, indices = max_pool_forward(x, _stats(x), True, *window)
    max_pool_backward(y, indices, x, *window)


def _norms() -> None:
    large = _meta_nchw(256, 256, 56)
    for group in (_training_norm, _projection, _inference, _remaining_norm_flags, _activations):
        group(large)
    contiguous = _meta_nchw(256, 256, 56, channels_last=False)
    for group in (_training_norm, _projection, _inference):
        group(contiguous)
    _training_norm(_meta_nchw(256, 256, 56, _HALF))
    _training_norm(_meta_nchw(256, 256, 56, _SINGLE))
    _inference(_meta_nchw(1, 512, 7))
    for channels_last in (True, False):
        _training_norm(_meta_nchw(256, 35, 57, channels_last=channels_last))
        _training_norm(_meta_nchw(_INT64_BATCH, 256, 56, channels_last=channels_last))
        _max_pool(_meta_nchw(256, 64, 112, channels_last=channels_last))


def _filter(x: Tensor, out_channels: int, kernel_size: int) -> Tensor:
    return _meta_nchw(out_channels, x.shape[1], kernel_size, x.dtype)


def _inference_conv(
    x: Tensor, out_channels: int, kernel_size: int = 1, stride: int = 1, add: bool = False, relu: bool = True
) -> None:
    """Call a convolution with its batch norm folded into weight and bias."""
    weight, geometry = _filter(x, out_channels, kernel_size), ([stride] * 2, [kernel_size // 2] * 2, [1, 1])
    output_size = conv_output_shape(x, weight, *geometry)[2]
    residual = _meta_nchw(x.shape[0], out_channels, output_size, x.dtype) if add else None
    conv_bias_act(x, weight, x.new_empty(out_channels), residual, *geometry, 1, relu)


def _training_conv(
    x: Tensor, out_channels: int, kernel_size: int = 1, stride: int = 1, input_norm: bool = True, partials: bool = True
) -> None:
    """Call a training convolution; with ``input_norm``, its prologue applies the preceding batch norm and ReLU."""
    stats, geometry = _stats(x) if input_norm else None, ([stride] * 2, [kernel_size // 2] * 2, [1, 1])
    conv_bn_stats(x, _filter(x, out_channels, kernel_size), None, stats, input_norm, *geometry, 1, partials)


def _conv_gradients(
    x: Tensor,
    out_channels: int,
    masked: bool,
    stride: int = 1,
    input_norm: bool = False,
    relu: bool = True,
    training: bool = True,
    shortcut_grad: bool = False,
) -> None:
    """Call both gradients of a 1x1 convolution; with ``shortcut_grad``, dgrad adds a shortcut's masked gradient."""
    z = _meta_nchw(x.shape[0], out_channels, x.shape[2] // stride, x.dtype)
    stats, x_stats = _stats(z), _stats(x) if input_norm else None
    norm_backward_args = z, z, stats, _mask(z) if masked else None, relu, stats[:2] if training else None, 1 << 20
    conv_wgrad(*norm_backward_args, _filter(x, out_channels, 1), x, x_stats, input_norm, [stride] * 2)
    if stride == 1:
        shortcut = (x, _mask(x)) if shortcut_grad else (None, None)
        conv_dgrad(*norm_backward_args, _filter(x, out_channels, 1), x, x_stats, input_norm, *shortcut)


def _input_gradient_with_shortcut(x: Tensor, out_channels: int) -> None:
    """Call dgrad without a prologue, in the backward of a unit that is not fused with its norm."""
    z = _meta_nchw(x.shape[0], out_channels, x.shape[2], x.dtype)
    no_norm = None, None, None, False, None, 0
    conv_dgrad(z, *no_norm, _filter(x, out_channels, 1), None, None, False, x, _mask(x))


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    previous, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = previous


def _convolutions() -> None:
    _inference_conv(_meta_nchw(256, 3, 224), 64, 7, 2)
    _inference_conv(_meta_nchw(256, 64, 56), 64, 3)
    _inference_conv(_meta_nchw(256, 512, 7), 512, 3, add=True)
    _inference_conv(_meta_nchw(256, 128, 56), 128, 3, 2)
    _inference_conv(_meta_nchw(256, 256, 56), 64)
    _inference_conv(_meta_nchw(256, 64, 56), 256, add=True)
    _inference_conv(_meta_nchw(256, 256, 56), 512, stride=2, relu=False)
    _inference_conv(_meta_nchw(_INT64_BATCH, 256, 56), 64)
    _inference_conv(_meta_nchw(1, 256, 56), 64)
    _inference_conv(_meta_nchw(1, 64, 56), 64, 3)
    _inference_conv(_meta_nchw(1, 512, 7), 512, 3, add=True)

    _training_conv(_meta_nchw(256, 256, 56), 64, input_norm=False)
    _training_conv(_meta_nchw(256, 256, 56), 512, stride=2, input_norm=False)
    _training_conv(_meta_nchw(256, 64, 56), 64, 3, input_norm=False)
    _training_conv(_meta_nchw(256, 64, 56), 256)
    _training_conv(_meta_nchw(256, 64, 56), 256, partials=False)
    _training_conv(_meta_nchw(256, 64, 56), 64, 3)
    _training_conv(_meta_nchw(256, 128, 56), 128, 3, 2)
    _training_conv(_meta_nchw(_INT64_BATCH, 64, 56), 256)
    _training_conv(_meta_nchw(1, 512, 7), 2048)

    _conv_gradients(_meta_nchw(256, 64, 56), 256, masked=True, input_norm=True)
    _conv_gradients(_meta_nchw(256, 256, 56), 64, masked=False)
    _conv_gradients(_meta_nchw(256, 256, 56), 64, masked=False, shortcut_grad=True)
    _conv_gradients(_meta_nchw(256, 256, 56), 512, masked=True, stride=2)
    _conv_gradients(_meta_nchw(256, 256, 56), 128, masked=False, relu=False, training=False)
    _conv_gradients(_meta_nchw(_INT64_BATCH, 64, 56), 256, masked=True, input_norm=True)
    _input_gradient_with_shortcut(_meta_nchw(256, 512, 28), 128)
    _input_gradient_with_shortcut(_meta_nchw(1, 512, 28), 128)

    for dtype, tf32 in ((_HALF, True), (_SINGLE, True), (_SINGLE, False)):
        with _tf32(tf32):
            _inference_conv(_meta_nchw(256, 64, 56, dtype), 64, 3)
            _training_conv(_meta_nchw(256, 64, 56, dtype), 256)
            if dtype == _SINGLE:
                _conv_gradients(_meta_nchw(256, 64, 56, dtype), 256, masked=True, input_norm=True)


def compile_all(capability: int) -> list[KernelReport]:
    """Compile every kernel of the manifest for one compute capability, and return a report on each.

    Args:
        capability: compute capability: 80, 90, 100 or 120.
    """

    def call() -> None:
        with implicit_gemm.assume_machine(f"sm_{capability}"):
            _norms()
            _convolutions()

    return compile_launches(call, capability)
