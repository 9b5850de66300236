"""``freeze``: a copy of a model for inference, with batch norms folded into the preceding convolutions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fused_res.backends import registry
from fused_res.fusion.adapter import BlockAdapter, Parts, StemAdapter
from fused_res.fusion.convert import CLOSED, candidates, unfuse
from fused_res.fusion.runs import split
from fused_res.fusion.sequential import Sequential
from fused_res.models.network import ResidualNetwork
from fused_res.nn import ConvBNAct2d, ResidualBlock, chain
from fused_res.nn.chain import Shortcut, Unit, Unsupported, has_no_hooks
from fused_res.nn.frozen import FrozenBlock, FrozenConv, FrozenModule, FrozenStage, InferenceGraphCache
from fused_res.nn.fusable_module import check_model, check_settings
from fused_res.spec import UnitSpec, UnitTensors, group_by_unit

Model = TypeVar("Model", bound=nn.Module)


def freeze(model: Model, backend: str = "auto") -> Model:
    """Return a copy of `model` for inference, with batch norms folded into the convolutions of supported blocks.

    Each convolution contains the following norm in its weight and bias and runs with the addition and the ReLU as one
    kernel (:func:`fused_res.functional.conv_bias_act`). On the CPU in float32, whole blocks and stages run as one call.
    Weights are packed for their kernel at the first call, once for all batch and image sizes. The copy is an ordinary
    module that stays in eval mode and requires no gradients: it can be copied, pickled, moved, compiled, and exported
    (as plain ATen, for ONNX). Modules that do not match exactly, or have hooks, are unchanged;
    ``print(summarize(frozen))`` gives the reasons. A block becomes one module. Outside of blocks (and in blocks with
    attention, for example) the convolution is replaced by one module for all three layers, the norm and the activation
    by ``nn.Identity``: code that reads their outputs sees the fused result.

    Args:
        model: any module; it is not modified.
        backend: name of a backend, see :mod:`fused_res.backends`; default ``"auto"``.

    Returns:
        The copy, of `model`'s class; for a single block, a :class:`fused_res.nn.frozen.FrozenBlock`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `backend` is not a known name.
        BackendUnavailableError: the named backend cannot run here.
    """
    check_model(model)
    check_settings(backend, "none")
    registry.check_devices(backend, {parameter.device for parameter in model.parameters()})
    with torch.inference_mode(False), torch.no_grad():
        frozen = unfuse(copy.deepcopy(model)).eval().requires_grad_(False)
        replaced = _freeze_parts(frozen, backend)
    if frozen in replaced:
        return cast(Model, replaced[frozen])
    for parent in list(frozen.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
        children = list(parent._modules.values())
        if type(parent) is nn.Sequential and len(children) > 1 and all(type(c) is FrozenBlock for c in children):
            parent.__class__ = FrozenStage
            cast(FrozenStage, parent)._graph_cache = InferenceGraphCache()
    base: Any = type(frozen)
    if not isinstance(frozen, (FrozenModule, *CLOSED)) and base.__reduce_ex__ is object.__reduce_ex__:
        frozen.__class__ = _frozen_class(base)
    return frozen


def _freeze_parts(model: nn.Module, backend: str) -> dict[nn.Module, nn.Module]:
    """Freezes stems and what is in an nn.Sequential; returns what is to stand in the place of whole modules."""
    replaced: dict[nn.Module, nn.Module] = {}
    for _, module, adapter, refusal in list(candidates(model)):
        if refusal is not None:
            continue
        if adapter is Sequential:
            refusal = _freeze_runs(module, tuple(module._modules), backend)
        elif isinstance(module, ResidualNetwork) or (adapter is not None and issubclass(adapter, StemAdapter)):
            refusal = _freeze_stem(module, adapter, backend)
        elif isinstance(module, ConvBNAct2d | ResidualBlock) or (
            adapter is not None and issubclass(adapter, BlockAdapter)
        ):
            made = _frozen_block(module, adapter, backend)
            if isinstance(made, Unsupported):
                refusal = made
                pieces = None if adapter is None else cast(type[BlockAdapter], adapter).pieces(module)
                if pieces is not None and has_no_hooks(module.__dict__):
                    _freeze_runs(module, pieces.names, backend)
            else:
                replaced[module] = made
        if refusal is not None:
            module.__dict__["_fused_res_left"] = refusal
    return replaced


def _freeze_runs(module: nn.Module, children: tuple[str, ...], backend: str) -> Unsupported | None:
    """In place, of children that run one after the other; `module` goes on calling them."""
    names = list(children)
    refusal = None
    for run in split(tuple([cast(nn.Module, module._modules[name]) for name in names])):
        places, names = names[: len(run.modules)], names[len(run.modules) :]
        if len(run.modules) == 2 and not run.units:
            refusal = Unsupported("has no convolution before it", run.modules[0])
        for unit in run.units:
            made = _fold((unit,), "none", backend)
            if isinstance(made, Unsupported):
                refusal = made
            else:
                module._modules[places[0]] = made[0]
                module._modules |= dict.fromkeys(places[1 : len(unit)], nn.Identity().eval())
            places = places[len(unit) :]
    return refusal


def _freeze_stem(module: Any, adapter: Any, backend: str) -> Unsupported | None:
    if adapter is None:
        if not _has_own(module, ResidualNetwork, "forward", "_stem", "_stem_units"):
            return Unsupported("has a forward of its own", module)
        units, names = module._stem_units(), ("conv1", "bn1", "relu")
        module.fused = False
    else:
        units, names = adapter.units(module), adapter.children
    pool = module.maxpool if module.maxpool is not None and chain.inspect_pool(module.maxpool) is None else None
    made = _fold(units, "none", backend, pool=pool)
    if isinstance(made, Unsupported):
        return made
    if pool is not None:
        module.maxpool = nn.Identity().eval()
    by_layer: dict[nn.Module, nn.Module] = {}
    for unit, frozen in zip(units, made, strict=True):
        by_layer |= {unit[0]: frozen} | dict.fromkeys(unit[1:], nn.Identity().eval())
    for name in names:
        child = module._modules[name]
        if child in by_layer:
            module._modules[name] = by_layer[child]
        else:  # the nn.Sequential of a deep stem
            child._modules |= {inner: by_layer[layer] for inner, layer in child._modules.items()}
    return None


def _frozen_block(module: Any, adapter: Any, backend: str) -> FrozenBlock | FrozenConv | Unsupported:
    if not has_no_hooks(module.__dict__):
        return Unsupported("has a hook, or a forward of its own", module)
    kind = type(module).__name__
    if isinstance(module, ConvBNAct2d):
        if not _has_own(module, ConvBNAct2d, "forward", "_units"):
            return Unsupported("has a forward of its own", module)
        made = _fold(module._units(), "none", backend, kind)
        return made if isinstance(made, Unsupported) else made[0]
    if adapter is not None:
        parts = adapter.parts(module)
        if isinstance(parts, Unsupported):
            return parts
    elif _has_own(module, ResidualBlock, "forward", "_units_and_shortcut"):
        parts = Parts(*module._units_and_shortcut())
    else:
        return Unsupported("has a forward of its own", module)
    made = _fold(parts.units, parts.shortcut, backend)
    if isinstance(made, Unsupported):
        return made
    count = len(parts.units)
    shortcut = made[count] if isinstance(parts.shortcut, nn.Module) else parts.shortcut
    return FrozenBlock(made[:count], shortcut, backend, kind)


def _has_own(module: nn.Module, kind: type[nn.Module], *methods: str) -> bool:
    """Whether these methods are as `kind` has them: a subclass may have written its own."""
    return all(getattr(type(module), method) is getattr(kind, method) for method in methods)


def _fold(
    units: Sequence[Unit], shortcut: Shortcut, backend: str, origin: str | None = None, pool: nn.Module | None = None
) -> list[FrozenConv] | Unsupported:
    """One frozen convolution for each unit, the projection's last; the pooling goes with the chain's last one."""
    read = chain.match_chain(units, shortcut, pool)
    if isinstance(read, Unsupported):
        return read
    for norm, batch_statistics in zip(read.norms, read.training, strict=True):
        if batch_statistics:
            return Unsupported("normalizes with the statistics of the batch", norm)
    assert read.tensors[0] is not None
    refusal = chain.inspect_tensors(read.tensors, read.tensors[0].dtype, autocast=False)
    if refusal is not None:
        return refusal
    frozen, units_tensors = [], group_by_unit(read.tensors)
    for index, spec in enumerate(read.spec.convolutions):
        weight, bias = _folded(units_tensors[index], spec)
        layers = "Conv2d + BatchNorm2d" + " + ReLU" * spec.relu
        behind = read.spec.pool if index == len(units) - 1 else None
        frozen.append(
            FrozenConv(weight, bias, spec, backend, origin or layers + " + MaxPool2d" * (behind is not None), behind)
        )
    return frozen


def _folded(tensors: UnitTensors, spec: UnitSpec) -> tuple[Tensor, Tensor]:
    """The convolution's weight and bias with the norm folded in, computed in float64."""
    weight, *rest = tensors
    bias, norm_weight, norm_bias, mean, var = (None if tensor is None else tensor.double() for tensor in rest)
    assert mean is not None and var is not None
    folded, shift = fuse_conv_bn_weights(weight.double(), bias, mean, var, spec.eps, norm_weight, norm_bias)
    return folded.detach().to(weight.dtype, memory_format=torch.channels_last), shift.detach().to(weight.dtype)


class _FrozenModel:
    """Stands in front of the class of a model that was frozen: it refuses to train before any part of it is changed."""

    train = FrozenModule.train

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes made at run time cannot be pickled by name; this one is made again from its base.
        reduced = super().__reduce_ex__(protocol)
        base: Any = type(self).__bases__[-1]
        return (_empty, (base,), *reduced[2:]) if _frozen_class(base) is type(self) else reduced


@cache
def _frozen_class(base: Any) -> Any:
    return type(
        f"Frozen{base.__name__}", (_FrozenModel, base), {"__module__": base.__module__, "__doc__": base.__doc__}
    )


def _empty(base: Any) -> Any:
    cls = _frozen_class(base)
    return cls.__new__(cls)
