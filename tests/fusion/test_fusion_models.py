"""torchvision and timm models, fused, compared with stock PyTorch in float64 training and evaluation."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_res import fuse, summarize
from fused_res.testing import stub_torchvision_operators
from tests.support.model_comparison import (
    assert_models_match,
    assert_near,
    randomize_norms,
    record_fused_calls,
    record_stock_norms,
    small_resnet,
)

stub_torchvision_operators()


def images(size: int = 64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, size, size, dtype=torch.float64)


def check_fused(stock: nn.Module, fused_calls: int, x: Tensor | None = None, recompute: str = "none") -> nn.Module:
    """Compare one training step and an evaluation; check that `fused_calls` calls a forward run all norms."""
    stock = stock.double()
    fused = fuse(copy.deepcopy(stock), recompute=recompute)
    x = images() if x is None else x
    with record_fused_calls() as calls:
        assert_models_match(fused, stock, x, steps=1)
    assert len(calls) == fused_calls
    with torch.no_grad():
        with record_stock_norms() as norms:
            actual = fused.eval()(x)
        assert len(norms) == count_hooked(fused)
        assert_near(actual, stock.eval()(x), "output in evaluation")
    return fused


def count_hooked(model: nn.Module) -> int:
    """Return the number of norms of the blocks that contain a layer with a hook."""
    hooked = [name for name, module in model.named_modules() if name.count(".") > 1 and module._forward_hooks]
    blocks = [model.get_submodule(name.rpartition(".")[0]) for name in hooked]
    return sum(isinstance(module, nn.BatchNorm2d) for block in blocks for module in block.modules())


class TestTorchvision:
    models = pytest.importorskip("torchvision.models")
    resnet = models.resnet

    @pytest.mark.parametrize(("name", "blocks"), [("resnet18", 9), ("resnet50", 17)])
    def test_resnets_fuse_completely(self, name: str, blocks: int) -> None:
        torch.manual_seed(0)
        fused = check_fused(randomize_norms(getattr(self.models, name)()), blocks)
        assert summarize(fused).left == ()

    @pytest.mark.parametrize(
        "options",
        [
            {"groups": 32, "width_per_group": 4},
            {"width_per_group": 128},
            {"replace_stride_with_dilation": [False, True, True]},
        ],
        ids=str,
    )
    def test_variants_fuse_completely(self, options: dict[str, Any]) -> None:
        fused = check_fused(randomize_norms(small_resnet("Bottleneck", planes=(16, 16, 16, 16), **options)), 5)
        assert summarize(fused).left == ()

    def test_frozen_batch_norm(self) -> None:
        from torchvision.ops import FrozenBatchNorm2d

        model = self.resnet.ResNet(self.resnet.BasicBlock, [1, 1, 1, 1], norm_layer=FrozenBatchNorm2d).double()
        fused = check_fused(randomize_norms(model), 5)
        assert summarize(fused).left == () and summarize(fused).norms_fused == 12

    def test_densenet_fuses_completely(self) -> None:
        torch.manual_seed(0)
        model = self.models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=3)
        fused = check_fused(randomize_norms(model), 11)  # a norm before every concatenation runs by itself
        assert summarize(fused).left == ()

    def test_vgg_fuses_conv_norm_relu(self) -> None:
        torch.manual_seed(0)
        features = self.models.vgg.make_layers([8, "M", 8, 8, "M"], batch_norm=True)
        check_fused(randomize_norms(nn.Sequential(features, nn.Flatten())), 2)

    def test_sequential_of_resnet_children_is_fused(self) -> None:
        check_fused(randomize_norms(nn.Sequential(*list(small_resnet().children())[:-2])), 5)


class TestTimm:
    timm = pytest.importorskip("timm")
    resnet = timm.models.resnet

    def make_resnet(self, kind: str = "Bottleneck", **options: Any) -> nn.Module:
        torch.manual_seed(0)
        block = getattr(self.resnet, kind)
        options = {"channels": (8, 8, 16, 16), "stem_width": 8, "num_classes": 3} | options
        return randomize_norms(self.resnet.ResNet(block, (1, 1, 1, 2), **options)).double()

    def test_resnet18_fuses_completely(self) -> None:
        torch.manual_seed(0)
        fused = check_fused(randomize_norms(self.timm.create_model("resnet18", num_classes=3)), 9)
        assert summarize(fused).left == ()

    @pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
    @pytest.mark.parametrize(
        ("options", "blocks"),
        [
            ({}, 6),
            ({"output_stride": 8}, 6),
            ({"stem_type": "deep"}, 6),
            ({"stem_type": "deep_tiered", "replace_stem_pool": True}, 6),
            ({"down_kernel_size": 3, "block_reduce_first": 2}, 6),
        ],
        ids=str,
    )
    def test_variants_fuse_completely(self, kind: str, options: dict[str, Any], blocks: int) -> None:
        fused = check_fused(self.make_resnet(kind, **options), blocks)
        assert summarize(fused).left == ()

    def test_grouped_bottlenecks_are_fused(self) -> None:
        check_fused(self.make_resnet(cardinality=4, base_width=32), 6)

    @pytest.mark.parametrize("recompute", ["none", "norm", "conv"])
    def test_average_pooled_shortcut(self, recompute: str) -> None:
        # A block with a pooled shortcut makes three calls: a chain of two units, the projection, and the last norm with
        # the addition.
        fused = check_fused(self.make_resnet(avg_down=True), 1 + 1 + 3 * 3 + 1, recompute=recompute)
        assert summarize(fused).left == ()

    @pytest.mark.parametrize("attention", ["se", "eca", "ese"])
    def test_attention(self, attention: str) -> None:
        # 1 stem, 5 blocks, 4 projections
        fused = check_fused(self.make_resnet(block_args={"attn_layer": attention}), 1 + 5 + 4)
        assert summarize(fused).left == ()

    def test_anti_aliasing(self) -> None:
        from timm.layers import BlurPool2d

        fused = check_fused(self.make_resnet(aa_layer=BlurPool2d), 1 + 1 + 3 * 3 + 1)
        assert summarize(fused).left == ()

    @pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
    def test_another_activation(self, kind: str) -> None:
        fused = check_fused(self.make_resnet(kind, act_layer=nn.SiLU), 1 + 5)
        assert summarize(fused).left == ()
        assert summarize(fused).notes == ("activation SiLU runs separately after the fused addition",)

    @pytest.mark.parametrize(
        ("options", "calls", "evaluated"),
        # Inactive in evaluation: blocks with a drop path are fused as a whole, those with DropBlock around it.
        [({"drop_path_rate": 0.5}, 1 + 1 + 4 + 3, 6), ({"drop_block_rate": 0.2}, 3 + 3 * 2 + 2, 3 + 3 * 2 + 2)],
        ids=str,
    )
    def test_drop_path_and_drop_block(self, options: dict[str, Any], calls: int, evaluated: int) -> None:
        stock = self.make_resnet(**options)
        stock.register_forward_pre_hook(lambda *_: torch.manual_seed(3) and None)
        fused = check_fused(stock, calls)
        with record_fused_calls() as recorded:
            fused(images())
        assert len(recorded) == evaluated

    def test_hook_on_inner_norm_is_called(self) -> None:
        stock = self.make_resnet()
        hook_calls: list[int] = []
        stock.layer2[0].bn1.register_forward_hook(lambda *_: hook_calls.append(1))
        fused = check_fused(stock, 5)  # all but the block with the hook
        assert len(hook_calls) == 4 and "bn1 has a hook" in str(summarize(fused))

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copied_model_with_frozen_layers(self, copied: Any) -> None:
        stock = self.make_resnet(avg_down=True, block_args={"attn_layer": "se"})
        for module in (
            stock.conv1,
            stock.layer1,
            stock.layer2[0].bn3,
            stock.layer3[0].downsample,
            stock.layer4[0].conv3,
        ):
            module.requires_grad_(False).eval()
        fused = copied(fuse(copy.deepcopy(stock)))
        with record_fused_calls() as calls:
            assert_models_match(fused, stock, images())
        assert len(calls) == 2 * (1 + 5 + 4) and summarize(fused).left == ()

    def test_compiled_blocks_with_attention(self) -> None:
        stock = self.make_resnet("BasicBlock", avg_down=True, block_args={"attn_layer": "se"})
        fused = fuse(copy.deepcopy(stock))
        torch._dynamo.reset()
        fused.compile(fullgraph=True, backend="aot_eager")
        with record_fused_calls() as calls:
            assert_models_match(fused, stock, images().requires_grad_(), steps=1)
        assert len(calls) == 1 + 5 + 4

    def test_gradient_checkpointing_matches_stock(self) -> None:
        stock = self.make_resnet()
        fused = fuse(copy.deepcopy(stock))
        fused.set_grad_checkpointing()
        with record_fused_calls() as calls:
            assert_models_match(fused, stock, images().requires_grad_(), steps=1)
        assert len(calls) >= 10  # each block in the forward, and again in the backward

    def test_features_only_backbone_is_fused(self) -> None:
        torch.manual_seed(0)
        stock = randomize_norms(self.timm.create_model("resnet18", features_only=True)).double().eval()
        fused = fuse(copy.deepcopy(stock))
        with record_fused_calls() as calls:
            for ours, theirs in zip(fused(images()), stock(images()), strict=True):
                assert_near(ours, theirs, "feature")
        assert len(calls) == 9
