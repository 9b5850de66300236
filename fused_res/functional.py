"""The public functions: they check arguments once, raise clear errors, and choose who computes.

All run under autograd (but :func:`conv_bias_act`, which is for inference), autocast, ``torch.compile``, and under
``torch.func`` transforms, where plain PyTorch computes. Numbers per channel are ``(C,)``; shapes are ``(N, C, ...)``.
"""

from __future__ import annotations

import contextlib
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.weak import WeakTensorKeyDictionary

from fused_res import _torch_compat, distributed
from fused_res.autograd.batch_norm_act import BatchNormAct, affine_stats
from fused_res.autograd.batch_norm_act import forward as batch_norm_act_forward
from fused_res.autograd.residual_block import ResidualBlock, traceable
from fused_res.backends import registry
from fused_res.backends.reference import batch_norm_act as reference_norm
from fused_res.backends.reference import residual_block as reference_block
from fused_res.block.checks import check_recompute, check_tensors
from fused_res.block.plan import BlockConfig, Plan
from fused_res.block.planner import plan
from fused_res.dispatch import convolution
from fused_res.ops import stats_dtype
from fused_res.ops.checks import (
    check_activation,
    check_convolution,
    check_input,
    check_momentum,
    check_norm,
    check_operands,
    check_residual,
)
from fused_res.ops.memory_format import is_channels_last
from fused_res.spec import BlockSpec, by_unit

__all__ = ["batch_norm_act", "conv_bias_act", "residual_block"]

#: The plan that a block ran last, by its first weight: for people to read.
last_plan: MutableMapping[Any, Plan] = WeakTensorKeyDictionary()


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    *,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """``activation(batch_norm(input) [+ residual])`` in one pass behind the statistics.

    As ``torch.nn.functional.batch_norm`` followed by an addition and a ReLU, with the same running statistics and
    gradients (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167), rounded to ``input``'s dtype once, at the end.
    With ``residual_scale`` and ``residual_shift`` it is ``residual * residual_scale + residual_shift`` that is added.

    Args:
        input: ``(N, C, ...)`` with 2 to 5 dimensions, float32, float64, bfloat16 or float16; any strides, without a
            copy when contiguous or channels_last.
        running_mean, running_var: ``(C,)``; updated in place when ``training``, needed when not.
        weight, bias: ``(C,)``, float32 or of ``input``'s dtype; None stands for ones and zeros.
        residual: of ``input``'s shape, dtype and device, in any memory format.
        training: normalise with the statistics of the batch.
        momentum: weight of the new batch in the running statistics.
        eps: added to the variance; above 0 when ``training``.
        activation: ``"relu"`` or ``"identity"``.
        residual_scale, residual_shift: ``(C,)``, float32 or of ``input``'s dtype; both or neither, and with a residual.
        process_group: the batch is that of all its processes, each of which calls this with its part, of any number
            of images, none at all included; None: this process's alone. Gradients of ``weight`` and ``bias`` are those
            of the own part.
        backend: see :mod:`fused_res.backends`.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format. Statistics are float32 (float64 for float64).

    Raises:
        ValueError, TypeError: an argument does not fit; nothing has been written then.
        BackendUnavailableError: a backend asked for by name cannot run here.
    """
    group = distributed.name_of(process_group) if training else ""
    check_norm(input, running_mean, running_var, weight, bias, training, not group, eps)
    check_residual(input, residual, residual_scale, residual_shift)
    check_momentum(momentum)
    check_activation(activation)
    kernels = registry.resolve(backend, input.device)
    relu = activation == "relu"
    tensors = (input, residual, weight, bias, residual_scale, residual_shift)
    if _needs_reference(tensors):
        _check_alone(group)
        norm = input, running_mean, running_var, weight, bias, residual, training, eps, relu
        output, mean, var = reference_norm.batch_norm_act(*norm, residual_scale, residual_shift)
        stats = torch.stack((mean, mean, mean, mean, var))
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        output, stats = BatchNormAct.apply(
            *tensors, running_mean, running_var, training, eps, relu, kernels.name, group
        )
    else:
        residual_stats = affine_stats(residual_scale, residual_shift, stats_dtype(input.dtype))
        output, stats, _ = batch_norm_act_forward(
            kernels, group, input, residual, residual_stats, weight, bias, running_mean, running_var, training, eps,
            relu, False,
        )  # fmt: skip
    if training and running_mean is not None and (input.numel() or group) and not recomputing():
        kernels.update_running_stats([running_mean], [running_var], [stats], [momentum])
    return output


def residual_block(
    input: Tensor,
    spec: BlockSpec,
    tensors: Sequence[Tensor | None],
    *,
    training: bool | Sequence[bool],
    momentum: float | Sequence[float] = 0.1,
    recompute: str = "none",
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
    tune: bool = False,
) -> Tensor:
    """A chain of convolution, batch norm and activation with an optional shortcut, as one step of autograd.

    ``activation(bn(conv(... input ...)) + shortcut(input))``, the residual block of He et al. (2015),
    https://arxiv.org/abs/1512.03385, with as many units as ``spec`` has. Under autocast, ``input`` and the
    convolutions' tensors are cast as the stock modules would cast them; norms keep their float32 parameters.

    Args:
        input: ``(N, C, ...)``, float32, float64, bfloat16 or float16; channels_last is fastest.
        spec: what the block is; its units have as many spatial dimensions as ``input``.
        tensors: a list or tuple, flat, in the order of :meth:`fused_res.BlockSpec.tensor_names`: of each unit the
            convolution's weight ``(K, C / groups, ...)`` and bias ``(K,)``, both of ``input``'s dtype, and the norm's
            weight, bias, running mean and running variance, ``(K,)``, float32 or of ``input``'s dtype. All but the
            first may be None; running statistics only where ``training``, which updates them in place.
        training: whether norms use the statistics of the batch; one value, or one for each unit (projection last).
        momentum: weight of the new batch in the running statistics; one value, or one for each unit.
        recompute: ``"none"`` keeps what makes backward fastest; ``"norm"`` keeps only the convolutions' raw outputs and
            normalises again in backward; ``"conv"`` also runs a bottleneck's last 1x1 convolution and a projection's
            convolution again.
        process_group: as in :func:`batch_norm_act`, for all units that are training.
        backend: see :mod:`fused_res.backends`.
        tune: measure, on first use of a shape, which algorithms of the backend's list are fastest for its convolutions,
            and select those; ``torch.backends.cudnn.benchmark`` requests it as well.

    Returns:
        The block's output ``(N, K, ...)``, of ``input``'s dtype, under autocast of its dtype.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing has been written then.
        BackendUnavailableError: a backend asked for by name cannot run here.
    """
    check_input(input)
    if not isinstance(spec, BlockSpec):
        raise TypeError(f"spec must be a fused_res.BlockSpec, got {type(spec).__name__}")
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"tensors must be a list or tuple, got {type(tensors).__name__}")
    batch_statistics = spec.per_unit(training, "training")
    if batch_statistics.count(True) + batch_statistics.count(False) != len(batch_statistics):
        raise TypeError(f"training must be True or False, or one of them for each unit, got {training!r}")
    check_recompute(recompute)
    momenta = spec.per_unit(momentum, "momentum") if True in batch_statistics else ()
    for one in momenta:
        check_momentum(one)
    group = distributed.name_of(process_group) if True in batch_statistics else ""
    kernels = registry.resolve(backend, input.device)
    weight, dtype = tensors[0] if tensors else None, autocast_dtype(input)
    if dtype is not None or torch.compiler.is_compiling():  # else the plan finds out, at no cost
        check_tensors(spec, tensors)
    if dtype is not None and input.dtype != torch.float64:  # as autocast does
        input = input.to(dtype)
        convolutions = [(t if t is None else t.to(dtype) for t in unit[:2]) for unit in by_unit(tensors)]
        tensors = [t for own, unit in zip(convolutions, by_unit(tensors), strict=True) for t in (*own, *unit.norm)]

    preference = registry.convolution(backend)
    config = BlockConfig(spec, batch_statistics, kernels.name, recompute, preference, group)
    stats: Sequence[Any]
    if _needs_reference((input, *tensors)):
        _check_alone(group)
        plan(config, input, tensors)
        output, means, variances = reference_block.residual_block(input, spec, tensors, batch_statistics)
        stats = [torch.stack((mean, mean, mean, mean, var)) for mean, var in zip(means, variances, strict=True)]
    elif torch.compiler.is_compiling():
        output, stats = traceable(config, input, tensors)
    else:
        made = plan(config, input, tensors)
        if _tunes(input, tune, preference):
            from fused_res.dispatch import tuning

            measured = (
                tuning.training(kernels, unit.problem, unit.reads != "x", unit.training, input.device)
                for unit in made.all_units
            )
            made = plan(config, input, tensors, None, tuple(measured))
        if made.grad:
            output, *stats = ResidualBlock.apply(made, input, *tensors)
        else:
            slots: list[Any] = made.run_forward(kernels, input, tensors)
            output, *stats = (slots[slot] for slot in (*made.forward.results, *made.stats))
        last_plan[weight] = made

    if True in batch_statistics and (output.numel() or group) and not recomputing():
        owned = zip(by_unit(tensors), batch_statistics, stats, momenta, strict=True)
        updated = [unit for unit in owned if unit[1] and unit[0].running_mean is not None]
        if updated:
            kernels.update_running_stats(
                [unit.running_mean for unit, *_ in updated],
                [unit.running_var for unit, *_ in updated],
                [new for _, _, new, _ in updated],
                [momentum for *_, momentum in updated],
            )
    return output


def conv_bias_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str = "relu",
    *,
    backend: str = "auto",
) -> Tensor:
    """``activation(conv(input, weight) + bias [+ residual])`` as one kernel, for inference.

    With a batch norm folded into ``weight`` and ``bias`` this is all that a trained residual network consists of;
    :func:`fused_res.freeze` does the folding. Under autocast all arguments are cast as those of
    :func:`torch.nn.functional.conv2d` are.

    Args:
        input: ``(N, C, ...)`` with 3 to 5 dimensions, float32, float64, bfloat16 or float16; channels_last is fastest.
        weight: ``(K, C / groups, ...)``, of ``input``'s dtype.
        bias: ``(K,)``, of ``input``'s dtype.
        residual: of the output's shape, ``input``'s dtype, in any memory format.
        stride, dilation: one number, or one for each spatial dimension.
        padding: likewise, or ``"valid"``, or ``"same"`` where that is as much on both sides.
        groups: of the convolution.
        activation: ``"relu"`` or ``"identity"``.
        backend: see :mod:`fused_res.backends`.

    Returns:
        A tensor of ``input``'s dtype, channels_last if ``input`` or ``weight`` is.

    Raises:
        RuntimeError: grad mode is on and an argument requires a gradient.
        ValueError, TypeError: an argument does not fit.
        BackendUnavailableError: a backend asked for by name cannot run here.
    """
    return packed_conv_bias_act(
        input, weight, bias, residual, stride, padding, dilation, groups, activation, backend, None
    )


def packed_conv_bias_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    activation: str,
    backend: str,
    keep: registry.Keep | None,
) -> Tensor:
    """:func:`conv_bias_act` for a caller who can ``keep`` the weight packed: see :func:`registry.infer`."""
    check_input(input)
    check_activation(activation)
    if (dtype := autocast_dtype(input)) is not None:
        check_operands(weight, bias, residual)
        input, weight, bias, residual = (_autocast(t, dtype) for t in (input, weight, bias, residual))
    geometry = (*check_convolution(input, weight, bias, residual, stride, padding, dilation, groups), groups)
    if torch.is_grad_enabled():
        for name, tensor in (("input", input), ("weight", weight), ("bias", bias), ("residual", residual)):
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"conv_bias_act is for inference, and {name} requires a gradient: call it under"
                    " torch.inference_mode() or torch.no_grad(), or train with the convolution and the batch norm apart"
                )
    kernels = registry.resolve(backend, input.device)
    preference, relu = registry.convolution(backend), activation == "relu"
    # The reference's float32 is not to be cast again.
    with torch.autocast(input.device.type, enabled=False) if dtype is not None else contextlib.nullcontext():
        if _needs_reference((input, weight, bias, residual)):
            reference = registry.resolve("reference", input.device)
            return reference.conv_bias_act(input, weight, bias, residual, *geometry, relu)
        if torch.compiler.is_compiling():
            aten = registry.selects_aten(
                kernels, tuple(weight.shape), geometry, input.dtype, is_channels_last(input), preference
            )
            if aten:
                return convolution.bias_act(input, weight, bias, residual, geometry, relu)
            return kernels.conv_bias_act(input, weight, bias, residual, *geometry, relu)
        measured: Any = None
        if _tunes(input, False, preference):
            from fused_res.dispatch.tuning import inference as measured
        return registry.infer(kernels, input, weight, bias, residual, geometry, relu, preference, keep, measured)


def _tunes(input: Tensor, tune: bool, preference: str) -> bool:
    """Whether a convolution of this input runs the measured algorithms."""
    return (tune or (torch.backends.cudnn.benchmark and input.is_cuda)) and preference == "planned"


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """What autocast would cast to; None where it is off, or where there is none (meta tensors)."""
    device = "cpu" if input.is_cpu else input.device.type
    return torch.get_autocast_dtype(device) if not input.is_meta and torch.is_autocast_enabled(device) else None


def _autocast(tensor: Any, dtype: torch.dtype) -> Any:
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)


def recomputing() -> bool:
    """Whether autograd is running this code in a backward pass: activation checkpointing makes outputs again.

    Running statistics and batch counters took this batch in already, when it went forward.
    """
    return not torch.compiler.is_compiling() and _torch_compat.is_in_backward()


def _needs_reference(tensors: Sequence[Tensor | None]) -> bool:
    """Whether something looks into the computation that an opaque kernel would not let through."""
    if torch.compiler.is_compiling():
        return False
    return _torch_compat.is_transformed()


def _check_alone(group: str) -> None:
    if group:
        raise RuntimeError(
            "process_group: torch.func transforms and forward-mode differentiation do not reach other processes"
        )
