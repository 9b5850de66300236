"""``freeze``: a copy of a model for inference, its batch norms folded into the convolutions before them."""

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
from fused_res.nn.chain import Refusal, Shortcut, Unit, untouched
from fused_res.nn.configured import check_model, check_settings
from fused_res.nn.frozen import Frozen, FrozenBlock, FrozenConv, FrozenStage, Programs
from fused_res.spec import UnitSpec, UnitTensors, by_unit

Model = TypeVar("Model", bound=nn.Module)


def freeze(model: Model, backend: str = "auto") -> Model:
    """A copy of `model` for inference: every block that :func:`fused_res.fuse` understands, without its batch norms.

    Each convolution holds the norm behind it in its weight and bias, and runs with the addition and the ReLU as one
    kernel (:func:`fused_res.functional.conv_bias_act`); on the CPU in float32 whole blocks and stages run as one
    call. Weights are packed for their kernel at the first call, once for all batches and sizes of images. The copy
    is in eval mode for good, no parameter of it requires a gradient, and it is an ordinary module besides: it can
    be copied, pickled, moved, compiled, and exported (as plain ATen, for ONNX). What is not understood exactly, or
    has a hook, is left as it is; ``print(summarize(frozen))`` says why. A block becomes one module. Elsewhere (and
    in a block with, say, attention in it) the convolution's place holds all three layers, and those of the norm and
    the activation an ``nn.Identity``: code that looks at what is between them would see something else.

    Args:
        model: any module, which stays as it is.
        backend: see :mod:`fused_res.backends`.

    Returns:
        The copy, of `model`'s class; of a block alone, a :class:`fused_res.nn.frozen.FrozenBlock`.

    Raises:
        TypeError: `model` is no module.
        ValueError: `backend` is not a known name.
        BackendUnavailableError: a backend asked for by name cannot run here.
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
            cast(FrozenStage, parent)._programs = Programs()
    base: Any = type(frozen)
    if not isinstance(frozen, (Frozen, *CLOSED)) and base.__reduce_ex__ is object.__reduce_ex__:
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
            if isinstance(made, Refusal):
                refusal = made
                pieces = None if adapter is None else cast(type[BlockAdapter], adapter).pieces(module)
                if pieces is not None and untouched(module.__dict__):
                    _freeze_runs(module, pieces.names, backend)
            else:
                replaced[module] = made
        if refusal is not None:
            module.__dict__["_fused_res_left"] = refusal
    return replaced


def _freeze_runs(module: nn.Module, children: tuple[str, ...], backend: str) -> Refusal | None:
    """In place, of children that run one after the other; `module` goes on calling them."""
    names = list(children)
    refusal = None
    for run in split(tuple([cast(nn.Module, module._modules[name]) for name in names])):
        places, names = names[: len(run.modules)], names[len(run.modules) :]
        if len(run.modules) == 2 and not run.units:
            refusal = Refusal("has no convolution before it", run.modules[0])
        for unit in run.units:
            made = _fold((unit,), "none", backend)
            if isinstance(made, Refusal):
                refusal = made
            else:
                module._modules[places[0]] = made[0]
                module._modules |= dict.fromkeys(places[1 : len(unit)], nn.Identity().eval())
            places = places[len(unit) :]
    return refusal


def _freeze_stem(module: Any, adapter: Any, backend: str) -> Refusal | None:
    if adapter is None:
        if not _has_own(module, ResidualNetwork, "forward", "_stem", "_stem_units"):
            return Refusal("has a forward of its own", module)
        units, names = module._stem_units(), ("conv1", "bn1", "relu")
        module.fused = False
    else:
        units, names = adapter.units(module), adapter.children
    pool = module.maxpool if module.maxpool is not None and chain.inspect_pool(module.maxpool) is None else None
    made = _fold(units, "none", backend, pool=pool)
    if isinstance(made, Refusal):
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


def _frozen_block(module: Any, adapter: Any, backend: str) -> FrozenBlock | FrozenConv | Refusal:
    if not untouched(module.__dict__):
        return Refusal("has a hook, or a forward of its own", module)
    kind = type(module).__name__
    if isinstance(module, ConvBNAct2d):
        if not _has_own(module, ConvBNAct2d, "forward", "_units"):
            return Refusal("has a forward of its own", module)
        made = _fold(module._units(), "none", backend, kind)
        return made if isinstance(made, Refusal) else made[0]
    if adapter is not None:
        parts = adapter.parts(module)
        if isinstance(parts, Refusal):
            return parts
    elif _has_own(module, ResidualBlock, "forward", "_parts"):
        parts = Parts(*module._parts())
    else:
        return Refusal("has a forward of its own", module)
    made = _fold(parts.units, parts.shortcut, backend)
    if isinstance(made, Refusal):
        return made
    count = len(parts.units)
    shortcut = made[count] if isinstance(parts.shortcut, nn.Module) else parts.shortcut
    return FrozenBlock(made[:count], shortcut, backend, kind)


def _has_own(module: nn.Module, kind: type[nn.Module], *methods: str) -> bool:
    """Whether these methods are as `kind` has them: a subclass may have written its own."""
    return all(getattr(type(module), method) is getattr(kind, method) for method in methods)


def _fold(
    units: Sequence[Unit], shortcut: Shortcut, backend: str, origin: str | None = None, pool: nn.Module | None = None
) -> list[FrozenConv] | Refusal:
    """One frozen convolution for each unit, the projection's last; the pooling goes with the chain's last one."""
    read = chain.read(units, shortcut, pool)
    if isinstance(read, Refusal):
        return read
    for norm, batch_statistics in zip(read.norms, read.training, strict=True):
        if batch_statistics:
            return Refusal("normalises with the statistics of the batch", norm)
    assert read.tensors[0] is not None
    refusal = chain.inspect_tensors(read.tensors, read.tensors[0].dtype, casts=False)
    if refusal is not None:
        return refusal
    frozen, units_tensors = [], by_unit(read.tensors)
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

    train = Frozen.train

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
