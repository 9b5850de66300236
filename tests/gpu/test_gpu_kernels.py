"""Triton and CUDA C++ kernels against the reference backend in float64.

The device, a GPU or the CPU with an interpreter and a simulator, is selected by tests/support/gpu_backends.py.
"""

import contextlib
import itertools
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import fused_res
from fused_res import ops
from fused_res.backends.reference import batch_norm_act as reference
from fused_res.backends.reference import batch_norm_sync as reference_sync
from fused_res.backends.reference import conv_dgrad as reference_dgrad
from fused_res.backends.reference import conv_wgrad as reference_wgrad
from fused_res.ops.checks import relu_or_identity
from tests.support import gpu_backends as gpu
from tests.support.gpu_backends import DEVICE

#: Error relative to the largest value: a few roundings of a sum of hundreds of terms.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
HALF = [torch.float16, torch.bfloat16]
FORMATS = (torch.channels_last, torch.contiguous_format)


@pytest.fixture
def kernels(request):
    with gpu.guarded_memory(request.param):
        yield fused_res.backends.resolve(request.param, DEVICE)


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_backends_and_dtypes(*dtypes):
    return pytest.mark.parametrize(("kernels", "dtype"), gpu.backend_dtype_params(dtypes), indirect=["kernels"])


on_all_backends = pytest.mark.parametrize("kernels", gpu.BACKENDS, indirect=True)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)), dtype=torch.float64).to(
        DEVICE
    )


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def assert_close(actual, expected, dtype, name, factor=1.0):
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
    scale = expected.abs().max().item() if actual.numel() else 0.0
    assert error <= factor * TOLERANCE[dtype] * scale, f"{name}: {error:.3g} of {scale:.3g}"


@contextlib.contextmanager
def launches(backend):
    """Record the kernels that Triton launches; yields None for another backend."""
    if backend != "triton":
        yield None
        return
    from fused_res.backends.triton import launch

    launched = []
    interceptor = launch._interceptor or (lambda kernel, grid, arguments, options: kernel[grid](*arguments, **options))
    with launch.intercept_launches(lambda *a: (launched.append(a[0]), interceptor(*a))):
        yield launched


@pytest.mark.skipif("triton" not in gpu.BACKENDS, reason="needs Triton")
def test_out_of_bounds_accesses_are_caught():
    """A kernel that reads one element out of bounds ends its process, and the same kernel within bounds does not."""
    code = """if True:
        import os, sys; os.environ["TRITON_INTERPRET"] = "1"
        import torch, triton, triton.language as tl
        from fused_res.backends.triton.launch import launch
        from tests.support.guard_pages import launches_with_guard_pages
        @triton.jit
        def kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
            i = tl.arange(0, BLOCK)
            tl.store(y_ptr + i, tl.load(x_ptr + i, i < n), i < 10)
        x, y = torch.randn(10), torch.zeros(10)
        with launches_with_guard_pages():
            launch(kernel, (1,), x, y, int(sys.argv[1]), 16)
        assert torch.equal(x, y)"""

    def run(n):
        return subprocess.run([sys.executable, "-c", code, str(n)], capture_output=True, text=True)

    done = run(10)
    assert done.returncode == 0, done.stderr
    assert run(11).returncode < 0


NORMS = [  # shape, layout
    ((2, 35, 5, 3), torch.channels_last),
    ((3, 100, 4, 4), torch.channels_last),
    ((5, 16, 13, 11), torch.channels_last),
    ((2, 5, 17, 21), torch.contiguous_format),
    ((40, 3, 3, 3), torch.contiguous_format),
    ((33, 24, 1, 1), torch.contiguous_format),
    ((65, 19), torch.contiguous_format),
    ((2, 3, 3, 5, 4), torch.contiguous_format),
]


def norm_case(shape, format, dtype):
    """Return inputs whose channels differ in mean and standard deviation; the mean of some is 100."""
    view = (1, -1, *(1,) * (len(shape) - 2))
    x = randn(*shape) * (randn(shape[1]).abs() + 0.5).view(view) + 50 * randn(shape[1], seed=1).view(view)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual, dy = (
        t.to(dtype).contiguous(memory_format=format) for t in (x, randn(*shape, seed=2), randn(*shape, seed=5))
    )
    weight, bias = (randn(shape[1], seed=seed).to(wide) for seed in (3, 4))
    return x, residual, dy, weight + 1, bias


@on_backends_and_dtypes(torch.float64, torch.float32, *HALF)
@pytest.mark.parametrize(("shape", "format"), NORMS, ids=str)
class TestNorm:
    def test_statistics_and_backward(self, kernels, shape, format, dtype):
        x, _, dy, weight, bias = norm_case(shape, format, dtype)
        accumulated = torch.float64 if dtype == torch.float64 else torch.float32
        partials = kernels.batch_norm_partials(x)
        assert partials[:, 0].sum(0).eq(x.numel() // shape[1]).all()
        stats = kernels.merge_stats(partials, weight, bias, 1e-3, dtype == torch.float64)
        expected = reference.batch_norm_stats(x.double(), weight.double(), bias.double(), None, None, True, 1e-3)
        for row in (ops.MEAN, ops.INVSTD, ops.SCALE, ops.VAR):
            assert_close(stats[row], expected[row], accumulated, row)
        relu_mask = reference.pack_mask(dy > 0)
        for mask, activation in ((relu_mask, "identity"), *((None, name) for name in kernels.activations)):
            sums = kernels.batch_norm_sums(dy, x, stats, mask, activation, None, None)
            wide = dy.double(), x.double(), stats.double()
            expected = reference_sync.batch_norm_sums(*wide, mask, activation, None, None)
            assert_close(sums, expected, accumulated, "sums", 4)
            count = x.numel() // shape[1]
            dx = kernels.batch_norm_act_dx(dy, x, stats, mask, activation, sums, count)
            expected = reference_sync.batch_norm_act_dx(*wide, mask, activation, sums.double(), count)
            assert_close(dx, expected, dtype, "dx")

    def test_apply_and_norm_pair_backward(self, kernels, shape, format, dtype):
        """The apply pass without residual, with it and with a normalized one; the backward of a norm pair."""
        x, residual, dy, weight, bias = norm_case(shape, format, dtype)
        accumulated = torch.float64 if dtype == torch.float64 else torch.float32
        stats = kernels.batch_norm_stats(x, weight, bias, None, None, True, 1e-5)
        residual_stats = kernels.batch_norm_stats(residual, bias, weight, None, None, True, 1e-5)
        for activation in kernels.activations:
            y, _ = kernels.batch_norm_act_apply(x, stats, None, None, activation, False)
            wide = x.double(), stats.double()
            expected, _ = reference.batch_norm_act_apply(*wide, None, None, activation, False)
            assert_close(y, expected, dtype, activation, 4)
        for r, r_stats, relu in ((None, None, True), (residual, None, True), (residual, residual_stats, False)):
            y, mask = kernels.batch_norm_act_apply(x, stats, r, r_stats, relu_or_identity(relu), relu)
            wide = [None if t is None else t.double() for t in (x, stats, r, r_stats)]
            expected, expected_mask = reference.batch_norm_act_apply(*wide, relu_or_identity(relu), relu)
            assert_close(y, expected, dtype, "y")
            different = reference.unpack_mask(mask ^ expected_mask, x) if relu else torch.zeros(1)
            assert different.sum() <= 1, "the ReLU masks differ at more than one value within rounding of zero"
        requested = [True] * 6
        arguments = (
            dy,
            x,
            weight,
            stats,
            residual,
            bias,
            residual_stats,
            reference.pack_mask(dy > 0),
            True,
            True,
            requested,
        )
        actual = kernels.batch_norm_act_backward_pair(*arguments)
        wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]
        for index, (a, b) in enumerate(zip(actual, reference.batch_norm_act_backward_pair(*wide), strict=True)):
            assert_close(a, b, dtype if index < 2 else accumulated, index, 4)

    def test_running_statistics_are_folded_in_one_launch(self, kernels, shape, format, dtype):
        x, residual, _, weight, bias = norm_case(shape, format, dtype)
        accumulated = torch.float64 if dtype == torch.float64 else torch.float32
        mean, var = (50 * weight).to(weight.dtype), bias**2 + 0.5
        arguments = (x, residual, None, weight, bias, mean, var, False, 1e-5, "relu", False)
        with launches(kernels.name) as launched:
            y, stats, _ = kernels.batch_norm_act_forward(*arguments)
        assert launched is None or len(launched) == 1
        wide = [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]
        expected, expected_stats, _ = reference.batch_norm_act_forward(*wide)
        assert_close(y, expected, dtype, "y", 4)
        assert_close(stats, expected_stats, accumulated, "stats")
        assert torch.equal(stats, kernels.batch_norm_stats(x, weight, bias, mean, var, False, 1e-5))
        z = x.clone(memory_format=torch.preserve_format)
        kernels.batch_norm_act_inference_(z, residual, None, weight, bias, mean, var, 1e-5, "relu")
        assert torch.equal(z, y)


@on_all_backends
def test_partial_statistics_merge_in_groups(kernels):
    """As many partial statistics as a large convolution has tiles, some of them empty."""
    partials = randn(2500, 3, 5).abs()
    partials[:, 0] = (torch.arange(2500, device=DEVICE) % 7)[:, None].double()
    expected = reference_sync.merge_stats(partials, None, None, 1e-5, True)
    assert_close(kernels.merge_stats(partials, None, None, 1e-5, True), expected, torch.float64, "stats")
    if kernels.name == "triton":
        from fused_res.backends.triton import batch_norm_sync

        merged = batch_norm_sync.merge_partial_stats(partials.float())
        assert merged.shape == (1, 3, 5)
        assert_close(
            kernels.merge_stats(merged, None, None, 1e-5, False), expected, torch.float32, "stats of one partial"
        )
        assert_close(
            batch_norm_sync.sum_partials(partials[:, :2].float()), partials[:, :2].sum(0), torch.float32, "sums"
        )


@on_all_backends
def test_partial_statistics_of_ranks_combine(kernels):
    """As in SyncBatchNorm, statistics and gradient reductions of shards of a batch combine into those of the batch."""
    x, _, dy, weight, bias = norm_case((6, 8, 5, 5), torch.channels_last, torch.float32)
    shards = [channels_last(x[rows]) for rows in (slice(0, 1), slice(1, 1), slice(1, 6))]
    partials = torch.cat([kernels.batch_norm_partials(shard) for shard in shards])
    stats = kernels.merge_stats(partials, weight, bias, 1e-5, False)
    whole = kernels.batch_norm_stats(x, weight, bias, None, None, True, 1e-5)
    assert_close(stats, whole.double(), torch.float32, "stats")
    sums = sum(
        kernels.batch_norm_sums(channels_last(dy[rows]), channels_last(x[rows]), stats, None, "relu", None, None)
        for rows in (slice(0, 1), slice(1, 1), slice(1, 6))
    )
    assert_close(sums, kernels.batch_norm_sums(dy, x, stats, None, "relu", None, None).double(), torch.float32, "sums")


CONVOLUTIONS = [  # input shape (N, C, H, W), output channels, kernel, stride, padding, dilation, groups
    ((2, 35, 7, 5), 20, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((2, 100, 5, 5), 70, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    ((1, 16, 9, 9), 24, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    ((1, 130, 4, 4), 16, (3, 2), (1, 2), (2, 0), (2, 1), 1),
    ((2, 12, 6, 6), 18, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    ((2, 8, 7, 8), 8, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    ((1, 600, 2, 2), 20, (1, 1), (1, 1), (0, 0), (1, 1), 1),  # split-K
    ((1, 3, 12, 10), 10, (7, 7), (2, 2), (3, 3), (1, 1), 1),
]


@on_backends_and_dtypes(torch.float32, *HALF)
@pytest.mark.parametrize(("shape", "outputs", "kernel", "stride", "padding", "dilation", "groups"), CONVOLUTIONS)
def test_convolution_prologue_and_epilogue(kernels, shape, outputs, kernel, stride, padding, dilation, groups, dtype):
    """The epilogue's bias, residual and ReLU; the prologue's norm, with the statistics of the convolution's output."""
    x = channels_last(randn(*shape) + 1).to(dtype)
    fan = shape[1] // groups * kernel[0] * kernel[1]
    weight = (randn(outputs, shape[1] // groups, *kernel, seed=1) / fan**0.5).to(dtype)
    bias = randn(outputs, seed=2).to(dtype)
    geometry = stride, padding, dilation, groups
    expected = F.conv2d(x.double(), weight.double(), bias.double(), *geometry)
    residual = randn(*expected.shape, seed=3).to(dtype)
    y = kernels.conv_bias_act(x, weight, bias, residual, *geometry, True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, F.relu(expected + residual.double()), dtype, "conv_bias_act")
    y = kernels.conv_bias_act(x, weight, None, None, *geometry, False)
    assert_close(y, expected - bias.double().view(-1, 1, 1), dtype, "without bias")

    stats = reference.batch_norm_stats(x.double(), None, randn(shape[1], seed=4), None, None, True, 1e-5).float()
    for relu in (True, False):
        activation = reference.batch_norm_act_apply(
            x.double(), stats.double(), None, None, relu_or_identity(relu), False
        )[0].to(dtype)
        expected = F.conv2d(activation.double(), weight.double(), bias.double(), *geometry)
        z, partials = kernels.conv_bn_stats(x, weight, bias, stats, relu, *geometry, True)
        assert_close(z, expected, dtype, "conv_bn_stats")
        expected_stats = reference.batch_norm_stats(z.double(), None, None, None, None, True, 1e-5)
        actual = kernels.merge_stats(partials, None, None, 1e-5, False)
        for row in (ops.MEAN, ops.INVSTD, ops.VAR):
            assert_close(actual[row], expected_stats[row], torch.float32, f"row {row}", 10)


@on_backends_and_dtypes(torch.float32, *HALF)
@pytest.mark.parametrize(("channels", "outputs", "size", "stride"), [(35, 20, 5, 1), (64, 100, 4, 1), (16, 24, 7, 2)])
def test_conv1x1_backward(kernels, channels, outputs, size, stride, dtype):
    """Every ReLU mask of the gradient and every operand prologue, against the float64 reference implementation."""
    pixels = (size - 1) // stride + 1
    shape, output_shape = (3, channels, size, size), (3, outputs, pixels, pixels)
    x, z = channels_last(randn(*shape) + 1).to(dtype), channels_last(2 * randn(*output_shape) + 3).to(dtype)
    dy = randn(*output_shape, seed=1).to(dtype)
    weight = (randn(outputs, channels, 1, 1, seed=2) / outputs**0.5).to(dtype)
    stats = reference.batch_norm_stats(z, randn(outputs), randn(outputs, seed=3), None, None, True, 1e-5).float()
    x_stats = reference.batch_norm_stats(x, randn(channels), randn(channels, seed=3), None, None, True, 1e-5).float()
    mask, count = reference.pack_mask(channels_last(randn(*output_shape, seed=4)) > 0), 3 * pixels**2

    def to_float64(*tensors):
        return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]

    for (relu_mask, relu), input_norm, training in itertools.product(
        ((mask, False), (None, True), (None, False)), (True, False), (True, False)
    ):
        sums = (
            kernels.batch_norm_sums(dy, z, stats, relu_mask, relu_or_identity(relu), None, None) if training else None
        )
        common = dy, z, stats, relu_mask, relu, sums, count, weight
        input_args = (x, x_stats, True) if input_norm else (x, None, False)
        dw = kernels.conv_wgrad(*common, *input_args, [stride, stride])
        expected = reference_wgrad.conv_wgrad(*to_float64(*common, *input_args), [stride, stride])
        assert_close(dw, expected, dtype, "conv_wgrad", 4)
        if stride > 1:
            continue
        input_args = (x, x_stats, True) if input_norm else (None, None, False)
        dx, sums_of_dx = kernels.conv_dgrad(*common, *input_args)
        expected, expected_sums = reference_dgrad.conv_dgrad(*to_float64(*common, *input_args))
        assert_close(dx, expected, dtype, "conv_dgrad", 4)
        if input_norm:
            assert_close(sums_of_dx, expected_sums, dtype, "reductions of conv_dgrad", 4)
            continue
        added = channels_last(randn(*shape, seed=5)).to(dtype)
        for added_mask in (None, reference.pack_mask(channels_last(randn(*shape, seed=6)) > 0)):
            dx, _ = kernels.conv_dgrad(*common, *input_args, added, added_mask)
            expected, _ = reference_dgrad.conv_dgrad(*to_float64(*common, *input_args, added, added_mask))
            assert_close(dx, expected, dtype, "conv_dgrad with the gradient of a shortcut", 4)


NO_PROLOGUE = None, None, None, False, None, 0


@on_backends_and_dtypes(torch.float32, *HALF)
@pytest.mark.parametrize(("channels", "outputs", "size"), [(35, 20, 5), (64, 100, 4), (136, 72, 9)])
def test_input_gradient_without_prologue(kernels, channels, outputs, size, dtype):
    """The gradient of the output is an operand as it is; the addition and the input's norm are in the epilogue."""
    dz, added = channels_last(randn(3, outputs, size, size)).to(dtype), randn(3, channels, size, size, seed=5).to(dtype)
    weight = (randn(outputs, channels, 1, 1, seed=2) / outputs**0.5).to(dtype)
    x = channels_last(randn(3, channels, size, size, seed=1) + 1).to(dtype)
    x_stats = reference.batch_norm_stats(x, randn(channels), randn(channels, seed=3), None, None, True, 1e-5).float()
    added_mask = reference.pack_mask(channels_last(randn(*added.shape, seed=6)) > 0)
    for epilogue in (
        (None, None, False),
        (None, None, False, added, None),
        (None, None, False, channels_last(added), added_mask),
        (x, x_stats, True),
    ):
        arguments = dz, *NO_PROLOGUE, weight, *epilogue
        wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]
        dx, sums = kernels.conv_dgrad(*arguments)
        expected, expected_sums = reference_dgrad.conv_dgrad(*wide)
        assert dx.dtype == dtype and dx.is_contiguous(memory_format=torch.channels_last)
        assert_close(dx, expected, dtype, "conv_dgrad without a prologue")
        assert sums.shape == expected_sums.shape and sums.dtype == torch.float32
        if sums.numel():
            assert_close(sums, expected_sums, dtype, "reductions of conv_dgrad", 4)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@on_backends_and_dtypes(torch.float32, *HALF)
def test_max_pool_matches_reference(kernels, dtype, format):
    reference_backend = fused_res.backends.resolve("reference", DEVICE)
    x = randn(2, 5, 9, 11).to(dtype).contiguous(memory_format=format)
    x[0, 0, 2, 2] = float("nan")
    stats = reference.batch_norm_stats(randn(2, 5, 9, 11), randn(5), randn(5), None, None, True, 1e-5).float()
    for input_stats, window in itertools.product((None, stats), (((3, 3), (2, 2), (1, 1)), ((2, 3), (1, 2), (1, 0)))):
        y, indices = kernels.max_pool_forward(x, input_stats, True, *window)
        expected, expected_indices = reference_backend.max_pool_forward(x, input_stats, True, *window)
        torch.testing.assert_close(y, expected, equal_nan=True)
        assert torch.equal(indices[~y.isnan()], expected_indices[~y.isnan()])
        dy = randn(*y.shape).to(dtype)
        dx = kernels.max_pool_backward(dy, expected_indices, x, *window)
        torch.testing.assert_close(dx, reference_backend.max_pool_backward(dy, expected_indices, x, *window))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@on_all_backends
def test_results_are_deterministic(kernels, format):
    x, residual, dy, weight, bias = norm_case((5, 70, 9, 7), format, torch.float32)
    runs = []
    for _ in range(2):
        y, stats, mask = kernels.batch_norm_act_forward(
            x, residual, None, weight, bias, None, None, True, 1e-5, "relu", True
        )
        runs.append(
            [y, stats, mask, *kernels.batch_norm_act_backward(dy, x, weight, stats, mask, True, "identity", [True] * 4)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@on_all_backends
def test_recomputed_activation_is_bitwise_equal_to_forward(kernels):
    x, _, _, weight, bias = norm_case((3, 35, 9, 7), torch.channels_last, torch.float32)
    y, stats, _ = kernels.batch_norm_act_forward(x, None, None, weight, bias, None, None, True, 1e-5, "relu", False)
    assert torch.equal(y, kernels.batch_norm_act_apply(x, stats, None, None, "relu", False)[0])


@on_backends_and_dtypes(torch.float32, torch.bfloat16)
def test_empty_batch(kernels, dtype):
    """An empty batch gives empty outputs of the right shape, empty partial statistics and zero gradients."""
    x, z = channels_last(torch.empty(0, 8, 5, 5, device=DEVICE)), channels_last(torch.empty(0, 16, 5, 5, device=DEVICE))
    x, z, weight = x.to(dtype), z.to(dtype), randn(16, 8, 1, 1).to(dtype)
    geometry = [1, 1], [0, 0], [1, 1], 1
    assert kernels.conv_bias_act(x, weight, None, None, *geometry, True).shape == z.shape
    output, partials = kernels.conv_bn_stats(x, weight, None, None, False, *geometry, True)
    assert output.shape == z.shape and partials.shape == (1, 3, 16) and not partials[:, [0, 2]].any()
    stats, x_stats = torch.ones(5, 16, device=DEVICE), torch.ones(5, 8, device=DEVICE)
    common = z, z, stats, None, True, None, 0, weight
    grad, sums = kernels.conv_dgrad(*common, x, x_stats, True)
    assert grad.shape == x.shape and sums.shape == (2, 8) and not sums.any()
    assert kernels.conv_dgrad(z, *NO_PROLOGUE, weight, None, None, False, x)[0].shape == x.shape
    assert not kernels.conv_wgrad(*common, x, x_stats, True, [1, 1]).any()
    assert not kernels.batch_norm_sums(z, z, stats, None, "relu", None, None).any()
    y, mask = kernels.batch_norm_act_apply(z, stats, z, None, "relu", True)
    assert y.shape == z.shape and not mask.numel()
