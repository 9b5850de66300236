"""What the 32 threads of a warp compute together, for many warps at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx import numerics
from tools.ptx.memory import Fault
from tools.ptx.numerics import Array

LANE = np.arange(32)
_GROUP, _PAIR = LANE >> 2, (LANE & 3) * 2


def shuffle(mode: str, values: Array, b: Array, c: Array, present: Array) -> tuple[Array, Array]:
    """shfl.sync: the values received, and whether they come from a thread in range. Arrays are [warps, 32]."""
    b, clamp, segment = (b & 31).astype("i8"), (c & 31).astype("i8"), (c >> 8 & 31).astype("i8")
    first, last = LANE & segment, LANE & segment | clamp & ~segment
    match mode:
        case "up":
            source, valid = LANE - b, LANE - b >= last
        case "down":
            source, valid = LANE + b, LANE + b <= last
        case "bfly":
            source, valid = LANE ^ b, (LANE ^ b) <= last
        case "idx":
            source = first | b & ~segment
            valid = source <= last
        case _:
            raise NotImplementedError(f"shfl.sync.{mode}")
    source = np.where(valid, source, LANE)
    if (present & ~np.take_along_axis(present, source, 1)).any():
        raise Fault("a shuffle reads from a thread that takes no part in it")
    return np.take_along_axis(values, source, 1), valid


def check_members(members: Array, present: Array) -> None:
    """Every thread of the member mask has to be here, and every thread here in the mask."""
    named = (members >> LANE.astype("u4") & 1).astype(bool)
    if (present & ~named).any() or ((named != present) & present.any(1, keepdims=True)).any():
        raise Fault("threads of a warp-wide instruction are missing, or not in its member mask")


def vote(mode: str, predicate: Array, present: Array) -> Array:
    """A result for each thread of [warps, 32]."""
    match mode:
        case "any":
            result = (predicate & present).any(1)
        case "all":
            result = (predicate | ~present).all(1)
        case "uni":
            result = (predicate | ~present).all(1) | ~(predicate & present).any(1)
        case "ballot":
            result = ((predicate & present).astype("u4") << LANE.astype("u4")).sum(1, dtype="u4")
        case _:
            raise NotImplementedError(f"vote.sync.{mode}")
    return np.repeat(result, 32)


REDUCTIONS: dict[str, Callable[..., Array]] = {
    "add": np.add.reduce,
    "min": np.minimum.reduce,
    "max": np.maximum.reduce,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


def ldmatrix(rows: Array, transposed: bool) -> list[Array]:
    """From [warps, 8*n rows, 8] 16-bit items to n registers [warps, 32]."""
    matrices = rows.reshape(len(rows), -1, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    low, high = matrices[:, :, _GROUP, _PAIR].astype("u4"), matrices[:, :, _GROUP, _PAIR + 1].astype("u4")
    both = low | high << np.uint32(16)
    return [np.ascontiguousarray(both[:, i]) for i in range(both.shape[1])]


def _place(n_rows: int, n_columns: int, rows: list[Array], columns: list[Array], values: list[Array]) -> Array:
    """Puts what each thread holds, [warps, 32] an item, where it belongs in [warps, rows, columns]."""
    matrix = np.empty((len(values[0]), n_rows, n_columns))
    for row, column, value in zip(rows, columns, values, strict=True):
        matrix[:, row, column] = value
    return matrix


def _halves(registers: list[Array], type_: str) -> list[Array]:
    """Two 16-bit values a register, in order."""
    unpack = numerics.unpacker(type_)
    pairs = [unpack(register.reshape(-1)).reshape(len(register), 32, 2) for register in registers]
    return [pair[:, :, half] for pair in pairs for half in (0, 1)]


def mma(shape: str, types: list[str], a: list[Array], b: list[Array], c: list[Array]) -> list[Array]:
    """D = A B + C of registers [warps, 32], the sums in float64 and rounded once. ``types`` are those of D, A, B, C."""
    to, ta, tb, tc = types
    if ta != tb or to != tc or to not in ("f32", "f64"):
        raise NotImplementedError(f"mma.{shape} of {types}")
    match shape, ta:
        case (("m16n8k16" | "m16n8k8"), ("bf16" | "f16")):
            k = int(shape.rpartition("k")[2])
            # Registers step through the rows g, g+8 first, then through columns 8 further.
            row = [_GROUP + 8 * (i >> 1 & 1) for i in range(k // 2)]
            column = [_PAIR + (i & 1) + 8 * (i >> 2) for i in range(k // 2)]
            matrix_a = _place(16, k, row, column, _halves(a, ta))
            inner = [_PAIR + (i & 1) + 8 * (i >> 1) for i in range(k // 4)]
            matrix_b = _place(k, 8, inner, [_GROUP] * len(inner), _halves(b, tb))
        case (("m16n8k8" | "m16n8k4"), "tf32"):
            k, unpack = int(shape.rpartition("k")[2]), numerics.unpacker("tf32")
            steps = range(len(a))
            row, column = [_GROUP + 8 * (i & 1) for i in steps], [_PAIR // 2 + 4 * (i >> 1) for i in steps]
            matrix_a = _place(16, k, row, column, list(map(unpack, a)))
            inner = [_PAIR // 2 + 4 * i for i in range(len(b))]
            matrix_b = _place(k, 8, inner, [_GROUP] * len(b), list(map(unpack, b)))
        case "m8n8k4", "f64":
            matrix_a = _place(8, 4, [_GROUP], [_PAIR // 2], [a[0].view("f8")])
            matrix_b = _place(4, 8, [_PAIR // 2], [_GROUP], [b[0].view("f8")])
        case _:
            raise NotImplementedError(f"mma.{shape} of {types}")
    rows = [_GROUP + 8 * (i >> 1) for i in range(len(c))]
    columns = [_PAIR + (i & 1) for i in range(len(c))]
    unpack, pack = numerics.unpacker(to), numerics.packer(to)
    result = matrix_a @ matrix_b + _place(matrix_a.shape[1], 8, rows, columns, list(map(unpack, c)))
    return [pack(result[:, row, column]) for row, column in zip(rows, columns, strict=True)]
