"""The shapes of a network as input of the planner: its blocks and their convolutions, on the meta device."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fused_res import models
from fused_res.block.plan import BlockConfig, Plan
from fused_res.block.planner import plan
from fused_res.dispatch import TrainingAlgorithms
from fused_res.models import ResNet
from fused_res.nn import chain
from fused_res.nn.block import ResidualBlock
from fused_res.ops.memory_format import conv_output_shape, pool_output_shape
from fused_res.spec import UnitSpec, group_by_unit

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Convolution:
    """One conv-BN-act unit of a block: the shapes of the convolution's input, weight and output."""

    name: str
    spec: UnitSpec
    x: Shape
    weight: Shape
    z: Shape
    residual: bool  # the block's shortcut is added after its norm
    relu: bool  # a ReLU follows, after that addition

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.z) * math.prod(self.weight[1:])

    @property
    def elements_read(self) -> int:
        """Number of elements of `x` that the convolution reads: a strided 1x1 kernel skips most of them."""
        read = (
            min(size, out * kernel, (out - 1) * stride + kernel)
            for size, out, kernel, stride in zip(self.x[2:], self.z[2:], self.weight[2:], self.spec.stride, strict=True)
        )
        return math.prod(self.x[:2]) * math.prod(read)


@dataclass(frozen=True)
class Block:
    """A residual block, or the stem of the network."""

    name: str
    unit_chain: chain.Chain
    x: Shape

    @property
    def stage(self) -> str:
        return self.name.partition(".")[0]

    @cached_property
    def convolutions(self) -> tuple[Convolution, ...]:
        """The convolutions of the main branch, then the projection's."""
        spec = self.unit_chain.spec
        weights = [tuple(unit.weight.shape) for unit in group_by_unit(self.unit_chain.tensors)]
        convolutions, x = [], self.x
        for index, unit in enumerate(spec.convolutions):
            projection = unit is spec.projection
            x = self.x if projection else x
            last = index == len(spec.units) - 1
            z = conv_output_shape(_empty(x), _empty(weights[index]), unit.stride, unit.padding, unit.dilation)
            name = f"{self.name}.{'projection' if projection else f'conv{index + 1}'}"
            convolutions.append(
                Convolution(name, unit, x, weights[index], z, last and spec.shortcut != "none", unit.relu)
            )
            x = z
        return tuple(convolutions)

    @property
    def y(self) -> Shape:
        last, pool = self.convolutions[len(self.unit_chain.spec.units) - 1], self.unit_chain.spec.pool
        if pool is None:
            return last.z
        return tuple(pool_output_shape(_empty(last.z), pool.kernel_size, pool.stride, pool.padding))

    def plan(
        self,
        dtype: torch.dtype,
        training: bool,
        grad_input: bool,
        backend: str,
        preference: str,
        algorithms: tuple[TrainingAlgorithms | None, ...] | None = None,
    ) -> Plan:
        """Return the plan for channels_last memory.

        Args:
            dtype: dtype of activations and weights.
            training: whether to plan a training step.
            grad_input: whether the gradient of the block's input is needed.
            backend: backend name.
            preference: preference of `BlockConfig`.
            algorithms: algorithms of each convolution; None: those that the backend selects.
        """
        requires_grad = [grad_input, *(t is not None and t.requires_grad for t in self.unit_chain.tensors)]
        count = len(self.convolutions)
        tensors = [None if t is None else t.to(dtype) for t in self.unit_chain.tensors]
        x = _empty(self.x).to(dtype).contiguous(memory_format=torch.channels_last)
        needs_grad = tuple(training and one for one in requires_grad)
        config = BlockConfig(self.unit_chain.spec, (training,) * count, backend, preference=preference)
        return plan(config, x, tensors, needs_grad, algorithms)


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


def build_network(name: str, batch: int, size: int) -> Network:
    """Return the shapes of the ResNet `name` of :mod:`fused_res.models`."""
    with torch.device("meta"):
        model: ResNet = getattr(models, name)()
    blocks: list[Block] = []
    x: Shape = (batch, 3, size, size)
    for block_name, layers in _named_blocks(model):
        arguments = layers.arguments()
        assert not isinstance(arguments, chain.Unsupported), arguments
        unit_chain = chain.match_chain(*arguments)
        assert isinstance(unit_chain, chain.Chain), unit_chain
        blocks.append(Block(block_name, unit_chain, x))
        x = blocks[-1].y
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Network(batch, size, tuple(blocks), model.fc.out_features, parameters)


def _named_blocks(model: ResNet) -> Iterator[tuple[str, chain.Layers]]:
    """Yield name and modules of the stem and of every residual block."""
    yield "stem", model.layers()
    for name, module in model.named_modules():
        if isinstance(module, ResidualBlock):
            yield name, module.layers()


def _empty(shape: Shape) -> Tensor:
    return torch.empty(shape, device="meta")
