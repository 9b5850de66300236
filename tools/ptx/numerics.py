"""Number formats and rounding: conversion between register bits and values, with a single rounding per result.

Intermediate results are rounded to odd in a wider format, so that the second rounding gives the correctly rounded
result (Boldo & Melquiond 2008, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to
odd").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
UNSIGNED = {1: np.dtype(bool), 8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}


def element_type(type_: str) -> str:
    """Return the element type of a packed type: ``f16`` for ``f16x2``."""
    return type_.removesuffix("x2")


def unpacker(type_: str) -> Callable[[Array], Array]:
    """Return a function from bits to values. 16-bit floats become float32; a packed pair becomes two values."""
    match element_type(type_):
        case "pred":
            return lambda bits: bits
        case "bf16":
            return lambda bits: (bits.view("u2").astype("u4") << 16).view("f4")
        case "f16":
            return lambda bits: bits.view("f2").astype("f4")
        case "tf32":
            return lambda bits: (bits & np.uint32(0xFFFFE000)).view("f4")
        case name:
            kind, dtype = ("u" if name[0] == "b" else "i" if name[0] == "s" else name[0]), int(name[1:]) // 8
            return lambda bits: bits.view(f"{kind}{dtype}")


def packer(type_: str) -> Callable[[Array], Array]:
    """Return a function from values to bits that rounds float32, or float64 rounded to odd, to nearest even."""
    match type_:
        case "pred":
            return lambda values: values
        case "bf16":
            return _bfloat16
        case "f16":
            return lambda values: values.astype("f2").view("u2")
        case "bf16x2":
            return lambda values: _bfloat16(values).view("u4")
        case "f16x2":
            return lambda values: values.astype("f2").view("u2").view("u4")
        case "f32":
            return lambda values: values.astype("f4", copy=False).view("u4")
        case name:
            unsigned = f"u{int(name[1:]) // 8}"
            return lambda values: values.view(unsigned)


def _bfloat16(values: Array) -> Array:
    if values.dtype == np.float64:
        values = _float32_round_to_odd(values)
    bits = values.view("u4")
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("u2")
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def _round_to_odd(values: Array, error_sign: Array) -> Array:
    """Round to odd: move inexact values with an even last bit towards the exact value.

    Args:
        values: rounded to nearest.
        error_sign: sign of the exact value minus the rounded one.
    """
    bits = values.view(f"i{values.itemsize}")
    step = np.where((error_sign > 0) == (values > 0), 1, -1)
    inexact = np.isfinite(values) & (error_sign != 0) & (bits & 1 == 0)
    return np.where(inexact, bits + step, bits).astype(bits.dtype).view(values.dtype)


def _float32_round_to_odd(values: Array) -> Array:
    near = values.astype("f4")
    zero = (near == 0) & (values != 0)  # underflow: the smallest subnormal is odd
    near = np.where(zero, np.copysign(np.float32(1e-45), values).astype("f4"), near)
    return np.where(zero, near, _round_to_odd(near, np.sign(values - near)))


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Return a + b and its rounding error (Knuth's TwoSum)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _add_round_to_odd(a: Array, b: Array) -> Array:
    return _round_to_odd(*_two_sum(a, b))


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """Return a * b and its rounding error (Dekker's TwoProduct)."""

    def split(x: Array) -> tuple[Array, Array]:
        big = x * 134217729.0
        high = big - (big - x)
        return high, x - high

    product, (ah, al), (bh, bl) = a * b, split(a), split(b)
    return product, ((ah * bh - product) + ah * bl + al * bh) + al * bl


def fma(a: Array, b: Array, c: Array) -> Array:
    """Return a*b + c rounded once; for float32 operands, as float64 rounded to odd, to be rounded by the writer."""
    if a.dtype != np.float64:
        return _add_round_to_odd(a.astype("f8") * b.astype("f8"), c.astype("f8"))
    # Boldo & Melquiond's Fma; exact unless the product overflows or underflows.
    high, low = _two_product(a, b)
    c_high, c_low = _two_sum(c, low)
    top, rest = _two_sum(high, c_high)
    plain, result = a * b + c, top + _add_round_to_odd(rest, c_low)
    return np.where(np.isfinite(plain) & (result != 0), result, plain)  # a zero result has the sign of the plain one


def add_round_to_odd(a: Array, b: Array) -> Array:
    """Return a + b of float32 operands as float64 rounded to odd."""
    return _add_round_to_odd(a.astype("f8"), b.astype("f8"))


def round_directed(mode: str, values: Array) -> Array:
    """Round float64 that was rounded to odd to float32: towards zero (rz), down (rm) or up (rp)."""
    near = values.astype("f4")
    limit = {"rz": np.zeros_like(near), "rm": np.full_like(near, -np.inf), "rp": np.full_like(near, np.inf)}[mode]
    beyond = {"rz": abs(near) > abs(values), "rm": near > values, "rp": near < values}[mode]
    return np.where(beyond, np.nextafter(near, limit), near)


def maximum_number(a: Array, b: Array) -> Array:
    """Return IEEE 754-2019 maximumNumber: the other operand if one is NaN, and +0 for +0 and -0."""
    return np.where((a == 0) & (b == 0), a + b, np.fmax(a, b))


def minimum_number(a: Array, b: Array) -> Array:
    """Return IEEE 754-2019 minimumNumber."""
    return -maximum_number(-a, -b)


def flush_subnormals(values: Array) -> Array:
    """Replace subnormal float32 values by zeros of the same sign."""
    return np.where(np.abs(values) < np.finfo("f4").tiny, np.copysign(values.dtype.type(0), values), values)


def saturate(values: Array) -> Array:
    """Clamp to [0, 1], with NaN to 0."""
    return np.where(np.isnan(values), values.dtype.type(0), np.clip(values, 0, 1))


def to_integer(values: Array, type_: str, source: str) -> Array:
    """Convert to an integer type with saturation, and NaN as PTX specifies it."""
    limits = np.iinfo(f"{'i' if type_[0] == 's' else 'u'}{int(type_[1:]) // 8}")
    wide = values.astype("f8")
    inside = (wide >= float(limits.min)) & (wide < float(limits.max) + (limits.bits < 64))
    result = np.where(inside, wide, 0).astype(limits.dtype)
    result = np.where(~inside & (wide > 0), limits.dtype.type(limits.max), result)
    result = np.where(~inside & (wide < 0), limits.dtype.type(limits.min), result)
    odd = source == "f64" or limits.bits == 64
    nan = limits.dtype.type(limits.min if limits.min else 1 << (limits.bits - 1)) if odd else limits.dtype.type(0)
    return np.where(np.isnan(wide), nan, result)
