"""Planner: selects the algorithms of a block's convolutions and builds its forward and backward programs.

A plan is a pure, cached function of its :class:`~fused_res.block.plan.PlanKey`: the tensors' metadata, the block's
options and the settings of the algorithm selection. Planning times nothing and reads no tensor's data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from fused_res.block.plan import BlockConfig, Plan, PlanKey, Unit
from fused_res.block.program import NO_SLOT, Program, Slot
from fused_res.dispatch import Problem, TrainingAlgorithms, select_training
from fused_res.ops.checks import RELU_OR_IDENTITY
from fused_res.ops.memory_format import is_channels_last
from fused_res.spec import group_by_unit


def plan(
    config: BlockConfig,
    input: Tensor,
    tensors: Sequence[Tensor | None],
    requires_grad: tuple[bool, ...] | None = None,
    algorithms: tuple[TrainingAlgorithms | None, ...] | None = None,
) -> Plan:
    """Return the plan of a block for these tensors.

    Args:
        config: the block's options.
        input, tensors: the block's input and its flat list of tensors, None for absent ones.
        requires_grad, algorithms: see :class:`PlanKey`.

    Raises:
        ValueError, TypeError: a tensor does not fit the spec.
    """
    # This runs for every block of every training step. Reading the metadata of all tensors takes most of the time, so
    # it is compared with that of earlier calls first.
    recallable = requires_grad is None and algorithms is None
    settings = registry.selection_settings(config.backend)
    try:
        if recallable:
            absent = tuple([t is None for t in tensors])
            recent_key = config, input.shape, absent, torch.is_grad_enabled(), settings
            for same, recent in _recent_plans.get(recent_key, ()):
                if same(input, *[t for t in tensors if t is not None]):
                    return recent
        metas = (_meta(input), *[None if t is None else _meta(t) for t in tensors])
    except (AttributeError, TypeError):
        check_tensors(config.spec, tensors)
        raise
    if requires_grad is None and not torch.is_grad_enabled():
        requires_grad = (False,) * len(metas)
    under_torch_dispatch = _under_torch_dispatch(input, *tensors)
    key = PlanKey(config, metas, is_channels_last(input), requires_grad, algorithms, under_torch_dispatch, *settings)
    if _is_symbolic(input, input.shape):
        return _check_and_plan(key)
    found = _cached_check_and_plan(key)
    if recallable and not under_torch_dispatch:
        _remember(recent_key, [input, *[t for t in tensors if t is not None]], found)
    return found


#: (options, shape of the input, absent tensors, grad mode, settings) -> plans of recent calls, each with a function
#: that compares the metadata of tensors with those of that call.
_recent_plans: dict[tuple[Any, ...], tuple[tuple[Callable[..., bool], Plan], ...]] = {}
_MAX_RECENT_KEYS, _MAX_RECENT_PLANS = 4096, 8


def _remember(key: tuple[Any, ...], tensors: Sequence[Tensor], plan: Plan) -> None:
    if len(_recent_plans) >= _MAX_RECENT_KEYS:
        _recent_plans.clear()
    others = _recent_plans.get(key, ())[: _MAX_RECENT_PLANS - 1]
    _recent_plans[key] = ((_torch_compat.metadata_check(tensors), plan), *others)


def plan_backward(
    config: BlockConfig,
    grad_output: Tensor,
    size: Sequence[int],
    channels_last: bool,
    tensors: Sequence[Tensor | None],
    requires_grad: tuple[bool, ...],
) -> Plan:
    """Return the plan of a block whose forward was checked, from the arguments of its backward operator.

    The plan is the same as forward's, although backward has only the input's size and no running statistics.
    """
    input = tuple(size), (), grad_output.dtype, False, grad_output.device
    metas = (input, *[None if t is None else _meta(t) for t in tensors])
    under_torch_dispatch, settings = (
        _under_torch_dispatch(grad_output, *tensors),
        registry.selection_settings(config.backend),
    )
    key = PlanKey(config, metas, channels_last, requires_grad, None, under_torch_dispatch, *settings)
    return _plan(key) if _is_symbolic(grad_output, size) else cached_plan(key)


def _is_symbolic(input: Tensor, size: Sequence[int]) -> bool:
    """Return whether sizes may be symbolic, which cannot be dictionary keys: of fake tensors and their wrappers."""
    return isinstance(input, FakeTensor) or any(isinstance(length, torch.SymInt) for length in size)


def _meta(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad, tensor.device


def _under_torch_dispatch(*tensors: Tensor | None) -> bool:
    """Return whether a dispatch mode is active or an argument is a tensor subclass."""
    if _torch_compat.has_torch_dispatch_mode():
        return True
    return any(kind is not Tensor and kind is not Parameter and kind is not NoneType for kind in map(type, tensors))


def _check_and_plan(key: PlanKey) -> Plan:
    input, *tensors = (None if meta is None else TensorMeta(*meta) for meta in key.metas)
    assert input is not None
    config = key.config
    check_block(config.spec, input, tensors, config.training, single_process=not config.group)
    return _plan(key)


def _plan(key: PlanKey) -> Plan:
    builder = BackwardBuilder(key, *_units(key))
    output = builder.forward()
    stats = tuple(builder.slots[name] for name in map(stats_name, builder.all_units) if name in builder.slots)
    forward, builder.steps = builder.steps, []
    saved_names = None
    if builder.needs_backward:
        saved_names = _actually_saved(key, builder.all_units) if key.under_torch_dispatch else None
        builder.backward(saved_names)
    grads = tuple(builder.slots.get(f"grad {name}", NO_SLOT) for name in builder.input_names)
    backward, inputs = Program(tuple(builder.steps), grads), {builder.slots[name] for name in builder.input_names}
    if saved_names is not None:
        saved = tuple(builder.slots[name] for name in saved_names)
    else:
        saved = _saved_slots(builder, backward, inputs, stats) if builder.needs_backward else ()
    return Plan(
        key, builder.units, builder.projection, tuple(builder.names),
        Program(tuple(forward), (output,)).with_last_uses({*inputs, *saved, *stats}), backward.with_last_uses(inputs),
        saved, stats, builder.needs_backward,
    )  # fmt: skip


def _actually_saved(key: PlanKey, units: Sequence[Unit]) -> list[str] | None:
    """Return the names of the values that the block saves without a torch_dispatch mode, in order.

    The modes' own programs, of ATen's convolutions, would save others: a fused backward reads no activation. But they
    stand for the block where it is compiled, and a mode may be entered between forward and backward. None: no unit can
    be fused, so both save the same; then nothing is selected, which would add guards on symbolic sizes.
    """
    algorithms = registry.algorithms(key.config.backend)
    problems = [unit.problem._replace(under_torch_dispatch=False) for unit in units]
    if not any(one.fused and one.unsupported_reason(problem) is None for one in algorithms for problem in problems):
        return None
    actual = _plan(key._replace(under_torch_dispatch=False))
    return [actual.slot_names[slot] for slot in actual.saved_slots]


def _units(key: PlanKey) -> tuple[list[Unit], list[int]]:
    """Select the algorithms of every unit, the projection last.

    Returns:
        The units, and for each unit the number of values per channel of its output.
    """
    config, spec = key.config, key.config.spec
    input, *tensors = (None if meta is None else TensorMeta(*meta) for meta in key.metas)
    assert input is not None
    flags = key.requires_grad or tuple(bool(meta and meta.requires_grad) for meta in (input, *tensors))
    units: list[Unit] = []
    values_per_channel: list[int] = []
    for unit_spec, unit_tensors, needs_grad in zip(
        spec.convolutions, group_by_unit(tensors), group_by_unit(flags[1:]), strict=True
    ):
        index = len(units)
        projection = index == len(spec.units)
        if index == 0 or projection:
            input_name, shape, needs_input_grad = "x", tuple(input.shape), flags[0]
            input_activation: str = "identity"
        problem = Problem(
            "forward", shape, tuple(unit_tensors.weight.shape), *unit_spec.geometry, input.dtype, input.device.type,
            key.channels_last and (input_name == "x" or shape[1] > 1),
            weight_channels_last=_is_channels_last_contiguous(unit_tensors.weight), projection=projection,
            residual=index == 0 and spec.shortcut == "identity" and needs_input_grad,
            under_torch_dispatch=key.under_torch_dispatch, allow_winograd=key.allow_winograd, machine=key.machine,
            relu_norms={input_activation, unit_spec.activation} <= set(RELU_OR_IDENTITY),
        )  # fmt: skip
        algorithms = (key.algorithms and key.algorithms[index]) or select_training(
            registry.algorithms(config.backend), problem, config.preference
        )
        output_name = "zs" if projection else f"z{index}"
        units.append(
            Unit(
                unit_spec,
                index,
                input_name,
                output_name,
                config.training[index],
                needs_input_grad,
                needs_grad,
                unit_tensors.weight.dtype != input.dtype,
                problem,
                algorithms,
            )
        )
        shape = shape[0], unit_tensors.weight.shape[0], *problem.output_size
        values_per_channel.append(math.prod((shape[0], *shape[2:])))
        input_name, needs_input_grad = f"a{index}", units[-1].needs_norm_grad
        input_activation = unit_spec.activation
    return units, values_per_channel


def _saved_slots(
    builder: BackwardBuilder, backward: Program, inputs: set[Slot], stats: Sequence[Slot]
) -> tuple[Slot, ...]:
    """Return the live-in slots of backward, plus the block's input if double backward needs it.

    Double backward starts from the input, which is saved wherever a gradient with respect to it is required.
    """
    defined = {builder.slots["dy"], *(slot for step in backward.steps for slot in step.results)}
    live_in = {*stats, *(slot for step in backward.steps for slot in step.operands)} - defined
    x = builder.slots["x"]
    live_in = live_in - inputs | ({x} if builder.needs_input_grad or x in live_in else set())
    # The order must not depend on the algorithms, because fake tensors select other ones. The ReLU mask and the
    # pooling's indices are last: the key of Inductor's on-disk cache does not cover an operator's results, so graphs
    # that earlier versions cached rely on this order.
    return tuple(sorted(live_in, key=lambda slot: (builder.names[slot] in ("mask", "indices"), builder.names[slot])))


_cached_check_and_plan = lru_cache(maxsize=4096)(_check_and_plan)
#: The plan for a key whose tensors were checked.
cached_plan = lru_cache(maxsize=4096)(_plan)


def _is_channels_last_contiguous(meta: TensorMeta) -> bool:
    """Return whether a 4D weight is dense in channels_last memory format."""
    expected = 1
    for dim in (1, 3, 2, 0) if len(meta.shape) == 4 else ():
        if meta.shape[dim] != 1 and meta.stride[dim] != expected:
            return False
        expected *= meta.shape[dim]
    return len(meta.shape) == 4
