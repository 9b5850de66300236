"""Warp-level operations (shuffle, vote, ldmatrix, mma), vectorized over warps. Arrays are [warps, 32]."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx import numerics
from tools.ptx.memory import Fault
from tools.ptx.numerics import Array

LANE = np.arange(32)
_GROUP, _PAIR = LANE >> 2, (LANE & 3) * 2


def shuffle(mode: str, values: Array, b: Array, c: Array, active_lanes: Array) -> tuple[Array, Array]:
    """Return the values received by shfl.sync, and whether the source lane is in range.

    Args:
        mode: up, down, bfly or idx.
        values: operand a.
        b, c: operands b (lane or offset) and c (clamp and segment mask).
        active_lanes: mask of the lanes that execute the instruction.
    """
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
    if (active_lanes & ~np.take_along_axis(active_lanes, source, 1)).any():
        raise Fault("a shuffle reads from an inactive lane")
    return np.take_along_axis(values, source, 1), valid


def check_member_mask(members: Array, active_lanes: Array) -> None:
    """Check that the active lanes of each warp are exactly those of the member mask.

    Args:
        members: the mask that each lane passes.
        active_lanes: mask of the lanes that execute the instruction.
    """
    in_mask = (members >> LANE.astype("u4") & 1).astype(bool)
    if (active_lanes & ~in_mask).any() or ((in_mask != active_lanes) & active_lanes.any(1, keepdims=True)).any():
        raise Fault("lanes of a warp-level instruction are missing, or not in its member mask")


def vote(mode: str, predicate: Array, active_lanes: Array) -> Array:
    """Return the result of vote.sync for each lane, flattened."""
    match mode:
        case "any":
            result = (predicate & active_lanes).any(1)
        case "all":
            result = (predicate | ~active_lanes).all(1)
        case "uni":
            result = (predicate | ~active_lanes).all(1) | ~(predicate & active_lanes).any(1)
        case "ballot":
            result = ((predicate & active_lanes).astype("u4") << LANE.astype("u4")).sum(1, dtype="u4")
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
    """Distribute n 8x8 matrices, [warps, 8*n rows, 8] of 16 bits, to n registers [warps, 32]."""
    matrices = rows.reshape(len(rows), -1, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    low, high = matrices[:, :, _GROUP, _PAIR].astype("u4"), matrices[:, :, _GROUP, _PAIR + 1].astype("u4")
    both = low | high << np.uint32(16)
    return [np.ascontiguousarray(both[:, i]) for i in range(both.shape[1])]


def _gather_fragments(
    n_rows: int, n_columns: int, rows: list[Array], columns: list[Array], values: list[Array]
) -> Array:
    """Assemble a matrix [warps, rows, columns] from fragments.

    Args:
        n_rows, n_columns: shape of the matrix.
        rows, columns: coordinates of each fragment element, by lane.
        values: the fragment elements, [warps, 32] each.
    """
    matrix = np.empty((len(values[0]), n_rows, n_columns))
    for row, column, value in zip(rows, columns, values, strict=True):
        matrix[:, row, column] = value
    return matrix


def _halves(registers: list[Array], type_: str) -> list[Array]:
    """Unpack two 16-bit values per register, in order."""
    unpack = numerics.unpacker(type_)
    pairs = [unpack(register.reshape(-1)).reshape(len(register), 32, 2) for register in registers]
    return [pair[:, :, half] for pair in pairs for half in (0, 1)]


def mma(shape: str, types: list[str], a: list[Array], b: list[Array], c: list[Array]) -> list[Array]:
    """Return D = A B + C, accumulated in float64 and rounded once.

    Args:
        shape: for example m16n8k16.
        types: types of D, A, B and C.
        a, b, c: registers of the fragments, [warps, 32] each.
    """
    to, ta, tb, tc = types
    if ta != tb or to != tc or to not in ("f32", "f64"):
        raise NotImplementedError(f"mma.{shape} of {types}")
    match shape, ta:
        case (("m16n8k16" | "m16n8k8"), ("bf16" | "f16")):
            k = int(shape.rpartition("k")[2])
            # Consecutive registers alternate between rows g and g+8, then advance by 8 columns.
            row = [_GROUP + 8 * (i >> 1 & 1) for i in range(k // 2)]
            column = [_PAIR + (i & 1) + 8 * (i >> 2) for i in range(k // 2)]
            matrix_a = _gather_fragments(16, k, row, column, _halves(a, ta))
            inner = [_PAIR + (i & 1) + 8 * (i >> 1) for i in range(k // 4)]
            matrix_b = _gather_fragments(k, 8, inner, [_GROUP] * len(inner), _halves(b, tb))
        case (("m16n8k8" | "m16n8k4"), "tf32"):
            k, unpack = int(shape.rpartition("k")[2]), numerics.unpacker("tf32")
            steps = range(len(a))
            row, column = [_GROUP + 8 * (i & 1) for i in steps], [_PAIR // 2 + 4 * (i >> 1) for i in steps]
            matrix_a = _gather_fragments(16, k, row, column, list(map(unpack, a)))
            inner = [_PAIR // 2 + 4 * i for i in range(len(b))]
            matrix_b = _gather_fragments(k, 8, inner, [_GROUP] * len(b), list(map(unpack, b)))
        case "m8n8k4", "f64":
            matrix_a = _gather_fragments(8, 4, [_GROUP], [_PAIR // 2], [a[0].view("f8")])
            matrix_b = _gather_fragments(4, 8, [_PAIR // 2], [_GROUP], [b[0].view("f8")])
        case _:
            raise NotImplementedError(f"mma.{shape} of {types}")
    rows = [_GROUP + 8 * (i >> 1) for i in range(len(c))]
    columns = [_PAIR + (i & 1) for i in range(len(c))]
    unpack, pack = numerics.unpacker(to), numerics.packer(to)
    result = matrix_a @ matrix_b + _gather_fragments(matrix_a.shape[1], 8, rows, columns, list(map(unpack, c)))
    return [pack(result[:, row, column]) for row, column in zip(rows, columns, strict=True)]
