"""``torch.compile(backend="fused_res")``: what Dynamo captures runs fused, and equals stock PyTorch in float64."""

from __future__ import annotations

import copy
import operator
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fused_res
from benchmarks.styles import BY_NAME
from fused_res import _torch_compat, functional, fuse
from fused_res.fusion.compiled import FusedChain, FusedNorm, fused_res_backend
from fused_res.nn import chain
from tests.fusion.test_styles import assert_training_matches, stock_of
from tests.support.model_comparison import assert_models_match, assert_near, randomize_norms

ROOT = Path(fused_res.__file__).parents[1]


class Spy:
    """The backend, which also keeps the graphs that the inner compiler gets."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, module: fx.GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
        self.graphs.append(module)
        return fused_res_backend(module, inputs, **options)

    def nodes(self, *targets: Any) -> list[fx.Node]:
        """Return the calls of these functions, in all graphs and subgraphs."""
        modules = [m for graph in self.graphs for m in graph.modules() if isinstance(m, fx.GraphModule)]
        return [node for module in modules for node in module.graph.nodes if node.target in targets]

    @property
    def norms(self) -> int:
        """Number of norms that stock PyTorch computes."""
        return len(self.nodes(F.batch_norm, torch.batch_norm))

    @property
    def fused(self) -> list[Any]:
        """The fused calls, in order."""
        modules = [m for graph in self.graphs for m in graph.modules() if isinstance(m, fx.GraphModule)]
        nodes = [node for module in modules for node in module.graph.nodes]
        return [node.target for node in nodes if isinstance(node.target, (FusedChain, FusedNorm))]


@pytest.fixture
def spy() -> Iterator[Spy]:
    torch._dynamo.reset()
    yield Spy()
    torch._dynamo.reset()


class Block(nn.Module):
    """A basic block whose forward no symbolic trace can read: it branches on the input."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        if x.shape[1] < 2:
            return x
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x
        return F.relu(y) * scale


def block() -> Any:
    torch.manual_seed(0)
    return randomize_norms(Block()).double()


def images(batch: int = 2, channels: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, channels, 8, 8, dtype=dtype)


def compiled(model: nn.Module, spy: Spy, **options: Any) -> Any:
    model = copy.deepcopy(model)
    model.compile(backend=spy, **options)
    return model


# Equality with stock, and with fuse()

#: fuse() cannot record these, or they differ most in how Dynamo captures them.
STYLES = ("cifar-option-a", "pre-activation", "hugging-face-output")


@pytest.mark.parametrize("name", STYLES)
def test_style_matches_stock(name: str, spy: Spy) -> None:
    style = BY_NAME[name]
    model = stock_of(style)
    model.compile(backend=spy)
    assert_training_matches(model, stock_of(style), style)
    assert spy.fused and not spy.norms


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in STYLES])
def test_every_other_style_matches_stock(name: str, spy: Spy) -> None:
    style = BY_NAME[name]
    model = stock_of(style)
    model.compile(backend=spy)
    assert_training_matches(model, stock_of(style), style)
    assert spy.norms == 0


def test_same_chains_and_bits_as_fuse(spy: Spy) -> None:
    """The frames of Dynamo's module stack end the chains where the module calls of a recorded forward do."""
    style = BY_NAME["torchvision-basic"]
    model, fused = stock_of(style), fuse(stock_of(style))
    model.compile(backend=spy)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for training in (True, False):
        outputs = [m.train(training)(x) for m in (model, fused)]
        assert torch.equal(*outputs)
        if training:
            for output in outputs:
                output.square().sum().backward()
    for actual, expected in zip(model.parameters(), fused.parameters(), strict=True):
        assert torch.equal(actual.grad, expected.grad)
    for actual, expected in zip(model.state_dict().values(), fused.state_dict().values(), strict=True):
        assert torch.equal(actual, expected)


class ConvNormAct(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


class Chained(nn.Module):
    """Two module calls in a row, then two units in the module's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (ConvNormAct() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        for layer in (*self.third, *self.fourth):
            x = layer(x)
        return x


def test_chains_end_with_module_calls(spy: Spy) -> None:
    torch.manual_seed(0)
    stock = randomize_norms(Chained()).double()
    model = compiled(stock, spy)
    assert_models_match(model, stock, images().requires_grad_())
    # As fuse() does: a call joins units of its caller, but not another call.
    assert [len(call.spec.units) for call in spy.fused] == [1, 3] and not spy.norms


def test_control_flow_and_keyword_arguments(spy: Spy) -> None:
    stock = block()
    model = compiled(stock, spy)
    assert_models_match(model, stock, images().requires_grad_(), scale=0.5)
    assert_near(model.eval()(images()), stock.eval()(images()), "evaluation")
    (training, evaluation) = spy.fused
    assert training.spec == evaluation.spec and training.spec.shortcut == "identity"
    assert (training.training, evaluation.training) == ((True, True), (False, False))


def functional_block(x: Tensor, p: dict[str, Tensor], training: bool) -> Tensor:
    """A block of functions on a dict of tensors, with a projection; the first norm keeps no statistics."""
    y = F.conv2d(x, p["w1"], None, stride=2, padding=1)
    y = F.relu(F.batch_norm(y, None, None, p["g1"], p["b1"], training=True))
    y = F.batch_norm(F.conv2d(y, p["w2"], p["c2"], padding="same"), p["m2"], p["v2"], training=training, momentum=0.3)
    shortcut = torch.conv2d(x, p["ws"], None, (2, 2))
    return torch.relu(y + F.batch_norm(shortcut, p["ms"], p["vs"], p["gs"], None, training, 0.2, 1e-3))


def functional_parameters() -> dict[str, Tensor]:
    torch.manual_seed(3)
    shapes = {"w1": (6, 4, 3, 3), "w2": (6, 6, 3, 3), "ws": (6, 4, 1, 1)}
    weights = {name: torch.randn(shape, dtype=torch.float64).div(4).requires_grad_() for name, shape in shapes.items()}
    vectors = {name: torch.rand(6, dtype=torch.float64).requires_grad_() for name in ("g1", "b1", "c2", "gs")}
    return weights | vectors | {name: torch.rand(6, dtype=torch.float64) for name in ("m2", "v2", "ms", "vs")}


@pytest.mark.parametrize("training", [True, False])
def test_functional_style(training: bool, spy: Spy) -> None:
    function = torch.compile(functional_block, backend=spy, fullgraph=True)
    parameters = [functional_parameters() for _ in range(2)]
    for _ in range(2):
        outputs = [
            call(images(), p, training) for call, p in zip((function, functional_block), parameters, strict=True)
        ]
        assert_near(*outputs, "output")
        for output in outputs:
            output.square().sum().backward()
        for name in parameters[0]:
            assert_near(parameters[0][name], parameters[1][name], name)
            assert_near(parameters[0][name].grad, parameters[1][name].grad, f"gradient of {name}")
    assert spy.norms == 0
    (call,) = spy.fused
    assert call.training == (True, training, training) and call.momentum[1:] == ((0.3, 0.2) if training else (0, 0))


# What is captured, and when again


def test_dynamic_batch_is_compiled_once(spy: Spy) -> None:
    stock = block()
    model = compiled(stock, spy, dynamic=True)
    for batch in (2, 3, 5):
        assert_models_match(model, stock, images(batch).requires_grad_(), steps=1)
    assert len(spy.graphs) == 1 and spy.norms == 0


def test_automatic_dynamic_batch(spy: Spy) -> None:
    stock = block()
    model = compiled(stock, spy)
    for batch in (2, 3, 5, 7):
        assert_models_match(model, stock, images(batch).requires_grad_(), steps=1)
    assert len(spy.graphs) == 2 and spy.norms == 0  # the second is dynamic


def test_changed_requires_grad(spy: Spy) -> None:
    stock = block()
    model = compiled(stock, spy)
    for frozen in ((), ("conv1.weight", "bn1.weight"), ("bn2.bias",)):
        for m in (model, stock):
            for name, parameter in m.named_parameters():
                parameter.requires_grad_(name not in frozen).grad = None
        for m in (model, stock):
            m(images()).square().sum().backward()
        for name, expected in stock.named_parameters():
            assert_near(model.get_parameter(name).grad, expected.grad, name)
            assert (expected.grad is None) is (name in frozen)
    assert spy.fused and not spy.norms


def test_train_and_eval_of_single_layers(spy: Spy) -> None:
    stock = block()
    model = compiled(stock, spy)
    for training in ((True, False), (False, True), (True, True)):
        for m in (model, stock):
            m.bn1.train(training[0])
            m.bn2.train(training[1])
        assert_models_match(model, stock, images(), steps=1)
        assert spy.fused[-1].training == training


def test_graph_break(spy: Spy) -> None:
    class Printing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[0](x)
            if x.sum() > 0:  # depends on data
                x = x * 2
            torch._dynamo.graph_break()
            return self[1](x)

    torch.manual_seed(0)
    stock = randomize_norms(Printing(Block(), Block())).double()
    model = compiled(stock, spy)
    assert_models_match(model, stock, images().requires_grad_())
    assert len(spy.graphs) == 3 and len(spy.fused) == 2 and not spy.norms


# Autocast, grad mode, checkpointing


@pytest.mark.parametrize("training", [True, False])
def test_ambient_autocast(training: bool, spy: Spy) -> None:
    stock = block().float().train(training)
    model = compiled(stock, spy)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = [m(images(dtype=torch.float32)) for m in (model, stock)]
        assert_near(outputs[0], outputs[1], f"autocast {enabled}", 2e-2 if enabled else None)
    # With the float32 identity, the addition is not part of the chain under autocast.
    assert [call.spec.shortcut for call in spy.fused] == ["none", "identity"] and not spy.norms


class InnerAutocast(nn.Module):
    """The second convolution and its norm run under autocast, the first ones not; the addition is outside."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        y = F.relu(block.bn1(block.conv1(x)))
        with torch.autocast("cpu", torch.bfloat16):
            y = block.bn2(block.conv2(y))
        return F.relu(y + x)


def test_no_chain_crosses_an_inner_autocast(spy: Spy) -> None:
    torch.manual_seed(0)
    stock = randomize_norms(InnerAutocast()).float()
    model = compiled(stock, spy)
    outputs = [m(images(dtype=torch.float32)) for m in (model, stock)]
    assert_near(*outputs, "output", 2e-2)
    for output in outputs:
        output.sum().backward()
    for (name, actual), expected in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert_near(actual.grad, expected.grad, name, 5e-2)
    assert [len(call.spec.units) for call in spy.fused] == [1, 1] and not spy.norms
    assert [call.spec.units[0].activation for call in spy.fused] == ["relu", "identity"]


class InnerNoGrad(nn.Module):
    """A frozen first convolution: the chain would compute its gradient if it crossed the end of ``no_grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        with torch.no_grad():
            y = F.relu(block.bn1(block.conv1(x)))
        return F.relu(block.bn2(block.conv2(y)) + x)


def test_no_chain_crosses_an_inner_no_grad(spy: Spy) -> None:
    torch.manual_seed(0)
    stock = randomize_norms(InnerNoGrad()).double()
    model = compiled(stock, spy)
    for m in (model, stock):
        m(images()).square().sum().backward()
    assert model.block.conv1.weight.grad is None and model.block.bn1.weight.grad is None
    for (name, actual), expected in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert_near(actual.grad, expected.grad, name)
    assert spy.fused and not spy.norms


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda context: context.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(context: Any, training: bool, spy: Spy) -> None:
    stock = block().train(training)
    model = compiled(stock, spy)
    for _ in range(2):
        with context():
            assert_near(model(images()), stock(images()), "output")
    assert_near(model(images()), stock(images()), "output with gradients")
    for (name, actual), expected in zip(model.state_dict().items(), stock.state_dict().values(), strict=True):
        assert_near(actual, expected, name)
    assert spy.norms == 0


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=False))


def test_checkpoint_updates_statistics_once(spy: Spy) -> None:
    """Stock PyTorch updates them again in the recomputation; its gradients are the same."""
    torch.manual_seed(0)
    stock = randomize_norms(Checkpointed()).double()
    model = compiled(stock, spy)
    plain = nn.Sequential(stock.first, stock.second)  # the same without checkpointing
    for step in range(2):
        for m in (model, plain):
            m(images()).square().sum().backward()
        for (name, actual), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert_near(actual.grad, expected.grad, f"{name} in step {step}")
        for (name, actual), expected in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
            assert_near(actual, expected, f"{name} in step {step}")
    assert len(spy.fused) == 2 and not spy.norms


@pytest.mark.parametrize("nested", [False, True])
def test_checkpoint_restores_the_random_state(nested: bool, spy: Spy) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def dropped(self, x: Tensor) -> Tensor:
            return F.dropout(self.block(x), 0.5)

        def inner(self, x: Tensor) -> Tensor:
            return checkpoint(self.dropped, x, use_reentrant=False) * 2

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner if nested else self.dropped, x, use_reentrant=False)

    torch.manual_seed(0)
    stock = randomize_norms(Dropping()).double()
    model = compiled(stock, spy)
    for m in (model, stock):
        torch.manual_seed(5)
        m(images()).square().sum().backward()
    for (name, actual), expected in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert_near(actual.grad, expected.grad, name)
    assert model.block.bn1.num_batches_tracked == 1
    assert len(spy.fused) == 1 and not spy.norms


# Layers that share tensors, and tensors that other code reads or writes


class Calls(nn.Module):
    """Convolutions and norms whose calls `function` arranges."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def twice(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(F.relu(m.bn(m.conv(x)))))


def swapped(m: Any, x: Tensor) -> Tensor:
    """The norm's second call ends a chain that begins before its first call."""
    y = m.conv(x)
    first = m.bn(x)
    return F.relu(m.bn(y) + first)


def statistics_read(m: Any, x: Tensor) -> Tensor:
    before = m.bn.running_mean.sum()
    y = m.bn(m.conv(x))
    return F.relu(y + m.bn.running_var.sum() + before)


def statistics_shared(m: Any, x: Tensor) -> Tensor:
    """Two norms of other weights update the same statistics."""
    y = m.bn(m.conv(x))
    z = F.batch_norm(x, m.bn.running_mean, m.bn.running_var, m.other.weight, None, m.training, 0.3)
    return F.relu(y + z)


def buffer_written(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    m.bn.running_mean.mul_(0.5)
    return m.bn(y)


def weight_written(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    with torch.no_grad():
        m.bn.weight.mul_(0.5)
    return m.bn(y) + m.bn.weight.sum()


def weight_written_through_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    with torch.no_grad():
        m.conv.weight.view(-1)[:10].zero_()
    return m.bn(y)


def weight_read(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.bn(m.conv(x))) + m.conv.weight.square().sum()


def input_written(m: Any, x: Tensor) -> Tensor:
    """The convolution reads its input before the write."""
    x = x * 2
    y = m.conv(x)
    x += 1
    return m.bn(y) + x


def computed_weight(m: Any, x: Tensor) -> Tensor:
    w = m.conv.weight
    return m.bn(F.conv2d(x, w - w.mean(), m.conv.bias, padding=1))


def broadcast(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.bn(m.conv(x)) + x.mean((2, 3), keepdim=True))


def clamped(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(x)).clamp(min=0)


def two_readers(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    return F.relu(y) + y.mean()


def read_inside(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return F.relu(m.bn(y)) + y.std()


def in_place_result(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    y += x
    F.relu(y, inplace=True)
    y.mul_(2)
    return y + x


def attribute(m: Any, x: Tensor) -> Tensor:
    """A side effect of Python, which Dynamo makes an output."""
    m.seen = m.bn(m.conv(x))
    return F.relu(m.seen)


#: Function -> norms that must run stock in training, and in evaluation.
ARRANGEMENTS: dict[Callable[[Any, Tensor], Tensor], tuple[int, int]] = {
    twice: (0, 0),
    swapped: (0, 0),
    statistics_read: (1, 1),
    statistics_shared: (2, 2),
    buffer_written: (1, 1),
    weight_written: (1, 1),
    weight_read: (0, 0),
    computed_weight: (0, 0),
    broadcast: (0, 0),
    clamped: (0, 0),
    two_readers: (0, 0),
    read_inside: (0, 0),
    attribute: (0, 0),
}


@pytest.mark.parametrize("function", ARRANGEMENTS, ids=lambda function: function.__name__)
def test_arrangement_of_calls(function: Callable[[Any, Tensor], Tensor], spy: Spy) -> None:
    torch.manual_seed(0)
    stock = randomize_norms(Calls(function)).double()
    model = compiled(stock, spy)
    norms = []
    for training in (True, False):
        assert_models_match(model.train(training), stock.train(training), images().requires_grad_())
        norms.append(spy.norms)
        spy.graphs.clear()
    assert tuple(norms) == ARRANGEMENTS[function]


#: Autograd raises an exception for these in stock PyTorch.
WITHOUT_GRADIENTS = {weight_written_through_a_view: (0, 0), input_written: (0, 0), in_place_result: (0, 0)}


@pytest.mark.parametrize("function", WITHOUT_GRADIENTS, ids=lambda function: function.__name__)
def test_arrangement_of_calls_without_gradients(function: Callable[[Any, Tensor], Tensor], spy: Spy) -> None:
    torch.manual_seed(0)
    stock = randomize_norms(Calls(function)).double()
    model = compiled(stock, spy)
    norms = []
    for training in (True, False):
        with torch.no_grad():
            assert_models_match(model.train(training), stock.train(training), images(), steps=2)
        norms.append(spy.norms)
        if function is in_place_result:  # its result has three names
            assert [call.spec.shortcut for call in spy.fused] == ["identity"]
        spy.graphs.clear()
    assert tuple(norms) == WITHOUT_GRADIENTS[function]


# Other transforms of the model


def test_double_backward(spy: Spy) -> None:
    stock = block()
    model = compiled(stock, spy)
    second = []
    for m in (model, stock):
        x = images().requires_grad_()
        (grad,) = torch.autograd.grad(m(x).sin().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(grad.square().sum(), [x, *m.parameters()]))
    for actual, expected in zip(*second, strict=True):
        assert_near(actual, expected, "second derivative", 1e-8)
    assert spy.fused and not spy.norms


def test_permuted_identity_stays_stock(spy: Spy) -> None:
    """The sum has the strides of its first operand; for other memory formats the norm alone runs fused."""
    stock = block()
    model = compiled(stock, spy)
    x = images().permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    actual, expected = model(x), stock(x)
    assert actual.stride() == expected.stride()
    assert_near(actual, expected, "output")
    assert not any(isinstance(call, FusedChain) and call.spec.shortcut == "identity" for call in spy.fused)


def test_vmap_runs_stock(spy: Spy) -> None:
    def norm(x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(F.conv2d(x, weight), None, None, training=True))

    weight = images(4)[:, :, :3, :3]
    x = torch.stack([images(), images() + 1])
    function = torch.compile(lambda x: torch.func.vmap(norm)(x), backend=spy)
    assert_near(function(x), torch.stack([norm(part) for part in x]), "output")
    assert spy.norms == 1 and not spy.fused


def test_forward_mode_runs_stock(spy: Spy) -> None:
    stock = block()

    def inside_dual_level(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return stock(x)

    assert_near(torch.compile(inside_dual_level, backend=spy)(images()), stock(images()), "output")
    assert spy.norms == 2 and not spy.fused


def test_fused_model_is_not_fused_twice(spy: Spy) -> None:
    style = BY_NAME["torchvision-basic"]
    model = fuse(stock_of(style))
    model.compile(backend=spy)
    assert_training_matches(model, stock_of(style), style)
    assert not spy.fused and not spy.norms
    assert len(spy.nodes(torch.ops.fused_res.block_forward.default)) == 2 * 5


class Three(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(channels) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.blocks:
            x = module(x)
        return x


@pytest.mark.parametrize("channels", [4, 128])
@pytest.mark.usefixtures("process_group")
def test_ddp(channels: int, spy: Spy) -> None:
    """Dynamo splits the graph for DDP's buckets, the first of which has 1 MiB, and compiles every part."""
    torch.manual_seed(0)
    stock = randomize_norms(Three(channels)).double()
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(stock), bucket_cap_mb=2)
    model = torch.compile(wrapped, backend=spy)
    for _ in range(2):
        for m in (model, stock):
            m(images(channels=channels)).square().sum().backward()
    for (name, actual), expected in zip(wrapped.module.named_parameters(), stock.parameters(), strict=True):
        assert_near(actual.grad, expected.grad, name)
    for (name, actual), expected in zip(wrapped.module.named_buffers(), stock.buffers(), strict=True):
        assert_near(actual, expected, name)
    assert spy.fused and not spy.norms
    assert (len(spy.graphs) > 1) is (channels > 4)


def test_export_sees_stock_operators(spy: Spy) -> None:
    stock = block().eval()
    model = compiled(stock, spy)
    model(images())
    exported = torch.export.export(model, (images(),))
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert {"aten.conv2d.default", "aten.batch_norm.default"} <= targets
    assert not any("fused_res" in target for target in targets)
    assert_near(exported.module()(images()), stock(images()), "exported")


class Frozen(nn.Module):
    """A frozen batch norm as detection libraries write it."""

    def __init__(self, channels: int, shift_sign: float = 1.0) -> None:
        super().__init__()
        self.eps, self.shift_sign = 1e-3, shift_sign
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels, dtype=torch.float64) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w, b, mean, var = (
            tensor.reshape(1, -1, 1, 1) for tensor in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = w * (var + self.eps).rsqrt()
        return x * scale + (b - self.shift_sign * mean * scale)


@pytest.mark.parametrize("training", [True, False])
def test_frozen_norms_in_a_block(training: bool, spy: Spy) -> None:
    model = block().train(training)
    model.bn1, model.bn2 = Frozen(4), Frozen(4)
    fused = compiled(model, spy)
    assert_models_match(fused, model, images())
    assert [type(call) for call in spy.fused] == [FusedChain]
    assert not spy.nodes(operator.mul)[1:]  # the block's own scale is left


@pytest.mark.parametrize("change", ["sign", "other tensor", "statistics written"])
def test_arithmetic_that_is_no_frozen_norm(change: str, spy: Spy) -> None:
    class Writes(Frozen):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if change == "statistics written":
                self.running_mean.add_(1)
            return y * self.weight.sum() if change == "other tensor" else y

    model = nn.Sequential(nn.Conv2d(4, 4, 3), Writes(4, -1.0 if change == "sign" else 1.0), nn.ReLU()).double()
    fused = compiled(model, spy)
    assert_models_match(fused, model, images())
    assert not spy.fused


@pytest.mark.parametrize(
    ("convolution", "norm", "activation"),
    [
        (nn.Conv1d, nn.BatchNorm1d, nn.ReLU6(inplace=True)),
        (nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU(0.2)),
        (nn.Conv2d, nn.BatchNorm2d, nn.SiLU(inplace=True)),
        (nn.Conv3d, nn.BatchNorm3d, nn.ReLU()),
        (nn.Linear, nn.BatchNorm1d, nn.ReLU(inplace=True)),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_dimensions_and_activations(convolution: Any, norm: Any, activation: nn.Module, spy: Spy) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = convolution(4, 6, 3) if convolution is not nn.Linear else nn.Linear(4, 6)
            self.bn, self.activation = norm(6), activation

        def forward(self, x: Tensor) -> Tensor:
            return self.activation(self.bn(self.conv(x)))

    torch.manual_seed(0)
    stock = randomize_norms(Layers()).double()
    model = compiled(stock, spy)
    spatial = {nn.Linear: (), nn.Conv1d: (7,), nn.Conv2d: (7, 6), nn.Conv3d: (5, 4, 6)}[convolution]
    x = torch.randn(3, 4, *spatial, dtype=torch.float64, requires_grad=True)
    assert_models_match(model, stock, x)
    assert_near(model.eval()(x), stock.eval()(x), "evaluation")
    assert len(spy.fused) == 2 and not spy.norms
    assert not spy.nodes(F.relu, F.relu6, F.hardtanh, F.silu, F.leaky_relu)


def test_forward_hooks_run(spy: Spy) -> None:
    stock = block()
    model = compiled(stock, spy)
    for m in (model, stock):
        m.bn1.register_forward_hook(lambda module, args, output: output * 2)
    assert_models_match(model, stock, images().requires_grad_())
    assert spy.fused and not spy.norms


# Inductor


@pytest.fixture
def aot_eager(monkeypatch: pytest.MonkeyPatch) -> list[fx.Graph]:
    """Trace as for Inductor, but compile nothing; return the traced forward graphs."""
    graphs: list[fx.Graph] = []

    def compile_traced(module: fx.GraphModule, inputs: Any, mode: str | None) -> Any:
        from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
        from torch._dynamo.backends.common import aot_autograd

        def keep(traced: fx.GraphModule, inputs: Any) -> Any:
            graphs.append(traced.graph)
            return make_boxed_func(traced.forward)

        partition = min_cut_rematerialization_partition
        return aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=partition)(module, inputs)

    monkeypatch.setattr(_torch_compat, "compile_with_inductor", compile_traced)
    return graphs


def operators(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_traced_calls_are_opaque_operators(aot_eager: list[fx.Graph], spy: Spy) -> None:
    """AOTAutograd gets one operator per block and direction, and the update of the statistics."""
    stock = block()
    model = compiled(stock, spy, options={"inner": "inductor"})
    assert_models_match(model, stock, images().requires_grad_())
    forward, backward = map(operators, aot_eager)
    assert forward.count("fused_res.block_forward.default") == 1
    assert backward.count("fused_res.block_backward.default") == 1
    assert not any("convolution" in name or "batch_norm" in name for name in (*forward, *backward))
    assert_near(model.eval()(images()), stock.eval()(images()), "evaluation")


@pytest.mark.full
@pytest.mark.parametrize("style", ["pre-activation", "hugging-face"])
def test_traced_style_matches_stock(style: str, aot_eager: list[fx.Graph], spy: Spy) -> None:
    model = stock_of(BY_NAME[style])
    model.compile(backend=spy, options={"inner": "inductor"})
    assert_training_matches(model, stock_of(BY_NAME[style]), BY_NAME[style])
    assert not spy.norms


def test_traced_dynamic_batch_and_requires_grad(aot_eager: list[fx.Graph], spy: Spy) -> None:
    stock = block()
    model = compiled(stock, spy, dynamic=True, options={"inner": "inductor"})
    for m in (model, stock):
        m.conv1.weight.requires_grad_(False)
        m.bn2.bias.requires_grad_(False)
    assert_models_match(model, stock, images(2), steps=1)
    compilations = len(spy.graphs)  # Dynamo may capture the graph twice, to specialize the settings of norms
    for batch in (3, 5):
        assert_models_match(model, stock, images(batch), steps=1)
    assert len(spy.graphs) == compilations and spy.fused


def test_traced_checkpoint(aot_eager: list[fx.Graph], spy: Spy) -> None:
    torch.manual_seed(0)
    stock = randomize_norms(Checkpointed()).double()
    model = compiled(stock, spy, options={"inner": "inductor"})
    plain = nn.Sequential(stock.first, stock.second)
    for m in (model, plain):
        m(images()).square().sum().backward()
    for (name, actual), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert_near(actual, expected, name)
    for (name, actual), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_near(actual.grad, expected.grad, name)
    assert operators(aot_eager[1]).count("fused_res.block_forward.default") == 1  # recomputed in backward
    assert spy.fused and not spy.norms


def test_traced_autocast(aot_eager: list[fx.Graph], spy: Spy) -> None:
    stock = block().float()
    model = compiled(stock, spy, options={"inner": "inductor"})
    for m in (model, stock):
        with torch.autocast("cpu", torch.bfloat16):
            y = m(images(dtype=torch.float32))
        y.float().square().sum().backward()
    for (name, actual), expected in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert_near(actual.grad, expected.grad, name, 5e-2)
    assert spy.fused and not spy.norms


def test_inductor(spy: Spy) -> None:
    stock = block()
    model = compiled(stock, spy, options={"inner": "inductor"})
    assert_models_match(model, stock, images().requires_grad_())
    assert_near(model.eval()(images()), stock.eval()(images()), "evaluation")
    assert len(spy.fused) == 2


# Options and registration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": {"iner": "eager"}}, "options: expected inner, backend, recompute, got 'iner'"),
        ({"options": {"inner": "aot"}}, "inner: expected one of ('eager', 'inductor'), got 'aot'"),
        ({"options": {"backend": "cudnn"}}, "backend must be one of"),
        ({"options": {"recompute": "all"}}, "recompute must be one of"),
        ({"mode": "max-autotune"}, "mode: expected None for inner='eager', got 'max-autotune'"),
    ],
    ids=lambda value: str(value),
)
def test_unknown_option(options: Any, message: str, spy: Spy) -> None:
    with pytest.raises(BackendCompilerFailed) as raised:
        compiled(block(), spy, **options)(images())
    assert isinstance(raised.value.inner_exception, ValueError)
    assert message in str(raised.value)


def test_backend_and_recompute(monkeypatch: pytest.MonkeyPatch, spy: Spy) -> None:
    calls = []
    run_block = functional.run_block
    monkeypatch.setattr(functional, "run_block", lambda *a, **k: calls.append(a) or run_block(*a, **k))
    stock = block()
    model = compiled(stock, spy, options={"backend": "reference", "recompute": "norm"})
    assert_models_match(model, stock, images().requires_grad_())
    assert {(arguments[5], arguments[7]) for arguments in calls} == {("norm", "reference")}


def test_switched_off(monkeypatch: pytest.MonkeyPatch, spy: Spy) -> None:
    monkeypatch.setattr(chain, "enabled", False)
    stock = block()
    assert_models_match(compiled(stock, spy), stock, images().requires_grad_())
    assert spy.norms == 2 and not spy.fused


def test_entry_point(tmp_path: Path) -> None:
    """An installed package is found by its name, without an import of fused_res, and importing it imports no Dynamo."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / "entry_point_of_fused_res-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: entry-point-of-fused-res\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in project["entry-points"]["torch_dynamo_backends"].items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[torch_dynamo_backends]", *lines, ""]))
    code = (
        "import sys, torch; from torch import nn\n"
        "model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())\n"
        "x = torch.randn(2, 3, 8, 8)\n"
        "y = torch.compile(model, backend='fused_res')(x)\n"
        "assert 'FusedChain' not in y.grad_fn.name() and 'ResidualBlock' in y.grad_fn.name(), y.grad_fn\n"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)
    code = "import sys, fused_res; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)
