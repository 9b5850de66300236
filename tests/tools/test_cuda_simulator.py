"""The CUDA simulator: its built-ins, the rules that it enforces, and detection of deliberate bugs."""

import ctypes
import importlib.util
import mmap
import os
import subprocess

import numpy as np
import pytest
import torch

from tools.cuda_sim.simulator import SimulatorLibrary, build, load_simulator

SCHEDULES = pytest.mark.parametrize("schedule", range(4))


class Args(ctypes.Structure):
    _fields_ = (
        ("in_", ctypes.c_void_p),
        ("other", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("number", ctypes.c_int),
        ("counter", ctypes.c_void_p),
    )


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which contains CUDA's headers")
def test_simulator_builds():
    """With the dependencies of `make test`, no test of CUDA C++ is skipped because the simulator is missing."""
    assert not isinstance(library := build(), str), library


@pytest.fixture(scope="module")
def unit_kernels():
    path = build("fused_res_sim_unit_kernels")
    if isinstance(path, str):
        pytest.skip(path)
    return SimulatorLibrary(path)


@pytest.fixture
def launch(unit_kernels):
    """Launch a kernel of tools/cuda_sim/unit_kernels.cu, and raise its error."""
    unit_kernels.library.fused_res_sim_run_unit_kernel.restype = ctypes.c_char_p
    unit_kernels.library.fused_res_sim_run_unit_kernel.argtypes = (
        ctypes.c_char_p,
        ctypes.c_uint * 3,
        ctypes.c_uint,
        ctypes.c_size_t,
        ctypes.POINTER(Args),
        ctypes.c_bool,
    )

    def run(name, *, grid=(1, 1, 1), threads=32, shared=0, cooperative=False, schedule=0, **arguments):
        counter = np.zeros(1, "u4")
        pointers = {k: v.ctypes.data if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
        args = Args(counter=counter.ctypes.data, **pointers)
        grid = (ctypes.c_uint * 3)(*grid)
        with unit_kernels.schedule(schedule):
            error = unit_kernels.library.fused_res_sim_run_unit_kernel(
                name.encode(), grid, threads, shared, ctypes.byref(args), cooperative
            )
        if error:
            raise RuntimeError(error.decode())

    return run


def aligned(values):
    """Return a copy at an address that is a multiple of 16."""
    buffer = np.empty(values.nbytes + 16, "u1")
    start = -buffer.ctypes.data % 16
    copy = buffer[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


@SCHEDULES
def test_every_thread_of_every_block_runs_once(launch, schedule):
    grid, threads = (5, 3, 2), 70
    out = np.zeros((30, threads), "u4")
    launch("thread_indices", grid=grid, threads=threads, out=out, schedule=schedule)
    np.testing.assert_array_equal(out, (np.arange(30) << 10)[:, None] | np.arange(threads))


@SCHEDULES
@pytest.mark.parametrize("width", [8, 32])
def test_shuffles(launch, width, schedule):
    out = np.zeros((32, 5))
    launch("shuffles", out=out, number=width, schedule=schedule)
    lane = np.arange(32)
    segment = lane // width * width
    np.testing.assert_array_equal(out[:, 0], segment + 3 + 0.5)
    np.testing.assert_array_equal(out[:, 1], lane ^ 5)
    np.testing.assert_array_equal(out[:, 2], np.where(lane + 2 < segment + width, lane + 2, lane))
    np.testing.assert_array_equal(out[:, 3], np.where(lane - 2 >= segment, lane - 2, lane))
    np.testing.assert_array_equal(out[:, 4], np.where(lane < 16, lane ^ 1, lane ^ 2))


@SCHEDULES
def test_votes(launch, schedule):
    out = np.zeros((96, 6), "u4")
    launch("votes", threads=96, out=out, number=40, schedule=schedule)
    second_warp = np.arange(96) // 32 == 1
    np.testing.assert_array_equal(out[:, 0], 0xAAAAAAAA)
    np.testing.assert_array_equal(out[:, 1], second_warp)
    np.testing.assert_array_equal(out[:, 2], ~second_warp)
    np.testing.assert_array_equal(out[:, 3:], [[1, 0, 40]] * 96)


def random_operand(rows, columns, kind):
    """Return random values in a type, and the same values in float64."""
    values = np.random.default_rng(0).normal(3, 2, (rows, columns)).astype("f4")
    if kind == "f16":
        return aligned(values.astype("f2")), values.astype("f2").astype("f8")
    bits = values.view("u4") & np.uint32(0xFFFF0000)
    return aligned((bits >> 16).astype("u2")), bits.view("f4").astype("f8")


@SCHEDULES
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_ldmatrix_and_mma(launch, unit_kernels, kind, by_columns, schedule):
    """A product with cp.async and ldmatrix, plain and transposed, equals that of float64, rounded once."""
    a, a64 = random_operand(16, 16, kind)
    b, b64 = random_operand(8 if by_columns else 16, 16 if by_columns else 8, kind)
    out = np.zeros((16, 8), "f4")
    unit_kernels.bank_conflicts()
    launch(f"product_{kind}", shared=32 * 24, in_=a, other=b, out=out, number=by_columns, schedule=schedule)
    np.testing.assert_array_equal(out, (a64 @ (b64.T if by_columns else b64)).astype("f4"))
    # Rows of 32 bytes: of 8 rows, those 4 apart share banks, so each 8x8 matrix is read in two steps, except row-major
    # b, whose rows have 16 bytes.
    assert unit_kernels.bank_conflicts() == (8 if by_columns else 4)


def test_mma_of_special_values(launch):
    """float16 subnormal numbers, infinity and NaN are converted exactly."""
    a, b, out = np.zeros((16, 16), "f2"), np.zeros((16, 8), "f2"), np.zeros((16, 8), "f4")
    b[0] = 1
    a[:4, 0] = [2.0**-24, -(2.0**-14), np.inf, np.nan]
    launch("product_f16", shared=32 * 24, in_=aligned(a), other=aligned(b), out=out, number=0)
    np.testing.assert_array_equal(out[:, 0], a[:, 0].astype("f4"))


@SCHEDULES
@pytest.mark.parametrize("rounded", [False, True])
def test_mma_tf32(launch, rounded, schedule):
    """Operands are truncated to TF32, unless they were rounded to it, with ties away from zero."""
    random = np.random.default_rng(1)
    a, b = random.normal(1, 2, (16, 8)).astype("f4"), random.normal(1, 2, (8, 8)).astype("f4")
    a[0, 0] = 1 + 2.0**-11  # half way
    out = np.zeros((16, 8), "f4")
    launch("product_tf32", in_=a, other=b, out=out, number=rounded, schedule=schedule)
    a, b = (((x.view("u4") + 0x1000 * rounded) & np.uint32(0xFFFFE000)).view("f4").astype("f8") for x in (a, b))
    np.testing.assert_array_equal(out, (a @ b).astype("f4"))


def test_async_copies_are_nan_until_the_wait(launch):
    source, out = aligned(np.arange(1, 13, dtype="f4").reshape(3, 4)), np.zeros((4, 3, 4), "f4")
    launch("async_copies", threads=1, shared=48, in_=source, out=out)
    before, in_flight, all_but_one, all_groups = out
    assert np.isnan(before).all() and np.isnan(in_flight).all()
    # The first group has two copies, the second of them zero-filled. Copies read global memory at the wait.
    np.testing.assert_array_equal(all_but_one[:2], [[-1, 2, 3, 4], [0] * 4])
    assert np.isnan(all_but_one[2]).all()
    np.testing.assert_array_equal(all_groups[2], [9, 10, 11, 12])


@SCHEDULES
def test_grid_barrier(launch, schedule):
    out = np.zeros((3, 7), "u4")
    launch("grid_sums", grid=(7, 1, 1), threads=64, out=out, cooperative=True, schedule=schedule)
    np.testing.assert_array_equal(out, [range(1, 8), [28] * 7, [196] * 7])


@SCHEDULES
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            0,
            r"divergent barrier: __syncthreads at .*unit_kernels.cu:\d+,"
            r" while another thread waits at .*unit_kernels.cu:\d+",
        ),
        (
            1,
            r"deadlock:\n.*thread\(s\) 0-4 wait\(s\) at __syncthreads, .*unit_kernels.cu:\d+\n.*5 ended\n"
            r".*6-63 wait\(s\) at __syncthreads",
        ),
        (2, r"thread\(s\) 0-31 ended\n.*32-39 wait\(s\) at __shfl_sync.*\n.*40 ended\n.*41-63 wait"),
        (3, "__ballot_sync with a mask that does not include the calling lane"),
        (4, "__shfl_sync from lane 20, which is not in the mask"),
        (5, "cp.async at 8 in shared memory of 256 bytes, misaligned"),
        (6, "cp.async from a misaligned address"),
        (7, "ldmatrix at 2 in shared memory of 256 bytes, misaligned"),
        (8, "ldmatrix at 256 in shared memory of 256 bytes, out of bounds"),
        (9, "cp.async at -16 in shared memory of 256 bytes, out of bounds"),
        (10, "grid barrier in a launch that is not cooperative"),
        (11, "wrote past the end of its shared memory of 256 bytes"),
        (12, r"block \(\d, 0, 0\), thread \d+: (an out-of-bounds access|a misaligned access)"),
        (13, r"0-30 wait\(s\) at __syncwarp.*\n.*31 wait\(s\) at ldmatrix"),
    ],
)
def test_rule_violation_raises_and_the_next_launch_succeeds(launch, number, message, schedule):
    memory = aligned(np.zeros(64, "f4"))
    with pytest.raises(RuntimeError, match=message) as error:
        launch("rule_violations", grid=(2, 1, 1), threads=64, shared=256, in_=memory, number=number, schedule=schedule)
    assert "unit_kernels::rule_violations" in str(error.value)
    test_votes(launch, schedule)


def test_deadlock_at_a_grid_barrier_raises(launch):
    with pytest.raises(
        RuntimeError, match=r"(?s)block \(1, 0, 0\), thread\(s\) 0 wait\(s\) at grid_barrier.*1-63 wait"
    ):
        launch("rule_violations", grid=(2, 1, 1), threads=64, number=14, cooperative=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 1025}, "invalid block size, 1025 threads"),
        ({"threads": 0}, "invalid block size, 0 threads"),
        ({"grid": (0, 1, 1)}, r"invalid grid \(0, 1, 1\)"),
        ({"grid": (1, 65536, 1)}, r"invalid grid \(1, 65536, 1\)"),
        ({"shared": 227 * 1024 + 1}, "232449 bytes of shared memory exceed the limit of 232448"),
        (
            {"grid": (133, 1, 1), "threads": 1024, "shared": 128 << 10, "cooperative": True},
            "133 blocks cannot be resident at once",
        ),
    ],
)
def test_invalid_launch_configuration_raises(launch, options, message):
    with pytest.raises(RuntimeError, match=f"cannot launch .*empty_kernel.*: {message}"):
        launch("empty_kernel", **options)


def test_shared_memory_up_to_the_limit(launch):
    launch("empty_kernel", threads=1024, shared=227 * 1024)


def test_observer_can_intercept_launches(unit_kernels, launch):
    launches = []

    @ctypes.CFUNCTYPE(
        *(ctypes.c_bool, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_size_t),
        *(ctypes.POINTER(Args), ctypes.c_size_t, ctypes.c_bool),
    )
    def observe(kernel, grid, threads, shared, arguments, size, cooperative):
        launches.append((kernel, grid[:3], threads, shared, arguments[0].number, size, cooperative))
        return len(launches) == 1

    out = np.zeros((30, 2), "u4")
    unit_kernels.library.fused_res_sim_observe(observe)
    try:
        launch("thread_indices", grid=(5, 3, 2), threads=2, shared=64, out=out, number=7)
        assert not out.any()
        launch("thread_indices", grid=(5, 3, 2), threads=2, shared=64, out=out, number=7)
        assert out.any()
    finally:
        unit_kernels.library.fused_res_sim_observe(None)
    name = b"_ZN9fused_res4cuda12unit_kernels14thread_indicesENS1_4ArgsE"
    assert launches == [(name, [5, 3, 2], 2, 64, 7, ctypes.sizeof(Args), False)] * 2


@pytest.mark.parametrize("before", [False, True])
def test_guarded_allocations(launch, before):
    """Alternately, tensors end directly before a guard page or begin directly after one, and all are NaN at first."""
    if isinstance(reason := build(), str):
        pytest.skip(reason)
    with load_simulator().guard_allocations():
        tensors = [torch.empty(4 * 10), torch.empty(4 * 10)]
    assert all(tensor.isnan().all() and tensor.data_ptr() % 16 == 0 for tensor in tensors)
    ends_at_page = [(tensor.data_ptr() + tensor.nbytes) % mmap.PAGESIZE == 0 for tensor in tensors]
    assert sorted(ends_at_page) == [False, True]
    tensor = tensors[ends_at_page.index(not before)]
    launch("thread_indices", threads=40, out=tensor.data_ptr())
    with pytest.raises(RuntimeError, match="thread 0: an out-of-bounds" if before else "thread 40: an out-of-bounds"):
        launch("thread_indices", threads=41, out=tensor.data_ptr() - 4 * before)
    assert not torch.empty(4096).isnan().all()


# What detects each deliberate bug (tools/cuda_sim/bugs/kernels): a wrong result, under all schedules, or a sanitizer.
BUGS = {
    "missing_syncthreads": {"result", "thread"},
    "missing_second_syncthreads": {"result", "thread"},
    "wrong_wait_group": {"result", "thread"},
    "missing_syncwarp": {"thread"},
    "swapped_fragments": {"result"},
    "out_of_bounds_shared": {"address"},
    "out_of_bounds_global": {"address"},
    "race_between_blocks": {"thread"},
}
REPORTS = {"address": "ERROR: AddressSanitizer", "thread": "WARNING: ThreadSanitizer: data race"}


def run_program(program, *arguments, schedule=0):
    path = build(program)
    if isinstance(path, str):
        pytest.skip(path)
    environment = {**os.environ, "FUSED_RES_SIM_SCHEDULE": str(schedule)}
    return subprocess.run([path, *arguments], env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize("sanitizer", ["plain", "address", "thread"])
@pytest.mark.parametrize("bug", BUGS)
def test_deliberate_bugs_are_detected(bug, sanitizer):
    correct = run_program(f"fused_res_sim_bugs_{sanitizer}", bug, "correct")
    assert correct.returncode == 0, correct.stdout + correct.stderr
    broken = run_program(f"fused_res_sim_bugs_{sanitizer}", bug, "broken")
    if "result" in BUGS[bug]:
        assert "schedule 0: wrong" in broken.stdout
    for name, report in REPORTS.items():
        expected = name == sanitizer and name in BUGS[bug]
        assert (report in broken.stderr) == expected, broken.stderr
        assert not expected or f"bugs/kernels/{bug}.cu" in broken.stderr  # the report names the kernel's source
    assert (broken.returncode == 0) == (not BUGS[bug] & {"result", sanitizer}), broken.stdout + broken.stderr


def test_every_deliberate_bug_is_tested():
    listed = run_program("fused_res_sim_bugs_plain").stdout.split()[::2]
    assert set(listed) == set(BUGS)


SANITIZED = ["norm forward", "norm backward", "norm single pass", "update", "max pool", "conv", "grad"]
#: Most of ThreadSanitizer's time is for cooperative launches, whose synchronization is the same in every dtype.
SLOW = ("norm single pass", "thread", 2)


@pytest.mark.parametrize(
    ("kernels", "sanitizer", "schedule"),
    [
        *(
            pytest.param(kernels, *options, marks=[pytest.mark.full] if (kernels, *options) == SLOW else [])
            for options in (("address", 1), ("thread", 2))
            for kernels in SANITIZED
        ),
        ("norm single pass float32", "thread", 2),
    ],
)
def test_kernels_under_sanitizers(kernels, sanitizer, schedule):
    """Every kernel runs without a report in small odd shapes, on arrays of exactly their size (cuda_sim/sanitize)."""
    done = run_program(f"fused_res_sim_kernels_{sanitizer}", kernels, schedule=schedule)
    assert done.returncode == 0, done.stdout + done.stderr
