"""Fusion of 1-D to 3-D layers and of batch norms of vectors, compared with stock PyTorch in float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_res import freeze, fuse
from fused_res.ops.memory_format import conv_output_is_channels_last, to_memory_format, to_stock_layout
from fused_res.testing import assert_within_stock_error, stub_torchvision_operators
from tests.support.model_comparison import (
    assert_models_match,
    assert_near,
    randomize_norms,
    record_fused_calls,
    record_stock_norms,
)

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, Any] = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
SIZES = (7, 6, 5)
CHAIN, PASS = "residual_block", "batch_norm_act"

each_spatial_rank = pytest.mark.parametrize("dim", [1, 2, 3])
each_odd_rank = pytest.mark.parametrize("dim", [1, 3])


class Block(nn.Module):
    """A residual block of `dim` spatial dimensions, with a projection if the number of channels changes.

    Args:
        kernel: kernel size of the second convolution and of the projection.
    """

    def __init__(self, dim: int, in_channels: int = 6, channels: int = 6, norm: Any = None, kernel: int = 1) -> None:
        super().__init__()
        conv, norm = CONVOLUTIONS[dim], norm or NORMS[dim]
        self.conv1, self.norm1 = conv(in_channels, channels, 3, padding=1, bias=False), norm(channels)
        self.conv2, self.norm2 = conv(channels, channels, kernel, padding=kernel // 2), norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if in_channels != channels:
            projection = conv(in_channels, channels, kernel, padding=kernel // 2)
            self.shortcut = nn.Sequential(projection, norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


def network(dim: int, **options: Any) -> nn.Sequential:
    """Return a stem and two blocks in float64."""
    torch.manual_seed(0)
    stem = nn.Sequential(CONVOLUTIONS[dim](3, 6, 3, 2, 1), NORMS[dim](6), nn.ReLU())
    return randomize_norms(nn.Sequential(stem, Block(dim, **options), Block(dim, 6, 8, **options))).double()


def batch(dim: int, channels: int = 3, *, channels_last: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(4, channels, *SIZES[:dim], dtype=dtype)
    return x.to(memory_format=CHANNELS_LAST[dim]) if channels_last else x


def as_channels_last(model: nn.Module, dim: int) -> Any:
    return model.to(memory_format=CHANNELS_LAST[dim])


def assert_same_strides(actual: Tensor, expected: Tensor) -> None:
    """Compare the strides of all dimensions with more than one element."""
    assert actual.shape == expected.shape
    sizes = zip(actual.shape, actual.stride(), expected.stride(), strict=True)
    assert all(ours == stock for size, ours, stock in sizes if size > 1), (actual.stride(), expected.stride())


class TestChains:
    @each_spatial_rank
    @pytest.mark.parametrize("training", [True, False])
    def test_chain_is_one_operation(self, dim: int, training: bool) -> None:
        stock = network(dim).train(training)
        fused = fuse(copy.deepcopy(stock))
        with record_fused_calls() as calls, record_stock_norms() as left:
            copy.deepcopy(fused)(batch(dim))
        assert (calls, left) == ([CHAIN] * 3, [])
        assert_models_match(fused, stock, batch(dim).requires_grad_())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("where", ["input", "weights"])
    @pytest.mark.parametrize("training", [True, False])
    def test_channels_last_3d_runs_as_norm_passes_with_the_strides_of_stock(
        self, dtype: torch.dtype, where: str, training: bool
    ) -> None:
        """PyTorch computes float64 by a library that returns contiguous memory, unlike that for float32."""
        stock = network(3, kernel=3).to(dtype).train(training)
        if where == "weights":
            as_channels_last(stock, 3)
        fused, frozen = fuse(copy.deepcopy(stock)), freeze(copy.deepcopy(stock).eval())
        x = batch(3, channels_last=where == "input", dtype=dtype)
        with record_fused_calls() as calls, record_stock_norms() as left:
            output = copy.deepcopy(fused)(x)
        assert PASS in calls and not left
        expected = copy.deepcopy(stock)(x)
        assert_near(output, expected, "output", 1e-5 if dtype is torch.float32 else None)
        assert_same_strides(output, expected)
        with torch.no_grad():
            output, expected = frozen(x), stock.eval()(x)
        assert_near(output, expected, "output of the frozen model", 1e-5 if dtype is torch.float32 else None)
        assert_same_strides(output, expected)
        if dtype is torch.float64 and training:
            assert_models_match(fused, stock.train(), x.requires_grad_())

    @each_odd_rank
    def test_autocast(self, dim: int) -> None:
        stock = network(dim).float().train()
        fused, exact = fuse(copy.deepcopy(stock)), copy.deepcopy(stock).double()
        x = batch(dim, dtype=torch.float32)
        with record_fused_calls() as calls, torch.autocast("cpu", torch.bfloat16):
            outputs = fused(x), stock(x)
        assert calls == [CHAIN] * 3 and outputs[0].dtype is torch.bfloat16
        assert_within_stock_error("output", *outputs, exact(x.double()))
        for buffers in zip(fused.buffers(), stock.buffers(), exact.buffers(), strict=True):
            if buffers[0].is_floating_point():
                assert_within_stock_error("running statistics", *buffers)

    @each_odd_rank
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_frozen_has_no_norm(self, dim: int, dtype: torch.dtype) -> None:
        stock = network(dim).to(dtype).eval()
        frozen, exact = freeze(stock), copy.deepcopy(stock).double()
        x = batch(dim, dtype=dtype)
        with record_fused_calls() as calls, record_stock_norms() as left, torch.no_grad():
            output = frozen(x)
        assert (calls, left) == ([], [])
        with torch.no_grad():
            assert_within_stock_error("output", output, stock(x), exact(x.double()), floor=1e-6)
            assert_same_strides(output, stock(x))

    @each_odd_rank
    def test_frozen_in_float64(self, dim: int) -> None:
        stock = network(dim).eval()
        with torch.no_grad():
            assert_near(freeze(stock)(batch(dim)), stock(batch(dim)), "output")

    @each_spatial_rank
    def test_synchronized_norm_of_any_rank(self, dim: int) -> None:
        stock = network(dim, norm=nn.SyncBatchNorm).eval()
        fused = fuse(copy.deepcopy(stock))
        with record_fused_calls() as calls:
            assert_near(fused(batch(dim)), stock(batch(dim)), "output")
        assert calls == [CHAIN] * 3

    def test_permuted_signals(self) -> None:
        """Signals (N, L, C), transposed: what PyTorch returns is contiguous."""
        stock = nn.Sequential(network(1), nn.Flatten(1)).train()
        fused = fuse(copy.deepcopy(stock))
        x = torch.randn(4, 9, 3, dtype=torch.float64).transpose(1, 2)
        with record_fused_calls() as calls:
            copy.deepcopy(fused)(x)
        assert calls == [CHAIN] * 3
        assert_models_match(fused, stock, x)


class TestSizesInTheForward:
    """A recording assumes the rank and the channels of an ordinary batch; the fused forward verifies them."""

    class Checked(nn.Module):
        def __init__(self, layer: nn.Module, norm: nn.Module, channels: int) -> None:
            super().__init__()
            self.layer, self.norm, self.channels = layer, norm, channels

        def forward(self, x: Tensor) -> Tensor:
            assert x.ndim == self.expected_rank, f"expected rank {self.expected_rank}"
            if x.shape[1] != self.channels or x.numel() == 0:
                return x
            return F.relu(self.norm(self.layer(x)))

    @pytest.mark.parametrize("dim", [0, 1, 2, 3])
    def test_rank_and_channels(self, dim: int) -> None:
        layer = nn.Linear(3, 4) if dim == 0 else CONVOLUTIONS[dim](3, 4, 3)
        stock = self.Checked(layer, NORMS[dim](4), 3).double()
        stock.expected_rank = dim + 2
        fused = fuse(copy.deepcopy(stock))
        with record_fused_calls() as calls:
            copy.deepcopy(fused)(batch(dim))
        assert calls == [PASS if dim == 0 else CHAIN]
        assert_models_match(fused, stock, batch(dim))
        other = batch(dim, 5)  # the forward returns it as it is
        assert fused(other) is other
        with pytest.raises(AssertionError, match="expected rank"):
            fused(batch(dim)[0])

    def test_rank_of_an_intermediate(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.norm = nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)

            def forward(self, x: Tensor) -> Tensor:
                x = self.conv(x)
                assert x.dim() == 5
                return F.relu(self.norm(x))

        stock = Net().double()
        fused = fuse(copy.deepcopy(stock))
        with record_fused_calls() as calls:
            copy.deepcopy(fused)(batch(3))
        assert calls == [CHAIN]
        assert_models_match(fused, stock, batch(3))


class Head(nn.Module):
    """A norm of vectors or signals, with what may follow it."""

    def __init__(self, addition: bool, relu: bool) -> None:
        super().__init__()
        self.norm, self.addition, self.relu = nn.BatchNorm1d(6), addition, relu

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.norm(x)
        if self.addition:
            y = y + residual
        return F.relu(y) if self.relu else y


class TestNormsOfVectors:
    @pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7), (5, 6, 1)], ids=str)
    @pytest.mark.parametrize("addition", [False, True])
    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("order", ["contiguous", "permuted", "gaps"])
    @pytest.mark.parametrize("training", [True, False])
    def test_pass(self, shape: tuple[int, ...], addition: bool, relu: bool, order: str, training: bool) -> None:
        torch.manual_seed(0)
        x = torch.randn(shape, dtype=torch.float64)
        if order == "permuted":
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        elif order == "gaps":
            x = torch.cat([x, x], 0)[::2]
        stock = randomize_norms(Head(addition, relu)).double().train(training)
        fused = fuse(copy.deepcopy(stock))
        residual = torch.randn(shape, dtype=torch.float64)
        with record_fused_calls() as calls, record_stock_norms() as left:
            output = fused(x, residual)
        assert (calls, left) == ([PASS], [])
        assert_same_strides(output, copy.deepcopy(stock)(x, residual))
        fused.load_state_dict(stock.state_dict())
        assert_models_match(fused, stock, x.requires_grad_(), residual=residual)

    def test_residual_of_another_order_has_the_strides_of_stock(self) -> None:
        x = torch.randn(5, 6, 7, dtype=torch.float64)
        residual = torch.randn(5, 7, 6, dtype=torch.float64).transpose(1, 2)
        stock = Head(True, True).double()
        fused = fuse(copy.deepcopy(stock))
        for first, second in ((x, residual), (residual, x), (residual, residual)):
            output, expected = fused(first, second), stock(first, second)
            assert_near(output, expected, "output")
            assert_same_strides(output, expected)

    def test_autocast_leaves_the_input(self) -> None:
        stock = randomize_norms(nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU())).train()
        fused, exact = fuse(copy.deepcopy(stock)), copy.deepcopy(stock).double()
        x = batch(0, dtype=torch.float32)
        with record_fused_calls() as calls, torch.autocast("cpu", torch.bfloat16):
            outputs = fused(x), stock(x)
        assert calls == [PASS] and outputs[0].dtype is torch.bfloat16
        assert_within_stock_error("output", *outputs, exact(x.double()))

    def test_frozen(self) -> None:
        """No backend folds a norm into a linear layer: it is one pass with its ReLU."""
        stock = randomize_norms(nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU())).double().eval()
        frozen = freeze(stock)
        with record_fused_calls() as calls, torch.no_grad():
            assert_near(frozen(batch(0)), stock(batch(0)), "output")
        assert calls == [PASS]

    def test_images_then_vectors(self) -> None:
        """The rank changes in the middle of a model, and a norm of vectors reads it by a test of its size."""

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.features = nn.Sequential(Block(2, 3, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten())
                self.head = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.features(x))

        stock = randomize_norms(Net()).double()
        fused, frozen = fuse(copy.deepcopy(stock)), freeze(copy.deepcopy(stock).eval())
        with record_fused_calls() as calls:
            copy.deepcopy(fused)(batch(2))
        assert calls == [CHAIN, PASS]
        expected = copy.deepcopy(stock).eval()
        assert_models_match(fused, stock, batch(2).requires_grad_())
        with record_fused_calls() as calls, torch.no_grad():
            assert_near(frozen(batch(2)), expected(batch(2)), "output")
        assert calls == [PASS]


def raised(call: Callable[[], Any]) -> tuple[type, str] | None:
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "BatchNorm1d": lambda: [nn.BatchNorm1d(6), nn.ReLU()],
    "BatchNorm2d": lambda: [nn.BatchNorm2d(6), nn.ReLU()],
    "BatchNorm3d": lambda: [nn.BatchNorm3d(6), nn.ReLU()],
    "SyncBatchNorm": lambda: [nn.SyncBatchNorm(6), nn.ReLU()],
    "Conv1d": lambda: [nn.Conv1d(6, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU()],
    "Conv3d": lambda: [nn.Conv3d(6, 6, 1), nn.BatchNorm3d(6), nn.ReLU()],
    "Conv1d and BatchNorm2d": lambda: [nn.Conv1d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()],
    # An image without a batch (C, H, W) is a batch of signals for the norm; rows of a signal are a batch of vectors.
    "Conv2d and BatchNorm1d": lambda: [nn.Conv2d(6, 6, 1), nn.BatchNorm1d(6), nn.ReLU()],
    "Conv1d, Conv2d": lambda: [nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.BatchNorm1d(6)],
    "Conv1d and MaxPool2d": lambda: [nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool2d(2)],
}


class TestWrongRanks:
    """Layers that do not fit each other or the input return or raise what stock PyTorch does."""

    @pytest.mark.parametrize("name", LAYERS)
    @pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
    @pytest.mark.parametrize("mode", ["training", "evaluation", "frozen"])
    def test_result_or_error_is_that_of_stock(self, name: str, rank: int, mode: str) -> None:
        torch.manual_seed(0)
        stock = randomize_norms(nn.Sequential(*LAYERS[name]())).double().train(mode == "training")
        model = freeze(stock) if mode == "frozen" else fuse(copy.deepcopy(stock))
        x = torch.randn((6,) * rank, dtype=torch.float64)
        outputs: list[Tensor] = []
        with torch.set_grad_enabled(mode != "frozen"):
            errors = [raised(lambda one=one: outputs.append(one(x))) for one in (model, stock)]
        assert errors[0] == errors[1]
        if errors[1] is None:
            assert_near(*outputs, "output")
            assert_same_strides(*outputs)
        for actual, expected in zip(model.state_dict().values(), stock.state_dict().values(), strict=True):
            assert_near(actual, expected, "state")

    def test_one_value_per_channel(self) -> None:
        for shape in ((1, 6), (1, 6, 1)):
            stock = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU())
            fused = fuse(copy.deepcopy(stock))
            errors = [raised(lambda model=model: model(torch.randn(shape))) for model in (fused, stock)]
            assert errors[0] == errors[1] and errors[0] is not None and errors[0][0] is ValueError
            assert int(fused[0].num_batches_tracked) == int(stock[0].num_batches_tracked)

    @pytest.mark.parametrize("dim", [0, 1, 3])
    def test_empty_batch(self, dim: int) -> None:
        stock = network(dim) if dim else nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()).double()
        fused = fuse(copy.deepcopy(stock))
        errors = [raised(lambda model=model: model(batch(dim)[:0])) for model in (fused, stock)]
        assert errors[0] == errors[1]
        for actual, expected in zip(fused.state_dict().values(), stock.state_dict().values(), strict=True):
            assert_near(actual, expected, "state")


#: Shapes with one element in some dimension, whose strides are ambiguous.
STRIDED_SHAPES = ((4, 6, 8, 5, 3), (1, 6, 8, 5, 3), (4, 6, 1, 5, 3), (4, 6, 8, 1, 1), (4, 2, 2, 2, 2), (4, 1, 8, 5, 3))


def strided(shape: tuple[int, ...], order: tuple[int, ...]) -> dict[str, Tensor]:
    """Return tensors whose dimensions are in this order in memory: dense, with gaps, expanded, and with a step."""
    x = torch.randn([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(len(shape))])
    return {
        "dense": x,
        "without the first image": x[1:],
        "without the first channel": x[:, 1:],
        "without the first column": x[..., 1:],
        "every second column": x[..., ::2],
        "expanded batch": x[:1].expand(x.shape),
        "expanded channels": x[:, :1].expand(x.shape),
        "expanded columns": x[..., :1].expand(x.shape),
    }


@pytest.mark.parametrize("rank", [2, 3, 4, pytest.param(5, marks=pytest.mark.full)])
@pytest.mark.parametrize("shape", STRIDED_SHAPES, ids=str)
def test_strides_of_batch_norm(rank: int, shape: tuple[int, ...]) -> None:
    for order in itertools.permutations(range(rank)):
        for name, x in strided(shape[:rank], order).items():
            if x.numel() and (not name.startswith("expanded") or x.shape[0] > 1):
                norm = NORMS[rank - 2](x.shape[1]).eval()
                assert_same_strides(to_stock_layout(x), norm(x))


@pytest.mark.parametrize("rank", [4, 5])
@pytest.mark.parametrize("shape", STRIDED_SHAPES[:3], ids=str)
def test_strides_of_convolution(rank: int, shape: tuple[int, ...]) -> None:
    for order in itertools.permutations(range(rank)):
        for x in strided(shape[:rank], order).values():
            if x.numel():
                conv = CONVOLUTIONS[rank - 2](x.shape[1], 7, 3, padding=1)
                with torch.no_grad():
                    y = conv(x)
                is_channels_last = conv_output_is_channels_last(x, conv.weight)
                if not (is_channels_last and rank == 5):  # then it depends on the library that ATen selects
                    assert_same_strides(to_memory_format(y, is_channels_last), y)


@pytest.mark.parametrize("name", ["r3d_18", pytest.param("mc3_18", marks=pytest.mark.full), "r2plus1d_18"])
def test_torchvision_video(name: str) -> None:
    stub_torchvision_operators()
    video = pytest.importorskip("torchvision.models.video")
    torch.manual_seed(0)
    with torch.device("meta"):
        stock = getattr(video, name)(num_classes=5)
    narrow(stock, 16)
    stock = randomize_norms(stock).double()
    x = torch.randn(2, 3, 4, 32, 32, dtype=torch.float64)
    fused, frozen, expected = (
        fuse(copy.deepcopy(stock)),
        freeze(copy.deepcopy(stock).eval()),
        copy.deepcopy(stock).eval(),
    )
    for training in (True, False):
        with record_stock_norms() as left:
            fused.train(training)(x)
        assert not left
    fused.load_state_dict(stock.state_dict())
    assert_models_match(fused.train(), stock.train(), x.requires_grad_(), steps=1)
    with record_fused_calls() as calls, record_stock_norms() as left, torch.no_grad():
        output = frozen(x)
    assert (calls, left) == ([], [])
    with torch.no_grad():
        assert_near(output, expected(x), "output of the frozen model")


def narrow(model: nn.Module, factor: int) -> None:
    """Divide the channels of a model on the meta device, and initialize it on the CPU."""
    for module in model.modules():
        for attribute in ("in_channels", "out_channels", "num_features", "in_features"):
            channels = getattr(module, attribute, None)
            if channels is not None and channels > 5:
                setattr(module, attribute, max(2, channels // factor))
        if isinstance(module, nn.Conv3d):
            module.weight = nn.Parameter(torch.empty(module.out_channels, module.in_channels, *module.kernel_size))
        elif isinstance(module, nn.Linear):
            module.weight = nn.Parameter(torch.empty(module.out_features, module.in_features))
            module.bias = nn.Parameter(torch.empty(module.out_features))
        elif isinstance(module, nn.BatchNorm3d):
            replacement = nn.BatchNorm3d(module.num_features)
            module.__dict__.update(replacement.__dict__)
        if isinstance(module, nn.Conv3d | nn.Linear):
            module.reset_parameters()
