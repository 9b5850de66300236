"""Convolutions in training: with statistics of their output, and their two gradients.

``csrc/cpu/convolution.cpp`` and ``weight_gradient.cpp``, where :func:`.choice.training_kernels` says that these are
faster, else ATen's. A weight changes with every step, and so is packed for every call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_res import _extension, convolution, ops
from fused_res.backends import registry
from fused_res.backends.cpu.batch_norm_act import batch_norm_act_apply
from fused_res.backends.cpu.batch_norm_sync import batch_norm_partials
from fused_res.backends.cpu.choice import Geometry, TrainingKernels, training_kernels
from fused_res.backends.cpu.convolution import pack
from fused_res.layout import is_channels_last
from fused_res.spec import UnitSpec

_namespace = torch.ops.fused_res_cpu

_convolve = _namespace.convolve.default
_weight_gradient = _namespace.conv_weight_gradient.default

#: Outputs a side of Winograd's tiles; 0 is no Winograd.
_TILES = {"winograd": 4, "direct": 0}


def _kernels(input: Tensor, weight: Tensor, spec: UnitSpec) -> TrainingKernels:
    # What traces or counts (fake tensors, subclasses, dispatch modes) sees ATen's, which have the same outputs.
    if torch._C._len_torch_dispatch_stack():
        return TrainingKernels()
    plain = type(input) is Tensor and (type(weight) is Tensor or type(weight) is Parameter)
    if not plain or input.dim() != 4 or input.dtype != torch.float32 or spec.groups > 1 or not is_channels_last(input):
        return TrainingKernels()
    if weight.dtype != torch.float32 or _extension.cpu_isa() == "baseline":
        return TrainingKernels()
    shapes = tuple(input.shape), tuple(weight.shape)
    return training_kernels(Geometry(*shapes, spec.stride, spec.padding, spec.dilation, 1), registry.winograd())


def conv_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, spec: UnitSpec, statistics: bool
) -> tuple[Tensor, Tensor | None]:
    """``conv(input, weight) + bias``, and partial statistics if they are wanted and cost no pass of their own."""
    assert weight is not None  # the plan has checked
    kernel = _kernels(input, weight, spec).forward
    if kernel == "aten":
        return convolution.forward(input, weight, bias, spec), None
    packed = pack(weight, kernel, spec.stride)
    z, partials = _convolve(
        input,
        packed,
        None if bias is None else bias.contiguous(),
        None,
        weight.shape[0],
        weight.shape[2:],
        spec.stride,
        spec.padding,
        spec.dilation,
        _TILES[kernel],
        False,
        statistics,
    )
    return z, partials if statistics else None


def conv_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    spec: UnitSpec,
    output_mask: list[bool],
    compact: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`fused_res.convolution.backward`. ``compact``: the gradient of the input may come for those pixels alone
    that a 1x1 kernel with a stride has read, as an image of the output's size; the others' is zero."""
    assert weight is not None  # the plan has checked
    kernels = _kernels(input, weight, spec)
    of_input = output_mask[0] and kernels.input_gradient != "aten"
    of_weight = output_mask[1] and kernels.weight_gradient != "aten"
    if not (of_input or of_weight):
        return convolution.backward(grad, input, weight, bias, spec, output_mask)
    dx = dweight = dbias = None
    if of_input:
        dx = _input_gradient(grad, input, weight, spec, kernels.input_gradient)
        if dx.shape != input.shape and not compact:
            rows, columns = spec.stride
            read, dx = dx, torch.zeros_like(input)
            dx[:, :, ::rows, ::columns] = read
    if of_weight:
        dweight = _weight_gradient(
            grad, input, weight, spec.stride, spec.padding, spec.dilation, kernels.weight_gradient == "winograd"
        )
    if output_mask[2]:
        dbias = grad.sum((0, 2, 3))
    rest = [output_mask[0] and not of_input, output_mask[1] and not of_weight, False]
    if any(rest):
        its_dx, its_dweight, _ = convolution.backward(grad, input, weight, None, spec, rest)
        dx, dweight = its_dx if rest[0] else dx, its_dweight if rest[1] else dweight
    return dx, dweight, dbias


def _input_gradient(grad: Tensor, input: Tensor, weight: Tensor, spec: UnitSpec, kernel: str) -> Tensor:
    """A convolution, too, of the flipped and transposed weight: with stride 1, or of the pixels that a 1x1 has read."""
    taps = weight.shape[2:]
    padding = [spread * (tap - 1) - pad for tap, pad, spread in zip(taps, spec.padding, spec.dilation, strict=True)]
    packed = pack(weight, kernel, spec.stride, transposed=True)
    dx, _ = _convolve(
        grad,
        packed,
        None,
        None,
        input.shape[1],
        taps,
        (1, 1),
        padding,
        spec.dilation,
        _TILES[kernel],
        False,
        False,
    )
    return dx


def _conv_bn_stats(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_stats: Tensor | None,
    input_relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    partials: bool,
) -> tuple[Tensor, Tensor]:
    x = input
    if input_stats is not None:
        x, _ = batch_norm_act_apply(input, input_stats, None, None, input_relu, False)
    spec = UnitSpec(tuple(stride), tuple(padding), tuple(dilation), groups)
    output, made = conv_forward(x, weight, bias, spec, partials)
    if not partials:
        return output, output.new_empty(0, dtype=torch.float64)
    return output, batch_norm_partials(output) if made is None else made


conv_bn_stats = ops.operator("fused_res_cpu", "conv_bn_stats", _conv_bn_stats, "CPU")
