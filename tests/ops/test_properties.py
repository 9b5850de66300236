"""The public functions on whatever Hypothesis thinks of: shapes, strides, dtypes and flags, to the precision contract.

In the suite the examples are few and always the same (tests/conftest.py). A search, whose failures are kept and
minimised: ``python -m pytest tests/ops/test_properties.py --hypothesis-profile=search``.
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
from fused_res.testing import assert_as_exact_as
from tests.support import batch_norm_checks as contract
from tests.support import stock_pytorch as stock
from tests.support import strategies
from tests.support.batch_norm_checks import same_bits
from tests.support.cpu_backends import FAST

BACKENDS = [name for name in FAST if name != "cuda"]
SEEDS = st.integers(0, 1 << 20)
EPS = st.sampled_from((1e-5, 1e-3, 0.1))


class Numbers:
    """Normal deviates in float64, all from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


@st.composite
def norms(draw: Any) -> dict[str, Any]:
    """Arguments of contract.check."""
    shape, dtype = draw(strategies.shapes()), draw(st.sampled_from(strategies.DTYPES))
    channels, rank = shape[1], len(shape)
    randn = Numbers(draw(SEEDS))
    per_channel = (1, -1, *(1,) * (rank - 2))
    mean = draw(st.sampled_from((0.0, 1.0, 100.0, 1e4))) * randn(channels)
    deviation = randn(channels).abs() + 0.5
    kind = draw(st.sampled_from(("none", "other", "scaled", "input")))
    # What stock can do: all parameters of one dtype, the input's or float32.
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
    if kind == "scaled":  # exact in `dtype`: stock has to multiply in it
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
        "wanted": draw(st.just(names) | st.sets(st.sampled_from(names))),
    }


@given(norms())
def test_batch_norm_act(case: dict[str, Any]) -> None:
    x = case["tensors"]["input"]
    if case["training"] and x.numel() == x.shape[1]:
        event("one value")
        arguments = {k: case[k] for k in ("training", "backend")}
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            batch_norm_act(**case["tensors"], **case["running"], **arguments)
        return
    contract.check(**case)


def image_of(draw: Any, values: Tensor) -> Tensor:
    return draw(strategies.layouts(values.dim()))(values)


@given(strategies.convolutions(), st.data())
def test_conv_bias_act(conv: strategies.Convolution, data: st.DataObject) -> None:
    draw = data.draw
    # float32 in channels_last memory: what our own kernels take.
    dtype = draw(st.sampled_from((torch.float32, torch.float32, *strategies.DTYPES)))
    randn = Numbers(draw(SEEDS))
    mean = draw(st.sampled_from((0.0, 1.0, 100.0)))
    spread = max(torch.Size(conv.weight[1:]).numel(), 1) ** 0.5
    tensors = {
        "input": image_of(draw, (randn(*conv.input) + mean).to(dtype)),
        "weight": image_of(draw, (randn(*conv.weight) / spread).to(dtype)),
        "bias": draw(strategies.vectors())(randn(conv.weight[0]).to(dtype)) if draw(st.booleans()) else None,
        "residual": image_of(draw, randn(*conv.output).to(dtype)) if draw(st.booleans()) else None,
    }
    given = {name: t.clone() for name, t in tensors.items() if t is not None}
    options = conv.options | {"activation": draw(st.sampled_from(("relu", "identity")))}
    with torch.no_grad(), fused_res.backends.use(draw(st.sampled_from(BACKENDS)), winograd=False):
        ours = conv_bias_act(**tensors, **options)
        theirs = stock.conv_bias_act(**tensors, **options)
        wide = {name: None if t is None else t.double() for name, t in tensors.items()}
        exact = stock.conv_bias_act(**wide, **options)
        # What is added up, each term rounded: where it cancels, stock may by luck be better than that.
        terms = stock.conv_bias_act(**{k: None if t is None else t.abs() for k, t in wide.items()}, **conv.options)
    largest = terms.abs().max().item() if terms.numel() else 0.0
    assert_as_exact_as("output", ours, theirs, exact, floor=torch.finfo(torch.float32).eps * largest)
    assert all(same_bits(tensors[name], value) for name, value in given.items()), "an argument has been written"


#: A spec, the convolutions of its units and its projection, and the input's shape.
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
        shape = found[-1].output
    if kind == "identity":  # one more, which brings the input's shape back
        assume(shape[2:] == input[2:])
        found.append(pointwise(shape, input[1], (1,) * rank))
        shape = found[-1].output
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
        assume(projection.output == shape)
        found.append(projection)
        shortcut = UnitSpec(strides, (0,) * rank, (1,) * rank, eps=draw(EPS), activation="identity")
    elif kind == "pool":
        window = draw(st.sampled_from((((3, 3), (2, 2), (1, 1)), ((2, 3), (1, 2), (1, 0)), ((2, 2), (2, 2), (0, 0)))))
        assume(all(n + 2 * pad >= k for n, k, pad in zip(shape[2:], window[0], window[2], strict=True)))
        pool = PoolSpec(*window)
    # One value a channel has no variance.
    assume(all(torch.Size(conv.output).numel() > conv.output[1] for conv in found))
    return BlockSpec(tuple(units), shortcut, pool), found, input


def pointwise(input: tuple[int, ...], outputs: int, stride: tuple[int, ...]) -> strategies.Convolution:
    rank = len(stride)
    return strategies.Convolution(input, (outputs, input[1], *(1,) * rank), stride, (0,) * rank, (1,) * rank, 1)


def unit_of(draw: Any, conv: strategies.Convolution) -> UnitSpec:
    activation = draw(st.sampled_from(("relu", "relu", "identity")))
    return UnitSpec(conv.stride, conv.padding, conv.dilation, conv.groups, draw(EPS), activation)


@given(blocks(), st.data())
def test_residual_block(block: Block, data: st.DataObject) -> None:
    """In float64, where nothing but a mistake is larger than 1e-7, and with the kernels that float32 has of its own."""
    spec, convs, shape = block
    draw = data.draw
    randn = Numbers(draw(SEEDS))
    dtype = draw(st.sampled_from((torch.float64, torch.float32)))
    last = draw(st.booleans())
    # Far from zero on either side, so that no ReLU is decided by rounding; sometimes, in float64, anywhere.
    far = 30.0 if dtype == torch.float32 or draw(st.booleans()) else 1.0
    tensors: list[Tensor | None] = []
    for conv in convs:
        channels = conv.weight[0]
        spread = torch.Size(conv.weight[1:]).numel() ** 0.5
        weight = draw(strategies.layouts(len(shape), weight=True))(randn(*conv.weight) / spread)
        bias = randn(channels) if draw(st.booleans()) else None
        norm = [randn(channels).abs() + 0.5, far * randn(channels).sign() + randn(channels)]
        norm = [t if draw(st.integers(0, 3)) else None for t in norm] if far == 1.0 else norm
        tensors += [weight, bias, *norm, randn(channels), randn(channels) ** 2 + 0.5]
    x = draw(strategies.layouts(len(shape)))(randn(*shape) + 1)
    if last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    training = draw(st.booleans() | st.tuples(*[st.booleans()] * len(convs)))
    learn = [draw(st.integers(0, 4)) > 0 if t is not None and i % 6 < 4 else False for i, t in enumerate(tensors)]
    learn_input = draw(st.booleans())
    options = {"training": training, "momentum": draw(st.sampled_from((0.1, 1.0, 0.0)))}
    how = {"recompute": draw(st.sampled_from(("none", "norm", "conv"))), "backend": draw(st.sampled_from(BACKENDS))}

    def run(function: Any, dtype: torch.dtype, grad: Tensor | None) -> tuple[list[Tensor], Tensor]:
        mine = [None if t is None else t.to(dtype, copy=True) for t in tensors]
        for t, flag in zip(mine, learn, strict=True):
            if t is not None:
                t.requires_grad_(flag)
        mine_x = x.to(dtype).detach().requires_grad_(learn_input)
        y = function(mine_x, mine)
        grad = randn(*y.shape) if grad is None else grad
        wanted = [t for t in (mine_x, *mine) if t is not None and t.requires_grad]
        grads = torch.autograd.grad(y, wanted, grad.to(dtype), allow_unused=True) if y.requires_grad else []
        state = [t for i, t in enumerate(mine) if t is not None and i % 6 > 3]
        return [y.detach(), *grads, *state], grad

    try:
        exact, grad = run(lambda x, t: stock.residual_block(x, spec, t, **options), torch.float64, None)
    except RuntimeError as error:  # stock's own convolution does not differentiate all weights
        assume("grad_weight must be contiguous" not in str(error))
        raise
    convolution = draw(st.sampled_from(("auto", "fused", "planned", "aten")))
    with fused_res.backends.use("auto", convolution, winograd=False):
        ours, _ = run(lambda x, t: residual_block(x, spec, t, **options, **how), dtype, grad)
    if dtype == torch.float64:
        for a, b in zip(ours, exact, strict=True):
            scale = float(b.abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7 * (1 + scale))
        return
    theirs, _ = run(lambda x, t: stock.residual_block(x, spec, t, **options), dtype, grad)
    # A chain multiplies rounding by chance, ours as stock's; what is looked for here is larger than that.
    for index, (a, s, b) in enumerate(zip(ours, theirs, exact, strict=True)):
        scale, stock_error = (float(t.abs().max()) if b.numel() else 0.0 for t in (b, s - b))
        error = float((a - b).abs().max()) if b.numel() else 0.0
        assert error <= 8 * stock_error + 1e-3 * (1 + scale), f"result {index} is off by {error}, stock's {stock_error}"
