"""Every operator of the Triton backend in bfloat16 against float64, in the sm_80 code that Triton makes for it.

Inputs are rounded first, and float64 starts from what was rounded: an output is then off by its own last rounding, at
most 2^-8 of itself, and by what float32 accumulation leaves, a few millionths of the largest value.
"""

import math

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from fused_res import ops
from fused_res.backends.reference import batch_norm_act as norm
from fused_res.backends.reference import batch_norm_sync as halves
from fused_res.backends.reference import max_pool as reference_pool
from fused_res.backends.reference.batch_norm_act import activated
from fused_res.backends.triton import batch_norm_sync
from fused_res.backends.triton.batch_norm_act import (
    add_masked_,
    batch_norm_act_apply,
    batch_norm_act_backward,
    batch_norm_act_backward_pair,
    batch_norm_act_forward,
    batch_norm_act_inference_,
    batch_norm_stats,
)
from fused_res.backends.triton.batch_norm_sync import (
    batch_norm_act_dx,
    batch_norm_partials,
    batch_norm_sums,
    merge_stats,
    tile_partials,
)
from fused_res.backends.triton.conv_bias_act import conv_bias_act
from fused_res.backends.triton.conv_bn_stats import conv_bn_stats
from fused_res.backends.triton.conv_dgrad import conv_dgrad
from fused_res.backends.triton.conv_wgrad import conv_wgrad
from fused_res.backends.triton.max_pool import max_pool_backward, max_pool_forward
from tools.ptx.compiled_session import compiled
from tools.ptx.triton_runner import interpreted

ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2**-24}
#: Sums of hundreds in float32, relative to the largest value.
ACCUMULATION = 3e-6
LAST, PLANES = torch.channels_last, torch.contiguous_format


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)), dtype=torch.float64)


def image(*shape, seed=0, mean=0.0, format=LAST, dtype=torch.bfloat16):
    return (randn(*shape, seed=seed) + mean).to(dtype).contiguous(memory_format=format)


def wide(*tensors):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]


def assert_close(ours, exact, name, slack=0.0):
    """``slack``, absolute, is what the operands of a sum may have been off by, where a kernel rounds them itself."""
    assert ours.shape == exact.shape, name
    exact = exact.double()
    allowed = ROUNDING[ours.dtype] * 1.001 * exact.abs() + ACCUMULATION * exact.abs().max() + slack
    excess = (ours.double() - exact).abs() - allowed
    assert (excess <= 0).all(), f"{name}: {excess.max():.3g} more than allowed, of {exact.abs().max():.3g}"


NORMS = [  # images, channels, height, width: aligned and not, several tiles of rows and of columns
    ((3, 35, 5, 3), LAST),
    ((2, 96, 7, 8), LAST),
    ((3, 5, 17, 19), PLANES),
    ((20, 3, 16, 16), PLANES),
]


def norm_case(shape, format):
    """Inputs with another mean and deviation in every channel."""
    view = 1, -1, 1, 1
    x = randn(*shape) * (randn(shape[1]).abs() + 0.5).view(view) + 10 * randn(shape[1], seed=1).view(view)
    x = x.bfloat16().contiguous(memory_format=format)
    residual, dy = (image(*shape, seed=seed, format=format) for seed in (2, 5))
    weight, bias = (randn(shape[1], seed=seed).float() for seed in (3, 4))
    stats, residual_stats = (norm.batch_norm_stats(t, weight + 1, bias, None, None, True, 1e-5) for t in (x, residual))
    return x, residual, dy, weight + 1, bias, stats, residual_stats


norms = pytest.mark.parametrize(("shape", "format"), NORMS, ids=str)
some_norms = pytest.mark.parametrize(
    ("shape", "format"), [pytest.param(*NORMS[0], marks=pytest.mark.full), *NORMS[1:3]], ids=str
)


@compiled
@norms
def test_statistics(shape, format):
    x, _, _, weight, bias, _, _ = norm_case(shape, format)
    partials = interpreted(lambda: batch_norm_partials(x), 1)
    assert partials.dtype == torch.float64
    assert partials[:, 0].sum(0).eq(x.numel() // shape[1]).all()
    stats = interpreted(lambda: merge_stats(partials, weight, bias, 1e-3, False), 2)
    exact = norm.batch_norm_stats(*wide(x, weight, bias), None, None, True, 1e-3)
    for row in (ops.MEAN, ops.INVSTD, ops.SCALE, ops.VAR):
        assert_close(stats[row], exact[row], row)
    assert_close(
        stats[ops.MEAN] - stats[ops.SHIFT] / stats[ops.SCALE], exact[ops.MEAN] - bias / exact[ops.SCALE], "shift"
    )


@compiled
@norms
def test_apply(shape, format):
    """Each kind of residual; the mask is that of the value before it is rounded."""
    x, residual, _, _, _, stats, residual_stats = norm_case(shape, format)
    for *added, relu in (
        (None, None, False),
        (None, None, True),
        (residual, None, True),
        (residual, residual_stats, True),
    ):
        y, mask = interpreted(lambda: batch_norm_act_apply(x, stats, *added, relu, relu))
        exact, exact_mask = norm.batch_norm_act_apply(*wide(x, stats, *added), relu, relu)
        assert_close(y, exact, "y")
        assert torch.equal(mask, exact_mask)
        assert y.is_contiguous(memory_format=format)


@compiled
@some_norms
def test_running_statistics(shape, format):
    x, residual, _, weight, bias, stats, _ = norm_case(shape, format)
    running = weight, bias, stats[ops.MEAN] + 0.25, stats[ops.VAR] * 2
    for *added, relu in ((None, None, True), (residual, None, False), (residual, stats, True)):
        arguments = x, *added, *running, False, 1e-5, relu, False
        y, folded, _ = interpreted(lambda: batch_norm_act_forward(*arguments), 1)
        exact, exact_stats, _ = norm.batch_norm_act_forward(*wide(*arguments))
        assert_close(y, exact, "y")
        assert_close(folded, exact_stats, "stats")
        in_place = x.clone(memory_format=torch.preserve_format)
        interpreted(lambda: batch_norm_act_inference_(in_place, *added, *running, 1e-5, relu))
        assert torch.equal(in_place, y)
    assert torch.equal(interpreted(lambda: batch_norm_stats(x, *running, False, 1e-5)), folded)


@compiled
@some_norms
def test_sums_and_dx(shape, format):
    x, residual, dy, weight, bias, stats, residual_stats = norm_case(shape, format)
    mask, count = norm.pack_mask(residual > 0), x.numel() // shape[1]
    for relu_mask, relu in ((mask, False), (None, True), (None, False)):
        arguments = dy, x, stats, relu_mask, relu
        sums = interpreted(lambda: batch_norm_sums(*arguments, None, None), 2)
        assert_close(sums, halves.batch_norm_sums(*wide(*arguments), None, None), "sums")
        for given in (sums, None) if relu else (sums,):
            dx = interpreted(lambda: batch_norm_act_dx(*arguments, given, count))
            assert_close(dx, halves.batch_norm_act_dx(*wide(*arguments, given), count), "dx")
    for training, relu_mask in ((True, mask), (False, None)):
        arguments = dy, x, weight, stats, relu_mask, training, False, [True] * 4
        ours = interpreted(lambda: batch_norm_act_backward(*arguments), 1)
        for index, pair in enumerate(zip(ours, norm.batch_norm_act_backward(*wide(*arguments)), strict=True)):
            assert_close(*pair, f"gradient {index}")
        arguments = dy, x, weight, stats, residual, bias, residual_stats, relu_mask, True, training, [True] * 6
        ours = interpreted(lambda: batch_norm_act_backward_pair(*arguments))
        for index, pair in enumerate(zip(ours, norm.batch_norm_act_backward_pair(*wide(*arguments)), strict=True)):
            assert_close(*pair, f"gradient {index} of a pair")


@compiled
@norms
def test_add_masked(shape, format):
    into, _, grad, *_ = norm_case(shape, format)
    for mask in (None, norm.pack_mask(into > 0)):
        ours, exact = into.clone(memory_format=torch.preserve_format), into.double()
        interpreted(lambda: add_masked_(ours, grad, mask))
        norm.add_masked_(exact, grad.double(), mask)
        assert_close(ours, exact, "sum")


@compiled
@some_norms
def test_forward_recompute_and_backward_take_the_same_sign(shape, format):
    """In every channel one value of x, which many elements have, is normalised to zero, give or take a rounding."""
    x = (randn(*shape) * 2 + 100).bfloat16().contiguous(memory_format=format)
    dy, weight = image(*shape, seed=1, format=format), randn(shape[1], seed=2).float()
    stats = norm.batch_norm_stats(x, weight, None, None, None, True, 1e-5)
    zero = x[0, :, 1, 1].float()
    bias = -(zero - stats[ops.MEAN]) * stats[ops.SCALE]
    forward = x, None, None, weight, bias, None, None, True, 1e-5, True, True
    y, stats, mask = interpreted(lambda: batch_norm_act_forward(*forward))
    close = (y == 0) & (x == zero.view(1, -1, 1, 1))
    assert close.sum() >= shape[1] // 4 and norm.unpack_mask(mask, x)[x == zero.view(1, -1, 1, 1)].any()

    again, same = interpreted(lambda: batch_norm_act_apply(x, stats, None, None, True, True))
    assert torch.equal(again, y) and torch.equal(same, mask)
    for half in (
        lambda *how: batch_norm_sums(dy, x, stats, *how, None, None),
        lambda *how: batch_norm_act_dx(dy, x, stats, *how, None, 1),
    ):
        assert torch.equal(interpreted(lambda: half(None, True)), interpreted(lambda: half(mask, False)))
    if format == LAST:
        filter = image(16, shape[1], 1, 1, seed=3)
        x_stats, geometry = stats, ([1, 1], [0, 0], [1, 1], 1)
        read, _ = interpreted(lambda: conv_bn_stats(x, filter, None, x_stats, True, *geometry, False))
        masked, _ = interpreted(lambda: conv_bn_stats(y, filter, None, None, False, *geometry, False))
        assert torch.equal(read, masked)


@compiled
@pytest.mark.parametrize("format", [LAST, PLANES])
def test_max_pool(format):
    x = image(2, 20, 9, 11, format=format)
    x[0, 0, 2, 2] = float("nan")
    stats = norm.batch_norm_stats(image(2, 20, 9, 11, mean=1.0), None, None, None, None, True, 1e-5)
    for through, window in ((stats, ((3, 3), (2, 2), (1, 1))), (None, ((2, 3), (1, 2), (1, 0)))):
        y, indices = interpreted(lambda: max_pool_forward(x, through, True, *window))
        wanted, wanted_indices = reference_pool.max_pool_forward(x, through, True, *window)
        torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(indices[~y.isnan()], wanted_indices[~y.isnan()])
        dy = image(*y.shape, seed=1, format=format)
        dx = interpreted(lambda: max_pool_backward(dy, wanted_indices, x, *window), 1)
        assert_close(dx, reference_pool.max_pool_backward(*wide(dy, wanted_indices, x), *window), "dx")


CONVOLUTIONS = [  # images, channels, height, width, outputs, kernel, stride, padding, dilation, groups
    ((2, 35, 7, 5), 20, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((2, 100, 5, 5), 70, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    ((2, 64, 9, 9), 128, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    ((1, 24, 6, 6), 32, (3, 2), (1, 2), (2, 0), (2, 1), 2),
    ((1, 640, 2, 3), 24, (1, 1), (1, 1), (0, 0), (1, 1), 1),  # a split sum
    ((1, 3, 12, 10), 16, (7, 7), (2, 2), (3, 3), (1, 1), 1),
]
convolutions = pytest.mark.parametrize(
    ("shape", "outputs", "kernel", "stride", "padding", "dilation", "groups"), CONVOLUTIONS, ids=str
)


def filters(outputs, channels, *kernel, seed=1, dtype=torch.bfloat16):
    return (
        image(outputs, channels, *kernel, seed=seed, dtype=torch.float64)
        .div_((channels * math.prod(kernel)) ** 0.5)
        .to(dtype)
    )


@compiled
@convolutions
def test_conv_bias_act(shape, outputs, kernel, stride, padding, dilation, groups):
    x, weight = image(*shape, mean=1.0), filters(outputs, shape[1] // groups, *kernel)
    bias, geometry = randn(outputs, seed=2).bfloat16(), (stride, padding, dilation, groups)
    exact = F.conv2d(*wide(x, weight, bias), *geometry)
    residual = image(*exact.shape, seed=3)
    y = interpreted(lambda: conv_bias_act(x, weight, bias, residual, *geometry, True), 1)
    assert y.is_contiguous(memory_format=LAST)
    assert_close(y, F.relu(exact + residual.double()), "with bias, residual and ReLU")
    if kernel == (1, 1):
        y = interpreted(lambda: conv_bias_act(x, weight, None, None, *geometry, False), 2)
        assert_close(y, exact - bias.double().view(-1, 1, 1), "alone")


def flipped(operand, other):
    """What two elements of an operand, rounded the other way than float64 rounds them, may change in a sum."""
    return 2 * 2**-7 * float(operand.abs().max() * other.abs().max())


@compiled
@convolutions
def test_conv_bn_stats(shape, outputs, kernel, stride, padding, dilation, groups):
    """Normalised as it is read, zero outside; statistics are those of the sums before they are rounded."""
    x, weight = image(*shape, mean=1.0), filters(outputs, shape[1] // groups, *kernel)
    bias, geometry = randn(outputs, seed=2).bfloat16(), (stride, padding, dilation, groups)
    through = norm.batch_norm_stats(x, None, randn(shape[1], seed=4).float(), None, None, True, 1e-5)
    stats, relu = [(through, True), (None, False), (through, False)][outputs % 3]
    z, partials = interpreted(lambda: conv_bn_stats(x, weight, bias, stats, relu, *geometry, True))
    activation = activated(*wide(x, stats), relu).bfloat16().double()
    exact = F.conv2d(activation, *wide(weight, bias), *geometry)
    slack = 0.0 if stats is None else flipped(activation, weight)
    assert_close(z, exact, "z", slack)
    ours = interpreted(lambda: merge_stats(partials, None, None, 1e-5, False))
    exact = norm.batch_norm_stats(exact, None, None, None, None, True, 1e-5)
    for row in (ops.MEAN, ops.INVSTD, ops.VAR):
        assert_close(ours[row], exact[row], f"row {row}", slack / 10 * exact[row].abs().max())


MASKS = "mask", "relu", "none"
POINTWISE = [  # channels, outputs, size, stride; how the gradient is masked; whether x is read through a norm
    # By default each flag is in one of these, not each combination: compiling takes most of the time. "relu" without
    # a norm adds a masked gradient of the shortcut.
    (35, 20, 5, 1, "mask", False),
    (35, 20, 5, 1, "relu", False),
    (35, 20, 5, 1, "none", True),
    *(
        pytest.param(35, 20, 5, 1, *flags, marks=pytest.mark.full)
        for flags in (("mask", True), ("relu", True), ("none", False))
    ),
    (64, 104, 4, 1, "mask", True),
    (32, 144, 7, 2, "relu", True),
    (32, 144, 7, 2, "mask", False),
]


def pointwise_case(channels, outputs, size, stride, masked, training, dtype=torch.bfloat16):
    pixels = (size - 1) // stride + 1
    reached = 3, outputs, pixels, pixels
    x, z = image(3, channels, size, size, mean=1.0, dtype=dtype), image(*reached, seed=1, mean=3.0, dtype=dtype)
    dy, weight = image(*reached, seed=2, dtype=dtype), filters(outputs, channels, 1, 1, dtype=dtype)
    stats = norm.batch_norm_stats(z, *randn(2, outputs).float(), None, None, True, 1e-5)
    x_stats = norm.batch_norm_stats(x, *randn(2, channels).float(), None, None, True, 1e-5)
    relu_mask = norm.pack_mask(image(*reached, seed=4) > 0) if masked == "mask" else None
    behind = dy, z, stats, relu_mask, masked == "relu"
    sums = halves.batch_norm_sums(*wide(*behind), None, None).float() if training else None
    return (*behind, sums, z.numel() // outputs), weight, x, x_stats


@compiled
@pytest.mark.parametrize(("channels", "outputs", "size", "stride", "masked", "through"), POINTWISE)
def test_pointwise_backward(channels, outputs, size, stride, masked, through):
    """Both operands are rounded where they are formed. Statistics that are constants go with an input as it is, and a
    shortcut's gradient with that."""
    behind, weight, x, x_stats = pointwise_case(channels, outputs, size, stride, masked, training=through)
    dz = halves.before_norm(*wide(*behind)).bfloat16().double()
    read = (x, x_stats, True) if through else (x, None, False)
    operand = x[:, :, ::stride, ::stride]
    operand = activated(*wide(operand, read[1]), read[2]).bfloat16().double()
    dw = interpreted(lambda: conv_wgrad(*behind, weight, *read, [stride, stride]), 1)
    exact = torch.einsum("nkhw,nchw->kc", dz, operand).view(weight.shape)
    assert_close(dw, exact, "conv_wgrad", flipped(dz, operand))
    if stride > 1:
        return
    exact = torch.einsum("nkhw,kc->nchw", dz, weight.double().flatten(1))
    slack = flipped(dz, weight)
    if through:
        dx, sums = interpreted(lambda: conv_dgrad(*behind, weight, *read), 2)
        exact_sums = halves.batch_norm_sums(exact, *wide(x, x_stats), None, True, None, None)
        assert_close(sums, exact_sums, "sums of conv_dgrad", 4 * slack)
        exact = halves.masked(exact, *wide(x, x_stats), None, True)
    else:
        added, mask = image(*x.shape, seed=5), norm.pack_mask(x > 1) if masked == "relu" else None
        dx, _ = interpreted(lambda: conv_dgrad(*behind, weight, None, None, False, added, mask), 2)
        exact = exact + (added if mask is None else added * (x > 1))
    assert_close(dx, exact, "conv_dgrad", slack)


@compiled
def test_tf32(monkeypatch):
    """Operands keep 10 bits behind the point; and all of them where PyTorch's switch says so."""
    x = image(2, 40, 5, 6, mean=1.0, dtype=torch.float32)
    weight = filters(24, 40, 3, 3, dtype=torch.float32)
    geometry = (1, 1), (1, 1), (1, 1), 1
    behind, pointwise, read, stats = pointwise_case(36, 40, 4, 1, "mask", True, torch.float32)
    operands = halves.before_norm(*wide(*behind)), activated(*wide(read, stats), True)

    def convolved(x, weight):
        return F.conv2d(*wide(x, weight), None, *geometry)

    def dgrad(dz, weight):
        return torch.einsum("nkhw,kc->nchw", dz, weight.double().flatten(1))

    def wgrad(dz, activation):
        return torch.einsum("nkhw,nchw->kc", dz, activation).view(pointwise.shape)

    for call, exactly, *factors in (
        (lambda: conv_bias_act(x, weight, None, None, *geometry, False), convolved, x, weight),
        (lambda: conv_dgrad(*behind, pointwise, None, None, False)[0], dgrad, operands[0], pointwise),
        (lambda: conv_wgrad(*behind, pointwise, read, stats, True, [1, 1]), wgrad, *operands),
    ):
        exact, magnitude = exactly(*factors), exactly(*(factor.abs() for factor in factors))
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        error = (interpreted(call).double() - exact).abs()
        assert (error <= 2 * 2**-10 * magnitude).all() and error.max() > ACCUMULATION * exact.abs().max()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    y = interpreted(lambda: conv_bias_act(x, weight, None, None, *geometry, False))
    assert_close(y, convolved(x, weight), "exact products")


def last(grid):
    """The last CTA alone: the rest of an immense tensor is never touched."""
    return [math.prod(grid) - 1]


#: More than 2^31 elements, whose last part of a reduction has a few tiles only, the last of them ragged: rows of 64
#: channels, and planes of 2 channels.
ROWS, IMAGES, PIXELS = 2**25 + 37, 16, 2**26 + 100
immense = pytest.mark.parametrize("shape", [(ROWS, 64), (IMAGES, 2, PIXELS)], ids=["channels last", "contiguous"])


def tail(x, count):
    """The last rows; of planes the last pixels of the last channel."""
    return x[-count:] if x.dim() == 2 else x[:, 1:, -count:]


def immense_case(shape, seed):
    """A tensor of which only the end is ever written, and statistics, of all channels and of those at the end."""
    x = torch.empty(shape, dtype=torch.bfloat16)
    end = tail(x, 1024)
    end.copy_(randn(*end.shape, seed=seed) + 1)
    stats = randn(5, shape[1]).float()
    return x, stats, stats[:, -end.shape[1] :]


@compiled
@immense
def test_apply_beyond_32_bits(shape):
    (x, stats, some), (residual, *_) = (immense_case(shape, seed) for seed in range(2))
    count = shape[-1] % 256 if len(shape) == 3 else ROWS % 64
    y, mask = interpreted(lambda: batch_norm_act_apply(x, stats, residual, None, True, True), ctas=last)
    exact, bits = norm.batch_norm_act_apply(*wide(tail(x, count), some, tail(residual, count), None), True, True)
    assert_close(tail(y, count), exact, "y")
    mask = mask if len(shape) == 2 else mask.view(IMAGES, 2, -1)
    bytes = len(bits) if len(shape) == 2 else bits.shape[1]
    assert torch.equal(tail(mask, bytes).reshape(bits.shape), bits)


@compiled
@immense
def test_reductions_and_dx_beyond_32_bits(shape, monkeypatch):
    monkeypatch.setattr(batch_norm_sync, "merge_sums", lambda partials: partials)
    (x, stats, some), (dy, *_) = (immense_case(shape, seed) for seed in range(2))
    partials = interpreted(lambda: tile_partials(x), ctas=last)[-1, :, -some.shape[1] :]
    count = int(partials[0, 0]) // (1 if len(shape) == 2 else IMAGES)
    assert 64 < count <= 512
    end, gradient = tail(x, count), tail(dy, count)
    exact = halves.batch_norm_partials(end)[0]
    for row, name in enumerate(("count", "mean", "M2")):
        assert_close(partials[row], exact[row], name)
    sums = interpreted(lambda: batch_norm_sums(dy, x, stats, None, True, None, None), ctas=last)[-1]
    exact = halves.batch_norm_sums(*wide(gradient, end, some), None, True, None, None)
    assert_close(sums[:, -some.shape[1] :], exact, "sums")

    count = shape[-1] % 256 if len(shape) == 3 else ROWS % 64
    dx = interpreted(lambda: batch_norm_act_dx(dy, x, stats, None, True, None, 1), ctas=last)
    exact = halves.batch_norm_act_dx(*wide(tail(dy, count), tail(x, count), some), None, True, None, 1)
    assert_close(tail(dx, count), exact, "dx")


@compiled
@pytest.mark.parametrize("taps", [1, 3])
def test_convolution_beyond_32_bits(taps):
    x = torch.empty((1, 64, 1, ROWS), dtype=torch.bfloat16, memory_format=LAST)
    x[..., -1024:] = image(1, 64, 1, 1024, mean=1.0)
    weight, bias = filters(64, 64, taps, taps), randn(64).bfloat16()
    geometry = (1, 1), (taps // 2, taps // 2), (1, 1), 1
    y = interpreted(lambda: conv_bias_act(x, weight, bias, None, *geometry, True), ctas=last)
    exact = F.conv2d(*wide(x[..., -1024:], weight, bias), *geometry).relu()
    assert_close(y[..., -(ROWS % 128) :], exact[..., -(ROWS % 128) :], "y")
