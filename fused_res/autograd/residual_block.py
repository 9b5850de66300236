"""A residual block as one autograd Function; and, for ``torch.compile``, as two opaque operators.

Compiled, the Function would be traced: AOTAutograd would then see that backward recomputes what forward computed, merge
the two, and save what was not to be saved. Opaque operators keep AOTAutograd from undoing the recomputation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fused_res import _torch_compat
from fused_res.backends import registry
from fused_res.backends.reference.residual_block import residual_block as reference
from fused_res.block.plan import BlockConfig, Plan
from fused_res.block.planner import plan, plan_backward, plan_for
from fused_res.block.program import NONE, Slot
from fused_res.ops import MEAN, VAR, flops
from fused_res.ops.memory_format import is_channels_last
from fused_res.spec import BlockSpec, by_unit

Tensors = Sequence[Tensor | None]


class ResidualBlock(Function):
    """Returns the output and the ``stats`` of every unit; running statistics are the caller's to update."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, input: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        slots = plan.run_forward(registry.resolve(plan.config.backend, input.device), input, tensors)
        stats: list[Any] = [slots[slot] for slot in plan.stats]
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.save_for_backward(*_without_running(tensors), *[slots[slot] for slot in plan.saved])
        output: Any = slots[plan.forward.results[0]]
        return output, *stats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        count = len(plan.config.spec.tensor_names())
        if grad_output is None:
            return (None,) * (2 + count)
        unpacked = ctx.saved_tensors  # once: checkpointing computes them on the first access
        tensors, saved = unpacked[:count], unpacked[count:]
        if torch.is_grad_enabled():
            return None, *_differentiable_backward(plan, grad_output, tensors, saved)
        if _torch_compat.is_observed() and not plan.request.traced:
            plan = plan_for(plan.request._replace(traced=True))
        kernels = registry.resolve(plan.config.backend, grad_output.device)
        return None, *plan.run_backward(kernels, grad_output, tensors, saved)


def _without_running(tensors: Tensors) -> list[Tensor | None]:
    """Backward reads no running buffer: those change with the next step; ``stats`` holds what was used of them."""
    return [tensor for unit in by_unit(tensors) for tensor in (*unit.parameters, None, None)]


def _differentiable_backward(plan: Plan, grad_output: Tensor, tensors: Tensors, saved: Tensors) -> list[Tensor | None]:
    """The gradients as a graph that can be differentiated again: the block anew from its input, in plain PyTorch."""
    if plan.config.group:
        raise RuntimeError("a block with statistics of several processes cannot be differentiated twice")
    values = {plan.slots[slot]: value for slot, value in zip(plan.saved, saved, strict=True)}
    input = values.get("x")
    if input is None:
        raise RuntimeError(
            "a block whose input and first convolution need no gradient keeps no input, and cannot be differentiated"
            " twice: give the input requires_grad=True"
        )
    flat: list[Tensor | None] = []
    for index, unit in enumerate(by_unit(tensors)):
        stats = values[f"stats{index}"]
        assert stats is not None
        flat += (*unit.parameters, stats[MEAN], stats[VAR])
    wanted = [slot != NONE for slot in plan.backward.results]
    sources = [tensor for tensor, flag in zip((input, *tensors), wanted, strict=True) if flag and tensor is not None]
    y, *_ = reference(input, plan.config.spec, flat, plan.config.training)
    made = iter(torch.autograd.grad(y, sources, grad_output, create_graph=True))
    return [next(made) if flag else None for flag in wanted]


# What follows is for torch.compile. Operators take no None in a list of tensors, so absent tensors are left out and
# `present` says where. The block's output, every unit's statistics and all saved tensors come back as one list; the
# backward's plan needs the input's size, and the input itself only where it was saved.

_library = torch.library.Library("fused_res", "DEF")
_DESCRIPTION = (
    "bool[] present, int[] spec, float[] eps, bool[] training, bool[] requires_grad, bool channels_last,"
    " str recompute, str backend, str preference, str group"
)
_library.define(f"block_forward(Tensor input, Tensor[] tensors, {_DESCRIPTION}) -> Tensor[]")
_library.define(
    "block_backward(Tensor grad_output, Tensor? input, SymInt[] size, Tensor[] tensors, Tensor[] saved,"
    f" {_DESCRIPTION}) -> Tensor[]"
)


class _Description(NamedTuple):
    """A block without its tensors, in an operator's argument types."""

    present: Sequence[bool]
    spec: Sequence[int]
    eps: Sequence[float]
    training: Sequence[bool]
    requires_grad: Sequence[bool]
    channels_last: bool
    recompute: str
    backend: str
    preference: str
    group: str

    def config(self) -> BlockConfig:
        spec = BlockSpec.decode(self.spec, self.eps)
        return BlockConfig(spec, tuple(self.training), self.backend, self.recompute, self.preference, self.group)

    def plan(self, input: Tensor, tensors: Tensors) -> Plan:
        """``tensors`` with None for those that are absent."""
        return plan(self.config(), input, tensors, tuple(self.requires_grad))

    def spread(self, tensors: Iterable[Tensor]) -> list[Tensor | None]:
        rest = iter(tensors)
        return [next(rest) if there else None for there in self.present]


def traceable(config: BlockConfig, input: Tensor, tensors: Tensors) -> tuple[Tensor, list[Tensor]]:
    """The block through the opaque operators: its output and the statistics of every unit that has any."""
    grad = torch.is_grad_enabled()
    requires_grad = [grad and t is not None and t.requires_grad for t in (input, *tensors)]
    # Running statistics are written after this; where the batch's own are used, the operator must not see them.
    read = [
        tensor
        for unit, batch in zip(by_unit(tensors), config.training, strict=True)
        for tensor in (unit._replace(running_mean=None, running_var=None) if batch else unit)
    ]
    present = [t is not None for t in read]
    given = [t for t in read if t is not None]
    ints, eps = config.spec.encode()
    training, names = list(config.training), (config.recompute, config.backend, config.preference, config.group)
    outputs = torch.ops.fused_res.block_forward.default(
        input, given, present, ints, eps, training, requires_grad, is_channels_last(input), *names
    )
    return outputs[0], [stats.detach() for stats in outputs[1 : 1 + len(training)]]


def _block_forward(input: Tensor, tensors: list[Tensor], *description: Any) -> list[Any]:
    about = _Description(*description)
    flat = about.spread(tensors)
    made = about.plan(input, flat)
    slots = made.run_forward(registry.resolve(about.backend, input.device), input, flat)
    return [slots[slot] for slot in (*made.forward.results, *made.stats, *_other_saved(made))]


def _other_saved(plan: Plan) -> list[Slot]:
    """Without the statistics; and an operator may not return its own input, which autograd saves by itself."""
    return [slot for slot in plan.saved if slot != 0 and slot not in plan.stats]


def _block_backward(
    grad_output: Tensor,
    input: Tensor | None,
    size: Sequence[int],
    tensors: list[Tensor],
    saved: list[Tensor],
    *description: Any,
) -> list[Tensor]:
    about = _Description(*description)
    flat = about.spread(tensors)
    flags = tuple(about.requires_grad)
    made = plan_backward(about.config(), grad_output, size, about.channels_last, flat, flags)
    given = dict(zip((*made.stats, *_other_saved(made)), saved, strict=False))
    kernels = registry.resolve(about.backend, grad_output.device)
    values = [input if slot == 0 else given[slot] for slot in made.saved]
    return [grad for grad in made.run_backward(kernels, grad_output, flat, values) if grad is not None]


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    input, tensors, *description = inputs
    ctx.about = about = _Description(*description)
    flat = about.spread(tensors)
    needed = _without_running(flat)
    ctx.present = [t is not None for t in needed]
    given = [t for t in needed if t is not None]
    ctx.count, ctx.size = len(given), input.shape
    ctx.save_for_backward(input if 0 in about.plan(input, flat).saved else None, *given, *output[1:])


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple:
    input, *saved = ctx.saved_tensors
    about = ctx.about
    made = iter(
        torch.ops.fused_res.block_backward.default(
            grads[0], input, ctx.size, saved[: ctx.count], saved[ctx.count :], *about._replace(present=ctx.present)
        )
    )
    grad_input, *rest = (next(made) if flag else None for flag in about.requires_grad)
    grad_tensors = [grad for grad, there in zip(rest, about.present, strict=True) if there]
    return grad_input, grad_tensors, *(None,) * len(about)


_library.impl("block_forward", _block_forward, "CompositeExplicitAutograd")
_library.impl("block_backward", _block_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fused_res::block_forward", _block_forward, lib=_library)
torch.library.register_fake("fused_res::block_backward", _block_backward, lib=_library)
torch.library.register_autograd("fused_res::block_forward", _backward, setup_context=_setup_context, lib=_library)
flops.register(torch.ops.fused_res.block_forward, _block_forward)
flops.register(torch.ops.fused_res.block_backward, _block_backward)
