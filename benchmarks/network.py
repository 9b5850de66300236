"""A network as the planner sees it: its blocks and their convolutions with every shape. Nothing is computed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fused_res import models
from fused_res.block.plan import BlockConfig, Plan
from fused_res.block.planner import plan
from fused_res.dispatch import Algorithms
from fused_res.models import ResNet
from fused_res.nn import chain
from fused_res.nn.block import ResidualBlock
from fused_res.ops.memory_format import convolved, pooled_shape
from fused_res.spec import UnitSpec, by_unit

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Convolution:
    """One unit of a block: what it reads, holds and makes."""

    name: str
    spec: UnitSpec
    x: Shape
    weight: Shape
    z: Shape
    residual: bool  # its block's shortcut is added to what it makes
    relu: bool  # in the end, behind that addition

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.z) * math.prod(self.weight[1:])

    @property
    def touched(self) -> int:
        """Elements of `x` that are read at all: a strided 1x1 kernel leaves most of them out."""
        read = (
            min(size, out * kernel, (out - 1) * stride + kernel)
            for size, out, kernel, stride in zip(self.x[2:], self.z[2:], self.weight[2:], self.spec.stride, strict=True)
        )
        return math.prod(self.x[:2]) * math.prod(read)


@dataclass(frozen=True)
class Block:
    """A residual block, or the stem."""

    name: str
    read: chain.Chain
    x: Shape

    @property
    def stage(self) -> str:
        return self.name.partition(".")[0]

    @cached_property
    def convolutions(self) -> tuple[Convolution, ...]:
        """Of the chain, then the projection's."""
        spec = self.read.spec
        weights = [tuple(unit.weight.shape) for unit in by_unit(self.read.tensors)]
        made, x = [], self.x
        for index, unit in enumerate(spec.convolutions):
            projection = unit is spec.projection
            x = self.x if projection else x
            last = index == len(spec.units) - 1
            z = convolved(_empty(x), _empty(weights[index]), unit.stride, unit.padding, unit.dilation)
            name = f"{self.name}.{'projection' if projection else f'conv{index + 1}'}"
            made.append(Convolution(name, unit, x, weights[index], z, last and spec.shortcut != "none", unit.relu))
            x = z
        return tuple(made)

    @property
    def y(self) -> Shape:
        last, pool = self.convolutions[len(self.read.spec.units) - 1], self.read.spec.pool
        if pool is None:
            return last.z
        return tuple(pooled_shape(_empty(last.z), pool.kernel_size, pool.stride, pool.padding))

    def plan(
        self,
        dtype: torch.dtype,
        training: bool,
        grad_input: bool,
        backend: str,
        preference: str,
        algorithms: Algorithms | None = None,
    ) -> Plan:
        """The plan for channels_last memory; `algorithms`: those of every convolution, instead of the backend's."""
        requires_grad = [grad_input, *(t is not None and t.requires_grad for t in self.read.tensors)]
        count = len(self.convolutions)
        tensors = [None if t is None else t.to(dtype) for t in self.read.tensors]
        x = _empty(self.x).to(dtype).contiguous(memory_format=torch.channels_last)
        wanted = tuple(training and one for one in requires_grad)
        given = None if algorithms is None else (algorithms,) * count
        config = BlockConfig(self.read.spec, (training,) * count, backend, preference=preference)
        return plan(config, x, tensors, wanted, given)


@dataclass(frozen=True)
class Network:
    batch: int
    size: int
    blocks: tuple[Block, ...]  # the stem first
    classes: int
    parameters: int

    @property
    def features(self) -> int:
        return self.blocks[-1].y[1]


def network(name: str, batch: int, size: int) -> Network:
    """A ResNet of :mod:`fused_res.models`."""
    with torch.device("meta"):
        model: ResNet = getattr(models, name)()
    blocks: list[Block] = []
    x: Shape = (batch, 3, size, size)
    for at, parts in _parts(model):
        read = chain.read(*parts)
        assert isinstance(read, chain.Chain), read
        blocks.append(Block(at, read, x))
        x = blocks[-1].y
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Network(batch, size, tuple(blocks), model.fc.out_features, parameters)


def _parts(model: ResNet) -> Iterator[tuple[str, tuple]]:
    yield "stem", (model._stem_units(), "none", model.maxpool)
    for name, module in model.named_modules():
        if isinstance(module, ResidualBlock):
            yield name, module._parts()


def _empty(shape: Shape) -> Tensor:
    return torch.empty(shape, device="meta")
