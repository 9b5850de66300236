"""The measured cases: activation shapes, blocks and models, each with the name that tables and charts show."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Mode = Literal["train", "eval"]


@dataclass(frozen=True)
class OpCase:
    """One distinct `batch_norm_act` of a network, and the number of its occurrences in the network."""

    name: str
    shape: tuple[int, int, int, int]
    residual: bool
    activation: Literal["relu", "identity"]
    count: int


def resnet50_op_cases(batch: int, size: int) -> list[OpCase]:
    """Return the 53 batch norms of ResNet-50 as 16 distinct cases.

    The stem's norm comes first, then for each stage: the norm before the first block's 3x3 convolution (still at the
    stage's input resolution), the other inner norms, the norms at the end of a block (with the residual addition and
    its ReLU), and the norm of the projection (without activation).
    """

    def case(name: str, channels: int, side: int, count: int, residual: bool = False, relu: bool = True) -> OpCase:
        label = f"{name} {channels}x{side}x{side}{' +add' if residual else ''}{' +relu' if relu else ''}"
        return OpCase(label, (batch, channels, side, side), residual, "relu" if relu else "identity", count)

    def halved(side: int) -> int:
        return (side + 1) // 2  # for every stride-2 convolution and pooling in a ResNet

    side = halved(size)
    cases = [case("stem", 64, side, 1)]
    side = halved(side)
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        width = 64 << (stage - 1)
        inner = 2 * blocks
        if stage > 1:
            cases.append(case(f"layer{stage}.0", width, side, 1))
            side = halved(side)
            inner -= 1
        cases += [
            case(f"layer{stage}", width, side, inner),
            case(f"layer{stage}", 4 * width, side, blocks, residual=True),
            case(f"layer{stage}.0.downsample", 4 * width, side, 1, relu=False),
        ]
    return cases


def quick_op_cases() -> list[OpCase]:
    return [
        OpCase("8x6x6 +relu", (2, 8, 6, 6), False, "relu", 1),
        OpCase("16x5x5 +add +relu", (2, 16, 5, 5), True, "relu", 1),
        OpCase("16x5x5", (2, 16, 5, 5), False, "identity", 1),
    ]


@dataclass(frozen=True)
class BlockCase:
    """A block of a model; its input shape follows from the input shape of the model."""

    model: str
    block: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.block} ({self.kind})"


BLOCK_CASES = (
    BlockCase("resnet18", "layer1.0", "basic"),
    BlockCase("resnet18", "layer2.0", "basic, projection"),
    BlockCase("resnet18", "layer4.1", "basic"),
    BlockCase("resnet50", "layer1.0", "bottleneck, projection"),
    BlockCase("resnet50", "layer1.1", "bottleneck"),
    BlockCase("resnet50", "layer2.0", "bottleneck, projection"),
    BlockCase("resnet50", "layer2.1", "bottleneck"),
    BlockCase("resnet50", "layer3.1", "bottleneck"),
    BlockCase("resnet50", "layer4.0", "bottleneck, projection"),
    BlockCase("resnet50", "layer4.1", "bottleneck"),
)
QUICK_BLOCK_CASES = (BLOCK_CASES[0], BLOCK_CASES[5])


def input_shapes(model: nn.Module, names: list[str], batch: int, size: int) -> dict[str, torch.Size]:
    """Return the input shape of each named submodule, from a forward pass on the meta device."""
    shapes: dict[str, torch.Size] = {}
    handles = []
    for name in names:

        def record(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            shapes[name] = args[0].shape

        handles.append(model.get_submodule(name).register_forward_pre_hook(record))
    with torch.device("meta"), torch.no_grad():
        torch.func.functional_call(
            model.eval(),
            {key: torch.empty_like(value, device="meta") for key, value in model.state_dict().items()},
            torch.empty(batch, 3, size, size),
        )
    for handle in handles:
        handle.remove()
    return shapes


@dataclass(frozen=True)
class ModelCase:
    model: str
    mode: Mode
    batch: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.mode} {self.batch}x{self.size}x{self.size}"


# Small tensors: the time is dominated by dispatch and launch overhead, not by arithmetic. With one image of 32x32,
# ResNet-18's last stage has one value per channel, which PyTorch's batch norm does not support in training. Two images
# are the smallest batch that it trains on.
SMALL_MODEL_CASES = (ModelCase("resnet18", "eval", 1, 32), ModelCase("resnet18", "train", 2, 32))
