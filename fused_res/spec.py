"""Frozen, hashable specifications of residual blocks (He et al. 2015, https://arxiv.org/abs/1512.03385).

A block is a chain of ``n >= 1`` units (convolution, batch norm, activation), which is the main path, an optional
shortcut that is added before the chain's last activation, and, for the stem of a network, a max pooling after the
chain. The unit of a projection shortcut is not part of the chain. A specification contains no tensors: these are passed
separately, as a flat list in the order of :meth:`BlockSpec.tensor_names`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar

from fused_res.ops.checks import (
    ACTIVATIONS,
    RELU_OR_IDENTITY,
    Activation,
    check_activation,
    check_negative_slope,
)
from fused_res.ops.geometry import Geometry

#: How much of forward a block recomputes in backward instead of saving it: see ``functional.residual_block``.
RECOMPUTE_LEVELS = ("none", "norm", "conv")

T = TypeVar("T")


class UnitTensors(NamedTuple):
    """One value per tensor of a unit: the convolution's, then the batch norm's. All but ``weight`` may be None."""

    weight: Any
    bias: Any
    norm_weight: Any
    norm_bias: Any
    running_mean: Any
    running_var: Any

    @property
    def parameters(self) -> tuple[Any, Any, Any, Any]:
        """The four tensors that may require a gradient."""
        return self[:4]

    @property
    def norm(self) -> tuple[Any, Any, Any, Any]:
        """The batch norm's four tensors."""
        return self[2:]


def group_by_unit(values: Sequence[Any]) -> list[UnitTensors]:
    """Group a flat sequence, with one value per tensor of a block, by unit."""
    count = len(UnitTensors._fields)
    return [UnitTensors(*values[start : start + count]) for start in range(0, len(values), count)]


@dataclass(frozen=True)
class UnitSpec:
    """A conv-BN-act unit: a convolution (cross-correlation with zero padding), a batch norm and an activation.

    The activation of a block's last unit follows the addition of the shortcut.

    Args:
        stride, padding, dilation: tuples of integers, one per spatial dimension (1 to 3), of equal length.
        groups: number of convolution groups.
        eps: constant that is added to the batch norm's variance.
        activation: ``"identity"``, ``"relu"``, ``"relu6"``, ``"leaky_relu"`` or ``"silu"``; after the addition of a
            shortcut, ``"identity"`` or ``"relu"``.
        negative_slope: slope of ``"leaky_relu"`` for negative inputs; other activations ignore it.

    Raises:
        ValueError, TypeError: an argument is invalid.
    """

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    eps: float = 1e-5
    activation: Activation = "relu"
    negative_slope: float = 0.01

    def __post_init__(self) -> None:
        check_activation(self.activation)
        check_negative_slope(self.negative_slope)
        for name in ("stride", "padding", "dilation"):
            _check_numbers(name, getattr(self, name), 0 if name == "padding" else 1)
        rank = len(self.stride)
        if not 1 <= rank <= 3 or len(self.padding) != rank or len(self.dilation) != rank:
            raise ValueError(
                "stride, padding and dilation must have the same length, one integer per spatial dimension (1 to 3),"
                f" got {self.stride}, {self.padding} and {self.dilation}"
            )
        if not isinstance(self.groups, int) or self.groups < 1:
            raise ValueError(f"groups must be a positive integer, got {self.groups!r}")
        if not isinstance(self.eps, (int, float)) or not 0 <= self.eps < math.inf:
            raise ValueError(f"eps must be a finite non-negative number, got {self.eps!r}")

    @property
    def geometry(self) -> Geometry:
        """Stride, padding, dilation and groups, in the order of the operators' arguments."""
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def relu(self) -> bool:
        """Whether the activation is a ReLU and not the identity, for kernels that have only these two.

        Raises:
            ValueError: it is neither.
        """
        check_activation(self.activation, RELU_OR_IDENTITY)
        return self.activation == "relu"


@dataclass(frozen=True)
class PoolSpec:
    """2D max pooling of a stem, as :class:`torch.nn.MaxPool2d` without ``ceil_mode`` and dilation.

    Args:
        kernel_size, stride: tuples of two positive integers; a window covers at most 255 positions, because the saved
            indices are uint8 and 255 is reserved for "no position".
        padding: tuple of two non-negative integers, each at most half of the kernel's size.

    Raises:
        ValueError: an argument is invalid.
    """

    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        for name in ("kernel_size", "stride", "padding"):
            values = getattr(self, name)
            _check_numbers(name, values, 0 if name == "padding" else 1)
            if len(values) != 2:
                raise ValueError(f"{name} must be two integers, got {values}")
        if self.kernel_size[0] * self.kernel_size[1] > 255:
            raise ValueError(f"kernel_size may cover at most 255 positions (uint8 indices), got {self.kernel_size}")
        if any(not 0 <= 2 * p <= k for p, k in zip(self.padding, self.kernel_size, strict=True)):
            raise ValueError(f"padding must be at most half of kernel_size, got {self.padding} of {self.kernel_size}")


@dataclass(frozen=True)
class GlobalAveragePoolSpec:
    """Mean over the pixels of each channel, ``(N, C, H, W)`` to ``(N, C, 1, 1)``; inference graphs only."""


@dataclass(frozen=True)
class BlockSpec:
    """A residual block: a chain of units, the shortcut that is added to its end, and a stem's max pooling.

    Args:
        units: tuple of one or more :class:`UnitSpec`, all with the same number of spatial dimensions.
        shortcut: ``"none"``, ``"identity"`` (the block's input) or a :class:`UnitSpec` (a projection of the input,
            whose own activation must be ``"identity"``).
        pool: :class:`PoolSpec` of the max pooling after the chain, or None; requires ``shortcut="none"``.

    Raises:
        ValueError, TypeError: an argument is invalid.
    """

    units: tuple[UnitSpec, ...]
    shortcut: Literal["none", "identity"] | UnitSpec = "none"
    pool: PoolSpec | None = None
    _hash: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        if not isinstance(self.units, tuple) or any(not isinstance(unit, UnitSpec) for unit in self.units):
            raise TypeError(f"units must be a tuple of UnitSpec, got {self.units!r}")
        if not self.units:
            raise ValueError("units must contain at least one UnitSpec")
        if isinstance(self.shortcut, UnitSpec):
            if self.shortcut.activation != "identity":
                raise ValueError("shortcut: a projection has no activation of its own, set activation='identity'")
        elif self.shortcut not in ("none", "identity"):
            raise ValueError(f"shortcut must be 'none', 'identity' or a UnitSpec, got {self.shortcut!r}")
        if self.shortcut != "none":
            check_activation(self.units[-1].activation, RELU_OR_IDENTITY, " after the addition of a shortcut")
        if len({len(unit.stride) for unit in self.convolutions}) > 1:
            raise ValueError(
                f"units and shortcut must all have the same number of spatial dimensions, got {self.convolutions}"
            )
        if not isinstance(self.pool, PoolSpec | None):
            raise TypeError(f"pool must be a PoolSpec or None, got {self.pool!r}")
        if self.pool is not None and self.shortcut != "none":
            raise ValueError("pool must be None unless shortcut is 'none': only a stem has a max pooling")
        # Every call looks up its plan by the spec; hashing nested dataclasses each time takes microseconds.
        object.__setattr__(self, "_hash", hash((self.units, self.shortcut, self.pool)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def projection(self) -> UnitSpec | None:
        """The unit of a projection shortcut; None for other shortcuts."""
        return self.shortcut if isinstance(self.shortcut, UnitSpec) else None

    @property
    def convolutions(self) -> tuple[UnitSpec, ...]:
        """All units: those of the chain, then the projection."""
        return self.units if self.projection is None else (*self.units, self.projection)

    def tensor_names(self) -> tuple[str, ...]:
        """Return the names of the flat list of tensors, the fields of :class:`UnitTensors` per unit, as ``"0.weight"``.

        The units of the chain come first, by index, then the projection, whose name is ``"shortcut"``.
        """
        owners = [str(i) for i in range(len(self.units))] + ["shortcut"] * (self.projection is not None)
        return tuple(f"{owner}.{name}" for owner in owners for name in UnitTensors._fields)

    def per_unit(self, value: T | Sequence[T], name: str) -> tuple[T, ...]:
        """Return one value per unit of :attr:`convolutions`.

        Args:
            value: one value, which is repeated, or a list or tuple with one value per unit.
            name: name of the argument in the error message.

        Raises:
            ValueError: ``value`` is a list or tuple of another length.
        """
        count = len(self.convolutions)
        if not isinstance(value, (tuple, list)):
            return (value,) * count  # type: ignore[return-value]
        if len(value) != count:
            raise ValueError(f"{name} must be one value or {count} (one per unit), got {len(value)}")
        return tuple(value)

    # Operators accept no Python objects: under torch.compile a spec is passed to the opaque operators as two lists.
    def encode(self) -> tuple[list[int], list[float]]:
        """Encode the spec as a list of integers, and eps and negative slope of every unit; inverse: :meth:`decode`."""
        ints: list[int] = [len(self.units), {"none": 0, "identity": 1}.get(self.shortcut, 2)]  # type: ignore[arg-type]
        for unit in self.convolutions:
            ints += [len(unit.stride), *unit.stride, *unit.padding, *unit.dilation, unit.groups]
            ints.append(ACTIVATIONS.index(unit.activation))
        if self.pool is not None:
            ints += [*self.pool.kernel_size, *self.pool.stride, *self.pool.padding]
        return ints, [value for unit in self.convolutions for value in (unit.eps, unit.negative_slope)]

    @staticmethod
    def decode(ints: Sequence[int], floats: Sequence[float]) -> BlockSpec:
        """Return the spec that :meth:`encode` encoded."""
        return _decode(tuple(ints), tuple(floats))


@lru_cache(maxsize=1024)
def _decode(ints: tuple[int, ...], floats: tuple[float, ...]) -> BlockSpec:
    # Cached because a compiled block decodes its spec on every call.
    rest = list(ints)

    def take(count: int) -> tuple[int, ...]:
        head, rest[:count] = tuple(rest[:count]), []
        return head

    length, shortcut_code = take(2)
    units = []
    for eps, negative_slope in zip(floats[::2], floats[1::2], strict=True):
        (rank,) = take(1)
        stride, padding, dilation = take(rank), take(rank), take(rank)
        groups, activation = take(2)
        units.append(UnitSpec(stride, padding, dilation, groups, eps, ACTIVATIONS[activation], negative_slope))
    shortcut = units[length] if shortcut_code == 2 else ("none", "identity")[shortcut_code]
    pool = PoolSpec(take(2), take(2), take(2)) if rest else None  # type: ignore[arg-type]
    return BlockSpec(tuple(units[:length]), shortcut, pool)  # type: ignore[arg-type]


def _check_numbers(name: str, values: object, minimum: int) -> None:
    if not isinstance(values, tuple) or any(not isinstance(v, int) or v < minimum for v in values):
        raise ValueError(f"{name} must be a tuple of integers >= {minimum}, got {values!r}")
