"""Numbers that are hard to add up: batch statistics, outputs and gradients of them, to the precision contract."""

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
from fused_res.testing import assert_as_exact_as
from tests.support import batch_norm_checks as contract
from tests.support import stock_pytorch as stock
from tests.support.cpu_backends import BACKENDS, FAST

SHAPE = (8, 3, 17, 19)
FORMATS = (torch.contiguous_format, torch.channels_last)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_of_10000() -> Tensor:
    return randn(*SHAPE) + 1e4


def outlier(*values: float) -> Tensor:
    """One in each channel, in the middle."""
    x = randn(*SHAPE)
    x[3, :, 5, 7] = torch.tensor(values, dtype=x.dtype)
    return x


def outlier_first(*values: float) -> Tensor:
    """Where kernels look for a value that is near the mean."""
    x = randn(*SHAPE)
    x[0, :, 0, 0] = torch.tensor(values, dtype=x.dtype)
    return x


def border() -> Tensor:
    """Images that begin with a black border, far below what is behind."""
    x = randn(*SHAPE) + 1000
    x[:, :, :3] = 0
    return x


def left_border() -> Tensor:
    """Rows as long as a chunk, whose first values alone are far from the others: that origin would cost digits."""
    x = randn(1, 3, 64, 2048) + 1000
    x[..., :15] = 0
    return x


def images_apart() -> Tensor:
    """Each constant, but for a little."""
    return 1e-3 * randn(*SHAPE) + 100 * randn(SHAPE[0], 1, 1, 1, seed=1)


def scaled(by: float) -> Callable[[], Tensor]:
    return lambda: by * randn(*SHAPE)


def constant() -> Tensor:
    return torch.tensor([0.1, 100.0, -3.3e4], dtype=torch.float64).view(1, 3, 1, 1).expand(SHAPE).clone()


def one_differs() -> Tensor:
    """A channel of one value but for one."""
    x = constant()
    x[3, :, 5, 7] *= 1.01
    return x


#: Values in float64; in which dtypes, with which eps. Beyond 1e19 squares are infinite in float32, stock's too.
ALL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64, torch.bfloat16)
CASES: dict[str, tuple[Callable[[], Tensor], tuple[torch.dtype, ...], tuple[float, ...]]] = {
    "mean 1e4": (mean_of_10000, ALL, (1e-5,)),
    "an outlier": (lambda: outlier(1e6, -1e10, 1e3), WIDE, (1e-5,)),
    "an outlier, 16 bits": (lambda: outlier(6e4, -6e4, 1e3), (torch.float16,), (1e-5,)),
    "an outlier first": (lambda: outlier_first(1e6, -1e10, 1e3), WIDE, (1e-5,)),
    "a border": (border, ALL, (1e-5,)),
    "a left border": (left_border, (torch.float32,), (1e-5,)),
    "images apart": (images_apart, (torch.float32, torch.float64), (1e-5, 1e-12)),
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
#: The simulated and the interpreted kernels take seconds: few of the cases, in few dtypes.
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


def operands(x: Tensor, dtype: torch.dtype, weight: float = 1.0) -> tuple[contract.Tensors, contract.Tensors]:
    """For contract.check: without a residual; running statistics that a batch replaces."""
    channels = x.shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors: contract.Tensors = {
        "input": x.to(dtype),
        "residual": None,
        "weight": (weight * (randn(channels, seed=1) + 2)).to(wide),
        "bias": randn(channels, seed=2).to(wide),
    }
    return tensors, {"running_mean": torch.zeros(channels, dtype=wide), "running_var": torch.ones(channels, dtype=wide)}


@pytest.mark.parametrize(("case", "dtype", "eps", "backend"), cases())
def test_training(case: str, dtype: torch.dtype, eps: float, backend: str) -> None:
    tensors, running = operands(CASES[case][0](), dtype)
    grad = randn(*tensors["input"].shape, seed=3).to(dtype)
    for format in FORMATS if backend != "triton" else FORMATS[1:]:
        tensors["input"] = tensors["input"].contiguous(memory_format=format)
        contract.check(tensors, running, grad, True, "identity", backend, eps=eps, momentum=1.0)


@pytest.mark.parametrize("backend", FAST)
def test_small_weights_and_gradients(backend: str) -> None:
    for weight, grad in ((1e-40, 1.0), (1e-30, 1e-10), (1.0, 1e-40), (1.0, 1e34), (1e30, 1.0)):
        tensors, running = operands(randn(*SHAPE) + 3, torch.float32, weight)
        dy = (grad * randn(*SHAPE, seed=3)).float()
        for training, residual in itertools.product((True, False), (None, randn(*SHAPE, seed=4).float())):
            contract.check(tensors | {"residual": residual}, running, dy, training, "identity", backend)


@pytest.mark.parametrize("backend", FAST)
def test_running_statistics_of_any_size(backend: str) -> None:
    """In evaluation, where they are given: a variance of 0 or next to nothing, means far from all values."""
    for var, mean, eps in itertools.product((0.0, 1e-42, 1e-10, 1e10), (0.0, 1e4, -1e10, 1e-42), (1e-5, 1e-12)):
        tensors, running = operands(randn(*SHAPE), torch.float32)
        running = {"running_mean": torch.full((3,), mean), "running_var": torch.full((3,), var)}
        for format, activation in itertools.product(FORMATS, ("relu", "identity")):
            tensors["input"] = tensors["input"].contiguous(memory_format=format)
            dy = randn(*SHAPE, seed=3).float()
            contract.check(tensors, running, dy, False, activation, backend, eps=eps)


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 1e-12])
@pytest.mark.parametrize("backend", FAST)
def test_a_constant_channel_is_its_bias(backend: str, eps: float) -> None:
    """Its variance is exactly 0, however many chunks it is merged from."""
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
def test_more_values_a_channel_than_float32_counts(format: torch.memory_format) -> None:
    """2^24 + 2^20 of them, by chunks: against stock, and a sum in float64 that is exact enough."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((17, 2, 1024, 1024), generator=generator).add_(torch.tensor([1.0, 1000.0]).view(1, 2, 1, 1))
    x = x.contiguous(memory_format=format)
    var, mean = (torch.stack(list(v)).double() for v in zip(*[moments(x[:, c]) for c in range(2)], strict=True))
    found = {}
    for name, function in (("ours", batch_norm_act), ("stock", stock.batch_norm_act)):
        state = torch.zeros(2), torch.ones(2)
        options = {"backend": "cpu"} if name == "ours" and "cpu" in FAST else {}
        with torch.no_grad():
            y = function(x, *state, None, None, None, training=True, momentum=1.0, activation="identity", **options)
        found[name] = (*state, y[-1, :, -8:].clone())
        del y
    exact = (x[-1, :, -8:].double() - mean.view(2, 1, 1)) / (var.view(2, 1, 1) + 1e-5).sqrt()
    for ours, theirs, right in zip(found["ours"], found["stock"], (mean, var, exact), strict=True):
        assert_as_exact_as("running_mean, running_var, output", ours, theirs, right)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, a part at a time."""
    mean = sum(part.double().sum() for part in x) / x.numel()
    return sum((part.double() - mean).square().sum() for part in x) / (x.numel() - 1), mean


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_take_in_nan_and_infinity_as_stock_does(bad: float, backend: str) -> None:
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


def convolved() -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and weights."""
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
        "nothing": (0 * x, weight),
    }


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", convolved())
def test_convolution(case: str, backend: str, format: torch.memory_format) -> None:
    x, weight = (t.float().contiguous(memory_format=format) for t in convolved()[case])
    bias, residual = randn(40, seed=2).float(), randn(2, 40, 15, 14, seed=3).float()
    for parts in ((None, None), (bias, residual)):
        wide = [None if t is None else t.double() for t in (x, weight, *parts)]
        ours = conv_bias_act(x, weight, *parts, padding=1, activation="identity", backend=backend)
        theirs = stock.conv_bias_act(x, weight, *parts, padding=1, activation="identity")
        exact = stock.conv_bias_act(*wide, padding=1, activation="identity")
        assert_as_exact_as(case, ours, theirs, exact)


@pytest.mark.skipif("cpu" not in FAST, reason="needs the cpu backend")
@pytest.mark.parametrize("case", convolved())
def test_statistics_of_a_convolution(case: str) -> None:
    """From the epilogue of our kernels, where these run, about whatever value comes first."""
    kernels = registry.resolve("cpu", torch.device("cpu"))
    x, weight = (t.float().contiguous(memory_format=torch.channels_last) for t in convolved()[case])
    z, partials = kernels.conv_bn_stats(x, weight, None, None, False, (1, 1), (1, 1), (1, 1), 1, True)
    found = kernels.merge_stats(partials, None, None, 1e-5, False)
    exact = kernels.batch_norm_stats(z.double(), None, None, None, None, True, 1e-5)
    reference = registry.resolve("reference", torch.device("cpu"))
    passed = reference.batch_norm_stats(z, None, None, None, None, True, 1e-5)
    for row, name in enumerate(("mean", "invstd", "scale", "shift", "var")):
        floor = 2e-7 * exact[4].max().sqrt().item() if name == "mean" else 0.0
        if name != "shift":  # what rounding the mean took away: nothing to be exact about
            assert_as_exact_as(name, found[row], passed[row], exact[row], floor=floor)


def test_a_block_with_hard_inputs() -> None:
    """In training, with a norm behind each convolution: outputs, gradients and running statistics."""
    unit = UnitSpec(padding=(1, 1), activation="identity")
    spec = BlockSpec((unit, unit), "identity")
    hard = {
        "mean 1e4": randn(4, 24, 12, 12) + 1e4,
        "outlier": randn(4, 24, 12, 12),
        "small": 1e-6 * randn(4, 24, 12, 12),
    }
    hard["outlier"][0, :, 0, 0] = 1e6
    tensors: list[Tensor | None] = []
    for seed in (1, 2):
        weight = (randn(24, 24, 3, 3, seed=seed) / 15).contiguous(memory_format=torch.channels_last)
        vectors = randn(24, seed=3).abs() + 0.5, randn(24, seed=4), torch.zeros(24).double(), torch.ones(24).double()
        tensors += [weight, None, *vectors]

    def run(function: Callable[..., Tensor], x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        mine = [None if t is None else t.to(dtype, copy=True).requires_grad_(i % 6 < 4) for i, t in enumerate(tensors)]
        x = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        y = function(x, spec, mine, training=True)
        wanted = [x, *(t for t in mine if t is not None and t.requires_grad)]
        grads = torch.autograd.grad(y, wanted, randn(*y.shape, seed=5).to(dtype))
        return [y.detach(), *grads, *(t for t in mine if t is not None and not t.requires_grad)]

    for name, x in hard.items():
        x = x.float()
        results = zip(
            run(residual_block, x, torch.float32),
            run(stock.residual_block, x, torch.float32),
            run(stock.residual_block, x, torch.float64),
            strict=True,
        )
        for index, (ours, theirs, exact) in enumerate(results):
            assert_as_exact_as(f"{name}: result {index}", ours, theirs, exact)


def test_a_frozen_model_with_hard_statistics() -> None:
    """Norms that trained on constant channels, on huge ones and with weights of next to nothing."""
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
    assert_as_exact_as("logits", ours, theirs, exact)


@pytest.mark.skipif("cpu" not in FAST, reason="needs the C++ extension")
def test_a_chunk_that_begins_apart_is_summed_again() -> None:
    """About its mean: its variance is off by 6 to 14 units in the last place otherwise, stock's by up to 80."""
    x = left_border().float().contiguous(memory_format=torch.channels_last)
    exact = x.double().var((0, 2, 3))
    mean, var = torch.zeros(3), torch.ones(3)
    batch_norm_act(x, mean, var, None, None, None, True, 1.0, backend="cpu")
    assert ((var - exact).abs() < 2 * torch.finfo(torch.float32).eps * exact).all()
