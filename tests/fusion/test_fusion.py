"""fuse, unfuse and summarize: which modules run fused, and that results and state do not change."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint_sequential

import fused_res
from fused_res import fuse, summarize, unfuse
from fused_res import nn as fnn
from fused_res.testing import stub_torchvision_operators
from tests.support.model_comparison import assert_models_match, assert_near, record_fused_calls, record_stock_norms
from tests.support.model_comparison import small_resnet as network

stub_torchvision_operators()
resnet = pytest.importorskip("torchvision.models.resnet")


def images(batch: int = 3, size: int = 48) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


class TestStateUnchanged:
    def test_parameters_keys_and_classes_are_unchanged(self) -> None:
        model = network()
        parameters, keys = list(model.parameters()), list(model.state_dict())
        modules = list(model.modules())
        assert fuse(model) is model
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
        assert list(model.state_dict()) == keys
        assert isinstance(model, resnet.ResNet) and isinstance(model.layer1[0], resnet.BasicBlock)

    def test_existing_optimizer_updates_fused_model(self) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = model.layer1[0].conv1.weight.detach().clone()
        fuse(model)(images()).sum().backward()
        optimizer.step()
        assert not torch.equal(before, model.layer1[0].conv1.weight)

    def test_unfuse_restores_classes_and_attributes(self) -> None:
        model = network()
        kinds = [type(module) for module in model.modules()]
        attributes = [set(vars(module)) for module in model.modules()]
        unfuse(fuse(model))
        assert kinds == [type(module) for module in model.modules()]
        assert attributes == [set(vars(module)) for module in model.modules()]
        with record_fused_calls() as calls:
            model(images())
        assert not calls

    def test_second_fuse_changes_settings_only(self) -> None:
        model = fuse(fuse(network(), recompute="norm"), backend="reference", recompute="conv", tune=True)
        block = model.layer1[0]
        assert block._fused_res.settings == ("reference", "conv", True, None)
        kind = type(block)
        assert kind.__bases__ == (resnet.BasicBlock,) and fuse(network()).layer1[0].__class__ is kind
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(kind, name) == getattr(resnet.BasicBlock, name)
        assert inspect.signature(kind.forward) == inspect.signature(resnet.BasicBlock.forward)
        assert repr(model) == repr(unfuse(copy.deepcopy(model)))

    @pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_training_matches_stock(self, kind: str, layout: torch.memory_format) -> None:
        stock = network(kind)
        fused = fuse(copy.deepcopy(stock))
        with record_fused_calls() as calls:
            assert_models_match(fused, stock, images().contiguous(memory_format=layout).requires_grad_())
        assert len(calls) == 2 * 5  # four blocks and the stem

    @pytest.mark.parametrize("recompute", ["none", "norm", "conv"])
    def test_frozen_layers_and_statistics_match_stock(self, recompute: str) -> None:
        stock = network("Bottleneck")
        for module in (stock.conv1, stock.bn1, stock.layer1, stock.layer2[0].bn2):
            module.requires_grad_(False).eval()
        fused = fuse(copy.deepcopy(stock), recompute=recompute)
        assert_models_match(fused, stock, images())

    def test_evaluation_matches_stock(self) -> None:
        stock = network("Bottleneck").eval()
        fused = fuse(copy.deepcopy(stock))
        assert_models_match(fused, stock, images())
        with torch.no_grad(), record_fused_calls() as calls:
            assert_near(fused(images()), stock(images()), "output")
        assert len(calls) == 5
        with torch.inference_mode():
            assert_near(fused(images()), stock(images()), "output")

    def test_train_eval_and_hooks_of_fused_block(self) -> None:
        model = fuse(network())
        hook_calls = []
        model.layer1[0].register_forward_hook(lambda *_: hook_calls.append("forward"))
        model.layer1[0].register_full_backward_hook(lambda *_: hook_calls.append("backward"))
        with record_fused_calls() as calls:
            model(images()).sum().backward()
        assert hook_calls == ["forward", "backward"] and len(calls) == 5
        assert not model.eval().layer1[0].bn1.training and model.train().layer1[0].bn1.training


class TestCopies:
    @pytest.fixture
    def model(self) -> nn.Module:
        return fuse(network(), recompute="norm").eval()

    def check_copy(self, model: nn.Module, other: nn.Module) -> None:
        assert type(other.layer1[0]) is type(model.layer1[0])
        assert other.layer1[0]._fused_res.settings == model.layer1[0]._fused_res.settings
        assert other.conv1.weight is not model.conv1.weight
        with record_fused_calls() as calls:
            assert torch.equal(other(images()), model(images()))
        assert len(calls) == 2 * 5

    def test_deepcopy(self, model: nn.Module) -> None:
        self.check_copy(model, copy.deepcopy(model))

    @pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
    def test_pickle(self, model: nn.Module, protocol: int) -> None:
        self.check_copy(model, pickle.loads(pickle.dumps(model, protocol)))

    def test_save(self, model: nn.Module) -> None:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        self.check_copy(model, torch.load(file, weights_only=False))

    def test_unpickle_in_another_process(self, model: nn.Module, tmp_path) -> None:
        (tmp_path / "model.pkl").write_bytes(pickle.dumps(model.layer1[0]))
        code = (
            "import pickle, sys; from fused_res.testing import stub_torchvision_operators as s; s();"
            "block = pickle.load(open(sys.argv[1], 'rb'));"
            "import fused_res;"
            "print(type(block).__name__, block._fused_res.settings.recompute, fused_res.summarize(block).norms_fused)"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "model.pkl")]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "BasicBlock norm 2\n"

    def test_slice_of_fused_sequential(self) -> None:
        stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).double()
        part = fuse(copy.deepcopy(stock))[:3]
        assert_models_match(part, stock[:3], images())
        assert type(unfuse(part)) is nn.Sequential
        part = fuse(fuse(copy.deepcopy(stock))[:3])
        assert type(part).__bases__ == (nn.Sequential,)
        with record_fused_calls() as calls:
            assert_models_match(part, stock[:3], images())
        assert calls


class TestInteroperability:
    def test_compiled_model_matches_stock(self) -> None:
        stock = network()
        fused = fuse(copy.deepcopy(stock))
        torch._dynamo.reset()
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        with record_fused_calls() as calls:
            x = images()
            outputs = compiled(x), stock(x)
            assert_near(*outputs, "output")
            for output in outputs:
                output.square().sum().backward()
        assert len(calls) == 5
        for (name, ours), theirs in zip(fused.named_parameters(), stock.parameters(), strict=True):
            assert_near(ours.grad, theirs.grad, name)
        for (name, ours), theirs in zip(fused.state_dict().items(), stock.state_dict().values(), strict=True):
            assert_near(ours, theirs, name)

    @pytest.mark.usefixtures("process_group")
    def test_distributed_data_parallel(self) -> None:
        stock = network()
        fused = DistributedDataParallel(fuse(copy.deepcopy(stock)))
        with record_fused_calls() as calls:
            assert_models_match(fused.module, stock, images(), steps=1)
            optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
            fused(images()).sum().backward()
            stock(images()).sum().backward()
        assert len(calls) == 2 * 5
        for (name, ours), theirs in zip(fused.module.named_parameters(), stock.parameters(), strict=True):
            assert_near(ours.grad, theirs.grad, name)
        optimizer.step()
        wrapped = fuse(DistributedDataParallel(network()))  # fused after wrapping
        with record_fused_calls() as calls:
            wrapped(images()).sum().backward()
        assert len(calls) == 5

    @pytest.mark.usefixtures("process_group")
    def test_sync_batchnorm_after_fuse(self) -> None:
        stock = network()
        fused = fused_res.convert_sync_batchnorm(fuse(copy.deepcopy(stock)))
        with record_fused_calls() as calls:
            assert_models_match(fused, stock, images(), steps=2)
        assert len(calls) == 2 * 5

    def test_functional_call(self) -> None:
        stock = network().eval()
        fused = fuse(copy.deepcopy(stock))
        state = {name: tensor * 1.05 for name, tensor in stock.named_parameters()}
        with record_fused_calls() as calls:
            actual = torch.func.functional_call(fused, state, (images(),))
        assert len(calls) == 5
        assert_near(actual, torch.func.functional_call(stock, state, (images(),)), "output")

    def test_activation_checkpointing_matches_stock(self) -> None:
        stock = network()
        fused = fuse(copy.deepcopy(stock))
        x = images(size=32)
        expected = stock.layer2(stock.layer1(stock.maxpool(stock.relu(stock.bn1(stock.conv1(x))))))
        expected.square().sum().backward()
        stem = fused.maxpool(fused.relu(fused.bn1(fused.conv1(x))))
        actual = checkpoint_sequential([fused.layer1, fused.layer2], 2, stem, use_reentrant=False)
        actual.square().sum().backward()
        for (name, ours), theirs in zip(fused.named_parameters(), stock.parameters(), strict=True):
            assert_near(ours.grad, theirs.grad, name)
        for name in ("layer1.0.bn1", "layer2.0.bn2"):
            assert fused.get_submodule(name).num_batches_tracked == 1

    def test_autocast_matches_stock(self) -> None:
        stock = network().float()
        fused = fuse(copy.deepcopy(stock))
        with torch.autocast("cpu", torch.bfloat16), record_fused_calls() as calls:
            outputs = [model(images().float()) for model in (fused, stock)]
            assert_near(*outputs, "output")
            for output in outputs:
                output.float().square().sum().backward()
        assert len(calls) == 5
        for (name, ours), theirs in zip(fused.named_parameters(), stock.parameters(), strict=True):
            # The stock model also rounds to 16 bits between the operations of a block.
            assert ours.grad.dtype == theirs.grad.dtype
            assert torch.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), 0) > 0.97, name

    def test_jit_trace_and_export_use_stock_forward(self) -> None:
        stock = network().eval()
        fused = fuse(copy.deepcopy(stock))
        for converted in (
            torch.jit.trace(fused, images()),
            torch.export.export(fused, (images(),)).module(),
        ):
            assert_near(converted(images()), stock(images()), "output")

    def test_subclass_of_fused_class_runs_fused(self) -> None:
        """`fully_shard` replaces a module's class by a subclass of it."""
        stock = network()
        fused = fuse(copy.deepcopy(stock))
        block = fused.layer1[0]
        block.__class__ = type("Sharded", (type(block),), {})
        with record_fused_calls() as calls:
            assert_models_match(fused, stock, images(), steps=1)
        assert len(calls) == 5
        unfuse(fused)
        with record_fused_calls() as calls:
            assert_models_match(fused, stock, images(), steps=1)
        assert not calls


class TestModelEditedAfterFuse:
    def test_block_with_inner_hook_runs_unfused(self) -> None:
        stock = network()
        fused = fuse(copy.deepcopy(stock))
        hook_calls = []
        handle = fused.layer2[0].bn1.register_forward_hook(lambda *_: hook_calls.append(1))
        with record_fused_calls() as calls:
            assert_models_match(fused, stock, images(), steps=1)
        assert hook_calls == [1] and len(calls) == 4
        assert "bn1 has a hook" in str(summarize(fused))
        handle.remove()
        assert "hook" not in str(summarize(fused))

    def test_block_runs_fused_after_existing_hook_is_removed(self) -> None:
        model = network()
        handle = model.layer2[0].relu.register_forward_pre_hook(lambda *_: None)
        fuse(model)
        with record_fused_calls() as calls:
            model(images())
        assert len(calls) == 4
        handle.remove()
        with record_fused_calls() as calls:
            model(images())
        assert len(calls) == 5

    @pytest.mark.parametrize(
        ("change", "stock_norms"),
        [
            (lambda model: setattr(model, "maxpool", nn.Identity()), 0),
            (lambda model: setattr(model, "maxpool", nn.AvgPool2d(2)), 0),
            (lambda model: setattr(model.maxpool, "ceil_mode", True), 0),
            (lambda model: setattr(model, "relu", nn.Identity()), 0),
            (lambda model: setattr(model, "bn1", nn.InstanceNorm2d(8).double()), 0),
            (lambda model: setattr(model.layer1[0], "relu", nn.GELU()), 0),  # the norms run fused
            (lambda model: setattr(model.layer3[0], "downsample", nn.Conv2d(6, 4, 1, 2).double()), 0),
            (lambda model: model.layer3[0].downsample.append(nn.Dropout(0.0)), 0),
            (lambda model: model.layer3[0].downsample.insert(0, nn.Identity()), 0),
            (lambda model: nn.utils.parametrizations.orthogonal(model.layer1[0].conv1), 0),
            (lambda model: setattr(model.layer1[0].conv1, "bias", nn.Parameter(torch.ones(8).double())), 0),
        ],
    )
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_replaced_children_match_stock(self, change, stock_norms: int, when: str) -> None:
        stock = network()
        fused = copy.deepcopy(stock)
        if when == "after":
            fuse(fused)
        for model in (stock, fused):
            torch.manual_seed(2)
            change(model)
        if when == "after":  # it runs stock, or reads the replaced module
            assert_models_match(copy.deepcopy(fused), copy.deepcopy(stock), images(), steps=1)
        fuse(fused)
        with record_stock_norms() as recorded:
            fused(images())
        assert len(recorded) == stock_norms
        assert summarize(fused).norms_fused == sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
        stock(images())
        assert_models_match(fused, stock, images(), steps=1)

    def test_cumulative_moving_average_matches_stock(self) -> None:
        stock = network()
        for module in stock.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        assert_models_match(fuse(copy.deepcopy(stock)), stock, images(), steps=3)


class TestSequential:
    def check_calls(self, model: nn.Sequential, expected: list[str], x: Tensor | None = None) -> nn.Sequential:
        stock = model.double()
        fused = fuse(copy.deepcopy(stock))
        with record_fused_calls() as calls:
            assert_models_match(fused, stock, (images(size=16) if x is None else x).requires_grad_())
        assert calls == 2 * expected
        return fused

    def test_conv_norm_relu_in_every_order(self) -> None:
        self.check_calls(
            nn.Sequential(
                nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
                nn.Conv2d(4, 6, 3, 2), nn.BatchNorm2d(6),
                nn.Conv2d(6, 6, 3, groups=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
                nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 1),
                nn.ReLU(), nn.BatchNorm2d(4), nn.Tanh(),
            ),
            ["residual_block", "batch_norm_act", "batch_norm_act"],
        )  # fmt: skip

    def test_unsupported_unit_splits_the_chain(self) -> None:
        circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
            circular, nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.check_calls(model, ["residual_block", "batch_norm_act", "residual_block"])

    def test_inplace_relu_does_not_modify_input(self) -> None:
        model = fuse(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True)).double())
        x = images()
        before = x.clone()
        model(x)
        assert torch.equal(x, before)

    def test_subclass_with_inherited_forward_is_fused(self) -> None:
        from torchvision.ops import Conv2dNormActivation

        fused = self.check_calls(Conv2dNormActivation(3, 8), ["residual_block"])
        assert isinstance(fused, Conv2dNormActivation)

    def test_subclass_with_overridden_forward(self) -> None:
        class Doubled(nn.Sequential):
            def forward(self, input: Tensor) -> Tensor:
                return 2 * super().forward(input)

        self.check_calls(nn.Sequential(Doubled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), ["residual_block"])

    def test_children_of_any_name(self) -> None:
        names = ("self", "settings", "class", "v0", "m_conv", "run_fused", "Tensor", "a b", "0", "été")
        children = OrderedDict((name, nn.Identity()) for name in names)
        model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), **children, relu=nn.ReLU()))
        fused = self.check_calls(model, ["residual_block"])
        assert list(fused._modules) == ["conv", "norm", *names, "relu"]

    def test_inner_hook(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())
        fused = self.check_calls(model, ["residual_block", "batch_norm_act"])
        hooked: list[Tensor] = []
        fused[1].register_forward_hook(lambda *args: hooked.append(args[2]))
        with record_stock_norms() as recorded:
            fused(images())
        assert len(recorded) == 2 and len(hooked) == 1


class TestCacheEval:
    """fuse(cache_eval=True): evaluation without gradients runs with packed weights, which follow every change."""

    @pytest.fixture(params=[torch.float64, torch.float32], ids=str)
    def pair(self, request: pytest.FixtureRequest) -> tuple[Any, Any]:
        stock = network("Bottleneck").to(request.param)
        return stock, fuse(copy.deepcopy(stock), cache_eval=True)

    @staticmethod
    def check(pair: tuple[Any, Any], packed_calls: bool = True) -> None:
        stock, fused = pair
        x = images(2, 32).to(stock.fc.weight.dtype)
        with torch.no_grad(), record_stock_norms() as norms, record_fused_calls() as calls:
            actual = fused(x)
        assert not norms and bool(calls) != packed_calls  # neither stock nor with batch norms
        with torch.no_grad():
            assert_near(actual, stock(x), "output", 1e-4 if x.dtype is torch.float32 else 1e-9)

    def test_training_in_between(self, pair: tuple[Any, Any]) -> None:
        stock, fused = (model.eval() for model in pair)
        x = images(3, 48).to(stock.fc.weight.dtype)
        optimizer = torch.optim.SGD(fused.parameters(), lr=0.05, momentum=0.9)
        for _ in range(3):
            self.check(pair)
            before = fused.layer1[0].conv1.weight.clone()
            fused.train()(x).square().mean().backward()
            optimizer.step()
            fused.eval()
            assert not torch.equal(before, fused.layer1[0].conv1.weight)
            stock.load_state_dict(fused.state_dict())
        self.check(pair)
        with torch.no_grad():
            fused.train()(x)  # changes the statistics alone
        stock.load_state_dict(fused.eval().state_dict())
        self.check(pair)

    def test_training_matches_stock(self) -> None:
        stock = network()
        fused = fuse(copy.deepcopy(stock), cache_eval=True)
        assert_models_match(fused, stock, images(), steps=2)
        assert_models_match(fused.eval(), stock.eval(), images(), steps=1)

    def test_load_state_dict(self, pair: tuple[Any, Any]) -> None:
        other = {
            name: value * 1.1 if value.is_floating_point() else value for name, value in pair[0].state_dict().items()
        }
        for assign in (False, True):
            self.check([model.eval() for model in pair])
            for model in pair:
                model.load_state_dict({name: value.clone() for name, value in other.items()}, assign=assign)
            self.check(pair)

    def test_gradients_run_with_batch_norms(self, pair: tuple[Any, Any]) -> None:
        stock, fused = (model.eval() for model in pair)
        x = images(2, 32).to(stock.fc.weight.dtype)
        with record_fused_calls() as calls:
            output = fused(x)
        assert len(calls) == 5 and output.requires_grad
        with record_fused_calls() as calls, torch.no_grad():
            assert not fused.train()(x).requires_grad
        assert len(calls) == 5  # batch statistics

    def test_autocast(self, pair: tuple[Any, Any]) -> None:
        stock, fused = (model.float().eval() for model in pair)
        x = images(2, 32).float()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), record_stock_norms() as norms:
            actual = fused(x)
        assert not norms
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = stock(x)
        assert actual.dtype == expected.dtype == torch.bfloat16
        assert torch.cosine_similarity(actual.float(), expected.float()).min() > 0.99

    def test_copies_modules_and_unfuse(self, pair: tuple[Any, Any]) -> None:
        stock, fused = (model.eval() for model in pair)
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            self.check((stock, other))
        assert not fused.train().eval().training  # not frozen
        assert "packed" in str(summarize(fused)) and "packed" not in str(summarize(fuse(fused)))
        self.check((stock, fused), packed_calls=False)
        assert type(unfuse(fuse(fused, cache_eval=True))) is resnet.ResNet


class TestNotFused:
    def test_forwards_with_nothing_to_fuse(self) -> None:
        class Overridden(resnet.BasicBlock):
            def forward(self, x: Tensor) -> Tensor:
                return x

        class Renamed(resnet.BasicBlock):
            pass

        model = fuse(nn.ModuleList([Overridden(4, 4), Renamed(4, 4)]))
        assert type(model[0]) is Overridden and type(model[1]) is not Renamed and isinstance(model[1], Renamed)

    def test_scripted_modules_are_not_fused(self) -> None:
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
        model = fuse(nn.ModuleList([scripted]))
        assert summarize(model).fused == () and all(row.why for row in summarize(model).left)
        assert "is compiled by torch.jit" in str(summarize(model))

    def test_lazy_modules_fuse_after_initialization(self) -> None:
        stock = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU())
        fuse(stock)(images().float())
        assert type(stock) is nn.Sequential
        with record_fused_calls() as calls:
            fuse(stock)(images().float())
        assert calls

    def test_another_version_of_a_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Blocks are recognized by what they compute, whatever a version of their class computes."""

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.bn1(self.conv1(x)))

        monkeypatch.setattr(resnet.BasicBlock, "forward", forward)
        stock = network()
        with record_fused_calls() as calls:
            assert_models_match(fuse(copy.deepcopy(stock)), stock, images(), steps=1)
        assert len(calls) == 5


class TestFusedResModules:
    def test_fuse_and_unfuse_switch_settings(self) -> None:
        block = fnn.BasicBlock(4, 4)
        fuse(block, backend="reference", recompute="norm", tune=True)
        assert (block.backend, block.recompute, block.tune, block.fused) == ("reference", "norm", True, True)
        settings = "backend=reference, recompute=norm, tune=True, "
        assert summarize(block).fused[0].why == settings + "algorithms are selected for the first input"
        fuse(block, backend="reference", recompute="norm")
        x = torch.ones(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
        settings = settings.replace("tune=True, ", "")
        block(x)
        reason = summarize(block).fused[0].why
        assert reason == settings + "3x3 aten (reference not selected: plain PyTorch has nothing to gain from fusion)"
        with fused_res.backends.use("reference", convolution="fused"):
            block(x)
        reason = summarize(block).fused[0].why
        assert "3x3 forward reference (plain PyTorch), input gradient aten" in reason
        unfuse(block)
        with record_fused_calls() as calls:
            block(torch.ones(2, 4, 5, 5))
        assert not calls
        assert summarize(block).left[0].why == "switched off"
        assert fuse(block).fused


class TestSummary:
    def test_table_lists_fused_and_unfused_modules(self) -> None:
        model = fuse(nn.ModuleDict({"net": network(), "other": nn.ModuleList([nn.GroupNorm(1, 3)])}))
        model["net"].layer4[0].relu = nn.SiLU()
        summary = summarize(model)
        assert [row.name for row in summary.fused] == ["net", "net.layer1.0", "net.layer2.0", "net.layer3.0"]
        left = {row.name: row.why for row in summary.left}
        assert left.keys() == {"net.layer4.0", "other.0"}
        assert "relu has another class" in left["net.layer4.0"] and "GroupNorm" in left["other.0"]
        text = str(summary)
        assert f"{summary.norms_fused} of {summary.norms} norms run fused" in text and "BasicBlock" in text
        assert (summary.norms_fused, summary.norms) == (9, 13)

    def test_summary_before_and_after_fuse(self) -> None:
        model = network()
        assert {row.why for row in summarize(model).left} == {"not fused as yet: call fused_res.fuse"}
        assert summarize(fuse(model)).left == ()


class TestInvalidArguments:
    def test_invalid_arguments_raise(self) -> None:
        model = network()
        with pytest.raises(ValueError, match="backend must be one of"):
            fuse(model, backend="cudnn")
        with pytest.raises(ValueError, match="recompute must be one of"):
            fuse(model, recompute="everything")
        for function in (fuse, unfuse, summarize, fused_res.convert_sync_batchnorm):
            for wrong in ([model], None, nn.ReLU):
                with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
                    function(wrong)
        with pytest.raises(TypeError, match="process_group must be a torch.distributed.ProcessGroup or None"):
            fused_res.convert_sync_batchnorm(model, "world")
        assert type(model) is resnet.ResNet

    def test_unavailable_backend_raises_without_side_effects(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fused_res.backends.cuda, "is_simulated", lambda: False)
        model = network()
        with pytest.raises(fused_res.BackendUnavailableError, match="cuda"):
            fuse(model, backend="cuda")
        assert type(model) is resnet.ResNet and type(model.layer1[0]) is resnet.BasicBlock

    def test_error_inside_block_leaves_the_state_of_stock(self) -> None:
        stock = network()
        model = fuse(copy.deepcopy(stock))
        for one in (model, stock):
            with pytest.raises(ValueError, match=r"more than 1 value per channel"):
                one(images(1, 32))
        ours, theirs = model.layer4[0].state_dict(), stock.layer4[0].state_dict()
        assert all(torch.equal(a, b) for a, b in zip(ours.values(), theirs.values(), strict=True))


def test_fusion_does_not_import_torchvision_or_timm() -> None:
    code = "import sys, fused_res.fusion; print({'torchvision', 'timm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
