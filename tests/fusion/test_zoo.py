"""Models of public packages as their packages ship them: fused and frozen, they equal stock in float64.

The share of the norms that run fused is counted from outside, by the calls of PyTorch's batch norm that remain.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.zoo import models as catalog
from benchmarks.zoo.compare import compare, excesses
from benchmarks.zoo.count import count_stock_norms
from benchmarks.zoo.models import PACKAGES, SMALL, ZOO, ZooModel
from fused_res import fuse
from fused_res.testing import stub_torchvision_operators

stub_torchvision_operators()

FULL = pytest.mark.full
#: Relatives of the catalog's models, in spellings of their own.
RELATIVES = (
    *map(
        catalog.timm,
        (
            "resnet18", "ghostnet_050", "legacy_seresnet18", "resnet18d", "resnet26t", "resnext50_32x4d",
            "wide_resnet50_2", "resnetblur18", "resnetaa50", "resnet50_clip", "seresnet18", "seresnext26t_32x4d",
            "legacy_seresnext26_32x4d", "ecaresnet26t", "skresnext50_32x4d", "res2net50_14w_8s", "res2next50",
            "dla60_res2net", "hrnet_w18_ssld", "ghostnetv2_100", "selecsls60",
        ),
    ),
    *map(
        catalog.torchvision,
        (
            "resnet34", "resnet101", "mobilenet_v3_small", "quantized_resnet50", "quantized_googlenet",
            "quantized_mobilenet_v3_large", "quantized_shufflenet_v2_x0_5",
        ),
    ),
)  # fmt: skip
#: Smallest share of the norms of the most used models that must run fused.
GOAL = 0.95


def cases(chosen: Sequence[ZooModel]) -> list[object]:
    return [pytest.param(model, id=model.title) for model in chosen]


def build(model: ZooModel) -> nn.Module:
    pytest.importorskip(model.package, reason=f"{model.package} is in requirements/peers.txt")
    torch.manual_seed(0)
    return model.build()


def check(model: ZooModel) -> None:
    """Check equality in float64, and that the share of fused norms is at least that of the catalog."""
    errors, norms, reasons = compare(build(model), model.compared_shape)
    assert not list(excesses(errors))
    for mode, (fused, total) in norms.items():
        assert total > 0
        assert fused >= model.fused * total, f"{mode}: {fused} of {total} norms run fused; {reasons}"


@pytest.mark.parametrize("model", cases(SMALL))
def test_small_model(model: ZooModel) -> None:
    check(model)


@FULL
@pytest.mark.parametrize("model", cases((*ZOO, *RELATIVES)))
def test_model(model: ZooModel) -> None:
    check(model)


class ZeroInitialization(TorchFunctionMode):
    """Fill with zeros what would be filled with random numbers: initialization takes most of a large model's time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0].zero_()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=FULL)], ids=["every fifth", "all"])
def test_most_used_models_run_fused(step: int) -> None:
    """Count the norms of all of them together; values do not matter to a count."""
    popular = [model for model in ZOO if model.popular]
    assert len(popular) >= 20
    chosen = popular[::step]
    counts = {model.title: count_fused(model) for model in chosen}
    for index, mode in enumerate(("training", "evaluation")):
        print("\n".join(f"{title}, {mode}: {one[index][0]} of {one[index][1]}" for title, one in counts.items()))
        fused, total = (sum(one[index][part] for one in counts.values()) for part in (0, 1))
        assert fused >= GOAL * total, f"{mode}: {fused} of {total} norms run fused, expected at least {GOAL:.0%}"


def count_fused(model: ZooModel) -> list[tuple[int, int]]:
    """Return the number of fused norms and of all norms, in training and in evaluation."""
    x = torch.zeros(2, *model.shape[1:])

    def count(module: nn.Module) -> list[int]:
        counts = []
        for training in (True, False):
            module.train(training)
            with torch.set_grad_enabled(training):
                counts.append(count_stock_norms(module, lambda: module(x)))
        return counts

    with ZeroInitialization():
        stock = build(model)
    totals = count(stock)
    return [(total - left, total) for total, left in zip(totals, count(fuse(stock)), strict=True)]


def test_count_of_norms_sees_every_spelling() -> None:
    """Layers, the function on a layer's tensors, and frozen norms: what fused models are counted by."""

    class FrozenBatchNorm2d(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x + 1

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.BatchNorm2d(2), nn.BatchNorm2d(2).eval(), FrozenBatchNorm2d()])

        def forward(self, x: Tensor) -> Tensor:
            for norm in self.norms:
                x = norm(x)
            norm = self.norms[0]
            return torch.batch_norm(
                F.batch_norm(x, norm.running_mean, norm.running_var), None, None, None, None, True, 0.1, 1e-5, False
            )

    model, x = Model(), torch.randn(2, 2, 4, 4)
    assert count_stock_norms(model, lambda: model(x)) == 5
    fused = fuse(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()))
    assert count_stock_norms(fused, lambda: fused(x)) == 0


def test_comparison_finds_a_wrong_gradient_and_a_wrong_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.zoo import compare as module

    def wrong(model: nn.Module) -> nn.Module:
        model[0].weight.register_hook(lambda grad: grad * (1 + 1e-5))
        model[1].momentum = 0.1 + 1e-7
        return model

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    errors = compare(copy.deepcopy(model), (2, 3, 8, 8)).errors
    assert not list(excesses(errors))
    monkeypatch.setattr(module, "fuse", wrong)
    errors, norms, _ = compare(model, (2, 3, 8, 8))
    assert [text.partition(":")[0] for text in excesses(errors)] == ["training gradients", "training buffers"]
    assert norms == {"evaluation": (0, 1), "frozen": (1, 1), "training": (0, 1)}


@FULL
@pytest.mark.parametrize("name", ["skresnet18", "hrnet_w18_small", "dla34"])
def test_compiles_to_one_graph(name: str) -> None:
    model = fuse(build(catalog.timm(name)).double().eval())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)


def test_catalog_names_each_model_once() -> None:
    titles = [model.title for model in ZOO]
    assert len(set(titles)) == len(titles) and {model.package for model in ZOO} == set(PACKAGES)
