"""freeze: outputs match the model in eval mode, and the frozen model supports the usual nn.Module operations."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fused_res
from fused_res import freeze, functional, fuse, models, summarize
from fused_res import nn as fnn
from fused_res.nn.frozen import FrozenBlock, FrozenConv
from fused_res.testing import stub_torchvision_operators
from tests.support.model_comparison import assert_near, randomize_norms, small_resnet

stub_torchvision_operators()
torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
resnet = torchvision.models.resnet


def images(size: int = 48, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def network(kind: str = "BasicBlock", **options: Any) -> Any:
    return randomize_norms(small_resnet(kind, **options))


@contextlib.contextmanager
def record_conv_backends() -> Iterator[list[str]]:
    """Record the backend's name for each fused convolution, to check that a test does not compare stock with stock."""
    calls: list[str] = []
    original = functional.registry.resolve

    def resolve(*arguments: Any) -> Any:
        kernels = original(*arguments)
        calls.append(kernels.name)
        return kernels

    functional.registry.resolve = resolve
    try:
        yield calls
    finally:
        functional.registry.resolve = original


#: Error of a whole network in float32, relative to the largest logit.
FLOAT32_TOLERANCE = 2e-5


def evaluate(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def check_frozen(
    model: nn.Module, conv_calls: int | None = None, x: Tensor | None = None, tolerance: float = 1e-9
) -> Any:
    """Compare the frozen model with the model in eval mode, in float64 and float32, and return it.

    Args:
        model: the model; converted to float64.
        conv_calls: expected number of fused convolutions of a forward, or None.
        x: input, default ``images()``.
        tolerance: error allowed in float64, relative to the largest logit.
    """
    model = model.double()
    x = images() if x is None else x
    state = copy.deepcopy(model.state_dict())
    frozen = freeze(model)
    expected = evaluate(model, x)
    with record_conv_backends() as calls:
        actual = frozen(x)
    assert not actual.requires_grad and actual.dtype == expected.dtype and actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
    assert conv_calls is None or len(calls) == conv_calls
    # In float32 the same modules run as inference graphs, with other kernels.
    single = freeze(copy.deepcopy(model).float())(x.float())
    assert single.dtype == torch.float32
    assert (single - expected).abs().max() <= FLOAT32_TOLERANCE * expected.abs().max()
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    return frozen


def count_convolutions(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


class TestModels:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: torchvision.models.resnet18(num_classes=5),
            lambda: torchvision.models.resnet50(num_classes=5),
            lambda: small_resnet("Bottleneck", (16, 16, 16, 16), groups=32, width_per_group=4),
            lambda: small_resnet("Bottleneck", (16, 16, 16, 16), width_per_group=128),
        ],
    )
    def test_torchvision_resnets_freeze_completely(self, make: Callable[[], nn.Module]) -> None:
        model = randomize_norms(make())
        frozen = check_frozen(model, count_convolutions(model), images(32))
        assert summarize(frozen).left == () and isinstance(frozen, resnet.ResNet)
        assert count_convolutions(frozen) == 0 and not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())

    @pytest.mark.parametrize("name", ["resnet18", "resnet26"])
    def test_timm_resnets_freeze_completely(self, name: str) -> None:
        model = randomize_norms(timm.create_model(name, num_classes=5))
        frozen = check_frozen(model, count_convolutions(model), images(32))
        assert summarize(frozen).left == ()
        assert_near(frozen.forward_features(images(32)), model.eval().forward_features(images(32)), "features")

    def test_timm_deep_stem_and_average_pooled_shortcut(self) -> None:
        model = randomize_norms(timm.create_model("resnet18d", num_classes=5))
        frozen = check_frozen(model, count_convolutions(model))
        assert summarize(frozen).left == () and count_convolutions(frozen) == 0
        rows = {row.name: row.why for row in summarize(frozen).fused}
        for stage in (2, 3, 4):
            assert rows[f"layer{stage}.0"] == "frozen in pieces: downsample is not a convolution and a norm"
            assert "frozen, backend" in rows[f"layer{stage}.0.downsample.1"]
        for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), freeze(frozen), fuse(frozen)):
            assert torch.equal(other(images(32)), frozen(images(32)))
            assert {row.name: row.why for row in summarize(other).fused}.keys() == rows.keys()

    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("BasicBlock", {"stem_type": "deep_tiered", "replace_stem_pool": True}),
            ("BasicBlock", {"output_stride": 8}),
            ("Bottleneck", {"cardinality": 4, "base_width": 32}),
            ("Bottleneck", {"base_width": 128, "down_kernel_size": 3}),
        ],
    )
    def test_timm_variants_freeze_completely(self, kind: str, options: dict[str, Any]) -> None:
        block = getattr(timm.models.resnet, kind)
        model = timm.models.resnet.ResNet(block, (1, 1, 1, 2), channels=(8, 8, 16, 16), stem_width=8, **options)
        frozen = check_frozen(randomize_norms(model), count_convolutions(model))
        assert summarize(frozen).left == ()

    def test_attention_blocks_are_partially_frozen(self) -> None:
        model = randomize_norms(timm.create_model("seresnet18", num_classes=5))
        frozen = check_frozen(model, 1 + 8 * 2 + 3)  # stem, two convolutions per block, projections
        assert len([row for row in summarize(frozen).fused if row.why == "frozen in pieces: se is SEModule"]) == 8

    def test_hooks_in_partially_frozen_blocks_are_called(self) -> None:
        model = randomize_norms(timm.create_model("seresnet18", num_classes=5))
        hook_calls: list[str] = []
        model.layer1[0].register_forward_hook(lambda *_: hook_calls.append("block"))
        model.layer2[0].bn1.register_forward_hook(lambda *_: hook_calls.append("bn1"))
        # Stem, two convolutions in each block but layer1.0, without layer2.0.conv1, projections.
        frozen = check_frozen(model, 1 + 7 * 2 - 1 + 3)
        hook_calls.clear()
        frozen(images())
        assert hook_calls == ["block", "bn1"]
        (row,) = summarize(frozen).left
        assert row.name == "layer1.0" and "has a hook" in row.why

    @pytest.mark.parametrize("drop", [{"drop_path_rate": 0.5}, {"drop_block_rate": 0.2}])
    def test_drop_path_and_drop_block_are_inactive(self, drop: dict[str, Any]) -> None:
        model = randomize_norms(timm.create_model("resnet18", num_classes=5, **drop))
        assert summarize(check_frozen(model, count_convolutions(model), images(32))).left == ()

    @pytest.mark.parametrize(
        "make",
        [
            models.resnet18,
            lambda: models.resnet50(num_classes=3, replace_stride_with_dilation=[False, True, True]),
            lambda: models.cifar_resnet(20),
            lambda: models.cifar_resnet(20, plain=True),
        ],
    )
    @pytest.mark.parametrize("fused", [False, True])
    def test_fused_res_models_freeze_completely(self, make: Callable[[], nn.Module], fused: bool) -> None:
        model = randomize_norms(make())
        if not fused:
            fused_res.unfuse(model)
        frozen = check_frozen(model, count_convolutions(model), images(32))
        assert summarize(frozen).left == () and len(summarize(frozen).fused) == len(summarize(fuse(model)).fused)

    def test_fused_res_layers_become_frozen_modules(self) -> None:
        model = nn.Sequential(
            fnn.ConvBNAct2d(3, 8, bias=True),
            fnn.BatchNormAct2d(8),
            fnn.Bottleneck(8, 2),
            fnn.BasicBlock(8, 8, shortcut=False),
            fnn.ConvBNAct2d(8, 6, 1, activation="identity"),
            fnn.ResidualBlock([(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))]),
        )
        frozen = check_frozen(randomize_norms(model))
        assert [type(layer).__name__ for layer in frozen] == [
            "FrozenConv", "BatchNormAct2d", "FrozenBlock", "FrozenBlock", "FrozenConv", "FrozenBlock",
        ]  # fmt: skip

    def test_sequential_freezes_supported_units(self) -> None:
        circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, 2, groups=2), nn.BatchNorm2d(4, affine=False),
            circular, nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6, eps=0.1), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
            nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1), nn.ReLU(),
        )  # fmt: skip
        frozen = check_frozen(randomize_norms(model), 3)
        assert len(frozen) == len(model) and isinstance(frozen[:5], nn.Sequential)
        assert [i for i, layer in enumerate(frozen) if isinstance(layer, FrozenConv)] == [0, 3, 8]
        assert [row.why for row in summarize(frozen).left] == ["12 has no convolution before it"]

    def test_shared_layers_remain_shared(self) -> None:
        block, act = fnn.BasicBlock(4, 4), nn.ReLU()
        conv, norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        inner = nn.Sequential(conv, norm, act, conv, norm, act)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), act, block, inner, block, inner)
        frozen = check_frozen(randomize_norms(model), 1 + 2 + 2 + 2 + 2)
        assert frozen[3] is frozen[5]

    def test_densenet_and_vgg_match_stock(self) -> None:
        dense = torchvision.models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=3)
        check_frozen(randomize_norms(dense), 1)  # the stem only: the dense blocks have the norm before the convolution
        check_frozen(
            randomize_norms(nn.Sequential(torchvision.models.vgg.make_layers([8, "M", 8, 8, "M"], batch_norm=True))), 3
        )

    def test_backbone_inside_unsupported_model(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.backbone = network()

            def forward(self, x: Tensor) -> Tensor:
                body = self.backbone
                y = body.relu(body.bn1(body.conv1(x)))  # calls the stem layer by layer
                return body.layer1(body.maxpool(y)).mean((2, 3)).sum() + body(x)

        frozen = check_frozen(Twice())
        assert isinstance(frozen, Twice) and type(frozen.backbone).__name__ == "ResNet"

    def test_fused_model_freezes_completely(self) -> None:
        frozen = check_frozen(fuse(network("Bottleneck")), 17)
        assert type(frozen).__name__ == "FrozenResNet" and isinstance(frozen.layer1[0], FrozenBlock)

    def test_single_block_becomes_frozen_block(self) -> None:
        block = resnet.BasicBlock(3, 3)
        assert isinstance(check_frozen(randomize_norms(block), 2), FrozenBlock)

    def test_freeze_is_idempotent(self) -> None:
        frozen = freeze(network())
        again = freeze(frozen)
        assert type(again) is type(frozen) and torch.equal(again(images()), frozen(images()))
        assert str(summarize(again)) == str(summarize(frozen)) and "5 fused, 0 left" in str(summarize(again))


class TestNotFrozen:
    @pytest.mark.parametrize(
        ("change", "why", "runs"),
        [
            (lambda m: m.layer1[0].bn1.register_forward_hook(lambda *_: None), "bn1 has a hook", True),
            (lambda m: m.layer1[0].register_forward_hook(lambda *_: None), "has a hook, or a forward of its own", True),
            (lambda m: m.conv1.register_forward_pre_hook(lambda *_: None), "conv1 has a hook", True),
            (lambda m: setattr(m.layer1[0], "relu", nn.GELU()), "relu is GELU, not exactly ReLU", True),
            (
                lambda m: setattr(m.layer1[0], "bn1", nn.GroupNorm(2, 8)),
                "bn1 is GroupNorm, not exactly BatchNorm2d",
                True,
            ),
            (
                lambda m: setattr(m.layer1[0], "bn2", nn.BatchNorm2d(8, track_running_stats=False)),
                "bn2 normalizes with the statistics of the batch",
                True,
            ),
            (lambda m: parametrizations.weight_norm(m.layer1[0].conv1), "not exactly Conv2d", True),
            (lambda m: setattr(m.layer1[0].conv1, "padding_mode", "reflect"), "padding_mode='reflect'", True),
            (
                lambda m: m.layer1[0].conv2.double(),
                "has dtype torch.float64, but the block computes in torch.float32",
                False,
            ),
        ],
    )
    def test_summary_reports_reason(self, change: Callable[[Any], Any], why: str, runs: bool) -> None:
        model = network().float()
        change(model)
        frozen = freeze(model)
        (row,) = summarize(frozen).left
        assert why in row.why
        if runs:
            expected = evaluate(model, images(dtype=torch.float32))
            torch.testing.assert_close(frozen(images(dtype=torch.float32)), expected, rtol=1e-4, atol=1e-4)

    def test_hooks_are_called(self) -> None:
        model = network()
        hook_calls: list[str] = []
        model.layer2[0].register_forward_hook(lambda *_: hook_calls.append("block"))
        model.register_forward_hook(lambda *_: hook_calls.append("model"))
        freeze(model)(images())
        assert hook_calls == ["block", "model"]

    def test_overridden_forward_is_not_frozen(self) -> None:
        class OverriddenBlock(fnn.BasicBlock):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + 1

        class OverriddenNet(models.CifarResNet):
            def _stem(self, x: Tensor) -> Tensor:
                return self.conv1(x)

        frozen = check_frozen(nn.Sequential(randomize_norms(OverriddenBlock(3, 3))), 0)
        assert type(frozen[0]) is OverriddenBlock
        frozen = check_frozen(randomize_norms(OverriddenNet(8)), conv_calls=8)  # all convolutions but the stem's
        assert isinstance(frozen.conv1, nn.Conv2d)

    def test_captured_graphs_are_not_frozen(self) -> None:
        traced = torch.fx.symbolic_trace(network().eval())
        frozen = freeze(traced)
        assert torch.equal(frozen(images()), traced(images())) and isinstance(frozen, torch.fx.GraphModule)


@pytest.fixture
def model() -> Any:
    return network("Bottleneck").float()


class TestModuleBehavior:
    def check_copy(self, frozen: nn.Module, other: nn.Module) -> None:
        assert type(other) is type(frozen)
        x = images(dtype=torch.float32)
        with record_conv_backends() as calls:
            assert torch.equal(other(x), frozen(x))
        blocks = 4 + 1  # four blocks and the stem, each one inference graph where the backend supports them
        assert len(calls) == 2 * (blocks if fused_res.backends.unavailable("cpu") is None else 17)
        with pytest.raises(RuntimeError, match="frozen for inference"):
            other.train()

    @pytest.mark.parametrize("used", [False, True])
    def test_deepcopy_pickle_and_save(self, model: nn.Module, used: bool) -> None:
        frozen = freeze(model)
        size = len(pickle.dumps(frozen))
        if used:
            frozen(images(dtype=torch.float32))
        self.check_copy(frozen, copy.deepcopy(frozen))
        pickled = pickle.dumps(frozen)
        self.check_copy(frozen, pickle.loads(pickled))
        assert len(pickled) == size
        file = io.BytesIO()
        torch.save(frozen, file)
        file.seek(0)
        self.check_copy(frozen, torch.load(file, weights_only=False))

    def test_unpickle_and_compile_in_another_process(self, tmp_path: Any) -> None:
        (tmp_path / "model.pkl").write_bytes(pickle.dumps(freeze(fuse(network()))))
        code = (
            "import pickle, sys; from fused_res.testing import stub_torchvision_operators as s; s();"
            "model = pickle.load(open(sys.argv[1], 'rb')); print(type(model).__name__, type(model.layer1[0]).__name__);"
            "import torch; run = torch.compile(model, fullgraph=True, backend='aot_eager');"
            "print(*run(torch.ones(1, 3, 32, 32).double()).shape)"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "model.pkl")]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert output == "FrozenResNet FrozenBlock\n1 5\n"

    def test_load_state_dict_repacks_weights(self, model: nn.Module) -> None:
        x = images(dtype=torch.float32)
        frozen, other = freeze(model), freeze(network("Bottleneck", planes=(8, 6, 4, 8)).float())
        for parameter in other.state_dict().values():
            parameter.mul_(1.1)
        before = other(x)
        assert not torch.equal(before, frozen(x))
        assert {"layer2.0.conv1.weight", "layer2.0.downsample.bias", "conv1.bias"} <= set(frozen.state_dict())
        other.load_state_dict(frozen.state_dict())  # invalidates the packed weights cached by the first call
        assert torch.equal(other(x), frozen(x))
        other.load_state_dict({name: tensor.clone() for name, tensor in frozen.state_dict().items()}, assign=True)
        assert torch.equal(other(x), frozen(x))

    def test_functional_call_and_in_place_changes(self, model: nn.Module) -> None:
        x, frozen = images(dtype=torch.float32), freeze(model)
        before = frozen(x)
        state = {name: 1.1 * tensor for name, tensor in frozen.state_dict().items()}
        other = freeze(model)
        other.load_state_dict(state)
        expected = other(x)
        swapped = torch.func.functional_call(frozen, state, (x,))
        assert torch.equal(frozen(x), before) and torch.equal(swapped, expected)
        for buffer in frozen.buffers():
            buffer.mul_(1.1)
        frozen.fc.weight.mul_(1.1), frozen.fc.bias.mul_(1.1)
        assert torch.equal(frozen(x), expected)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_conversion_to_another_dtype(self, model: nn.Module, dtype: torch.dtype) -> None:
        frozen = freeze(model)
        frozen(images(dtype=torch.float32))
        actual = frozen.to(dtype)(images(dtype=dtype)).double()
        reference = evaluate(model.double(), images())
        error = (actual - reference).norm() / reference.norm()
        assert error < {torch.float64: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]

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
        for format in (torch.contiguous_format, torch.channels_last):
            x = images(dtype=torch.float32)
            torch.testing.assert_close(frozen.to(memory_format=format)(x), evaluate(model, x), rtol=1e-4, atol=1e-4)

    def test_train_raises_without_side_effects(self, model: nn.Module) -> None:
        model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
        frozen = freeze(model)
        with pytest.raises(RuntimeError, match="frozen for inference: .* train the original model"):
            frozen.train()
        assert not any(module.training for module in frozen.modules())
        assert frozen.eval() is frozen and frozen.train(False) is frozen
        with pytest.raises(RuntimeError, match="frozen for inference"):
            frozen.layer1[0].conv1.train()
        assert model.training

    def test_input_gradient_raises(self, model: nn.Module) -> None:
        frozen, x = freeze(model), images(dtype=torch.float32)
        assert not any(p.requires_grad for p in frozen.parameters()) and all(
            p.requires_grad for p in model.parameters()
        )
        assert not frozen(x).requires_grad
        with pytest.raises(RuntimeError, match="input requires a gradient"):
            frozen(x.clone().requires_grad_())
        with torch.no_grad():
            frozen(x.clone().requires_grad_())

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
        with torch.autocast("cpu", torch.bfloat16):
            actual, again, expected = frozen(x), frozen(x), evaluate(model, x)
        assert actual.dtype == expected.dtype and torch.equal(actual, again)
        assert torch.cosine_similarity(actual.float(), expected.float()).min() > 0.99

    def test_concurrent_calls_match_stock(self, model: nn.Module) -> None:
        frozen = freeze(model)
        inputs = [images(size, 1, torch.float32) for size in (32, 40, 48, 56, 64, 72)]
        expected = [evaluate(model, x) for x in inputs]
        errors: list[BaseException] = []

        def work(start: int) -> None:
            try:
                for call in range(12):
                    index = (start + call) % len(inputs)
                    torch.testing.assert_close(frozen(inputs[index]), expected[index], rtol=1e-4, atol=1e-4)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors

    def test_packed_weight_cache_is_bounded(self, model: nn.Module) -> None:
        frozen = freeze(model)
        layers = [module for module in frozen.modules() if isinstance(module, FrozenConv)]
        for size in range(32, 64, 4):
            frozen(images(size, dtype=torch.float32))
            if fused_res.backends.unavailable("cpu") is None:
                assert len(frozen.conv1._packed) == 1  # one packing for every input shape
            assert max(len(layer._packed) for layer in layers) <= 4
        frozen.bfloat16()
        assert not any(layer._packed for layer in layers)


class TestExportFormats:
    @pytest.mark.parametrize("strict", [False, True])
    def test_export_contains_only_aten(self, model: nn.Module, strict: bool) -> None:
        x, frozen = images(dtype=torch.float32), freeze(model)
        dynamic = {0: torch.export.Dim("batch", min=2, max=8)}
        program = torch.export.export(frozen, (x,), dynamic_shapes=(dynamic,), strict=strict)
        targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
        assert {target.namespace for target in targets if hasattr(target, "namespace")} == {"aten"}
        assert not any("batch_norm" in str(target) for target in targets)
        more = images(batch=3, dtype=torch.float32)
        torch.testing.assert_close(program.module()(more), frozen(more), rtol=1e-4, atol=1e-4)

    def test_jit_trace_matches_eager(self, model: nn.Module) -> None:
        x, frozen = images(dtype=torch.float32), freeze(model)
        traced = torch.jit.trace(frozen, x)
        torch.testing.assert_close(traced(x), frozen(x), rtol=1e-4, atol=1e-4)
        assert "mkldnn" not in str(traced.inlined_graph)

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
    def test_backend_setting_selects_backend(self, model: nn.Module) -> None:
        x, frozen = images(dtype=torch.float32), freeze(model, backend="reference")
        with record_conv_backends() as calls:
            frozen(x)
        assert set(calls) == {"reference"}
        ran = [row.why.removeprefix("frozen, backend=reference, ") for row in summarize(frozen).fused]
        assert ran and all("reference (plain PyTorch)" in one and "first input" not in one for one in ran)
        with fused_res.backends.use("reference"), record_conv_backends() as calls:
            freeze(model)(x)
        assert set(calls) == {"reference"}

    def test_invalid_arguments_raise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fused_res.backends.cuda, "is_simulated", lambda: False)
        with pytest.raises(ValueError, match="backend must be one of"):
            freeze(nn.Identity(), backend="cudnn")
        with pytest.raises(fused_res.BackendUnavailableError, match="cuda"):
            freeze(nn.Identity(), backend="cuda")
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
            freeze([nn.Identity()])

    def test_summary_and_repr(self, model: nn.Module) -> None:
        model = nn.Sequential(OrderedDict(net=model, more=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
        frozen = freeze(model)
        rows = {row.name: row.kind for row in summarize(frozen).fused}
        assert rows == {
            "net.conv1": "Conv2d + BatchNorm2d + ReLU + MaxPool2d",
            **{f"net.layer{stage}.0": "Bottleneck" for stage in range(1, 5)},
            "more.0": "Conv2d + BatchNorm2d",
        }
        assert "FrozenConv(3, 4, kernel_size=(3, 3), stride=(1, 1)" in str(frozen.more[0])

    def test_invalid_input_raises(self, model: nn.Module) -> None:
        frozen = freeze(model)
        frozen(images(dtype=torch.float32))
        with pytest.raises(
            TypeError, match=r"input must be torch\.float32, which this layer was frozen for, got torch\.float64"
        ):
            frozen(images())
        with pytest.raises(ValueError, match="input must have the 3 channels that this layer was frozen for"):
            frozen(torch.ones(2, 4, 32, 32))
