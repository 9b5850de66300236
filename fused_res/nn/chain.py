"""Units of convolution, batch norm and activation as a :class:`Chain` of their present tensors and settings.

Tensors, settings and training modes of the modules may change at any time, so nothing is cached between calls. Each
call reads the modules and returns either a :class:`Chain` or an :class:`Unsupported`, the reason why the stock forward
has to run. The *stock* modules are the unmodified PyTorch modules; the stock forward calls the modules one by one,
unfused. This is most of the overhead of a fused module, which is why it reads module dictionaries instead of going
through ``nn.Module.__getattr__``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Conv1d, Conv2d, Conv3d, Parameter

from fused_res import _extension, _torch_compat, distributed, env, functional
from fused_res.backends import registry
from fused_res.block.plan import Plan
from fused_res.nn.cached_call import CachedCall, Calls, read_modules
from fused_res.nn.spec_builder import UnitKey, build_block_spec
from fused_res.ops.memory_format import has_channels_last_strides, has_same_layout, is_permuted, to_stock_layout
from fused_res.spec import BlockSpec, UnitTensors


class Unit(NamedTuple):
    """The modules of one conv-BN-act unit.

    Args:
        conv: a convolution with the attributes of ``nn.Conv2d``; None if the norm's input is any tensor.
        norm: a batch norm.
        activation: name of the activation after the norm, see :data:`fused_res.ops.checks.ACTIVATIONS`; in the last
            unit of a residual block, after the addition.
        negative_slope: slope of a leaky ReLU for negative values.
    """

    conv: Any
    norm: Any
    activation: str
    negative_slope: float = 0.01


#: "none", "identity", or the projection.
Shortcut = Literal["none", "identity"] | Unit

_HALF = (torch.bfloat16, torch.float16)
_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (*_AUTOCAST_DTYPES, torch.float64)
_UNIT_FIELDS, _FIRST_NORM_FIELD = len(UnitTensors._fields), UnitTensors._fields.index("norm_weight")


#: Norm classes supported in a chain. fused_res.nn.sync_batch_norm adds its own.
norm_types: set[type[nn.Module]] = {BatchNorm1d, BatchNorm2d, BatchNorm3d, nn.SyncBatchNorm}
#: Ranks of the inputs that the forward of each class accepts; it raises an exception for others. The fused operators
#: support 2 to 5.
_NORM_RANKS: tuple[tuple[type, tuple[int, ...]], ...] = (
    *((BatchNorm2d, (4,)), (BatchNorm1d, (2, 3)), (BatchNorm3d, (5,))),
    (_torch_compat.BatchNorm, (2, 3, 4, 5)),  # synchronized batch norms
)


class Unsupported(NamedTuple):
    """The reason why the stock forward runs.

    Functions of this module that return ``Unsupported | None`` return None if the fused forward supports their
    arguments.

    Args:
        reason: a predicate whose subject is ``module``, such as "has a hook"; a full clause if ``module`` is None.
        module: the module that is unsupported, or None.
        transient: whether the reason may disappear before a later call without a change of architecture.
    """

    reason: str
    module: nn.Module | None = None
    transient: bool = False


def has_no_hooks(state: dict[str, Any]) -> bool:
    """Return whether calling the module with this ``__dict__`` runs its class's forward and nothing else."""
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or "_compiled_call_impl" in state
        or "_conv_forward" in state
    )


def inspect_stock_module(module: Any, kind: type[nn.Module]) -> Unsupported | None:
    """Return Unsupported unless `module` is exactly a `kind` (not a subclass) without hooks or a patched forward."""
    if type(module) is not kind:
        return Unsupported(f"is {type(module).__name__}, not exactly {kind.__name__}", module)
    state = module.__dict__
    if has_no_hooks(state):
        return None
    if "forward" in state or "_conv_forward" in state or "_compiled_call_impl" in state:
        return Unsupported("has a patched forward, or is compiled separately", module)
    return Unsupported("has a hook", module, transient=True)


class Chain:
    """The tensors and settings of all matched units, as flat lists for :func:`fused_res.functional.residual_block`.

    The units of the main path come first, then the projection, if there is one.
    """

    __slots__ = (
        "has_constant_norm",
        "keys",
        "momentum",
        "norms",
        "num_batches_tracked",
        "process_groups",
        "spec",
        "tensors",
        "training",
    )

    spec: BlockSpec

    def __init__(self) -> None:
        self.keys: list[UnitKey] = []
        self.tensors: list[Tensor | None] = []
        self.training: list[bool] = []
        self.momentum: list[float] = []
        self.norms: list[nn.Module] = []
        self.process_groups: list[ProcessGroup | None] = []  # one for each norm that uses batch statistics
        self.num_batches_tracked: list[Tensor] = []
        self.has_constant_norm = False

    def add(self, conv: Any, norm: Any, activation: str, negative_slope: float = 0.01) -> Unsupported | None:
        """Append a unit, or return why its settings are unsupported and leave the chain unchanged.

        The caller guarantees that both modules run the forward of their stock class, without hooks.
        """
        conv_state, norm_state = conv.__dict__, norm.__dict__
        if norm in self.norms:
            return Unsupported("is used twice in one chain", norm)
        parameters = conv_state["_parameters"]
        weight = parameters.get("weight")
        if weight is None or "bias" not in parameters:
            return Unsupported("does not hold its weight and bias as parameters", conv)
        norm_args = read_norm(norm_state)
        if isinstance(norm_args, str):
            return Unsupported(norm_args, norm)
        if not accepts_rank(norm, weight.dim()):
            return Unsupported(f"does not accept the convolution's outputs of rank {weight.dim()}", norm)
        norm_weight, norm_bias, mean, var, training, momentum, num_batches = norm_args
        if is_constant_norm(norm_state):
            self.has_constant_norm = True
        # fmt: off
        self.keys.append((
            conv_state["stride"], conv_state["padding"], conv_state["dilation"], conv_state["groups"],
            conv_state["padding_mode"], weight.shape, norm_state["eps"], activation, negative_slope,
        ))
        # fmt: on
        self.tensors += (weight, parameters["bias"], norm_weight, norm_bias, mean, var)
        self.training.append(training)
        self.momentum.append(momentum)
        self.norms.append(norm)
        if training:
            self.process_groups.append(sync_process_group(norm_state))
        if num_batches is not None:
            self.num_batches_tracked.append(num_batches)
        return None

    @property
    def is_repeatable(self) -> bool:
        """Whether reading the same attributes again gives the same chain, in a single process."""
        cumulative = any(norm.training and norm.__dict__.get("momentum", 0) is None for norm in self.norms)
        return not cumulative and all(group is None for group in self.process_groups)

    def has_channels_last_3d(self, input: Tensor) -> bool:
        """Return whether the input or a weight of 3-D convolutions is in channels_last_3d memory.

        The memory format of a ``Conv3d``'s output then depends on the library that ATen selects for it.
        """
        weights = (tensor for tensor in self.tensors[::_UNIT_FIELDS] if tensor is not None)
        return has_channels_last_strides(input) or any(map(has_channels_last_strides, weights))

    def run(self, input: Tensor, backend: str, recompute: str, tune: bool) -> tuple[Tensor, Plan | None]:
        """Return the output, and the plan as of :func:`fused_res.functional.run_block`."""
        # Activation checkpointing repeats the forward inside the backward; num_batches_tracked counts it once.
        count = len(self.num_batches_tracked) > 0 and not functional.is_recomputing()
        output, plan = functional.run_block(
            input,
            self.spec,
            self.tensors,
            tuple(self.training),
            self.momentum,
            recompute,
            self.process_groups[0] if self.process_groups else None,
            backend,
            tune,
        )
        if count:
            _torch_compat.foreach_add_(self.num_batches_tracked, 1)
        return output, plan


def accepts_rank(norm: nn.Module, rank: int) -> bool:
    """Return whether the forward of a batch norm, and the fused operators, accept inputs of this rank."""
    for kind, ranks in _NORM_RANKS:
        if isinstance(norm, kind):
            return rank in ranks
    return rank == 4


def sync_process_group(state: dict[str, Any]) -> ProcessGroup | None:
    """Return the process group that a norm with this ``__dict__`` synchronizes its batch statistics across, or None."""
    if "process_group" not in state or not state["training"]:
        return None
    return distributed.multi_process_group(state["process_group"])


#: Arguments of a batch norm: weight, bias, running_mean, running_var, training, momentum, and num_batches_tracked where
#: this call increments it.
NormArgs = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool, float, Tensor | None]


def read_norm(state: dict[str, Any]) -> NormArgs | str:
    """Return the arguments that ``nn.BatchNorm2d.forward`` would pass to ``F.batch_norm``, or why they are undefined.

    Args:
        state: the norm's ``__dict__``.
    """
    if "track_running_stats" not in state:
        return _read_constant_norm(state)
    parameters, buffers = state["_parameters"], state["_buffers"]
    if "weight" not in parameters or "bias" not in parameters or len(buffers) < 3:
        return "does not hold its tensors as parameters and buffers"
    weight, bias = parameters["weight"], parameters["bias"]
    mean, var, num_batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    if (mean is None) is not (var is None):
        return "has only one of running_mean and running_var"
    if not state["training"]:
        return weight, bias, mean, var, mean is None, 0.0, None
    if not state["track_running_stats"]:
        return weight, bias, None, None, True, 0.0, None
    momentum = state["momentum"]
    if momentum is None:
        # A cumulative moving average weights the new batch by 1 / (number of batches including this one).
        momentum = 0.0 if num_batches is None else 1.0 / (float(num_batches) + 1.0)
    elif not (isinstance(momentum, (int, float)) and math.isfinite(momentum)):
        return "has a momentum that is not a finite number"
    return weight, bias, mean, var, True, momentum, num_batches


def is_constant_norm(state: dict[str, Any]) -> bool:
    """Return whether a module with this ``__dict__`` holds the tensors of a batch norm whose statistics never change.

    Such a *frozen* batch norm computes the same in both modes. Its weight and bias are often buffers.
    """
    if "track_running_stats" in state or "eps" not in state:
        return False
    return all(name in state["_parameters"] or name in state["_buffers"] for name in ("running_mean", "running_var"))


def _read_constant_norm(state: dict[str, Any]) -> NormArgs | str:
    tensors = state["_buffers"] | state["_parameters"]
    mean, var = tensors.get("running_mean"), tensors.get("running_var")
    if mean is None or var is None:
        return "has no running statistics"
    if mean.requires_grad or var.requires_grad:
        return "has running statistics that require a gradient"
    return tensors.get("weight"), tensors.get("bias"), mean, var, False, 0.0, None


_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


def norm_dependencies(state: dict[str, Any]) -> list[tuple[dict[str, Any], tuple[str, ...]]] | None:
    """Return the dictionaries and keys that :func:`read_norm` reads in evaluation mode, for a snapshot.

    None if a snapshot may miss a write: PyTorch does not count the training forward's writes to the running statistics,
    but that to num_batches_tracked.
    """
    parameters, buffers = state["_parameters"], state["_buffers"]
    if "track_running_stats" in state:
        if buffers["num_batches_tracked"] is None:
            return None
        return [
            (state, ("_parameters", "_buffers", "training", "eps")),
            (parameters, ("weight", "bias")),
            (buffers, ("running_mean", "running_var", "num_batches_tracked")),
        ]
    held = [(group, tuple([name for name in _NORM_TENSORS if name in group])) for group in (parameters, buffers)]
    return [(state, ("_parameters", "_buffers", "eps")), *held]


def inspect_pool(pool: nn.Module) -> Unsupported | None:
    """Return Unsupported unless the fused forward supports the settings of the max pooling `pool`."""
    if type(pool) is not nn.MaxPool2d:
        return Unsupported("is not exactly MaxPool2d", pool)
    state = pool.__dict__
    if state["return_indices"] or state["ceil_mode"] or state["dilation"] not in (1, (1, 1)):
        return Unsupported("returns indices, uses ceil_mode or is dilated", pool)
    return None


def match_chain(
    units: Sequence[Unit], shortcut: Shortcut = "none", pool: nn.Module | None = None
) -> Chain | Unsupported:
    """Return the modules as a chain, or the first reason why they are unsupported, regardless of the input.

    The caller guarantees that all modules run the forward of their stock class, without hooks.
    """
    chain = Chain()
    for unit in units:
        unsupported = chain.add(*unit)
        if unsupported is not None:
            return unsupported
    form = "projection"
    if isinstance(shortcut, str):
        form = shortcut
    else:
        unsupported = chain.add(*shortcut)
        if unsupported is not None:
            return unsupported
    groups = chain.process_groups
    if groups and groups.count(groups[0]) != len(groups):
        return Unsupported("the norms synchronize their statistics across different process groups")
    unsupported = None if pool is None else inspect_pool(pool)
    if unsupported is not None:
        return unsupported
    pool_key = None if pool is None else tuple([pool.__dict__[name] for name in ("kernel_size", "stride", "padding")])
    spec = build_block_spec(tuple(chain.keys), form, pool_key)
    if isinstance(spec, str):
        return Unsupported(spec)
    chain.spec = spec
    return chain


#: Whether fused forwards are enabled: the environment variable FUSED_RES at import. Reading os.environ in every call
#: would take 1 us per block; this takes 10 ns.
enabled = env.ENABLED.read() == "1"
_PATCHABLE: tuple[tuple[type, str], ...] = (
    *[(kind, name) for kind in (Conv1d, Conv2d, Conv3d) for name in ("forward", "_conv_forward")],
    *[(kind, "forward") for kind in (BatchNorm1d, BatchNorm2d, BatchNorm3d, nn.SyncBatchNorm)],
    *[(kind, "forward") for kind in (nn.ReLU, nn.MaxPool2d, nn.Identity, nn.Sequential)],
    *[(nn.Module, "__call__"), (nn.Module, "_call_impl")],
)
_STOCK_METHODS = [getattr(kind, name) for kind, name in _PATCHABLE]


_PATCHABLE_CLASSES = tuple(dict.fromkeys(kind for kind, _ in _PATCHABLE))
_stock_tags: tuple[int, ...] = ()  # tags of these classes when all of their methods were stock


def has_patched_layers() -> bool:
    """Return whether a method of a PyTorch layer was replaced, which changes what its modules compute."""
    global _stock_tags
    if _extension.loaded and _extension.cpp.class_tags_are(_PATCHABLE_CLASSES, _stock_tags):
        return False
    tags = _extension.cpp.class_tags(_PATCHABLE_CLASSES) if _extension.loaded else ()
    if [getattr(kind, name) for kind, name in _PATCHABLE] != _STOCK_METHODS:
        return True
    _stock_tags = tags
    return False


def unsupported_context() -> Unsupported | None:
    """Return the reason why the stock forward has to run, regardless of modules and input, or None."""
    if not enabled:
        return Unsupported(f"{env.ENABLED.name}=0 is set")
    if _torch_compat.has_global_module_hooks():
        return Unsupported("a hook on all modules is registered")
    if torch.compiler.is_compiling():
        return Unsupported("torch.export is active") if _torch_compat.is_exporting() else None
    if has_patched_layers():
        return Unsupported("a method of a torch.nn layer was replaced")
    if _torch_compat.is_jit_tracing():
        return Unsupported("torch.jit.trace is active")
    if _torch_compat.is_transformed():
        return Unsupported("a torch.func transform or forward-mode differentiation is active")
    return None


def inspect_input(input: Tensor) -> Unsupported | None:
    """Return Unsupported unless `input` is a plain, strided tensor ``(N, C, ...)`` of a supported rank and dtype."""
    if type(input) is not Tensor and type(input) is not Parameter:
        return Unsupported(f"the input is a {type(input).__name__}")
    if not 2 <= input.dim() <= 5 or input.layout is not torch.strided:
        return Unsupported("the input is not a strided tensor of rank 2 to 5")
    if input.dtype not in _DTYPES:
        return Unsupported(f"the input has dtype {input.dtype}")
    return None


def compute_dtype(input: Tensor, identity: bool) -> tuple[torch.dtype, bool] | Unsupported:
    """Return the dtype in which the stock forward would compute the chain, and whether autocast casts to it."""
    dtype = functional.autocast_dtype(input)
    if dtype is None:
        return input.dtype, False
    if input.dtype is torch.float64:
        return Unsupported("autocast does not cast float64")
    if identity and input.dtype is not dtype:
        return Unsupported("the identity shortcut's dtype differs from autocast's")
    return dtype, True


def inspect_tensors(
    tensors: Sequence[Tensor | None], dtype: torch.dtype, autocast: bool, has_constant_norm: bool = False
) -> Unsupported | None:
    """Return Unsupported unless all tensors are plain tensors whose dtypes match a computation in `dtype`.

    Args:
        tensors: the tensors of every unit, in the order of :class:`fused_res.spec.UnitTensors`.
        dtype: dtype of the computation.
        autocast: whether autocast casts the convolutions' operands to `dtype`.
        has_constant_norm: whether a norm is arithmetic on its tensors, whose dtypes determine that of its output.
    """
    for index, tensor in enumerate(tensors):
        if tensor is None:
            continue
        kind, actual = type(tensor), tensor.dtype
        if kind is not Parameter and kind is not Tensor:
            return Unsupported(f"a parameter or buffer is a {kind.__name__}")
        if actual is not dtype and not is_supported_dtype(index, actual, dtype, autocast, has_constant_norm):
            return Unsupported(f"a parameter or buffer has dtype {actual}, but the block computes in {dtype}")
    return None


def is_supported_dtype(
    index: int, actual: torch.dtype, dtype: torch.dtype, autocast: bool, has_constant_norm: bool = False
) -> bool:
    """Return whether the tensor at `index` of :func:`inspect_tensors` may have the dtype `actual`."""
    # Autocast casts a convolution's operands; batch norm accepts float32 parameters with a 16-bit input.
    of_norm = index % _UNIT_FIELDS >= _FIRST_NORM_FIELD
    if actual is dtype:
        return True
    if of_norm:
        return actual is torch.float32 and dtype in _HALF and not has_constant_norm
    return autocast and actual in _AUTOCAST_DTYPES


def run_fused(
    input: Tensor,
    units: Sequence[Unit],
    shortcut: Shortcut = "none",
    pool: nn.Module | None = None,
    backend: str = "auto",
    recompute: str = "none",
    tune: bool = False,
    calls: Calls | None = None,
) -> Tensor | None:
    """Return the output of the fused forward, or None if the stock forward has to run on this call.

    The caller has checked :func:`unsupported_context`, and guarantees that all modules run the forward of their stock
    class, without hooks.

    Args:
        units, shortcut, pool: the modules, as of :func:`match_chain`.
        backend, recompute, tune: as of :func:`fused_res.functional.residual_block`; the same in all calls with `calls`.
        calls: cache of the caller's last calls, or None.
    """
    if calls is not None and not torch.compiler.is_compiling():
        last = calls.get((units, shortcut, pool))
        if last is not None and (output := last.run(input)) is not None:
            return output
    if inspect_input(input):
        return None
    dtype_and_autocast = compute_dtype(input, shortcut == "identity")
    chain = match_chain(units, shortcut, pool)
    if (
        isinstance(dtype_and_autocast, Unsupported)
        or isinstance(chain, Unsupported)
        or inspect_tensors(chain.tensors, *dtype_and_autocast, chain.has_constant_norm)
    ):
        return None
    if shortcut == "identity" and is_permuted(input):
        return None  # the sum may have the input's strides
    if input.dim() == 5 and chain.has_channels_last_3d(input):
        return None
    try:
        output, plan = chain.run(input, backend, recompute, tune)
    except (ValueError, TypeError):
        return None  # PyTorch broadcasts the operands, or raises its own exception
    if calls is not None and plan is not None and not dtype_and_autocast[1] and not tune and chain.is_repeatable:
        all_units = units if isinstance(shortcut, str) else (*units, shortcut)
        modules = [module for unit in all_units for module in unit[:2]]
        attributes = read_modules(modules if pool is None else [*modules, pool])
        if attributes is not None:
            kernels = registry.resolve(plan.config.backend, input.device)
            tensors, momentum = chain.tensors, chain.momentum

            def run(input: Tensor) -> Tensor:
                return functional.run_planned_block(plan, kernels, tensors, momentum, input)

            calls[units, shortcut, pool] = CachedCall(attributes, (input,), tensors, chain.num_batches_tracked, run)
    return output


def run_fused_norm(
    input: Tensor,
    norm: nn.Module,
    residual: Tensor | None,
    activation: str,
    backend: str = "auto",
    negative_slope: float = 0.01,
    calls: Calls | None = None,
) -> Tensor | None:
    """Return ``activation(norm(input) [+ residual])`` from the fused operator, or None if the stock forward has to run.

    The caller has checked :func:`unsupported_context`, and that `norm` has a supported class and no hooks.

    Args:
        backend: the same in all calls with `calls`.
        calls: as of :func:`run_fused`.
    """
    key: Any = None
    operands = (input,) if residual is None else (input, residual)
    if calls is not None and not torch.compiler.is_compiling():
        key = norm, activation, negative_slope, residual is None
        last = calls.get(key)
        if last is not None and (output := last.run(*operands)) is not None:
            return output
    if inspect_input(input) or not accepts_rank(norm, input.dim()):
        return None
    dense = to_stock_layout(input)
    if residual is not None and (
        inspect_input(residual)
        or residual.dtype is not input.dtype
        or residual.shape != input.shape
        or residual.device != input.device
        or not has_same_layout(dense, residual)
    ):
        return None
    state = norm.__dict__
    norm_args = read_norm(state)
    is_constant = is_constant_norm(state)
    if isinstance(norm_args, str) or inspect_tensors((None, None, *norm_args[:4]), input.dtype, False, is_constant):
        return None
    options = state["eps"], activation, backend, negative_slope, sync_process_group(state)
    try:
        output = apply_norm(dense, residual, norm_args, *options)
    except (ValueError, TypeError):
        return None  # PyTorch raises its own exception
    weight, bias, mean, var, training, momentum, num_batches = norm_args
    is_repeatable = dense is input and options[-1] is None and not (training and state.get("momentum", 0) is None)
    if key is not None and is_repeatable and (attributes := read_modules([norm])) is not None:
        kernels = registry.resolve(backend, input.device)
        settings = mean, var, training, momentum, state["eps"], activation, negative_slope

        def run(input: Tensor, residual: Tensor | None = None) -> Tensor:
            return functional.run_norm(kernels, "", input, residual, weight, bias, None, None, *settings)

        counters = () if num_batches is None else (num_batches,)
        calls[key] = CachedCall(attributes, operands, norm_args[:4], counters, run)  # type: ignore[index]
    return output


def apply_norm(
    input: Tensor,
    residual: Tensor | None,
    norm_args: NormArgs,
    eps: float,
    activation: str,
    backend: str,
    negative_slope: float = 0.01,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Return the fused batch norm of `input`; update the running statistics and num_batches_tracked as `norm` would."""
    weight, bias, mean, var, training, momentum, num_batches = norm_args
    count = num_batches is not None and not functional.is_recomputing()
    output = functional.batch_norm_act(
        input, mean, var, weight, bias, residual, training, momentum, eps, activation,
        negative_slope=negative_slope, process_group=process_group, backend=backend,
    )  # fmt: skip
    if count:
        num_batches.add_(1)  # type: ignore[union-attr]
    return output


class Layers(NamedTuple):
    """The modules of a chain as this package's own modules hold them.

    Args:
        units: (convolution, norm) or (convolution, norm, activation) modules.
        shortcut: "none", "identity", or the projection: an ``nn.Sequential`` of a convolution and a norm.
        pool: max pooling, or None.
    """

    units: Sequence[tuple[Any, ...]]
    shortcut: Literal["none", "identity"] | nn.Module = "none"
    pool: nn.Module | None = None

    def arguments(self) -> tuple[list[Unit], Shortcut, nn.Module | None] | Unsupported:
        """Return the first arguments of :func:`run_fused`, or the reason why a module's class is unsupported."""
        units = []
        for unit in self.units:
            unsupported = _inspect_unit(unit)
            if unsupported is not None:
                return unsupported
            units.append(Unit(unit[0], unit[1], "relu" if len(unit) == 3 and type(unit[2]) is nn.ReLU else "identity"))
        unsupported = None if self.pool is None else inspect_stock_module(self.pool, nn.MaxPool2d)
        if unsupported is not None:
            return unsupported
        if isinstance(self.shortcut, str):
            return units, self.shortcut, self.pool
        unsupported = inspect_stock_module(self.shortcut, nn.Sequential)
        if unsupported is not None:
            return unsupported
        modules = [
            m for m in self.shortcut._modules.values() if type(m) is not nn.Identity or not has_no_hooks(m.__dict__)
        ]
        if len(modules) != 2:
            return Unsupported("is not a convolution and a norm", self.shortcut)
        unsupported = _inspect_unit(modules)
        return (units, Unit(modules[0], modules[1], "identity"), self.pool) if unsupported is None else unsupported

    def run_fused(self, input: Tensor, backend: str, recompute: str, tune: bool) -> Tensor | None:
        """Return the output of the fused forward, or None if the stock forward has to run on this call."""
        if unsupported_context():
            return None
        arguments = self.arguments()
        return None if isinstance(arguments, Unsupported) else run_fused(input, *arguments, backend, recompute, tune)

    def find_unsupported(self) -> Unsupported | None:
        """Return the first reason why :meth:`run_fused` would return None, regardless of the input, or None."""
        arguments = self.arguments()
        return arguments if isinstance(arguments, Unsupported) else find_unsupported(*arguments)


def _inspect_unit(unit: Sequence[Any]) -> Unsupported | None:
    conv, norm = unit[0], unit[1]
    unsupported = inspect_stock_module(conv, Conv2d)
    if unsupported is not None:
        return unsupported
    if type(norm) not in norm_types:
        return Unsupported(f"is {type(norm).__name__}, not exactly BatchNorm2d or SyncBatchNorm", norm)
    if not has_no_hooks(norm.__dict__):
        return inspect_stock_module(norm, type(norm))
    if len(unit) == 2:
        return None
    return inspect_stock_module(unit[2], nn.Identity if type(unit[2]) is nn.Identity else nn.ReLU)


def find_unsupported(
    units: Sequence[Unit], shortcut: Shortcut = "none", pool: nn.Module | None = None
) -> Unsupported | None:
    """Return the first reason why :func:`run_fused` would return None, regardless of the input, or None."""
    chain = match_chain(units, shortcut, pool)
    return chain if isinstance(chain, Unsupported) else None
