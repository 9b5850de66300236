"""Triton's own sm_80 code, interpreted: the interpreter against float64, and deliberate errors that it has to catch."""

import re

import pytest
import torch

pytest.importorskip("triton")

from tools.ptx import sample_kernels as samples
from tools.ptx.compiled_session import compiled
from tools.ptx.memory import Fault
from tools.ptx.triton_runner import interpreted

HALVES = [torch.bfloat16, torch.float16]


def randn(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@compiled
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("n", [1, 1000, 4096, 10001])
def test_add(dtype, n):
    """Element-wise: the same bits as PyTorch. Vectors, and scalar accesses where the size is odd."""
    x, y = randn(n, dtype=dtype), randn(n, dtype=dtype, seed=1)
    assert torch.equal(interpreted(lambda: samples.add(x, y)), x + y)


@compiled
def test_views_that_are_not_aligned():
    x, y = randn(1001, dtype=torch.bfloat16)[1:], randn(1000, dtype=torch.bfloat16)
    assert torch.equal(interpreted(lambda: samples.add(x, y)), x + y)


@compiled
@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("cols", [33, 1024, 3000])
def test_row_sum(cols, schedule):
    """A reduction by shuffles within a warp, and through shared memory between warps."""
    x = randn(5, cols, dtype=torch.float16)
    got = interpreted(lambda: samples.row_sum(x), schedule)
    # A tree: each value goes through at most about 20 additions.
    assert ((got - x.double().sum(1)).abs() <= 20 * 2**-24 * x.double().abs().sum(1)).all()


def operands(m, n, k, dtype):
    return randn(m, k, dtype=dtype), randn(k, n, dtype=dtype, seed=1)


def read_as(a):
    """As the matrix instruction reads it: of float32, TF32's bits."""
    return (a if a.dtype != torch.float32 else (a.view(torch.int32) & -8192).view(torch.float32)).double()


def excess(c, a, b):
    """By how much the error passes what rounding explains: float32 sums of 8 products or more, then one rounding."""
    a, b = read_as(a), read_as(b)
    exact = a @ b
    allowed = a.shape[1] / 8 * 2**-24 * (a.abs() @ b.abs()) + torch.finfo(c.dtype).eps / 2 * 1.01 * exact.abs()
    error = (c.double() - exact).abs()
    return float((error - allowed).max()) if bool(torch.isfinite(error).all()) else float("inf")


@compiled
@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("shape", [(64, 64, 64), (112, 80, 208), (100, 72, 200), (128, 64, 33)])
def test_matmul(shape, dtype, schedule):
    """mma.sync, ldmatrix and cp.async three stages deep; float32 as TF32, of operands that are cut off."""
    a, b = operands(*shape, dtype)
    assert excess(interpreted(lambda: samples.matmul(a, b), schedule), a, b) <= 0


def swap(pattern, order, count=0):
    """Reorders the groups of a match; the rest stays in place."""

    def edit(ptx):
        return re.sub(pattern, lambda found: "".join(found[i] for i in order), ptx, count=count)

    return edit


def remove(pattern, count=0, keep=""):
    return lambda ptx: re.sub(pattern, keep, ptx, count=count)


_MMA = r"(mma\.sync[^{]*\{[^}]*\}, \{ )(%r\d+)(, )(%r\d+)(, )(%r\d+)(, %r\d+ \}, \{ )(%r\d+)(, )(%r\d+)( \})"
_LDMATRIX = r"(ldmatrix[^{]*\{)(%r\d+)(, )(%r\d+)(, )(%r\d+)"
_COPY = r"(cp\.async\.cg\.shared\.global \[ %r\d+ \+ )0( \], \[ %rd\d+ \+ )0"
MATMUL_ERRORS = {
    "rows of A": swap(_MMA, (1, 4, 3, 2, 5, 6, 7, 8, 9, 10, 11)),
    "halves of A": swap(_MMA, (1, 6, 3, 4, 5, 2, 7, 8, 9, 10, 11)),
    "halves of B": swap(_MMA, (1, 2, 3, 4, 5, 6, 7, 10, 9, 8, 11)),
    "one mma only": swap(_MMA, (1, 2, 3, 4, 5, 6, 7, 10, 9, 8, 11), count=1),
    "ldmatrix registers": swap(_LDMATRIX, (1, 4, 3, 2, 5, 6)),
    "one ldmatrix only": swap(_LDMATRIX, (1, 4, 3, 2, 5, 6), count=1),
    "not transposed": remove(r"\.trans"),
    "accumulator": lambda ptx: re.sub(r"(mma\.sync[^;]*\{ )(%r\d+), (%r\d+)([^{;]*;)", r"\1\3, \2\4", ptx, count=1),
    "bfloat16 as float16": lambda ptx: ptx.replace("f32.bf16.bf16.f32", "f32.f16.f16.f32"),
    "waits for too few": lambda ptx: re.sub(r"wait_group(\s+)2", r"wait_group\g<1>4", ptx),
    "never waits": remove(r"cp\.async\.wait_group\s+\d+;"),
    "never commits": remove(r"cp\.async\.commit_group;"),
    "no barrier": remove(r"bar\.sync\s+0;"),
    "copies ahead": lambda ptx: re.sub(_COPY, r"\g<1>0\g<2>2", ptx),
    "copies aside": lambda ptx: re.sub(_COPY, r"\g<1>8\g<2>0", ptx),
    "copies without a mask": lambda ptx: re.sub(r"(cp\.async\.cg[^;]*0x10), %r\d+;", r"\1;", ptx),
    "stores without a mask": lambda ptx: re.sub(r"@%p\d+ (st\.global)", r"\1", ptx),
    "a mask one too far": lambda ptx: ptx.replace("setp.lt.s32", "setp.le.s32"),
    "truncates": lambda ptx: re.sub(r"cvt\.rn\.bf16\.f32 \t(%rs\d+), (%r\d+);", r"mov.b32 {_, \1}, \2;", ptx),
}


@compiled
@pytest.mark.parametrize("name", MATMUL_ERRORS)
def test_errors_in_a_matmul_are_caught(name):
    a, b = operands(112, 80, 208, torch.bfloat16)
    edited = []

    def edit(ptx):
        edited.append(MATMUL_ERRORS[name](ptx))
        assert edited[-1] != ptx, "nothing to edit"
        return edited[-1]

    try:
        c = interpreted(lambda: samples.matmul(a, b), edit=edit)
    except Fault:
        return
    assert excess(c, a, b) > 0


@compiled
@pytest.mark.parametrize("schedule", [0, 1, 2])
def test_every_barrier_of_a_matmul_is_needed(schedule):
    """But one: Triton waits for the same copies, and places a barrier, at the end of the loop and at its beginning."""
    a, b = operands(64, 64, 256, torch.bfloat16)
    barrier, count = re.compile(r"bar\.sync\s+0;"), 0

    def without(number):
        def edit(ptx):
            nonlocal count
            places = [found.span() for found in barrier.finditer(ptx)]
            count = len(places)
            return ptx[: places[number][0]] + ptx[places[number][1] :] if number < count else ptx

        return edit

    missed, number = [], 0
    while number == 0 or number < count:
        try:
            interpreted(lambda: samples.matmul(a, b), schedule, edit=without(number))
            missed.append(number)
        except Fault as fault:
            if "no barrier in between" not in str(fault):
                raise
        number += 1
    assert count >= 5 and len(missed) <= 1


REDUCTION_ERRORS = {
    "another lane": lambda ptx: re.sub(r"(shfl\.sync\.bfly[^;]*), 16, 31", r"\1, 8, 31", ptx),
    "no barrier": remove(r"bar\.sync\s+0;"),
    "a mask one too far": lambda ptx: ptx.replace("setp.lt.s32", "setp.le.s32"),
    "misaligned": lambda ptx: re.sub(r"(ld\.global[^;]*\[ %rd\d+ \+ )0", r"\g<1>1", ptx),
}


@compiled
@pytest.mark.parametrize("name", REDUCTION_ERRORS)
def test_errors_in_a_reduction_are_caught(name):
    x = randn(5, 1000, dtype=torch.float16)

    def edit(ptx):
        changed = REDUCTION_ERRORS[name](ptx)
        assert changed != ptx, "nothing to edit"
        return changed

    try:
        got = interpreted(lambda: samples.row_sum(x), edit=edit)
    except Fault:
        return
    assert not torch.allclose(got.double(), x.double().sum(1), rtol=1e-4, atol=1e-4)


@compiled
def test_the_end_of_a_large_tensor():
    """Beyond 2^31 elements, of which only the last pages are ever touched."""
    x = torch.empty(2**31 + 1000, dtype=torch.int8)
    x[-1024:] = torch.arange(1024) % 50
    y = interpreted(lambda: samples.add(x, x), ctas=lambda grid: [grid[0] - 1])
    assert torch.equal(y[-1000:], 2 * x[-1000:])


@compiled
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", HALVES)
def test_batch_norm_act(dtype, format):
    """An operator as it is, forward and backward, on CPU tensors."""
    from fused_res.backends.reference import batch_norm_act as reference
    from fused_res.backends.triton import batch_norm_act as kernels

    shape = (4, 35, 9, 7)
    x, residual, dy = (randn(*shape, dtype=dtype, seed=i).contiguous(memory_format=format) for i in range(3))
    x += 10
    weight, bias = randn(35, dtype=torch.float32, seed=4), randn(35, dtype=torch.float32, seed=5)
    options = None, None, True, 1e-5, True, True

    def close(ours, exact, ulps):
        step = torch.finfo(ours.dtype).eps * exact.double().abs().max()
        assert ((ours.double() - exact).abs() <= ulps * step).all()

    forward = interpreted(lambda: kernels.batch_norm_act_forward(x, residual, None, weight, bias, *options))
    y, stats, mask = forward
    close(y, reference.batch_norm_act_forward(x.double(), residual.double(), None, weight, bias, *options)[0], 1)
    gradients = interpreted(lambda: kernels.batch_norm_act_backward(dy, x, weight, stats, mask, True, True, [True] * 4))
    exact = reference.batch_norm_act_backward(
        dy.double(), x.double(), weight.double(), stats.double(), mask, True, True, [True] * 4
    )
    for ours, want in zip(gradients, exact, strict=True):
        close(ours, want, 4 if ours.dtype == torch.float32 else 1)
