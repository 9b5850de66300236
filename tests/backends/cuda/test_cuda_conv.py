"""Tests specific to the CUDA C++ convolutions: tile sizes, aligned and unaligned loads, split-K, TF32.

They run in the simulator (``tools/cuda_sim``) where there is no GPU. Tests that both GPU backends share are in
``tests/gpu/test_gpu_kernels.py``.
"""

import contextlib

import pytest
import torch
from torch.nn import functional as F

import fused_res
from fused_res import ops
from fused_res.backends.reference import batch_norm_act as norm
from fused_res.backends.reference import conv_dgrad as reference_dgrad
from fused_res.backends.reference import conv_wgrad as reference_wgrad
from fused_res.ops import memory_format
from tests.support import gpu_backends as gpu
from tests.support.gpu_backends import DEVICE

if "cuda" not in gpu.BACKENDS:
    pytest.skip(str(fused_res.backends.unavailable("cuda")), allow_module_level=True)

kernels = fused_res.backends.resolve("cuda", DEVICE)
simulator_only = pytest.mark.skipif(DEVICE.type == "cuda", reason="requires the CUDA simulator")
PLAIN = ([1, 1], [0, 0], [1, 1], 1)
SAME = ([1, 1], [1, 1], [1, 1], 1)
#: Relative to the largest value. TF32 has the mantissa of float16.
TOLERANCE = {"float32": 3e-6, "tf32": 2e-3, "float16": 2e-3, "bfloat16": 1.6e-2}
MATH_MODES = pytest.mark.parametrize("math_mode", TOLERANCE)


@pytest.fixture(autouse=True)
def tf32(request, monkeypatch):
    allowed = "math_mode" in request.fixturenames and request.getfixturevalue("math_mode") == "tf32"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)


@pytest.fixture
def simulator():
    from tools.cuda_sim.simulator import load_simulator

    return load_simulator()


def dtype_of(math_mode):
    return torch.float32 if math_mode == "tf32" else getattr(torch, math_mode)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + len(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def assert_close(ours, exact, tolerance):
    assert ours.shape == exact.shape
    error, scale = (ours.double() - exact.double()).abs().max().item(), exact.abs().max().item()
    assert error <= tolerance * scale, f"{error:.3g} of {scale:.3g}"  # false for NaN, too


def misaligned(x):
    """Return a copy of ``x`` whose address is one element past a multiple of 16 bytes."""
    elements = x.permute(0, 2, 3, 1).flatten()
    memory = torch.cat([elements[:1], elements])
    return memory[1:].view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)


def conv_operands(shape, outputs, kernel_size, dtype):
    """Return input, weight and bias."""
    x, weight = randn(*shape) + 1, randn(outputs, shape[1], *kernel_size, seed=1)
    weight /= (shape[1] * kernel_size[0] * kernel_size[1]) ** 0.5
    return x.to(dtype), weight.to(dtype), randn(outputs, seed=2).to(dtype)


def norm_stats(channels):
    stats = norm.batch_norm_stats(
        randn(64, channels, 1, 1), randn(channels, seed=3), randn(channels, seed=4), None, None, True, 1e-5
    )
    return stats.float()


#: Shape, output channels and kernel size that select each tile size, and split-K. All have partial tiles at the edges.
SIZES = {
    "128x128": ((8, 16, 45, 46), 136, (1, 1)),
    "128x64": ((8, 8, 64, 65), 24, (1, 1)),
    "64x64": ((2, 32, 9, 11), 72, (3, 3)),
    "split_k": ((1, 512, 3, 3), 40, (1, 1)),
}


@MATH_MODES
@pytest.mark.parametrize("size", SIZES)
def test_tile_sizes_with_prologue_and_epilogue(size, math_mode):
    """Every tile size with every part of prologue and epilogue, for aligned and unaligned operands."""
    dtype, (shape, outputs, kernel_size) = dtype_of(math_mode), SIZES[size]
    x, weight, bias = conv_operands(shape, outputs, kernel_size, dtype)
    geometry = PLAIN if kernel_size == (1, 1) else SAME
    exact = F.conv2d(x.double(), weight.double(), bias.double(), *geometry)
    residual = randn(*exact.shape, seed=5).to(dtype)
    stats = norm_stats(shape[1])
    expected = F.relu(exact + residual.double())
    activation = norm.batch_norm_act_apply(x.double(), stats.double(), None, None, "relu", False)[0].to(dtype)
    exact = F.conv2d(activation.double(), weight.double(), bias.double(), *geometry)
    exact_stats = norm.batch_norm_stats(exact, None, None, None, None, True, 1e-5)
    loads = [(x, weight, residual)]
    if size in ("64x64", "split_k"):  # unaligned operands only have the smallest tile
        loads += [(misaligned(x), weight, residual), (x, misaligned(weight), misaligned(residual))]
    for x, weight, residual in loads:
        y = kernels.conv_bias_act(x, weight, bias, residual, *geometry, True)
        assert_close(y, expected, TOLERANCE[math_mode])
        z, partials = kernels.conv_bn_stats(x, weight, bias, stats, True, *geometry, True)
        assert_close(z, exact, TOLERANCE[math_mode])
        ours = kernels.merge_stats(partials, None, None, 1e-5, False)
        for row in (ops.MEAN, ops.VAR):
            assert_close(ours[row], exact_stats[row], 10 * TOLERANCE[math_mode])


#: Channels, output channels, size: aligned for every dtype, for float32, for none.
BACKWARD = [(24, 72, 9), (20, 36, 9), (35, 5, 9)]


@pytest.mark.parametrize(
    ("math_mode", "channels", "outputs", "size"),
    [(math_mode, *sizes) for math_mode in TOLERANCE for sizes in BACKWARD]
    # Tiles of 128 x 128 and of 128 x 64, which are instantiated for 16-bit dtypes only: dgrad, then wgrad.
    + [("bfloat16", 136, 64, 128), ("float16", 64, 24, 128), ("bfloat16", 136, 72, 9), ("float16", 136, 72, 25)],
)
def test_backward_tile_sizes(channels, outputs, size, math_mode):
    """The input gradient has as many tiles as the forward; the weight gradient has few, and uses split-K."""
    dtype = dtype_of(math_mode)
    images = 2 if size > 100 else 3
    x, z = randn(images, channels, size, size).to(dtype), randn(images, outputs, size, size, seed=1).to(dtype)
    dy, weight = randn(*z.shape, seed=2).to(dtype), (randn(outputs, channels, 1, 1, seed=3) / outputs**0.5).to(dtype)
    stats, x_stats, count = norm_stats(outputs), norm_stats(channels), images * size**2
    mask = norm.pack_mask(randn(*z.shape, seed=4) > 0)
    added, added_mask = randn(*x.shape, seed=5).to(dtype), norm.pack_mask(randn(*x.shape, seed=6) > 0)
    sums = count * 0.1 * randn(2, outputs).float()

    def to_float64(tensors):
        return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]

    common = dy, z, stats, mask, False, sums, count, weight
    # The prologue rounds its operand to the dtype: an operand rounded differently is off by one unit in the last place.
    tolerance = 4 * TOLERANCE[math_mode]
    arguments = (*common, x, x_stats, True, [1, 1])
    assert_close(kernels.conv_wgrad(*arguments), reference_wgrad.conv_wgrad(*to_float64(arguments)), tolerance)
    arguments = (*common, None, None, False, added, added_mask)
    assert_close(kernels.conv_dgrad(*arguments)[0], reference_dgrad.conv_dgrad(*to_float64(arguments))[0], tolerance)
    arguments = (dy, None, None, None, False, None, 0, weight, None, None, False, added, added_mask)
    exact = reference_dgrad.conv_dgrad(*to_float64(arguments))[0]
    assert_close(kernels.conv_dgrad(*arguments)[0], exact, TOLERANCE[math_mode])
    assert_close(kernels.conv_dgrad(misaligned(dy), *arguments[1:])[0], exact, TOLERANCE[math_mode])
    arguments = (*common, x, x_stats, True)
    for ours, exact in zip(
        kernels.conv_dgrad(*arguments), reference_dgrad.conv_dgrad(*to_float64(arguments)), strict=True
    ):
        assert_close(ours, exact, tolerance)


@simulator_only
@MATH_MODES
def test_results_do_not_depend_on_schedule_and_no_bank_conflicts(math_mode, simulator):
    """The results are bitwise equal under every schedule of threads and blocks; ldmatrix has no bank conflicts."""
    dtype = dtype_of(math_mode)
    stats = norm_stats(32)
    simulator.bank_conflicts()
    results = []
    for schedule in (None, 0, 1, 2, 3):
        with contextlib.nullcontext() if schedule is None else simulator.schedule(schedule):
            outputs = []
            for shape, channels, kernel_size in (*list(SIZES.values())[2:], ((2, 35, 5, 5), 20, (3, 3))):
                x, weight, bias = conv_operands(shape, channels, kernel_size, dtype)
                input_stats = norm_stats(shape[1])
                outputs += kernels.conv_bn_stats(x, weight, bias, input_stats, True, *SAME, True)
            x, z = randn(2, 32, 8, 8).to(dtype), randn(2, 72, 8, 8).to(dtype)
            common = z, z, norm_stats(72), None, True, None, 0, randn(72, 32, 1, 1).to(dtype), x, stats, True
            outputs += [*kernels.conv_dgrad(*common), kernels.conv_wgrad(*common, [1, 1])]
            results.append(outputs)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    for shape, channels, kernel_size in list(SIZES.values())[:2]:
        x, weight, bias = conv_operands((2, *shape[1:]), channels, kernel_size, dtype)
        kernels.conv_bias_act(x, weight, bias, None, *PLAIN, True)
    assert simulator.bank_conflicts() == 0


def test_split_k_agrees_with_unsplit():
    """A single image uses split-K; in a large batch the same image does not."""
    x, weight, bias = conv_operands((1, 256, 8, 8), 8, (1, 1), torch.float32)
    split = kernels.conv_bias_act(x, weight, bias, None, *PLAIN, False)
    assert torch.equal(split, kernels.conv_bias_act(x, weight, bias, None, *PLAIN, False))
    unsplit = kernels.conv_bias_act(x.expand(256, -1, -1, -1), weight, bias, None, *PLAIN, False)
    assert torch.equal(unsplit[0], unsplit[-1])
    assert not torch.equal(split[0], unsplit[0]), "expected split-K to be used for one of them only"
    assert_close(split[0], unsplit[0], 2e-6)


@pytest.mark.parametrize("images", [1, 40])  # few splits, and more than kMaxEpilogueSplits
def test_weight_gradient_of_a_strided_convolution(images):
    x, z = randn(images, 16, 19, 17).float(), randn(images, 24, 10, 6, seed=1).float()
    weight, dy = randn(24, 16, 1, 1).float(), randn(*z.shape, seed=2).float()
    arguments = dy, z, norm_stats(24), None, True, None, 0, weight, x, None, False, [2, 3]
    float64_arguments = [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]
    ours = kernels.conv_wgrad(*arguments)
    assert_close(ours, reference_wgrad.conv_wgrad(*float64_arguments), 4e-6)
    assert torch.equal(ours, kernels.conv_wgrad(*arguments))


def test_tf32_only_where_allowed(monkeypatch):
    x, weight, _ = conv_operands((2, 64, 6, 6), 32, (3, 3), torch.float32)
    exact = F.conv2d(x.double(), weight.double(), None, *SAME)

    def error():
        y = kernels.conv_bias_act(x, weight, None, None, *SAME, False)
        return ((y - exact).abs().max() / exact.abs().max()).item()

    assert error() < 1e-6
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert 1e-5 < error() < 1e-3
    # The newer, per-operator setting. With it set, querying the older one raises.
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    assert error() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_statistics_of_a_large_mean_are_accurate(size, dtype):
    """The bias is a thousand times the deviation. The statistics are those of the output as it is stored."""
    shape, outputs, kernel_size = SIZES[size]
    x, weight, _ = conv_operands(shape, outputs, kernel_size, dtype)
    bias = torch.full((outputs,), 1024.0, device=DEVICE, dtype=dtype)
    z, partials = kernels.conv_bn_stats(x, weight, bias, None, False, *PLAIN, True)
    ours = kernels.merge_stats(partials, None, None, 1e-5, False)
    assert_statistics_of_output(ours, z)


@pytest.mark.parametrize("size", SIZES)
def test_statistics_are_those_of_the_rounded_output(size):
    """With mean 100 and deviation 0.1, most of a bfloat16 output's variance is rounding: its spacing there is 0.5."""
    shape, outputs, kernel_size = SIZES[size]
    x, weight, _ = conv_operands(shape, outputs, kernel_size, torch.bfloat16)
    x -= 1
    scale = 0.1 / F.conv2d(x.double(), weight.double()).std()
    bias = (100 + 0.25 * torch.rand(outputs, generator=torch.Generator().manual_seed(0))).to(DEVICE)
    z, partials = kernels.conv_bn_stats(x, (weight * scale).bfloat16(), bias, None, False, *PLAIN, True)
    ours = kernels.merge_stats(partials, None, None, 1e-5, False)
    assert_statistics_of_output(ours, z)


def assert_statistics_of_output(ours, z):
    expected = norm.batch_norm_stats(z.double(), None, None, None, None, True, 1e-5)
    assert_close(ours[ops.MEAN], expected[ops.MEAN], 2e-7)
    assert_close(ours[ops.VAR], expected[ops.VAR], 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_per_channel_vectors(dtype):
    """A bias of stride 0 or 3 and transposed statistics are read as their values; guard pages check the bounds."""
    with gpu.guarded_memory("cuda"):
        x, weight, bias = conv_operands((2, 16, 5, 5), 24, (1, 1), dtype)
        z, dy = randn(2, 24, 5, 5).to(dtype), randn(2, 24, 5, 5, seed=7).to(dtype)
        stats, x_stats, sums = norm_stats(24), norm_stats(16), randn(2, 24).float()

        def results(bias, stats, x_stats, sums):
            gradient = dy, z, stats, None, True, sums, 50, weight
            return [
                kernels.conv_bias_act(x, weight, bias, z, *PLAIN, True),
                *kernels.conv_bn_stats(x, weight, bias, x_stats, True, *PLAIN, True),
                *kernels.conv_dgrad(*gradient, x, x_stats, True),
                kernels.conv_wgrad(*gradient, x, x_stats, True, [1, 1]),
            ]

        for spread in (lambda v: v[:1].expand(v.numel()), lambda v: v.repeat_interleave(3)[::3]):
            strided = [spread(bias), *(t.t().contiguous().t() for t in (stats, x_stats, sums))]
            assert not any(t.is_contiguous() for t in strided)
            dense = results(*(t.contiguous() for t in strided))
            assert all(torch.equal(one, other) for one, other in zip(results(*strided), dense, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "outputs"), [(16, 24), (19, 5)])
def test_input_gradient_without_prologue_stays_in_bounds(channels, outputs, dtype):
    """Guard pages check the bounds; without a prologue, z and its statistics are null."""
    with gpu.guarded_memory("cuda"):
        dz, weight = randn(2, outputs, 5, 5).to(dtype), randn(outputs, channels, 1, 1, seed=3).to(dtype)
        added, mask = randn(2, channels, 5, 5, seed=1).to(dtype), norm.pack_mask(randn(2, channels, 5, 5, seed=2) > 0)
        arguments = dz, None, None, None, False, None, 0, weight, None, None, False, added, mask
        wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]
        exact = reference_dgrad.conv_dgrad(*wide)[0]
        tolerance = TOLERANCE[str(dtype).removeprefix("torch.")]
        assert_close(kernels.conv_dgrad(*arguments)[0], exact, tolerance)


@pytest.mark.parametrize(
    "change",
    [
        {"stats": None}, {"output": None}, {"relu_mask": True}, {"relu": True}, {"sums": True},
    ],
    ids=str,
)  # fmt: skip
def test_partial_prologue_raises(change):
    """`output` and `stats` are given both or neither; without them there is nothing to mask by or to subtract."""
    z, stats = randn(2, 16, 5, 5).float(), norm_stats(16)
    given = {"relu_mask": norm.pack_mask(z > 0), "sums": stats[:2]}
    arguments = dict.fromkeys(("output", "stats", "relu_mask", "relu", "sums"))
    arguments |= {"output": z, "stats": stats} if change.keys() & {"output", "stats"} else {}
    arguments |= {name: given.get(name, value) if value else value for name, value in change.items()}
    arguments["relu"] = bool(arguments["relu"])
    with pytest.raises(ValueError, match="stats" if change.keys() & {"output", "stats"} else "output"):
        kernels.conv_dgrad(z, *arguments.values(), 50, randn(16, 8, 1, 1).float(), None, None, False)


@pytest.mark.parametrize("groups", [2, 5, 10, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_groups(groups, dtype):
    """Groups of 20, 8, 4 and 1 channels with many and with one output each, also where neither fills 16 bytes."""
    x = (randn(2, 40, 7, 6) + 1).to(dtype)
    stats = norm_stats(40)
    activation = norm.batch_norm_act_apply(x.double(), stats.double(), None, None, "relu", False)[0].to(dtype)
    for outputs in (120 // groups * groups, groups):
        weight = (randn(outputs, 40 // groups, 3, 3) / 20).to(dtype)
        geometry = [2, 1], [1, 2], [1, 2], groups
        exact = F.conv2d(activation.double(), weight.double(), None, *geometry)
        z, _ = kernels.conv_bn_stats(x, weight, None, stats, True, *geometry, True)
        assert_close(z, exact, TOLERANCE[str(dtype).removeprefix("torch.")])


def test_output_memory_format_matches_fake_implementation():
    x, weight, bias = conv_operands((2, 8, 5, 5), 16, (3, 3), torch.float32)
    x_contiguous, weight_contiguous = x.contiguous(), weight.contiguous()
    for image, w in ((x, weight_contiguous), (x_contiguous, weight), (x_contiguous, weight_contiguous)):
        exact = F.conv2d(x.double(), weight.double(), bias.double(), *SAME)
        y = kernels.conv_bias_act(image, w, bias, None, *SAME, False)
        assert y.is_contiguous(memory_format=torch.channels_last) == memory_format.conv_output_is_channels_last(
            image, w
        )
        assert_close(y, exact, TOLERANCE["float32"])
        z, partials = kernels.conv_bn_stats(image, w, bias, None, False, *SAME, True)
        assert z.is_contiguous(memory_format=torch.channels_last) == memory_format.is_channels_last(image)
        assert torch.equal(y, z)
        assert partials.shape == (1, 3, 16)
        assert kernels.conv_bn_stats(image, w, bias, None, False, *SAME, False)[1].shape == (0,)
    # A bias of another dtype is read without conversion.
    assert_close(kernels.conv_bias_act(x, weight, bias.double(), None, *SAME, False), exact, TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"input": lambda x: x.double(), "weight": lambda w: w.double()}, TypeError),
        ({"input": lambda x: x.half()}, TypeError),
        ({"input": lambda x: x[0]}, ValueError),
        ({"input": lambda x: x[:0]}, ValueError),
        ({"input": lambda x: x[:, :7]}, ValueError),
        ({"input": lambda x: x[:, :, :1, :1], "padding": lambda _: [0, 0]}, ValueError),
        ({"weight": lambda w: w[:0]}, ValueError),
        ({"bias": lambda b: b[:3]}, ValueError),
        ({"residual": lambda r: r[:1]}, ValueError),
        ({"residual": lambda r: r.half()}, TypeError),
        ({"stride": lambda _: [0, 1]}, ValueError),
        ({"stride": lambda _: [1]}, ValueError),
        ({"padding": lambda _: [-1, 0]}, ValueError),
        ({"dilation": lambda _: [1, 2**40]}, ValueError),
        ({"groups": lambda _: 3}, ValueError),
    ],
)
def test_unsupported_forward_arguments_raise(change, error):
    x, weight, bias = conv_operands((2, 8, 5, 5), 16, (3, 3), torch.float32)
    arguments = {"input": x, "weight": weight, "bias": bias, "residual": randn(2, 16, 5, 5).float()}
    arguments |= dict(zip(("stride", "padding", "dilation", "groups"), SAME, strict=True), relu=True)
    kernels.conv_bias_act(*arguments.values())
    arguments |= {name: replace(arguments[name]) for name, replace in change.items()}
    with pytest.raises(error):
        kernels.conv_bias_act(*arguments.values())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"grad_output": lambda t: t[:1]}, ValueError),
        ({"output": lambda t: t.double()}, TypeError),
        ({"stats": lambda t: t[:4]}, ValueError),
        ({"stats": lambda t: t.double()}, TypeError),
        ({"relu_mask": lambda t: t[1:]}, ValueError),
        ({"sums": lambda t: t[:, 1:]}, ValueError),
        ({"count": lambda _: 0}, ValueError),
        ({"weight": lambda t: t[1:]}, ValueError),
        ({"weight": lambda t: t.expand(-1, -1, 3, 3)}, ValueError),
        ({"input": lambda t: t[:, :, 1:]}, ValueError),
    ],
)
def test_unsupported_backward_arguments_raise(change, error):
    x, z = randn(2, 8, 5, 5).float(), randn(2, 16, 5, 5).float()
    arguments = {
        "grad_output": z, "output": z, "stats": norm_stats(16), "relu_mask": norm.pack_mask(z > 0), "relu": False,
        "sums": torch.zeros(2, 16, device=DEVICE), "count": 50, "weight": randn(16, 8, 1, 1).float(),
        "input": x, "input_stats": norm_stats(8), "input_relu": True,
    }  # fmt: skip
    kernels.conv_dgrad(*arguments.values())
    kernels.conv_wgrad(*arguments.values(), [1, 1])
    arguments |= {name: replace(arguments[name]) for name, replace in change.items()}
    with pytest.raises(error):
        kernels.conv_dgrad(*arguments.values())
    with pytest.raises(error):
        kernels.conv_wgrad(*arguments.values(), [1, 1])
