"""What only the norms in CUDA C++ have: one pass with everything on chip, two widths of accesses, masks by ballot.

Simulated where there is no GPU, see tools/cuda_sim. What all kernels for GPUs have in common is in test_gpu_kernels.
"""

import contextlib
import ctypes
import functools
import itertools
import re

import pytest
import torch

import fused_res
from fused_res import _extension, env
from fused_res.backends.reference import batch_norm_act as norm
from fused_res.backends.reference import batch_norm_sync as halves
from fused_res.backends.reference import max_pool as reference_pool
from tests.support import gpu_backends as gpu
from tests.support.gpu_backends import DEVICE

if "cuda" not in gpu.BACKENDS:
    pytest.skip(str(fused_res.backends.unavailable("cuda")), allow_module_level=True)

kernels = fused_res.backends.resolve("cuda", DEVICE)
simulated = pytest.mark.skipif(DEVICE.type == "cuda", reason="asks the simulator")
LAST, PLANES = torch.channels_last, torch.contiguous_format
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Relative to the largest value.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
BY_RULE, NEVER, WHEREVER_POSSIBLE = -1, 0, 1

CASES = [  # vectors and single elements, one part and several, one block of channels and several
    ((3, 72, 9, 11), LAST),
    ((3, 35, 5, 7), LAST),
    ((2, 8, 33, 17), LAST),
    ((3, 5, 24, 24), PLANES),
    ((3, 3, 17, 21), PLANES),
    ((70, 2, 3, 5), PLANES),
    ((300, 24), PLANES),
]


@pytest.fixture(autouse=True)
def _guarded():
    with gpu.guarded("cuda"):
        yield


@contextlib.contextmanager
def single_pass(mode):
    library = ctypes.CDLL(env.SIMULATOR.read() or str(_extension.cuda_library()[0]))
    library.fused_res_cuda_single_pass(mode)
    try:
        yield
    finally:
        library.fused_res_cuda_single_pass(BY_RULE)


@contextlib.contextmanager
def cooperative_launches():
    """How many thread blocks each of them has, in the simulator."""
    from tools.cuda_sim.simulator import run_time
    from tools.ptx.nvcc_runner import _OBSERVER

    found = []

    def observe(name, grid, threads, shared, arguments, size, cooperative):
        if cooperative:
            found.append(grid[0])
        return False

    observer = _OBSERVER(observe)
    library = run_time().library
    library.fused_res_sim_observe(observer)
    try:
        yield found
    finally:
        library.fused_res_sim_observe(None)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def made(shape, format, dtype, seed=0):
    return randn(*shape, seed=seed).to(dtype).contiguous(memory_format=format)


def assert_close(ours, exact, dtype, factor=1.0):
    assert ours.shape == exact.shape
    if not ours.numel():
        return
    error, scale = (ours.double() - exact.double()).abs().max().item(), exact.abs().max().item()
    assert error <= factor * TOLERANCE[dtype] * scale, f"{error:.3g} of {scale:.3g}"  # false for NaN, too


def misaligned(x):
    """The same values and order of memory, one element behind an address that is a multiple of 16."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return torch.as_strided(memory, x.shape, x.stride(), 1).copy_(x)


def norms(shape, format, dtype, place=lambda x: x):
    """Everything that takes part in forward and backward, each tensor where ``place`` puts it."""
    channels = shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual, dy = (place(made(shape, format, dtype, seed)) for seed in (0, 2, 5))
    x += 20 * randn(channels, seed=1).to(dtype).view(1, -1, *(1,) * (len(shape) - 2))
    weight, bias = 1 + randn(channels, seed=3).to(wide), randn(channels, seed=4).to(wide)
    return x, residual, dy, weight, bias


def training_step(x, residual, dy, weight, bias):
    """Every result of training: the kinds of residual, the masks, one norm's backward and two norms'."""
    double = x.dtype == torch.float64
    stats = halves.merge_stats(halves.batch_norm_partials(x), weight, bias, 1e-5, double)
    residual_stats = halves.merge_stats(halves.batch_norm_partials(residual), bias, weight, 1e-5, double)
    mask = norm.pack_mask(residual > 0)
    batch = weight, bias, None, None, True, 1e-5
    return [
        *kernels.batch_norm_act_forward(x, None, None, *batch, True, False),
        *kernels.batch_norm_act_forward(x, residual, None, *batch, True, True),
        *kernels.batch_norm_act_forward(x, residual, residual_stats, *batch, False, True),
        *kernels.batch_norm_act_backward(dy, x, weight, stats, None, True, True, [True, False, True, True]),
        *kernels.batch_norm_act_backward(dy, x, weight, stats, mask, True, False, [True] * 4),
        *kernels.batch_norm_act_backward(dy, x, weight, stats, mask, False, False, [True] * 4),
        *kernels.batch_norm_act_backward_pair(
            dy, x, weight, stats, residual, bias, residual_stats, mask, True, True, [True] * 6
        ),
        *kernels.batch_norm_act_backward_pair(
            dy, x, weight, stats, residual, bias, residual_stats, mask, True, False, [False, True, True, *[False] * 3]
        ),
    ]


def assert_same_bits(one, other):
    assert len(one) == len(other)
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        assert a.stride() == b.stride() and torch.equal(a, b), index


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "format"), CASES, ids=str)
def test_single_pass_has_the_bits_of_two_passes(shape, format, dtype):
    arguments = norms(shape, format, dtype)
    with single_pass(NEVER):
        two = training_step(*arguments)
    watched = cooperative_launches() if DEVICE.type == "cpu" else contextlib.nullcontext([1] * 8)
    with single_pass(WHEREVER_POSSIBLE), watched as launched:
        one = training_step(*arguments)
    assert len(launched) == 8
    assert_same_bits(one, two)


def test_single_pass_has_the_bits_of_two_passes_beside_misaligned_tensors():
    """What is no part of the statistics has no influence on how they are cut."""
    x, residual, dy, weight, bias = norms((3, 72, 9, 11), LAST, torch.bfloat16)
    found = []
    for mode in (NEVER, WHEREVER_POSSIBLE):
        with single_pass(mode):
            found.append(training_step(x, misaligned(residual), misaligned(dy), weight, bias))
    assert_same_bits(*found)


@simulated
@pytest.mark.parametrize(("shape", "format"), [((3, 192, 11, 23), LAST), ((2, 22, 64, 64), PLANES)], ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 2, 3])
def test_single_pass_in_slices(shape, format, multiprocessors):
    """More than fits on chip goes slice by slice, several units in a thread block; the bits stay the same."""
    from tools.cuda_sim.simulator import run_time

    arguments = norms(shape, format, torch.bfloat16)
    with single_pass(NEVER):
        two = training_step(*arguments)
    with (
        single_pass(WHEREVER_POSSIBLE),
        run_time().multiprocessors(multiprocessors),
        cooperative_launches() as launched,
    ):
        one = training_step(*arguments)
    assert len(launched) == 8 and max(launched) <= 8 * multiprocessors
    assert_same_bits(one, two)


@simulated
def test_single_pass_is_for_what_fits_on_chip():
    from tools.cuda_sim.simulator import run_time

    x, _, _, weight, bias = norms((8, 64, 16, 16), LAST, torch.bfloat16)
    batch = weight, bias, None, None, True, 1e-5
    for mode, multiprocessors, expected in ((BY_RULE, 4, 1), (BY_RULE, 1, 0), (NEVER, 4, 0), (WHEREVER_POSSIBLE, 4, 1)):
        with single_pass(mode), run_time().multiprocessors(multiprocessors), cooperative_launches() as launched:
            kernels.batch_norm_act_forward(x, None, None, *batch, True, False)
        assert len(launched) == expected, (mode, multiprocessors)


@simulated
@pytest.mark.parametrize("mode", [NEVER, WHEREVER_POSSIBLE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "format"), [((2, 40, 9, 11), LAST), ((2, 3, 17, 13), PLANES)], ids=str)
def test_all_schedules(shape, format, dtype, mode):
    """In whatever order threads run."""
    from tools.cuda_sim.simulator import run_time

    arguments = norms(shape, format, dtype)
    found = []
    for schedule in range(3):
        with run_time().schedule(schedule), single_pass(mode):
            found.append(training_step(*arguments))
    for other in found[1:]:
        assert_same_bits(found[0], other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "format"), CASES[:-1], ids=str)
def test_misaligned_views(shape, format, dtype):
    """One tensor at a time, and all: elements go one by one, and come out right."""
    aligned = norms(shape, format, dtype)
    stats = norm.batch_norm_stats(*(t.double() for t in (aligned[0], *aligned[3:])), None, None, True, 1e-5)
    stats = stats.to(aligned[3].dtype)
    exact_arguments = [t.double() for t in aligned]
    for which in ((0,), (1,), (2,), (0, 1, 2)):
        x, residual, dy, weight, bias = (misaligned(t) if i in which else t for i, t in enumerate(aligned))
        _, r64, dy64, weight64, bias64 = exact_arguments
        x64, stats64, mask = x.double(), stats.double(), norm.pack_mask(residual > 0)
        y, ours, _ = kernels.batch_norm_act_forward(
            x, residual, None, weight, bias, None, None, True, 1e-5, False, False
        )
        exact = norm.batch_norm_act_apply(x64, stats64, r64, None, False, False)[0]
        assert_close(y, exact, dtype, 2)
        assert_close(ours, stats64, aligned[3].dtype, 4)
        grads = kernels.batch_norm_act_backward(dy, x, weight, stats, mask, True, False, [True] * 4)
        wanted = norm.batch_norm_act_backward(dy64, x64, weight64, stats64, mask, True, False, [True] * 4)
        for index, (a, b) in enumerate(zip(grads, wanted, strict=True)):
            assert_close(a, b, dtype if index < 2 else aligned[3].dtype, 4)
        into = x.clone() if 0 not in which else misaligned(x)
        kernels.add_masked_(into, dy, mask)
        assert_close(into, x64 + dy64 * norm.unpack_mask(mask, dy), dtype)
        kernels.batch_norm_act_inference_(into.copy_(x), residual, None, weight, bias, bias, weight**2, 1e-5, True)
        batch = norm.batch_norm_stats(x64, weight64, bias64, bias64, weight64**2, False, 1e-5)
        assert_close(into, norm.batch_norm_act_apply(x64, batch, r64, None, True, False)[0], dtype, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", [LAST, PLANES], ids=str)
def test_masks(format, dtype):
    """Bits of a byte come from eight threads, from two or from one; rows end within a byte."""
    for size in (35, 8, 100, 4, 1, 257):
        shape = (3, size, 3, 3) if format == LAST else (3, 3, 1, size)
        x, residual, dy, weight, bias = norms(shape, format, dtype)
        stats = kernels.batch_norm_stats(x, weight, bias, None, None, True, 1e-5)
        exact, _ = norm.batch_norm_act_apply(x.double(), stats.double(), residual.double(), None, False, False)
        y, mask = kernels.batch_norm_act_apply(x, stats, residual, None, True, True)
        passed = norm.unpack_mask(mask, y).contiguous(memory_format=format)
        assert torch.equal(norm.pack_mask(passed), mask), "padding is zero"
        sure = exact.abs() > 8 * torch.finfo(stats.dtype).eps * exact.abs().max()
        assert torch.equal(passed[sure], exact[sure] > 0)
        assert not y[~passed].any() and 0 < passed.double().mean() < 1
        (_, masked, _, _) = kernels.batch_norm_act_backward(
            dy, x, weight, stats, mask, True, False, [False, True, False, False]
        )
        assert torch.equal(masked, torch.where(passed, dy, 0))


@pytest.mark.parametrize("mode", [NEVER, WHEREVER_POSSIBLE])
@pytest.mark.parametrize("format", [LAST, PLANES], ids=str)
def test_nan(format, mode):
    """It stays in its channel, a ReLU leaves it as it is, and lets the gradient through."""
    nan = float("nan")
    x, residual, dy, weight, bias = norms((2, 16, 4, 8), format, torch.float32)
    with single_pass(mode):
        x[0, 3, 1, 1] = nan
        y, stats, mask = kernels.batch_norm_act_forward(x, None, None, weight, bias, None, None, True, 1e-5, True, True)
        dx, *_ = kernels.batch_norm_act_backward(dy, x, weight, stats, mask, True, False, [True] * 4)
        channel = torch.arange(16, device=DEVICE).view(1, -1, 1, 1) == 3
        for found in (y, dx):
            assert torch.equal(found.isnan(), channel.expand_as(found))
        assert norm.unpack_mask(mask, y)[:, 3].all()

        x[0, 3, 1, 1], residual[1, 5, 2, 2] = 0.0, nan
        y, stats, mask = kernels.batch_norm_act_forward(
            x, residual, None, weight, bias, None, None, True, 1e-5, True, True
        )
        assert torch.equal(y.isnan(), residual.isnan()) and not stats.isnan().any()
        _, dresidual, *_ = kernels.batch_norm_act_backward(dy, x, weight, stats, mask, True, False, [True] * 4)
        assert dresidual[1, 5, 2, 2] == dy[1, 5, 2, 2]


def test_statistics_of_channels_that_are_hard():
    """A part that begins far from its mean, values that hardly differ, a constant channel: several parts each."""
    x = 1000 + randn(64, 6, 12, 12).float()
    x[:, 1] = 3000.0
    x[:, 2] = 100 + 1e-3 * randn(64, 12, 12).float()
    x[:8, 3] -= 2000
    x[:, 4, 0, 0] += 1e4
    exact = norm.batch_norm_stats(x.double(), None, None, None, None, True, 1e-5)
    for format in (LAST, PLANES):
        stats = kernels.batch_norm_stats(x.contiguous(memory_format=format), None, None, None, None, True, 1e-5)
        for row in range(5):
            error = (stats[row] - exact[row]).abs() / exact[row].abs().clamp(min=1e-20)
            assert error[torch.arange(6) != 1].max() < 1e-5 or row == 3
        assert stats[4, 1] == 0 and stats[0, 1] == 3000


def test_parameters_of_any_dtype():
    x, _, _, weight, bias = norms((3, 24, 5, 5), LAST, torch.float16)
    for dtype in DTYPES:
        others = [t.to(dtype) for t in (weight, bias, bias * 3, weight**2 + 0.5)]
        exact = norm.batch_norm_stats(x.double(), *(t.double() for t in others), False, 1e-5)
        y, stats, _ = kernels.batch_norm_act_forward(x, None, None, *others, False, 1e-5, False, False)
        assert_close(stats, exact, torch.float32)
        assert_close(y, norm.batch_norm_act_apply(x.double(), exact, None, None, False, False)[0], torch.float16)
        trained = kernels.batch_norm_stats(x, *others[:2], None, None, True, 1e-5)
        wide = [t.double() for t in others[:2]]
        assert_close(trained, norm.batch_norm_stats(x.double(), *wide, None, None, True, 1e-5), torch.float32)


def test_running_statistics_of_many_norms():
    """More than one launch takes, of any dtype and size, some of them views."""
    generator = itertools.cycle(DTYPES)
    stats = [
        randn(5, size, seed=size).abs().to(torch.float64 if size % 5 == 0 else torch.float32) for size in range(40)
    ]
    running = [[randn(2 * size, seed=size + k).to(next(generator))[::2] for size in range(40)] for k in (1, 2)]
    exact = [[t.clone() for t in each] for each in running]
    momentum = [0.01 * size for size in range(40)]
    norm.update_running_stats(*exact, [s.double() for s in stats], momentum)
    kernels.update_running_stats(*running, stats, momentum)
    for ours, theirs in zip(itertools.chain(*running), itertools.chain(*exact), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(t._version for t in itertools.chain(*running))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [lambda x: x, misaligned], ids=["aligned", "misaligned"])
def test_max_pool_by_vectors(dtype, place):
    """Channels in 16 bytes at once, or one by one; minus infinity has an index, and its gradient, too."""
    for channels, window in itertools.product((16, 12, 5), (([3, 3], [2, 2], [1, 1]), ([2, 3], [1, 2], [0, 1]))):
        x = place(made((2, channels, 7, 9), LAST, dtype))
        x[0, 1, :4, :4] = -float("inf")
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        stats = norm.batch_norm_stats(x.double().nan_to_num(neginf=0), None, None, None, None, True, 1e-5).to(wide)
        flat = stats.clone()  # close to 1: what is equal when rounded goes to the first
        flat[0], flat[2], flat[3] = 0, 1e-3, 1
        for through in (None, stats, flat):
            y, indices = kernels.max_pool_forward(x, through, through is not None, *window)
            wanted, wanted_indices = reference_pool.max_pool_forward(x, through, through is not None, *window)
            torch.testing.assert_close(y, wanted)
            assert torch.equal(indices, wanted_indices)
            dy = place(made(y.shape, LAST, dtype, seed=3))
            dx = kernels.max_pool_backward(dy, indices, x, *window)
            torch.testing.assert_close(dx, reference_pool.max_pool_backward(dy, indices, x, *window))


def test_empty_tensors_and_results_that_nobody_asked_for():
    weight, bias = torch.ones(6, device=DEVICE), torch.full((6,), 2.0, device=DEVICE)
    for shape in ((0, 6, 4, 4), (2, 6, 0, 4), (0, 6)):
        x = torch.empty(shape, device=DEVICE)
        y, stats, mask = kernels.batch_norm_act_forward(x, x, None, weight, bias, None, None, True, 1e-5, True, True)
        exact = norm.batch_norm_act_forward(x, x, None, weight, bias, None, None, True, 1e-5, True, True)
        assert y.shape == shape and mask.shape == exact[2].shape
        torch.testing.assert_close(stats, exact[1])
        grads = kernels.batch_norm_act_backward(y, x, weight, stats, mask, True, False, [True] * 4)
        assert grads[0].shape == grads[1].shape == shape
        assert torch.equal(grads[2], weight * 0) and torch.equal(grads[3], weight * 0)
        assert torch.equal(kernels.batch_norm_partials(x), torch.zeros(1, 3, 6, dtype=torch.float64, device=DEVICE))
        sums = kernels.batch_norm_sums(y, x, stats, None, True, None, None)
        assert torch.equal(sums, torch.zeros(2, 6, device=DEVICE))
        assert kernels.batch_norm_act_dx(y, x, stats, None, True, sums, 1).shape == shape
        kernels.add_masked_(x, x, None)
        kernels.batch_norm_act_inference_(x, None, None, weight, bias, bias, weight, 1e-5, True)
    x = randn(2, 6, 3, 3).float()
    for mode, wanted in itertools.product((NEVER, WHEREVER_POSSIBLE), itertools.product((False, True), repeat=4)):
        with single_pass(mode):
            grads = kernels.batch_norm_act_backward(x, x, weight, stats, None, True, True, list(wanted))
        shapes = (x.shape, x.shape, (6,), (6,))
        assert [g.shape for g in grads] == [s if w else (0,) for s, w in zip(shapes, wanted, strict=True)]


def test_odd_layouts():
    """Views with holes are read through a copy; what is written in place is written back."""
    x, residual = randn(4, 6, 5, 8).float()[::2, :, :, ::2], randn(2, 6, 5, 4, seed=1).float()
    weight, bias = randn(6).float(), randn(6, seed=1).float()
    batch = weight, bias, None, None, True, 1e-5
    y, stats, _ = kernels.batch_norm_act_forward(x, residual.to(memory_format=LAST), None, *batch, True, False)
    plain = kernels.batch_norm_act_forward(x.contiguous(), residual, None, *batch, True, False)
    assert torch.equal(y, plain[0]) and y.stride() == torch.empty_like(x).stride()
    mask = norm.pack_mask(x.contiguous() > 0)
    pair = functools.partial(
        kernels.batch_norm_act_backward_pair, residual, x, weight, stats, relu_mask=mask, training=True,
        residual_weight=None, residual_stats=stats, residual_training=True, output_mask=[True] * 6,
    )  # fmt: skip
    for other in (residual, residual.to(memory_format=LAST)):
        dx, dresidual, *_ = pair(residual=other)
        assert dx.stride() == torch.empty_like(x).stride() and dresidual.stride() == other.stride()
    whole = randn(4, 6, 5, 8).float()
    into = whole[::2, :, :, ::2]
    expected = whole.clone()
    expected[::2, :, :, ::2] += residual * norm.unpack_mask(mask, residual)
    kernels.add_masked_(into, residual, mask)
    assert torch.equal(whole, expected)


def test_bad_input_is_refused():
    x, _, _, weight, bias = norms((2, 6, 4, 4), PLANES, torch.float32)
    stats = kernels.batch_norm_stats(x, weight, bias, None, None, True, 1e-5)
    batch = weight, bias, None, None, True, 1e-5, True, False
    forward, backward = kernels.batch_norm_act_forward, kernels.batch_norm_act_backward
    flags = True, False, [True] * 4
    for call, error, words in (
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
        (lambda: kernels.batch_norm_sums(x, x, stats, None, True, x, None), ValueError, "residual: expected"),
        (lambda: kernels.merge_stats(stats, None, None, 1e-5, False), ValueError, "partials: expected"),
        (lambda: kernels.max_pool_forward(x, None, True, [3, 3], [1, 1], [2, 2]), ValueError, "padding: expected"),
        (lambda: kernels.max_pool_forward(x, None, True, [7, 7], [1, 1], [0, 0]), ValueError, "input: expected images"),
        (lambda: kernels.update_running_stats([weight], [bias], [], []), ValueError, "expected as many entries"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            call()


def test_vectors_are_written_in_one_access():
    """nvcc joins the stores of a vector's elements only now and then."""
    nvcc_kernels = pytest.importorskip("tools.ptx.nvcc_runner")
    if nvcc_kernels.NVCC is None:
        pytest.skip("there is no nvcc here")
    names = r"(apply|dx|add_masked|max_pool_\w+|single_pass_\w+)_kernelI(6__half|13__nv_bfloat16)\w*Li8E"
    found = {name: ptx for name, ptx in nvcc_kernels._entries().items() if re.search(names, name)}
    assert len(found) == 22
    for name, ptx in found.items():
        body = ptx[ptx.index(".entry") :]
        assert "st.global.v4" in body and not re.search(r"st\.global\.[ub]16", body), name
