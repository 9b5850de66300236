"""``torch.compile(backend="fused_res")``: what Dynamo captures runs fused, and equals stock PyTorch in float64."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

import fused_res
from benchmarks.styles import BY_NAME
from fused_res import _torch_compat, fuse, functional
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
STYLES = ("torchvision-bottleneck", "cifar-option-a", "pre-activation", "hugging-face-output", "fastai")


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
    style = BY_NAME["torchvision-bottleneck"]
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
    assert len(spy.graphs) == 3 and spy.norms == 0


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
    fused = fuse(copy.deepcopy(stock))
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = [m(images(dtype=torch.float32)) for m in (model, stock, fused)]
        # The sum with the float32 identity is not one chain under autocast: the second norm has a "tensor" residual.
        assert outputs[0].dtype is outputs[1].dtype
        assert torch.equal(outputs[0], outputs[2])
        assert_near(outputs[0], outputs[1], f"autocast {enabled}", 5e-2 if enabled else None)
    assert len(spy.graphs) == 2


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
