"""timm's ResNet family: blocks and stems.

What stands idle in a block (no attention, nothing dropped) is passed over. Around what does something, the block runs
in pieces.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from fused_res.fusion.adapter import BlockAdapter, Fused, Parts, Pieces, StemAdapter, shortcut_of
from fused_res.nn.chain import Unit, Unsupported, has_no_hooks


def _activity(child: Any) -> Unsupported | None:
    """A refusal if this child of a block does anything to its input."""
    if child is None:
        return None
    kind = type(child)
    if not has_no_hooks(child.__dict__):
        return Unsupported("has a hook, or a forward of its own", child, transient=True)
    if kind is nn.Identity:
        return None
    if kind.__module__ != "timm.layers.drop" or kind.__name__ not in ("DropPath", "DropBlock2d"):
        return Unsupported(f"is {kind.__name__}", child)
    if child.training and child.drop_prob:
        return Unsupported("drops at random while training", child, transient=True)
    return None


class _Block(BlockAdapter):
    """What the two blocks share: the names of their children, in the order of their forward."""

    home = "timm.models.resnet"
    units: ClassVar[tuple[tuple[str, str, str], ...]]
    order: ClassVar[tuple[str, ...]]  # all that is before the addition
    between: ClassVar[tuple[str, ...]] = ("drop_block", "aa", "se", "drop_path")  # idle in most blocks

    @classmethod
    def parts(cls, module: Any) -> Parts | Unsupported:
        for name in cls.between:
            refusal = _activity(getattr(module, name))
            if refusal is not None:
                return refusal
        get = module._modules.get
        return Parts(tuple([(get(conv), get(norm), get(act)) for conv, norm, act in cls.units]), shortcut_of(module))

    @classmethod
    def pieces(cls, module: Any) -> Pieces:
        names = tuple([n for n in cls.order if n not in cls.between or _activity(getattr(module, n))])
        branch = tuple([getattr(module, name) for name in names])
        return Pieces(names, branch, shortcut_of(module), getattr(module, cls.units[-1][2]))


class BasicBlock(_Block):
    name = "BasicBlock"
    reads = (("forward", "conv1 bn1 drop_block act1 aa conv2 bn2 se drop_path downsample act2"),)
    units = (("conv1", "bn1", "act1"), ("conv2", "bn2", "act2"))
    order = ("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2", "se", "drop_path")


class Bottleneck(_Block):
    name = "Bottleneck"
    reads = (("forward", "conv1 bn1 act1 conv2 bn2 drop_block act2 aa conv3 bn3 se drop_path downsample act3"),)
    units = (("conv1", "bn1", "act1"), ("conv2", "bn2", "act2"), ("conv3", "bn3", "act3"))
    order = (*("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3"), "se", "drop_path")


class FusedResNet(Fused):
    def forward_features(self: Any, x: Tensor) -> Tensor:
        # Checkpointing runs the stages in another way; the blocks inside are fused all the same.
        stem = None if self.grad_checkpointing else ResNet.run(x, self, self.maxpool)
        if stem is None:
            return super().forward_features(x)  # type: ignore[misc]
        return self.layer4(self.layer3(self.layer2(self.layer1(stem))))


class ResNet(StemAdapter):
    """Opens with one 7x7 convolution, or with three of 3x3 and all that is between them in ``conv1``."""

    home = "timm.models.resnet"
    name = "ResNet"
    reads = (
        ("forward", "forward_features forward_head"),
        (
            "forward_features",
            "conv1 bn1 act1 maxpool grad_checkpointing torch "
            "jit is_scripting checkpoint_seq layer1 layer2 layer3 layer4",
        ),
    )
    front = FusedResNet
    children = ("conv1", "bn1", "act1")

    @classmethod
    def units(cls, module: Any) -> tuple[Unit, ...] | Unsupported:
        get = module._modules.get
        conv1 = get("conv1")
        if type(conv1) is not nn.Sequential:
            return ((conv1, get("bn1"), get("act1")),)
        if not has_no_hooks(conv1.__dict__):
            return Unsupported("has a hook, or a forward of its own", conv1, transient=True)
        layers = (*conv1._modules.values(), get("bn1"), get("act1"))
        if len(layers) % 3:
            return Unsupported("is not convolutions, norms and activations in turn", conv1)
        return tuple([layers[i : i + 3] for i in range(0, len(layers), 3)])
