"""Reading live modules as a chain of convolution, batch norm and activation, on every call.

Children may be changed at any time: hooks, parametrisations, another norm class, frozen layers. So nothing
that was seen earlier is believed. Each call walks the modules and gives either a :class:`Chain`, which holds
their tensors, or a :class:`Refusal`, the one reason why the stock forward has to run. The walk is the whole
overhead of a fused module, which is why it reads module dictionaries instead of going through
``nn.Module.__getattr__``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import BatchNorm2d, Conv2d, Parameter

from fused_res import _torch_compat, distributed, functional
from fused_res.nn.geometry import UnitKey, block_spec
from fused_res.spec import BlockSpec, UnitTensors, by_unit

#: (convolution, norm) or (convolution, norm, activation); without the third the unit has no activation.
Unit = tuple[Any, ...]
#: "none", "identity", or the module that projects the input: an nn.Sequential of a convolution and a norm.
Shortcut = Literal["none", "identity"] | nn.Module

_HALF = (torch.bfloat16, torch.float16)
_AUTOCAST_FROM = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (*_AUTOCAST_FROM, torch.float64)
_FIRST_OF_NORM = UnitTensors._fields.index("norm_weight")


#: The norms that a chain may hold; fused_res.nn.SyncBatchNorm adds itself.
norms: set[type[nn.Module]] = {BatchNorm2d, nn.SyncBatchNorm}


class Refusal(NamedTuple):
    """Why the stock forward runs, and which module is to blame (None: the way of calling)."""

    why: str
    module: nn.Module | None = None
    passing: bool = False  # may be gone on a later call, without a change of architecture


def untouched(state: dict[str, Any]) -> bool:
    """Whether calling the module with this ``__dict__`` is calling its class's forward, and nothing else."""
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or "_compiled_call_impl" in state
    )


def inspect_plain(module: Any, kind: type[nn.Module]) -> Refusal | None:
    """A refusal unless `module` is exactly a `kind` (no subclass) that nothing was attached to."""
    if type(module) is not kind:
        return Refusal(f"is {type(module).__name__}, not exactly {kind.__name__}", module)
    state = module.__dict__
    if untouched(state):
        return None
    if "forward" in state or "_compiled_call_impl" in state:
        return Refusal("has a forward of its own, or is compiled on its own", module)
    return Refusal("has a hook", module, passing=True)


class Chain:
    """The units read so far, flat, as :func:`fused_res.functional.residual_block` takes them."""

    __slots__ = ("counters", "groups", "keys", "momentum", "norms", "spec", "tensors", "training")

    spec: BlockSpec

    def __init__(self) -> None:
        self.keys: list[UnitKey] = []
        self.tensors: list[Tensor | None] = []
        self.training: list[bool] = []
        self.momentum: list[float] = []
        self.norms: list[nn.Module] = []
        self.groups: list[ProcessGroup | None] = []  # of the norms that use the statistics of the batch
        self.counters: list[Tensor] = []

    def add(self, unit: Unit) -> Refusal | None:
        """Appends a unit, or says why it cannot and leaves the chain as it was."""
        conv, norm = unit[0], unit[1]
        kind = type(norm)
        if type(conv) is not Conv2d or kind not in norms:
            return inspect_plain(conv, Conv2d) or inspect_plain(norm, BatchNorm2d)
        conv_state, norm_state = conv.__dict__, norm.__dict__
        if not (untouched(conv_state) and untouched(norm_state)):
            return inspect_plain(conv, Conv2d) or inspect_plain(norm, kind)
        relu = False
        if len(unit) == 3:
            activation = unit[2]
            relu = type(activation) is not nn.Identity
            if (relu and type(activation) is not nn.ReLU) or not untouched(activation.__dict__):
                return inspect_plain(activation, nn.ReLU if relu else nn.Identity)
        if norm in self.norms:
            return Refusal("is used twice in one chain", norm)
        parameters = conv_state["_parameters"]
        weight = parameters.get("weight")
        if weight is None or "bias" not in parameters:
            return Refusal("does not hold its weight and bias as parameters", conv)
        read = read_norm(norm_state)
        if isinstance(read, str):
            return Refusal(read, norm)
        norm_weight, norm_bias, mean, var, training, momentum, counter = read
        # fmt: off
        self.keys.append((
            conv_state["stride"], conv_state["padding"], conv_state["dilation"], conv_state["groups"],
            conv_state["padding_mode"], weight.shape, norm_state["eps"], relu,
        ))
        # fmt: on
        self.tensors += (weight, parameters["bias"], norm_weight, norm_bias, mean, var)
        self.training.append(training)
        self.momentum.append(momentum)
        self.norms.append(norm)
        if training:
            self.groups.append(group_of(norm_state))
        if counter is not None:
            self.counters.append(counter)
        return None

    def run(self, input: Tensor, backend: str, recompute: str, tune: bool) -> Tensor:
        # A checkpoint runs the forward again inside the backward; the statistics were counted the first time.
        count = bool(self.counters) and not functional.recomputing()
        output = functional.residual_block(
            input,
            self.spec,
            self.tensors,
            training=tuple(self.training),
            momentum=tuple(self.momentum),
            recompute=recompute,
            process_group=self.groups[0] if self.groups else None,
            tune=tune,
            backend=backend,
        )
        if count:
            _torch_compat.add_in_place(self.counters, 1)
        return output


def group_of(state: dict[str, Any]) -> ProcessGroup | None:
    """The processes, this one and others, whose batches together give a norm its statistics; from its ``__dict__``."""
    if "process_group" not in state or not state["training"]:
        return None
    return distributed.others(state["process_group"])


#: What a norm contributes: weight, bias, running_mean, running_var; training; momentum; num_batches_tracked
#: if it counts.
NormState = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool, float, Tensor | None]


def read_norm(state: dict[str, Any]) -> NormState | str:
    """What ``nn.BatchNorm2d.forward`` would do, from the module's ``__dict__``, or why that is unclear."""
    parameters, buffers = state["_parameters"], state["_buffers"]
    if "weight" not in parameters or "bias" not in parameters or len(buffers) < 3:
        return "does not hold its tensors as parameters and buffers"
    weight, bias = parameters["weight"], parameters["bias"]
    mean, var, counter = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    if (mean is None) is not (var is None):
        return "has only one of running_mean and running_var"
    if not state["training"]:
        return weight, bias, mean, var, mean is None, 0.0, None
    if not state["track_running_stats"]:
        return weight, bias, None, None, True, 0.0, None
    momentum = state["momentum"]
    if momentum is None:
        # A cumulative average weighs the new batch by one over the number of batches, this one included.
        momentum = 0.0 if counter is None else 1.0 / (float(counter) + 1.0)
    elif not (isinstance(momentum, (int, float)) and math.isfinite(momentum)):
        return "has a momentum that is no finite number"
    return weight, bias, mean, var, True, momentum, counter


def inspect_pool(pool: nn.Module) -> Refusal | None:
    """A refusal unless this is a max pooling of the kind that a chain may end in."""
    refusal = inspect_plain(pool, nn.MaxPool2d)
    if refusal is not None:
        return refusal
    state = pool.__dict__
    if state["return_indices"] or state["ceil_mode"] or state["dilation"] not in (1, (1, 1)):
        return Refusal("returns indices, rounds sizes up or is dilated", pool)
    return None


#: The subclasses of nn.Sequential that `fuse` made; what they run is what nn.Sequential runs.
fused_sequentials: set[type[nn.Module]] = set()


def _add_projection(chain: Chain, projection: nn.Module) -> Refusal | None:
    kind = type(projection)
    refusal = inspect_plain(projection, kind if kind in fused_sequentials else nn.Sequential)
    if refusal is not None:
        return refusal
    modules = tuple(
        [m for m in projection._modules.values() if type(m) is not nn.Identity or not untouched(m.__dict__)]
    )
    if len(modules) != 2:
        return Refusal("is not a convolution and a norm", projection)
    return chain.add(modules)


def read(units: Sequence[Unit], shortcut: Shortcut = "none", pool: nn.Module | None = None) -> Chain | Refusal:
    """The modules as a chain, as far as that can be told without an input."""
    chain = Chain()
    for unit in units:
        refusal = chain.add(unit)
        if refusal is not None:
            return refusal
    form = "projection"
    if isinstance(shortcut, str):
        form = shortcut
    else:
        refusal = _add_projection(chain, shortcut)
        if refusal is not None:
            return refusal
    groups = chain.groups
    if groups and groups.count(groups[0]) != len(groups):
        return Refusal("some norms take their statistics from other processes than others do")
    refusal = None if pool is None else inspect_pool(pool)
    if refusal is not None:
        return refusal
    pool_key = None if pool is None else tuple([pool.__dict__[name] for name in ("kernel_size", "stride", "padding")])
    spec = block_spec(tuple(chain.keys), form, pool_key)
    if isinstance(spec, str):
        return Refusal(spec)
    chain.spec = spec
    return chain


def situation() -> Refusal | None:
    """What, apart from modules and input, asks for the stock forward."""
    if _torch_compat.has_global_module_hooks():
        return Refusal("a hook on all modules is registered")
    if torch.compiler.is_compiling():
        return Refusal("torch.export is at work") if torch.compiler.is_exporting() else None
    if _torch_compat.is_jit_tracing():
        return Refusal("torch.jit.trace is at work")
    if _torch_compat.is_transformed():
        return Refusal("a torch.func transform or forward-mode differentiation is at work")
    return None


def inspect_input(input: Tensor) -> Refusal | None:
    if type(input) is not Tensor and type(input) is not Parameter:
        return Refusal(f"the input is a {type(input).__name__}")
    if input.dim() != 4 or input.layout is not torch.strided:
        return Refusal("the input is not a strided tensor of rank 4")
    if input.dtype not in _DTYPES:
        return Refusal(f"the input has dtype {input.dtype}")
    return None


def working_dtype(input: Tensor, identity: bool) -> tuple[torch.dtype, bool] | Refusal:
    """The one dtype that stock would compute a chain in, and whether autocast casts to it."""
    dtype = functional.autocast_dtype(input)
    if dtype is None:
        return input.dtype, False
    if input.dtype is torch.float64:
        return Refusal("autocast leaves float64 as it is")
    if identity and input.dtype is not dtype:
        return Refusal("the shortcut adds another dtype than autocast's")
    return dtype, True


def inspect_tensors(tensors: Sequence[Tensor | None], dtype: torch.dtype, casts: bool) -> Refusal | None:
    """A refusal unless these, those of a unit after another, are plain tensors that `dtype` goes with."""
    for unit in by_unit(tensors):
        for index, tensor in enumerate(unit):
            if tensor is None:
                continue
            kind = type(tensor)
            if kind is not Parameter and kind is not Tensor:
                return Refusal(f"a parameter or buffer is a {kind.__name__}")
            own = tensor.dtype
            if own is dtype:
                continue
            # Autocast casts a convolution's operands; the batch norm of a 16-bit input takes float32 parameters.
            of_norm = index >= _FIRST_OF_NORM
            if (own is torch.float32 and dtype in _HALF) if of_norm else (casts and own in _AUTOCAST_FROM):
                continue
            return Refusal(f"a parameter or buffer is {own} where {dtype} is computed")
    return None


def run(
    input: Tensor,
    units: Sequence[Unit],
    shortcut: Shortcut = "none",
    pool: nn.Module | None = None,
    backend: str = "auto",
    recompute: str = "none",
    tune: bool = False,
) -> Tensor | None:
    """The fused result, or None if, this time, the stock forward has to run."""
    if situation() or inspect_input(input):
        return None
    working = working_dtype(input, shortcut == "identity")
    chain = read(units, shortcut, pool)
    if isinstance(working, Refusal) or isinstance(chain, Refusal) or inspect_tensors(chain.tensors, *working):
        return None
    return chain.run(input, backend, recompute, tune)


def run_norm(
    input: Tensor, norm: nn.Module, residual: Tensor | None, activation: str, backend: str = "auto"
) -> Tensor | None:
    """``activation(norm(input) [+ residual])`` likewise, for a norm that the caller has looked at."""
    if situation() or inspect_input(input):
        return None
    if residual is not None and (
        inspect_input(residual)
        or residual.dtype is not input.dtype
        or residual.shape != input.shape
        or residual.device != input.device
    ):
        return None
    read = read_norm(norm.__dict__)
    if isinstance(read, str) or inspect_tensors((None, None, *read[:4]), input.dtype, False):
        return None
    return apply_norm(input, norm, read, residual, activation, backend)


def apply_norm(
    input: Tensor, norm: nn.Module, read: NormState, residual: Tensor | None, activation: str, backend: str
) -> Tensor:
    """What ``norm`` holds, applied; its running statistics and its counter take the batch in."""
    weight, bias, mean, var, training, momentum, counter = read
    state = norm.__dict__
    count = counter is not None and not functional.recomputing()
    output = functional.batch_norm_act(
        input, mean, var, weight, bias, residual, training, momentum, state["eps"], activation,
        process_group=group_of(state), backend=backend,
    )  # fmt: skip
    if count:
        counter.add_(1)  # type: ignore[union-attr]
    return output


def refusal_of(units: Sequence[Unit], shortcut: Shortcut = "none", pool: nn.Module | None = None) -> Refusal | None:
    """Why :func:`run` would return None, as far as that can be told without an input."""
    chain = read(units, shortcut, pool)
    return chain if isinstance(chain, Refusal) else None


def run_stock(
    input: Tensor, units: Sequence[Unit], shortcut: Shortcut = "none", pool: nn.Module | None = None
) -> Tensor:
    """The same chain module by module."""
    output = input
    last = len(units) - 1
    for index, unit in enumerate(units):
        output = unit[1](unit[0](output))
        if index == last and shortcut != "none":
            added = input if shortcut == "identity" else shortcut(input)
            # Under autocast the two dtypes may differ; residual networks add in place, so the chain's is
            # kept.
            output = (output + added).to(output.dtype)
        if len(unit) == 3:
            output = unit[2](output)
    return output if pool is None else pool(output)
