"""Situations from public reports: whatever is done to a fused or frozen model, it computes what stock PyTorch computes.

Each test covers a kind of situation: a network used in pieces, functions and methods replaced before and after fusing,
frozen models inside trained ones, gradients of the input, writes to weights, reparametrized weights, extractors.
"""

from __future__ import annotations

import copy
import itertools
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import fused_res
from fused_res import freeze, fuse, models, summarize
from fused_res import nn as fnn
from fused_res.testing import stub_torchvision_operators
from tests.support.model_comparison import assert_models_match, assert_near, randomize_norms, small_resnet

stub_torchvision_operators()
torchvision = pytest.importorskip("torchvision")
resnet = torchvision.models.resnet
feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "basic": small_resnet,
    "bottleneck": lambda: small_resnet("Bottleneck"),
    "sequential": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5),
    ),
    "fused_res.nn": lambda: nn.Sequential(
        fnn.ConvBNAct2d(3, 8), nn.MaxPool2d(3, 2, 1), fnn.BasicBlock(8, 8), fnn.Bottleneck(8, 2), fnn.BatchNormAct2d(8),
    ),
    "fused_res.models": lambda: models.cifar_resnet(8),
}  # fmt: skip

#: Both transformations, as functions of a model that return a transformed copy.
TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "fuse": lambda model: fuse(copy.deepcopy(model)),
    "freeze": freeze,
}


def make(name: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = randomize_norms(NETWORKS[name]()).to(dtype)
    return fused_res.unfuse(model)  # modules of fused_res.nn run fused from the start


def images(size: int = 32, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def count_stock_norms(model: nn.Module, x: Tensor) -> int:
    """Return the number of batch norms that a forward runs with PyTorch's operator."""
    with torch.autograd.profiler.profile() as profile:
        model(x)
    return sum(event.name == "aten::batch_norm" for event in profile.function_events)


def check_equal(actual: Any, expected: Any, name: str = "output", tolerance: float | None = None) -> None:
    """Compare tensors, or lists and dictionaries of tensors."""
    if isinstance(expected, dict):
        assert list(actual) == list(expected), name
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, Tensor):
        assert_near(actual, expected, name, tolerance)
        return
    for at, pair in enumerate(zip(actual, expected, strict=True)):
        check_equal(*pair, f"{name} {at}", tolerance)


def equal_states(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Return whether two state dictionaries have equal keys and, bit by bit, equal tensors."""
    return list(actual) == list(expected) and all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.fixture(params=TRANSFORMS)
def transform(request: pytest.FixtureRequest) -> Callable[[nn.Module], Any]:
    return TRANSFORMS[request.param]


class TestPieces:
    """A network whose children are called from outside, one by one."""

    @staticmethod
    def stem(net: Any, x: Tensor) -> list[Tensor]:
        return [h := net.conv1(x), h := net.bn1(h), h := net.relu(h), net.maxpool(h)]

    @staticmethod
    def encoder(net: Any, x: Tensor) -> list[Tensor]:
        features = [net.relu(net.bn1(net.conv1((x - 0.45) / 0.225)))]
        features.append(net.layer1(net.maxpool(features[-1])))
        for layer in (net.layer2, net.layer3, net.layer4):
            features.append(layer(features[-1]))
        return features

    @staticmethod
    def children(net: Any, x: Tensor) -> list[Tensor]:
        features = []
        for child in itertools.islice(net.children(), 8):
            features.append(x := child(x))
        return features

    @staticmethod
    def wrapped(net: Any, x: Tensor) -> Any:
        return nn.Sequential(*list(net.children())[:-2])(x)

    @staticmethod
    def blocks_inside_out(net: Any, x: Tensor) -> list[Tensor]:
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        block = net.layer2[0]
        branch = block.bn1(block.conv1(net.layer1(x)))
        return [branch, block.downsample(net.layer1(x)), block.downsample[0](net.layer1(x)), block.relu(branch)]

    @pytest.mark.parametrize("used", [False, True], ids=["first", "after a whole forward"])
    @pytest.mark.parametrize("kind", ["basic", "bottleneck"])
    @pytest.mark.parametrize("caller", ["stem", "encoder", "children", "wrapped", "blocks_inside_out"])
    def test_network_called_in_pieces(
        self, caller: str, kind: str, used: bool, transform: Callable[[nn.Module], Any]
    ) -> None:
        stock = make(kind).eval()
        ours = transform(stock)
        if used:
            ours(images())
        call = getattr(self, caller)
        with torch.no_grad():
            check_equal(call(ours, images()), call(stock, images()), caller)
            assert_near(ours(images()), stock(images()), "whole network afterwards")

    def test_encoder_inside_another_module(self, transform: Callable[[nn.Module], Any]) -> None:
        class Depth(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder = make("basic")
                self.head = nn.Conv2d(8, 1, 1).double()

            def forward(self, x: Tensor) -> Tensor:
                net = self.encoder
                first = net.relu(net.bn1(net.conv1(x)))
                second = F.interpolate(net.layer1(net.maxpool(first)), size=first.shape[2:])
                return self.head(first + second)

        stock = Depth().eval()
        ours = transform(stock)
        with torch.no_grad():
            assert_near(ours(images()), stock(images()), "output")
            check_equal(self.encoder(ours.encoder, images()), self.encoder(stock.encoder, images()))

    @pytest.mark.parametrize("name", NETWORKS)
    def test_every_submodule_called_alone(self, name: str, transform: Callable[[nn.Module], Any]) -> None:
        stock = make(name).eval()
        inputs: dict[str, Tensor] = {}

        def record(path: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor]) -> None:
                inputs.setdefault(path, args[0].clone())

            return hook

        hooks = [module.register_forward_pre_hook(record(path)) for path, module in stock.named_modules()]
        stock(images())
        for hook in hooks:
            hook.remove()
        ours = transform(stock)
        assert list(dict(ours.named_modules())) == list(dict(stock.named_modules()))
        with torch.no_grad():
            ours(images())
            for path, x in inputs.items():
                actual, expected = (net.get_submodule(path)(x.clone()) for net in (ours, stock))
                assert_near(actual, expected, path or "(model)")

    def test_sequential_iterated_child_by_child(self, transform: Callable[[nn.Module], Any]) -> None:
        torch.manual_seed(0)
        stock = randomize_norms(torchvision.models.vgg.make_layers([8, "M", 8, 6, "M"], batch_norm=True))
        stock = stock.double().eval()
        ours = transform(stock)

        def features(net: Any) -> list[Tensor]:
            h, found = images(), []
            for layer in net:
                found.append((h := layer(h)).clone())
            return found

        with torch.no_grad():
            whole = ours(images())
            check_equal(features(ours), features(stock))
            check_equal([ours[:3](images()), ours[3:](ours[:3](images()))], [stock[:3](images()), whole])

    @pytest.mark.parametrize("name", NETWORKS)
    def test_frozen_keeps_state_and_modules(self, name: str) -> None:
        stock = make(name)
        frozen = freeze(stock)
        assert equal_states(frozen.state_dict(), stock.state_dict())
        assert all(isinstance(a, type(b)) for a, b in zip(frozen.modules(), stock.modules(), strict=True))
        assert not any(p.requires_grad for p in frozen.parameters())
        assert not any(module.training for module in frozen.modules())


def scaled_branch(self: Any, x: Tensor) -> Tensor:
    """A replacement of BasicBlock.forward that reads the same attributes, and computes something else."""
    identity = x
    out = self.relu(self.bn1(self.conv1(x)))
    out = self.bn2(self.conv2(out))
    if self.downsample is not None:
        identity = self.downsample(x)
    return 0.5 * out + identity


def no_shortcut(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


_BLOCK_FORWARD = resnet.BasicBlock.forward


def wrapped(self: Any, x: Tensor) -> Tensor:
    return 2 * _BLOCK_FORWARD(self, x)


class TestPatchedBlocks:
    """``forward`` of a block, replaced on its class or on an instance, before and after fusing."""

    @staticmethod
    def patch(net: Any, level: str, forward: Callable[..., Tensor], patches: pytest.MonkeyPatch) -> None:
        if level == "class":
            patches.setattr(resnet.BasicBlock, "forward", forward)
        else:
            block = net.layer2[0]
            patches.setitem(block.__dict__, "forward", types.MethodType(forward, block))

    @pytest.mark.parametrize("forward", [scaled_branch, no_shortcut, wrapped])
    @pytest.mark.parametrize("level", ["class", "instance"])
    def test_patched_before_fuse(
        self, level: str, forward: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stock, ours = make("basic"), make("basic")
        unpatched = stock(images())
        for net in (stock, ours):
            self.patch(net, level, forward, monkeypatch)
        fuse(ours)
        assert not torch.allclose(stock(images()), unpatched)
        stock.load_state_dict(ours.state_dict())
        assert_models_match(ours, stock, images())

    @pytest.mark.parametrize("forward", [scaled_branch, no_shortcut, wrapped])
    @pytest.mark.parametrize("level", ["class", "instance"])
    def test_patched_before_freeze(
        self, level: str, forward: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stock = make("basic").eval()
        self.patch(stock, level, forward, monkeypatch)
        expected = stock(images())
        assert_near(freeze(stock)(images()), expected.detach(), "output")

    @pytest.mark.parametrize("used", [False, True], ids=["first", "after a call"])
    @pytest.mark.parametrize("forward", [scaled_branch, no_shortcut, wrapped])
    @pytest.mark.parametrize("level", ["class", "instance"])
    def test_patched_after_and_restored(
        self, level: str, forward: Callable[..., Tensor], used: bool, transform: Callable[[nn.Module], Any]
    ) -> None:
        stock = make("basic").eval()
        ours = transform(stock)
        with torch.no_grad():
            unpatched = stock(images())
            if used:
                ours(images())
            with pytest.MonkeyPatch.context() as patches:
                for net in (stock, ours):
                    self.patch(net, level, forward, patches)
                patched = stock(images())
                assert not torch.allclose(patched, unpatched)
                assert_near(ours(images()), patched, "patched")
            assert_near(ours(images()), unpatched, "restored")
            assert count_stock_norms(ours, images()) == 0  # fused again


def _leaky(self: Any, x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def _scale_only(self: Any, x: Tensor) -> Tensor:
    return x * (1 if self.weight is None else self.weight[:, None, None])


def _average_pool(self: Any, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, self.kernel_size, self.stride, self.padding)


def _twice_the_weight(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, 2 * weight, bias, self.stride, self.padding, self.dilation, self.groups)


def _convolve_negative(self: Any, x: Tensor) -> Tensor:
    return self._conv_forward(-x, self.weight, self.bias)


def _sequence_plus_one(self: Any, x: Tensor) -> Tensor:
    for module in self._modules.values():
        x = module(x)
    return x + 1


_call = nn.Module.__call__


def _call_and_shift(self: Any, *args: Any, **kwargs: Any) -> Any:
    output = _call(self, *args, **kwargs)
    return output + 0.25 if isinstance(self, nn.BatchNorm2d) else output


_call_impl = nn.Module._call_impl


def _call_impl_and_shift(self: Any, *args: Any, **kwargs: Any) -> Any:
    output = _call_impl(self, *args, **kwargs)
    return output - 0.25 if isinstance(self, nn.Conv2d) else output


#: Class, method, replacement.
CLASS_PATCHES: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "Conv2d._conv_forward": (nn.Conv2d, "_conv_forward", _twice_the_weight),
    "Conv2d.forward": (nn.Conv2d, "forward", _convolve_negative),
    "ReLU.forward": (nn.ReLU, "forward", _leaky),
    "BatchNorm2d.forward": (nn.BatchNorm2d, "forward", _scale_only),
    "_BatchNorm.forward": (nn.modules.batchnorm._BatchNorm, "forward", _scale_only),
    "MaxPool2d.forward": (nn.MaxPool2d, "forward", _average_pool),
    "Sequential.forward": (nn.Sequential, "forward", _sequence_plus_one),
    "Module.__call__": (nn.Module, "__call__", _call_and_shift),
    "Module._call_impl": (nn.Module, "_call_impl", _call_impl_and_shift),
}


def _circular(conv: Any) -> Callable[..., Tensor]:
    """The recipe for seamless textures: a ``_conv_forward`` of one convolution that pads circularly, by 1 at least."""
    pad = [max(conv.padding[1], 1)] * 2 + [max(conv.padding[0], 1)] * 2
    return lambda x, weight, bias: F.conv2d(
        F.pad(x, pad, mode="circular"), weight, bias, conv.stride, 0, conv.dilation, conv.groups
    )


class TestPatchedLayers:
    """Methods of torch.nn's own layers, replaced on the class or on an instance."""

    @pytest.mark.parametrize("patch", CLASS_PATCHES)
    @pytest.mark.parametrize("name", NETWORKS)
    @pytest.mark.parametrize("when", ["before", "after", "after a call"])
    def test_class_patched(self, name: str, patch: str, when: str, transform: Callable[[nn.Module], Any]) -> None:
        cls, method, replacement = CLASS_PATCHES[patch]
        stock = make(name).eval()
        with torch.no_grad():
            unpatched = stock(images())
            ours = None if when == "before" else transform(stock)
            if when == "after a call":
                ours(images())
            with pytest.MonkeyPatch.context() as patches:
                patches.setattr(cls, method, replacement)
                patched = stock(images())
                ours = transform(stock) if ours is None else ours
                assert_near(ours(images()), patched, "patched")
            assert_near(ours(images()), unpatched, "restored")

    @pytest.mark.parametrize("patch", ["Conv2d._conv_forward", "ReLU.forward", "BatchNorm2d.forward"])
    def test_gradients_while_patched(self, patch: str, monkeypatch: pytest.MonkeyPatch) -> None:
        stock = make("basic")
        ours = fuse(copy.deepcopy(stock))
        monkeypatch.setattr(*CLASS_PATCHES[patch])
        assert_models_match(ours, stock, images().requires_grad_())

    @pytest.mark.parametrize("path", ["conv1", "layer1.0.conv2", "layer2.0.conv1"])
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_conv_forward_of_one_instance(self, path: str, when: str, transform: Callable[[nn.Module], Any]) -> None:
        stock = make("basic").eval()
        ours = None if when == "before" else transform(stock)
        with torch.no_grad():
            unpatched = stock(images())
            for net in filter(None, (stock, ours)):
                conv = net.get_submodule(path)
                conv._conv_forward = _circular(conv)
            patched = stock(images())
            assert not torch.allclose(patched, unpatched)
            ours = transform(stock) if ours is None else ours
            assert_near(ours(images()), patched, "patched")
            if when == "after":
                del ours.get_submodule(path)._conv_forward
                assert_near(ours(images()), unpatched, "restored")
                assert count_stock_norms(ours, images()) == 0

    @pytest.mark.parametrize("path", ["relu", "bn1", "maxpool", "layer1", "layer1.0.bn2", "layer2.0.relu"])
    def test_forward_of_one_layer(self, path: str, transform: Callable[[nn.Module], Any]) -> None:
        stock = make("basic").eval()
        ours = transform(stock)
        with torch.no_grad():
            for net in (stock, ours):
                layer = net.get_submodule(path)
                layer.forward = lambda x, layer=layer: type(layer).forward(layer, x) * 1.5
            assert_near(ours(images()), stock(images()), path)


class UserBlock(nn.Module):
    """A block in the spelling of user code, which reads ``F`` and a function from the globals of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return activation(x + self.bn2(self.conv2(out)))


activation = F.relu


class TestPatchedGlobals:
    @pytest.mark.parametrize("when", ["before", "after", "after a call"])
    @pytest.mark.parametrize("name", ["F", "activation"])
    def test_globals_of_user_code(self, name: str, when: str, transform: Callable[[nn.Module], Any]) -> None:
        torch.manual_seed(0)
        stock = randomize_norms(UserBlock()).double().eval()
        replacement = F.elu if name == "activation" else types.SimpleNamespace(relu=F.elu)
        with torch.no_grad():
            unpatched = stock(images())
            ours = None if when == "before" else transform(stock)
            if when == "after a call":
                ours(images())
            with pytest.MonkeyPatch.context() as patches:
                patches.setitem(globals(), name, replacement)
                patched = stock(images())
                assert not torch.allclose(patched, unpatched)
                ours = transform(stock) if ours is None else ours
                assert_near(ours(images()), patched, "patched")
            assert_near(ours(images()), unpatched, "restored")

    def test_user_block_runs_fused(self, transform: Callable[[nn.Module], Any]) -> None:
        torch.manual_seed(0)
        ours = transform(randomize_norms(UserBlock()).double().eval())
        with torch.no_grad():
            assert count_stock_norms(ours, images()) == 0


class TestSecondDerivatives:
    """Hessian-vector products (MAML, SAM, TENT), whichever kind of parameter is trained."""

    @pytest.mark.parametrize("recompute", ["none", "norm", "conv"])
    @pytest.mark.parametrize("trained", ["norms", "norm biases", "convolutions", "last block", "input"])
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("name", NETWORKS)
    def test_hessian_vector_product(self, name: str, training: bool, trained: str, recompute: str) -> None:
        stock = make(name).train(training).requires_grad_(False)
        kinds = {"norms": nn.BatchNorm2d, "norm biases": nn.BatchNorm2d, "convolutions": nn.Conv2d}
        for module in stock.modules():
            if isinstance(module, kinds.get(trained, ())):
                module.bias is None or module.bias.requires_grad_()
                module.weight.requires_grad_(trained != "norm biases")
        if trained == "last block":
            for parameter in list(stock.parameters())[-6:]:
                parameter.requires_grad_()
        ours = fuse(copy.deepcopy(stock), recompute=recompute)
        found = []
        for net in (ours, stock):
            x = images(16).requires_grad_(trained == "input")
            sources = [t for t in (x, *net.parameters()) if t.requires_grad]
            grads = torch.autograd.grad(net(x).square().sum(), sources, create_graph=True)
            scale = sum(g.detach().abs().max() for g in grads)
            norm = sum((g / scale).square().sum() for g in grads)
            found.append([*grads, *torch.autograd.grad(norm, sources, materialize_grads=True)])
        check_equal(*found, "derivative", 1e-8)


class TestTeacher:
    """A frozen model inside a module that is trained."""

    class Distillation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = freeze(make("basic"))
            self.student = fuse(make("basic"))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                target = self.teacher(x)
            return (self.student(x) - target).square().mean()

    def test_train_leaves_the_teacher_in_evaluation(self) -> None:
        model = self.Distillation()
        before = model.teacher(images())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                assert model.train() is model
                model.eval()
            model.train()
        assert len(caught) == 1 and "frozen" in str(caught[0].message)
        assert not any(module.training for module in model.teacher.modules())
        assert all(module.training for module in model.student.modules())
        assert torch.equal(model.teacher(images()), before)

    def test_student_trains(self) -> None:
        model = self.Distillation()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.train()
        teacher, stock = copy.deepcopy(model.teacher.state_dict()), make("basic")
        target = make("basic").eval()(images()).detach()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == len(list(stock.parameters()))
        ours, theirs = torch.optim.SGD(trained, 0.01), torch.optim.SGD(stock.parameters(), 0.01)
        for _ in range(2):
            losses = [model(images()), (stock(images()) - target).square().mean()]
            assert_near(losses[0], losses[1], "loss")
            for loss, optimizer in zip(losses, (ours, theirs), strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        check_equal(model.student.state_dict(), stock.state_dict(), "student")
        assert equal_states(teacher, model.teacher.state_dict())

    @pytest.mark.parametrize("part", ["model", "layer", "norm"])
    def test_train_of_a_frozen_model_and_its_parts(self, part: str) -> None:
        frozen, stock = freeze(make("basic")), make("basic").eval()
        target = {"model": frozen, "layer": frozen.layer1, "norm": frozen.layer1[0].bn1}[part]
        state = copy.deepcopy(frozen.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.train()
            # Whether or not a part can be put into training mode: the whole model must not use packed weights then.
            if any(module.training for module in frozen.modules()):
                stock.get_submodule({"layer": "layer1", "norm": "layer1.0.bn1"}[part]).train()
            assert_near(frozen(images()), stock(images()).detach(), "output")
        check_equal(frozen.state_dict(), stock.state_dict(), "state")
        assert part != "model" or equal_states(state, frozen.state_dict())

    def test_perceptual_loss_trains_the_generator(self) -> None:
        """Gradients pass through a frozen network to the module before it."""
        found = []
        for perceptual in (freeze(make("basic")), make("basic").eval().requires_grad_(False)):
            torch.manual_seed(0)
            generator = nn.Conv2d(3, 3, 3, padding=1).double()
            perceptual(generator(images())).square().mean().backward()
            found.append([p.grad for p in generator.parameters()])
        check_equal(*found, "gradient")


class TestInputGradient:
    """Adversarial examples, saliency, Grad-CAM, gradient penalties, through frozen models."""

    @pytest.mark.parametrize("name", NETWORKS)
    def test_input_gradient_equals_stock(self, name: str) -> None:
        stock = make(name).eval().requires_grad_(False)
        frozen, found = freeze(stock), []
        for net in (frozen, stock):
            x = images().requires_grad_()
            y = net(x)
            y.square().sum().backward()
            found.append([y.detach(), x.grad])
        check_equal(*found)
        with torch.no_grad():
            assert count_stock_norms(frozen, images().requires_grad_()) == 0  # no gradient needed: packed

    @pytest.mark.parametrize("name", NETWORKS)
    def test_second_derivative_of_the_input(self, name: str) -> None:
        stock = make(name).eval().requires_grad_(False)
        found = []
        for net in (freeze(stock), stock):
            x = images().requires_grad_()
            (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
            penalty = (grad.flatten(1).norm(dim=1) - 1).square().mean()
            found.append([grad, *torch.autograd.grad(penalty, x)])
        check_equal(*found, "gradient", 1e-8)

    @pytest.mark.parametrize("path", ["layer4", "layer4.0", "layer3.0.conv2", "layer2.0.bn1", "relu", "conv1"])
    @pytest.mark.parametrize("used", [False, True], ids=["first", "after a call"])
    def test_grad_cam(self, path: str, used: bool) -> None:
        """Forward and backward hooks on any layer see the activation and its gradient."""
        stock = make("basic").eval().requires_grad_(False)
        frozen, found = freeze(stock), []
        if used:
            frozen(images())
        for net in (frozen, stock):
            seen: list[Tensor] = []

            def keep(_: Any, __: Any, output: Tensor, seen: list[Tensor] = seen) -> None:
                seen.append(output.detach().clone())
                output.register_hook(lambda grad: seen.append(grad.clone()))

            layer = net.get_submodule(path)
            handle = layer.register_forward_hook(keep)
            scores = net(images().requires_grad_())
            scores[:, 1].sum().backward()
            handle.remove()
            activation, gradient = seen[:2]
            found.append([(gradient.mean((2, 3), keepdim=True) * activation).sum(1).relu(), activation, gradient])
        check_equal(*found, path)
        with torch.no_grad():
            assert count_stock_norms(frozen, images()) == 0  # the hook is gone: packed again

    def test_full_backward_hook(self) -> None:
        stock = make("basic").eval().requires_grad_(False)
        found = []
        for net in (freeze(stock), stock):
            seen: list[Tensor] = []
            net.layer3.register_full_backward_hook(lambda _, into, out, seen=seen: seen.extend((into[0], out[0])))
            net(images().requires_grad_()).sum().backward()
            found.append(seen)
        assert len(found[0]) == 2
        check_equal(*found, "gradient")


def _parameters(model: nn.Module, kind: str) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield owner, name and tensor of all convolutions' weights, norms' weights or running statistics."""
    for module in model.modules():
        if kind == "convolution" and isinstance(module, nn.Conv2d):
            yield module, "weight", module.weight
        if kind == "norm" and isinstance(module, nn.BatchNorm2d):
            yield module, "weight", module.weight
        if kind == "statistics" and isinstance(module, nn.BatchNorm2d):
            yield module, "running_mean", module.running_mean
            yield module, "running_var", module.running_var


def _each(write: Callable[[nn.Module, str, Tensor], Any]) -> Callable[[nn.Module, str], None]:
    def apply(model: nn.Module, kind: str) -> None:
        with torch.no_grad():
            for owner, name, tensor in list(_parameters(model, kind)):
                write(owner, name, tensor)

    return apply


def _scaled_state(model: nn.Module, kind: str) -> dict[str, Tensor]:
    written = {id(tensor) for _, _, tensor in _parameters(model, kind)}
    state = model.state_dict(keep_vars=True)
    return {name: 0.5 * t.detach() if id(t) in written else t.detach().clone() for name, t in state.items()}


def _replace(owner: nn.Module, name: str, tensor: Tensor) -> None:
    new = tensor.detach() * 0.5
    setattr(owner, name, nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new)


def _swap(owner: nn.Module, name: str, tensor: Tensor) -> None:
    new = tensor.detach() * 0.5
    new = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
    torch.utils.swap_tensors(tensor, new)


#: Every way of writing to weights that PyTorch counts, or that changes their storage. All halve the tensors.
WRITES: dict[str, Callable[[nn.Module, str], Any]] = {
    "mul_": _each(lambda owner, name, t: t.mul_(0.5)),
    "copy_": _each(lambda owner, name, t: t.copy_(0.5 * t)),
    "index write": _each(lambda owner, name, t: t.__setitem__(slice(None), 0.5 * t)),
    "view write": _each(lambda owner, name, t: t.view(-1).mul_(0.5)),
    "foreach": _each(lambda owner, name, t: torch._foreach_mul_([t], 0.5)),
    "data =": _each(lambda owner, name, t: setattr(t, "data", 0.5 * t)),
    "set_": _each(lambda owner, name, t: t.set_(0.5 * t.detach())),
    "setattr": _each(_replace),
    "swap_tensors": _each(_swap),
    "load_state_dict": lambda model, kind: model.load_state_dict(_scaled_state(model, kind)),
    "load_state_dict, assign": lambda model, kind: model.load_state_dict(_scaled_state(model, kind), assign=True),
}


class TestWrites:
    """Writes to the weights of a frozen model after its first call, which packs them."""

    @pytest.mark.parametrize("kind", ["convolution", "norm", "statistics"])
    @pytest.mark.parametrize("write", WRITES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_write_is_seen(self, write: str, kind: str, dtype: torch.dtype) -> None:
        stock, x = make("basic", dtype).eval(), images(dtype=dtype)
        frozen = freeze(stock)
        with torch.no_grad():
            before = [frozen(x), frozen(x)][1]
        WRITES[write](frozen, kind)
        with torch.no_grad():
            for _, _, tensor in _parameters(stock, kind):
                tensor.mul_(0.5)
            expected = stock(x)
            assert not torch.allclose(before, expected, rtol=1e-2)
            assert_near(frozen(x), expected, write)
            assert_near(frozen(x), expected, write)

    @pytest.mark.parametrize("name", ["bottleneck", "sequential", "fused_res.nn", "fused_res.models"])
    @pytest.mark.parametrize("kind", ["convolution", "norm", "statistics"])
    def test_write_to_one_tensor_is_seen(self, kind: str, name: str) -> None:
        """Each tensor of each chain is checked, the shortcuts' too."""
        stock, x = make(name, torch.float32).eval(), images(dtype=torch.float32)
        frozen = freeze(stock)
        with torch.no_grad():
            for ours, theirs in zip(_parameters(frozen, kind), _parameters(stock, kind), strict=True):
                frozen(x)
                for tensor in (ours[2], theirs[2]):
                    tensor[0].add_(0.5)
                assert_near(frozen(x), stock(x), f"{type(theirs[0]).__name__}.{theirs[1]}")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_conversion_is_seen(self, dtype: torch.dtype) -> None:
        stock, x = make("basic", torch.float32).eval(), images(dtype=torch.float32)
        frozen = freeze(stock)
        with torch.no_grad():
            frozen(x)
            frozen.to(dtype)
            actual, expected = frozen(x.to(dtype)), stock.to(dtype)(x.to(dtype))
        assert actual.dtype == dtype
        assert_near(actual, expected, "output")

    @pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format], ids=str)
    def test_memory_format_is_seen(self, format: torch.memory_format) -> None:
        stock, x = make("basic", torch.float32).eval(), images(dtype=torch.float32)
        frozen = freeze(stock)
        with torch.no_grad():
            expected = stock(x)
            for input in (x, x.contiguous(memory_format=torch.channels_last)):
                frozen(input)
                frozen.to(memory_format=format)
                assert_near(frozen(input), expected, "output")
                for conv in frozen.modules():
                    if isinstance(conv, nn.Conv2d):
                        conv.weight.mul_(2)
                frozen.to(memory_format=torch.preserve_format)
                for conv in frozen.modules():
                    if isinstance(conv, nn.Conv2d):
                        conv.weight.mul_(0.5)
                assert_near(frozen(input), expected, "output after two writes")

    @pytest.mark.parametrize("kind", ["convolution", "norm", "statistics"])
    def test_functional_call_uses_the_given_tensors(self, kind: str) -> None:
        stock, x = make("basic", torch.float32).eval(), images(dtype=torch.float32)
        frozen = freeze(stock)
        with torch.no_grad():
            before = frozen(x)
            state = _scaled_state(stock, kind)
            actual = torch.func.functional_call(frozen, state, (x,))
            assert_near(actual, torch.func.functional_call(stock, state, (x,)), "functional call")
            assert_near(frozen(x), before, "afterwards")

    def test_gradient_through_functional_call(self) -> None:
        """Hypernetworks and meta-learning differentiate with respect to given parameters of a frozen model."""
        stock, found = make("basic").eval(), []
        for net in (freeze(stock), stock):
            net(images())
            state = {name: t.detach().clone().requires_grad_() for name, t in stock.named_parameters()}
            loss = torch.func.functional_call(net, state, (images(),)).square().sum()
            found.append(torch.autograd.grad(loss, list(state.values())))
        check_equal(*found, "gradient")

    @pytest.mark.parametrize("kind", ["convolution", "norm", "statistics"])
    def test_data_write_is_documented_and_picked_up_later(self, kind: str) -> None:
        """PyTorch counts no write through ``.data``: a copy, or reassigning the tensors, uses the new values."""
        stock, x = make("basic", torch.float32).eval(), images(dtype=torch.float32)
        for refresh in ("deepcopy", "reassign"):
            frozen, expected = freeze(stock), copy.deepcopy(stock)
            with torch.no_grad():
                frozen(x)
                for net in (frozen, expected):
                    for _, _, tensor in _parameters(net, kind):
                        tensor.data.mul_(0.5)
                if refresh == "deepcopy":
                    frozen = copy.deepcopy(frozen)
                else:
                    for _, _, tensor in _parameters(frozen, kind):
                        tensor.data = tensor.data.clone()
                assert_near(frozen(x), expected(x), refresh)
        assert ".data" in (freeze.__doc__ or "")

    def test_write_to_the_source_is_not_seen(self) -> None:
        """A frozen model is a copy."""
        stock, x = make("basic", torch.float32).eval(), images(dtype=torch.float32)
        frozen = freeze(stock)
        with torch.no_grad():
            before = frozen(x)
            for parameter in stock.parameters():
                parameter.mul_(0.5)
            assert torch.equal(frozen(x), before)


def _on_convolutions(change: Callable[[nn.Module], Any]) -> Callable[[nn.Module], None]:
    def apply(model: nn.Module) -> None:
        for module in list(model.modules()):
            if isinstance(module, nn.Conv2d):
                change(module)

    return apply


#: Every way in which PyTorch computes a convolution's weight from other tensors.
REPARAMETRIZATIONS: dict[str, Callable[[nn.Module], None]] = {
    "l1_unstructured": _on_convolutions(lambda conv: prune.l1_unstructured(conv, "weight", 0.3)),
    "ln_structured": _on_convolutions(lambda conv: prune.ln_structured(conv, "weight", 0.3, 2, 0)),
    "random, iterated": _on_convolutions(
        lambda conv: [prune.random_unstructured(conv, "weight", 0.2) for _ in range(2)]
    ),
    "one convolution pruned": lambda model: prune.l1_unstructured(model.layer2[0].conv1, "weight", 0.5),
    "norms pruned": lambda model: [
        prune.l1_unstructured(m, "weight", 0.3) for m in list(model.modules()) if isinstance(m, nn.BatchNorm2d)
    ],
    "weight_norm, hook": _on_convolutions(nn.utils.weight_norm),
    "spectral_norm, hook": _on_convolutions(nn.utils.spectral_norm),
    "weight_norm": _on_convolutions(parametrizations.weight_norm),
    "spectral_norm": _on_convolutions(parametrizations.spectral_norm),
    "orthogonal": _on_convolutions(parametrizations.orthogonal),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*weight_norm.*:UserWarning")
class TestReparametrized:
    @pytest.mark.parametrize("steps", [0, 2])
    @pytest.mark.parametrize("kind", REPARAMETRIZATIONS)
    def test_freeze_uses_the_effective_weights(self, kind: str, steps: int) -> None:
        model = make("basic")
        REPARAMETRIZATIONS[kind](model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            model(images()).square().mean().backward()
            optimizer.step()
        modes = [module.training for module in model.modules()]
        frozen = freeze(model)
        assert modes == [module.training for module in model.modules()]
        assert all(not p.requires_grad for p in frozen.parameters()) and all(
            p.requires_grad for p in model.parameters()
        )
        with torch.no_grad():
            expected = model.eval()(images())
            assert_near(frozen(images()), expected, "output")
            assert_near(copy.deepcopy(frozen)(images()), expected, "output of a copy")
            assert_near(freeze(frozen)(images()), expected, "output of a frozen copy")
        if steps:  # the source is still trainable
            model.train()(images()).square().mean().backward()

    @pytest.mark.parametrize("kind", REPARAMETRIZATIONS)
    def test_fused_training_equals_stock(self, kind: str) -> None:
        stock, ours = make("basic"), make("basic")
        for net in (stock, ours):
            torch.manual_seed(2)
            REPARAMETRIZATIONS[kind](net)
        assert_models_match(fuse(ours), stock, images())


NODES = {"relu": "stem", "layer1": "1", "layer2": "2", "layer4": "4"}


class TestExtractors:
    """``torchvision.models.feature_extraction.create_feature_extractor`` before and after fusing."""

    @pytest.fixture(autouse=True)
    def _quiet(self) -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # extraction calls train() of a frozen model
            yield

    @staticmethod
    def extract(model: nn.Module) -> Any:
        return feature_extraction.create_feature_extractor(model, NODES)

    @pytest.mark.parametrize("kind", ["basic", "bottleneck"])
    def test_extractor_of_a_model(self, kind: str, transform: Callable[[nn.Module], Any]) -> None:
        stock = make(kind).eval()
        ours = self.extract(transform(stock)).eval()
        with torch.no_grad():
            check_equal(ours(images()), self.extract(stock).eval()(images()))

    @pytest.mark.parametrize("kind", ["basic", "bottleneck"])
    def test_trained_extractor_of_a_fused_model(self, kind: str) -> None:
        class Head(nn.Module):
            def __init__(self, body: nn.Module) -> None:
                super().__init__()
                self.body = body

            def forward(self, x: Tensor) -> Tensor:
                return sum(feature.square().mean() for feature in self.body(x).values())

        stock = make(kind)
        ours = Head(self.extract(fuse(copy.deepcopy(stock))).train())
        assert_models_match(ours, Head(self.extract(stock).train()), images().requires_grad_())

    @pytest.mark.parametrize("kind", ["basic", "bottleneck"])
    def test_transformed_extractor(self, kind: str, transform: Callable[[nn.Module], Any]) -> None:
        stock = self.extract(make(kind)).eval()
        ours = transform(stock).eval()  # a copy of an extractor starts with its training graph
        with torch.no_grad():
            check_equal(ours(images()), stock(images()))
            # What does not run fused is named, with the reason.
            assert count_stock_norms(ours, images()) == 0 or any(row.why for row in summarize(ours).left)

    def test_intermediate_layer_getter(self, transform: Callable[[nn.Module], Any]) -> None:
        getter = torchvision.models._utils.IntermediateLayerGetter
        stock = getter(make("basic").eval(), {"layer1": "1", "layer4": "4"})
        ours = transform(stock)
        with torch.no_grad():
            check_equal(ours(images()), stock(images()))
            check_equal(getter(transform(make("basic").eval()), {"layer2": "2"})(images())["2"],
                        getter(make("basic").eval(), {"layer2": "2"})(images())["2"])  # fmt: skip
