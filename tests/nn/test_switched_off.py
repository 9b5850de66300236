"""FUSED_RES=0: fused, frozen and fused_res.nn modules compute with stock PyTorch operators."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fused_res
from fused_res import functional, models
from fused_res import nn as fnn
from fused_res.__main__ import info
from fused_res.nn import chain
from tests.support.model_comparison import assert_near, randomize_norms, record_fused_calls


def conv_norm(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "fused": lambda: fused_res.fuse(nn.Sequential(*conv_norm(8, 8), nn.ReLU())),
    "ConvBNAct2d": lambda: fnn.ConvBNAct2d(8, 8),
    "ResidualBlock": lambda: fnn.ResidualBlock([conv_norm(8, 8), conv_norm(8, 8)]),
    "BatchNormAct2d": lambda: fnn.BatchNormAct2d(8),
}


@pytest.fixture
def switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "enabled", False)


def image(channels: int = 8) -> Tensor:
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODULES)
def test_modules_run_stock(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = randomize_norms(MODULES[name]())
    stock = fused_res.unfuse(copy.deepcopy(module))
    with record_fused_calls() as calls:
        monkeypatch.setattr(chain, "enabled", False)
        for training in (True, False):
            x, y = image().requires_grad_(), image().requires_grad_()
            outputs = module.train(training)(x), stock.train(training)(y)
            assert torch.equal(*outputs)
            for output in outputs:
                output.square().sum().backward()
            assert torch.equal(x.grad, y.grad)
        assert not calls
        monkeypatch.setattr(chain, "enabled", True)
        module(image())
        assert calls, "the module never runs fused"


@pytest.mark.usefixtures("switched_off")
def test_network_and_compiled_network_run_stock() -> None:
    torch.manual_seed(0)
    model = randomize_norms(models.cifar_resnet(8)).eval()
    stock = fused_res.unfuse(copy.deepcopy(model))
    x = image(3)
    with record_fused_calls() as calls, torch.no_grad():
        assert torch.equal(model(x), stock(x))
        assert_near(torch.compile(model, backend="aot_eager", fullgraph=True)(x), stock(x), "compiled")
    assert not calls


def frozen_model() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    stock = randomize_norms(nn.Sequential(*conv_norm(3, 8), nn.ReLU(), *conv_norm(8, 8), nn.ReLU())).eval()
    return fused_res.freeze(stock), stock


def test_frozen_model_runs_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folding the norms into the weights changes the last bits, stock PyTorch operators do not."""
    frozen, stock = frozen_model()
    x = image(3)
    with torch.no_grad():
        assert not torch.equal(frozen(x), stock(x)), "the frozen model never runs fused"
        monkeypatch.setattr(chain, "enabled", False)
        assert torch.equal(frozen(x), stock(x))


@pytest.mark.usefixtures("switched_off")
def test_functions_that_are_called_directly_run_fused() -> None:
    x, mean, var = image(), torch.zeros(8), torch.ones(8)
    y = functional.batch_norm_act(x.requires_grad_(), mean, var)
    assert type(y.grad_fn).__name__.startswith("BatchNormAct")


@pytest.mark.usefixtures("switched_off")
def test_summary_and_info_say_so() -> None:
    summary = fused_res.summarize(MODULES["fused"]())
    assert not summary.fused and "FUSED_RES=0 is set" in str(summary)
    assert "FUSED_RES=0 is set: fused, frozen and fused_res.nn modules run stock PyTorch operators" in info()
    report = fused_res.check(MODULES["fused"](), image(), seconds=0)
    assert report.ok and report.norms == 1 and report.norms_fused == 0 and "FUSED_RES=0" in str(report)


IN_A_PROCESS = """
import torch
from torch import nn
import fused_res
from fused_res.nn import chain

model = fused_res.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
print(chain.enabled, model(torch.randn(2, 3, 8, 8)).grad_fn.name())
"""


@pytest.mark.parametrize(("value", "printed"), [("0", "False ReluBackward0"), ("1", "True ")])
def test_variable_is_read_at_import(value: str, printed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS], capture_output=True, text=True, env=os.environ | {"FUSED_RES": value}
    )
    assert done.stdout.startswith(printed) and ("ReluBackward0" in done.stdout) is (value == "0"), done.stderr
