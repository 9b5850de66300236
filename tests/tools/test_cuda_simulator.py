"""The simulator of CUDA itself: what its words do, which rules it enforces, and that planted bugs are found."""

import ctypes
import importlib.util
import mmap
import os
import subprocess

import numpy as np
import pytest
import torch

from tools.cuda_sim.simulator import RunTime, build, run_time

SCHEDULES = pytest.mark.parametrize("schedule", range(4))


class Args(ctypes.Structure):
    _fields_ = (
        ("in_", ctypes.c_void_p),
        ("other", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("number", ctypes.c_int),
        ("counter", ctypes.c_void_p),
    )


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which brings CUDA's headers")
def test_the_simulator_is_there():
    """With all that `make test` installs, no test of CUDA C++ is skipped for want of it."""
    assert not isinstance(library := build(), str), library


@pytest.fixture(scope="module")
def units():
    path = build("fused_res_sim_units")
    if isinstance(path, str):
        pytest.skip(path)
    return RunTime(path)


@pytest.fixture
def launch(units):
    """Launches a kernel of cuda_sim/units.cu; raises its error."""
    units.library.fused_res_sim_unit.restype = ctypes.c_char_p
    units.library.fused_res_sim_unit.argtypes = (
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
        with units.schedule(schedule):
            error = units.library.fused_res_sim_unit(
                name.encode(), grid, threads, shared, ctypes.byref(args), cooperative
            )
        if error:
            raise RuntimeError(error.decode())

    return run


def aligned(values):
    """A copy at an address that is a multiple of 16."""
    buffer = np.empty(values.nbytes + 16, "u1")
    start = -buffer.ctypes.data % 16
    copy = buffer[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


@SCHEDULES
def test_every_thread_of_every_block_runs_once(launch, schedule):
    grid, threads = (5, 3, 2), 70
    out = np.zeros((30, threads), "u4")
    launch("where", grid=grid, threads=threads, out=out, schedule=schedule)
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
    """Values that the type holds, and the same as float64."""
    values = np.random.default_rng(0).normal(3, 2, (rows, columns)).astype("f4")
    if kind == "f16":
        return aligned(values.astype("f2")), values.astype("f2").astype("f8")
    bits = values.view("u4") & np.uint32(0xFFFF0000)
    return aligned((bits >> 16).astype("u2")), bits.view("f4").astype("f8")


@SCHEDULES
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_ldmatrix_and_mma(launch, units, kind, by_columns, schedule):
    """A product by way of cp.async and ldmatrix, plain and transposed, is that of float64, rounded once."""
    a, a64 = random_operand(16, 16, kind)
    b, b64 = random_operand(8 if by_columns else 16, 16 if by_columns else 8, kind)
    out = np.zeros((16, 8), "f4")
    units.bank_conflicts()
    launch(f"product_{kind}", shared=32 * 24, in_=a, other=b, out=out, number=by_columns, schedule=schedule)
    np.testing.assert_array_equal(out, (a64 @ (b64.T if by_columns else b64)).astype("f4"))
    # Rows of 32 bytes: of eight, those four apart share banks. Each matrix of 8 rows is read in two steps, but for b
    # by rows of 16 bytes.
    assert units.bank_conflicts() == (8 if by_columns else 4)


def test_mma_of_special_values(launch):
    """Subnormal numbers, infinity and NaN of float16 go through."""
    a, b, out = np.zeros((16, 16), "f2"), np.zeros((16, 8), "f2"), np.zeros((16, 8), "f4")
    b[0] = 1
    a[:4, 0] = [2.0**-24, -(2.0**-14), np.inf, np.nan]
    launch("product_f16", shared=32 * 24, in_=aligned(a), other=aligned(b), out=out, number=0)
    np.testing.assert_array_equal(out[:, 0], a[:, 0].astype("f4"))


@SCHEDULES
@pytest.mark.parametrize("rounded", [False, True])
def test_mma_tf32(launch, rounded, schedule):
    """Operands are cut to 10 bits, unless they were rounded to them, ties away from zero."""
    random = np.random.default_rng(1)
    a, b = random.normal(1, 2, (16, 8)).astype("f4"), random.normal(1, 2, (8, 8)).astype("f4")
    a[0, 0] = 1 + 2.0**-11  # half way
    out = np.zeros((16, 8), "f4")
    launch("product_tf32", in_=a, other=b, out=out, number=rounded, schedule=schedule)
    a, b = (((x.view("u4") + 0x1000 * rounded) & np.uint32(0xFFFFE000)).view("f4").astype("f8") for x in (a, b))
    np.testing.assert_array_equal(out, (a @ b).astype("f4"))


def test_copies_are_nan_until_waited_for(launch):
    source, out = aligned(np.arange(1, 13, dtype="f4").reshape(3, 4)), np.zeros((4, 3, 4), "f4")
    launch("copies", threads=1, shared=48, in_=source, out=out)
    before, on_the_way, all_but_one, all_groups = out
    assert np.isnan(before).all() and np.isnan(on_the_way).all()
    # The first group is two copies, the second of them of zeros. What is read is what memory holds at the wait.
    np.testing.assert_array_equal(all_but_one[:2], [[-1, 2, 3, 4], [0] * 4])
    assert np.isnan(all_but_one[2]).all()
    np.testing.assert_array_equal(all_groups[2], [9, 10, 11, 12])


@SCHEDULES
def test_grid_barrier(launch, schedule):
    out = np.zeros((3, 7), "u4")
    launch("rounds", grid=(7, 1, 1), threads=64, out=out, cooperative=True, schedule=schedule)
    np.testing.assert_array_equal(out, [range(1, 8), [28] * 7, [196] * 7])


@SCHEDULES
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (0, r"a divergent barrier: __syncthreads at .*units.cu:\d+, while another thread waits at .*units.cu:\d+"),
        (
            1,
            r"thread\(s\) 0-4 wait\(s\) at __syncthreads, .*units.cu:\d+\n.*5 ended\n.*6-63 wait\(s\) at __syncthreads",
        ),
        (2, r"thread\(s\) 0-31 ended\n.*32-39 wait\(s\) at __shfl_sync.*\n.*40 ended\n.*41-63 wait"),
        (3, "__ballot_sync with a mask that does not name the thread itself"),
        (4, "__shfl_sync from lane 20, which the mask does not name"),
        (5, "cp.async at 8 in shared memory of 256 bytes, misaligned"),
        (6, "cp.async from a misaligned address"),
        (7, "ldmatrix at 2 in shared memory of 256 bytes, misaligned"),
        (8, "ldmatrix at 256 in shared memory of 256 bytes"),
        (9, "cp.async at -16 in shared memory of 256 bytes"),
        (10, "a grid barrier in a launch that is not cooperative"),
        (11, "wrote past the end of its shared memory of 256 bytes"),
        (12, r"block \(\d, 0, 0\), thread \d+: (an access to memory|a misaligned access)"),
        (13, r"0-30 wait\(s\) at __syncwarp.*\n.*31 wait\(s\) at ldmatrix"),
    ],
)
def test_what_breaks_a_rule_is_an_error_and_the_next_launch_is_none(launch, number, message, schedule):
    memory = aligned(np.zeros(64, "f4"))
    with pytest.raises(RuntimeError, match=message) as error:
        launch("wrong", grid=(2, 1, 1), threads=64, shared=256, in_=memory, number=number, schedule=schedule)
    assert "units::wrong" in str(error.value)
    test_votes(launch, schedule)


def test_grid_barrier_that_never_opens(launch):
    with pytest.raises(
        RuntimeError, match=r"(?s)block \(1, 0, 0\), thread\(s\) 0 wait\(s\) at grid_barrier.*1-63 wait"
    ):
        launch("wrong", grid=(2, 1, 1), threads=64, number=14, cooperative=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 1025}, "blocks of 1025 threads"),
        ({"threads": 0}, "blocks of 0 threads"),
        ({"grid": (0, 1, 1)}, r"a grid of \(0, 1, 1\) blocks"),
        ({"grid": (1, 65536, 1)}, r"a grid of \(1, 65536, 1\) blocks"),
        ({"shared": 227 * 1024 + 1}, "232449 bytes of shared memory"),
        (
            {"grid": (133, 1, 1), "threads": 1024, "shared": 128 << 10, "cooperative": True},
            "133 blocks do not run at once",
        ),
    ],
)
def test_what_a_gpu_would_not_launch(launch, options, message):
    with pytest.raises(RuntimeError, match=f"cannot launch .*nothing.*: {message}"):
        launch("nothing", **options)


def test_shared_memory_up_to_the_limit(launch):
    launch("nothing", threads=1024, shared=227 * 1024)


def test_an_observer_sees_launches_and_may_take_them(units, launch):
    seen = []

    @ctypes.CFUNCTYPE(
        *(ctypes.c_bool, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_size_t),
        *(ctypes.POINTER(Args), ctypes.c_size_t, ctypes.c_bool),
    )
    def observe(kernel, grid, threads, shared, arguments, size, cooperative):
        seen.append((kernel, grid[:3], threads, shared, arguments[0].number, size, cooperative))
        return len(seen) == 1

    out = np.zeros((30, 2), "u4")
    units.library.fused_res_sim_observe(observe)
    try:
        launch("where", grid=(5, 3, 2), threads=2, shared=64, out=out, number=7)
        assert not out.any()
        launch("where", grid=(5, 3, 2), threads=2, shared=64, out=out, number=7)
        assert out.any()
    finally:
        units.library.fused_res_sim_observe(None)
    name = b"_ZN9fused_res4cuda5units5whereENS1_4ArgsE"
    assert seen == [(name, [5, 3, 2], 2, 64, 7, ctypes.sizeof(Args), False)] * 2


@pytest.mark.parametrize("before", [False, True])
def test_guarded_tensors(launch, before):
    """Every other one ends, or begins, where a page is that must not be touched, and all begin as NaN."""
    if isinstance(reason := build(), str):
        pytest.skip(reason)
    with run_time().guarded():
        tensors = [torch.empty(4 * 10), torch.empty(4 * 10)]
    assert all(tensor.isnan().all() and tensor.data_ptr() % 16 == 0 for tensor in tensors)
    ends_at_page = [(tensor.data_ptr() + tensor.nbytes) % mmap.PAGESIZE == 0 for tensor in tensors]
    assert sorted(ends_at_page) == [False, True]
    tensor = tensors[ends_at_page.index(not before)]
    launch("where", threads=40, out=tensor.data_ptr())
    with pytest.raises(RuntimeError, match="thread 0: an access" if before else "thread 40: an access"):
        launch("where", threads=41, out=tensor.data_ptr() - 4 * before)
    assert not torch.empty(4096).isnan().all()


# Which layer finds which deliberate bug (cuda_sim/bugs/kernels): its result, under all schedules, or a sanitizer.
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
def test_deliberate_bugs_are_found(bug, sanitizer):
    correct = run_program(f"fused_res_sim_bugs_{sanitizer}", bug, "correct")
    assert correct.returncode == 0, correct.stdout + correct.stderr
    broken = run_program(f"fused_res_sim_bugs_{sanitizer}", bug, "broken")
    if "result" in BUGS[bug]:
        assert "schedule 0: wrong" in broken.stdout
    for name, report in REPORTS.items():
        expected = name == sanitizer and name in BUGS[bug]
        assert (report in broken.stderr) == expected, broken.stderr
        assert not expected or f"bugs/kernels/{bug}.cu" in broken.stderr  # the kernel's line
    assert (broken.returncode == 0) == (not BUGS[bug] & {"result", sanitizer}), broken.stdout + broken.stderr


def test_no_bug_is_forgotten():
    listed = run_program("fused_res_sim_bugs_plain").stdout.split()[::2]
    assert set(listed) == set(BUGS)


SANITIZED = ["norm forward", "norm backward", "norm single pass", "update", "max pool", "conv", "grad"]
#: Cooperative launches take ThreadSanitizer most of its time, and synchronise alike in every dtype.
SLOW = ("norm single pass", "thread", 2)


@pytest.mark.parametrize(
    ("kernels", "sanitizer", "schedule"),
    [
        *(
            pytest.param(kernels, *how, marks=[pytest.mark.full] if (kernels, *how) == SLOW else [])
            for how in (("address", 1), ("thread", 2))
            for kernels in SANITIZED
        ),
        ("norm single pass float32", "thread", 2),
    ],
)
def test_kernels_under_sanitizers(kernels, sanitizer, schedule):
    """Every kernel in small odd shapes, on arrays of exactly their size (cuda_sim/sanitize)."""
    done = run_program(f"fused_res_sim_kernels_{sanitizer}", kernels, schedule=schedule)
    assert done.returncode == 0, done.stdout + done.stderr
