"""Property-based tests of the public functions: random shapes, strides, dtypes and flags, by Hypothesis.

The accuracy criterion is an error against float64 of at most twice that of stock PyTorch. The suite runs few, fixed
examples (tests/conftest.py). A search, whose failing examples are saved and minimized:
``python -m pytest tests/ops/test_properties.py --hypothesis-profile=search``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from torch import Tensor

import fused_res
from fused_res import BlockSpec, PoolSpec, UnitSpec
from fused_res.functional import batch_norm_act, conv_bias_act, residual_block
from fused_res.testing import assert_within_stock_error
from tests.support import batch_norm_checks, strategies
from tests.support import stock_pytorch as stock
from tests.support.batch_norm_checks import equal_including_nan
from tests.support.cpu_backends import FAST_BACKENDS

BACKENDS = [name for name in FAST_BACKENDS if name != "cuda"]
SEEDS = st.integers(0, 1 << 20)
EPS = st.sampled_from((1e-5, 1e-3, 0.1))


class Numbers:
    """Generator of float64 normal deviates from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


@st.composite
def norms(draw: Any) -> dict[str, Any]:
    """Draw the arguments of batch_norm_checks.check_batch_norm_act."""
    shape, dtype = draw(strategies.shapes()), draw(st.sampled_from(strategies.DTYPES))
    channels, rank = shape[1], len(shape)
    randn = Numbers(draw(SEEDS))
    per_channel = (1, -1, *(1,) * (rank - 2))
    mean = draw(st.sampled_from((0.0, 1.0, 100.0, 1e4))) * randn(channels)
    deviation = randn(channels).abs() + 0.5
    kind = draw(st.sampled_from(("none", "other", "scaled", "input")))
    # Stock PyTorch supports parameters of one dtype only, the input's or float32.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    narrow = dtype if draw(st.booleans()) else wide

    def image(values: Tensor) -> Tensor:
        return draw(strategies.layouts(rank))(values.to(dtype))

    def vector(values: Tensor, dtype: torch.dtype = narrow) -> Tensor:
        return draw(strategies.vectors())(values.to(dtype))

    x = image(randn(*shape) * deviation.view(per_channel) + mean.view(per_channel))
    tensors = {
        "input": x,
        "residual": {"none": None, "input": x}.get(kind, image(randn(*shape))),
        "weight": vector(randn(channels)) if draw(st.booleans()) else None,
        "bias": vector(randn(channels)) if draw(st.booleans()) else None,
    }
    if kind == "scaled":  # representable in `dtype`, because stock PyTorch multiplies in it
        tensors |= {name: vector(randn(channels).to(dtype), wide) for name in ("residual_scale", "residual_shift")}
    training = draw(st.booleans())
    running = {"running_mean": vector(mean + 0.1), "running_var": vector(deviation**2 * 1.1)}
    if training and draw(st.booleans()):
        running = dict.fromkeys(running)
    names = [name for name, t in tensors.items() if t is not None]
    return {
        "tensors": tensors,
        "running": running,
        "grad": image(randn(*shape)),
        "training": training,
        "activation": draw(st.sampled_from(("relu", "identity"))),
        "backend": draw(st.sampled_from(BACKENDS)),
        "momentum": draw(st.sampled_from((0.1, 0.0, 1.0, 0.37))),
        "eps": draw(EPS | st.just(1e-9)),
        "grad_names": draw(st.just(names) | st.sets(st.sampled_from(names))),
    }


@given(norms())
def test_batch_norm_act(case: dict[str, Any]) -> None:
    x = case["tensors"]["input"]
    if case["training"] and x.numel() == x.shape[1]:
        event("one value per channel")
        arguments = {k: case[k] for k in ("training", "backend")}
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            batch_norm_act(**case["tensors"], **case["running"], **arguments)
        return
    batch_norm_checks.check_batch_norm_act(**case)


def image_of(draw: Any, values: Tensor) -> Tensor:
    return draw(strategies.layouts(values.dim()))(values)


@given(strategies.convolutions(), st.data())
def test_conv_bias_act(conv: strategies.Convolution, data: st.DataObject) -> None:
    draw = data.draw
    # float32 is drawn more often: the library's CPU convolutions support float32 only, in channels_last memory.
    dtype = draw(st.sampled_from((torch.float32, torch.float32, *strategies.DTYPES)))
    randn = Numbers(draw(SEEDS))
    mean = draw(st.sampled_from((0.0, 1.0, 100.0)))
    weight_norm = max(torch.Size(conv.weight_shape[1:]).numel(), 1) ** 0.5
    tensors = {
        "input": image_of(draw, (randn(*conv.input_shape) + mean).to(dtype)),
        "weight": image_of(draw, (randn(*conv.weight_shape) / weight_norm).to(dtype)),
        "bias": draw(strategies.vectors())(randn(conv.weight_shape[0]).to(dtype)) if draw(st.booleans()) else None,
        "residual": image_of(draw, randn(*conv.output_shape).to(dtype)) if draw(st.booleans()) else None,
    }
    originals = {name: t.clone() for name, t in tensors.items() if t is not None}
    options = conv.options | {"activation": draw(st.sampled_from(("relu", "identity")))}
    with torch.no_grad(), fused_res.backends.use(draw(st.sampled_from(BACKENDS)), winograd=False):
        ours = conv_bias_act(**tensors, **options)
        theirs = stock.conv_bias_act(**tensors, **options)
        wide = {name: None if t is None else t.double() for name, t in tensors.items()}
        exact = stock.conv_bias_act(**wide, **options)
        # Sum of the terms' magnitudes, which bounds the rounding error. Under cancellation, stock PyTorch may by chance
        # have a smaller error.
        terms = stock.conv_bias_act(**{k: None if t is None else t.abs() for k, t in wide.items()}, **conv.options)
    largest = terms.abs().max().item() if terms.numel() else 0.0
    assert_within_stock_error("output", ours, theirs, exact, floor=torch.finfo(torch.float32).eps * largest)
    assert all(equal_including_nan(tensors[name], value) for name, value in originals.items()), (
        "an argument was written"
    )


#: A block's spec, the convolutions of its units and its projection, and the shape of its input.
Block = tuple[BlockSpec, list[strategies.Convolution], tuple[int, ...]]


@st.composite
def blocks(draw: Any) -> Block:
    rank = draw(st.sampled_from((2, 2, 2, 1)))
    size = st.integers(1, 9)
    input = (draw(st.integers(2, 4)), draw(st.sampled_from((1, 3, 8, 16, 17))), *(draw(size) for _ in range(rank)))
    kind = draw(st.sampled_from(("none", "identity", "projection", "pool" if rank == 2 else "none")))
    found: list[strategies.Convolution] = []
    shape = input
    for _ in range(draw(st.integers(1, 3))):
        found.append(draw(strategies.convolutions(shape)))
        shape = found[-1].output_shape
    if kind == "identity":  # a further convolution restores the input's shape
        assume(shape[2:] == input[2:])
        found.append(pointwise(shape, input[1], (1,) * rank))
        shape = found[-1].output_shape
    units = [unit_of(draw, conv) for conv in found]
    shortcut: Any = "none"
    pool = None
    if kind == "identity":
        shortcut = "identity"
    elif kind == "projection":
        strides = tuple(
            -(-before // after) if after > 1 else before for before, after in zip(input[2:], shape[2:], strict=True)
        )
        projection = pointwise(input, shape[1], strides)
        assume(projection.output_shape == shape)
        found.append(projection)
        shortcut = UnitSpec(strides, (0,) * rank, (1,) * rank, eps=draw(EPS), activation="identity")
    elif kind == "pool":
        window = draw(st.sampled_from((((3, 3), (2, 2), (1, 1)), ((2, 3), (1, 2), (1, 0)), ((2, 2), (2, 2), (0, 0)))))
        assume(all(n + 2 * pad >= k for n, k, pad in zip(shape[2:], window[0], window[2], strict=True)))
        pool = PoolSpec(*window)
    # A single value per channel has no variance.
    assume(all(torch.Size(conv.output_shape).numel() > conv.output_shape[1] for conv in found))
    return BlockSpec(tuple(units), shortcut, pool), found, input


def pointwise(input: tuple[int, ...], out_channels: int, stride: tuple[int, ...]) -> strategies.Convolution:
    rank = len(stride)
    return strategies.Convolution(input, (out_channels, input[1], *(1,) * rank), stride, (0,) * rank, (1,) * rank, 1)


def unit_of(draw: Any, conv: strategies.Convolution) -> UnitSpec:
    activation = draw(st.sampled_from(("relu", "relu", "identity")))
    return UnitSpec(conv.stride, conv.padding, conv.dilation, conv.groups, draw(EPS), activation)


@given(blocks(), st.data())
def test_residual_block(block: Block, data: st.DataObject) -> None:
    """Compare with float64: in float64 to within 1e-7, and in float32, whose kernels differ, within rounding."""
    spec, convs, shape = block
    draw = data.draw
    randn = Numbers(draw(SEEDS))
    dtype = draw(st.sampled_from((torch.float64, torch.float32)))
    channels_last = draw(st.booleans())
    # Norm biases are far from zero on either side, so that rounding changes no ReLU mask; in float64 also near zero.
    bias_scale = 30.0 if dtype == torch.float32 or draw(st.booleans()) else 1.0
    tensors: list[Tensor | None] = []
    for conv in convs:
        channels = conv.weight_shape[0]
        weight_norm = torch.Size(conv.weight_shape[1:]).numel() ** 0.5
        weight = draw(strategies.layouts(len(shape), weight=True))(randn(*conv.weight_shape) / weight_norm)
        bias = randn(channels) if draw(st.booleans()) else None
        norm = [randn(channels).abs() + 0.5, bias_scale * randn(channels).sign() + randn(channels)]
        norm = [t if draw(st.integers(0, 3)) else None for t in norm] if bias_scale == 1.0 else norm
        tensors += [weight, bias, *norm, randn(channels), randn(channels) ** 2 + 0.5]
    x = draw(strategies.layouts(len(shape)))(randn(*shape) + 1)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    training = draw(st.booleans() | st.tuples(*[st.booleans()] * len(convs)))
    requires_grad = [
        draw(st.integers(0, 4)) > 0 if t is not None and i % 6 < 4 else False for i, t in enumerate(tensors)
    ]
    input_requires_grad = draw(st.booleans())
    options = {"training": training, "momentum": draw(st.sampled_from((0.1, 1.0, 0.0)))}
    how = {"recompute": draw(st.sampled_from(("none", "norm", "conv"))), "backend": draw(st.sampled_from(BACKENDS))}

    def run(function: Any, dtype: torch.dtype, grad: Tensor | None) -> tuple[list[Tensor], Tensor]:
        mine = [None if t is None else t.to(dtype, copy=True) for t in tensors]
        for t, flag in zip(mine, requires_grad, strict=True):
            if t is not None:
                t.requires_grad_(flag)
        mine_x = x.to(dtype).detach().requires_grad_(input_requires_grad)
        y = function(mine_x, mine)
        grad = randn(*y.shape) if grad is None else grad
        leaves = [t for t in (mine_x, *mine) if t is not None and t.requires_grad]
        grads = torch.autograd.grad(y, leaves, grad.to(dtype), allow_unused=True) if y.requires_grad else []
        state = [t for i, t in enumerate(mine) if t is not None and i % 6 > 3]
        return [y.detach(), *grads, *state], grad

    try:
        exact, grad = run(lambda x, t: stock.residual_block(x, spec, t, **options), torch.float64, None)
    except RuntimeError as error:  # the stock convolution's backward does not support all weight strides
        assume("grad_weight must be contiguous" not in str(error))
        raise
    convolution = draw(st.sampled_from(("planned", "fused", "aten")))
    with fused_res.backends.use("auto", convolution, winograd=False):
        ours, _ = run(lambda x, t: residual_block(x, spec, t, **options, **how), dtype, grad)
    if dtype == torch.float64:
        for a, b in zip(ours, exact, strict=True):
            scale = float(b.abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7 * (1 + scale))
        return
    theirs, _ = run(lambda x, t: stock.residual_block(x, spec, t, **options), dtype, grad)
    # A chain of units amplifies rounding errors at random, also in stock PyTorch. This test looks for larger errors.
    for index, (a, s, b) in enumerate(zip(ours, theirs, exact, strict=True)):
        scale, stock_error = (float(t.abs().max()) if b.numel() else 0.0 for t in (b, s - b))
        error = float((a - b).abs().max()) if b.numel() else 0.0
        assert error <= 8 * stock_error + 1e-3 * (1 + scale), f"result {index} is off by {error}, stock's {stock_error}"
