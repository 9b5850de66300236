"""Builds a :class:`~fused_res.spec.BlockSpec` from the settings of convolutions; uses no modules and no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fused_res._torch_compat import assume_constant_result
from fused_res.ops.geometry import same_padding
from fused_res.spec import BlockSpec, PoolSpec, UnitSpec

#: stride, padding, dilation, groups, padding_mode, weight shape, eps, activation and negative slope, with the types of
#: the modules' attributes.
UnitKey = tuple[Any, Any, Any, int, str, tuple[int, ...], float, str, float]

_specs: dict[tuple[Any, ...], BlockSpec | str] = {}


def build_block_spec(keys: tuple[UnitKey, ...], shortcut: str, pool: tuple[Any, ...] | None) -> BlockSpec | str:
    """Return the BlockSpec for these settings, or the reason why there is none; cached.

    Args:
        keys: settings of each unit; with a projection, the last key is the projection's.
        shortcut: "none", "identity" or "projection".
        pool: kernel_size, stride and padding of the max pooling after the last unit, or None.
    """
    if torch.compiler.is_compiling():
        return getattr(_dynamo_constants, _dynamo_constant_name(keys, shortcut, pool))
    cache_key = (keys, shortcut, pool)
    try:
        if cache_key not in _specs:
            _specs[cache_key] = _build(keys, shortcut, pool)
        return _specs[cache_key]
    except TypeError:  # unhashable: an attribute such as a stride was set to a list
        return _build(keys, shortcut, pool)


class _DynamoConstants:
    """Specs that compiled code reads as attributes: Dynamo's guards on a growing dictionary would fail."""


_dynamo_constants = _DynamoConstants()
_spec_names: dict[BlockSpec | str, str] = {}


@assume_constant_result  # Dynamo guards the arguments where they were read
def _dynamo_constant_name(keys: tuple[UnitKey, ...], shortcut: str, pool: tuple[Any, ...] | None) -> str:
    spec = _build(keys, shortcut, pool)
    name = _spec_names.setdefault(spec, f"spec{len(_spec_names)}")
    setattr(_dynamo_constants, name, spec)
    return name


def _build(keys: Sequence[UnitKey], shortcut: str, pool: tuple[Any, ...] | None) -> BlockSpec | str:
    try:
        units = tuple(_unit_spec(key) for key in keys)
        pool_spec = None if pool is None else PoolSpec(*[_expand(value, 2) for value in pool])  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    ranks = {len(unit.stride) for unit in units} | ({2} if pool_spec is not None else set())
    if len(ranks) > 1:  # the stock layers may read the batch of one rank as a single image of another
        return f"the layers have different numbers of spatial dimensions: {sorted(ranks)}"
    if shortcut == "none":
        return BlockSpec(units, pool=pool_spec)
    shapes = [key[5] for key in keys]
    # `+` broadcasts in the stock forward but not in the fused one: both operands must have the same shape for every
    # input shape.
    main = units[:-1] if shortcut == "projection" else units
    shortcut_units = units[len(main) :]
    channels = shapes[-1][0] if shortcut_units else shapes[0][1] * units[0].groups
    if channels != shapes[len(main) - 1][0]:
        return f"the shortcut has {channels} channels, the main path {shapes[len(main) - 1][0]}"
    for dim in range(len(shapes[0]) - 2):
        if _size_map(dim, main, shapes) != _size_map(dim, shortcut_units, shapes[len(main) :]):
            return "the shortcut's spatial size may differ from the main path's"
    return BlockSpec(main, shortcut_units[0] if shortcut_units else "identity")


def _expand(value: Any, rank: int) -> tuple[int, ...]:
    """Return one value per spatial dimension."""
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank:
        raise ValueError(f"a layer with {rank} spatial dimensions has the setting {value!r}")
    return values


def _unit_spec(key: UnitKey) -> UnitSpec:
    stride, padding, dilation, groups, padding_mode, shape, eps, activation, negative_slope = key
    rank = len(shape) - 2
    if not 1 <= rank <= 3:
        raise ValueError(f"a convolution's weight has rank {len(shape)}")
    if padding_mode != "zeros":
        raise ValueError(f"a convolution has padding_mode={padding_mode!r}")
    if padding == "valid":
        padding = 0
    elif isinstance(padding, str):  # "same"
        same = same_padding(shape[2:], _expand(stride, rank), _expand(dilation, rank)) if padding == "same" else None
        if same is None:
            raise ValueError(f"a convolution's padding={padding!r} is asymmetric")
        padding = same
    stride, padding, dilation = (_expand(value, rank) for value in (stride, padding, dilation))
    geometry = stride, padding, dilation, groups
    return UnitSpec(*geometry, eps, activation, negative_slope)  # type: ignore[arg-type]


def _size_map(dim: int, units: Sequence[UnitSpec], shapes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """Return (s, a) for a spatial dimension: consecutive `units` map its size n to floor((n + a) / s) + 1.

    Nested floor divisions compose exactly, so two chains have equal output sizes for every n if and only if these
    numbers are equal.
    """
    s, a = 1, -1
    for unit, shape in zip(units, shapes, strict=False):
        extent = unit.dilation[dim] * (shape[2 + dim] - 1) + 1
        s, a = s * unit.stride[dim], a + s * (1 + 2 * unit.padding[dim] - extent)
    return s, a
