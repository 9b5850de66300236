"""From how convolutions are set to a :class:`~fused_res.spec.BlockSpec`; no modules, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fused_res._torch_compat import constant_while_compiling
from fused_res.ops.geometry import same_padding
from fused_res.spec import BlockSpec, PoolSpec, UnitSpec

#: stride, padding, dilation, groups, padding_mode, weight's shape, eps, whether ReLU follows; as the modules
#: hold them.
UnitKey = tuple[Any, Any, Any, int, str, tuple[int, ...], float, bool]

_specs: dict[tuple[Any, ...], BlockSpec | str] = {}


def block_spec(keys: tuple[UnitKey, ...], shortcut: str, pool: tuple[Any, ...] | None) -> BlockSpec | str:
    """The block that these settings make, or why there is none; cached.

    `shortcut` is "none", "identity" or "projection"; then the last key is the projection's.
    """
    if torch.compiler.is_compiling():
        return getattr(_traced, _traced_name(keys, shortcut, pool))
    whole = (keys, shortcut, pool)
    try:
        if whole not in _specs:
            _specs[whole] = _build(keys, shortcut, pool)
        return _specs[whole]
    except TypeError:  # someone set a stride to a list
        return _build(keys, shortcut, pool)


class _Traced:
    """Specs that compiled code refers to, by name: a growing dictionary would fail its guards."""


_traced = _Traced()
_names: dict[BlockSpec | str, str] = {}


@constant_while_compiling  # the arguments are guarded where they were read
def _traced_name(keys: tuple[UnitKey, ...], shortcut: str, pool: tuple[Any, ...] | None) -> str:
    spec = _build(keys, shortcut, pool)
    name = _names.setdefault(spec, f"spec{len(_names)}")
    setattr(_traced, name, spec)
    return name


def _build(keys: Sequence[UnitKey], shortcut: str, pool: tuple[Any, ...] | None) -> BlockSpec | str:
    try:
        units = tuple(_unit_spec(key) for key in keys)
        pool_spec = None if pool is None else PoolSpec(*map(_pair, pool))
    except ValueError as error:
        return str(error)
    if shortcut == "none":
        return BlockSpec(units, pool=pool_spec)
    shapes = [key[5] for key in keys]
    # `+` broadcasts in a stock forward and does not in ours: both sides need one shape, whatever the input's.
    main = units[:-1] if shortcut == "projection" else units
    added = units[len(main) :]
    channels = shapes[-1][0] if added else shapes[0][1] * units[0].groups
    if channels != shapes[len(main) - 1][0]:
        return f"the shortcut adds {channels} channels to {shapes[len(main) - 1][0]}"
    if _size_map(main, shapes) != _size_map(added, shapes[len(main) :]):
        return "the shortcut may have another spatial size"
    return BlockSpec(main, added[0] if added else "identity")


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value
    return first, second


def _unit_spec(key: UnitKey) -> UnitSpec:
    stride, padding, dilation, groups, padding_mode, shape, eps, relu = key
    if len(shape) != 4:
        raise ValueError(f"a convolution's weight has rank {len(shape)}")
    if padding_mode != "zeros":
        raise ValueError(f"a convolution pads with padding_mode={padding_mode!r}")
    if padding == "valid":
        padding = 0
    elif isinstance(padding, str):  # "same"
        same = same_padding(shape[2:], _pair(stride), _pair(dilation)) if padding == "same" else None
        if same is None:
            raise ValueError(f"a convolution's padding={padding!r} is not the same on both sides")
        padding = same
    return UnitSpec(_pair(stride), _pair(padding), _pair(dilation), groups, eps, "relu" if relu else "identity")


def _size_map(units: Sequence[UnitSpec], shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """For each spatial dimension (s, a) such that these convolutions make floor((n + a) / s) + 1 of a size n.

    Floors nest exactly, so two chains agree on all sizes just when these numbers are equal.
    """
    maps = []
    for dim in range(2):
        s, a = 1, -1
        for unit, shape in zip(units, shapes, strict=False):
            extent = unit.dilation[dim] * (shape[2 + dim] - 1) + 1
            s, a = s * unit.stride[dim], a + s * (1 + 2 * unit.padding[dim] - extent)
        maps.append((s, a))
    return maps
