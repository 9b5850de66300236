"""``fuse`` and ``unfuse``: replacement of module classes in place; parameters, buffers and children are unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from fused_res.backends import registry
from fused_res.fusion.adapter import Adapter, Fused, base_of, fused_class
from fused_res.fusion.adapters import adapter_for
from fused_res.fusion.runs import Settings
from fused_res.nn.chain import Unsupported
from fused_res.nn.fusable_module import FusableModule, check_model, check_settings

Model = TypeVar("Model", bound=nn.Module)

#: Captured graphs: their forward is fixed and does not call submodules as modules.
CLOSED = (torch.jit.ScriptModule, torch.fx.GraphModule)


def fuse(model: Model, backend: str = "auto", recompute: str = "none", tune: bool = False) -> Model:
    """Fuse every supported block of `model` in place.

    Supported are the ResNet families of torchvision and timm, adjacent convolutions, batch norms and ReLUs in
    ``nn.Sequential``, and the modules of :mod:`fused_res.nn`. Parameters (an optimizer stays valid), buffers,
    ``state_dict`` keys, hooks and ``isinstance`` do not change. A block that does not match exactly, now or at a later
    call, runs its stock forward; timm's blocks are then partially fused. Calling it again changes the settings.

    Args:
        model: any module.
        backend: name of a backend, see :mod:`fused_res.backends`; default ``"auto"``.
        recompute, tune: see :func:`fused_res.functional.residual_block`; default ``"none"`` and False.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `backend` or `recompute` is not a known name.
        BackendUnavailableError: the named backend cannot run here; `model` is unchanged.
    """
    check_model(model)
    check_settings(backend, recompute)
    registry.check_devices(backend, {parameter.device for parameter in model.parameters()})
    for _, module, adapter, refusal in candidates(model):
        if isinstance(module, FusableModule):
            module.configure(backend, recompute, tune=tune)
        elif isinstance(module, Fused):
            module._fused_res = Settings(backend, recompute, tune)
        elif adapter is not None and (refusal is None or refusal.transient):
            module.__class__ = fused_class(adapter, type(module))
            module.__dict__["_fused_res"] = Settings(backend, recompute, tune)
    return model


def unfuse(model: Model) -> Model:
    """Revert :func:`fuse` in place.

    Fused modules get their classes back; modules of :mod:`fused_res.nn` run their stock layers.

    Args:
        model: any module, fused or not.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
    """
    check_model(model)
    for module in model.modules():
        if isinstance(module, FusableModule):
            module.fused = False
        elif isinstance(module, Fused):
            base = base_of(type(module))
            if base is None:  # another library has replaced the class again
                module._fused_res = None
            else:
                module.__class__ = base  # type: ignore[assignment]
                module.__dict__.pop("_fused_res", None)
    return model


Candidate = tuple[str, nn.Module, type[Adapter] | None, Unsupported | None]


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Yield every module that no other module's chain contains: name, module, adapter, reason why it is unsupported."""
    check_model(model)
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module) -> Iterator[Candidate]:
        if module in seen:
            return
        seen.add(module)
        if isinstance(module, CLOSED):
            yield name, module, None, Unsupported("a graph that was captured already")
            return
        adapter: Any = None  # mypy takes every attribute of a module for a tensor or a module
        refusal = None
        covered: tuple[str, ...] = ()
        if isinstance(module, FusableModule):
            refusal, covered = module.unsupported_reason(), module.fused_children()
        else:
            adapter = module._fused_res_adapter if isinstance(module, Fused) else adapter_for(type(module))
            if adapter is not None:
                refusal = adapter.unsupported_reason(module)
                if refusal is None or refusal.transient or isinstance(module, Fused):
                    covered = adapter.fused_children(module)
        yield name, module, adapter, refusal
        for child_name, child in module.named_children():
            if child_name not in covered:
                yield from visit(f"{name}.{child_name}" if name else child_name, child)

    return visit("", model)
