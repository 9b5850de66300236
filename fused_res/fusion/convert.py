"""``fuse`` and ``unfuse``: in place, module by module; parameters, buffers and children stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from fused_res.backends import registry
from fused_res.fusion.adapter import Adapter, Fused, base_of, fused_class
from fused_res.fusion.adapters import adapter_for
from fused_res.fusion.runs import Settings
from fused_res.nn.chain import Refusal
from fused_res.nn.configured import Configured, check_model, check_settings

Model = TypeVar("Model", bound=nn.Module)

#: Their forward is fixed already, and does not call the modules inside as modules.
CLOSED = (torch.jit.ScriptModule, torch.fx.GraphModule)


def fuse(model: Model, backend: str = "auto", recompute: str = "none", tune: bool = False) -> Model:
    """Makes every block of `model` that is understood exactly run as one fused operation, in place.

    torchvision's and timm's ResNet families, convolution, batch norm and ReLU in a row in ``nn.Sequential``,
    and the modules of :mod:`fused_res.nn`. Nothing else about the model changes: parameters (an optimizer
    goes on with them), buffers, state_dict keys, hooks, ``isinstance``. Whatever is not exactly as expected,
    then or on a later call, runs as it was; one of timm's blocks then in pieces, fused around what is not.
    Fusing again changes the settings.

    Args:
        model: any module.
        backend: see :mod:`fused_res.backends`.
        recompute, tune: see :func:`fused_res.functional.residual_block`.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module.
        ValueError: `backend` or `recompute` is not a known name.
        BackendUnavailableError: a backend asked for by name cannot run here. Nothing has been changed then.
    """
    check_model(model)
    check_settings(backend, recompute)
    registry.check_devices(backend, {parameter.device for parameter in model.parameters()})
    for _, module, adapter, refusal in candidates(model):
        if isinstance(module, Configured):
            module.configure(backend, recompute, tune=tune)
        elif isinstance(module, Fused):
            module._fused_res = Settings(backend, recompute, tune)
        elif adapter is not None and (refusal is None or refusal.passing):
            module.__class__ = fused_class(adapter, type(module))
            module.__dict__["_fused_res"] = Settings(backend, recompute, tune)
    return model


def unfuse(model: Model) -> Model:
    """Undoes :func:`fuse`, in place: modules have their classes back, ours run their stock layers.

    Args:
        model: any module, fused or not.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module.
    """
    check_model(model)
    for module in model.modules():
        if isinstance(module, Configured):
            module.fused = False
        elif isinstance(module, Fused):
            base = base_of(type(module))
            if base is None:  # someone put another class in front of ours
                module._fused_res = None
            else:
                module.__class__ = base  # type: ignore[assignment]
                module.__dict__.pop("_fused_res", None)
    return model


Candidate = tuple[str, nn.Module, type[Adapter] | None, Refusal | None]


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Every module that no chain of another one runs: its name, adapter, and what keeps it from fusing."""
    check_model(model)
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module) -> Iterator[Candidate]:
        if module in seen:
            return
        seen.add(module)
        if isinstance(module, CLOSED):
            yield name, module, None, Refusal("a graph that was captured already")
            return
        adapter: Any = None  # mypy takes every attribute of a module for a tensor or a module
        refusal = None
        covered: tuple[str, ...] = ()
        if isinstance(module, Configured):
            refusal, covered = module.refusal(), module.covered()
        else:
            adapter = module._fused_res_adapter if isinstance(module, Fused) else adapter_for(type(module))
            if adapter is not None:
                refusal = adapter.refusal(module)
                if refusal is None or refusal.passing or isinstance(module, Fused):
                    covered = adapter.covered(module)
        yield name, module, adapter, refusal
        for child_name, child in module.named_children():
            if child_name not in covered:
                yield from visit(f"{name}.{child_name}" if name else child_name, child)

    return visit("", model)
