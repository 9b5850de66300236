"""What `summarize` says: the chains of a module in words, and what would make a module fuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_res


class Block(nn.Module):
    """Three units with an addition of another tensor; `gate` is a foreign operator before the addition."""

    def __init__(self, gate: bool = False, last_relu: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(4) for _ in range(3))
        self.gate, self.last_relu = gate, last_relu

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y = (torch.sigmoid(y) if self.gate else y) + residual
        return F.relu(y) if self.last_relu else y


class NormedConv(nn.Conv2d):
    """A convolution that contains its norm, as detectron2's."""

    def __init__(self) -> None:
        super().__init__(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(super().forward(x)))


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (Block(), "conv-norm-ReLU x2, conv-norm + addition + ReLU"),
        (Block(last_relu=False), "conv-norm-ReLU x2, conv-norm + addition"),
        (Block(gate=True), "conv-norm-ReLU x2, conv-norm"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)), "conv-norm-ReLU + max pool"),
        (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), "norm-ReLU"),
        (nn.Sequential(NormedConv()), "conv-norm-ReLU"),
    ],
)
def test_chains_in_words(block: nn.Module, expected: str) -> None:
    (row,) = fused_res.summarize(fused_res.fuse(block)).rows
    assert row.why.partition(":")[0] == expected


def test_advice_to_move_a_hook() -> None:
    block = Block()
    block.bn2.register_forward_hook(lambda *_: None)
    (row,) = fused_res.summarize(fused_res.fuse(block)).rows
    assert row.why == ("runs its stock forward: bn2 has a hook, or a forward of its own: move the hook to the block")
    block.bn2._forward_hooks.clear()
    assert fused_res.summarize(block).rows[0].fused


def test_frozen_model_has_one_row_for_each_packed_program() -> None:
    model = nn.Sequential(*(fused_res.models.cifar_resnet(8).layer1 for _ in range(2))).eval()
    frozen = fused_res.freeze(model)
    frozen(torch.randn(1, 16, 8, 8))
    (row,) = fused_res.summarize(frozen).rows
    assert (
        row.name == "" and row.fused and row.why.startswith("packed 2 x residual block of 2 units, identity shortcut")
    )
    assert "selected for the first input" not in row.why
    frozen[0][0].bn1.register_forward_hook(lambda *_: None)
    summary = fused_res.summarize(frozen)
    assert [row.name for row in summary.fused] == ["1"] and [row.name for row in summary.left] == ["", "0", "0.0"]
    assert (summary.norms_fused, summary.norms) == (2, 4)
