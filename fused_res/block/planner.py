"""Plans a block: selects the algorithms of its convolutions and writes its forward and backward programs.

Planning is pure and cached: the same request gives the same plan, nothing is timed, no tensor is touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_res import _torch_compat
from fused_res._torch_compat import FakeTensor
from fused_res.backends import registry
from fused_res.block.backward import BackwardBuilder
from fused_res.block.checks import TensorMeta, check_block, check_tensors
from fused_res.block.forward import stats_name
from fused_res.block.plan import BlockConfig, Plan, Request, Unit
from fused_res.block.program import NONE, Program, Slot
from fused_res.dispatch import Algorithms, Problem, select_training
from fused_res.ops.memory_format import is_channels_last
from fused_res.spec import by_unit


def plan(
    config: BlockConfig,
    input: Tensor,
    tensors: Sequence[Tensor | None],
    requires_grad: tuple[bool, ...] | None = None,
    algorithms: tuple[Algorithms | None, ...] | None = None,
) -> Plan:
    """The plan for these tensors; raises ValueError or TypeError for any that do not fit the spec.

    ``requires_grad`` and ``algorithms`` are those of :class:`Request`.
    """
    # This runs for every block of every step: plain tuples, and one look into the cache.
    try:
        metas = (_meta(input), *[None if t is None else _meta(t) for t in tensors])
    except AttributeError:
        check_tensors(config.spec, tensors)
        raise
    if requires_grad is None and not torch.is_grad_enabled():
        requires_grad = (False,) * len(metas)
    traced, settings = _is_traced(input, *tensors), registry.settings(config.backend)
    request = Request(config, metas, is_channels_last(input), requires_grad, algorithms, traced, *settings)
    # Fake tensors may have symbolic sizes, which cannot be dictionary keys.
    return _check_and_plan(request) if isinstance(input, FakeTensor) else _checked(request)


def plan_backward(
    config: BlockConfig,
    grad_output: Tensor,
    size: Sequence[int],
    channels_last: bool,
    tensors: Sequence[Tensor | None],
    requires_grad: tuple[bool, ...],
) -> Plan:
    """The plan of a forward that was checked, from what its backward has: the input's size, no running statistics."""
    input = tuple(size), (), grad_output.dtype, False, grad_output.device
    metas = (input, *[None if t is None else _meta(t) for t in tensors])
    traced, settings = _is_traced(grad_output, *tensors), registry.settings(config.backend)
    request = Request(config, metas, channels_last, requires_grad, None, traced, *settings)
    return _plan(request) if isinstance(grad_output, FakeTensor) else plan_for(request)


def _meta(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad, tensor.device


def _is_traced(*tensors: Tensor | None) -> bool:
    if _torch_compat.is_observed():
        return True
    return any(kind is not Tensor and kind is not Parameter and kind is not NoneType for kind in map(type, tensors))


def _check_and_plan(request: Request) -> Plan:
    input, *tensors = (None if meta is None else TensorMeta(*meta) for meta in request.metas)
    assert input is not None
    config = request.config
    check_block(config.spec, input, tensors, config.training, alone=not config.group)
    return _plan(request)


def _plan(request: Request) -> Plan:
    builder = BackwardBuilder(request, *_units(request))
    output = builder.forward()
    stats = tuple(builder.slots[name] for name in map(stats_name, builder.all_units) if name in builder.slots)
    forward, builder.steps = builder.steps, []
    if builder.grad:
        builder.backward()
    grads = tuple(builder.slots.get(f"grad {name}", NONE) for name in builder.given)
    backward, fixed = Program(tuple(builder.steps), grads), {builder.slots[name] for name in builder.given}
    saved = _saved(builder, backward, fixed, stats) if builder.grad else ()
    return Plan(
        request, builder.units, builder.projection, tuple(builder.names),
        Program(tuple(forward), (output,)).freeing({*fixed, *saved, *stats}), backward.freeing(fixed),
        saved, stats, builder.grad,
    )  # fmt: skip


def _units(request: Request) -> tuple[list[Unit], list[int]]:
    """The block's units with their algorithms, the projection last; and for each, its output's values per channel."""
    config, spec = request.config, request.config.spec
    input, *tensors = (None if meta is None else TensorMeta(*meta) for meta in request.metas)
    assert input is not None
    flags = request.requires_grad or tuple(bool(meta and meta.requires_grad) for meta in (input, *tensors))
    units: list[Unit] = []
    counts: list[int] = []
    for unit, owned, wanted in zip(spec.convolutions, by_unit(tensors), by_unit(flags[1:]), strict=True):
        index = len(units)
        projection = index == len(spec.units)
        if index == 0 or projection:
            reads, shape, grad_reads = "x", tuple(input.shape), flags[0]
        problem = Problem(
            "forward", shape, tuple(owned.weight.shape), *unit.geometry, input.dtype, input.device.type,
            request.channels_last and (reads == "x" or shape[1] > 1),
            weight_channels_last=_is_channels_last_contiguous(owned.weight), projection=projection,
            traced=request.traced, winograd=request.winograd, machine=request.machine,
        )  # fmt: skip
        algorithms = (request.algorithms and request.algorithms[index]) or select_training(
            registry.algorithms(config.backend), problem, config.preference
        )
        makes = "zs" if projection else f"z{index}"
        units.append(Unit(unit, index, reads, makes, config.training[index], grad_reads, wanted, problem, algorithms))
        shape = shape[0], owned.weight.shape[0], *problem.output
        counts.append(math.prod((shape[0], *shape[2:])))
        reads, grad_reads = f"a{index}", units[-1].grad_norm
    return units, counts


def _saved(builder: BackwardBuilder, backward: Program, fixed: set[Slot], stats: Sequence[Slot]) -> tuple[Slot, ...]:
    """What backward reads and does not make, and the input, which a second derivative starts from."""
    made = {builder.slots["dy"], *(slot for step in backward.steps for slot in step.results)}
    read = {*stats, *(slot for step in backward.steps for slot in step.operands)} - made
    x = builder.slots["x"]
    read = read - fixed | ({x} if builder.grad_input or x in read else set())
    # An order that does not depend on the algorithms: fake tensors have others. The mask last, as in caches of
    # Inductor, which does not see a change of an operator's results.
    return tuple(sorted(read, key=lambda slot: (builder.names[slot] == "mask", builder.names[slot])))


_checked = lru_cache(maxsize=4096)(_check_and_plan)
#: The plan for a request whose tensors were checked.
plan_for = lru_cache(maxsize=4096)(_plan)


def _is_channels_last_contiguous(meta: TensorMeta) -> bool:
    """Whether a weight of images is dense in channels_last memory."""
    expected = 1
    for dim in (1, 3, 2, 0) if len(meta.shape) == 4 else ():
        if meta.shape[dim] != 1 and meta.stride[dim] != expected:
            return False
        expected *= meta.shape[dim]
    return len(meta.shape) == 4
