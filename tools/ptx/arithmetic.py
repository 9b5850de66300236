"""Arithmetic instructions: operand types, result type and numpy function of each opcode."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tools.ptx import numerics
from tools.ptx.numerics import Array
from tools.ptx.parser import BITS


class ArithmeticOp(NamedTuple):
    """The operand types, the result type and the function of an opcode."""

    source_types: tuple[str, ...]
    result_type: str
    function: Callable[..., Array]


_DIRECTED = {"rz", "rm", "rp"}
#: Modifiers that `_simple` and `_multiply` accept. Only .ftz and .sat change the result (`_apply_modifiers`): .rn is
#: the default, and .approx and .full are computed to full accuracy.
_SUPPORTED_MODIFIERS = {"rn", "approx", "full", "lo", "ftz", "sat", "NaN", "aligned"}


def find_operation(parts: tuple[str, ...]) -> ArithmeticOp | None:
    """Return the operation of an opcode (its fields), or None if it is not arithmetic or not supported."""
    base, modifiers = parts[0], parts[1:]
    types = [part for part in modifiers if part in BITS]
    flags = {part for part in modifiers if part not in BITS}
    if base == "cvt":
        return _convert(types, flags)
    if base == "setp":
        return _compare(types, list(modifiers))
    if base not in _RULES or not types:
        return None
    if mode := flags & _DIRECTED:
        return _directed(base, types[-1], mode.pop(), flags)
    return _RULES[base](base, types[-1], flags)


def _apply_modifiers(function: Callable[..., Array], flags: set[str], type_: str) -> Callable[..., Array]:
    """Wrap a floating-point function with the effects of .ftz and .sat."""
    flush = "ftz" in flags and type_ == "f32"
    if flush:
        inner = function
        function = lambda *values: numerics.flush_subnormals(inner(*map(numerics.flush_subnormals, values)))  # noqa: E731
    if "sat" in flags:
        unlimited = function
        function = lambda *values: numerics.saturate(unlimited(*values))  # noqa: E731
    return function


def _is_float(type_: str) -> bool:
    return "f" in type_


#: float64 results, exact or rounded to odd, so that a second rounding to float32 gives the correctly rounded result.
_ROUNDED_TO_ODD: dict[str, Callable[..., Array]] = {
    "add": numerics.add_round_to_odd,
    "sub": lambda a, b: numerics.add_round_to_odd(a, -b),
    "mul": lambda a, b: a.astype("f8") * b.astype("f8"),
    "fma": numerics.fma,
}


def _directed(base: str, type_: str, mode: str, flags: set[str]) -> ArithmeticOp | None:
    """Return an operation with directed rounding (.rz, .rm, .rp)."""
    if type_ != "f32" or base not in _ROUNDED_TO_ODD or flags - _DIRECTED - {"ftz"}:
        return None
    to_odd, arity = _ROUNDED_TO_ODD[base], 3 if base == "fma" else 2
    function = _apply_modifiers(lambda *values: numerics.round_directed(mode, to_odd(*values)), flags, type_)
    return ArithmeticOp((type_,) * arity, type_, function)


def _simple(arity: int, integer: Callable[..., Array] | None, floating: Callable[..., Array] | None) -> Any:
    def rule(base: str, type_: str, flags: set[str]) -> ArithmeticOp | None:
        function = floating if _is_float(type_) else integer
        if function is None or not flags <= _SUPPORTED_MODIFIERS or ("sat" in flags and not _is_float(type_)):
            return None
        if _is_float(type_):
            function = _apply_modifiers(function, flags, type_)
        return ArithmeticOp((type_,) * arity, type_, function)

    return rule


def _min_max(base: str, type_: str, flags: set[str]) -> ArithmeticOp | None:
    if not flags <= {"ftz", "NaN"}:
        return None
    if not _is_float(type_):
        return ArithmeticOp((type_,) * 2, type_, np.minimum if base == "min" else np.maximum)
    numbers = numerics.minimum_number if base == "min" else numerics.maximum_number
    if "NaN" in flags:

        def function(a: Array, b: Array) -> Array:
            return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), numbers(a, b))
    else:
        function = numbers
    return ArithmeticOp((type_,) * 2, type_, _apply_modifiers(function, flags, type_))


def _wide(type_: str) -> str:
    return f"{type_[0]}{2 * BITS[type_]}"


def _widened(values: Array) -> Array:
    return values.astype(f"{values.dtype.kind}{2 * values.itemsize}")


def _high(a: Array, b: Array) -> Array:
    if a.itemsize < 8:
        return (_widened(a) * _widened(b) >> (8 * a.itemsize)).astype(a.dtype)
    product = a.astype(object) * b.astype(object)
    return np.array([int(one) >> 64 for one in product], dtype=a.dtype)


def _multiply(base: str, type_: str, flags: set[str]) -> ArithmeticOp | None:
    """Return the operation of mul, mad or fma, of integers or floats."""
    if _is_float(type_):
        if not flags <= _SUPPORTED_MODIFIERS - {"lo"}:
            return None
        if base == "mul":
            return ArithmeticOp((type_,) * 2, type_, _apply_modifiers(operator.mul, flags, type_))
        return ArithmeticOp((type_,) * 3, type_, _apply_modifiers(numerics.fma, flags, type_))
    if flags == {"wide"}:
        product, result = (lambda a, b: _widened(a) * _widened(b)), _wide(type_)
    elif flags == {"hi"}:
        product, result = _high, type_
    elif flags == {"lo"}:
        product, result = operator.mul, type_
    else:
        return None
    if base == "mul":
        return ArithmeticOp((type_,) * 2, result, product)
    return ArithmeticOp((type_, type_, result), result, lambda a, b, c: product(a, b) + c)


def _quotient(a: Array, b: Array) -> Array:
    """Divide integers: PTX truncates, where numpy floors, and division by zero gives all ones on NVIDIA GPUs."""
    divisor = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // divisor
    quotient += ((a % divisor != 0) & ((a < 0) != (divisor < 0))).astype(a.dtype)
    return np.where(b == 0, ~b, quotient)


def _remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))


def _shift(base: str, type_: str, flags: set[str]) -> ArithmeticOp | None:
    """Return the operation of shl or shr."""
    bits = BITS[type_]

    def left(a: Array, by: Array) -> Array:
        return np.where(by < bits, a << (by & (bits - 1)).astype(a.dtype), a.dtype.type(0))

    def right(a: Array, by: Array) -> Array:
        clamped = a >> np.minimum(by, bits - 1).astype(a.dtype)
        return np.where((by < bits) | (a.dtype.kind == "i"), clamped, a.dtype.type(0))

    return None if flags else ArithmeticOp((type_, "u32"), type_, left if base == "shl" else right)


def _funnel(base: str, type_: str, flags: set[str]) -> ArithmeticOp | None:
    """Return the operation of shf."""
    if type_ != "b32" or not flags <= {"l", "r", "wrap", "clamp"}:
        return None

    def function(low: Array, high: Array, by: Array) -> Array:
        by = (by & 31 if "wrap" in flags else np.minimum(by, 32)).astype("u8")
        both = high.astype("u8") << np.uint64(32) | low
        return ((both << by) >> np.uint64(32) if "l" in flags else both >> by).astype("u4")

    return ArithmeticOp(("b32", "b32", "u32"), "b32", function)


def _extract(base: str, type_: str, flags: set[str]) -> ArithmeticOp | None:
    """Return the operation of bfe."""
    bits, wide = BITS[type_], np.dtype(f"u{BITS[type_] // 8}")

    def function(a: Array, position: Array, length: Array) -> Array:
        position, length = position & 255, length & 255
        last = np.minimum(position + length - 1, bits - 1).astype(wide)
        sign = (a >> last.astype(a.dtype)) & 1 if a.dtype.kind == "i" else np.zeros_like(a)
        field = np.where(position < bits, a.view(wide) >> np.minimum(position, bits - 1).astype(wide), wide.type(0))
        valid = np.clip(bits - position.astype("i8"), 0, length).astype(wide)
        mask = _low_bits(valid, bits, wide)
        result = np.where(sign != 0, field & mask | ~mask, field & mask)
        return np.where(length == 0, wide.type(0), result).view(a.dtype)

    return ArithmeticOp((type_, "u32", "u32"), type_, function)


def _low_bits(count: Array, bits: int, dtype: np.dtype[Any]) -> Array:
    one = dtype.type(1)
    return np.where(count >= bits, ~dtype.type(0), (one << np.minimum(count, bits - 1).astype(dtype)) - one)


def _insert(base: str, type_: str, flags: set[str]) -> ArithmeticOp | None:
    """Return the operation of bfi."""
    bits, dtype = BITS[type_], np.dtype(f"u{BITS[type_] // 8}")

    def function(a: Array, into: Array, position: Array, length: Array) -> Array:
        position, length = position & 255, length & 255
        by = np.minimum(position, bits - 1).astype(dtype)
        mask = np.where(position < bits, _low_bits(length, bits, dtype) << by, dtype.type(0))
        return into & ~mask | (a << by) & mask

    return ArithmeticOp((type_, type_, "u32", "u32"), type_, function)


def _permute(base: str, type_: str, flags: set[str]) -> ArithmeticOp | None:
    """Return the operation of prmt."""

    def function(a: Array, b: Array, selector: Array) -> Array:
        both, result = b.astype("u8") << np.uint64(32) | a, np.zeros_like(a)
        for byte in range(4):
            choice = selector >> np.uint32(4 * byte)
            value = (both >> (8 * (choice & 7)).astype("u8")).astype("u4") & 255
            value = np.where(choice & 8, np.where(value & 128, 255, 0), value).astype("u4")
            result |= value << np.uint32(8 * byte)
        return result

    return None if flags or type_ != "b32" else ArithmeticOp(("b32",) * 3, "b32", function)


def _lop3(base: str, type_: str, flags: set[str]) -> ArithmeticOp | None:
    def function(a: Array, b: Array, c: Array, table: Array) -> Array:
        result = np.zeros_like(a)
        for row in range(8):
            term = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            result |= np.where(table >> np.uint32(row) & 1, term, np.uint32(0))
        return result

    return None if flags else ArithmeticOp(("b32", "b32", "b32", "u32"), type_, function)


def _select(base: str, type_: str, flags: set[str]) -> ArithmeticOp | None:
    raw = f"b{BITS[type_]}"
    return None if flags else ArithmeticOp((raw, raw, "pred"), raw, lambda a, b, p: np.where(p, a, b))


def _count(base: str, type_: str, flags: set[str]) -> ArithmeticOp | None:
    """Return the operation of popc or clz."""
    bits = BITS[type_]

    def ones(a: Array) -> Array:
        return np.unpackbits(a.view("u1").reshape(len(a), -1), axis=1).sum(1).astype("u4")

    def leading(a: Array) -> Array:
        bytes_ = a.view("u1").reshape(len(a), -1)[:, ::-1]
        ordered = np.unpackbits(bytes_, axis=1)
        return np.where(ordered.any(1), ordered.argmax(1), bits).astype("u4")

    return None if flags else ArithmeticOp((f"b{bits}",), "u32", ones if base == "popc" else leading)


def _reverse(base: str, type_: str, flags: set[str]) -> ArithmeticOp | None:
    """Return the operation of brev."""

    def function(a: Array) -> Array:
        reversed_ = np.unpackbits(a.view("u1").reshape(len(a), -1), axis=1, bitorder="little")
        return np.packbits(reversed_, axis=1)[:, ::-1].reshape(-1).view(a.dtype)

    return None if flags else ArithmeticOp((type_,), type_, function)


def _through_double(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda a: function(a.astype("f8")).astype(a.dtype)


_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge},
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


def _compare(types: list[str], modifiers: list[str]) -> ArithmeticOp | None:
    """Return the operation of setp; the decoder negates its result for the second destination."""
    comparison, type_, rest = modifiers[0], types[-1], [part for part in modifiers[1:] if part not in BITS]
    unordered = comparison.removesuffix("u") if comparison.endswith("u") else None
    compare = _COMPARISONS.get(unordered or comparison)
    combine = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.get(rest[0] if rest else "")
    if compare is None or not set(rest) <= {"ftz", "and", "or", "xor"}:
        return None

    def function(a: Array, b: Array, *joined: Array) -> Array:
        if "ftz" in rest:
            a, b = numerics.flush_subnormals(a), numerics.flush_subnormals(b)
        result = compare(a, b)
        if _is_float(type_) and comparison not in ("num", "nan"):
            nan = np.isnan(a) | np.isnan(b)
            result = result | nan if unordered else result & ~nan
        return combine(result, joined[0]) if combine else result

    return ArithmeticOp((type_, type_, *(["pred"] if combine else [])), "pred", function)


_ROUNDED: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _convert(types: list[str], flags: set[str]) -> ArithmeticOp | None:
    to, source = types
    rounding = flags & set(_ROUNDED)
    if not flags <= {"rn", "rna", "rz", "ftz", "sat", *_ROUNDED} or ("rz" in flags and _is_float(to)):
        return None
    if to.endswith("x2"):  # the first operand is the upper half
        if source != "f32" or flags != {"rn"}:
            return None
        return ArithmeticOp((source, source), to, lambda a, b: np.stack([b, a], 1).reshape(-1))
    if to == "tf32":
        half = np.uint32(0x1000)
        away = lambda a: ((a.view("u4") + half) & np.uint32(0xFFFFE000)).view("f4")  # noqa: E731
        return ArithmeticOp((source,), "f32", away) if flags == {"rna"} else None
    if _is_float(source):
        function: Callable[[Array], Array] = _ROUNDED[next(iter(rounding))] if rounding else lambda a: a
        if "ftz" in flags and source == "f32":
            function = _apply_modifiers(function, {"ftz"}, "f32")
        if not _is_float(to):
            inner = function
            return ArithmeticOp((source,), to, lambda a: numerics.to_integer(inner(a), to, source))
        if to == "f64":
            return ArithmeticOp((source,), to, lambda a: function(a).astype("f8"))
        return ArithmeticOp((source,), to, _apply_modifiers(function, flags & {"sat"}, to))
    if _is_float(to):
        exact = "f4" if to == "f32" else "f8"  # the writer rounds float64 to 16 bits, once
        return None if BITS[source] == 64 and BITS[to] == 16 else ArithmeticOp((source,), to, lambda a: a.astype(exact))
    dtype = np.dtype(f"{'i' if to[0] == 's' else 'u'}{BITS[to] // 8}")
    if "sat" in flags:
        limits = np.iinfo(dtype)
        return ArithmeticOp((source,), to, lambda a: np.clip(a.astype(object), limits.min, limits.max).astype(dtype))
    return ArithmeticOp((source,), to, lambda a: a.astype(dtype))


_RULES: dict[str, Callable[[str, str, set[str]], ArithmeticOp | None]] = {
    "add": _simple(2, operator.add, operator.add),
    "sub": _simple(2, operator.sub, operator.sub),
    "neg": _simple(1, operator.neg, operator.neg),
    "abs": _simple(1, np.abs, np.abs),
    "div": _simple(2, _quotient, operator.truediv),
    "rem": _simple(2, _remainder, None),
    "and": _simple(2, operator.and_, None),
    "or": _simple(2, operator.or_, None),
    "xor": _simple(2, operator.xor, None),
    "not": _simple(1, operator.invert, None),
    "copysign": _simple(2, None, lambda sign, a: np.copysign(a, sign)),
    "sqrt": _simple(1, None, np.sqrt),
    "rcp": _simple(1, None, lambda a: a.dtype.type(1) / a),
    "rsqrt": _simple(1, None, _through_double(lambda a: 1 / np.sqrt(a))),
    "ex2": _simple(1, None, _through_double(np.exp2)),
    "lg2": _simple(1, None, _through_double(np.log2)),
    "sin": _simple(1, None, _through_double(np.sin)),
    "cos": _simple(1, None, _through_double(np.cos)),
    "tanh": _simple(1, None, _through_double(np.tanh)),
    **dict.fromkeys(("min", "max"), _min_max),
    **dict.fromkeys(("mul", "mad", "fma"), _multiply),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("popc", "clz"), _count),
    "shf": _funnel,
    "bfe": _extract,
    "bfi": _insert,
    "brev": _reverse,
    "prmt": _permute,
    "lop3": _lop3,
    "selp": _select,
}
