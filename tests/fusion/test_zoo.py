"""Models of torchvision and timm as their packages ship them: fused and frozen, they equal stock in float64.

The share of the norms that run fused is counted from outside, by the calls of torch.nn.functional.batch_norm.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fused_res import freeze, fuse
from fused_res.testing import stub_torchvision_operators
from tests.support.model_comparison import assert_near, randomize_norms

stub_torchvision_operators()
timm = pytest.importorskip("timm")
models = pytest.importorskip("torchvision.models")

#: Norms over few values amplify rounding: some gradients of these models at 64 x 64 pixels differ by 1e-8.
GRADIENTS = 1e-6
TIMM_SMALL = ("resnet10t", "skresnet18", "dla46_c")
TORCHVISION_SMALL = ("shufflenet_v2_x0_5", "mnasnet0_5")
TIMM = (
    "resnet18", "ghostnet_050", "legacy_seresnet18",
    "resnet18d", "resnet26t", "resnext50_32x4d", "wide_resnet50_2", "resnetblur18", "resnetaa50",
    "resnetrs50", "resnet50_clip", "seresnet18", "seresnext26t_32x4d", "legacy_seresnext26_32x4d", "ecaresnet26t",
    "resnest14d", "skresnext50_32x4d", "res2net50_14w_8s", "res2next50", "dla34", "dla60_res2net", "hrnet_w18_small",
    "hrnet_w18_ssld", "ghostnet_100", "ghostnetv2_100", "selecsls42b", "selecsls60", "rexnet_100", "legacy_xception",
    "xception41",
)  # fmt: skip
TORCHVISION = (
    "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "googlenet",
    "inception_v3", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "efficientnet_v2_s", "regnet_x_400mf",
    "regnet_y_400mf", "shufflenet_v2_x1_0", "mnasnet1_0", "fcn_resnet50", "deeplabv3_resnet50",
    "quantized_resnet18",
    "quantized_resnet50", "quantized_googlenet", "quantized_mobilenet_v2", "quantized_mobilenet_v3_large",
    "quantized_shufflenet_v2_x0_5",
)  # fmt: skip
FULL = pytest.mark.full


def cases(small: tuple[str, ...], others: tuple[str, ...]) -> list[object]:
    return [*small, *(pytest.param(name, marks=FULL) for name in others)]


def torchvision_model(name: str) -> nn.Module:
    options = {"init_weights": False} if "googlenet" in name or "inception" in name else {}
    if name.startswith(("fcn", "deeplab")):
        options = {"weights_backbone": None}  # type: ignore[dict-item]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        model: nn.Module = models.get_model(name, weights=None, **options)
    return model


@contextlib.contextmanager
def stock_norms(model: nn.Module) -> Iterator[list[str]]:
    """Record the names of the norms that are exactly nn.BatchNorm2d and run through torch.nn.functional.batch_norm."""
    names = {id(m.weight): name for name, m in model.named_modules() if type(m) is nn.BatchNorm2d}
    original, seen = nn.functional.batch_norm, []

    def record(input: Tensor, mean: Tensor, var: Tensor, weight: Tensor, *args: object, **kwargs: object) -> Tensor:
        if id(weight) in names:
            seen.append(names[id(weight)])
        return original(input, mean, var, weight, *args, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(nn.functional, "batch_norm", record)
        yield seen


def train(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return outputs and gradients of one training step; dropout draws the same numbers in every call."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    outputs = [output for output in tree_leaves(model(x)) if isinstance(output, Tensor)]
    grads = [torch.linspace(-1, 2, output.numel(), dtype=x.dtype).view_as(output) for output in outputs]
    torch.autograd.backward(outputs, grads)
    return outputs, [x.grad, *(parameter.grad for parameter in model.parameters())]


def infer(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [output for output in tree_leaves(model(x)) if isinstance(output, Tensor)]


def check(model: nn.Module, size: int = 64) -> None:
    stock = randomize_norms(model).double().eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fused = fuse(copy.deepcopy(stock))
    expected = infer(stock, x)
    for ours in (fused, copy.deepcopy(fused), freeze(stock)):
        with stock_norms(ours) as left:
            actual = infer(ours, x)
        for mine, theirs in zip(actual, expected, strict=True):
            assert_near(mine, theirs, "output in evaluation", 1e-9)
        assert not left
    outputs, gradients = train(stock.train(), x)
    with stock_norms(fused) as left:
        fused_outputs, fused_gradients = train(fused.train(), x)
    assert not left
    for mine, theirs in zip(fused_outputs, outputs, strict=True):
        assert_near(mine, theirs, "output in training", 1e-9)
    names = ["input", *(name for name, _ in stock.named_parameters())]
    for name, gradient, other in zip(names, fused_gradients, gradients, strict=True):
        assert_near(gradient, other, f"gradient of {name}", GRADIENTS)
    for (name, tensor), other in zip(fused.state_dict().items(), stock.state_dict().values(), strict=True):
        assert_near(tensor, other, name, 1e-9)


@pytest.mark.parametrize("name", cases(TIMM_SMALL, TIMM))
def test_timm_model(name: str) -> None:
    torch.manual_seed(0)
    check(timm.create_model(name, pretrained=False))


@pytest.mark.parametrize("name", cases(TORCHVISION_SMALL, TORCHVISION))
def test_torchvision_model(name: str) -> None:
    torch.manual_seed(0)
    check(torchvision_model(name), 96 if "inception" in name else 64)


@FULL
@pytest.mark.parametrize("name", ["skresnet18", "hrnet_w18_small", "dla34"])
def test_compiles_to_one_graph(name: str) -> None:
    torch.manual_seed(0)
    model = fuse(timm.create_model(name, pretrained=False).double().eval())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_near(infer(compiled, x)[0], infer(model, x)[0], "output", 1e-9)
