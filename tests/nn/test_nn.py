"""fused_res.nn compared with the same layers run unfused (`fused = False`), and with torchvision."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from fused_res import nn as fnn
from fused_res.nn import chain
from fused_res.nn.spec_builder import build_block_spec
from fused_res.testing import stub_torchvision_operators
from tests.support.model_comparison import assert_models_match, assert_near, record_fused_calls

stub_torchvision_operators()


def projection(inplanes: int, outplanes: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))


def randomize_all_norms(module: nn.Module) -> nn.Module:
    """Randomize affine parameters and running statistics; the initial ones and zeros would hide errors."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            if norm.weight is not None:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
            if norm.bias is not None:
                nn.init.uniform_(norm.bias, -0.5, 0.5)
            if norm.running_mean is not None and norm.running_var is not None:
                nn.init.uniform_(norm.running_mean, -0.5, 0.5)
                nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return module


def pair(block: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Return a block and a copy that runs its unfused PyTorch layers."""
    fused = randomize_all_norms(block.to(dtype))
    stock = copy.deepcopy(fused)
    for module in stock.modules():
        if isinstance(module, fnn.FusableModule):
            module.fused = False
    return fused, stock


def images(channels: int, dtype: torch.dtype = torch.float64, size: int = 9) -> Tensor:
    return (torch.randn(3, channels, size, size, dtype=dtype) + 0.3).requires_grad_()


BLOCKS = {
    "basic": lambda **kw: (fnn.BasicBlock(6, 6, **kw), 6),
    "basic projection": lambda **kw: (fnn.BasicBlock(4, 6, 2, projection(4, 6, 2), **kw), 4),
    "basic plain": lambda **kw: (fnn.BasicBlock(4, 6, 2, shortcut=False, **kw), 4),
    "bottleneck": lambda **kw: (fnn.Bottleneck(16, 4, **kw), 16),
    "bottleneck projection": lambda **kw: (fnn.Bottleneck(8, 4, 2, projection(8, 16, 2), **kw), 8),
    "bottleneck grouped": lambda **kw: (fnn.Bottleneck(16, 4, groups=2, base_width=128, **kw), 16),
    "bottleneck dilated": lambda **kw: (fnn.Bottleneck(16, 4, dilation=2, **kw), 16),
    "conv bn relu": lambda **kw: (fnn.ConvBNAct2d(3, 5, 5, 2, bias=True, **kw), 3),
    "conv bn": lambda **kw: (fnn.ConvBNAct2d(3, 5, (3, 1), activation="identity", **kw), 3),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_matches_stock_layers(name: str, dtype: torch.dtype, train: bool) -> None:
    torch.manual_seed(0)
    block, channels = BLOCKS[name]()
    fused, stock = pair(block.train(train), dtype)
    with record_fused_calls() as calls:
        assert_models_match(fused, stock, images(channels, dtype))
    assert calls == ["residual_block"] * 2


@pytest.mark.parametrize("name", ["basic projection", "bottleneck"])
@pytest.mark.parametrize("recompute", ["norm", "conv"])
def test_recompute_matches_stock(name: str, recompute: str) -> None:
    torch.manual_seed(0)
    block, channels = BLOCKS[name](recompute=recompute)
    assert_models_match(*pair(block), images(channels).to(memory_format=torch.channels_last))


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"momentum": 0.7, "eps": 0.1},
        {"momentum": -1.2},
        {"track_running_stats": False},
        {"affine": False},
        {"bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_batch_norm_options_match_stock(options: dict, train: bool) -> None:
    torch.manual_seed(0)
    norm = lambda channels: nn.BatchNorm2d(channels, **options)  # noqa: E731
    fused, stock = pair(fnn.Bottleneck(16, 4, norm_layer=norm).train(train))
    with record_fused_calls() as calls:
        assert_models_match(fused, stock, images(16), steps=3)
    assert calls == ["residual_block"] * 3


@pytest.mark.parametrize("frozen", [("bn1",), ("bn2", "downsample.1"), ("bn1", "bn2", "downsample.1")])
def test_frozen_statistics_match_stock(frozen: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    fused, stock = pair(BLOCKS["basic projection"]()[0])
    for model, name in itertools.product((fused, stock), frozen):
        model.get_submodule(name).eval().requires_grad_(False)
    with record_fused_calls() as calls:
        assert_models_match(fused, stock, images(4))
    assert calls


@pytest.mark.parametrize("frozen", [("conv1", "bn1"), ("conv1",), ("bn3", "downsample"), ("",)], ids=str)
def test_frozen_parameters_match_stock(frozen: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    fused, stock = pair(BLOCKS["bottleneck projection"]()[0])
    for model, name in itertools.product((fused, stock), frozen):
        model.get_submodule(name).requires_grad_(False)
    assert_models_match(fused, stock, images(8).detach())
    assert_models_match(fused, stock, images(8))


def test_bfloat16_convolutions_with_float32_norms() -> None:
    torch.manual_seed(0)
    fused, stock = pair(BLOCKS["bottleneck projection"]()[0], torch.float32)
    for module in (*fused.modules(), *stock.modules()):
        if isinstance(module, nn.Conv2d):
            module.bfloat16()
    x = images(8, torch.bfloat16)
    with record_fused_calls() as calls:
        assert_near(fused(x), stock(x), "output")
    assert calls


@pytest.mark.parametrize("kind", [fnn.BasicBlock, fnn.Bottleneck])
def test_keys_and_initial_weights_match_torchvision(kind: type) -> None:
    resnet = pytest.importorskip("torchvision.models.resnet")
    models = []
    for block in (kind, getattr(resnet, kind.__name__)):
        torch.manual_seed(0)
        down = projection(8, 4 * kind.expansion, 2)
        models.append(block(8, 4, 2, down).double())
    ours, theirs = models
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert_models_match(ours, theirs, images(8))


class TestBatchNormAct:
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
    @pytest.mark.parametrize("options", [{}, {"activation": "identity", "momentum": None}, {"affine": False}], ids=str)
    def test_matches_stock(self, train: bool, residual: bool, options: dict) -> None:
        torch.manual_seed(0)
        fused, stock = pair(fnn.BatchNormAct2d(5, **options).train(train))
        extra = {"residual": images(5)} if residual else {}
        with record_fused_calls() as calls:
            assert_models_match(fused, stock, images(5), **extra)
        assert calls == ["batch_norm_act"] * 2

    def test_is_subclass_of_batch_norm(self) -> None:
        layer = fnn.BatchNormAct2d(5, 1e-3, backend="reference")
        assert isinstance(layer, nn.BatchNorm2d)
        assert list(layer.state_dict()) == list(nn.BatchNorm2d(5).state_dict())
        assert "eps=0.001" in repr(layer) and "activation='relu'" in repr(layer) and "'reference'" in repr(layer)

    def test_broadcast_or_promoted_residual_runs_unfused(self) -> None:
        fused, stock = pair(fnn.BatchNormAct2d(5))
        x = images(5)
        for residual in (torch.ones(5, 1, 1, dtype=torch.float64), torch.ones_like(x, dtype=torch.float32)):
            with record_fused_calls() as calls:
                assert_near(fused(x, residual), stock(x, residual), "output")
            assert not calls

    def test_invalid_arguments_raise(self) -> None:
        with pytest.raises(ValueError, match="activation must be one of"):
            fnn.BatchNormAct2d(5, activation="gelu")
        with pytest.raises(ValueError, match="4D"):
            fnn.BatchNormAct2d(5)(torch.ones(2, 5))


class TestUnfusedPath:
    """Unsupported modules, contexts and inputs run layer by layer."""

    def test_hook_on_inner_module_runs_unfused(self) -> None:
        fused, stock = pair(BLOCKS["bottleneck"]()[0])
        hook_calls = []
        handle = fused.bn2.register_forward_hook(lambda *_: hook_calls.append(1))
        with record_fused_calls() as calls:
            assert_models_match(fused, stock, images(16))
        assert hook_calls and not calls
        handle.remove()
        with record_fused_calls() as calls:
            assert_models_match(fused, stock, images(16))
        assert calls

    @pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_full_backward_hook"])
    def test_global_hook_is_called_for_inner_modules(self, register: str) -> None:
        fused, stock = pair(BLOCKS["bottleneck"]()[0])
        hooked = set()
        handle = getattr(nn.modules.module, register)(lambda module, *_: hooked.add(module) and None)
        try:
            assert_models_match(fused, stock, images(16), steps=1)
        finally:
            handle.remove()
        assert {fused.conv1, fused.bn3} <= hooked

    def test_full_backward_hook_on_the_last_norm(self) -> None:
        """PyTorch forbids to write to the output of a module with such a hook, which the shortcut is added to."""
        fused, stock = pair(BLOCKS["bottleneck"]()[0])
        hook_calls = []
        for block in (fused, stock):
            block.bn3.register_full_backward_hook(lambda *_: hook_calls.append(1))
        assert_models_match(fused, stock, images(16), steps=1)
        assert hook_calls == [1, 1]

    @pytest.mark.parametrize(
        "change",
        [
            lambda block: setattr(block, "bn1", nn.GroupNorm(2, 4).double()),
            lambda block: setattr(block, "bn1", nn.InstanceNorm2d(4).double()),
            lambda block: setattr(block, "relu", nn.SiLU()),
            lambda block: setattr(block, "bn2", block.bn1),
            lambda block: setattr(block.conv2, "padding_mode", "circular"),
            lambda block: setattr(block.conv2, "forward", lambda x: x),
            lambda block: torch.nn.utils.parametrizations.weight_norm(block.conv1),
            lambda block: torch.nn.utils.parametrizations.spectral_norm(block.conv1),
            lambda block: prune.random_unstructured(block.conv1, "weight", 0.5),
        ],
    )
    def test_unsupported_children_run_unfused(self, change) -> None:
        fused, stock = pair(BLOCKS["bottleneck"]()[0].eval())
        for model in (fused, stock):
            torch.manual_seed(2)
            change(model)
        with record_fused_calls() as calls:
            assert_models_match(fused, stock, images(16), steps=1)
        assert not calls

    def test_broadcast_shortcut_runs_unfused(self) -> None:
        conv, norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        fused, stock = pair(fnn.ResidualBlock([(conv, norm)]))
        with record_fused_calls() as calls:
            assert_models_match(fused, stock, images(1))
        assert not calls

    def test_invalid_input_rank_or_dtype_raises_stock_error(self) -> None:
        block = BLOCKS["bottleneck"]()[0]
        with pytest.raises(ValueError, match="expected 4D input"):
            block(torch.ones(16, 8, 8))
        with pytest.raises(RuntimeError):
            block(torch.ones(2, 16, 8, 8, dtype=torch.int64))

    def test_func_transforms_run_unfused(self) -> None:
        block = BLOCKS["bottleneck"]()[0].double().eval()
        x = images(16)
        expected = torch.autograd.grad(block(x).sum(), x)[0]
        with record_fused_calls() as calls:
            actual = torch.func.grad(lambda x: block(x).sum())(x)
        assert_near(actual, expected, "gradient")
        assert not calls

    def test_functional_call_uses_given_parameters(self) -> None:
        fused, stock = pair(BLOCKS["bottleneck"]()[0].eval())
        state = {name: tensor * 1.1 for name, tensor in fused.state_dict().items() if tensor.is_floating_point()}
        x = images(16)
        with record_fused_calls() as calls:
            actual = torch.func.functional_call(fused, state, (x,))
        assert_near(actual, torch.func.functional_call(stock, state, (x,)), "output")
        assert calls


class TestAutocast:
    @pytest.mark.parametrize("name", BLOCKS)
    def test_matches_stock(self, name: str) -> None:
        torch.manual_seed(0)
        block, channels = BLOCKS[name]()
        fused, stock = pair(block, torch.float32)
        x = images(channels, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            assert_models_match(fused, stock, x.detach(), steps=1)

    def test_float32_identity_shortcut_runs_unfused(self) -> None:
        block = BLOCKS["basic"]()[0]
        x = images(6, torch.float32)
        for input, expected in ((x, []), (x.bfloat16(), ["residual_block"])):
            with torch.autocast("cpu", torch.bfloat16), record_fused_calls() as calls:
                assert block(input).dtype == torch.bfloat16
            assert calls == expected


def test_one_value_per_channel_raises_and_leaves_the_state_of_stock() -> None:
    fused, stock = pair(BLOCKS["bottleneck"]()[0])
    for block in (fused, stock):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            block(torch.ones(1, 16, 1, 1, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(fused.state_dict().values(), stock.state_dict().values(), strict=True))


def test_running_stats_update_once_under_checkpointing() -> None:
    fused, stock = pair(BLOCKS["bottleneck"]()[0])
    x = images(16)
    checkpoint(fused, x, use_reentrant=False).sum().backward()
    stock(x.detach().requires_grad_()).sum().backward()
    for (name, ours), theirs in zip(fused.state_dict().items(), stock.state_dict().values(), strict=True):
        assert_near(ours, theirs, name)
    for (name, ours), theirs in zip(fused.named_parameters(), stock.parameters(), strict=True):
        assert_near(ours.grad, theirs.grad, name)


@pytest.mark.parametrize("name", ["basic", "bottleneck projection", "conv bn relu"])
def test_compiled_block_is_one_graph_and_matches_stock(name: str) -> None:
    torch.manual_seed(0)
    block, channels = BLOCKS[name]()
    fused, stock = pair(block)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with record_fused_calls() as calls:
        for model in (fused, stock):
            model.train()
        x = images(channels)
        outputs = compiled(x), stock(x)
        assert_near(*outputs, "output in training")
        gradients = [torch.autograd.grad(output.square().sum(), x)[0] for output in outputs]
        assert_near(*gradients, "input's gradient")
        for (key, ours), theirs in zip(fused.state_dict().items(), stock.state_dict().values(), strict=True):
            assert_near(ours, theirs, key)
        for model in (fused, stock):
            model.eval()
        assert_near(compiled(x), stock(x), "output in evaluation")
    assert calls


def test_deepcopy_and_pickle_preserve_settings() -> None:
    block = BLOCKS["bottleneck projection"](recompute="norm")[0].double().eval()
    x = images(8)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert other.recompute == "norm"
        assert torch.equal(other(x), block(x))
    assert "recompute='norm'" in repr(block) and "shortcut='projection'" in repr(block)


def test_invalid_arguments_raise() -> None:
    unit = (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="units must be"):
        fnn.ResidualBlock([])
    with pytest.raises(ValueError, match="shortcut must be"):
        fnn.ResidualBlock([unit], "projection")
    with pytest.raises(ValueError, match="backend must be one of"):
        fnn.ResidualBlock([unit], backend="cudnn")
    with pytest.raises(ValueError, match="recompute must be one of"):
        fnn.ResidualBlock([unit], recompute="all")
    with pytest.raises(ValueError, match="groups=1"):
        fnn.BasicBlock(4, 4, groups=2)
    with pytest.raises(ValueError, match="downsample must be None"):
        fnn.BasicBlock(4, 4, downsample=projection(4, 4, 1), shortcut=False)
    with pytest.raises(ValueError, match="activation must be one of"):
        fnn.ConvBNAct2d(3, 3, activation="gelu")
    for units in (None, unit, [unit[0]], [(unit[0], "bn")], [(*unit, nn.ReLU())]):
        with pytest.raises(ValueError, match="units must be"):
            fnn.ResidualBlock(units)
    with pytest.raises(TypeError, match="downsample must be a torch.nn.Module or None, got 'identity'"):
        fnn.BasicBlock(4, 4, downsample="identity")
    with pytest.raises(TypeError, match="shortcut must be True or False, got 'none'"):
        fnn.Bottleneck(4, 4, shortcut="none")
    for kernel_size in ("3", None, (3, 3, 3)):
        with pytest.raises(TypeError, match="kernel_size must be an integer or a pair of integers"):
            fnn.ConvBNAct2d(3, 3, kernel_size)
    for make in (
        lambda norm: fnn.ConvBNAct2d(3, 3, norm_layer=norm),
        lambda norm: fnn.BasicBlock(3, 3, norm_layer=norm),
    ):
        for norm in (nn.BatchNorm2d(3), "bn"):
            with pytest.raises(TypeError, match="norm_layer must construct a norm from its number of channels"):
                make(norm)


@pytest.mark.parametrize("settings", [{"momentum": math.nan}, {"momentum": math.inf}])
def test_non_finite_momentum_runs_unfused(settings: dict) -> None:
    x = images(4).float()
    outcomes = []
    for fused in (True, False):
        torch.manual_seed(0)
        layer = fnn.ConvBNAct2d(4, 4, norm_layer=lambda channels: nn.BatchNorm2d(channels, **settings))
        layer.fused = fused
        outcomes.append((layer(x), layer.bn.running_mean, layer.bn.running_var))
        assert layer.unsupported_reason() is not None
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize(("eps", "training"), [(0.0, True), (-1e-5, True), (-1e-5, False)])
def test_non_positive_eps_raises(eps: float, training: bool) -> None:
    x = images(4).float()
    for layer in (nn.BatchNorm2d(4, eps), fnn.BatchNormAct2d(4, eps), fnn.BasicBlock(4, 4)):
        for norm in layer.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eps = eps
        with pytest.raises(ValueError, match="eps must be"):
            layer.train(training)(x)


def conv(kernel: int, stride: int, padding: int | str, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(2, 2, kernel, stride, padding, dilation)


@pytest.mark.parametrize(
    ("main", "other", "equal"),
    [
        ([(3, 2, 1)], [(1, 2, 0)], True),
        ([(1, 2, 0), (3, 1, 1)], [(1, 2, 0)], True),
        ([(3, 1, 1), (3, 2, 1), (5, 2, 2)], [(1, 4, 0)], True),
        ([(3, 2, "valid")], [(1, 2, 0)], False),
        ([(3, 1, "same", 2)], [(1, 1, 0)], True),
        ([(3, 1, "same"), (2, 2, 0)], [(1, 2, 0)], False),
        ([(3, 1, 2)], [(1, 1, 0)], False),
    ],
)
def test_shortcut_is_supported_iff_sizes_match_for_every_input(main: list, other: list, equal: bool) -> None:
    def build(settings: list) -> nn.Sequential:
        return nn.Sequential(*(conv(*s) for s in settings))

    sizes = [(build(main)(x).shape, build(other)(x).shape) for x in (torch.ones(1, 2, n, n + 1) for n in range(7, 19))]
    assert all(a == b for a, b in sizes) == equal
    keys = []
    for layer in (*build(main), *build(other)):
        matched = chain.Chain()
        assert matched.add(layer, nn.BatchNorm2d(2), "identity") is None
        keys += matched.keys
    if len(other) == 1:
        assert isinstance(build_block_spec(tuple(keys), "projection", None), str) != equal
