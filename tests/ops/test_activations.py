"""Activations of the norm pass but ReLU and identity: ReLU6, leaky ReLU and SiLU, on every backend.

The accuracy criterion is an error against float64 of at most twice that of stock PyTorch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import fused_res
from fused_res import BlockSpec, UnitSpec, _extension
from fused_res.backends import implicit_gemm
from fused_res.backends.pieces import with_all_activations
from fused_res.dispatch import Problem, select_training
from fused_res.dispatch.backend import Kernels
from fused_res.functional import batch_norm_act, conv_bias_act
from fused_res.ops.checks import ACTIVATIONS, RELU_OR_IDENTITY
from tests.ops.test_batch_norm_act import DTYPES, SHAPES, backend_cases, kernels_of, make
from tests.support import batch_norm_checks, stock_pytorch
from tests.support.batch_norm_checks import Tensors, gradients
from tests.support.cpu_backends import BACKENDS, FAST_BACKENDS

_C = _extension._module
OTHERS = ACTIVATIONS[len(RELU_OR_IDENTITY) :]
SLOPE = 0.2


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def isa(request):
    """Run the CPU kernels of one instruction set."""
    if not _extension.loaded:
        pytest.skip(_extension.unavailable_reason)
    before = _C.cpu_isa()
    try:
        _C.set_cpu_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _C.set_cpu_isa(before)


def zero_near_kinks(activation: str, tensors: Tensors, running: Tensors, grad: Tensor, training: bool) -> Tensor:
    """Return `grad` with zeros where the derivative depends on the rounding of the activation's input."""
    z, *_ = batch_norm_checks.float64_reference(tensors, running, grad, training, None)
    # Stock PyTorch rounds z to the dtype, which moves it by up to 6 eps / 2 near the kink at 6.
    kinks = {"relu6": ((0, 0.0), (6, 6.0)), "leaky_relu": ((0, 0.0),), "silu": ()}[activation]
    for kink, ulps in kinks:
        grad = grad.masked_fill((z - kink).abs() < 1e-3 + ulps * torch.finfo(grad.dtype).eps, 0)
    return grad


def check(case: str, dtype: torch.dtype, format: torch.memory_format, training: bool, activation: str, backend: str):
    tensors, running, grad = make(SHAPES[case], dtype, format, residual=False)
    tensors["weight"] = 3 * tensors["weight"]  # some values exceed 6
    grad = zero_near_kinks(activation, tensors, running, grad, training)
    batch_norm_checks.check_batch_norm_act(tensors, running, grad, training, activation, backend, negative_slope=SLOPE)


def precision_cases() -> Iterator[Any]:
    """Return all cases; float64 and float16, whose code paths the other dtypes share, in every shape are `full`."""
    for case in backend_cases():
        shape, _, dtype, _ = case.values
        few = dtype in (torch.float32, torch.bfloat16) or shape in ("image", "matrix")
        yield case if few else pytest.param(*case.values, id=case.id, marks=pytest.mark.full)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("case", "format", "dtype", "backend"), precision_cases())
def test_precision(case, format, dtype, training, backend):
    for activation in OTHERS:
        check(case, dtype, format, training, activation, backend)


def test_precision_of_every_instruction_set(isa):
    cases = itertools.product(("image", "one channel", "matrix"), DTYPES, (True, False), OTHERS)
    for case, dtype, training, activation in cases:
        format = torch.channels_last if case == "image" else torch.contiguous_format
        check(case, dtype, format, training, activation, "cpu")
        check(case, dtype, torch.contiguous_format, training, activation, "cpu")


def identity_norm(z: Tensor) -> dict[str, Tensor | float | bool]:
    """Return the arguments of a norm whose output is exactly its input."""
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    channels = z.shape[1]
    return {
        "running_mean": torch.zeros(channels, dtype=dtype),
        "running_var": torch.ones(channels, dtype=dtype),
        "eps": 0.0,
    }


def expected_derivative(z: Tensor, activation: str) -> Tensor:
    """Return the derivative of :mod:`fused_res.ops.schemas`, by PyTorch's scalar formulas."""
    if activation == "relu6":
        return torch.where((z <= 0) | (z >= 6), 0.0, 1.0)
    if activation == "leaky_relu":
        return torch.where(z > 0, 1.0, SLOPE)
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", OTHERS)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_kinks_infinities_and_nan(format, activation, backend):
    """The values are those of PyTorch's functions, in full vectors and in tails; so are the derivatives.

    PyTorch's own derivative of ReLU6 at NaN is 0 in vectors and 1 elsewhere; it is 1 here, as that of ReLU.
    """
    inf, nan, below, above = math.inf, math.nan, 6 - 2**-22, 6 + 2**-21
    special = torch.tensor([0.0, -0.0, 6.0, below, above, 1e-30, -1e-30, inf, -inf, nan, 1e4, -1e4, 95.0, -95.0, 3.0])
    x = special.repeat(3 * 37 * 5)[: 3 * 37 * 5 * 3].view(3, 37, 5, 3).contiguous(memory_format=format)
    x.requires_grad_()
    y = batch_norm_act(x, **identity_norm(x), activation=activation, negative_slope=SLOPE, backend=backend)
    grad = torch.linspace(1, 2, x.numel()).view(x.shape)
    (dx,) = torch.autograd.grad(y, x, grad)
    z = x.detach()
    torch.testing.assert_close(y, stock_pytorch.activate(z, activation, SLOPE), equal_nan=True)
    expected = grad * expected_derivative(z, activation)
    if backend == "cuda" and activation == "relu6":  # in pieces, with ATen's derivative
        dx, expected = (t.masked_fill(z.isnan(), 0) for t in (dx, expected))
    exact = {"rtol": 0, "atol": 0} if activation != "silu" else {}
    torch.testing.assert_close(dx, expected, equal_nan=True, **exact)
    if activation != "relu6":
        (theirs,) = torch.autograd.grad(stock_pytorch.activate(x, activation, SLOPE), x, grad)
        assert torch.equal(dx.isnan(), theirs.isnan())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 87.0), (torch.float64, 708.0)], ids=str)
def test_exponential_is_accurate_over_the_whole_range(dtype, limit, isa):
    """SiLU for negative arguments is z * exp(z) up to rounding, so its relative error is that of the exponential."""
    steps = torch.cat([torch.linspace(-limit, limit, 1_000_001, dtype=torch.float64), torch.logspace(-30, 0, 4001)])
    z = torch.cat([steps, -torch.logspace(-30, 0, 4001, dtype=torch.float64)]).to(dtype).view(-1, 1)
    z = z[: z.shape[0] // 8 * 8].view(-1, 8).requires_grad_()
    y = batch_norm_act(z, **identity_norm(z), activation="silu", backend="cpu")
    (dy,) = torch.autograd.grad(y.sum(), z)
    wide = z.detach().numpy().astype(numpy.longdouble)
    sigmoid = 1 / (1 + numpy.exp(-wide))
    ulps = 1 / torch.finfo(dtype).eps
    error = numpy.abs(y.detach().numpy() - wide * sigmoid)
    assert (error <= 3 / ulps * numpy.abs(wide * sigmoid)).all()
    derivative = sigmoid * (1 + wide * (1 - sigmoid))
    # PyTorch's formula multiplies the rounding error of 1 - s, which is 0 from z = 40 on, by z.
    assert (numpy.abs(dy.numpy() - derivative) <= (4 + numpy.clip(wide, 0, 40)) / ulps).all()


@pytest.mark.parametrize(("dtype", "overflow"), [(torch.float32, 88.8), (torch.float64, 709.9)], ids=str)
def test_exponential_overflows_and_underflows(dtype, overflow, isa):
    """Beyond the largest exponent, exp(-z) is infinity and SiLU is -0; exp of a large negative argument is 0."""
    z = torch.tensor([[-overflow, -2 * overflow, -1e6, -1e30, 2 * overflow, 1e6, 1e30, 120.0]], dtype=dtype)
    y = batch_norm_act(z, **identity_norm(z), activation="silu", backend="cpu")
    assert torch.equal(y, torch.where(z < 0, 0, z))


@pytest.mark.parametrize("backend", [name for name in FAST_BACKENDS if name != "cuda"])  # simulated: takes seconds
@pytest.mark.parametrize("activation", OTHERS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_first_and_second_derivatives(training, activation, backend):
    tensors, running, grad = make((4, 3, 3, 2), torch.float64, residual=False)
    leaves = [t.requires_grad_() for t in tensors.values() if t is not None]

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        norm = running["running_mean"].clone(), running["running_var"].clone(), weight, bias
        options = {"training": training, "activation": activation, "negative_slope": SLOPE, "backend": backend}
        return batch_norm_act(x, *norm, **options)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    # With create_graph, the first derivative is computed by plain PyTorch.
    kernel_grads = torch.autograd.grad(function(*leaves), leaves, grad)
    graph_grads = torch.autograd.grad(function(*leaves), leaves, grad, create_graph=True)
    for kernel_grad, graph_grad in zip(kernel_grads, graph_grads, strict=True):
        torch.testing.assert_close(graph_grad, kernel_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", OTHERS)
def test_torch_compile_and_function_transforms(activation, backend):
    torch._dynamo.reset()
    tensors, running, grad = make((3, 6, 5, 5), torch.float64, torch.channels_last, residual=False)

    def function(state: Tensors, **tensors: Tensor) -> Tensor:
        options = {"activation": activation, "negative_slope": SLOPE, "backend": backend}
        return batch_norm_act(**tensors, **state, training=True, **options)

    outcomes = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        mine = {k: t.clone().requires_grad_() for k, t in tensors.items() if t is not None}
        state = {k: t.clone() for k, t in running.items()}
        y = f(state, **mine)
        outcomes.append([y, *gradients(y, mine, grad).values(), *state.values()])
    for eager, compiled in zip(*outcomes, strict=True):
        torch.testing.assert_close(eager, compiled)

    def loss(weight: Tensor) -> Tensor:  # torch.func runs the reference
        options = {"activation": activation, "negative_slope": SLOPE, "backend": backend}
        return (batch_norm_act(**tensors | {"weight": weight}, **running, **options) * grad).sum()

    leaf = tensors["weight"].clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(tensors["weight"]), torch.autograd.grad(loss(leaf), leaf)[0])


def operator_calls(activation: str) -> dict[str, tuple]:
    """Return the arguments of every operator with an activation."""
    tensors, running, grad = make((2, 13, 4, 3), torch.float32, residual=False)
    x, _, weight, bias = tensors.values()
    vectors = weight, bias, *running.values()
    stats = kernels_of("reference").batch_norm_stats(x, *vectors, False, 1e-5)
    sums = kernels_of("reference").batch_norm_sums(grad, x, stats, None, activation, None, None, SLOPE)
    return {
        "batch_norm_act_forward": (x, None, None, *vectors, True, 1e-5, activation, False, SLOPE),
        "batch_norm_act_apply": (x, stats, None, None, activation, False, SLOPE),
        "batch_norm_act_inference_": (x.clone(), None, None, *vectors, 1e-5, activation, SLOPE),
        "batch_norm_act_backward": (grad, x, weight, stats, None, True, activation, [True] * 4, SLOPE),
        "batch_norm_sums": (grad, x, stats, None, activation, None, None, SLOPE),
        "batch_norm_act_dx": (grad, x, stats, None, activation, sums, 24, SLOPE),
    }


def run_operators(kernels: Kernels, activation: str) -> list[Tensor]:
    results = []
    for name, arguments in operator_calls(activation).items():
        result = getattr(kernels, name)(*arguments)
        results += [arguments[0]] if result is None else result if isinstance(result, (tuple, list)) else [result]
    return [result for result in results if result.numel()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", OTHERS)
def test_operators_match_the_reference(activation, backend):
    found, expected = (run_operators(kernels_of(name), activation) for name in (backend, "reference"))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(not _extension.loaded, reason=_extension.unavailable_reason or "")
@pytest.mark.parametrize("activation", OTHERS)
def test_opcheck(activation):
    for name, arguments in operator_calls(activation).items():
        torch.library.opcheck(getattr(torch.ops.fused_res_cpu, name).default, arguments)
        if activation != "leaky_relu":  # without the last argument, which has a default
            torch.library.opcheck(getattr(torch.ops.fused_res_cpu, name).default, arguments[:-1])


@pytest.mark.parametrize("activation", OTHERS)
def test_activation_in_pieces_matches_the_fused_one(activation):
    """A backend whose kernels have ReLU and identity only runs ATen's activation after the norm."""

    def without_activation(name: str, *arguments: object) -> object:
        assert not set(OTHERS) & {a for a in arguments if isinstance(a, str)}, name
        return getattr(reference, name)(*arguments)

    reference = kernels_of("reference")
    limited = {name: functools.partial(without_activation, name) for name in operator_calls(activation)}
    pieces = with_all_activations(Kernels(**(vars(reference) | limited | {"activations": RELU_OR_IDENTITY})))
    for ours, theirs in zip(run_operators(pieces, activation), run_operators(reference, activation), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
    for ours, theirs in zip(run_operators(pieces, "relu"), run_operators(reference, "relu"), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("activation", OTHERS)
def test_fused_convolution_kernels_are_not_selected(activation):
    """Their operand prologues have no activation but ReLU."""
    algorithms = implicit_gemm.algorithms("triton")
    shape, weight, ones = (2, 64, 8, 8), (64, 64, 1, 1), (1, 1)
    problem = Problem("forward", shape, weight, ones, (0, 0), ones, 1, torch.float16, "cuda", True)
    fused = select_training(algorithms, problem, "fused")
    assert fused.forward.algorithm.fused and fused.fused_backward
    other = select_training(algorithms, problem._replace(relu_norms=False), "fused")
    assert not any(selection.algorithm.fused for selection in other)


X, V = torch.randn(2, 3, 4, 4), torch.ones(3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_invalid_arguments_raise(backend):
    norm = {"running_mean": 0 * V, "running_var": V, "training": True, "backend": backend}
    with pytest.raises(
        ValueError, match=r"activation must be one of \('identity', 'relu'\) with a residual, got 'silu'"
    ):
        batch_norm_act(X, residual=X, activation="silu", **norm)
    with pytest.raises(ValueError, match="activation must be one of .*'silu'.*, got 'gelu'"):
        batch_norm_act(X, activation="gelu", **norm)
    with pytest.raises(TypeError, match="negative_slope must be a number, got '0.1'"):
        batch_norm_act(X, activation="leaky_relu", negative_slope="0.1", **norm)
    with pytest.raises(ValueError, match="negative_slope must be finite, got nan"):
        batch_norm_act(X, activation="leaky_relu", negative_slope=math.nan, **norm)
    with pytest.raises(ValueError, match=r"activation must be one of \('identity', 'relu'\), got 'silu'"):
        conv_bias_act(X, torch.ones(3, 3, 1, 1), activation="silu", backend=backend)
    assert not norm["running_mean"].any() and torch.equal(norm["running_var"], V)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_reject_a_residual_and_a_mask(backend):
    """Where only ReLU and identity are defined, another activation is an error that names the argument."""
    kernels, vectors = kernels_of(backend), (V, V, V, V)
    stats = torch.ones(5, 3)
    mask = torch.zeros(kernels_of("reference").batch_norm_act_apply(X, stats, None, None, "relu", True)[1].shape)
    mask = mask.to(torch.uint8)
    for call in (
        lambda: kernels.batch_norm_act_forward(X, X, None, *vectors, False, 1e-5, "silu", False),
        lambda: kernels.batch_norm_act_forward(X, None, None, *vectors, False, 1e-5, "silu", True),
        lambda: kernels.batch_norm_act_apply(X, stats, X, None, "relu6", False),
        lambda: kernels.batch_norm_act_inference_(X.clone(), X, None, *vectors, 1e-5, "silu"),
        lambda: kernels.batch_norm_act_backward(X, X, V, stats, mask, True, "silu", [True] * 4),
        lambda: kernels.batch_norm_sums(X, X, stats, mask, "leaky_relu", None, None),
        lambda: kernels.batch_norm_sums(X, X, stats, None, "silu", X, stats),
        lambda: kernels.batch_norm_act_dx(X, X, stats, mask, "silu", None, 32),
    ):
        with pytest.raises(ValueError, match="activation"):
            call()


def test_specifications():
    for activation in ACTIVATIONS:
        spec = BlockSpec((UnitSpec(activation=activation, negative_slope=0.25), UnitSpec()), "identity")
        assert BlockSpec.decode(*spec.encode()) == spec
    with pytest.raises(ValueError, match="activation must be one of .* after the addition of a shortcut, got 'silu'"):
        BlockSpec((UnitSpec(activation="silu"),), "identity")
    with pytest.raises(ValueError, match="activation must be one of .*, got 'gelu'"):
        UnitSpec(activation="gelu")
    with pytest.raises(ValueError, match="negative_slope must be finite, got inf"):
        UnitSpec(activation="leaky_relu", negative_slope=math.inf)
    with pytest.raises(ValueError, match=r"activation must be one of \('identity', 'relu'\), got 'relu6'"):
        _ = UnitSpec(activation="relu6").relu


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_modules(activation):
    norm = fused_res.nn.BatchNormAct2d(3, activation=activation)
    unit = fused_res.nn.ConvBNAct2d(3, 3, activation=activation)
    x = torch.randn(2, 3, 5, 5)
    expected = torch.nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, True)
    torch.testing.assert_close(norm(x), stock_pytorch.activate(expected, activation))
    found = unit(x)
    unit.bn.reset_running_stats()
    expected = stock_pytorch.activate(unit.bn(unit.conv(x)), activation)
    torch.testing.assert_close(found, expected)
