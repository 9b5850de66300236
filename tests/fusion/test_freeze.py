"""freeze: outputs match the model in evaluation mode, no norm runs as one, and modules and state are the model's.

What is done to a frozen model afterwards is in test_reported_cases.py, the packing of weights in test_packed.py.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fused_res
from fused_res import freeze, functional, fuse, models, summarize
from fused_res import nn as fnn
from fused_res.fusion.fused import fusion_of
from fused_res.nn import packed
from fused_res.testing import stub_torchvision_operators
from tests.support.model_comparison import assert_near, randomize_norms, record_stock_norms, small_resnet

stub_torchvision_operators()
torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

#: Error of a whole network in float32, relative to the largest logit.
FLOAT32_TOLERANCE = 2e-5


def images(size: int = 48, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def network(kind: str = "BasicBlock", **options: Any) -> Any:
    return randomize_norms(small_resnet(kind, **options))


def small_timm(kind: str, **options: Any) -> Any:
    block = getattr(timm.models.resnet, kind)
    return timm.models.resnet.ResNet(block, (1, 1, 1, 2), channels=(8, 8, 16, 16), stem_width=8, **options)


def evaluate(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def count_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def check_frozen(model: nn.Module, stock_norms: int = 0, x: Tensor | None = None, tolerance: float = 1e-9) -> Any:
    """Compare the frozen model with the model in evaluation mode, in float64 and float32, and return it.

    Args:
        model: the model; converted to float64.
        stock_norms: number of norms that a forward runs with PyTorch's function.
        x: input, default ``images()``.
        tolerance: error allowed in float64, relative to the largest logit.
    """
    model = model.double()
    x = images() if x is None else x
    state = copy.deepcopy(model.state_dict())
    frozen = freeze(model)
    expected = evaluate(model, x)
    with record_stock_norms() as recorded:
        actual = frozen(x)
    assert not actual.requires_grad and actual.dtype == expected.dtype and actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
    assert len(recorded) == stock_norms
    # In float32 the same modules run as inference graphs, with other kernels.
    single = freeze(copy.deepcopy(model).float())(x.float())
    assert single.dtype == torch.float32
    assert (single - expected).abs().max() <= FLOAT32_TOLERANCE * expected.abs().max()
    # The copy's modules and state are the model's, which did not change.
    for other in (model, frozen):
        assert list(other.state_dict()) == list(state)
        assert all(torch.equal(a, b) for a, b in zip(state.values(), other.state_dict().values(), strict=True))
    assert [(n, type(m).__name__) for n, m in frozen.named_modules()] == [
        (n, type(m).__name__) for n, m in model.named_modules()
    ]
    assert isinstance(frozen, fused_res.unfuse(copy.deepcopy(model)).__class__)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not any(module.training for module in frozen.modules())
    summary = summarize(frozen)
    assert summary.norms_fused == summary.norms - len({row.name for row in summary.left})
    return frozen


#: Networks all of whose norms run packed.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "torchvision resnet50": lambda: torchvision.models.resnet50(num_classes=5),
    "torchvision resnext": lambda: small_resnet("Bottleneck", (16, 16, 16, 16), groups=32, width_per_group=4),
    "torchvision wide": lambda: small_resnet("Bottleneck", (16, 16, 16, 16), width_per_group=128),
    "timm resnet18": lambda: timm.create_model("resnet18", num_classes=5),
    "timm resnet26": lambda: timm.create_model("resnet26", num_classes=5),
    "timm resnet18d": lambda: timm.create_model("resnet18d", num_classes=5),
    "timm seresnet18": lambda: timm.create_model("seresnet18", num_classes=5),
    "timm deep stem": lambda: small_timm("BasicBlock", stem_type="deep_tiered", replace_stem_pool=True),
    "timm dilated": lambda: small_timm("BasicBlock", output_stride=8),
    "timm grouped": lambda: small_timm("Bottleneck", cardinality=4, base_width=32),
    "timm wide": lambda: small_timm("Bottleneck", base_width=128, down_kernel_size=3),
    "timm drop path": lambda: timm.create_model("resnet18", num_classes=5, drop_path_rate=0.5),
    "timm drop block": lambda: timm.create_model("resnet18", num_classes=5, drop_block_rate=0.2),
    "densenet": lambda: torchvision.models.DenseNet(4, (2, 2), num_init_features=8, num_classes=3),
    "vgg": lambda: nn.Sequential(torchvision.models.vgg.make_layers([8, "M", 8, 8, "M"], batch_norm=True)),
    "resnet18": lambda: models.resnet18(num_classes=5),
    "dilated resnet50": lambda: models.resnet50(num_classes=3, replace_stride_with_dilation=[False, True, True]),
    "cifar_resnet": lambda: models.cifar_resnet(20),
    "plain cifar_resnet": lambda: models.cifar_resnet(20, plain=True),
}


class Twice(nn.Module):
    """Calls a network layer by layer, and as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = network()

    def forward(self, x: Tensor) -> Tensor:
        body = self.backbone
        y = body.relu(body.bn1(body.conv1(x)))
        return body.layer1(body.maxpool(y)).mean((2, 3)).sum() + body(x)


class TestModels:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_networks_freeze_completely(self, name: str) -> None:
        frozen = check_frozen(randomize_norms(NETWORKS[name]()), x=images(32))
        assert summarize(frozen).left == ()

    @pytest.mark.parametrize("fused", [False, True])
    def test_layers_of_fused_res(self, fused: bool) -> None:
        model: Any = nn.Sequential(
            fnn.ConvBNAct2d(3, 8, bias=True),
            fnn.BatchNormAct2d(8),
            fnn.Bottleneck(8, 2),
            fnn.BasicBlock(8, 8, shortcut=False),
            fnn.ConvBNAct2d(8, 6, 1, activation="identity"),
            fnn.ResidualBlock([(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))]),
        )
        frozen = check_frozen(randomize_norms(model if fused else fused_res.unfuse(model)))
        assert summarize(frozen).left == ()

    def test_sequential(self) -> None:
        circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, 2, groups=2), nn.BatchNorm2d(4, affine=False),
            circular, nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6, eps=0.1), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
            nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1), nn.ReLU(),
        )  # fmt: skip
        frozen = check_frozen(randomize_norms(model))
        assert_near(frozen[:5](images()), evaluate(model[:5], images()), "slice")

    def test_shared_layers_remain_shared(self) -> None:
        block, act = fnn.BasicBlock(4, 4), nn.ReLU()
        conv, norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        inner = nn.Sequential(conv, norm, act, conv, norm, act)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), act, block, inner, block, inner)
        frozen = check_frozen(randomize_norms(model))
        assert frozen[3] is frozen[5] and frozen[4] is frozen[6] and frozen[4][0] is frozen[4][3]

    def test_network_called_as_a_whole_and_in_parts(self) -> None:
        check_frozen(Twice())

    def test_fused_and_frozen_models(self) -> None:
        model = network("Bottleneck")
        frozen = check_frozen(fuse(copy.deepcopy(model)))
        again = freeze(frozen)
        assert type(again) is type(frozen) and again.conv1.weight is not frozen.conv1.weight
        assert torch.equal(again(images()), frozen(images()))
        assert str(summarize(again)) == str(summarize(frozen))
        check_frozen(fuse(model, cache_eval=True))


class TestNotFrozen:
    @pytest.mark.parametrize(
        ("change", "why", "stock_norms"),
        [
            (lambda m: m.register_forward_hook(lambda *_: None), "", 0),  # called around the packed forward
            (lambda m: m.layer1[0].register_forward_hook(lambda *_: None), "", 0),
            # The block of a hooked layer runs stock, and so does the stem, which is in the same forward as the blocks.
            (lambda m: m.layer1[0].bn1.register_forward_hook(lambda *_: None), "bn1 has a hook", 3),
            (lambda m: m.conv1.register_forward_pre_hook(lambda *_: None), "conv1 has a hook", 1),
            (lambda m: setattr(m.layer1[0], "relu", nn.GELU()), "", 0),  # the norms are folded
            (lambda m: setattr(m.layer1[0], "bn1", nn.GroupNorm(2, 8).double()), "GroupNorm", 0),
            (lambda m: setattr(m.layer1[0], "bn2", nn.BatchNorm2d(8, track_running_stats=False).double()), "", 0),
            (lambda m: parametrizations.weight_norm(m.layer1[0].conv1), "", 0),  # its present weight is folded
            (lambda m: setattr(m.layer1[0].conv1, "padding_mode", "reflect"), "", 0),
        ],
    )
    def test_unsupported_layers(self, change: Callable[[Any], Any], why: str, stock_norms: int) -> None:
        model = network()
        change(model)
        frozen = freeze(model)
        expected = evaluate(model, images())
        with record_stock_norms() as recorded:
            assert_near(frozen(images()), expected, "output", 1e-9)
        assert len(recorded) == stock_norms
        assert why in str(summarize(frozen)) and bool(summarize(frozen).left) == bool(why)

    def test_dtypes_that_do_not_match_raise_stock_error(self) -> None:
        model = network().float().eval()
        model.layer1[0].conv2.double()
        errors = []
        for one in (model, freeze(model)):
            with pytest.raises(RuntimeError) as error:
                one(images(dtype=torch.float32))
            errors.append(str(error.value))
        assert errors[0] == errors[1]

    def test_hooks_are_called(self) -> None:
        model = timm.create_model("seresnet18", num_classes=5)
        calls: list[str] = []
        for name in ("", "layer1.0", "layer2", "layer2.0.bn1", "layer3.0.se", "layer4.1.conv2"):
            model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
        frozen = freeze(randomize_norms(model))
        frozen(images(dtype=torch.float32))
        assert calls == ["layer1.0", "layer2.0.bn1", "layer2", "layer3.0.se", "layer4.1.conv2", ""]

    def test_overridden_forward_of_own_modules(self) -> None:
        class OverriddenBlock(fnn.BasicBlock):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + 1

        class OverriddenNet(models.CifarResNet):
            def _stem(self, x: Tensor) -> Tensor:
                return self.conv1(x)

        class OverriddenForward(models.CifarResNet):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).exp()

        for model in (nn.Sequential(OverriddenBlock(3, 3)), OverriddenNet(8), OverriddenForward(8)):
            randomize_norms(model)
            x = images()
            assert_near(freeze(model.double())(x), evaluate(model, x), "output", 1e-9)

    def test_captured_graphs(self) -> None:
        traced = torch.fx.symbolic_trace(network().eval())
        frozen = freeze(traced)
        assert_near(frozen(images()), evaluate(traced, images()), "output", 1e-9)
        assert isinstance(frozen, torch.fx.GraphModule)


@pytest.fixture
def model() -> Any:
    return network("Bottleneck").float()


class TestModuleBehavior:
    @pytest.mark.parametrize("used", [False, True])
    def test_deepcopy_pickle_and_save(self, model: nn.Module, used: bool) -> None:
        frozen, x = freeze(model), images(dtype=torch.float32)
        size = len(pickle.dumps(frozen))
        if used:
            frozen(x)
        file = io.BytesIO()
        torch.save(frozen, file)
        file.seek(0)
        pickled = pickle.dumps(frozen)
        assert len(pickled) == size  # packed weights are not saved
        for other in (copy.deepcopy(frozen), pickle.loads(pickled), torch.load(file, weights_only=False)):
            with record_stock_norms() as recorded:
                assert type(other) is type(frozen) and torch.equal(other(x), frozen(x))
            assert not recorded
            with pytest.warns(UserWarning, match="stays in evaluation mode"):
                other.train()
            assert not other.training

    def test_unpickle_and_compile_in_another_process(self, tmp_path: Any) -> None:
        frozen = freeze(fuse(network()))
        (tmp_path / "model.pkl").write_bytes(pickle.dumps((frozen, frozen(images(32)))))
        code = (
            "import pickle, sys; from fused_res.testing import stub_torchvision_operators as s; s();"
            "import torch, fused_res; from tests.fusion.test_freeze import images;"
            "model, expected = pickle.load(open(sys.argv[1], 'rb'));"
            "compiled = torch.compile(model, fullgraph=True, backend='aot_eager');"
            "outputs = model(images(32)), compiled(images(32));"
            "print(type(model).__name__, fused_res.summarize(model).norms_fused,"
            " *((y - expected).abs().max().item() < 1e-9 for y in outputs))"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "model.pkl")]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert output == f"ResNet {count_norms(frozen)} True True\n"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_accuracy_vs_stock(self, model: nn.Module, dtype: torch.dtype) -> None:
        """The error against float64 is comparable to stock PyTorch's; a whole network's error varies up to 3x."""
        reference = evaluate(copy.deepcopy(model).double(), images(dtype=dtype).double())
        lower = model.to(dtype)
        errors = [
            (y.double() - reference).norm()
            for y in (freeze(lower)(images(dtype=dtype)), evaluate(lower, images(dtype=dtype)))
        ]
        assert errors[0] <= 3 * errors[1] + 1e-6 * reference.norm()

    def test_memory_formats_and_sizes_match_stock(self, model: nn.Module) -> None:
        frozen = freeze(model)
        for size, batch in ((48, 2), (33, 1), (64, 3), (48, 1), (40, 2), (48, 2), (56, 0)):
            for format in (torch.contiguous_format, torch.channels_last):
                x = images(size, batch, torch.float32).contiguous(memory_format=format)
                torch.testing.assert_close(frozen(x), evaluate(model, x), rtol=1e-4, atol=1e-4)

    def test_freeze_in_inference_mode(self, model: nn.Module) -> None:
        x = images(dtype=torch.float32)
        with torch.inference_mode():
            frozen = freeze(model)
            inside = frozen(x)
        assert torch.equal(frozen(x), inside)
        with torch.inference_mode():
            assert torch.equal(frozen.double().float()(x), inside)

    def test_autocast_matches_stock(self, model: nn.Module) -> None:
        x, frozen = images(dtype=torch.float32), freeze(model)
        with torch.autocast("cpu", torch.bfloat16), record_stock_norms() as recorded:
            actual, again = frozen(x), frozen(x)
        assert not recorded
        with torch.autocast("cpu", torch.bfloat16):
            expected = evaluate(model, x)
        assert actual.dtype == expected.dtype and torch.equal(actual, again)
        assert torch.cosine_similarity(actual.float(), expected.float()).min() > 0.99

    def test_compiled_model_matches_eager(self, model: nn.Module) -> None:
        frozen = freeze(model)
        torch._dynamo.reset()
        compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
        for batch in (2, 3):
            x = images(32, batch, torch.float32)
            torch.testing.assert_close(compiled(x), frozen(x), rtol=1e-4, atol=1e-4)

    def test_vmap_matches_eager(self, model: nn.Module) -> None:
        frozen = freeze(model.double())
        x = torch.stack([images(), 2 * images()])
        assert_near(torch.vmap(frozen)(x), torch.stack([frozen(one) for one in x]), "output")


class TestSettings:
    def test_backend(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        names: list[str] = []
        resolve = functional.registry.resolve

        def record(*arguments: Any) -> Any:
            kernels = resolve(*arguments)
            names.append(kernels.name)
            return kernels

        monkeypatch.setattr(functional.registry, "resolve", record)
        x, frozen = images(dtype=torch.float32), freeze(model, backend="reference")
        frozen(x)
        assert set(names) == {"reference"}
        assert all("backend=reference" in row.why for row in summarize(frozen).fused)
        assert "reference (plain PyTorch)" in summarize(frozen).fused[0].why
        names.clear()
        with fused_res.backends.use("reference"):
            freeze(model)(x)
        assert set(names) == {"reference"}

    def test_invalid_arguments_raise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fused_res.backends.cuda, "is_simulated", lambda: False)
        with pytest.raises(ValueError, match="backend must be one of"):
            freeze(nn.Identity(), backend="cudnn")
        with pytest.raises(fused_res.BackendUnavailableError, match="cuda"):
            freeze(nn.Identity(), backend="cuda")
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
            freeze([nn.Identity()])  # type: ignore[type-var]

    @pytest.mark.parametrize("x", [images(), torch.ones(2, 4, 32, 32), torch.ones(3, 32), torch.ones(2, 3, 0, 0)])
    def test_invalid_input_raises_stock_error(self, model: nn.Module, x: Tensor) -> None:
        errors = []
        for one in (model.eval(), freeze(model)):
            one(images(dtype=torch.float32))
            with pytest.raises((RuntimeError, ValueError, IndexError)) as error:
                one(x)
            errors.append((error.type, str(error.value)))
        assert errors[0] == errors[1]


@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
def test_input_shape_is_prepared_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generated forward passes its blocks in tuples, which must equal those that a program has prepared."""
    prepared = []
    prepare = packed.prepare

    def count(x: Tensor, *args: Any) -> Any:
        prepared.append(tuple(x.shape))
        return prepare(x, *args)

    monkeypatch.setattr(packed, "prepare", count)
    frozen = freeze(network(kind).float().eval())
    with torch.no_grad():
        for batch in (2, 2, 1, 2, 1):
            frozen(images(batch=batch, dtype=torch.float32))
    assert len(prepared) == len(set(prepared)) and {shape[0] for shape in prepared} == {1, 2}, prepared


class TestDtype:
    """freeze(model, dtype=...): the copy runs under autocast."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_error_is_at_most_that_of_stock_under_autocast(self, dtype: torch.dtype) -> None:
        """Over many networks: the rounding of one network's weights moves all of its outputs alike."""
        x = images(32, 16, torch.float32).to(memory_format=torch.channels_last)
        model = network().float().eval().to(memory_format=torch.channels_last)
        frozen, weights = freeze(model, dtype=dtype), [p for p in model.parameters() if p.dim() > 1]
        originals = copy.deepcopy(weights)
        errors = torch.zeros(2, dtype=torch.float64)
        for seed in range(64):
            torch.manual_seed(seed)
            for weight, original in zip(weights, originals, strict=True):
                weight.data = original + 0.1 * original.std() * torch.randn_like(original)
            exact = evaluate(copy.deepcopy(model).double(), x.double())
            with torch.autocast("cpu", dtype):
                stock = evaluate(model, x)
            frozen.load_state_dict(model.state_dict())
            output = frozen(x)
            assert output.dtype == stock.dtype == dtype
            errors += torch.stack([(one - exact).square().sum() for one in (output, stock)])
        assert errors[0] <= 1.05 * errors[1]  # 64 networks scatter by 5 %
        assert fusion_of(frozen).packed.selected()  # it ran with packed weights
        with torch.autocast("cpu", dtype):
            assert torch.equal(freeze(model)(x), output)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("in_place", [True, False], ids=["+=", "+"])
    def test_identity_block_with_float32_input(self, in_place: bool, dtype: torch.dtype) -> None:
        """Autocast does not cast the input that is added: the sum is in float32, unless it is written in place."""

        class Block(torchvision.models.resnet.BasicBlock):
            def forward(self, x: Tensor) -> Tensor:
                if in_place:
                    return super().forward(x)
                return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)

        torch.manual_seed(0)
        block = randomize_norms(Block(8, 8)).eval()
        x = torch.randn(2, 8, 9, 9)
        exact = evaluate(copy.deepcopy(block).double(), x.double())
        requested = freeze(block, dtype=dtype)(x)
        with torch.autocast("cpu", dtype):
            stock, ambient = evaluate(block, x), freeze(block)(x)
        assert stock.dtype is (dtype if in_place else torch.float32)
        for actual in (requested, ambient):
            assert actual.dtype is stock.dtype
            assert (actual - exact).norm() <= (stock - exact).norm()

    def test_state_copies_and_pickles(self) -> None:
        model = network().float().eval()
        frozen, x = freeze(model, dtype=torch.bfloat16), images(dtype=torch.float32)
        expected = frozen(x)
        state = frozen.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
        for same in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
            assert torch.equal(same(x), expected)

    def test_the_callers_autocast_has_precedence(self) -> None:
        model, x = network().float().eval(), images(dtype=torch.float32)
        with torch.autocast("cpu", torch.float16):
            assert freeze(model, dtype=torch.bfloat16)(x).dtype == torch.float16

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int8, "bfloat16"])
    def test_other_dtypes_raise(self, dtype: Any) -> None:
        with pytest.raises(ValueError, match=r"dtype: expected None, torch\.bfloat16 or torch\.float16, got"):
            freeze(network(), dtype=dtype)
