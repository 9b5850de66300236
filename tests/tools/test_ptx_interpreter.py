"""The PTX interpreter on hand-written PTX: arithmetic, rounding, divergence, memory, and the faults it detects."""

import ctypes
import re
from fractions import Fraction

import numpy as np
import pytest

from tools.ptx.machine import run
from tools.ptx.memory import Fault, Memory
from tools.ptx.parser import parse

RANDOM = np.random.default_rng(0)
BITS = {"u1": "b8", "u2": "b16", "u4": "b32", "u8": "b64"}
SPECIAL32 = np.array([0, 1, 2, 31, 32, 33, 255, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x80000001, 7], "u4")


def kernel(body, parameters=("u64",) * 4, threads=32, shared=0):
    """Parse a kernel around ``body``, which has its parameters in %rd0, %rd1, ... and the thread index in %r0."""
    params = ", ".join(f".param .{type_} p{i}" for i, type_ in enumerate(parameters))
    loads = "\n".join(f"ld.param.{type_} %rd{i}, [p{i}];" for i, type_ in enumerate(parameters))
    return parse(f"""
        .version 8.0
        .target sm_80
        .visible .entry k({params}) .reqntid {threads}, 1, 1
        {{
        .reg .pred %p<9>;  .reg .b16 %h<9>;  .reg .b32 %r<99>;  .reg .b64 %rd<99>;
        .shared .align 16 .b8 tile[{shared or 16}];
        {loads}
        mov.u32 %r0, %tid.x;
        {body}
        ret;
        }}""")["k"]


def evaluate(instruction, *inputs, result="u4"):
    """Execute one instruction, a template of {d}, {a}, {b} and {c}, for every element of the input arrays (bits)."""
    inputs = [np.ascontiguousarray(one) for one in np.broadcast_arrays(*inputs)]
    memory, out = Memory(), np.zeros(inputs[0].size, result)
    pointers = [memory.map_buffer(one, readonly=True) for one in inputs] + [memory.map_buffer(out)]
    registers = {"u2": "%h", "u4": "%r", "u8": "%rd"}
    lines, names = ["mov.u32 %r10, %ctaid.x; mad.lo.u32 %r0, %r10, 32, %r0;"], {}
    for i, (name, array) in enumerate(zip("abcdef", [*inputs, out], strict=False)):
        dtype = array.dtype.str[1:]
        names[name if i < len(inputs) else "d"] = register = f"{registers[dtype]}{i + (1 if dtype != 'u8' else 30)}"
        lines.append(f"mad.wide.u32 %rd{20 + i}, %r0, {array.itemsize}, %rd{i};")
        lines.append(f"ld.global.{BITS[dtype]} {register}, [%rd{20 + i}];")
    lines += [f"setp.ge.u32 %p1, %r0, {out.size}; @%p1 bra DONE;"] if out.size % 32 else []
    lines.sort(key=lambda line: not line.startswith(("mov", "setp")))
    lines.append(instruction.format(**names))
    lines.append(f"st.global.{BITS[result]} [%rd{20 + len(inputs)}], {names['d']};\nDONE:")
    code = kernel("\n".join(lines), ("u64",) * len(pointers))
    run(code, (-(-out.size // 32), 1, 1), pointers, memory)
    return out


def bits(values):
    return np.asarray(values, "f4").view("u4")


def random32(count=200):
    return np.concatenate([RANDOM.integers(0, 1 << 32, count, dtype="u4"), RANDOM.permutation(SPECIAL32)])


def signed(value, width=32):
    return value - (1 << width) if value >> (width - 1) else value


def permute_bytes(a, b, selector):
    bytes_ = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    picks = [selector >> 4 * i & 15 for i in range(4)]
    return sum((255 * (bytes_[p & 7] >> 7) if p & 8 else bytes_[p & 7]) << 8 * i for i, p in enumerate(picks))


def extract_bits(a, position, length, sign):
    position, length = position & 255, length & 255
    if length == 0:
        return 0
    fill = a >> min(position + length - 1, 31) & 1 if sign else 0
    return sum((a >> position + i & 1 if i < length and position + i < 32 else fill) << i for i in range(32))


def insert_bits(a, b, position, length):
    mask = ((1 << (length & 255)) - 1 << (position & 255)) & 0xFFFFFFFF
    return b & ~mask | a << (position & 255) & mask


def divide_truncating(a, b):
    return abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1)


INTEGERS = {
    "add.s32 {d}, {a}, {b};": lambda a, b, c: a + b,
    "sub.s32 {d}, {a}, {b};": lambda a, b, c: a - b,
    "mul.lo.s32 {d}, {a}, {b};": lambda a, b, c: a * b,
    "mul.hi.u32 {d}, {a}, {b};": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 {d}, {a}, {b};": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mad.lo.s32 {d}, {a}, {b}, {c};": lambda a, b, c: a * b + c,
    "mad.hi.u32 {d}, {a}, {b}, {c};": lambda a, b, c: (a * b >> 32) + c,
    "div.u32 {d}, {a}, {b};": lambda a, b, c: a // b if b else -1,
    "div.s32 {d}, {a}, {b};": lambda a, b, c: divide_truncating(signed(a), signed(b)) if b else -1,
    "rem.u32 {d}, {a}, {b};": lambda a, b, c: a % b if b else a,
    "rem.s32 {d}, {a}, {b};": lambda a, b, c: (
        signed(a) - divide_truncating(signed(a), signed(b)) * signed(b) if b else a
    ),
    "shl.b32 {d}, {a}, {b};": lambda a, b, c: a << b if b < 32 else 0,
    "shr.u32 {d}, {a}, {b};": lambda a, b, c: a >> b if b < 32 else 0,
    "shr.s32 {d}, {a}, {b};": lambda a, b, c: signed(a) >> min(b, 31),
    "shf.l.wrap.b32 {d}, {a}, {b}, {c};": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32,
    "shf.r.clamp.b32 {d}, {a}, {b}, {c};": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "bfe.u32 {d}, {a}, {b}, {c};": lambda a, b, c: extract_bits(a, b, c, False),
    "bfe.s32 {d}, {a}, {b}, {c};": lambda a, b, c: extract_bits(a, b, c, True),
    "bfi.b32 {d}, {a}, {c}, {b}, 5;": lambda a, b, c: insert_bits(a, c, b, 5),
    "prmt.b32 {d}, {a}, {b}, {c};": permute_bytes,
    "lop3.b32 {d}, {a}, {b}, {c}, 0xCA;": lambda a, b, c: a & b | ~a & c,
    "lop3.b32 {d}, {a}, {b}, {c}, 0x96;": lambda a, b, c: a ^ b ^ c,
    "popc.b32 {d}, {a};": lambda a, b, c: a.bit_count(),
    "clz.b32 {d}, {a};": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 {d}, {a};": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "not.b32 {d}, {a};": lambda a, b, c: ~a,
    "abs.s32 {d}, {a};": lambda a, b, c: abs(signed(a)),
    "neg.s32 {d}, {a};": lambda a, b, c: -a,
    "min.s32 {d}, {a}, {b};": lambda a, b, c: min(signed(a), signed(b)),
    "max.u32 {d}, {a}, {b};": lambda a, b, c: max(a, b),
    "cvt.u32.u8 {d}, {a};": lambda a, b, c: a & 255,
    "cvt.s32.s8 {d}, {a};": lambda a, b, c: signed(a & 255, 8),
    "cvt.sat.u8.s32 {d}, {a};": lambda a, b, c: min(max(signed(a), 0), 255),
    "add.cc.u32 {d}, {a}, {b}; addc.u32 {d}, {c}, 0;": lambda a, b, c: c + (a + b >> 32),
    "sub.cc.u32 {d}, {a}, {b}; subc.u32 {d}, {c}, 0;": lambda a, b, c: c - (a < b),
    "setp.lt.s32 %p2, {a}, {b}; selp.b32 {d}, {c}, 7, %p2;": lambda a, b, c: c if signed(a) < signed(b) else 7,
    "setp.hi.u32 %p2|%p3, {a}, {b}; selp.b32 {d}, {c}, 7, %p3;": lambda a, b, c: 7 if a > b else c,
    "setp.ne.s32 %p2, {c}, 7; setp.eq.and.s32 %p3, {a}, {b}, !%p2; selp.b32 {d}, 1, 0, %p3;": (
        lambda a, b, c: a == b and c == 7
    ),
    "@!%p4 mov.b32 {d}, {a};": lambda a, b, c: a,
    "@%p4 mov.b32 {d}, {a};": lambda a, b, c: 0,
    "mov.b32 {{%h1, %h2}}, {a}; mov.b32 {d}, {{%h2, %h1}};": lambda a, b, c: a >> 16 | a << 16,
    "{{ .reg .b32 t; and.b32 t, {a}, {b}; {{ .reg .b32 t; mov.b32 t, {c}; }} xor.b32 {d}, t, {c}; }}": (
        lambda a, b, c: a & b ^ c
    ),
}


@pytest.mark.parametrize("instruction", INTEGERS)
def test_integer_instructions(instruction):
    a, b, c = random32(), random32(), random32()
    if any(name in instruction for name in ("sh", "bf")):
        b, c = (np.where(RANDOM.random(a.size) < 0.8, one % 40, one).astype("u4") for one in (b, c))
    expected = [INTEGERS[instruction](*map(int, row)) % (1 << 32) for row in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(evaluate(instruction, a, b, c), np.array(expected, "u4"))


def test_64_bit_products():
    a, b = random32(), random32()
    c = RANDOM.integers(0, 1 << 64, a.size, dtype="u8")
    expected = [(signed(int(x)) * signed(int(y)) + int(z)) % (1 << 64) for x, y, z in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(
        evaluate("mad.wide.s32 {d}, {a}, {b}, {c};", a, b, c, result="u8"), np.array(expected, "u8")
    )
    high = [int(x) * int(y) >> 64 for x, y in zip(c, c[::-1], strict=True)]
    np.testing.assert_array_equal(evaluate("mul.hi.u64 {d}, {a}, {b};", c, c[::-1], result="u8"), np.array(high, "u8"))


def floats(count=20000):
    """Return float32 values of all magnitudes, many of similar magnitude, and every special value."""
    some = RANDOM.integers(0, 1 << 32, count, dtype="u4").view("f4")
    near = (RANDOM.standard_normal(count) * 4).astype("f4")
    special = np.array([0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38], "f4")
    return np.concatenate([some, near, np.repeat(special, 10), np.tile(special, 10)])


def assert_same_bits(actual, expected):
    """Check that values are bit-identical, except for the payload of NaN."""
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    unsigned = f"u{expected.itemsize}"
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(actual[number].view(unsigned), expected[number].view(unsigned))


@pytest.mark.parametrize(("type_", "name", "dtype"), [("f32", "fmaf", "f4"), ("f64", "fma", "f8")])
def test_fma_rounds_once(type_, name, dtype):
    exact = getattr(ctypes.CDLL("libm.so.6"), name)
    number = ctypes.c_float if dtype == "f4" else ctypes.c_double
    exact.restype, exact.argtypes = number, [number] * 3
    with np.errstate(all="ignore"):
        a, b, c = (RANDOM.permutation(floats(2000 if dtype == "f8" else 20000)).astype(dtype) for _ in range(3))
        if dtype == "f8":
            a, b = (one * (1 + RANDOM.random(one.size)) for one in (a, b))
        # Cancellation and ties: c close to -a*b, and to half a unit in the last place of it.
        kind = RANDOM.integers(0, 3, a.size)
        c = np.where(kind == 1, -(a * b), np.where(kind == 2, a * b * np.finfo(dtype).eps / 2, c)).astype(dtype)
    expected = np.array([exact(*row) for row in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], dtype)
    unsigned = f"u{a.itemsize}"
    instruction = f"fma.rn.{type_} {{d}}, {{a}}, {{b}}, {{c}};"
    actual = evaluate(instruction, *(one.view(unsigned) for one in (a, b, c)), result=unsigned).view(dtype)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("base", ["add", "mul", "fma"])
def test_directed_rounding(base, mode):
    with np.errstate(all="ignore"):
        a, b, c = (RANDOM.standard_normal(5000).astype("f4") for _ in range(3))
    third = ", {c}" if base == "fma" else ""
    actual = evaluate(f"{base}.{mode}.f32 {{d}}, {{a}}, {{b}}{third};", *(one.view("u4") for one in (a, b, c))).view(
        "f4"
    )
    for x, y, z, result in zip(*(map(Fraction, one.tolist()) for one in (a, b, c, actual)), strict=True):
        exact = {"add": x + y, "mul": x * y, "fma": x * y + z}[base]
        up = mode == "rp" or (mode == "rz" and exact < 0)
        assert result >= exact if up else result <= exact
        other = Fraction(float(np.nextafter(np.float32(float(result)), np.float32(-np.inf if up else np.inf))))
        assert result == exact or (other < exact if up else other > exact)


def bfloat16(values):
    """Round to nearest even with integer arithmetic."""
    raw = values.astype("f4").view("u4").astype("u8")
    return np.where(np.isnan(values), 0x7FFF, (raw + 0x7FFF + (raw >> np.uint64(16) & 1)) >> np.uint64(16)).astype("u2")


def test_bfloat16_fma_rounds_once():
    """1.5 * (1 + 2^-7) is a tie that 2^-40 decides; an intermediate float32 would lose it and round up to even."""
    step = 2.0**-7
    inputs = [1.5] * 3, [1 + step] * 3, [2.0**-40, 0, -(2.0**-40)]
    a, b, c = (bfloat16(np.array(one, "f4")) for one in inputs)
    actual = evaluate("fma.rn.bf16 {d}, {a}, {b}, {c};", a, b, c, result="u2")
    np.testing.assert_array_equal(actual, bfloat16(np.array([1.5 + 2 * step, 1.5 + 2 * step, 1.5 + step], "f4")))


CONVERSIONS = {
    "cvt.rn.f16.f32 {d}, {a};": ("u2", lambda a: a.astype("f2").view("u2"), "f2"),
    "cvt.rn.bf16.f32 {d}, {a};": ("u2", bfloat16, None),
    "cvt.rn.f32.s32 {d}, {a};": ("u4", lambda a: a.view("i4").astype("f4"), "f4"),
    "cvt.rzi.s32.f32 {d}, {a};": (
        "u4",
        lambda a: np.where(np.isnan(a), 0, np.clip(np.trunc(a.astype("f8")), -(2**31), 2**31 - 1)).astype("i4"),
        None,
    ),
    "cvt.rni.f32.f32 {d}, {a};": ("u4", np.rint, "f4"),
    "cvt.f64.f32 {d}, {a};": ("u8", lambda a: a.astype("f8"), "f8"),
    "cvt.rn.bf16x2.f32 {d}, {a}, 0f3F800000;": ("u4", lambda a: bfloat16(a).astype("u4") << 16 | 0x3F80, None),
    "cvt.rna.tf32.f32 {d}, {a};": ("u4", lambda a: (a.view("u4") + np.uint32(4096)) & np.uint32(0xFFFFE000), None),
    "abs.f32 {d}, {a};": ("u4", np.abs, "f4"),
    "max.f32 {d}, {a}, 0f00000000;": ("u4", lambda a: np.where(np.isnan(a) | (a <= 0), np.float32(0), a), "f4"),
    "max.NaN.f32 {d}, {a}, 0f00000000;": ("u4", lambda a: np.where(a <= 0, np.float32(0), a), "f4"),
    "mul.ftz.f32 {d}, {a}, 0f3F800000;": (
        "u4",
        lambda a: np.where(np.abs(a) < np.finfo("f4").tiny, np.copysign(np.float32(0), a), a),
        "f4",
    ),
    "add.sat.f32 {d}, {a}, 0f00000000;": ("u4", lambda a: np.nan_to_num(np.clip(a, 0, 1) + np.float32(0)), "f4"),
    "setp.gtu.f32 %p2, {a}, 0f3F800000; selp.b32 {d}, 1, 0, %p2;": ("u4", lambda a: (~(a <= 1)).astype("u4"), None),
    "setp.le.f32 %p2, {a}, 0f3F800000; selp.b32 {d}, 1, 0, %p2;": ("u4", lambda a: (a <= 1).astype("u4"), None),
    "setp.nan.f32 %p2, {a}, {a}; selp.b32 {d}, 1, 0, %p2;": ("u4", lambda a: np.isnan(a).astype("u4"), None),
    "sqrt.rn.f32 {d}, {a};": ("u4", np.sqrt, "f4"),
    "div.rn.f32 {d}, 0f3F800000, {a};": ("u4", lambda a: np.float32(1) / a, "f4"),
}


@pytest.mark.parametrize("instruction", CONVERSIONS)
def test_float_instructions(instruction):
    a = floats(2000)
    result, function, as_float = CONVERSIONS[instruction]
    with np.errstate(all="ignore"):
        expected = function(a)
    actual = evaluate(instruction, a.view("u4"), result=result)
    if as_float:
        return assert_same_bits(actual.view(as_float), np.ascontiguousarray(expected).view(as_float))
    compared = ~np.isnan(a) | ("cvt.rna" not in instruction)
    np.testing.assert_array_equal(actual[compared], np.ascontiguousarray(expected).view(result)[compared])


@pytest.mark.parametrize("base", ["add", "mul", "fma"])
@pytest.mark.parametrize("type_", ["f16x2", "bf16x2"])
def test_packed_arithmetic_matches_scalar(base, type_):
    a, b, c = (RANDOM.integers(0, 1 << 32, 2000, dtype="u4") for _ in range(3))
    third = ", {c}" if base == "fma" else ""
    actual = evaluate(f"{base}.rn.{type_} {{d}}, {{a}}, {{b}}{third};", a, b, c)
    single = [
        evaluate(f"{base}.rn.{type_[:-2]} {{d}}, {{a}}, {{b}}{third};", *(x.view("u2") for x in (a, b, c)), result="u2")
    ][0]
    np.testing.assert_array_equal(actual.view("u2"), single)


SHUFFLES = {
    "shfl.sync.bfly.b32 {d}, {a}, 5, 31, -1;": lambda lane: lane ^ 5,
    "shfl.sync.down.b32 {d}, {a}, 3, 31, -1;": lambda lane: lane + 3 if lane + 3 < 32 else lane,
    "shfl.sync.up.b32 {d}, {a}, 3, 0, -1;": lambda lane: max(lane - 3, lane if lane < 3 else 0),
    "shfl.sync.idx.b32 {d}, {a}, 9, 31, -1;": lambda lane: 9,
    "shfl.sync.down.b32 {d}, {a}, 1, 0x181f, -1;": lambda lane: lane + 1 if lane % 8 != 7 else lane,
}


@pytest.mark.parametrize("instruction", SHUFFLES)
def test_shuffles(instruction):
    a = RANDOM.integers(0, 1 << 32, 32, dtype="u4")
    np.testing.assert_array_equal(
        evaluate(instruction, a), np.array([a[SHUFFLES[instruction](lane)] for lane in range(32)])
    )


def test_votes_and_reductions():
    a = RANDOM.integers(0, 1 << 32, 32, dtype="u4")
    ballot = evaluate("setp.lt.s32 %p2, {a}, 0; vote.sync.ballot.b32 {d}, %p2, -1;", a)
    assert (ballot == sum(int(one >> 31) << i for i, one in enumerate(a))).all()
    assert (evaluate("redux.sync.max.u32 {d}, {a}, -1;", a) == a.max()).all()


def outputs(body, inputs, out, threads=32, ctas=1, schedule=0, shared=0):
    memory = Memory()
    pointers = [memory.map_buffer(one, readonly=True) for one in inputs] + [memory.map_buffer(out)]
    code = kernel(body, ("u64",) * len(pointers), threads, shared)
    run(code, (ctas, 1, 1), pointers, memory, schedule=schedule)
    return out


LOOPS = """
    mov.b32 %r1, 0;  mov.b32 %r2, 0;
    mov.u32 %r8, %ctaid.x;  mad.lo.u32 %r9, %r8, 64, %r0;
TOP:
    setp.ge.u32 %p1, %r1, %r9;
    @%p1 bra OUT;
    and.b32 %r3, %r1, 1;
    setp.eq.u32 %p2, %r3, 0;
    @%p2 bra EVEN;
    add.u32 %r2, %r2, %r1;
    bra.uni NEXT;
EVEN:
    add.u32 %r2, %r2, 1;
NEXT:
    add.u32 %r1, %r1, 1;
    bra.uni TOP;
OUT:
    mad.wide.u32 %rd5, %r9, 4, %rd0;
    st.global.u32 [%rd5], %r2;
"""


@pytest.mark.parametrize("schedule", [0, 1, 2])
def test_divergent_loops(schedule):
    out = outputs(LOOPS, [], np.zeros(3 * 64, "u4"), threads=64, ctas=3, schedule=schedule)
    expected = [sum(i if i % 2 else 1 for i in range(n)) for n in range(out.size)]
    np.testing.assert_array_equal(out, np.array(expected, "u4"))


REVERSE = """
    mul.lo.u32 %r1, %r0, 4;  mov.b32 %r2, tile;  add.u32 %r3, %r2, %r1;
    mul.wide.u32 %rd3, %r0, 4;  add.u64 %rd4, %rd0, %rd3;  add.u64 %rd5, %rd1, %rd3;
    ld.global.u32 %r4, [%rd4];
    st.shared.u32 [%r3], %r4;
    bar.sync 0;
    sub.u32 %r5, 508, %r1;  add.u32 %r5, %r2, %r5;
    ld.shared.u32 %r6, [%r5];
    st.global.u32 [%rd5], %r6;
"""


def reverse(body=REVERSE, schedule=0, shared=512):
    values = RANDOM.integers(0, 1 << 32, 128, dtype="u4")
    out = outputs(body, [values], np.zeros_like(values), threads=128, schedule=schedule, shared=shared)
    np.testing.assert_array_equal(out, values[::-1])


@pytest.mark.parametrize("schedule", [0, 1, 2])
def test_shared_memory(schedule):
    reverse(schedule=schedule)


FAULTS = {
    "no barrier": (REVERSE.replace("bar.sync 0;", ""), "no barrier in between"),
    "a warp's barrier": (REVERSE.replace("bar.sync 0;", "bar.warp.sync -1;"), "no barrier in between"),
    "overwritten before read": (REVERSE + "st.shared.u32 [%r3], %r6;", "no barrier in between"),
    "outside of shared memory": (REVERSE.replace("508", "512"), "outside of the CTA's 512 bytes"),
    "misaligned in shared memory": (REVERSE.replace("508", "506"), "misaligned"),
    "misaligned": (REVERSE.replace("[%rd4]", "[%rd4+2]"), "misaligned"),
    "after the end": (REVERSE.replace("[%rd4]", "[%rd4+4]"), "outside of every allocation"),
    "before the beginning": (REVERSE.replace("[%rd4]", "[%rd4-4]"), "outside of every allocation"),
    "read-only": (REVERSE.replace("[%rd5]", "[%rd4]"), "read-only"),
    "one address": (REVERSE.replace("[%rd5]", "[%rd1]"), "different values to one address"),
    "barrier in some threads": (REVERSE + "setp.lt.u32 %p1, %r0, 64; @%p1 bar.sync 0;", "divergent barrier"),
    "barrier after return": (
        REVERSE.replace("bar.sync", "setp.lt.u32 %p1, %r0, 64; @%p1 ret; bar.sync"),
        "divergent barrier",
    ),
    "two barriers": (
        "setp.lt.u32 %p1, %r0, 64; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B:" + REVERSE,
        "divergent barrier",
    ),
    "infinite loop": ("TOP: bra TOP;" + REVERSE, "does not terminate"),
    "not a member": (REVERSE.replace("bar.sync", "shfl.sync.bfly.b32 %r7, %r4, 1, 31, 15; bar.sync"), "member mask"),
    "missing member": (
        REVERSE.replace("bar.sync", "setp.ne.u32 %p1, %r0, 3; @%p1 shfl.sync.bfly.b32 %r7, %r4, 1, 31, -1; bar.sync"),
        "member mask",
    ),
    "trap": ("trap;" + REVERSE, "trap"),
}


@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_detected(name, schedule):
    body, message = FAULTS[name]
    with pytest.raises(Fault, match=re.escape(message)):
        reverse(body, schedule)


def test_fault_message_has_location():
    with pytest.raises(Fault, match=r"k, line \d+, CTA 0, thread 127: 4-byte access .* \[%rd4\+4\]"):
        reverse(REVERSE.replace("[%rd4]", "[%rd4+4]"))


def test_predicated_off_instruction_does_not_access_memory():
    reverse("setp.gt.u32 %p1, %r0, 1000; @%p1 ld.global.u32 %r9, [-8]; @%p1 st.shared.b32 [9999], %r0;" + REVERSE)


@pytest.mark.parametrize(
    "text", ["frobnicate.b32 %r1, %r2;", "add.rz.f64 %rd1, %rd2, %rd3;", "atom.global.add.f32 %r1, [%rd0], 1;"]
)
def test_error_names_the_unsupported_instruction(text):
    with pytest.raises(NotImplementedError, match=re.escape(text[:-1])):
        outputs(text, [], np.zeros(1, "u4"))


def test_shared_memory_is_initialized_with_nan():
    body = "mad.wide.u32 %rd4, %r0, 4, %rd0; ld.shared.b32 %r4, [tile]; st.global.b32 [%rd4], %r4;"
    assert np.isnan(outputs(body, [], np.zeros(32, "f4"))).all()


COPY = """
    mul.wide.u32 %rd3, %r0, 16;  add.u64 %rd4, %rd0, %rd3;  add.u64 %rd5, %rd1, %rd3;
    cvt.u32.u64 %r1, %rd3;  mov.b32 %r2, tile;  add.u32 %r3, %r2, %r1;
    and.b32 %r4, %r0, 1;  mul.lo.u32 %r4, %r4, 16;
    cp.async.cg.shared.global [%r3], [%rd4], 16, %r4;
    cp.async.commit_group;
    cp.async.cg.shared.global [%r3 + 512], [%rd4], 16;
    cp.async.commit_group;
    cp.async.wait_group 1;
    bar.sync 0;
    xor.b32 %r3, %r3, 48;
    ld.shared.v4.f32 {%r10, %r11, %r12, %r13}, [%r3];
    st.global.v4.f32 [%rd5], {%r10, %r11, %r12, %r13};
"""


def run_copies(body):
    values = np.arange(128, dtype="f4") + 1
    return values.reshape(32, 4), outputs(body, [values], np.zeros(128, "f4"), shared=1024).reshape(32, 4)


def test_asynchronous_copies():
    values, out = run_copies(COPY)
    expected = np.where(np.arange(32)[:, None] & 1, values, 0)[np.arange(32) ^ 3]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    "edit",
    [
        ("wait_group 1", "wait_group 2"),
        ("cp.async.commit_group;", "", 1),
        ("cp.async.wait_group 1;", ""),
        ("[%r3];", "[%r3+512];"),
    ],
)
def test_copies_in_flight_are_nan(edit):
    """Each edit makes the kernel read the destination of a copy before it is complete."""
    _, out = run_copies(COPY.replace(*edit))
    assert np.isnan(out).any()


def test_copies_are_complete_after_the_wait():
    values, out = run_copies(COPY.replace("wait_group 1", "wait_group 0").replace("[%r3];", "[%r3+512];"))
    np.testing.assert_array_equal(out, values[np.arange(32) ^ 3])


STRUCT = """
    .version 8.0
    .target sm_80
    .visible .entry k(.param .align 8 .b8 p[24])
    {
    .reg .b32 %r<9>;  .reg .b64 %rd<9>;
    mov.b64 %rd1, p;
    add.s64 %rd2, %rd1, 8;
    ld.param.u64 %rd3, [p];
    ld.param.v2.u32 {%r1, %r2}, [%rd2+8];
    st.global.u32 [%rd3], %r1;
    st.global.u32 [%rd3+4], %r2;
    ret;
    }"""


def test_struct_parameter_is_read_by_address():
    """nvcc accesses a struct that is passed by value through registers that hold its address."""
    memory, out = Memory(), np.zeros(2, "u4")
    struct = memory.map_buffer(out).to_bytes(8, "little") + bytes(8) + np.array([5, 7], "u4").tobytes()
    run(parse(STRUCT)["k"], (1, 1, 1), [struct], memory, threads=(32,))
    assert out.tolist() == [5, 7]
    with pytest.raises(Fault, match="outside of every allocation"):
        run(parse(STRUCT.replace("%rd2+8", "%rd2+16"))["k"], (1, 1, 1), [struct], memory, threads=(32,))


@pytest.mark.parametrize("schedule", [0, 1, 2])
def test_atomics(schedule):
    """Every thread gets a unique index from an atomic counter."""
    draw = """
        atom.global.add.u32 %r1, [%rd1], 2;
        red.release.gpu.global.max.s32 [%rd1+4], %r0;
        mul.wide.u32 %rd3, %r1, 4;  add.u64 %rd4, %rd0, %rd3;
        st.global.u32 [%rd4], 1;
    """
    memory, drawn, counter = Memory(), np.zeros(2 * 3 * 64, "u4"), np.array([0, -1], "i4")
    pointers = [memory.map_buffer(drawn), memory.map_buffer(counter)]
    run(kernel(draw, ("u64",) * 2, 64), (3, 1, 1), pointers, memory, schedule=schedule)
    np.testing.assert_array_equal(drawn, np.tile([1, 0], 3 * 64))
    assert counter.tolist() == [2 * 3 * 64, 63]


GRID_BARRIER = """
    mov.u32 %r1, %ctaid.x;  mov.u32 %r2, %nctaid.x;
    mul.wide.u32 %rd3, %r1, 4;  add.u64 %rd4, %rd0, %rd3;
    setp.eq.u32 %p3, %r0, 37;
    @%p3 st.global.u32 [%rd4], %r1;
    bar.sync 0;
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra MET;
    red.release.gpu.global.add.u32 [%rd1], 1;
SPIN:
    ld.acquire.gpu.global.u32 %r3, [%rd1];
    setp.lt.u32 %p2, %r3, %r2;
    @%p2 bra SPIN;
MET:
    bar.sync 0;
    sub.u32 %r4, %r2, %r1;  sub.u32 %r4, %r4, 1;
    mul.wide.u32 %rd5, %r4, 4;  add.u64 %rd5, %rd0, %rd5;  add.u64 %rd6, %rd2, %rd3;
    ld.global.u32 %r5, [%rd5];
    st.global.u32 [%rd6], %r5;
"""


def run_grid_barrier(body=GRID_BARRIER, schedule=0, cooperative=True, ctas=9):
    memory, out = Memory(), np.full(ctas, 99, "u4")
    pointers = [memory.map_buffer(one) for one in (np.full(ctas, 77, "u4"), np.zeros(1, "u4"), out)]
    code = kernel(body, ("u64",) * 3, 1024)
    run(code, (ctas, 1, 1), pointers, memory, cooperative=cooperative, schedule=schedule)
    return out.tolist()


@pytest.mark.parametrize("schedule", [0, 1, 2])
def test_resident_blocks_wait_at_a_grid_barrier(schedule):
    assert run_grid_barrier(schedule=schedule) == list(range(9))[::-1]


@pytest.mark.parametrize("schedule", [1, 2])
def test_blocks_without_a_grid_barrier_read_stale_values(schedule):
    assert 77 in run_grid_barrier(GRID_BARRIER.replace("@%p2 bra SPIN;", ""), schedule)


@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize(
    ("body", "cooperative"),
    [(GRID_BARRIER, False), (GRID_BARRIER.replace("[%rd1], 1", "[%rd1], 0"), True)],
    ids=["not cooperative", "no arrivals"],
)
def test_deadlock_is_detected(body, cooperative, schedule):
    with pytest.raises(Fault, match="deadlock: spins on memory that no thread writes"):
        run_grid_barrier(body, schedule, cooperative)


SQUARE = """
    mov.u32 %r1, %ctaid.x;  mov.u32 %r2, %ntid.x;  mad.wide.u32 %rd3, %r1, 32, 0;
    cvt.u64.u32 %rd4, %r0;  add.u64 %rd3, %rd3, %rd4;
    {shift}
    add.u64 %rd5, %rd0, %rd3;
    ld.global.u32 %r3, [%rd5];  mul.lo.u32 %r3, %r3, %r3;  st.global.u32 [%rd5], %r3;
"""


@pytest.mark.parametrize(
    ("shift", "right"),
    [("shl.b64 %rd3, %rd3, 2;", True), ("cvt.u32.u64 %r4, %rd3; shl.b32 %r4, %r4, 2; cvt.u64.u32 %rd3, %r4;", False)],
)
def test_64_bit_offset_at_the_end_of_a_large_tensor(shift, right):
    """Only the last CTA runs, on a buffer that is mapped at the address of the last of 2^31 elements."""
    code = kernel(SQUARE.format(shift=shift), ("u64",))
    memory, base, ctas = Memory(), 0x10_0000_0000, 2**31 // 32
    window = np.arange(32, dtype="u4")
    memory.map_buffer(window, address=base + 4 * (2**31 - 32))
    if right:
        run(code, (ctas, 1, 1), [base], memory, ctas=[ctas - 1])
        np.testing.assert_array_equal(window, np.arange(32, dtype="u4") ** 2)
    else:
        with pytest.raises(Fault, match="outside of every allocation"):
            run(code, (ctas, 1, 1), [base], memory, ctas=[ctas - 1])


def test_allocations_do_not_overlap():
    memory = Memory()
    base = memory.map_buffer(np.zeros(16, "u1"))
    for bad in (base - 8, base, base + 8):
        with pytest.raises(ValueError, match="already mapped"):
            memory.map_buffer(np.zeros(16, "u1"), address=bad)
