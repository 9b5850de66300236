"""Models of torchvision and timm, fused against stock: training in float64 leaves no room for a mistake."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_res.fusion import fuse, summarize
from fused_res.testing import stub_torchvision_operators
from tests.support.model_comparison import assert_agree, assert_near, counted, lively, small_resnet

stub_torchvision_operators()


def images(size: int = 64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, size, size, dtype=torch.float64)


def check(stock: nn.Module, blocks: int, x: Tensor | None = None, recompute: str = "none") -> nn.Module:
    """Trains one step and evaluates; `blocks` is how many fused calls a forward makes."""
    stock = stock.double()
    fused = fuse(copy.deepcopy(stock), recompute=recompute)
    x = images() if x is None else x
    with counted() as calls:
        assert_agree(fused, stock, x, steps=1)
    assert len(calls) == blocks
    with torch.no_grad():
        assert_near(fused.eval()(x), stock.eval()(x), "output in evaluation")
    return fused


class TestTorchvision:
    models = pytest.importorskip("torchvision.models")
    resnet = models.resnet

    @pytest.mark.parametrize(("name", "blocks"), [("resnet18", 9), ("resnet50", 17)])
    def test_resnet(self, name: str, blocks: int) -> None:
        torch.manual_seed(0)
        fused = check(lively(getattr(self.models, name)()), blocks)
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
    def test_variants(self, options: dict[str, Any]) -> None:
        fused = check(lively(small_resnet("Bottleneck", planes=(16, 16, 16, 16), **options)), 5)
        assert summarize(fused).left == ()

    def test_norms_of_another_kind(self) -> None:
        from torchvision.ops import FrozenBatchNorm2d

        model = self.resnet.ResNet(self.resnet.BasicBlock, [1, 1, 1, 1], norm_layer=FrozenBatchNorm2d).double()
        fused = check(model, 0)
        assert "is FrozenBatchNorm2d, not exactly BatchNorm2d" in str(summarize(fused))

    def test_densenet(self) -> None:
        torch.manual_seed(0)
        model = self.models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=3)
        check(lively(model), 2)  # the stem and the transition between the two dense blocks

    def test_vgg(self) -> None:
        torch.manual_seed(0)
        features = self.models.vgg.make_layers([8, "M", 8, 8, "M"], batch_norm=True)
        check(lively(nn.Sequential(features, nn.Flatten())), 2)

    def test_a_network_taken_apart(self) -> None:
        check(lively(nn.Sequential(*list(small_resnet().children())[:-2])), 5)


class TestTimm:
    timm = pytest.importorskip("timm")
    resnet = timm.models.resnet

    def make(self, kind: str = "Bottleneck", **options: Any) -> nn.Module:
        torch.manual_seed(0)
        block = getattr(self.resnet, kind)
        options = {"channels": (8, 8, 16, 16), "stem_width": 8, "num_classes": 3} | options
        return lively(self.resnet.ResNet(block, (1, 1, 1, 2), **options)).double()

    def test_resnet18(self) -> None:
        torch.manual_seed(0)
        fused = check(lively(self.timm.create_model("resnet18", num_classes=3)), 9)
        assert summarize(fused).left == ()

    @pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
    @pytest.mark.parametrize(
        ("options", "blocks"),
        [
            ({}, 6),
            ({"output_stride": 8}, 6),
            ({"stem_type": "deep"}, 6),
            ({"stem_type": "deep_tiered", "replace_stem_pool": True}, 7),
            ({"down_kernel_size": 3, "block_reduce_first": 2}, 6),
        ],
        ids=str,
    )
    def test_variants(self, kind: str, options: dict[str, Any], blocks: int) -> None:
        fused = check(self.make(kind, **options), blocks)
        assert summarize(fused).left == ()

    def test_cardinality(self) -> None:
        check(self.make(cardinality=4, base_width=32), 6)

    @pytest.mark.parametrize("recompute", ["none", "norm", "conv"])
    def test_average_pooling_in_the_shortcut(self, recompute: str) -> None:
        # Where it pools: a chain of two units, the projection, and the last norm with the addition.
        fused = check(self.make(avg_down=True), 1 + 1 + 3 * 3 + 1, recompute=recompute)
        assert self.in_pieces(fused, "downsample is not a convolution and a norm") == [
            "layer2.0",
            "layer3.0",
            "layer4.0",
        ]

    @pytest.mark.parametrize("attention", ["se", "eca", "ese"])
    def test_attention(self, attention: str) -> None:
        fused = check(self.make(block_args={"attn_layer": attention}), 1 + 5 + 4)  # the stem, blocks, projections
        assert len(self.in_pieces(fused, "se is ")) == 5

    def test_anti_aliasing(self) -> None:
        from timm.layers import BlurPool2d

        fused = check(self.make(aa_layer=BlurPool2d), 1 + 1 + 3 * 3 + 1)
        assert self.in_pieces(fused, "aa is BlurPool2d") == ["layer2.0", "layer3.0", "layer4.0"]

    @pytest.mark.parametrize(("kind", "units"), [("BasicBlock", 2), ("Bottleneck", 3)])
    def test_another_activation(self, kind: str, units: int) -> None:
        fused = check(self.make(kind, act_layer=nn.SiLU), 5 * units + 4)
        assert len(self.in_pieces(fused, "act1 is SiLU, not exactly ReLU")) == 5
        assert [row.name for row in summarize(fused).left] == [""]

    @pytest.mark.parametrize(
        ("options", "calls"),
        [({"drop_path_rate": 0.5}, 1 + 1 + 4 + 3), ({"drop_block_rate": 0.2}, 3 + 3 * 2 + 2)],
        ids=str,
    )
    def test_dropping(self, options: dict[str, Any], calls: int) -> None:
        stock = self.make(**options)
        stock.register_forward_pre_hook(lambda *_: torch.manual_seed(3) and None)
        fused = check(stock, calls)
        with counted() as seen:
            fused(images())
        assert len(seen) == 6  # nothing drops in evaluation

    def test_a_hook_in_a_block(self) -> None:
        stock = self.make()
        seen: list[int] = []
        stock.layer2[0].bn1.register_forward_hook(lambda *_: seen.append(1))
        # The second unit, the projection, and the third norm with the addition.
        fused = check(stock, 5 + 3)
        assert len(seen) == 4 and self.in_pieces(fused, "bn1 has a hook") == ["layer2.0"]

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_a_copy_with_frozen_layers(self, copied: Any) -> None:
        stock = self.make(avg_down=True, block_args={"attn_layer": "se"})
        for module in (
            stock.conv1,
            stock.layer1,
            stock.layer2[0].bn3,
            stock.layer3[0].downsample,
            stock.layer4[0].conv3,
        ):
            module.requires_grad_(False).eval()
        fused = copied(fuse(copy.deepcopy(stock)))
        with counted() as calls:
            assert_agree(fused, stock, images())
        assert len(calls) == 2 * (1 + 5 + 4) and len(self.in_pieces(fused, "se is SEModule")) == 5

    def test_compiled_in_pieces(self) -> None:
        stock = self.make("BasicBlock", avg_down=True, block_args={"attn_layer": "se"})
        fused = fuse(copy.deepcopy(stock))
        torch._dynamo.reset()
        fused.compile(fullgraph=True, backend="aot_eager")
        with counted() as calls:
            assert_agree(fused, stock, images().requires_grad_(), steps=1)
        assert len(calls) == 1 + 5 + 4

    @staticmethod
    def in_pieces(model: nn.Module, why: str) -> list[str]:
        return [row.name for row in summarize(model).fused if f"in pieces: {why}" in row.why]

    def test_gradient_checkpointing(self) -> None:
        stock = self.make()
        fused = fuse(copy.deepcopy(stock))
        fused.set_grad_checkpointing()
        with counted() as calls:
            assert_agree(fused, stock, images().requires_grad_(), steps=1)
        assert len(calls) >= 10  # blocks forward, and again in backward

    def test_features_only(self) -> None:
        torch.manual_seed(0)
        stock = lively(self.timm.create_model("resnet18", features_only=True)).double().eval()
        fused = fuse(copy.deepcopy(stock))
        with counted() as calls:
            for ours, theirs in zip(fused(images()), stock(images()), strict=True):
                assert_near(ours, theirs, "feature")
        assert len(calls) == 8
