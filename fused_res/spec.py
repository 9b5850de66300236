"""What a residual block *is*: frozen, hashable descriptions that hold no tensors.

A block is a chain of ``n >= 1`` units (convolution, batch norm, activation), an optional shortcut that is added
before the last activation, and for the stem of a network a max pooling behind it. Its tensors travel apart from
it, flat, in the order that :meth:`BlockSpec.tensor_names` gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar

from fused_res.ops.checks import ACTIVATIONS, Activation
from fused_res.ops.geometry import Geometry

#: How much a block recomputes in backward instead of saving it.
RECOMPUTE = ("none", "norm", "conv")

T = TypeVar("T")


class UnitTensors(NamedTuple):
    """One value for each tensor of a unit: the convolution's, then the batch norm's. Any but the first may be None."""

    weight: Any
    bias: Any
    norm_weight: Any
    norm_bias: Any
    running_mean: Any
    running_var: Any

    @property
    def parameters(self) -> tuple[Any, Any, Any, Any]:
        """The four that may require a gradient."""
        return self[:4]

    @property
    def norm(self) -> tuple[Any, Any, Any, Any]:
        """The batch norm's four."""
        return self[2:]


def by_unit(values: Sequence[Any]) -> list[UnitTensors]:
    """Groups a flat sequence, one value for each tensor of a block, by unit."""
    count = len(UnitTensors._fields)
    return [UnitTensors(*values[start : start + count]) for start in range(0, len(values), count)]


@dataclass(frozen=True)
class UnitSpec:
    """A convolution (cross-correlation with zero padding), a batch norm, an activation.

    The activation of a block's last unit follows the addition of the shortcut.

    Args:
        stride, padding, dilation: a tuple with a number for each spatial dimension (1 to 3), whose count they agree on.
        groups: of the convolution.
        eps: added to the variance.
        activation: ``"relu"`` or ``"identity"``.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    eps: float = 1e-5
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, got {self.activation!r}")
        for name in ("stride", "padding", "dilation"):
            _check_numbers(name, getattr(self, name), 0 if name == "padding" else 1)
        rank = len(self.stride)
        if not 1 <= rank <= 3 or len(self.padding) != rank or len(self.dilation) != rank:
            raise ValueError(
                "stride, padding and dilation must have as many numbers, 1 to 3, one for each spatial dimension,"
                f" got {self.stride}, {self.padding} and {self.dilation}"
            )
        if not isinstance(self.groups, int) or self.groups < 1:
            raise ValueError(f"groups must be a whole number of at least 1, got {self.groups!r}")
        if not isinstance(self.eps, (int, float)) or not 0 <= self.eps < math.inf:
            raise ValueError(f"eps must be a number, 0 or more, got {self.eps!r}")

    @property
    def geometry(self) -> Geometry:
        """The convolution's settings, in the order of the operators' arguments."""
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def relu(self) -> bool:
        """Whether the activation is a ReLU."""
        return self.activation == "relu"


@dataclass(frozen=True)
class PoolSpec:
    """Max pooling of a stem's images, as :class:`torch.nn.MaxPool2d` with floor mode and no dilation.

    Args:
        kernel_size, stride: two numbers of at least 1; a window covers at most 255 positions.
        padding: two numbers, each at most half of the window's.

    Raises:
        ValueError: an argument does not fit.
    """

    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        for name in ("kernel_size", "stride", "padding"):
            values = getattr(self, name)
            _check_numbers(name, values, 0 if name == "padding" else 1)
            if len(values) != 2:
                raise ValueError(f"{name} must be two numbers, got {values}")
        if self.kernel_size[0] * self.kernel_size[1] > 255:
            raise ValueError(f"kernel_size may cover at most 255 positions (1-byte indices), got {self.kernel_size}")
        if any(not 0 <= 2 * p <= k for p, k in zip(self.padding, self.kernel_size, strict=True)):
            raise ValueError(f"padding must be at most half of kernel_size, got {self.padding} of {self.kernel_size}")


@dataclass(frozen=True)
class BlockSpec:
    """A chain of units, what is added to its end, and for the stem of a network a pooling behind it.

    Args:
        units: a tuple of at least one :class:`UnitSpec`, all for as many spatial dimensions.
        shortcut: ``"none"``, ``"identity"`` (the block's input) or a :class:`UnitSpec` (a projection of the input,
            whose own activation must be ``"identity"``).
        pool: a :class:`PoolSpec`, with ``shortcut="none"`` only.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """

    units: tuple[UnitSpec, ...]
    shortcut: Literal["none", "identity"] | UnitSpec = "none"
    pool: PoolSpec | None = None
    _hash: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        if not isinstance(self.units, tuple) or any(not isinstance(unit, UnitSpec) for unit in self.units):
            raise TypeError(f"units must be a tuple of UnitSpec, got {self.units!r}")
        if not self.units:
            raise ValueError("units must hold at least one UnitSpec")
        if isinstance(self.shortcut, UnitSpec):
            if self.shortcut.activation != "identity":
                raise ValueError("shortcut: a projection has no activation of its own, set activation='identity'")
        elif self.shortcut not in ("none", "identity"):
            raise ValueError(f"shortcut must be 'none', 'identity' or a UnitSpec, got {self.shortcut!r}")
        if len({len(unit.stride) for unit in self.convolutions}) > 1:
            raise ValueError(f"units and shortcut must be for as many spatial dimensions each, got {self.convolutions}")
        if not isinstance(self.pool, PoolSpec | None):
            raise TypeError(f"pool must be a PoolSpec or None, got {self.pool!r}")
        if self.pool is not None and self.shortcut != "none":
            raise ValueError("pool is for stems: it goes with shortcut='none' only")
        # A spec is a dictionary key on every call; hashing nested dataclasses anew costs microseconds.
        object.__setattr__(self, "_hash", hash((self.units, self.shortcut, self.pool)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def projection(self) -> UnitSpec | None:
        """The shortcut's unit, if it has one."""
        return self.shortcut if isinstance(self.shortcut, UnitSpec) else None

    @property
    def convolutions(self) -> tuple[UnitSpec, ...]:
        """Every unit that owns tensors: the chain's, then the projection."""
        return self.units if self.projection is None else (*self.units, self.projection)

    def tensor_names(self) -> tuple[str, ...]:
        """Names of the flat tensors, those of :class:`UnitTensors` for each unit, such as ``"0.weight"``.

        The units come first, by number, then the projection, which is called ``"shortcut"``.
        """
        owners = [str(i) for i in range(len(self.units))] + ["shortcut"] * (self.projection is not None)
        return tuple(f"{owner}.{name}" for owner in owners for name in UnitTensors._fields)

    def per_unit(self, value: T | Sequence[T], name: str) -> tuple[T, ...]:
        """``value`` for each of :attr:`convolutions`: spread, or, if it is a list or tuple, checked to be as long.

        Raises:
            ValueError: it has another length; ``name`` is what the message calls it.
        """
        count = len(self.convolutions)
        if not isinstance(value, (tuple, list)):
            return (value,) * count  # type: ignore[return-value]
        if len(value) != count:
            raise ValueError(f"{name} must be one value or {count} (one per unit), got {len(value)}")
        return tuple(value)

    # torch.compile hands specs to opaque operators, whose arguments are tensors and numbers only.
    def encode(self) -> tuple[list[int], list[float]]:
        """Whole numbers and eps, of which :meth:`decode` makes an equal spec."""
        ints: list[int] = [len(self.units), {"none": 0, "identity": 1}.get(self.shortcut, 2)]  # type: ignore[arg-type]
        for unit in self.convolutions:
            ints += [len(unit.stride), *unit.stride, *unit.padding, *unit.dilation, unit.groups, int(unit.relu)]
        if self.pool is not None:
            ints += [*self.pool.kernel_size, *self.pool.stride, *self.pool.padding]
        return ints, [unit.eps for unit in self.convolutions]

    @staticmethod
    def decode(ints: Sequence[int], eps: Sequence[float]) -> BlockSpec:
        """The spec that :meth:`encode` was called on."""
        return _decode(tuple(ints), tuple(eps))


@lru_cache(maxsize=1024)
def _decode(ints: tuple[int, ...], eps: tuple[float, ...]) -> BlockSpec:
    # A compiled block does this on every call.
    rest = list(ints)

    def take(count: int) -> tuple[int, ...]:
        head, rest[:count] = tuple(rest[:count]), []
        return head

    length, shortcut_code = take(2)
    units = []
    for value in eps:
        (rank,) = take(1)
        stride, padding, dilation = take(rank), take(rank), take(rank)
        groups, relu = take(2)
        units.append(UnitSpec(stride, padding, dilation, groups, value, "relu" if relu else "identity"))
    shortcut = units[length] if shortcut_code == 2 else ("none", "identity")[shortcut_code]
    pool = PoolSpec(take(2), take(2), take(2)) if rest else None  # type: ignore[arg-type]
    return BlockSpec(tuple(units[:length]), shortcut, pool)  # type: ignore[arg-type]


def _check_numbers(name: str, values: object, least: int) -> None:
    if not isinstance(values, tuple) or any(not isinstance(v, int) or v < least for v in values):
        raise ValueError(f"{name} must be a tuple of integers >= {least}, got {values!r}")
