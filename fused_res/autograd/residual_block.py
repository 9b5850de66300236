"""A residual block as one autograd Function, and as a pair of opaque operators for ``torch.compile``.

If the Function were compiled, AOTAutograd would trace both directions into one graph, merge the recomputation of
backward with forward's computation, and save the tensors that were to be recomputed. Opaque operators keep AOTAutograd
from undoing the recomputation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from fused_res import _torch_compat
from fused_res.backends import registry
from fused_res.backends.reference.batch_norm_act import activate, batch_norm_act, channels_view, unpack_mask
from fused_res.block.forward import stats_name
from fused_res.block.plan import BlockConfig, Plan, Unit
from fused_res.block.planner import cached_plan, plan, plan_backward
from fused_res.block.program import INPUT_SLOT, Slot
from fused_res.dispatch.backend import Kernels
from fused_res.ops import MEAN, VAR, flops
from fused_res.ops.memory_format import is_channels_last, to_memory_format
from fused_res.spec import BlockSpec, group_by_unit

Tensors = Sequence[Tensor | None]


class ResidualBlock(Function):
    """Returns the output and the ``stats`` of every unit. The caller updates the running statistics."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, kernels: Kernels, operands: Tensors, *differentiable: Tensor
    ) -> tuple[Tensor, ...]:
        """Run the block.

        Args:
            ctx: autograd's context.
            plan: the block's plan.
            kernels: the backend.
            operands: the input and all tensors. In a list they cost autograd nothing.
            differentiable: those that get a gradient, :attr:`Plan.differentiable`.
        """
        slots: list[Any] = plan.run_forward(kernels, operands[0], operands[1:])  # type: ignore[arg-type]
        stats = [slots[slot] for slot in plan.stats_slots]
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.save_for_backward(*[slots[slot] for slot in plan.live_slots])
        return slots[plan.forward.results[0]], *stats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        if grad_output is None:
            return (None,) * (3 + len(plan.differentiable))
        saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them on the first access
        if torch.is_grad_enabled():
            values = dict(zip(plan.live_slots, saved, strict=True))
            return None, None, None, *_differentiable_backward(plan, grad_output, values)
        if _torch_compat.has_torch_dispatch_mode() and not plan.key.under_torch_dispatch:
            plan = cached_plan(plan.key._replace(under_torch_dispatch=True))
        values = dict(zip(plan.live_slots, saved, strict=True))
        kernels = registry.resolve(plan.config.backend, grad_output.device)
        return None, None, None, *plan.run_backward(kernels, grad_output, values)


def _without_running_stats(tensors: Tensors) -> list[Tensor | None]:
    """Replace the running statistics, which backward must not read, by None."""
    return [tensor for unit in group_by_unit(tensors) for tensor in (*unit.parameters, None, None)]


def _differentiable_backward(plan: Plan, grad_output: Tensor, values: Mapping[Slot, Tensor]) -> Sequence[Tensor]:
    """Return the gradients as a differentiable graph, for double backward.

    The graph is that of the block in plain PyTorch, recomputed from the values that the first backward reads. A value
    that depends on nothing that requires a gradient is a constant, so its own inputs need not be saved.
    """
    if plan.config.group:
        raise RuntimeError("process_group: double backward is not supported for synchronized statistics")
    graph = _DifferentiableGraph(plan, values)
    mask = graph.saved.get("mask")
    if mask is not None:
        # The second derivative of ReLU is zero, so its saved mask is a constant, in the memory format of dy.
        dy = to_memory_format(grad_output, plan.key.channels_last)
        grad_output = torch.where(unpack_mask(mask, dy), dy, 0)
    y = graph.sum_before_activation() if mask is not None else graph.output()
    sources = [values[Slot(index)] for index in plan.differentiable]
    return torch.autograd.grad(y, sources, grad_output, create_graph=True)


class _DifferentiableGraph:
    """The block in plain PyTorch, as a function of the tensors that require a gradient.

    Args:
        plan: the block's plan.
        values: slots of :attr:`Plan.live_slots` -> their values.
    """

    def __init__(self, plan: Plan, values: Mapping[Slot, Tensor]) -> None:
        self.plan = plan
        self.saved = {plan.slot_names[slot]: value for slot, value in values.items()}
        self.tensors = group_by_unit([values.get(Slot(at)) for at in range(1, len(plan.key.metas))])

    def output(self) -> Tensor:
        """Return the block's output."""
        y, spec, pool = self.sum_before_activation(), self.plan.units[-1].spec, self.plan.config.spec.pool
        y = activate(y, spec.activation, spec.negative_slope)
        return y if pool is None else F.max_pool2d(y, pool.kernel_size, pool.stride, pool.padding)

    def sum_before_activation(self) -> Tensor:
        """Return the input of the last activation, without addends that are constant: they have no gradient."""
        addends = [self._normalized(unit) for unit in (self.plan.units[-1], self.plan.projection) if _depends(unit)]
        if self.plan.config.spec.shortcut == "identity" and self.plan.units[0].needs_input_grad:
            addends.append(self.saved["x"])
        return reduce(torch.add, addends)

    def _normalized(self, unit: Unit | None, activation: str = "identity") -> Tensor:
        assert unit is not None
        tensors, stats = self.tensors[unit.index], self.saved[stats_name(unit)]
        norm = stats[MEAN], stats[VAR], tensors.norm_weight, tensors.norm_bias
        y, *_ = batch_norm_act(
            self._convolved(unit), *norm, None, unit.training, unit.spec.eps, activation,
            negative_slope=unit.spec.negative_slope,
        )  # fmt: skip
        return y

    def _convolved(self, unit: Unit) -> Tensor:
        weight, bias = self.tensors[unit.index][:2]
        z = self.saved.get(unit.output_name)
        if z is None or unit.needs_input_grad or unit.needs_grad.weight:
            stride, padding, dilation, groups = unit.spec.geometry
            geometry = stride, padding, dilation, False, [0] * len(stride), groups
            input = self._input(unit)
            return torch.ops.aten.convolution.default(input, weight.to(input.dtype), bias, *geometry)
        if not unit.needs_grad.bias:
            return z
        assert bias is not None
        return z + channels_view(bias - bias.detach(), z)  # the saved value, with a gradient of the bias

    def _input(self, unit: Unit) -> Tensor:
        saved = self.saved.get(unit.input_name)
        if saved is not None and (unit.input_name == "x" or not unit.needs_input_grad):
            return saved
        previous = self.plan.units[unit.index - 1]
        return self._normalized(previous, previous.spec.activation)


def _depends(unit: Unit | None) -> bool:
    """Return whether the unit's output depends on a tensor that requires a gradient."""
    return unit is not None and unit.needs_norm_grad


# The opaque operators for torch.compile. An operator's list of tensors cannot contain None, so absent tensors are
# omitted and the flags `present` mark their positions. The forward operator returns the block's output, every unit's
# statistics and the other saved tensors as one list. The backward operator always gets the input's size, which its plan
# needs, and gets the input only if it was saved.

_library = torch.library.Library("fused_res", "DEF")
_BLOCK_ARGUMENTS_SCHEMA = (
    "bool[] present, int[] spec, float[] spec_floats, bool[] training, bool[] requires_grad, bool channels_last,"
    " str recompute, str backend, str preference, str group"
)
_library.define(f"block_forward(Tensor input, Tensor[] tensors, {_BLOCK_ARGUMENTS_SCHEMA}) -> Tensor[]")
_library.define(
    "block_backward(Tensor grad_output, Tensor? input, SymInt[] size, Tensor[] tensors, Tensor[] saved,"
    f" {_BLOCK_ARGUMENTS_SCHEMA}) -> Tensor[]"
)


class _BlockArguments(NamedTuple):
    """The non-tensor arguments of the two operators, in the argument types that a schema allows."""

    present: Sequence[bool]
    spec: Sequence[int]
    spec_floats: Sequence[float]
    training: Sequence[bool]
    requires_grad: Sequence[bool]
    channels_last: bool
    recompute: str
    backend: str
    preference: str
    group: str

    def config(self) -> BlockConfig:
        spec = BlockSpec.decode(self.spec, self.spec_floats)
        return BlockConfig(spec, tuple(self.training), self.backend, self.recompute, self.preference, self.group)

    def plan(self, input: Tensor, tensors: Tensors) -> Plan:
        """Return the block's plan; ``tensors`` contains None for absent ones."""
        return plan(self.config(), input, tensors, tuple(self.requires_grad))

    def unflatten(self, tensors: Iterable[Tensor]) -> list[Tensor | None]:
        """Return the list of the present tensors with None inserted for the absent ones."""
        rest = iter(tensors)
        return [next(rest) if present else None for present in self.present]


def opaque_residual_block(config: BlockConfig, input: Tensor, tensors: Tensors) -> tuple[Tensor, list[Tensor]]:
    """Run the block through the opaque operators; return its output and the statistics of every unit."""
    grad = torch.is_grad_enabled()
    requires_grad = [grad and t is not None and t.requires_grad for t in (input, *tensors)]
    # The running statistics of a unit with batch statistics are updated after this call: they must not be operands.
    operands = [
        tensor
        for unit, training in zip(group_by_unit(tensors), config.training, strict=True)
        for tensor in (unit._replace(running_mean=None, running_var=None) if training else unit)
    ]
    present = [t is not None for t in operands]
    flat = [t for t in operands if t is not None]
    ints, floats = config.spec.encode()
    training, names = list(config.training), (config.recompute, config.backend, config.preference, config.group)
    outputs = torch.ops.fused_res.block_forward.default(
        input, flat, present, ints, floats, training, requires_grad, is_channels_last(input), *names
    )
    return outputs[0], [stats.detach() for stats in outputs[1 : 1 + len(training)]]


def _block_forward(input: Tensor, tensors: list[Tensor], *arguments: Any) -> list[Any]:
    block_args = _BlockArguments(*arguments)
    flat = block_args.unflatten(tensors)
    plan = block_args.plan(input, flat)
    slots = plan.run_forward(registry.resolve(block_args.backend, input.device), input, flat)
    return [slots[slot] for slot in (*plan.forward.results, *plan.stats_slots, *_saved_without_stats(plan))]


def _saved_without_stats(plan: Plan) -> list[Slot]:
    """Return the saved slots without the statistics, which forward returns separately, and without the block's input.

    An operator must not return one of its inputs; autograd's context saves the input.
    """
    return [slot for slot in plan.saved_slots if slot != INPUT_SLOT and slot not in plan.stats_slots]


def _block_backward(
    grad_output: Tensor,
    input: Tensor | None,
    size: Sequence[int],
    tensors: list[Tensor],
    saved: list[Tensor],
    *arguments: Any,
) -> list[Tensor]:
    block_args = _BlockArguments(*arguments)
    flat = block_args.unflatten(tensors)
    flags = tuple(block_args.requires_grad)
    plan = plan_backward(block_args.config(), grad_output, size, block_args.channels_last, flat, flags)
    values: dict[Slot, Any] = dict(zip((*plan.stats_slots, *_saved_without_stats(plan)), saved, strict=False))
    values |= {slot: flat[slot - 1] for slot in plan.kept_tensors}
    values[INPUT_SLOT] = input
    gradients = plan.run_backward(registry.resolve(block_args.backend, grad_output.device), grad_output, values)
    # ATen's format for a weight's gradient: fake tensors select ATen's algorithms.
    for at, index in enumerate(plan.differentiable):
        operand = flat[index - 1] if index > 0 else None
        if operand is not None and operand.dim() == 4:
            gradients[at] = to_memory_format(gradients[at], plan.key.channels_last or is_channels_last(operand))
    # The gradients of a norm's weight and bias are rows of one tensor: outputs of an operator must not share memory.
    return [grad.clone() if grad.dim() == 1 and grad._is_view() else grad for grad in gradients]


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    input, tensors, *arguments = inputs
    ctx.block_args = block_args = _BlockArguments(*arguments)
    flat = block_args.unflatten(tensors)
    saved = _without_running_stats(flat)
    ctx.present = [t is not None for t in saved]
    present = [t for t in saved if t is not None]
    ctx.count, ctx.size = len(present), input.shape
    ctx.save_for_backward(
        input if INPUT_SLOT in block_args.plan(input, flat).saved_slots else None, *present, *output[1:]
    )


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple:
    input, *saved = ctx.saved_tensors
    block_args = ctx.block_args
    computed = iter(
        torch.ops.fused_res.block_backward.default(
            grads[0], input, ctx.size, saved[: ctx.count], saved[ctx.count :], *block_args._replace(present=ctx.present)
        )
    )
    grad_input, *rest = (next(computed) if flag else None for flag in block_args.requires_grad)
    grad_tensors = [grad for grad, present in zip(rest, block_args.present, strict=True) if present]
    return grad_input, grad_tensors, *(None,) * len(block_args)


_library.impl("block_forward", _block_forward, "CompositeExplicitAutograd")
_library.impl("block_backward", _block_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fused_res::block_forward", _block_forward, lib=_library)
torch.library.register_fake("fused_res::block_backward", _block_backward, lib=_library)
torch.library.register_autograd("fused_res::block_forward", _backward, setup_context=_setup_context, lib=_library)
flops.register(torch.ops.fused_res.block_forward, _block_forward)
flops.register(torch.ops.fused_res.block_backward, _block_backward)
