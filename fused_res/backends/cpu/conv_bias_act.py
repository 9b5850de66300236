"""``act(conv(x, w) + bias [+ residual])``: by our kernels, oneDNN's or ATen's, as :mod:`.convolution` chooses."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fused_res import _extension, ops
from fused_res import convolution as aten
from fused_res.backends import registry
from fused_res.backends.cpu import convolution, onednn, program
from fused_res.backends.cpu.convolution import Kernel
from fused_res.backends.cpu.program import Program
from fused_res.ops import laid_out, makes_channels_last
from fused_res.spec import BlockSpec, UnitSpec


class Packed(NamedTuple):
    """A weight in the form of its kernel: stands for the weight in :func:`conv_bias_act`."""

    kernel: Kernel
    tensor: Tensor
    shape: torch.Size  # of the weight


class Layer(Protocol):
    """A convolution that keeps its weight, and what is made of it: ``keep(key, make)``, while it ``has`` that."""

    weight: Tensor
    bias: Tensor
    spec: UnitSpec
    kernel: Kernel | None  # the last that ran, for people to read
    keep: Callable[[Hashable, Callable[[], Tensor]], Any]
    has: Callable[[Any], bool]


def pack_weight(
    layer: Layer,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor | Packed:
    """The layer's ``weight`` for inputs like this one, packed where that pays."""
    layer.kernel = kernel = convolution.kernel_for(input, weight, stride, padding, dilation, groups, True)
    if kernel.ours:
        # One form for every shape of input; the tiles' size is the kernel's own affair.
        kept = layer.keep(kernel.name, lambda: convolution.pack(weight, kernel.name, stride))
    elif kernel.name == "onednn":
        key = kernel.name, input.shape, input.dtype, torch.get_num_threads()
        kept = layer.keep(key, lambda: onednn.pack(input, weight, stride, padding, dilation, groups))
    else:
        return weight
    return Packed(kernel, kept.tensor, weight.shape)


def _conv_bias_act(
    input: Tensor,
    weight: Tensor | Packed,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    if isinstance(weight, Packed):
        kernel, operand, shape = weight
        channels_last = True
    else:
        kernel, operand, shape = (
            convolution.kernel_for(input, weight, stride, padding, dilation, groups, False),
            weight,
            weight.shape,
        )
        channels_last = makes_channels_last(input, weight)
        if kernel.ours:
            operand = convolution.pack(weight, kernel.name, stride)
    if kernel.ours:
        return convolution.run(input, operand, kernel, shape, bias, residual, stride, padding, dilation, relu)
    input = laid_out(input, channels_last)
    if residual is not None:
        residual = laid_out(residual, channels_last)
    if kernel.name == "onednn":
        y = onednn.conv_bias_act(input, operand, bias, residual, stride, padding, dilation, groups, relu)
    else:
        y = aten.bias_act(input, operand, bias, residual, stride, padding, dilation, groups, relu)
    return laid_out(y, channels_last)


conv_bias_act = ops.operator("fused_res_cpu", "conv_bias_act", _conv_bias_act, "CPU")


def convolution_settings() -> tuple[Hashable, ...]:
    """What the choice of kernels depends on, beside shapes."""
    return registry.winograd(), _extension.cpu_isa()


class Prepared(NamedTuple):
    """Blocks in a row, by our kernels alone: a program and its operands."""

    program: Program
    layers: Sequence[Layer]
    specs: list[UnitSpec]
    kept: list[Any]
    packed: list[Tensor]
    biases: list[Tensor]

    def current(self, layers: Sequence[Layer]) -> bool:
        """Whether these are the same layers still, with the same operands."""
        if len(layers) != len(self.layers):
            return False
        for layer, spec, kept, bias in zip(layers, self.specs, self.kept, self.biases, strict=True):
            if layer.spec is not spec or layer.bias is not bias or not layer.has(kept):
                return False
        return True

    def run(self, input: Tensor) -> Tensor:
        first = self.layers[0]
        if first.kernel is not self.program.kernels[0]:
            for layer, kernel in zip(self.layers, self.program.kernels, strict=True):
                layer.kernel = kernel
        return self.program.run(input, self.packed, self.biases)


def prepare_blocks(blocks: tuple[BlockSpec, ...], layers: Sequence[Layer], input: Tensor) -> Prepared | None:
    """None where another library is to compute a part, or a shape does not fit."""
    tensors = [input, *[layer.weight for layer in layers], *[layer.bias for layer in layers]]
    if any(tensor.dtype is not torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
        return None
    if not all(layer.bias.is_contiguous() for layer in layers):  # a copy would not follow changes in place
        return None
    shapes = tuple([tuple(layer.weight.shape) for layer in layers])
    plan = program.plan(blocks, shapes, tuple(input.shape), *convolution_settings())
    if plan is None:
        return None
    specs = [layer.spec for layer in layers]
    kept = [
        layer.keep(kernel.name, partial(convolution.pack, layer.weight, kernel.name, spec.stride))
        for layer, kernel, spec in zip(layers, plan.kernels, specs, strict=True)
    ]
    return Prepared(plan, layers, specs, kept, [one.tensor for one in kept], [layer.bias for layer in layers])
