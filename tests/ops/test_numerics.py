"""Ill-conditioned inputs: accuracy of batch statistics, outputs and gradients.

The accuracy criterion is an error against float64 of at most twice that of stock PyTorch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fused_res
from fused_res import BlockSpec, UnitSpec
from fused_res.backends import registry
from fused_res.functional import batch_norm_act, conv_bias_act, residual_block
from fused_res.models import cifar_resnet
from fused_res.testing import assert_within_stock_error
from tests.support import batch_norm_checks
from tests.support import stock_pytorch as stock
from tests.support.cpu_backends import BACKENDS, FAST_BACKENDS

SHAPE = (8, 3, 17, 19)
FORMATS = (torch.contiguous_format, torch.channels_last)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_of_10000() -> Tensor:
    return randn(*SHAPE) + 1e4


def outlier(*values: float) -> Tensor:
    """Return normal deviates with one outlier per channel, in the middle."""
    x = randn(*SHAPE)
    x[3, :, 5, 7] = torch.tensor(values, dtype=x.dtype)
    return x


def outlier_first(*values: float) -> Tensor:
    """Return normal deviates whose first value per channel, from which kernels choose the pivot, is an outlier."""
    x = randn(*SHAPE)
    x[0, :, 0, 0] = torch.tensor(values, dtype=x.dtype)
    return x


def border() -> Tensor:
    """Return images whose first rows are a black border, far below all other pixels."""
    x = randn(*SHAPE) + 1000
    x[:, :, :3] = 0
    return x


def left_border() -> Tensor:
    """Return rows as long as a chunk, whose first values are far from the others.

    With such a value as the pivot of shifted sums, the variance loses digits.
    """
    x = randn(1, 3, 64, 2048) + 1000
    x[..., :15] = 0
    return x


def per_image_offsets() -> Tensor:
    """Return nearly constant images with very different means."""
    return 1e-3 * randn(*SHAPE) + 100 * randn(SHAPE[0], 1, 1, 1, seed=1)


def scaled(by: float) -> Callable[[], Tensor]:
    return lambda: by * randn(*SHAPE)


def constant() -> Tensor:
    return torch.tensor([0.1, 100.0, -3.3e4], dtype=torch.float64).view(1, 3, 1, 1).expand(SHAPE).clone()


def one_differs() -> Tensor:
    """Return channels that are constant except for one value."""
    x = constant()
    x[3, :, 5, 7] *= 1.01
    return x


#: Name -> float64 input, dtypes and values of eps. Beyond 1e19 squares overflow in float32, also in stock PyTorch.
ALL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64, torch.bfloat16)
CASES: dict[str, tuple[Callable[[], Tensor], tuple[torch.dtype, ...], tuple[float, ...]]] = {
    "mean 1e4": (mean_of_10000, ALL, (1e-5,)),
    "an outlier": (lambda: outlier(1e6, -1e10, 1e3), WIDE, (1e-5,)),
    "an outlier, 16 bits": (lambda: outlier(6e4, -6e4, 1e3), (torch.float16,), (1e-5,)),
    "an outlier first": (lambda: outlier_first(1e6, -1e10, 1e3), WIDE, (1e-5,)),
    "a border": (border, ALL, (1e-5,)),
    "a left border": (left_border, (torch.float32,), (1e-5,)),
    "per-image offsets": (per_image_offsets, (torch.float32, torch.float64), (1e-5, 1e-12)),
    "constant": (constant, ALL, (1e-5, 1e-3, 1e-12, 1e-30)),
    "one differs": (one_differs, ALL, (1e-5, 1e-12)),
    "small": (scaled(1e-10), WIDE, (1e-5, 1e-20)),
    "tiny variance": (scaled(1e-18), WIDE, (1e-5, 1e-36)),
    "subnormal variance": (scaled(1e-22), WIDE, (1e-5, 1e-30)),
    "subnormal": (scaled(1e-41), WIDE, (1e-5, 1e-30)),
    "subnormal, 16 bits": (scaled(2e-7), (torch.float16,), (1e-5, 1e-14)),
    "large": (scaled(1e15), WIDE, (1e-5,)),
    "near float16's limit": (lambda: randn(*SHAPE).clamp(-4, 4) * 1.6e4, (torch.float16,), (1e-5,)),
}
#: The simulated and the interpreted kernels take seconds, so they run few of the cases, in few dtypes.
TRITON = ("mean 1e4", "an outlier first", "constant")
SLOW = {
    "cuda": (torch.float32, torch.bfloat16),
    "triton": (torch.float32,),
}


def cases() -> list[object]:
    return [
        pytest.param(case, dtype, eps, backend, id=f"{case}-{dtype}-{eps}-{backend}")
        for case, (_, dtypes, all_eps) in CASES.items()
        for dtype, eps, backend in itertools.product(dtypes, all_eps, BACKENDS)
        if dtype in SLOW.get(backend, dtypes) and not (backend == "triton" and (eps != 1e-5 or case not in TRITON))
    ]


def operands(
    x: Tensor, dtype: torch.dtype, weight: float = 1.0
) -> tuple[batch_norm_checks.Tensors, batch_norm_checks.Tensors]:
    """Return tensors without a residual, and running statistics, for `check_batch_norm_act`."""
    channels = x.shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors: batch_norm_checks.Tensors = {
        "input": x.to(dtype),
        "residual": None,
        "weight": (weight * (randn(channels, seed=1) + 2)).to(wide),
        "bias": randn(channels, seed=2).to(wide),
    }
    return tensors, {"running_mean": torch.zeros(channels, dtype=wide), "running_var": torch.ones(channels, dtype=wide)}


@pytest.mark.parametrize(("case", "dtype", "eps", "backend"), cases())
def test_training_with_ill_conditioned_input(case: str, dtype: torch.dtype, eps: float, backend: str) -> None:
    tensors, running = operands(CASES[case][0](), dtype)
    grad = randn(*tensors["input"].shape, seed=3).to(dtype)
    for format in FORMATS if backend != "triton" else FORMATS[1:]:
        tensors["input"] = tensors["input"].contiguous(memory_format=format)
        batch_norm_checks.check_batch_norm_act(tensors, running, grad, True, "identity", backend, eps=eps, momentum=1.0)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_small_weights_and_gradients(backend: str) -> None:
    for weight, grad in ((1e-40, 1.0), (1e-30, 1e-10), (1.0, 1e-40), (1.0, 1e34), (1e30, 1.0)):
        tensors, running = operands(randn(*SHAPE) + 3, torch.float32, weight)
        dy = (grad * randn(*SHAPE, seed=3)).float()
        for training, residual in itertools.product((True, False), (None, randn(*SHAPE, seed=4).float())):
            batch_norm_checks.check_batch_norm_act(
                tensors | {"residual": residual}, running, dy, training, "identity", backend
            )


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_evaluation_with_extreme_running_statistics(backend: str) -> None:
    """Variances of zero or subnormal, means far from all values."""
    for var, mean, eps in itertools.product((0.0, 1e-42, 1e-10, 1e10), (0.0, 1e4, -1e10, 1e-42), (1e-5, 1e-12)):
        tensors, running = operands(randn(*SHAPE), torch.float32)
        running = {"running_mean": torch.full((3,), mean), "running_var": torch.full((3,), var)}
        for format, activation in itertools.product(FORMATS, ("relu", "identity")):
            tensors["input"] = tensors["input"].contiguous(memory_format=format)
            dy = randn(*SHAPE, seed=3).float()
            batch_norm_checks.check_batch_norm_act(tensors, running, dy, False, activation, backend, eps=eps)


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 1e-12])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_constant_channel_is_normalized_to_its_bias(backend: str, eps: float) -> None:
    """The variance is exactly 0, for any number of merged chunks."""
    for dtype, format in itertools.product(ALL, FORMATS):
        tensors, running = operands(constant().repeat(4, 1, 3, 3), dtype)
        x = tensors["input"].contiguous(memory_format=format)
        y = batch_norm_act(
            x, *running.values(), tensors["weight"], tensors["bias"], None, True, 1.0, eps, "identity", backend=backend
        )
        assert not running["running_var"].any(), dtype
        assert torch.equal(running["running_mean"], x[0, :, 0, 0].to(running["running_mean"].dtype))
        expected = tensors["bias"].view(1, -1, 1, 1).expand(y.shape).to(dtype)
        assert torch.equal(y, expected)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_more_values_per_channel_than_float32_can_count(format: torch.memory_format) -> None:
    """Compare statistics of 2^24 + 2^20 values per channel with stock PyTorch and with float64 sums."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((17, 2, 1024, 1024), generator=generator).add_(torch.tensor([1.0, 1000.0]).view(1, 2, 1, 1))
    x = x.contiguous(memory_format=format)
    var, mean = (torch.stack(list(v)).double() for v in zip(*[moments(x[:, c]) for c in range(2)], strict=True))
    found = {}
    for name, function in (("ours", batch_norm_act), ("stock", stock.batch_norm_act)):
        state = torch.zeros(2), torch.ones(2)
        options = {"backend": "cpu"} if name == "ours" and "cpu" in FAST_BACKENDS else {}
        with torch.no_grad():
            y = function(x, *state, None, None, None, training=True, momentum=1.0, activation="identity", **options)
        found[name] = (*state, y[-1, :, -8:].clone())
        del y
    exact = (x[-1, :, -8:].double() - mean.view(2, 1, 1)) / (var.view(2, 1, 1) + 1e-5).sqrt()
    for ours, theirs, reference in zip(found["ours"], found["stock"], (mean, var, exact), strict=True):
        assert_within_stock_error("running_mean, running_var, output", ours, theirs, reference)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return variance and mean in float64, summed one image at a time."""
    mean = sum(part.double().sum() for part in x) / x.numel()
    return sum((part.double() - mean).square().sum() for part in x) / (x.numel() - 1), mean


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_in_running_statistics_match_stock(bad: float, backend: str) -> None:
    for format, dtype, where in itertools.product(
        FORMATS, (torch.float32, torch.bfloat16), ((0, 1, 0, 0), (7, 2, 16, 18))
    ):
        if backend == "triton" and dtype == torch.bfloat16:
            continue
        tensors, running = operands(randn(*SHAPE), dtype)
        x = tensors["input"].contiguous(memory_format=format)
        x[where] = bad
        found = []
        for function, more in ((batch_norm_act, {"backend": backend}), (stock.batch_norm_act, {})):
            state = [t.clone() for t in running.values()]
            function(x, *state, None, None, None, training=True, activation="relu", **more)
            found.append(state)
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours.isfinite(), theirs.isfinite())
            assert torch.equal(ours[: where[1]].isfinite(), torch.ones(where[1], dtype=torch.bool))


# --- convolutions ---


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with fused_res.backends.use("auto", winograd=False):
        yield


def ill_conditioned_convolutions() -> dict[str, tuple[Tensor, Tensor]]:
    """Return name -> input and weight, in float64."""
    x, weight = randn(2, 24, 15, 14), randn(40, 24, 3, 3, seed=1) / 15
    spiked = x.clone()
    spiked[0, 3, 0, 0], spiked[1, 5, 7, 7] = 1e6, -1e10
    return {
        "mean 1e4": (x + 1e4, weight),
        "outliers": (spiked, weight),
        "tiny weights": (x, 1e-36 * weight),
        "subnormal weights": (x, 1e-41 * weight),
        "subnormal inputs": (1e-41 * x, weight),
        "large": (1e9 * x, 1e8 * weight),
        "zeros": (0 * x, weight),
    }


@pytest.mark.usefixtures("forced_kernels")
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("case", ill_conditioned_convolutions())
def test_ill_conditioned_convolution(case: str, backend: str, format: torch.memory_format) -> None:
    x, weight = (t.float().contiguous(memory_format=format) for t in ill_conditioned_convolutions()[case])
    bias, residual = randn(40, seed=2).float(), randn(2, 40, 15, 14, seed=3).float()
    for parts in ((None, None), (bias, residual)):
        wide = [None if t is None else t.double() for t in (x, weight, *parts)]
        ours = conv_bias_act(x, weight, *parts, padding=1, activation="identity", backend=backend)
        theirs = stock.conv_bias_act(x, weight, *parts, padding=1, activation="identity")
        exact = stock.conv_bias_act(*wide, padding=1, activation="identity")
        assert_within_stock_error(case, ours, theirs, exact)


@pytest.mark.skipif("cpu" not in FAST_BACKENDS, reason="needs the cpu backend")
@pytest.mark.parametrize("case", ill_conditioned_convolutions())
def test_statistics_from_convolution_epilogue(case: str) -> None:
    """The CPU kernels accumulate the statistics in their epilogue, with an arbitrary value as the pivot."""
    kernels = registry.resolve("cpu", torch.device("cpu"))
    x, weight = (t.float().contiguous(memory_format=torch.channels_last) for t in ill_conditioned_convolutions()[case])
    z, partials = kernels.conv_bn_stats(x, weight, None, None, False, (1, 1), (1, 1), (1, 1), 1, True)
    found = kernels.merge_stats(partials, None, None, 1e-5, False)
    exact = kernels.batch_norm_stats(z.double(), None, None, None, None, True, 1e-5)
    reference = registry.resolve("reference", torch.device("cpu"))
    separate = reference.batch_norm_stats(z, None, None, None, None, True, 1e-5)
    for row, name in enumerate(("mean", "invstd", "scale", "shift", "var")):
        floor = 2e-7 * exact[4].max().sqrt().item() if name == "mean" else 0.0
        if name != "shift":  # the rounding error of the mean, which has no reference value
            assert_within_stock_error(name, found[row], separate[row], exact[row], floor=floor)


def test_block_with_ill_conditioned_inputs() -> None:
    """Outputs, gradients and running statistics of a block in training, with a norm after each convolution."""
    unit = UnitSpec(padding=(1, 1), activation="identity")
    spec = BlockSpec((unit, unit), "identity")
    inputs = {
        "mean 1e4": randn(4, 24, 12, 12) + 1e4,
        "outlier": randn(4, 24, 12, 12),
        "small": 1e-6 * randn(4, 24, 12, 12),
    }
    inputs["outlier"][0, :, 0, 0] = 1e6
    tensors: list[Tensor | None] = []
    for seed in (1, 2):
        weight = (randn(24, 24, 3, 3, seed=seed) / 15).contiguous(memory_format=torch.channels_last)
        vectors = randn(24, seed=3).abs() + 0.5, randn(24, seed=4), torch.zeros(24).double(), torch.ones(24).double()
        tensors += [weight, None, *vectors]

    def run(function: Callable[..., Tensor], x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        mine = [None if t is None else t.to(dtype, copy=True).requires_grad_(i % 6 < 4) for i, t in enumerate(tensors)]
        x = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        y = function(x, spec, mine, training=True)
        leaves = [x, *(t for t in mine if t is not None and t.requires_grad)]
        grads = torch.autograd.grad(y, leaves, randn(*y.shape, seed=5).to(dtype))
        return [y.detach(), *grads, *(t for t in mine if t is not None and not t.requires_grad)]

    for name, x in inputs.items():
        x = x.float()
        results = zip(
            run(residual_block, x, torch.float32),
            run(stock.residual_block, x, torch.float32),
            run(stock.residual_block, x, torch.float64),
            strict=True,
        )
        for index, (ours, theirs, exact) in enumerate(results):
            assert_within_stock_error(f"{name}: result {index}", ours, theirs, exact)


def test_frozen_model_with_extreme_running_statistics() -> None:
    """Running statistics of constant and of huge channels, and subnormal norm weights."""
    torch.manual_seed(0)
    model = cifar_resnet(20).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var[:4] = torch.tensor([0.0, 1e-42, 1e-10, 1e10])
            module.running_mean[:4] = torch.tensor([1e-3, 1e-42, 0.0, 1e4])
            module.weight.data[:4] = torch.tensor([1e-2, 1e-3, 1e-42, 10.0])
    x = torch.randn(2, 3, 32, 32)
    plain = fused_res.unfuse(model)
    with torch.no_grad():
        theirs = plain(x)
        exact = plain.double()(x.double())
        ours = fused_res.freeze(plain.float())(x)
    assert_within_stock_error("logits", ours, theirs, exact)


@pytest.mark.skipif("cpu" not in FAST_BACKENDS, reason="needs the C++ extension")
def test_chunk_with_outlying_pivot_is_summed_again() -> None:
    """A chunk whose pivot is an outlier is summed a second time with its mean as the pivot.

    Without that, the variance is off by 6 to 14 ulp, and stock PyTorch's by up to 80.
    """
    x = left_border().float().contiguous(memory_format=torch.channels_last)
    exact = x.double().var((0, 2, 3))
    mean, var = torch.zeros(3), torch.ones(3)
    batch_norm_act(x, mean, var, None, None, None, True, 1.0, backend="cpu")
    assert ((var - exact).abs() < 2 * torch.finfo(torch.float32).eps * exact).all()
