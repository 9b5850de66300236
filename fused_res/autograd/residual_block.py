"""A residual block as one autograd Function; and, for ``torch.compile``, as two opaque operators.

Compiled, the Function would be traced: AOTAutograd would then see that backward recomputes what forward has made,
merge the two, and save what was not to be saved. Operators that it cannot look into keep their word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fused_res import block, flops
from fused_res.backends import registry
from fused_res.backends.reference.residual_block import residual_block as reference
from fused_res.block import Kept, Tensors
from fused_res.layout import is_channels_last
from fused_res.ops import MEAN, VAR
from fused_res.plan import Plan, decide, plan, static_choices
from fused_res.spec import BlockSpec


class ResidualBlock(Function):
    """Returns the output and the ``stats`` of every unit; running statistics are the caller's to update."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, input: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        output, kept = block.forward(plan, registry.resolve(plan.backend, input.device), input, tensors)
        ctx.mark_non_differentiable(*kept.stats)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.save_for_backward(*_without_running(tensors), *kept.values.values(), *kept.stats, kept.mask)
        ctx.names = tuple(kept.values)
        return output, *kept.stats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        count = len(plan.spec.tensor_names())
        if grad_output is None:
            return (None,) * (2 + count)
        saved = ctx.saved_tensors
        tensors, rest = saved[:count], saved[count:]
        values = dict(zip(ctx.names, rest, strict=False))
        kept = Kept(values, list(rest[len(values) : -1]), rest[-1])
        if torch.is_grad_enabled():
            return None, *_differentiable_backward(plan, grad_output, tensors, kept)
        return None, *block.backward(
            plan, registry.resolve(plan.backend, grad_output.device), grad_output, tensors, kept
        )


def _without_running(tensors: Tensors) -> list[Tensor | None]:
    """Backward reads no running buffer: those change with the next step; what was used of them is in ``stats``."""
    return [None if index % 6 >= 4 else tensor for index, tensor in enumerate(tensors)]


def _differentiable_backward(plan: Plan, grad_output: Tensor, tensors: Tensors, kept: Kept) -> list[Tensor | None]:
    """The gradients as a graph that can be differentiated again: the block anew from its input, in plain PyTorch."""
    if plan.group:
        raise RuntimeError("a block with statistics of several processes cannot be differentiated twice")
    wanted = (plan.grad_input, *(flag for unit in plan.all_units for flag in (*unit.grads, False, False)))
    if "x" not in kept.values:
        raise RuntimeError(
            "a block whose input and first convolution need no gradient keeps no input, and cannot be differentiated"
            " twice: give the input requires_grad=True"
        )
    input = kept.values["x"]
    flat = list(tensors)
    for index, stats in enumerate(kept.stats):
        flat[6 * index + 4 : 6 * index + 6] = stats[MEAN], stats[VAR]
    sources = [tensor for tensor, flag in zip((input, *tensors), wanted, strict=True) if flag and tensor is not None]
    y, *_ = reference(input, plan.spec, flat, [unit.training for unit in plan.all_units])
    made = iter(torch.autograd.grad(y, sources, grad_output, create_graph=True))
    return [next(made) if flag else None for flag in wanted]


# What follows is for torch.compile. Operators take no None in a list of tensors, so absent tensors are left out and
# `present` says where. The block's output, every unit's statistics and everything kept come back as one list.

_library = torch.library.Library("fused_res", "DEF")
_DESCRIPTION = (
    "bool[] present, int[] spec, float[] eps, bool[] training, bool[] requires_grad, bool channels_last,"
    " str recompute, str backend, str preference, str group"
)
_library.define(f"block_forward(Tensor input, Tensor[] tensors, {_DESCRIPTION}) -> Tensor[]")
_library.define(
    f"block_backward(Tensor grad_output, Tensor? input, Tensor[] tensors, Tensor[] kept, {_DESCRIPTION}) -> Tensor[]"
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

    def block_spec(self) -> BlockSpec:
        return BlockSpec.decode(self.spec, self.eps)

    def plan(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Plan:
        """``tensors`` are those that are present."""
        spec, flags, training = self.block_spec(), tuple(self.requires_grad), tuple(self.training)
        weights = [None if t is None else t.shape for t in self.spread(tensors)[::6]]
        choices = static_choices(spec, weights, dtype, self.channels_last, self.backend, self.preference)
        return decide(spec, flags, self.channels_last, training, self.recompute, self.backend, choices, self.group)

    def spread(self, tensors: Iterable[Tensor]) -> list[Tensor | None]:
        rest = iter(tensors)
        return [next(rest) if there else None for there in self.present]


def traceable(
    input: Tensor,
    spec: BlockSpec,
    tensors: Tensors,
    training: Sequence[bool],
    recompute: str,
    backend: str,
    preference: str,
    group: str,
) -> tuple[Tensor, list[Tensor]]:
    """The block through the opaque operators: its output and the statistics of every unit that has any."""
    grad = torch.is_grad_enabled()
    requires_grad = [grad and t is not None and t.requires_grad for t in (input, *tensors)]
    # Running statistics are written after this; where the batch's own are used, the operator must not see them.
    read = [t if index % 6 < 4 or not training[index // 6] else None for index, t in enumerate(tensors)]
    present = [t is not None for t in read]
    given = [t for t in read if t is not None]
    ints, eps = spec.encode()
    outputs = torch.ops.fused_res.block_forward.default(
        input, given, present, ints, eps, list(training), requires_grad, is_channels_last(input), recompute, backend,
        preference, group,
    )  # fmt: skip
    return outputs[0], [stats.detach() for stats in outputs[1 : 1 + len(spec.convolutions)]]


def _block_forward(input: Tensor, tensors: list[Tensor], *description: Any) -> list[Tensor]:
    about = _Description(*description)
    flat = about.spread(tensors)
    training, flags = tuple(about.training), tuple(about.requires_grad)
    made = plan(
        about.block_spec(), input, flat, training, about.recompute, about.backend, flags, None, about.preference,
        about.group,
    )  # fmt: skip
    output, kept = block.forward(made, registry.resolve(about.backend, input.device), input, flat)
    # An operator may not return its own input; autograd saves that by itself.
    values = [value for name, value in kept.values.items() if name != "x"]
    return [output, *kept.stats, *values, *([] if kept.mask is None else [kept.mask])]


def _block_backward(
    grad_output: Tensor, input: Tensor | None, tensors: list[Tensor], kept: list[Tensor], *description: Any
) -> list[Tensor]:
    about = _Description(*description)
    made = about.plan(tensors, grad_output.dtype)
    rest = iter(kept)
    stats = [next(rest) for _ in made.all_units]
    values = {name: input if name == "x" else next(rest) for name in made.saved}
    kernels = registry.resolve(about.backend, grad_output.device)
    flat = about.spread(tensors)
    grads = block.backward(made, kernels, grad_output, flat, Kept(values, stats, next(rest, None)))  # type: ignore[arg-type]
    return [grad for grad in grads if grad is not None]


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    input, tensors, *description = inputs
    ctx.about = about = _Description(*description)
    needed = _without_running(about.spread(tensors))
    ctx.present = [t is not None for t in needed]
    given = [t for t in needed if t is not None]
    ctx.count = len(given)
    ctx.save_for_backward(input if "x" in about.plan(tensors, input.dtype).saved else None, *given, *output[1:])


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple:
    input, *saved = ctx.saved_tensors
    about = ctx.about
    made = iter(
        torch.ops.fused_res.block_backward.default(
            grads[0], input, saved[: ctx.count], saved[ctx.count :], *about._replace(present=ctx.present)
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
