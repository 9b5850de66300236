"""batch_norm_act on every backend: accuracy against float64, gradients, memory formats, masks and argument checks.

The accuracy criterion is an error against float64 of at most twice that of stock PyTorch.
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import fused_res
from fused_res.backends.reference.batch_norm_act import batch_norm_act as definition
from fused_res.backends.reference.batch_norm_act import pack_mask, unpack_mask
from fused_res.functional import batch_norm_act
from fused_res.ops import memory_format
from fused_res.ops.checks import relu_or_identity
from fused_res.testing import assert_within_stock_error
from tests.support import batch_norm_checks
from tests.support.batch_norm_checks import expected_relu_mask, gradients, reduction_error_bound
from tests.support.cpu_backends import BACKENDS, FAST_BACKENDS
from tests.support.stock_pytorch import batch_norm_act as stock

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = {
    "image": (4, 35, 9, 7),
    "wide": (2, 100, 5, 5),
    "one channel": (3, 1, 11, 3),
    "one pixel": (33, 24, 1, 1),
    "many rows": (9, 16, 33, 31),
    "matrix": (65, 19),
    "sequence": (3, 8, 50),
    "volume": (2, 17, 3, 5, 4),
}


def formats(rank):
    yield torch.contiguous_format
    if rank == 4:
        yield torch.channels_last
    if rank == 5:
        yield torch.channels_last_3d


CASES = [(name, format) for name, shape in SHAPES.items() for format in formats(len(shape))]


def backend_cases():
    """Return all cases for every backend, but few for the interpreted Triton and the simulated CUDA backend.

    The Triton interpreter computes bfloat16 incorrectly.
    """
    few = {
        ("image", torch.channels_last),
        ("one channel", torch.contiguous_format),
        ("matrix", torch.contiguous_format),
    }
    slow = {"triton": (torch.float32, torch.float16), "cuda": DTYPES}
    for backend, (case, format), dtype in itertools.product(BACKENDS, CASES, DTYPES):
        if backend not in slow or ((case, format) in few and dtype in slow[backend]):
            yield pytest.param(case, format, dtype, backend, id=f"{case}-{format}-{dtype}-{backend}")


def make(shape, dtype, format=torch.contiguous_format, residual=True, affine=True, seed=0, scaled=False):
    """Return tensors, running statistics and an output gradient.

    Inputs are far from zero, with a different mean and standard deviation in every channel. Parameters are float32 for
    16-bit inputs. If ``scaled``, the residual is far from zero as well, and has a scale and a shift.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    channels = (1, -1, *(1,) * (len(shape) - 2))
    scale, mean = randn(shape[1]).abs() + 0.5, 100 * randn(shape[1])
    x = randn(*shape) * scale.view(channels) + mean.view(channels)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        "input": x.to(dtype).contiguous(memory_format=format),
        "residual": randn(*shape).to(dtype) if residual else None,
        "weight": (randn(shape[1]) + 1).to(wide) if affine else None,
        "bias": randn(shape[1]).to(wide) if affine else None,
    }
    if scaled:
        residual_mean = 100 * randn(shape[1]).view(channels)
        tensors["residual"] = (randn(*shape) + residual_mean).to(dtype)
        # Representable in `dtype`, because stock PyTorch multiplies in it.
        tensors |= {name: randn(shape[1]).to(dtype).to(wide) for name in ("residual_scale", "residual_shift")}
    running = {"running_mean": (mean + 0.1).to(wide), "running_var": (scale**2 * 1.1).to(wide)}
    return tensors, running, randn(*shape).to(dtype)


def check(case, dtype, format, training, residual, activation, backend, grad_format=None, scaled=False):
    tensors, running, grad = make(SHAPES[case], dtype, format, residual, scaled=scaled)
    if grad_format is not None:
        grad = grad.contiguous(memory_format=grad_format)
    batch_norm_checks.check_batch_norm_act(tensors, running, grad, training, activation, backend)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("case", "format", "dtype", "backend"), backend_cases())
def test_precision(case, format, dtype, training, backend):
    for residual, activation in itertools.product((True, False), ("relu", "identity")):
        check(case, dtype, format, training, residual, activation, backend)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("case", "format", "dtype", "backend"), backend_cases())
def test_precision_with_scaled_residual(case, format, dtype, training, backend):
    for activation in ("relu", "identity"):
        check(case, dtype, format, training, True, activation, backend, scaled=True)


def make_pair(shape, dtype, format):
    """Return tensors of two norms, of input and residual, the running statistics of both, and an output gradient."""
    tensors, running, grad = make(shape, dtype, format, residual=False)
    other, other_running, _ = make(shape, dtype, format, residual=False, seed=1)
    names = {"input": "residual", "weight": "residual_weight", "bias": "residual_bias"}
    tensors = {name: tensors[name] for name in names} | {name: other[key] for key, name in names.items()}
    return tensors, [list(running.values()), list(other_running.values())], grad


def run_pair(kernels, tensors, running, grad, training, relu, output_mask=(True,) * 6):
    """Return output, mask and gradients (in the order of `tensors`), computed by a backend's operators."""
    x, weight, bias, residual, residual_weight, residual_bias = tensors.values()
    residual_stats = kernels.batch_norm_stats(residual, residual_weight, residual_bias, *running[1], training[1], 1e-5)
    y, stats, mask = kernels.batch_norm_act_forward(
        x, residual, residual_stats, weight, bias, *running[0], training[0], 1e-5, relu_or_identity(relu), relu
    )
    mask = mask if relu else None
    grads = kernels.batch_norm_act_backward_pair(
        grad, x, weight, stats, residual, residual_weight, residual_stats, mask, *training, list(output_mask)
    )
    dx, dresidual, dweight, dbias, dresidual_weight, dresidual_bias = grads
    return y, mask, dict(zip(tensors, (dx, dweight, dbias, dresidual, dresidual_weight, dresidual_bias), strict=True))


def exact_pair(tensors, running, grad, training, mask):
    wide = {name: t.double().requires_grad_() for name, t in tensors.items()}
    x, weight, bias, *residual = wide.values()
    sides = ((x, weight, bias), residual)
    y = sum(
        definition(x, *(t.double() for t in state), weight, bias, training=flag, activation="identity")[0]
        for (x, weight, bias), state, flag in zip(sides, running, training, strict=True)
    )
    pre = y.detach()
    y = y if mask is None else y * mask
    return pre, y.detach(), gradients(y, wide, grad.double())


def stock_pair(tensors, running, grad, training, relu):
    mine = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    x, weight, bias, *residual = mine.values()
    sides = ((x, weight, bias), residual)
    y = sum(
        F.batch_norm(x, *(t.clone() for t in state), weight, bias, flag)
        for (x, weight, bias), state, flag in zip(sides, running, training, strict=True)
    )
    y = F.relu(y) if relu else y
    return y.detach(), gradients(y, mine, grad)


def kernels_of(backend):
    return fused_res.backends.resolve(backend, torch.device("cpu"))


@pytest.mark.parametrize("training", itertools.product((True, False), repeat=2), ids=str)
@pytest.mark.parametrize(("case", "format", "dtype", "backend"), backend_cases())
def test_precision_of_norm_pair(case, format, dtype, training, backend):
    """act(norm(input) + norm(residual)), with means around 100 on both sides."""
    tensors, running, grad = make_pair(SHAPES[case], dtype, format)
    for relu in (True, False):
        y, packed, grads = run_pair(kernels_of(backend), tensors, running, grad, training, relu)
        y_stock, grads_stock = stock_pair(tensors, running, grad, training, relu)
        if relu:
            pre, *_ = exact_pair(tensors, running, grad, training, None)
            relu_mask = expected_relu_mask(pre, y)
            # In 16 bits y may underflow to 0 where the pre-activation is positive.
            assert torch.equal(unpack_mask(packed, tensors["input"]) & (y != 0), y > 0)
            exacts = [
                exact_pair(tensors, running, grad, training, mask)[1:]
                for mask in (relu_mask, expected_relu_mask(pre, y_stock))
            ]
        else:
            exacts = [exact_pair(tensors, running, grad, training, None)[1:]] * 2
        (y_exact, grads_exact), (y_exact_stock, grads_exact_stock) = exacts
        assert y.stride() == torch.empty_like(tensors["input"]).stride()
        assert_within_stock_error("output", y, y_stock, y_exact, y_exact_stock)
        for name, found in grads.items():
            floor, side = 0.0, int(name.startswith("residual"))
            if "weight" in name or "bias" in name:
                state = dict(zip(("running_mean", "running_var"), running[side], strict=True))
                x = tensors[("input", "residual")[side]]
                floor = reduction_error_bound(x, state, training[side], grad, grads_exact["bias"])
            assert_within_stock_error(
                f"grad {name}", found, grads_stock[name], grads_exact[name], grads_exact_stock[name], floor
            )


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_pair_returns_requested_gradients_only(backend):
    for format, training in itertools.product(
        (torch.contiguous_format, torch.channels_last), itertools.product((True, False), repeat=2)
    ):
        tensors, running, grad = make_pair((3, 13, 6, 5), torch.float32, format)
        *_, expected = run_pair(kernels_of(backend), tensors, running, grad, training, True)
        for output_mask in itertools.product((True, False), repeat=6):
            *_, found = run_pair(kernels_of(backend), tensors, running, grad, training, True, output_mask)
            requested = dict(
                zip(
                    ("input", "residual", "weight", "bias", "residual_weight", "residual_bias"),
                    output_mask,
                    strict=True,
                )
            )
            for name, flag in requested.items():
                if flag:
                    assert torch.equal(found[name], expected[name]), (name, output_mask)
                else:
                    assert found[name].shape == (0,), (name, output_mask)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_pair_in_mixed_memory_formats(format, backend):
    """Each gradient has the memory format of its tensor, regardless of the other operands' formats."""
    tensors, running, grad = make_pair(SHAPES["image"], torch.float64, format)
    y, _, expected = run_pair(kernels_of(backend), tensors, running, grad, (True, True), True)
    for residual_format, grad_format in itertools.product((torch.contiguous_format, torch.channels_last), repeat=2):
        mixed = tensors | {"residual": tensors["residual"].contiguous(memory_format=residual_format)}
        mixed_grad = grad.contiguous(memory_format=grad_format)
        found_y, _, found = run_pair(kernels_of(backend), mixed, running, mixed_grad, (True, True), True)
        torch.testing.assert_close(found_y, y)
        for name, tensor in mixed.items():
            assert found[name].stride() == tensor.stride()
            torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_pair_with_16_bit_parameters_and_without_parameters(backend):
    tensors, running, grad = make_pair(SHAPES["image"], torch.bfloat16, torch.channels_last)
    half = {name: t.bfloat16() for name, t in tensors.items()}
    *_, grads = run_pair(kernels_of(backend), half, running, grad, (True, True), True)
    assert all(t.dtype == torch.bfloat16 for t in grads.values())
    none = {name: t if name in ("input", "residual") else None for name, t in tensors.items()}
    ones = {name: t if t is not None else torch.full((35,), float("bias" not in name)) for name, t in none.items()}
    (y, _, grads), (expected_y, _, expected) = (
        run_pair(kernels_of(backend), operands, running, grad, (True, True), True) for operands in (none, ones)
    )
    assert torch.equal(y, expected_y) and all(torch.equal(grads[name], expected[name]) for name in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pair_with_empty_batch(backend):
    tensors, running, grad = make_pair((0, 4, 5, 5), torch.float32, torch.contiguous_format)
    for training in (True, False):
        y, _, grads = run_pair(kernels_of(backend), tensors, running, grad, (training, training), True)
        assert y.shape == grad.shape
        assert all(g.shape == tensors[name].shape and not g.isnan().any() and not g.any() for name, g in grads.items())


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_forward_apply_and_inference_are_bitwise_equal(backend):
    kernels = kernels_of(backend)
    for (case, format), dtype in itertools.product(CASES, DTYPES):
        tensors, running, _ = make_pair(SHAPES[case], dtype, format)
        x, weight, bias, residual, *other = tensors.values()
        residual_stats = kernels.batch_norm_stats(residual, *other, *running[1], True, 1e-5)
        for activation in ("relu", "identity"):
            arguments = residual, residual_stats, weight, bias, *running[0]
            y, stats, mask = kernels.batch_norm_act_forward(x, *arguments, False, 1e-5, activation, True)
            again, mask_again = kernels.batch_norm_act_apply(x, stats, residual, residual_stats, activation, True)
            inference = x.clone(memory_format=torch.preserve_format)
            kernels.batch_norm_act_inference_(inference, *arguments, 1e-5, activation)
            assert torch.equal(again, y) and torch.equal(mask_again, mask) and torch.equal(inference, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_affine_parameters(backend):
    tensors, running, _ = make(SHAPES["image"], torch.float64, torch.channels_last, affine=False)
    ones = {"weight": torch.ones(35, dtype=torch.float64), "bias": torch.zeros(35, dtype=torch.float64)}
    found = batch_norm_act(**tensors, **{k: t.clone() for k, t in running.items()}, training=True, backend=backend)
    torch.testing.assert_close(found, batch_norm_act(**tensors | ones, **running, training=True, backend=backend))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_mixed_memory_formats(format, backend):
    """residual and grad_output have the other memory format (those of make() are contiguous)."""
    check("image", torch.float32, format, True, True, "relu", backend)
    check("image", torch.float32, format, True, True, "relu", backend, grad_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input(backend):
    tensors, running, _ = make((4, 6, 8, 8), torch.float64, residual=True)
    dense = batch_norm_act(**tensors, **running, training=True, backend=backend)
    views = {k: torch.stack((t, t), -1)[..., 0] if t.dim() == 4 else t for k, t in tensors.items()}
    assert not views["input"].is_contiguous()
    torch.testing.assert_close(batch_norm_act(**views, **running, training=True, backend=backend), dense)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [True, False, "scaled"])
def test_gradcheck(training, residual, backend):
    for shape, format in (((3, 5, 3, 2), torch.channels_last), ((2, 3, 4), torch.contiguous_format)):
        tensors, running, _ = make(shape, torch.float64, format, residual, scaled=residual == "scaled")
        names = [name for name, t in tensors.items() if t is not None]

        def function(*values, names=names, running=running):
            state = {k: t.clone() for k, t in running.items()}
            return batch_norm_act(**dict(zip(names, values, strict=True)), **state, training=training, backend=backend)

        inputs = [tensors[name].requires_grad_() for name in names]
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [True, False, "scaled"])
def test_second_derivatives_of_every_subset(training, residual, activation):
    """Double backward matches stock PyTorch whichever tensors require a gradient."""
    values, running, dy = make((3, 5, 3, 2), torch.float64, residual=residual, scaled=residual == "scaled")
    names = [name for name, t in values.items() if t is not None]
    for required in itertools.chain(*(itertools.combinations(names, size + 1) for size in range(len(names)))):
        results = []
        for function in (batch_norm_act, stock):
            leaves = {k: t if t is None else t.clone().requires_grad_(k in required) for k, t in values.items()}
            sources, grad = [leaves[name] for name in required], dy.clone().requires_grad_()
            state = {k: t.clone() for k, t in running.items()}
            y = function(**leaves, **state, training=training, activation=activation)
            grads = torch.autograd.grad(y, sources, grad, create_graph=True)
            weighted = sum((g * torch.linspace(1, 3, g.numel(), dtype=g.dtype).view(g.shape)).sum() for g in grads)
            results.append([*grads, *torch.autograd.grad(weighted, [*sources, grad], materialize_grads=True)])
        torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8, msg=lambda m, r=required: f"{r}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_relu_masks_of_permuted_inputs(backend):
    """With as many channels as pixels, a mask in the wrong order has the right shape too."""
    tensors, running, grad = make((3, 16, 4, 4), torch.float32)
    for order in ((0, 2, 3, 1), (3, 0, 1, 2), (1, 0, 3, 2)):
        back = [order.index(dim) for dim in range(4)]
        for gap in (1, 2):
            x = tensors["input"].permute(order).repeat_interleave(gap, 3)[..., ::gap].permute(back)
            batch_norm_checks.check_batch_norm_act(tensors | {"input": x}, running, grad, True, "relu", backend)


def instruction_sets_to_test():
    """Return all instruction sets; this machine's own, which the other tests use, is marked `full`."""
    native = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    for isa in ("baseline", "avx2", "avx512"):
        yield pytest.param(isa, marks=pytest.mark.full) if isa == native else isa


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")
class TestCpuKernels:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_bitwise_equal_for_any_number_of_threads(self, dtype, format):
        tensors, running, grad = make((8, 70, 31, 33), dtype, format)
        scaled, *_ = make((8, 70, 31, 33), dtype, format, scaled=True)
        pair, states, _ = make_pair((8, 70, 31, 33), dtype, format)
        before = torch.get_num_threads()
        found = []
        try:
            for threads in (1, 2, 3, 2):
                torch.set_num_threads(threads)
                found.append([])
                for operands in (tensors, scaled):
                    mine = {k: t.clone().requires_grad_() for k, t in operands.items()}
                    state = {k: t.clone() for k, t in running.items()}
                    y = batch_norm_act(**mine, **state, training=True, backend="cpu")
                    found[-1] += [y, *gradients(y, mine, grad).values(), *state.values()]
                y, mask, grads = run_pair(kernels_of("cpu"), pair, states, grad, (True, True), True)
                found[-1] += [y, mask, *grads.values()]
        finally:
            torch.set_num_threads(before)
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("isa", instruction_sets_to_test())
    def test_instruction_sets(self, isa):
        run = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
        precision = "(test_precision and (image or matrix) and cpu and (float32 or bfloat16))"
        select = f"{precision} or any_number_of_threads or recomputed_output"
        environment = os.environ | {"FUSED_RES_CPU_ISA": isa}
        command = [sys.executable, "-c", run, "-q", "-x", "-k", select, "-p", "no:cacheprovider", __file__]
        probe = [sys.executable, "-c", "import fused_res"]
        if "this machine" in subprocess.run(probe, env=environment, capture_output=True, text=True).stderr:
            pytest.skip(f"this machine has no {isa}")
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout

    def test_recomputed_output_is_bitwise_equal(self):
        tensors, _, _ = make((8, 64, 17, 17), torch.float32, torch.channels_last, residual=False)
        kernels = kernels_of("cpu")
        y, stats, _ = kernels.batch_norm_act_forward(
            tensors["input"], None, None, tensors["weight"], tensors["bias"], None, None, True, 1e-5, "relu", False
        )
        assert torch.equal(y, kernels.batch_norm_act_apply(tensors["input"], stats, None, None, "relu", False)[0])

    def test_opcheck(self):
        """opcheck also compares the shapes and strides of the fake implementations."""
        namespace = torch.ops.fused_res_cpu
        for format, relu in itertools.product((torch.contiguous_format, torch.channels_last), (True, False)):
            tensors, running, grad = make((2, 5, 4, 3), torch.float32, format)
            x, residual, weight, bias = tensors.values()
            state, activation = list(running.values()), relu_or_identity(relu)
            args = (x, residual, None, weight, bias, *state, True, 1e-5, activation, relu)
            torch.library.opcheck(namespace.batch_norm_act_forward.default, args)
            _, stats, mask = namespace.batch_norm_act_forward(*args)
            torch.library.opcheck(namespace.batch_norm_stats.default, (x, weight, bias, *state, False, 1e-5))
            torch.library.opcheck(namespace.batch_norm_act_apply.default, (x, stats, None, None, activation, relu))
            torch.library.opcheck(namespace.batch_norm_act_apply.default, (x, stats, residual, stats, activation, relu))
            args = (x, residual, stats, weight, bias, *state, True, 1e-5, activation, relu)
            torch.library.opcheck(namespace.batch_norm_act_forward.default, args)
            mask = mask if relu else None
            for output_mask in ([True] * 6, [False, True, False, True, True, False]):
                pair = (grad, x, weight, stats, residual, None, stats, mask, True, False, output_mask)
                torch.library.opcheck(namespace.batch_norm_act_backward_pair.default, pair)
            for output_mask in ([True] * 4, [True, False, False, True]):
                backward = (grad, x, weight, stats, mask, True, activation, output_mask)
                torch.library.opcheck(namespace.batch_norm_act_backward.default, backward)
            for residual_stats in (None, stats):
                inference = (x.clone(), residual, residual_stats, weight, bias, *state, 1e-5, activation)
                torch.library.opcheck(namespace.batch_norm_act_inference_.default, inference)
            grad = grad.contiguous(memory_format=format)
            torch.library.opcheck(namespace.add_masked_.default, (x.clone(), grad, mask))
            torch.library.opcheck(
                namespace.update_running_stats.default, ([state[0].clone()], [state[1].clone()], [stats], [0.1])
            )

    def test_operators_check_their_arguments(self):
        kernels = kernels_of("cpu")
        tensors, running, grad = make((2, 5, 4, 3), torch.float32)
        x, residual, weight, bias = tensors.values()
        rest = weight, bias, *running.values(), False, 1e-5, "relu", False
        stats = kernels.batch_norm_stats(x, weight, bias, *running.values(), False, 1e-5)
        with pytest.raises(ValueError, match="residual_stats: expected a residual"):
            kernels.batch_norm_act_forward(x, None, stats, *rest)
        for bad in (stats[:4], stats[:, :4], stats.double()):
            with pytest.raises(ValueError, match=r"residual_stats: expected \(5, 5\) of Float"):
                kernels.batch_norm_act_forward(x, residual, bad, *rest)
        for bad, error in ((residual[:1], ValueError), (residual.double(), TypeError)):
            with pytest.raises(error, match="residual: expected the"):
                kernels.batch_norm_act_backward_pair(
                    grad, x, weight, stats, bad, weight, stats, None, True, True, [True] * 6
                )

    def test_every_operator_matches_the_reference(self):
        kernels = [kernels_of(name) for name in ("cpu", "reference")]
        for format in (torch.contiguous_format, torch.channels_last):
            tensors, running, grad = make((3, 13, 6, 5), torch.float64, format)
            x, residual, weight, bias = tensors.values()
            state = list(running.values())
            found = []
            for k in kernels:
                y, stats, mask = k.batch_norm_act_forward(
                    x, residual, None, weight, bias, *state, True, 1e-5, "relu", True
                )
                into = x.clone()
                k.add_masked_(into, grad.contiguous(memory_format=format), mask)
                inference = x.clone()
                k.batch_norm_act_inference_(inference, residual, None, weight, bias, *state, 1e-5, "relu")
                masked = k.batch_norm_act_backward(grad, x, weight, stats, mask, True, "identity", [True] * 4)
                pair = run_pair(k, *make_pair((3, 13, 6, 5), torch.float64, format), (True, False), True)
                found.append([y, stats, mask, into, inference, *masked, *pair[:2], *pair[2].values()])
            for ours, reference in zip(*found, strict=True):
                torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_propagate_as_in_pytorch(bad, backend):
    for training, scaled, where in itertools.product((True, False), (True, False), ("input", "residual")):
        tensors, running, grad = make((3, 4, 5, 5), torch.float32, scaled=scaled)
        tensors[where][1, 2, 3, 3] = bad
        outcomes = []
        for function in (lambda **kw: batch_norm_act(**kw, backend=backend), stock):
            mine = {k: t.clone().requires_grad_() for k, t in tensors.items()}
            state = {k: t.clone() for k, t in running.items()}
            y = function(**mine, **state, training=training, activation="relu")
            outcomes.append([y, *gradients(y, mine, grad).values()])
        for ours, theirs in zip(*outcomes, strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    for training in (True, False):
        tensors, running, grad = make((0, 4, 5, 5), torch.float32)
        mine = {k: t.clone().requires_grad_() for k, t in tensors.items()}
        state = {k: t.clone() for k, t in running.items()}
        y = batch_norm_act(**mine, **state, training=training, backend=backend)
        assert y.shape == (0, 4, 5, 5)
        assert all(not g.isnan().any() and not g.any() for g in gradients(y, mine, grad).values())
        assert all(torch.equal(state[k], running[k]) for k in state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [True, False])
def test_gradient_of_a_single_tensor(scaled, backend):
    tensors, running, grad = make((3, 4, 5, 5), torch.float64, scaled=scaled)
    leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
    expected = gradients(batch_norm_act(**leaves, **running, training=True, backend=backend), leaves, grad)
    for name in tensors:
        one = tensors | {name: tensors[name].clone().requires_grad_()}
        y = batch_norm_act(**one, **running, training=True, backend=backend)
        (found,) = torch.autograd.grad(y, [one[name]], grad)
        torch.testing.assert_close(found, expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [True, False])
def test_torch_compile(scaled, backend):
    torch._dynamo.reset()
    tensors, running, grad = make((3, 6, 5, 5), torch.float64, torch.channels_last, scaled=scaled)

    def function(**tensors):
        return batch_norm_act(**tensors, training=True, backend=backend)

    outcomes = []
    for f in (function, torch.compile(function, fullgraph=True)):
        mine = {k: t.clone().requires_grad_() for k, t in tensors.items()}
        state = {k: t.clone() for k, t in running.items()}
        y = f(**mine, **state)
        outcomes.append([y, *gradients(y, mine, grad).values(), *state.values()])
    for eager, compiled in zip(*outcomes, strict=True):
        torch.testing.assert_close(eager, compiled)


@pytest.mark.parametrize("backend", BACKENDS)
def test_function_transforms(backend):
    """torch.func runs the reference; per-sample gradients and forward mode agree with reverse mode."""
    tensors, running, _ = make((3, 4, 5, 5), torch.float64, residual=False)
    x, weight, bias = tensors["input"], tensors["weight"], tensors["bias"]
    state = running["running_mean"], running["running_var"]

    def loss(weight, x):
        return batch_norm_act(x, *state, weight, bias, backend=backend).sin().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x.unsqueeze(1))
    torch.testing.assert_close(per_sample.sum(0), torch.func.grad(loss)(weight, x))
    _, tangent = torch.func.jvp(lambda w: loss(w, x), (weight,), (weight,))
    torch.testing.assert_close(tangent, torch.func.grad(loss)(weight, x) @ weight)

    scaled, *_ = make((3, 4, 5, 5), torch.float64, scaled=True)
    scale = scaled.pop("residual_scale")

    def loss_of_scale(scale):
        return batch_norm_act(**scaled, **running, residual_scale=scale, backend=backend).sin().sum()

    _, tangent = torch.func.jvp(loss_of_scale, (scale,), (scale,))
    (kernel_grad,) = torch.autograd.grad(loss_of_scale(scale.requires_grad_()), scale)
    torch.testing.assert_close(tangent, kernel_grad @ scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [True, False])
def test_running_statistics_are_not_saved_and_saved_tensors_not_written(scaled, backend):
    tensors, running, grad = make((3, 4, 5, 5), torch.float32, scaled=scaled)
    mine = {k: t.clone().requires_grad_() for k, t in tensors.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = batch_norm_act(**mine, **running, training=True, backend=backend)
    addresses = {t.data_ptr() for t in running.values()}
    assert saved and not addresses & {t.data_ptr() for t in saved}
    copies, grad_copy = [t.clone() for t in saved], grad.clone()
    first = torch.autograd.grad(y, mine.values(), grad, retain_graph=True)
    second = torch.autograd.grad(y, mine.values(), grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(saved, copies, strict=True)) and torch.equal(grad, grad_copy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_is_saved_only_if_its_scale_requires_grad(backend):
    tensors, running, grad = make((3, 4, 5, 5), torch.float64, scaled=True)
    for requires_grad in (True, False):
        mine = {k: t.clone().requires_grad_(requires_grad or "residual_" not in k) for k, t in tensors.items()}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
            y = batch_norm_act(**mine, **running, training=True, backend=backend)
        assert (mine["residual"].data_ptr() in saved) == requires_grad
        leaves = [t for t in mine.values() if t.requires_grad]
        y_stock = stock(**mine, **running, training=True, activation="relu")
        torch.testing.assert_close(torch.autograd.grad(y, leaves, grad), torch.autograd.grad(y_stock, leaves, grad))


X = torch.randn(2, 3, 4, 4)
V = torch.ones(3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.randn(3)}, ValueError, "input must have 2 to 5 dimensions"),
        ({"input": X.int()}, TypeError, "input's dtype must be one of float32"),
        ({"input": "x"}, TypeError, "input must be a torch.Tensor"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have the shape \(3,\), got \(4,\)"),
        ({"running_var": torch.ones(2)}, ValueError, "running_var must have the shape"),
        ({"running_var": None}, ValueError, "running_mean and running_var must both"),
        ({"running_mean": None, "running_var": None, "training": False}, ValueError, "are required when training"),
        ({"bias": torch.ones(3, dtype=torch.float64)}, TypeError, "bias must be of input's dtype"),
        ({"residual": torch.randn(2, 3, 4, 5)}, ValueError, "residual must have input's shape"),
        ({"residual": torch.randn(2, 3, 1, 1)}, ValueError, "residual must have input's shape"),
        ({"residual": X.double()}, TypeError, "residual must have input's dtype"),
        ({"residual": X.to("meta")}, ValueError, "residual must be on cpu"),
        ({"residual": X, "residual_scale": V}, ValueError, "residual_scale and residual_shift must both be given"),
        ({"residual": X, "residual_shift": V}, ValueError, "residual_scale and residual_shift must both be given"),
        ({"residual_scale": V, "residual_shift": V}, ValueError, "residual_shift require a residual"),
        (
            {"residual": X, "residual_scale": torch.ones(4), "residual_shift": V},
            ValueError,
            r"residual_scale must have the shape \(3,\), got \(4,\)",
        ),
        (
            {"residual": X, "residual_scale": V, "residual_shift": V.double()},
            TypeError,
            "residual_shift must be of input's dtype",
        ),
        (
            {"residual": X, "residual_scale": V.to("meta"), "residual_shift": V},
            ValueError,
            "residual_scale must be on cpu",
        ),
        ({"input": torch.randn(1, 3, 1, 1)}, ValueError, "Expected more than 1 value per channel when training"),
        ({"activation": "gelu"}, ValueError, "activation must be one of"),
        ({"backend": "tpu"}, ValueError, "backend must be one of"),
        ({"backend": ["cpu"]}, ValueError, "backend must be one of"),
        ({"momentum": "much"}, TypeError, "momentum must be a number"),
        ({"momentum": float("nan")}, ValueError, "momentum must be finite"),
        ({"eps": None}, TypeError, "eps must be a number, got None"),
        ({"eps": -1e-5}, ValueError, "eps must be finite and non-negative"),
        ({"eps": float("nan")}, ValueError, "eps must be finite and non-negative"),
        ({"eps": 0.0}, ValueError, "eps must be positive when training"),
        ({"training": "yes"}, TypeError, "training must be True or False, got 'yes'"),
        ({"running_mean": [0.0] * 3}, TypeError, "running_mean must be a torch.Tensor, got list"),
        ({"weight": torch.nn.BatchNorm2d(3)}, TypeError, "weight must be a torch.Tensor, got BatchNorm2d"),
        ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor, got float"),
        ({"residual": 1.0}, TypeError, "residual must be a torch.Tensor, got float"),
        (
            {"residual": X, "residual_scale": [1.0] * 3, "residual_shift": V},
            TypeError,
            "residual_scale must be a torch.Tensor, got list",
        ),
        ({"process_group": "world"}, TypeError, "process_group must be a torch.distributed.ProcessGroup or None"),
        (
            {"input": X.to_sparse()},
            TypeError,
            "must be a strided tensor, got a tensor of layout torch.sparse_coo",
        ),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_invalid_arguments_raise_before_anything_is_written(change, error, message, backend):
    mean, var = torch.zeros(3), torch.ones(3)
    arguments = {"input": X, "running_mean": mean, "running_var": var, "training": True, "backend": backend} | change
    with pytest.raises(error, match=message):
        batch_norm_act(**arguments)
    assert not mean.any() and torch.equal(var, torch.ones(3))


def test_packed_mask_has_the_shape_of_the_fake():
    for case, format in CASES:
        mask = (torch.randn(SHAPES[case]) > 0).contiguous(memory_format=format)
        packed = pack_mask(mask)
        assert tuple(packed.shape) == memory_format.relu_mask_shape(mask)
        assert torch.equal(unpack_mask(packed, mask), mask)
