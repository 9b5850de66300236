"""Tests specific to the CUDA C++ batch norm and max pooling: single pass, vectorized and scalar accesses, masks.

They run in the simulator (``tools/cuda_sim``) where there is no GPU. Tests that both GPU backends share are in
``tests/gpu/test_gpu_kernels.py``.
"""

import contextlib
import ctypes
import functools
import itertools
import os
import re
import struct
import subprocess
import sys

import pytest
import torch

import fused_res
from fused_res import _extension, env, ops
from fused_res.backends.reference import batch_norm_act as norm
from fused_res.backends.reference import batch_norm_sync as norm_sync
from fused_res.backends.reference import max_pool as reference_pool
from tests.support import gpu_backends as gpu
from tests.support.gpu_backends import DEVICE

if "cuda" not in gpu.BACKENDS:
    pytest.skip(str(fused_res.backends.unavailable("cuda")), allow_module_level=True)

kernels = fused_res.backends.resolve("cuda", DEVICE)
simulator_only = pytest.mark.skipif(DEVICE.type == "cuda", reason="requires the CUDA simulator")
NHWC, NCHW = torch.channels_last, torch.contiguous_format
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Relative to the largest value.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
AUTO, NEVER, FORCED = -1, 0, 1  # arguments of fused_res_cuda_single_pass

CASES = [  # vectorized and scalar accesses, one and several parts, one and several channel blocks
    ((3, 72, 9, 11), NHWC),
    ((3, 35, 5, 7), NHWC),
    ((2, 8, 33, 17), NHWC),
    ((3, 5, 24, 24), NCHW),
    ((3, 3, 17, 21), NCHW),
    ((70, 2, 3, 5), NCHW),
    ((300, 24), NCHW),
]


@pytest.fixture(autouse=True)
def _guarded():
    with gpu.guarded_memory("cuda"):
        yield


@contextlib.contextmanager
def single_pass(mode):
    """Set when the single-pass kernels are used: AUTO, NEVER or FORCED."""
    library = ctypes.CDLL(env.SIMULATOR.read() or str(_extension.cuda_library()[0]))
    previous = library.fused_res_cuda_single_pass(mode)
    try:
        yield
    finally:
        library.fused_res_cuda_single_pass(previous)


@contextlib.contextmanager
def cooperative_launches():
    """Return a context that collects the number of threadblocks of each cooperative launch in the simulator."""
    from tools.cuda_sim.simulator import load_simulator
    from tools.ptx.nvcc_runner import LAUNCH_CALLBACK

    grid_sizes = []

    def observe(name, grid, threads, shared, arguments, size, cooperative):
        if cooperative:
            grid_sizes.append(grid[0])
        return False

    observer = LAUNCH_CALLBACK(observe)
    library = load_simulator().library
    library.fused_res_sim_observe(observer)
    try:
        yield grid_sizes
    finally:
        library.fused_res_sim_observe(None)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def random_tensor(shape, format, dtype, seed=0):
    return randn(*shape, seed=seed).to(dtype).contiguous(memory_format=format)


def assert_close(ours, exact, dtype, factor=1.0):
    assert ours.shape == exact.shape
    if not ours.numel():
        return
    error, scale = (ours.double() - exact.double()).abs().max().item(), exact.abs().max().item()
    assert error <= factor * TOLERANCE[dtype] * scale, f"{error:.3g} of {scale:.3g}"  # false for NaN, too


def misaligned(x):
    """Return a copy of ``x`` with the same strides whose address is one element past a multiple of 16 bytes."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return torch.as_strided(memory, x.shape, x.stride(), 1).copy_(x)


def norm_operands(shape, format, dtype, copy=lambda x: x):
    """Return x, residual, dy, weight and bias, with ``copy`` applied to the first three."""
    channels = shape[1]
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual, dy = (copy(random_tensor(shape, format, dtype, seed)) for seed in (0, 2, 5))
    x += 20 * randn(channels, seed=1).to(dtype).view(1, -1, *(1,) * (len(shape) - 2))
    weight, bias = 1 + randn(channels, seed=3).to(parameter_dtype), randn(channels, seed=4).to(parameter_dtype)
    return x, residual, dy, weight, bias


def training_step(x, residual, dy, weight, bias):
    """Return the results of all variants of training: each kind of residual and mask, backward of one and two norms."""
    double = x.dtype == torch.float64
    stats = norm_sync.merge_stats(norm_sync.batch_norm_partials(x), weight, bias, 1e-5, double)
    residual_stats = norm_sync.merge_stats(norm_sync.batch_norm_partials(residual), bias, weight, 1e-5, double)
    mask = norm.pack_mask(residual > 0)
    batch = weight, bias, None, None, True, 1e-5
    return [
        *kernels.batch_norm_act_forward(x, None, None, *batch, "relu", False),
        *kernels.batch_norm_act_forward(x, residual, None, *batch, "relu", True),
        *kernels.batch_norm_act_forward(x, residual, residual_stats, *batch, "identity", True),
        *kernels.batch_norm_act_backward(dy, x, weight, stats, None, True, "relu", [True, False, True, True]),
        *kernels.batch_norm_act_backward(dy, x, weight, stats, mask, True, "identity", [True] * 4),
        *kernels.batch_norm_act_backward(dy, x, weight, stats, mask, False, "identity", [True] * 4),
        *kernels.batch_norm_act_backward_pair(
            dy, x, weight, stats, residual, bias, residual_stats, mask, True, True, [True] * 6
        ),
        *kernels.batch_norm_act_backward_pair(
            dy, x, weight, stats, residual, bias, residual_stats, mask, True, False, [False, True, True, *[False] * 3]
        ),
    ]


def assert_bitwise_equal(one, other):
    assert len(one) == len(other)
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        assert a.stride() == b.stride() and torch.equal(a, b), index


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "format"), CASES, ids=str)
def test_single_pass_is_bitwise_equal_to_two_passes(shape, format, dtype):
    arguments = norm_operands(shape, format, dtype)
    with single_pass(NEVER):
        two_pass = training_step(*arguments)
    observed = cooperative_launches() if DEVICE.type == "cpu" else contextlib.nullcontext()
    with single_pass(FORCED), observed as launched:
        one_pass = training_step(*arguments)
    # One launch for each operator of `training_step`; launches are not observable on a GPU.
    assert launched is None or len(launched) == 8
    assert_bitwise_equal(one_pass, two_pass)


def test_single_pass_is_bitwise_equal_to_two_passes_with_misaligned_operands():
    """The work partition of the statistics depends only on the tensors that they are computed from."""
    x, residual, dy, weight, bias = norm_operands((3, 72, 9, 11), NHWC, torch.bfloat16)
    found = []
    for mode in (NEVER, FORCED):
        with single_pass(mode):
            found.append(training_step(x, misaligned(residual), misaligned(dy), weight, bias))
    assert_bitwise_equal(*found)


@simulator_only
@pytest.mark.parametrize(("shape", "format"), [((3, 192, 11, 23), NHWC), ((2, 22, 64, 64), NCHW)], ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 2, 3])
def test_single_pass_in_slices(shape, format, multiprocessors):
    """Activations larger than the total shared memory are processed in slices of channel blocks, bitwise equally."""
    from tools.cuda_sim.simulator import load_simulator

    arguments = norm_operands(shape, format, torch.bfloat16)
    with single_pass(NEVER):
        two_pass = training_step(*arguments)
    with (
        single_pass(FORCED),
        load_simulator().multiprocessors(multiprocessors),
        cooperative_launches() as launched,
    ):
        one_pass = training_step(*arguments)
    assert len(launched) == 8 and max(launched) <= 8 * multiprocessors
    assert_bitwise_equal(one_pass, two_pass)


@simulator_only
def test_auto_selects_single_pass_for_activations_that_fit_on_chip():
    from tools.cuda_sim.simulator import load_simulator

    x, _, _, weight, bias = norm_operands((8, 64, 16, 16), NHWC, torch.bfloat16)
    batch = weight, bias, None, None, True, 1e-5
    for mode, multiprocessors, expected in ((AUTO, 4, 1), (AUTO, 1, 0), (NEVER, 4, 0), (FORCED, 4, 1)):
        with single_pass(mode), load_simulator().multiprocessors(multiprocessors), cooperative_launches() as launched:
            kernels.batch_norm_act_forward(x, None, None, *batch, "relu", False)
        assert len(launched) == expected, (mode, multiprocessors)


@simulator_only
@pytest.mark.parametrize(("value", "mode"), [(None, NEVER), ("", NEVER), ("0", NEVER), ("auto", AUTO), ("1", FORCED)])
def test_single_pass_is_off_by_default(value, mode):
    """The library reads FUSED_RES_SINGLE_PASS when it is loaded."""
    environment = {name: text for name, text in os.environ.items() if name != env.SINGLE_PASS.name}
    if value is not None:
        environment[env.SINGLE_PASS.name] = value
    code = "import ctypes, sys, torch\nprint(ctypes.CDLL(sys.argv[1]).fused_res_cuda_single_pass(0))"
    command = [sys.executable, "-c", code, env.SIMULATOR.read()]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert int(printed) == mode and env.SINGLE_PASS.default == "0"


@simulator_only
@pytest.mark.parametrize("mode", [NEVER, FORCED])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "format"), [((2, 40, 9, 11), NHWC), ((2, 3, 17, 13), NCHW)], ids=str)
def test_results_do_not_depend_on_schedule(shape, format, dtype, mode):
    from tools.cuda_sim.simulator import load_simulator

    arguments = norm_operands(shape, format, dtype)
    found = []
    for schedule in range(3):
        with load_simulator().schedule(schedule), single_pass(mode):
            found.append(training_step(*arguments))
    for other in found[1:]:
        assert_bitwise_equal(found[0], other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "format"), CASES[:-1], ids=str)
def test_misaligned_views(shape, format, dtype):
    """Scalar accesses give correct results where one operand, or all of them, are misaligned."""
    aligned = norm_operands(shape, format, dtype)
    stats = norm.batch_norm_stats(*(t.double() for t in (aligned[0], *aligned[3:])), None, None, True, 1e-5)
    stats = stats.to(aligned[3].dtype)
    exact_arguments = [t.double() for t in aligned]
    for which in ((0,), (1,), (2,), (0, 1, 2)):
        x, residual, dy, weight, bias = (misaligned(t) if i in which else t for i, t in enumerate(aligned))
        _, r64, dy64, weight64, bias64 = exact_arguments
        x64, stats64, mask = x.double(), stats.double(), norm.pack_mask(residual > 0)
        y, ours, _ = kernels.batch_norm_act_forward(
            x, residual, None, weight, bias, None, None, True, 1e-5, "identity", False
        )
        exact = norm.batch_norm_act_apply(x64, stats64, r64, None, "identity", False)[0]
        assert_close(y, exact, dtype, 2)
        assert_close(ours, stats64, aligned[3].dtype, 4)
        grads = kernels.batch_norm_act_backward(dy, x, weight, stats, mask, True, "identity", [True] * 4)
        expected = norm.batch_norm_act_backward(dy64, x64, weight64, stats64, mask, True, "identity", [True] * 4)
        for index, (a, b) in enumerate(zip(grads, expected, strict=True)):
            assert_close(a, b, dtype if index < 2 else aligned[3].dtype, 4)
        into = x.clone() if 0 not in which else misaligned(x)
        kernels.add_masked_(into, dy, mask)
        assert_close(into, x64 + dy64 * norm.unpack_mask(mask, dy), dtype)
        kernels.batch_norm_act_inference_(into.copy_(x), residual, None, weight, bias, bias, weight**2, 1e-5, "relu")
        batch = norm.batch_norm_stats(x64, weight64, bias64, bias64, weight64**2, False, 1e-5)
        assert_close(into, norm.batch_norm_act_apply(x64, batch, r64, None, "relu", False)[0], dtype, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", [NHWC, NCHW], ids=str)
def test_masks(format, dtype):
    """The bits of a mask byte come from eight threads, from two or from one; rows may end within a byte."""
    for size in (35, 8, 100, 4, 1, 257):
        shape = (3, size, 3, 3) if format == NHWC else (3, 3, 1, size)
        x, residual, dy, weight, bias = norm_operands(shape, format, dtype)
        stats = kernels.batch_norm_stats(x, weight, bias, None, None, True, 1e-5)
        exact, _ = norm.batch_norm_act_apply(x.double(), stats.double(), residual.double(), None, "identity", False)
        y, mask = kernels.batch_norm_act_apply(x, stats, residual, None, "relu", True)
        unmasked = norm.unpack_mask(mask, y).contiguous(memory_format=format)
        assert torch.equal(norm.pack_mask(unmasked), mask), "expected the padding bits to be zero"
        certain = exact.abs() > 8 * torch.finfo(stats.dtype).eps * exact.abs().max()
        assert torch.equal(unmasked[certain], exact[certain] > 0)
        assert not y[~unmasked].any() and 0 < unmasked.double().mean() < 1
        (_, masked, _, _) = kernels.batch_norm_act_backward(
            dy, x, weight, stats, mask, True, "identity", [False, True, False, False]
        )
        assert torch.equal(masked, torch.where(unmasked, dy, 0))


@pytest.mark.parametrize("mode", [NEVER, FORCED])
@pytest.mark.parametrize("format", [NHWC, NCHW], ids=str)
def test_nan_propagates_within_its_channel(format, mode):
    """The ReLU preserves NaN, and its gradient mask is set there."""
    nan = float("nan")
    x, residual, dy, weight, bias = norm_operands((2, 16, 4, 8), format, torch.float32)
    with single_pass(mode):
        x[0, 3, 1, 1] = nan
        y, stats, mask = kernels.batch_norm_act_forward(
            x, None, None, weight, bias, None, None, True, 1e-5, "relu", True
        )
        dx, *_ = kernels.batch_norm_act_backward(dy, x, weight, stats, mask, True, "identity", [True] * 4)
        channel = torch.arange(16, device=DEVICE).view(1, -1, 1, 1) == 3
        for found in (y, dx):
            assert torch.equal(found.isnan(), channel.expand_as(found))
        assert norm.unpack_mask(mask, y)[:, 3].all()

        x[0, 3, 1, 1], residual[1, 5, 2, 2] = 0.0, nan
        y, stats, mask = kernels.batch_norm_act_forward(
            x, residual, None, weight, bias, None, None, True, 1e-5, "relu", True
        )
        assert torch.equal(y.isnan(), residual.isnan()) and not stats.isnan().any()
        _, dresidual, *_ = kernels.batch_norm_act_backward(dy, x, weight, stats, mask, True, "identity", [True] * 4)
        assert dresidual[1, 5, 2, 2] == dy[1, 5, 2, 2]


def test_statistics_of_ill_conditioned_channels():
    """A part whose first tile is far from its mean, a large mean with a small deviation, a constant channel."""
    x = 1000 + randn(64, 6, 12, 12).float()
    x[:, 1] = 3000.0
    x[:, 2] = 100 + 1e-3 * randn(64, 12, 12).float()
    x[:8, 3] -= 2000
    x[:, 4, 0, 0] += 1e4
    exact = norm.batch_norm_stats(x.double(), None, None, None, None, True, 1e-5)
    for format in (NHWC, NCHW):
        stats = kernels.batch_norm_stats(x.contiguous(memory_format=format), None, None, None, None, True, 1e-5)
        for row in range(5):
            error = (stats[row] - exact[row]).abs() / exact[row].abs().clamp(min=1e-20)
            assert error[torch.arange(6) != 1].max() < 1e-5 or row == ops.SHIFT
        assert stats[4, 1] == 0 and stats[0, 1] == 3000


def test_parameters_of_any_dtype():
    x, _, _, weight, bias = norm_operands((3, 24, 5, 5), NHWC, torch.float16)
    for dtype in DTYPES:
        others = [t.to(dtype) for t in (weight, bias, bias * 3, weight**2 + 0.5)]
        exact = norm.batch_norm_stats(x.double(), *(t.double() for t in others), False, 1e-5)
        y, stats, _ = kernels.batch_norm_act_forward(x, None, None, *others, False, 1e-5, "identity", False)
        assert_close(stats, exact, torch.float32)
        assert_close(y, norm.batch_norm_act_apply(x.double(), exact, None, None, "identity", False)[0], torch.float16)
        trained = kernels.batch_norm_stats(x, *others[:2], None, None, True, 1e-5)
        wide = [t.double() for t in others[:2]]
        assert_close(trained, norm.batch_norm_stats(x.double(), *wide, None, None, True, 1e-5), torch.float32)


def parameter_gradients(shape, format, dtype, weight_dtype):
    """Return a function of the 6 requests that runs both backwards, and what they return if all are requested.

    Args:
        shape: shape of the activations.
        format: memory format of the activations.
        dtype: dtype of the activations.
        weight_dtype: dtype of the norms' parameters, None for norms without.

    Returns:
        ``run(requested)``, with requests as in ``batch_norm_act_backward_pair``. It returns the gradients of weight and
        bias of one norm, and of the weights and biases of two norms; and the six expected gradients.
    """
    x, residual, dy, weight, bias = norm_operands(shape, format, dtype)
    stats, residual_stats = (kernels.batch_norm_stats(t, weight, bias, None, None, True, 1e-5) for t in (x, residual))
    mask = norm.pack_mask(residual > 0)
    weight = None if weight_dtype is None else weight.to(weight_dtype)

    def run(requested):
        one = kernels.batch_norm_act_backward(dy, x, weight, stats, mask, True, "identity", requested[:4])
        two = kernels.batch_norm_act_backward_pair(
            dy, x, weight, stats, residual, weight, residual_stats, mask, True, True, requested
        )
        return [*one[2:], *two[2:]]

    sums = kernels.batch_norm_sums(dy, x, stats, mask, "identity", None, None)
    pair_sums = kernels.batch_norm_sums(dy, x, stats, mask, "identity", residual, residual_stats)
    rows = [sums[1], sums[0], pair_sums[1], pair_sums[0], pair_sums[2], pair_sums[0]]
    return run, [row.to(weight_dtype or stats.dtype) for row in rows]


@pytest.mark.parametrize("mode", [NEVER, FORCED])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "format"), [*CASES, ((2, 6, 3, 3), NHWC)], ids=str)
def test_parameter_gradients_are_rows_of_the_sums(shape, format, dtype, mode):
    """They are the bits of the sums, rounded to the dtype of the weight, in tensors that share no memory."""
    for weight_dtype in (None, *DTYPES):
        run, expected = parameter_gradients(shape, format, dtype, weight_dtype)
        with single_pass(mode):
            found = run([True] * 6)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), weight_dtype
        assert len({one.untyped_storage().data_ptr() for one in found}) == 6


@pytest.mark.parametrize("mode", [NEVER, FORCED])
@pytest.mark.parametrize(("shape", "format"), [((3, 72, 9, 11), NHWC), ((3, 3, 17, 21), NCHW)], ids=str)
def test_each_subset_of_parameter_gradients(shape, format, mode):
    run, expected = parameter_gradients(shape, format, torch.float32, torch.bfloat16)
    for inputs, requests in itertools.product((False, True), itertools.product((False, True), repeat=4)):
        with single_pass(mode):
            found = run([inputs, inputs, *requests])
        for a, b, requested in zip(found, expected, [*requests[:2], *requests], strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b if requested else b[:0]), (inputs, requests)


@simulator_only
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "parts"), [((2, 6, 3, 3), 1), ((16, 6, 33, 17), 71)], ids=str)
def test_parameter_gradients_need_no_launch_of_their_own(shape, parts, weight_dtype):
    """Each backward is three kernels, or one, and no operator of PyTorch that copies or fills."""
    from tools.ptx.nvcc_runner import intercept_launches

    def observe(launch, argument):
        if "sum_partials" in launch.kernel:
            assert struct.unpack_from("q", argument, 16) == (parts,)

    run, _ = parameter_gradients(shape, NHWC, torch.bfloat16, weight_dtype)
    for mode, expected in ((NEVER, ["sums_kernel", "sum_partials_kernel", "dx_kernel"]), (FORCED, ["single_pass"])):
        with (
            single_pass(mode),
            intercept_launches(observe) as launches,
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        ):
            run([True] * 6)
        assert len(launches) == 2 * len(expected)
        assert all(name in one.kernel for name, one in zip(expected * 2, launches, strict=True))
        operators = {event.key for event in profile.key_averages()}
        assert "aten::empty" in operators and not operators & {"aten::copy_", "aten::zero_", "aten::fill_"}, operators


@pytest.mark.parametrize("spread", [lambda v: v[:1].expand(v.numel()), lambda v: v.repeat_interleave(3)[::3]])
def test_strided_parameters(spread):
    """A per-channel vector of stride 0 (``expand``) or 3 is read as its values; guard pages check the bounds."""
    x, residual, dy, weight, bias = norm_operands((3, 24, 5, 5), NHWC, torch.bfloat16)
    dense = [spread(v).contiguous() for v in (weight, bias, bias * 3, weight**2 + 0.5)]
    strided = [spread(v) for v in (weight, bias, bias * 3, weight**2 + 0.5)]
    assert all(not v.is_contiguous() and torch.equal(v, d) for v, d in zip(strided, dense, strict=True))

    def results(vectors, transpose):
        stats = kernels.batch_norm_stats(x, *vectors[:2], None, None, True, 1e-5)
        sums = kernels.batch_norm_sums(dy, x, stats, None, "relu", None, None)
        stats, sums = (t.t().contiguous().t() if transpose else t for t in (stats, sums))
        partials = kernels.batch_norm_partials(x).transpose(1, 2).contiguous().transpose(1, 2)
        flags = True, "relu", [True] * 4
        into = x.clone()
        kernels.batch_norm_act_inference_(into, residual, None, *vectors, 1e-5, "relu")
        return [
            stats,
            into,
            kernels.merge_stats(partials, *vectors[:2], 1e-5, False),
            *kernels.batch_norm_act_forward(x, residual, stats, *vectors[:2], None, None, True, 1e-5, "relu", True),
            *kernels.batch_norm_act_forward(x, None, None, *vectors, False, 1e-5, "relu", False),
            *kernels.batch_norm_act_apply(x, stats, residual, stats, "relu", True),
            *kernels.batch_norm_act_backward(dy, x, vectors[0], stats, None, *flags),
            *kernels.batch_norm_act_backward_pair(
                dy, x, vectors[0], stats, residual, vectors[1], stats, None, True, True, [True] * 6
            ),
            kernels.batch_norm_act_dx(dy, x, stats, None, "relu", sums, 75),
            *kernels.max_pool_forward(x, stats, True, [3, 3], [2, 2], [1, 1]),
        ]

    assert_bitwise_equal(
        [t.contiguous() for t in results(strided, True)], [t.contiguous() for t in results(dense, False)]
    )


def test_running_statistics_of_many_norms():
    """More norms than one launch processes, of any dtype and size, with strided running statistics."""
    generator = itertools.cycle(DTYPES)
    stats = [
        randn(5, size, seed=size).abs().to(torch.float64 if size % 5 == 0 else torch.float32) for size in range(40)
    ]
    running = [[randn(2 * size, seed=size + k).to(next(generator))[::2] for size in range(40)] for k in (1, 2)]
    exact = [[t.clone() for t in tensors] for tensors in running]
    momentum = [0.01 * size for size in range(40)]
    norm.update_running_stats(*exact, [s.double() for s in stats], momentum)
    kernels.update_running_stats(*running, stats, momentum)
    for ours, theirs in zip(itertools.chain(*running), itertools.chain(*exact), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(t._version for t in itertools.chain(*running))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("copy", [lambda x: x, misaligned], ids=["aligned", "misaligned"])
def test_max_pool_vectorized_and_scalar(dtype, copy):
    """A window of minus infinities has an index and a gradient, too."""
    for channels, window in itertools.product((16, 12, 5), (([3, 3], [2, 2], [1, 1]), ([2, 3], [1, 2], [0, 1]))):
        x = copy(random_tensor((2, channels, 7, 9), NHWC, dtype))
        x[0, 1, :4, :4] = -float("inf")
        stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        stats = norm.batch_norm_stats(x.double().nan_to_num(neginf=0), None, None, None, None, True, 1e-5).to(
            stats_dtype
        )
        flat = stats.clone()  # values close to 1: of those equal after rounding, the first is the maximum
        flat[0], flat[2], flat[3] = 0, 1e-3, 1
        for input_stats in (None, stats, flat):
            y, indices = kernels.max_pool_forward(x, input_stats, input_stats is not None, *window)
            expected, expected_indices = reference_pool.max_pool_forward(
                x, input_stats, input_stats is not None, *window
            )
            torch.testing.assert_close(y, expected)
            assert torch.equal(indices, expected_indices)
            dy = copy(random_tensor(y.shape, NHWC, dtype, seed=3))
            dx = kernels.max_pool_backward(dy, indices, x, *window)
            torch.testing.assert_close(dx, reference_pool.max_pool_backward(dy, indices, x, *window))


def test_empty_tensors_and_output_mask():
    weight, bias = torch.ones(6, device=DEVICE), torch.full((6,), 2.0, device=DEVICE)
    for shape in ((0, 6, 4, 4), (2, 6, 0, 4), (0, 6)):
        x = torch.empty(shape, device=DEVICE)
        y, stats, mask = kernels.batch_norm_act_forward(x, x, None, weight, bias, None, None, True, 1e-5, "relu", True)
        exact = norm.batch_norm_act_forward(x, x, None, weight, bias, None, None, True, 1e-5, "relu", True)
        assert y.shape == shape and mask.shape == exact[2].shape
        torch.testing.assert_close(stats, exact[1])
        grads = kernels.batch_norm_act_backward(y, x, weight, stats, mask, True, "identity", [True] * 4)
        assert grads[0].shape == grads[1].shape == shape
        assert torch.equal(grads[2], weight * 0) and torch.equal(grads[3], weight * 0)
        pair = kernels.batch_norm_act_backward_pair(
            y, x, weight, stats, x, weight.bfloat16(), stats, mask, True, True, [True] * 6
        )
        assert pair[0].shape == pair[1].shape == shape
        for one, expected in zip(pair[2:], (weight, weight, weight.bfloat16(), weight.bfloat16()), strict=True):
            assert one.dtype == expected.dtype and torch.equal(one, expected * 0)
        assert torch.equal(kernels.batch_norm_partials(x), torch.zeros(1, 3, 6, dtype=torch.float64, device=DEVICE))
        sums = kernels.batch_norm_sums(y, x, stats, None, "relu", None, None)
        assert torch.equal(sums, torch.zeros(2, 6, device=DEVICE))
        assert kernels.batch_norm_act_dx(y, x, stats, None, "relu", sums, 1).shape == shape
        kernels.add_masked_(x, x, None)
        kernels.batch_norm_act_inference_(x, None, None, weight, bias, bias, weight, 1e-5, "relu")
    x = randn(2, 6, 3, 3).float()
    for mode, output_mask in itertools.product((NEVER, FORCED), itertools.product((False, True), repeat=4)):
        with single_pass(mode):
            grads = kernels.batch_norm_act_backward(x, x, weight, stats, None, True, "relu", list(output_mask))
        shapes = (x.shape, x.shape, (6,), (6,))
        assert [g.shape for g in grads] == [s if r else (0,) for s, r in zip(shapes, output_mask, strict=True)]


def test_non_contiguous_views():
    """Strided views are read through a copy; in-place results are copied back."""
    x, residual = randn(4, 6, 5, 8).float()[::2, :, :, ::2], randn(2, 6, 5, 4, seed=1).float()
    weight, bias = randn(6).float(), randn(6, seed=1).float()
    batch = weight, bias, None, None, True, 1e-5
    y, stats, _ = kernels.batch_norm_act_forward(x, residual.to(memory_format=NHWC), None, *batch, "relu", False)
    plain = kernels.batch_norm_act_forward(x.contiguous(), residual, None, *batch, "relu", False)
    assert torch.equal(y, plain[0]) and y.stride() == torch.empty_like(x).stride()
    mask = norm.pack_mask(x.contiguous() > 0)
    pair = functools.partial(
        kernels.batch_norm_act_backward_pair, residual, x, weight, stats, relu_mask=mask, training=True,
        residual_weight=None, residual_stats=stats, residual_training=True, output_mask=[True] * 6,
    )  # fmt: skip
    for other in (residual, residual.to(memory_format=NHWC)):
        dx, dresidual, *_ = pair(residual=other)
        assert dx.stride() == torch.empty_like(x).stride() and dresidual.stride() == other.stride()
    base = randn(4, 6, 5, 8).float()
    into = base[::2, :, :, ::2]
    expected = base.clone()
    expected[::2, :, :, ::2] += residual * norm.unpack_mask(mask, residual)
    kernels.add_masked_(into, residual, mask)
    assert torch.equal(base, expected)


def test_invalid_arguments_raise():
    x, _, _, weight, bias = norm_operands((2, 6, 4, 4), NCHW, torch.float32)
    stats = kernels.batch_norm_stats(x, weight, bias, None, None, True, 1e-5)
    batch = weight, bias, None, None, True, 1e-5, "relu", False
    forward, backward = kernels.batch_norm_act_forward, kernels.batch_norm_act_backward
    flags = True, "identity", [True] * 4
    for call, error, message in (
        (lambda: forward(x.int(), None, None, *batch), TypeError, "input: expected a floating point"),
        (lambda: forward(x[0, 0, 0], None, None, *batch), ValueError, "input: expected"),
        (lambda: forward(x, x[:1], None, *batch), ValueError, "residual: expected the shape of input"),
        (lambda: forward(x, x.double(), None, *batch), TypeError, "residual: expected the dtype of input"),
        (lambda: forward(x, None, stats, *batch), ValueError, "residual_stats: expected a residual"),
        (lambda: forward(x, x, stats[:4], *batch), ValueError, r"residual_stats: expected \(5, 6\) of Float"),
        (lambda: forward(x, None, None, weight[1:], *batch[1:]), ValueError, "weight: expected 6 elements"),
        (lambda: forward(x, None, None, weight.int(), *batch[1:]), TypeError, "weight: expected a floating"),
        (lambda: forward(x, None, None, *batch[:4], False, *batch[5:]), ValueError, "running_mean, running_var: exp"),
        (lambda: backward(x[:1], x, weight, stats, None, *flags), ValueError, "grad_output: expected the shape"),
        (lambda: backward(x, x, weight, stats.double(), None, *flags), ValueError, r"stats: expected \(5, 6\)"),
        (lambda: backward(x, x, weight, stats, stats, *flags), ValueError, "relu_mask: expected a contiguous uint8"),
        (lambda: kernels.batch_norm_sums(x, x, stats, None, "relu", x, None), ValueError, "residual: expected"),
        (lambda: kernels.merge_stats(stats, None, None, 1e-5, False), ValueError, "partials: expected"),
        (lambda: kernels.max_pool_forward(x, None, True, [3, 3], [1, 1], [2, 2]), ValueError, "padding: expected"),
        (lambda: kernels.max_pool_forward(x, None, True, [7, 7], [1, 1], [0, 0]), ValueError, "input: expected images"),
        (lambda: kernels.update_running_stats([weight], [bias], [], []), ValueError, "expected as many entries"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


def test_vectors_are_stored_in_one_access():
    """Checks the PTX: nvcc combines the element stores of a vector only sometimes."""
    nvcc_runner = pytest.importorskip("tools.ptx.nvcc_runner")
    if nvcc_runner.NVCC is None:
        pytest.skip("nvcc not found")
    names = r"(apply|dx|add_masked|max_pool_\w+|single_pass_\w+)_kernelI(6__half|13__nv_bfloat16)\w*Li8E"
    found = {name: ptx for name, ptx in nvcc_runner.kernels_by_name().items() if re.search(names, name)}
    assert len(found) == 22
    for name, ptx in found.items():
        body = ptx[ptx.index(".entry") :]
        # A kernel that stores the gradients of four parameters has a branch for each of the two 16-bit dtypes.
        allowed = 4 * 2 if "single_pass_backward" in name else 0
        assert "st.global.v4" in body and len(re.findall(r"st\.global\.[ub]16", body)) <= allowed, name
