"""Networks by name, from this library, torchvision and timm, and what training does to them from outside."""

from __future__ import annotations

import functools
import re
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_res
from fused_res import models
from fused_res.testing import stub_torchvision_operators

OURS = tuple(name for name in models.__all__ if name[0].islower() and name != "cifar_resnet")
#: As torchvision's, timm's and our own residual blocks are called.
BLOCKS = ("BasicBlock", "Bottleneck")


class NetworkError(ValueError):
    """There is no network of this name, or it is not made this way."""


def build(name: str, classes: int, width: int | None = None, plain: bool = False) -> nn.Module:
    """A network with random weights, from PyTorch's global generator.

    Args: name: ``cifar_resnet<depth>``, one of ``OURS``, ``torchvision/<name>`` or ``timm/<name>``. classes: outputs.
    width: channels of the first stage, of a ``cifar_resnet``. plain: without shortcuts; ours only.

    Raises: NetworkError: `name` (``--model``), or what goes with it, is not known.
    """
    library, _, rest = name.rpartition("/")
    cifar = re.fullmatch(r"cifar_resnet(\d+)", name)
    if width is not None and not cifar:
        raise NetworkError(f"--width: only a cifar_resnet has one to choose, not {name}")
    if plain and library:
        raise NetworkError(f"--plain: only our own networks have a plain twin, not {name}")
    try:
        if cifar:
            return models.cifar_resnet(int(cifar[1]), classes, plain, width or 16)
        if name in OURS:
            return getattr(models, name)(num_classes=classes, plain=plain)
        if library == "torchvision":
            return _torchvision(rest, classes)
        if library == "timm":
            return _timm(rest, classes)
    except (ValueError, RuntimeError, ImportError) as error:
        raise NetworkError(f"--model {name}: {error}") from error
    raise NetworkError(
        f"--model {name}: choose cifar_resnet<depth> (20, 32, 44, 56, 110), {', '.join(OURS)}, torchvision/<name> or"
        " timm/<name>"
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
    # Classes are swapped for subclasses, by fused_res.fuse among others, so the name may be that of a base.
    return [m for m in model.modules() if any(kind.__name__ in BLOCKS for kind in type(m).__mro__)]


def checkpoint_blocks(model: nn.Module) -> None:
    """Keeps only the inputs of residual blocks for the backward, which runs each block's forward again; in place.

    Raises: NetworkError: there is no residual block.
    """
    blocks = residual_blocks(model)
    if not blocks:
        raise NetworkError(f"--checkpoint-blocks: {type(model).__name__} has no residual block")
    for block in blocks:
        # On the instance: a wrapping module would change the state_dict's keys.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def set_fusion(model: nn.Module, fuse: bool, backend: str, recompute: str) -> None:
    """Raises NetworkError: `backend` (``--backend``) cannot run here."""
    try:
        if fuse:
            fused_res.fuse(model, backend, recompute)
        else:
            fused_res.unfuse(model)
    except (ValueError, fused_res.BackendUnavailableError) as error:
        raise NetworkError(f"--backend {backend}: {error}") from error


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of convolutions and linear layers, which decay; norms' weights and all biases, which do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
