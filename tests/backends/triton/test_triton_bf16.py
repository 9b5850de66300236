"""Every operator of the Triton backend in bfloat16 against float64, run from the sm_80 PTX that Triton generates.

The float64 reference starts from inputs that are already rounded to bfloat16. The error of an output is then its own
final rounding, at most 2^-8 relative, plus that of float32 accumulation, a few millionths of the largest value.
"""

import math

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from fused_res import ops
from fused_res.backends.reference import batch_norm_act as reference
from fused_res.backends.reference import batch_norm_sync as reference_sync
from fused_res.backends.reference import max_pool as reference_pool
from fused_res.backends.reference.batch_norm_act import apply_prologue
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
    NO_GRADS,
    activation_constexprs,
    batch_norm_act_dx,
    batch_norm_partials,
    batch_norm_sums,
    compute_partials,
    compute_sums,
    merge_stats,
)
from fused_res.backends.triton.conv_bias_act import conv_bias_act
from fused_res.backends.triton.conv_bn_stats import conv_bn_stats
from fused_res.backends.triton.conv_dgrad import conv_dgrad
from fused_res.backends.triton.conv_wgrad import conv_wgrad
from fused_res.backends.triton.max_pool import max_pool_backward, max_pool_forward
from fused_res.backends.triton.tiles import dense_tiling
from fused_res.ops.checks import ACTIVATIONS, relu_or_identity
from tools.ptx.compiled_session import needs_compiled_triton
from tools.ptx.triton_runner import run_interpreted

ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2**-24}
#: Error of a float32 sum of hundreds of terms, relative to the largest value.
ACCUMULATION = 3e-6
CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)), dtype=torch.float64)


def random_nchw(*shape, seed=0, mean=0.0, format=CHANNELS_LAST, dtype=torch.bfloat16):
    return (randn(*shape, seed=seed) + mean).to(dtype).contiguous(memory_format=format)


def to_float64(*tensors):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]


def assert_close(actual, expected, name, slack=0.0):
    """Compare with the float64 reference; ``slack`` is the absolute error due to operands that the kernel rounds."""
    assert actual.shape == expected.shape, name
    expected = expected.double()
    allowed = ROUNDING[actual.dtype] * 1.001 * expected.abs() + ACCUMULATION * expected.abs().max() + slack
    excess = (actual.double() - expected).abs() - allowed
    assert (excess <= 0).all(), f"{name}: {excess.max():.3g} more than allowed, of {expected.abs().max():.3g}"


NORMS = [  # (N, C, H, W): aligned and unaligned rows, several tiles of rows and of columns
    ((3, 35, 5, 3), CHANNELS_LAST),
    ((2, 96, 7, 8), CHANNELS_LAST),
    ((3, 5, 17, 19), CONTIGUOUS),
    ((20, 3, 16, 16), CONTIGUOUS),
]


def norm_case(shape, format):
    """Return inputs whose channels differ in mean and standard deviation, with parameters and statistics."""
    view = 1, -1, 1, 1
    x = randn(*shape) * (randn(shape[1]).abs() + 0.5).view(view) + 10 * randn(shape[1], seed=1).view(view)
    x = x.bfloat16().contiguous(memory_format=format)
    residual, dy = (random_nchw(*shape, seed=seed, format=format) for seed in (2, 5))
    weight, bias = (randn(shape[1], seed=seed).float() for seed in (3, 4))
    stats, residual_stats = (
        reference.batch_norm_stats(t, weight + 1, bias, None, None, True, 1e-5) for t in (x, residual)
    )
    return x, residual, dy, weight + 1, bias, stats, residual_stats


norms = pytest.mark.parametrize(("shape", "format"), NORMS, ids=str)
norms_subset = pytest.mark.parametrize(
    ("shape", "format"), [pytest.param(*NORMS[0], marks=pytest.mark.full), *NORMS[1:3]], ids=str
)


@needs_compiled_triton
@norms
def test_statistics_match_float64(shape, format):
    x, _, _, weight, bias, _, _ = norm_case(shape, format)
    partials = run_interpreted(lambda: batch_norm_partials(x), 1)
    assert partials.dtype == torch.float64
    assert partials[:, 0].sum(0).eq(x.numel() // shape[1]).all()
    stats = run_interpreted(lambda: merge_stats(partials, weight, bias, 1e-3, False), 2)
    expected = reference.batch_norm_stats(*to_float64(x, weight, bias), None, None, True, 1e-3)
    for row in (ops.MEAN, ops.INVSTD, ops.SCALE, ops.VAR):
        assert_close(stats[row], expected[row], row)
    assert_close(
        stats[ops.MEAN] - stats[ops.SHIFT] / stats[ops.SCALE], expected[ops.MEAN] - bias / expected[ops.SCALE], "shift"
    )


@needs_compiled_triton
@norms
def test_apply_matches_float64(shape, format):
    """Every kind of residual; the ReLU mask is computed before the output is rounded."""
    x, residual, _, _, _, stats, residual_stats = norm_case(shape, format)
    for *added, activation in (
        *((None, None, activation) for activation in ACTIVATIONS),
        (residual, None, "relu"),
        (residual, residual_stats, "relu"),
    ):
        options = activation, activation == "relu", 0.2
        y, mask = run_interpreted(lambda: batch_norm_act_apply(x, stats, *added, *options))
        expected, expected_mask = reference.batch_norm_act_apply(*to_float64(x, stats, *added), *options)
        assert_close(y, expected, "y")
        assert torch.equal(mask, expected_mask)
        assert y.is_contiguous(memory_format=format)


@needs_compiled_triton
@norms_subset
def test_running_statistics_are_folded(shape, format):
    x, residual, _, weight, bias, stats, _ = norm_case(shape, format)
    running = weight, bias, stats[ops.MEAN] + 0.25, stats[ops.VAR] * 2
    for *added, activation in ((None, None, "relu"), (residual, None, "identity"), (residual, stats, "relu")):
        arguments = x, *added, *running, False, 1e-5, activation, False
        y, folded, _ = run_interpreted(lambda: batch_norm_act_forward(*arguments), 1)
        expected, expected_stats, _ = reference.batch_norm_act_forward(*to_float64(*arguments))
        assert_close(y, expected, "y")
        assert_close(folded, expected_stats, "stats")
        in_place = x.clone(memory_format=torch.preserve_format)
        run_interpreted(lambda: batch_norm_act_inference_(in_place, *added, *running, 1e-5, activation))
        assert torch.equal(in_place, y)
    assert torch.equal(run_interpreted(lambda: batch_norm_stats(x, *running, False, 1e-5)), folded)


@needs_compiled_triton
@norms_subset
def test_backward_reductions_and_dx_match_float64(shape, format):
    x, residual, dy, weight, bias, stats, residual_stats = norm_case(shape, format)
    mask, count = reference.pack_mask(residual > 0), x.numel() // shape[1]
    for relu_mask, activation in ((mask, "identity"), *((None, activation) for activation in ACTIVATIONS)):
        arguments = dy, x, stats, relu_mask, activation
        sums = run_interpreted(lambda: batch_norm_sums(*arguments, None, None), 2)
        assert_close(sums, reference_sync.batch_norm_sums(*to_float64(*arguments), None, None), "sums")
        for dx_sums in (sums, None) if activation == "relu" else (sums,):
            dx = run_interpreted(lambda: batch_norm_act_dx(*arguments, dx_sums, count))
            assert_close(dx, reference_sync.batch_norm_act_dx(*to_float64(*arguments, dx_sums), count), "dx")
    for training, relu_mask in ((True, mask), (False, None)):
        arguments = dy, x, weight, stats, relu_mask, training, "identity", [True] * 4
        actual = run_interpreted(lambda: batch_norm_act_backward(*arguments), 1)
        for index, pair in enumerate(
            zip(actual, reference.batch_norm_act_backward(*to_float64(*arguments)), strict=True)
        ):
            assert_close(*pair, f"gradient {index}")
        arguments = dy, x, weight, stats, residual, bias, residual_stats, relu_mask, True, training, [True] * 6
        actual = run_interpreted(lambda: batch_norm_act_backward_pair(*arguments))
        for index, pair in enumerate(
            zip(actual, reference.batch_norm_act_backward_pair(*to_float64(*arguments)), strict=True)
        ):
            assert_close(*pair, f"gradient {index} of a norm pair")


@needs_compiled_triton
@norms
def test_add_masked_matches_float64(shape, format):
    into, _, grad, *_ = norm_case(shape, format)
    for mask in (None, reference.pack_mask(into > 0)):
        actual, expected = into.clone(memory_format=torch.preserve_format), into.double()
        run_interpreted(lambda: add_masked_(actual, grad, mask))
        reference.add_masked_(expected, grad.double(), mask)
        assert_close(actual, expected, "sum")


@needs_compiled_triton
@norms_subset
def test_relu_sign_is_equal_in_forward_recomputation_and_backward(shape, format):
    """In every channel, one value of x that many elements share is normalized to zero within rounding."""
    x = (randn(*shape) * 2 + 100).bfloat16().contiguous(memory_format=format)
    dy, weight = random_nchw(*shape, seed=1, format=format), randn(shape[1], seed=2).float()
    stats = reference.batch_norm_stats(x, weight, None, None, None, True, 1e-5)
    zero = x[0, :, 1, 1].float()
    bias = -(zero - stats[ops.MEAN]) * stats[ops.SCALE]
    forward = x, None, None, weight, bias, None, None, True, 1e-5, "relu", True
    y, stats, mask = run_interpreted(lambda: batch_norm_act_forward(*forward))
    close = (y == 0) & (x == zero.view(1, -1, 1, 1))
    assert close.sum() >= shape[1] // 4 and reference.unpack_mask(mask, x)[x == zero.view(1, -1, 1, 1)].any()

    recomputed_y, recomputed_mask = run_interpreted(lambda: batch_norm_act_apply(x, stats, None, None, "relu", True))
    assert torch.equal(recomputed_y, y) and torch.equal(recomputed_mask, mask)
    for backward_pass in (
        lambda *masking: batch_norm_sums(dy, x, stats, *masking, None, None),
        lambda *masking: batch_norm_act_dx(dy, x, stats, *masking, None, 1),
    ):
        assert torch.equal(
            run_interpreted(lambda: backward_pass(None, "relu")),
            run_interpreted(lambda: backward_pass(mask, "identity")),
        )
    if format == CHANNELS_LAST:
        filter = random_nchw(16, shape[1], 1, 1, seed=3)
        x_stats, geometry = stats, ([1, 1], [0, 0], [1, 1], 1)
        with_prologue, _ = run_interpreted(lambda: conv_bn_stats(x, filter, None, x_stats, True, *geometry, False))
        without_prologue, _ = run_interpreted(lambda: conv_bn_stats(y, filter, None, None, False, *geometry, False))
        assert torch.equal(with_prologue, without_prologue)


@needs_compiled_triton
@pytest.mark.parametrize("format", [CHANNELS_LAST, CONTIGUOUS])
def test_max_pool_matches_reference(format):
    x = random_nchw(2, 20, 9, 11, format=format)
    x[0, 0, 2, 2] = float("nan")
    stats = reference.batch_norm_stats(random_nchw(2, 20, 9, 11, mean=1.0), None, None, None, None, True, 1e-5)
    for input_stats, window in ((stats, ((3, 3), (2, 2), (1, 1))), (None, ((2, 3), (1, 2), (1, 0)))):
        y, indices = run_interpreted(lambda: max_pool_forward(x, input_stats, True, *window))
        expected, expected_indices = reference_pool.max_pool_forward(x, input_stats, True, *window)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(indices[~y.isnan()], expected_indices[~y.isnan()])
        dy = random_nchw(*y.shape, seed=1, format=format)
        dx = run_interpreted(lambda: max_pool_backward(dy, expected_indices, x, *window), 1)
        assert_close(dx, reference_pool.max_pool_backward(*to_float64(dy, expected_indices, x), *window), "dx")


CONVOLUTIONS = [  # input shape (N, C, H, W), output channels, kernel, stride, padding, dilation, groups
    ((2, 35, 7, 5), 20, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((2, 100, 5, 5), 70, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    ((2, 64, 9, 9), 128, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    ((1, 24, 6, 6), 32, (3, 2), (1, 2), (2, 0), (2, 1), 2),
    ((1, 640, 2, 3), 24, (1, 1), (1, 1), (0, 0), (1, 1), 1),  # split-K
    ((1, 3, 12, 10), 16, (7, 7), (2, 2), (3, 3), (1, 1), 1),
]
convolutions = pytest.mark.parametrize(
    ("shape", "outputs", "kernel", "stride", "padding", "dilation", "groups"), CONVOLUTIONS, ids=str
)


def filters(outputs, channels, *kernel, seed=1, dtype=torch.bfloat16):
    return (
        random_nchw(outputs, channels, *kernel, seed=seed, dtype=torch.float64)
        .div_((channels * math.prod(kernel)) ** 0.5)
        .to(dtype)
    )


@needs_compiled_triton
@convolutions
def test_conv_bias_act_matches_float64(shape, outputs, kernel, stride, padding, dilation, groups):
    x, weight = random_nchw(*shape, mean=1.0), filters(outputs, shape[1] // groups, *kernel)
    bias, geometry = randn(outputs, seed=2).bfloat16(), (stride, padding, dilation, groups)
    expected = F.conv2d(*to_float64(x, weight, bias), *geometry)
    residual = random_nchw(*expected.shape, seed=3)
    y = run_interpreted(lambda: conv_bias_act(x, weight, bias, residual, *geometry, True), 1)
    assert y.is_contiguous(memory_format=CHANNELS_LAST)
    assert_close(y, F.relu(expected + residual.double()), "with bias, residual and ReLU")
    if kernel == (1, 1):
        y = run_interpreted(lambda: conv_bias_act(x, weight, None, None, *geometry, False), 2)
        assert_close(y, expected - bias.double().view(-1, 1, 1), "without epilogue")


def operand_rounding_slack(operand, other):
    """Return a bound on the change of a dot product if two elements of ``operand`` round in the other direction."""
    return 2 * 2**-7 * float(operand.abs().max() * other.abs().max())


@needs_compiled_triton
@convolutions
def test_conv_bn_stats_matches_float64(shape, outputs, kernel, stride, padding, dilation, groups):
    """The prologue normalizes the input and leaves the padding zero; statistics are of the rounded output."""
    x, weight = random_nchw(*shape, mean=1.0), filters(outputs, shape[1] // groups, *kernel)
    bias, geometry = randn(outputs, seed=2).bfloat16(), (stride, padding, dilation, groups)
    input_stats = reference.batch_norm_stats(x, None, randn(shape[1], seed=4).float(), None, None, True, 1e-5)
    stats, relu = [(input_stats, True), (None, False), (input_stats, False)][outputs % 3]
    z, partials = run_interpreted(lambda: conv_bn_stats(x, weight, bias, stats, relu, *geometry, True))
    activation = apply_prologue(*to_float64(x, stats), relu).bfloat16().double()
    expected = F.conv2d(activation, *to_float64(weight, bias), *geometry)
    slack = 0.0 if stats is None else operand_rounding_slack(activation, weight)
    assert_close(z, expected, "z", slack)
    assert_statistics_of(z, partials)


def assert_statistics_of(z, partials):
    count, mean, m2 = partials[0]
    expected = z.double().transpose(0, 1).flatten(1)
    assert (count == expected.shape[1]).all()
    deviation = expected.std(1, correction=0)
    assert ((mean - expected.mean(1)).abs() <= 1e-6 * deviation).all()
    torch.testing.assert_close(m2, deviation**2 * count, rtol=1e-6, atol=0)


@needs_compiled_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "outputs"), [((2, 16, 9, 5), 16), ((1, 640, 2, 3), 8)], ids=["one pass", "split-K"])
def test_statistics_are_those_of_the_stored_output(shape, outputs, dtype):
    """With mean 100 and deviation 0.1, rounding the output to 16 bits changes its variance by up to a factor of 3."""
    x, weight = random_nchw(*shape, dtype=dtype), filters(outputs, shape[1], 1, 1, dtype=torch.float64)
    weight, bias = (0.1 * weight).to(dtype), (100 + 0.1 * randn(outputs)).to(dtype)
    z, partials = run_interpreted(lambda: conv_bn_stats(x, weight, bias, None, False, (1, 1), (0, 0), (1, 1), 1, True))
    assert_statistics_of(z, partials)


MASKS = "mask", "relu", "none"
CONV1X1 = [  # input and output channels, size, stride, ReLU mask of the gradient, norm before the convolution
    # By default the cases cover every flag, not every combination: compilation takes most of the time. "relu" without
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


def conv1x1_case(channels, outputs, size, stride, masked, training, dtype=torch.bfloat16):
    pixels = (size - 1) // stride + 1
    output_shape = 3, outputs, pixels, pixels
    x, z = (
        random_nchw(3, channels, size, size, mean=1.0, dtype=dtype),
        random_nchw(*output_shape, seed=1, mean=3.0, dtype=dtype),
    )
    dy, weight = random_nchw(*output_shape, seed=2, dtype=dtype), filters(outputs, channels, 1, 1, dtype=dtype)
    stats = reference.batch_norm_stats(z, *randn(2, outputs).float(), None, None, True, 1e-5)
    x_stats = reference.batch_norm_stats(x, *randn(2, channels).float(), None, None, True, 1e-5)
    relu_mask = reference.pack_mask(random_nchw(*output_shape, seed=4) > 0) if masked == "mask" else None
    norm_backward_args = dy, z, stats, relu_mask, masked == "relu"
    operands = *to_float64(dy, z, stats, relu_mask), relu_or_identity(masked == "relu")
    sums = reference_sync.batch_norm_sums(*operands, None, None).float() if training else None
    return (*norm_backward_args, sums, z.numel() // outputs), weight, x, x_stats


def norm_input_grad(dy, z, stats, relu_mask, relu, sums, count):
    """Return the float64 reference of a convolution's dz operand."""
    operands = *to_float64(dy, z, stats, relu_mask), relu_or_identity(relu), *to_float64(sums), count
    return reference_sync.norm_input_grad(*operands)


@needs_compiled_triton
@pytest.mark.parametrize(("channels", "outputs", "size", "stride", "masked", "input_norm"), CONV1X1)
def test_conv1x1_backward_matches_float64(channels, outputs, size, stride, masked, input_norm):
    """Prologues round both operands. The cases without an input norm also have running statistics in the output's norm,
    and the gradient of a shortcut."""
    norm_backward_args, weight, x, x_stats = conv1x1_case(channels, outputs, size, stride, masked, training=input_norm)
    dz = norm_input_grad(*norm_backward_args).bfloat16().double()
    input_args = (x, x_stats, True) if input_norm else (x, None, False)
    operand = x[:, :, ::stride, ::stride]
    operand = apply_prologue(*to_float64(operand, input_args[1]), input_args[2]).bfloat16().double()
    dw = run_interpreted(lambda: conv_wgrad(*norm_backward_args, weight, *input_args, [stride, stride]), 1)
    expected = torch.einsum("nkhw,nchw->kc", dz, operand).view(weight.shape)
    assert_close(dw, expected, "conv_wgrad", operand_rounding_slack(dz, operand))
    if stride > 1:
        return
    expected = torch.einsum("nkhw,kc->nchw", dz, weight.double().flatten(1))
    slack = operand_rounding_slack(dz, weight)
    if input_norm:
        dx, sums = run_interpreted(lambda: conv_dgrad(*norm_backward_args, weight, *input_args), 2)
        expected_sums = reference_sync.batch_norm_sums(expected, *to_float64(x, x_stats), None, "relu", None, None)
        assert_close(sums, expected_sums, "reductions of conv_dgrad", 4 * slack)
        expected = reference.activation_backward(expected, *to_float64(x, x_stats), None, "relu")
    else:
        added, mask = random_nchw(*x.shape, seed=5), reference.pack_mask(x > 1) if masked == "relu" else None
        dx, _ = run_interpreted(lambda: conv_dgrad(*norm_backward_args, weight, None, None, False, added, mask), 2)
        expected = expected + (added if mask is None else added * (x > 1))
    assert_close(dx, expected, "conv_dgrad", slack)


@needs_compiled_triton
@pytest.mark.parametrize(("channels", "outputs", "size", "masked"), [(64, 104, 4, True), (35, 20, 5, False)])
def test_input_gradient_without_prologue_matches_float64(channels, outputs, size, masked):
    dz, added = random_nchw(3, outputs, size, size, seed=2), random_nchw(3, channels, size, size, seed=5)
    weight = filters(outputs, channels, 1, 1)
    mask = reference.pack_mask(added > 0) if masked else None
    no_norms = (None, None, None, False, None, 0), (None, None, False)
    dx, _ = run_interpreted(lambda: conv_dgrad(dz, *no_norms[0], weight, *no_norms[1], added, mask), 1)
    expected = torch.einsum("nkhw,kc->nchw", dz.double(), weight.double().flatten(1))
    assert_close(dx, expected + (added.clamp(min=0) if masked else added), "conv_dgrad")


@needs_compiled_triton
def test_tf32_follows_pytorch_setting(monkeypatch):
    """Operands are rounded to the 10 mantissa bits of TF32 if PyTorch allows it, else products are exact in float32."""
    x = random_nchw(2, 40, 5, 6, mean=1.0, dtype=torch.float32)
    weight = filters(24, 40, 3, 3, dtype=torch.float32)
    geometry = (1, 1), (1, 1), (1, 1), 1
    norm_backward_args, weight1x1, conv_input, stats = conv1x1_case(36, 40, 4, 1, "mask", True, torch.float32)
    operands = (
        norm_input_grad(*norm_backward_args),
        apply_prologue(*to_float64(conv_input, stats), True),
    )

    def conv(x, weight):
        return F.conv2d(*to_float64(x, weight), None, *geometry)

    def dgrad(dz, weight):
        return torch.einsum("nkhw,kc->nchw", dz, weight.double().flatten(1))

    def wgrad(dz, activation):
        return torch.einsum("nkhw,nchw->kc", dz, activation).view(weight1x1.shape)

    for call, run_reference, *inputs in (
        (lambda: conv_bias_act(x, weight, None, None, *geometry, False), conv, x, weight),
        (lambda: conv_dgrad(*norm_backward_args, weight1x1, None, None, False)[0], dgrad, operands[0], weight1x1),
        (lambda: conv_wgrad(*norm_backward_args, weight1x1, conv_input, stats, True, [1, 1]), wgrad, *operands),
    ):
        expected, magnitude = run_reference(*inputs), run_reference(*(tensor.abs() for tensor in inputs))
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        error = (run_interpreted(call).double() - expected).abs()
        assert (error <= 2 * 2**-10 * magnitude).all() and error.max() > ACCUMULATION * expected.abs().max()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    y = run_interpreted(lambda: conv_bias_act(x, weight, None, None, *geometry, False))
    assert_close(y, conv(x, weight), "float32 products")


def last_cta(grid):
    """Select the last CTA only: the rest of a tensor with more than 2^31 elements is never accessed."""
    return [math.prod(grid) - 1]


#: Shapes of more than 2^31 elements: channels_last with 64 channels, and contiguous with 2 channels. The last part of a
#: reduction has only a few tiles, and the last tile is partial.
ROWS, IMAGES, PIXELS = 2**25 + 17509, 16, 2**26 + 34916
int64_offsets = pytest.mark.parametrize("shape", [(ROWS, 64), (IMAGES, 2, PIXELS)], ids=["channels last", "contiguous"])


def tail(x, count):
    """Return the last rows of a channels_last tensor, or the last pixels of the last channel of a contiguous one."""
    return x[-count:] if x.dim() == 2 else x[:, 1:, -count:]


def int64_offsets_case(shape, seed):
    """Return a tensor that is initialized at its end only, and statistics of all channels and of those at the end."""
    x = torch.empty(shape, dtype=torch.bfloat16)
    end = tail(x, 1024)
    end.copy_(randn(*end.shape, seed=seed) + 1)
    stats = randn(5, shape[1]).float()
    return x, stats, stats[:, -end.shape[1] :]


@needs_compiled_triton
@int64_offsets
def test_apply_with_64_bit_offsets(shape):
    (x, stats, tail_stats), (residual, *_) = (int64_offsets_case(shape, seed) for seed in range(2))
    count = shape[-1] % 256 if len(shape) == 3 else ROWS % 64
    y, mask = run_interpreted(lambda: batch_norm_act_apply(x, stats, residual, None, "relu", True), ctas=last_cta)
    expected, bits = reference.batch_norm_act_apply(
        *to_float64(tail(x, count), tail_stats, tail(residual, count), None), "relu", True
    )
    assert_close(tail(y, count), expected, "y")
    mask = mask if len(shape) == 2 else mask.view(IMAGES, 2, -1)
    bytes = len(bits) if len(shape) == 2 else bits.shape[1]
    assert torch.equal(tail(mask, bytes).reshape(bits.shape), bits)


@needs_compiled_triton
@int64_offsets
def test_reductions_and_dx_with_64_bit_offsets(shape, monkeypatch):
    # Only the last part is computed: the merge would read uninitialized memory.
    monkeypatch.setattr(batch_norm_sync, "_merge_sums_launch", lambda *extents: lambda *tensors: None)
    (x, stats, tail_stats), (dy, *_) = (int64_offsets_case(shape, seed) for seed in range(2))
    tiling = dense_tiling(x)[1]
    partials = run_interpreted(lambda: compute_partials(x, tiling, None), ctas=last_cta)
    partials = partials[-1, :, -tail_stats.shape[1] :]
    count = int(partials[0, 0]) // (1 if len(shape) == 2 else IMAGES)
    assert 64 < count <= 512
    x_tail, dy_tail = tail(x, count), tail(dy, count)
    expected = reference_sync.batch_norm_partials(x_tail)[0]
    for row, name in enumerate(("count", "mean", "M2")):
        assert_close(partials[row], expected[row], name)
    relu = activation_constexprs("relu", 0.0)
    operands = dy, x, tiling, None, stats, None, relu, None, None, NO_GRADS
    sums = run_interpreted(lambda: compute_sums(*operands), ctas=last_cta)[-1]
    expected = reference_sync.batch_norm_sums(*to_float64(dy_tail, x_tail, tail_stats), None, "relu", None, None)
    assert_close(sums[:, -tail_stats.shape[1] :], expected, "sums")

    count = shape[-1] % 256 if len(shape) == 3 else ROWS % 64
    dx = run_interpreted(lambda: batch_norm_act_dx(dy, x, stats, None, "relu", None, 1), ctas=last_cta)
    expected = reference_sync.batch_norm_act_dx(
        *to_float64(tail(dy, count), tail(x, count), tail_stats), None, "relu", None, 1
    )
    assert_close(tail(dx, count), expected, "dx")


@needs_compiled_triton
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_convolution_with_64_bit_offsets(kernel_size):
    x = torch.empty((1, 64, 1, ROWS), dtype=torch.bfloat16, memory_format=CHANNELS_LAST)
    x[..., -1024:] = random_nchw(1, 64, 1, 1024, mean=1.0)
    weight, bias = filters(64, 64, kernel_size, kernel_size), randn(64).bfloat16()
    geometry = (1, 1), (kernel_size // 2, kernel_size // 2), (1, 1), 1
    y = run_interpreted(lambda: conv_bias_act(x, weight, bias, None, *geometry, True), ctas=last_cta)
    expected = F.conv2d(*to_float64(x[..., -1024:], weight, bias), *geometry).relu()
    assert_close(y[..., -(ROWS % 128) :], expected[..., -(ROWS % 128) :], "y")
