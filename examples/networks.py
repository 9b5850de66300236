"""Build networks of fused_res, torchvision and timm by name, and configure them for training."""

from __future__ import annotations

import functools
import re
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_res
from fused_res import models
from fused_res.testing import stub_torchvision_operators

MODEL_NAMES = tuple(name for name in models.__all__ if name[0].islower() and name != "cifar_resnet")
#: Class names of the residual blocks of torchvision, timm and fused_res.
BLOCK_CLASS_NAMES = ("BasicBlock", "Bottleneck")


class NetworkError(ValueError):
    """The network's name is unknown, or an option does not apply to it."""


def build(name: str, classes: int, width: int | None = None, plain: bool = False) -> nn.Module:
    """Build a network with random weights from PyTorch's global generator.

    Args:
        name: ``cifar_resnet<depth>``, one of ``MODEL_NAMES``, ``torchvision/<name>`` or ``timm/<name>``.
        classes: number of outputs.
        width: number of channels of the first stage, of a ``cifar_resnet`` only; default 16.
        plain: whether to leave out the shortcuts; fused_res networks only.

    Raises:
        NetworkError: `name` (``--model``) is unknown, or an option does not apply to it.
    """
    library, _, rest = name.rpartition("/")
    cifar = re.fullmatch(r"cifar_resnet(\d+)", name)
    if width is not None and not cifar:
        raise NetworkError(f"--width: expected a cifar_resnet, which has a configurable width, got {name}")
    if plain and library:
        raise NetworkError(f"--plain: expected a network of fused_res, which has a plain counterpart, got {name}")
    try:
        if cifar:
            return models.cifar_resnet(int(cifar[1]), classes, plain, width or 16)
        if name in MODEL_NAMES:
            return getattr(models, name)(num_classes=classes, plain=plain)
        if library == "torchvision":
            return _torchvision(rest, classes)
        if library == "timm":
            return _timm(rest, classes)
    except (ValueError, RuntimeError, ImportError) as error:
        raise NetworkError(f"--model {name}: {error}") from error
    raise NetworkError(
        f"--model {name}: expected cifar_resnet<depth> (20, 32, 44, 56, 110), {', '.join(MODEL_NAMES)},"
        " torchvision/<name> or timm/<name>"
    )


def _torchvision(name: str, classes: int) -> nn.Module:
    stub_torchvision_operators()
    from torchvision.models import get_model

    return get_model(name, weights=None, num_classes=classes)


def _timm(name: str, classes: int) -> nn.Module:
    stub_torchvision_operators()  # timm imports torchvision
    import timm

    return timm.create_model(name, pretrained=False, num_classes=classes)


def residual_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the residual blocks of `model`, recognized by the names of their classes."""
    # fused_res.fuse and others replace a module's class by a subclass, so the names of base classes count too.
    return [m for m in model.modules() if any(kind.__name__ in BLOCK_CLASS_NAMES for kind in type(m).__mro__)]


def checkpoint_blocks(model: nn.Module) -> None:
    """Apply activation checkpointing to every residual block of `model` in place.

    Only the inputs of the blocks are saved for backward, which recomputes each block's forward pass. Fuse the model
    before: ``fused_res.fuse`` leaves a block that has a forward of its own.

    Raises:
        NetworkError: the model has no residual block.
    """
    blocks = residual_blocks(model)
    if not blocks:
        raise NetworkError(f"--checkpoint-blocks: {type(model).__name__} has no residual block")
    for block in blocks:
        # On the instance: a wrapping module would change the state_dict's keys.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def set_fusion(model: nn.Module, fuse: bool, backend: str, recompute: str) -> None:
    """Fuse or unfuse `model` in place.

    Raises:
        NetworkError: `backend` (``--backend``) is not available here.
    """
    try:
        if fuse:
            fused_res.fuse(model, backend, recompute)
        else:
            fused_res.unfuse(model)
    except (ValueError, fused_res.BackendUnavailableError) as error:
        raise NetworkError(f"--backend {backend}: {error}") from error


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: weights of convolutions and linear layers with weight decay, the rest without."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
