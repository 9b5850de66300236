"""The PTX interpreter on Triton's sm_80 PTX: results compared with float64, and seeded faults that it has to detect."""

import re

import pytest
import torch

pytest.importorskip("triton")

from tools.ptx import sample_kernels
from tools.ptx.compiled_session import needs_compiled_triton
from tools.ptx.memory import Fault
from tools.ptx.triton_runner import run_interpreted

HALF_DTYPES = [torch.bfloat16, torch.float16]


def randn(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@needs_compiled_triton
@pytest.mark.parametrize("dtype", [*HALF_DTYPES, torch.float32])
@pytest.mark.parametrize("n", [1, 1000, 4096, 10001])
def test_add(dtype, n):
    """Elementwise results are bit-identical to PyTorch's, with vector accesses and, for odd sizes, scalar ones."""
    x, y = randn(n, dtype=dtype), randn(n, dtype=dtype, seed=1)
    assert torch.equal(run_interpreted(lambda: sample_kernels.add(x, y)), x + y)


@needs_compiled_triton
def test_add_of_unaligned_views():
    x, y = randn(1001, dtype=torch.bfloat16)[1:], randn(1000, dtype=torch.bfloat16)
    assert torch.equal(run_interpreted(lambda: sample_kernels.add(x, y)), x + y)


@needs_compiled_triton
@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("cols", [33, 1024, 3000])
def test_row_sum(cols, schedule):
    """The reduction uses shuffles within a warp, and shared memory between warps."""
    x = randn(5, cols, dtype=torch.float16)
    got = run_interpreted(lambda: sample_kernels.row_sum(x), schedule)
    # Tree reduction: each value passes through at most about 20 additions.
    assert ((got - x.double().sum(1)).abs() <= 20 * 2**-24 * x.double().abs().sum(1)).all()


def operands(m, n, k, dtype):
    return randn(m, k, dtype=dtype), randn(k, n, dtype=dtype, seed=1)


def as_mma_operand(a):
    """Return the value that mma reads, in float64: float32 is truncated to TF32."""
    return (a if a.dtype != torch.float32 else (a.view(torch.int32) & -8192).view(torch.float32)).double()


def excess_error(c, a, b):
    """Return the largest error minus its bound: float32 accumulation every 8 products or more, then one rounding."""
    a, b = as_mma_operand(a), as_mma_operand(b)
    reference = a @ b
    bound = a.shape[1] / 8 * 2**-24 * (a.abs() @ b.abs()) + torch.finfo(c.dtype).eps / 2 * 1.01 * reference.abs()
    error = (c.double() - reference).abs()
    return float((error - bound).max()) if bool(torch.isfinite(error).all()) else float("inf")


@needs_compiled_triton
@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("dtype", [*HALF_DTYPES, torch.float32])
@pytest.mark.parametrize("shape", [(64, 64, 64), (112, 80, 208), (100, 72, 200), (128, 64, 33)])
def test_matmul(shape, dtype, schedule):
    """mma.sync, ldmatrix and a three-stage cp.async pipeline; float32 operands are truncated to TF32."""
    a, b = operands(*shape, dtype)
    assert excess_error(run_interpreted(lambda: sample_kernels.matmul(a, b), schedule), a, b) <= 0


def swap(pattern, order, count=0):
    """Return an edit of PTX that reorders the groups of each match."""

    def edit(ptx):
        return re.sub(pattern, lambda found: "".join(found[i] for i in order), ptx, count=count)

    return edit


def remove(pattern, count=0, replacement=""):
    return lambda ptx: re.sub(pattern, replacement, ptx, count=count)


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
    "wait_group too large": lambda ptx: re.sub(r"wait_group(\s+)2", r"wait_group\g<1>4", ptx),
    "never waits": remove(r"cp\.async\.wait_group\s+\d+;"),
    "never commits": remove(r"cp\.async\.commit_group;"),
    "no barrier": remove(r"bar\.sync\s+0;"),
    "misaligned copy source": lambda ptx: re.sub(_COPY, r"\g<1>0\g<2>2", ptx),
    "misaligned copy destination": lambda ptx: re.sub(_COPY, r"\g<1>8\g<2>0", ptx),
    "copies without a mask": lambda ptx: re.sub(r"(cp\.async\.cg[^;]*0x10), %r\d+;", r"\1;", ptx),
    "stores without a mask": lambda ptx: re.sub(r"@%p\d+ (st\.global)", r"\1", ptx),
    "mask off by one": lambda ptx: ptx.replace("setp.lt.s32", "setp.le.s32"),
    "truncation instead of rounding": lambda ptx: re.sub(
        r"cvt\.rn\.bf16\.f32 \t(%rs\d+), (%r\d+);", r"mov.b32 {_, \1}, \2;", ptx
    ),
}


@needs_compiled_triton
@pytest.mark.parametrize("name", MATMUL_ERRORS)
def test_seeded_faults_in_matmul_are_detected(name):
    a, b = operands(112, 80, 208, torch.bfloat16)
    edited = []

    def edit(ptx):
        edited.append(MATMUL_ERRORS[name](ptx))
        assert edited[-1] != ptx, "nothing to edit"
        return edited[-1]

    try:
        c = run_interpreted(lambda: sample_kernels.matmul(a, b), edit=edit)
    except Fault:
        return
    assert excess_error(c, a, b) > 0


@needs_compiled_triton
@pytest.mark.parametrize("schedule", [0, 1, 2])
def test_removing_any_barrier_of_matmul_is_detected(schedule):
    """Except one: Triton waits for the same copies, followed by a barrier, at the end and at the start of the loop."""
    a, b = operands(64, 64, 256, torch.bfloat16)
    barrier, count = re.compile(r"bar\.sync\s+0;"), 0

    def without(number):
        def edit(ptx):
            nonlocal count
            spans = [found.span() for found in barrier.finditer(ptx)]
            count = len(spans)
            return ptx[: spans[number][0]] + ptx[spans[number][1] :] if number < count else ptx

        return edit

    missed, number = [], 0
    while number == 0 or number < count:
        try:
            run_interpreted(lambda: sample_kernels.matmul(a, b), schedule, edit=without(number))
            missed.append(number)
        except Fault as fault:
            if "no barrier in between" not in str(fault):
                raise
        number += 1
    assert count >= 5 and len(missed) <= 1


REDUCTION_ERRORS = {
    "another lane": lambda ptx: re.sub(r"(shfl\.sync\.bfly[^;]*), 16, 31", r"\1, 8, 31", ptx),
    "no barrier": remove(r"bar\.sync\s+0;"),
    "mask off by one": lambda ptx: ptx.replace("setp.lt.s32", "setp.le.s32"),
    "misaligned": lambda ptx: re.sub(r"(ld\.global[^;]*\[ %rd\d+ \+ )0", r"\g<1>1", ptx),
}


@needs_compiled_triton
@pytest.mark.parametrize("name", REDUCTION_ERRORS)
def test_seeded_faults_in_row_sum_are_detected(name):
    x = randn(5, 1000, dtype=torch.float16)

    def edit(ptx):
        changed = REDUCTION_ERRORS[name](ptx)
        assert changed != ptx, "nothing to edit"
        return changed

    try:
        got = run_interpreted(lambda: sample_kernels.row_sum(x), edit=edit)
    except Fault:
        return
    assert not torch.allclose(got.double(), x.double().sum(1), rtol=1e-4, atol=1e-4)


@needs_compiled_triton
def test_64_bit_offsets_of_a_large_tensor():
    """More than 2^31 elements, of which only the last pages are accessed."""
    x = torch.empty(2**31 + 1000, dtype=torch.int8)
    x[-1024:] = torch.arange(1024) % 50
    y = run_interpreted(lambda: sample_kernels.add(x, x), ctas=lambda grid: [grid[0] - 1])
    assert torch.equal(y[-1000:], 2 * x[-1000:])


@needs_compiled_triton
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_batch_norm_act(dtype, format):
    """An unmodified operator, forward and backward, on CPU tensors."""
    from fused_res.backends.reference import batch_norm_act as reference
    from fused_res.backends.triton import batch_norm_act as kernels

    shape = (4, 35, 9, 7)
    x, residual, dy = (randn(*shape, dtype=dtype, seed=i).contiguous(memory_format=format) for i in range(3))
    x += 10
    weight, bias = randn(35, dtype=torch.float32, seed=4), randn(35, dtype=torch.float32, seed=5)
    options = None, None, True, 1e-5, "relu", True

    def assert_close(actual, expected, ulps):
        step = torch.finfo(actual.dtype).eps * expected.double().abs().max()
        assert ((actual.double() - expected).abs() <= ulps * step).all()

    forward = run_interpreted(lambda: kernels.batch_norm_act_forward(x, residual, None, weight, bias, *options))
    y, stats, mask = forward
    assert_close(y, reference.batch_norm_act_forward(x.double(), residual.double(), None, weight, bias, *options)[0], 1)
    gradients = run_interpreted(
        lambda: kernels.batch_norm_act_backward(dy, x, weight, stats, mask, True, "relu", [True] * 4)
    )
    exact = reference.batch_norm_act_backward(
        dy.double(), x.double(), weight.double(), stats.double(), mask, True, "relu", [True] * 4
    )
    for actual, expected in zip(gradients, exact, strict=True):
        assert_close(actual, expected, 4 if actual.dtype == torch.float32 else 1)
