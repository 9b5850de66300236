"""What ships: the operators as ResNet-18 and ResNet-50 call them, on tensors without data.

Launchers choose tiles, warps and stages as they would on a GPU, so that :mod:`fused_res.backends.triton.aot` compiles
the very kernels that will run. Shapes are those of a batch of 256 images and of one; a call stands here because it
compiles to something that no other does: other flags, another tile, another type, other addresses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fused_res.backends.triton.aot import Compiled, compile_launches
from fused_res.backends.triton.batch_norm_act import (
    add_masked_,
    batch_norm_act_apply,
    batch_norm_act_backward,
    batch_norm_act_backward_pair,
    batch_norm_act_forward,
    batch_norm_act_inference_,
    batch_norm_stats,
)
from fused_res.backends.triton.conv_bias_act import conv_bias_act
from fused_res.backends.triton.conv_bn_stats import conv_bn_stats
from fused_res.backends.triton.conv_dgrad import conv_dgrad
from fused_res.backends.triton.conv_wgrad import conv_wgrad
from fused_res.backends.triton.max_pool import max_pool_backward, max_pool_forward
from fused_res.ops import stats_dtype
from fused_res.ops.memory_format import convolved, packed_shape

_HALF, _SINGLE = torch.float16, torch.float32
_EPS = 1e-5
#: Images of 256 x 56 x 56 that make more than 2^31 elements: offsets take 64 bits.
_IMMENSE = 2752


def _image(
    images: int, channels: int, size: int, dtype: torch.dtype = torch.bfloat16, channels_last: bool = True
) -> Tensor:
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((images, channels, size, size), dtype=dtype, device="meta", memory_format=format)


def _stats(x: Tensor) -> Tensor:
    return x.new_empty((5, x.shape[1]), dtype=stats_dtype(x.dtype))


def _mask(x: Tensor) -> Tensor:
    return x.new_empty(packed_shape(x), dtype=torch.uint8)


def _norm(x: Tensor) -> None:
    """A training step's norms: alone, and before the addition of an identity."""
    stats, vector = _stats(x), _stats(x)[0]
    batch_norm_act_forward(x, None, None, vector, vector, None, None, True, _EPS, True, False)
    batch_norm_act_apply(x, stats, x, None, True, True)
    batch_norm_act_backward(x, x, vector, stats, None, True, True, [True, False, True, True])
    batch_norm_act_backward(x, x, vector, stats, _mask(x), True, True, [True] * 4)


def _projection(x: Tensor) -> None:
    """The two norms that meet in the addition where a block changes its shape."""
    stats, vector = _stats(x), _stats(x)[0]
    batch_norm_act_apply(x, stats, x, stats, True, True)
    batch_norm_act_backward_pair(x, x, vector, stats, x, vector, stats, _mask(x), True, True, [True] * 6)
    add_masked_(x, x, _mask(x))


def _inference(x: Tensor) -> None:
    stats, running = _stats(x), [_stats(x)[0]] * 4
    batch_norm_act_inference_(x, None, None, *running, _EPS, True)
    batch_norm_act_inference_(x, x, None, *running, _EPS, True)
    batch_norm_act_inference_(x, x, stats, *running, _EPS, True)


def _other_flags(x: Tensor) -> None:
    """What is left of the combinations of flags: no ReLU, no mask, statistics that are constants."""
    stats, mask, vector = _stats(x), _mask(x), _stats(x)[0]
    running = [vector] * 4
    batch_norm_stats(x, *running, False, _EPS)
    batch_norm_act_inference_(x, None, None, *running, _EPS, False)
    batch_norm_act_apply(x, stats, None, None, False, False)
    for residual_stats in (None, stats):
        for relu in (False, True):
            batch_norm_act_apply(x, stats, x, residual_stats, relu, False)
        batch_norm_act_forward(x, x, residual_stats, *running, False, _EPS, True, True)
    batch_norm_act_forward(x, None, None, *running, False, _EPS, True, False)
    batch_norm_act_backward(x, x, vector, stats, None, True, False, [True] * 4)
    for relu_mask in (None, mask):
        batch_norm_act_backward(x, x, vector, stats, relu_mask, False, True, [True] * 4)
        batch_norm_act_backward_pair(x, x, vector, stats, x, vector, stats, relu_mask, True, False, [True] * 6)
    batch_norm_act_backward_pair(x, x, vector, stats, x, vector, stats, mask, False, False, [True] * 6)
    add_masked_(x, x, None)


def _max_pool(x: Tensor) -> None:
    window = [3, 3], [2, 2], [1, 1]
    max_pool_forward(x, None, False, *window)
    y, indices = max_pool_forward(x, _stats(x), True, *window)
    max_pool_backward(y, indices, x, *window)


def _norms() -> None:
    large = _image(256, 256, 56)
    for part in (_norm, _projection, _inference, _other_flags):
        part(large)
    planes = _image(256, 256, 56, channels_last=False)
    for part in (_norm, _projection, _inference):
        part(planes)
    _norm(_image(256, 256, 56, _HALF))
    _norm(_image(256, 256, 56, _SINGLE))
    _inference(_image(1, 512, 7))
    for channels_last in (True, False):
        _norm(_image(256, 35, 57, channels_last=channels_last))
        _norm(_image(_IMMENSE, 256, 56, channels_last=channels_last))
        _max_pool(_image(256, 64, 112, channels_last=channels_last))


def _filter(x: Tensor, outputs: int, size: int) -> Tensor:
    return _image(outputs, x.shape[1], size, x.dtype)


def _frozen(x: Tensor, outputs: int, size: int = 1, stride: int = 1, add: bool = False, relu: bool = True) -> None:
    """A convolution with its norm folded in."""
    weight, geometry = _filter(x, outputs, size), ([stride] * 2, [size // 2] * 2, [1, 1])
    residual = _image(x.shape[0], outputs, convolved(x, weight, *geometry)[2], x.dtype) if add else None
    conv_bias_act(x, weight, x.new_empty(outputs), residual, *geometry, 1, relu)


def _forward(
    x: Tensor, outputs: int, size: int = 1, stride: int = 1, through: bool = True, partials: bool = True
) -> None:
    """A convolution in training, ``through`` the norm before it."""
    stats, geometry = _stats(x) if through else None, ([stride] * 2, [size // 2] * 2, [1, 1])
    conv_bn_stats(x, _filter(x, outputs, size), None, stats, through, *geometry, 1, partials)


def _backward(
    x: Tensor,
    outputs: int,
    masked: bool,
    stride: int = 1,
    through: bool = False,
    relu: bool = True,
    training: bool = True,
    added: bool = False,
) -> None:
    """Both gradients of a 1x1 convolution; ``added``: with the masked gradient that comes through the shortcut."""
    z = _image(x.shape[0], outputs, x.shape[2] // stride, x.dtype)
    stats, x_stats = _stats(z), _stats(x) if through else None
    behind = z, z, stats, _mask(z) if masked else None, relu, stats[:2] if training else None, 1 << 20
    conv_wgrad(*behind, _filter(x, outputs, 1), x, x_stats, through, [stride] * 2)
    if stride == 1:
        shortcut = (x, _mask(x)) if added else (None, None)
        conv_dgrad(*behind, _filter(x, outputs, 1), x, x_stats, through, *shortcut)


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    previous, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = previous


def _convolutions() -> None:
    _frozen(_image(256, 3, 224), 64, 7, 2)
    _frozen(_image(256, 64, 56), 64, 3)
    _frozen(_image(256, 512, 7), 512, 3, add=True)
    _frozen(_image(256, 128, 56), 128, 3, 2)
    _frozen(_image(256, 256, 56), 64)
    _frozen(_image(256, 64, 56), 256, add=True)
    _frozen(_image(256, 256, 56), 512, stride=2, relu=False)
    _frozen(_image(_IMMENSE, 256, 56), 64)
    _frozen(_image(1, 256, 56), 64)
    _frozen(_image(1, 64, 56), 64, 3)
    _frozen(_image(1, 512, 7), 512, 3, add=True)

    _forward(_image(256, 256, 56), 64, through=False)
    _forward(_image(256, 256, 56), 512, stride=2, through=False)
    _forward(_image(256, 64, 56), 64, 3, through=False)
    _forward(_image(256, 64, 56), 256)
    _forward(_image(256, 64, 56), 256, partials=False)
    _forward(_image(256, 64, 56), 64, 3)
    _forward(_image(256, 128, 56), 128, 3, 2)
    _forward(_image(_IMMENSE, 64, 56), 256)
    _forward(_image(1, 512, 7), 2048)

    _backward(_image(256, 64, 56), 256, masked=True, through=True)
    _backward(_image(256, 256, 56), 64, masked=False)
    _backward(_image(256, 256, 56), 64, masked=False, added=True)
    _backward(_image(256, 256, 56), 512, masked=True, stride=2)
    _backward(_image(256, 256, 56), 128, masked=False, relu=False, training=False)
    _backward(_image(_IMMENSE, 64, 56), 256, masked=True, through=True)

    for dtype, tf32 in ((_HALF, True), (_SINGLE, True), (_SINGLE, False)):
        with _tf32(tf32):
            _frozen(_image(256, 64, 56, dtype), 64, 3)
            _forward(_image(256, 64, 56, dtype), 256)
            if dtype == _SINGLE:
                _backward(_image(256, 64, 56, dtype), 256, masked=True, through=True)


def compile_all(capability: int) -> list[Compiled]:
    """Every kernel that ships, compiled for one architecture, no two of them the same."""

    def call() -> None:
        _norms()
        _convolutions()

    return compile_launches(call, capability)
