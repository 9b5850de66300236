"""Packed programs are bitwise equal to the modules of fused_res.nn.frozen; to be deleted together with them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_res
from fused_res.nn.frozen import FrozenConv
from fused_res.nn.packed import Block, PackedProgram, Unit
from fused_res.testing import stub_torchvision_operators
from tests.support.cpu_backends import FAST_BACKENDS
from tests.support.model_comparison import randomize_norms

stub_torchvision_operators()
torchvision = pytest.importorskip("torchvision")


def read_stages(model: Any) -> dict[str, tuple[Block, ...]]:
    """Return the blocks of a torchvision ResNet by the name of the stage; the stem is ``conv1``."""

    def read(block: Any) -> Block:
        count = 3 if hasattr(block, "conv3") else 2
        units = [Unit(getattr(block, f"conv{i}"), getattr(block, f"bn{i}"), True) for i in range(1, count + 1)]
        shortcut = "identity" if block.downsample is None else Unit(*block.downsample, False)
        return Block(tuple(units), shortcut)

    stages = {f"layer{i}": tuple(read(block) for block in getattr(model, f"layer{i}")) for i in range(1, 5)}
    return {"conv1": (Block((Unit(model.conv1, model.bn1, True),), "none", model.maxpool),)} | stages


def network(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return randomize_norms(getattr(torchvision.models, name)()).to(dtype).eval()


def check(model: Any, x: Tensor, backend: str = "auto") -> None:
    """Compare every stage, and the network up to the last one as one program."""
    frozen, program = fused_res.freeze(model, backend), PackedProgram()
    stages = read_stages(model)
    with torch.no_grad():
        y = x
        for name, blocks in stages.items():
            expected = frozen.get_submodule(name)(y)
            actual = program.run(y, blocks, backend=backend)
            assert actual is not None and actual.dtype is expected.dtype and torch.equal(actual, expected), name
            y = expected
        whole = program.run(x, sum(stages.values(), ()), backend=backend)
        assert whole is not None and torch.equal(whole, y)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_float32(name: str, batch: int) -> None:
    model = network(name)
    for size in (64, 75):
        check(model, torch.randn(batch, 3, size, size + 5))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_backends_and_dtypes(dtype: torch.dtype, backend: str) -> None:
    check(network("resnet18", dtype), torch.randn(2, 3, 45, 64).to(dtype), backend)


@pytest.mark.parametrize("autocast", [False, True])
def test_settings(autocast: bool) -> None:
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with fused_res.backends.use("auto", winograd=False), context:
        check(network("resnet18"), torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("residual", [False, True])
def test_single_convolution(residual: bool) -> None:
    conv, norm = nn.Conv2d(9, 17, 3, padding=1), randomize_norms(nn.BatchNorm2d(17)).eval()
    frozen = fused_res.freeze(nn.Sequential(conv, norm, nn.ReLU()))[0]
    assert isinstance(frozen, FrozenConv)
    x, added = torch.randn(2, 9, 13, 14), torch.randn(2, 17, 13, 14) if residual else None
    with torch.no_grad():
        block = Block((Unit(conv, norm, True),), "tensor" if residual else "none")
        actual = PackedProgram().run(x, (block,), added)
        assert actual is not None and torch.equal(actual, frozen(x, added))
