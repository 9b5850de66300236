"""The public functions: they check arguments once, raise clear errors, and choose who computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_res import block
from fused_res.autograd.batch_norm_act import BatchNormAct
from fused_res.autograd.residual_block import ResidualBlock, traceable
from fused_res.backends import registry
from fused_res.backends.reference import batch_norm_act as reference_norm
from fused_res.backends.reference import residual_block as reference_block
from fused_res.plan import check_batch, plan
from fused_res.spec import ACTIVATIONS, BlockSpec

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    backend: str = "auto",
) -> Tensor:
    """``activation(batch_norm(input) [+ residual])`` in one pass behind the statistics.

    As ``torch.nn.functional.batch_norm`` followed by an addition and a ReLU, with the same running statistics and
    gradients (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167), rounded to ``input``'s dtype once, at the end.

    Args:
        input: ``(N, C, ...)`` with 2 to 5 dimensions, float32, float64, bfloat16 or float16; any strides, without a
            copy when contiguous or channels_last.
        running_mean, running_var: ``(C,)``; updated in place when ``training``, needed when not.
        weight, bias: ``(C,)``, float32 or of ``input``'s dtype; None stands for ones and zeros.
        residual: of ``input``'s shape, dtype and device, in any memory format.
        training: normalise with the statistics of the batch.
        momentum: weight of the new batch in the running statistics.
        eps: added to the variance.
        activation: ``"relu"`` or ``"identity"``.
        backend: see :mod:`fused_res.backends`.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format. Statistics are float32 (float64 for float64).

    Raises:
        ValueError, TypeError: an argument does not fit; nothing has been written then.
        BackendUnavailableError: a backend asked for by name cannot run here.
    """
    _check_norm(input, running_mean, running_var, weight, bias, residual, training, momentum, activation)
    kernels = registry.resolve(backend, input.device)
    relu = activation == "relu"
    if _needs_reference((input, residual, weight, bias)):
        output, mean, var = reference_norm.batch_norm_act(
            input, running_mean, running_var, weight, bias, residual, training, eps, relu
        )
        stats = torch.stack((mean, mean, mean, mean, var))
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, residual, weight, bias)):
        output, stats = BatchNormAct.apply(
            input, residual, weight, bias, running_mean, running_var, training, eps, relu, kernels.name
        )
    else:
        output, stats, _ = kernels.batch_norm_act_forward(
            input, residual, weight, bias, running_mean, running_var, training, eps, relu, False
        )
    if training and running_mean is not None and input.numel() and not recomputing():
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
    backend: str = "auto",
) -> Tensor:
    """A chain of convolution, batch norm and activation with an optional shortcut, as one step of autograd.

    ``activation(bn(conv(... input ...)) + shortcut(input))``, the residual block of He et al. (2015),
    https://arxiv.org/abs/1512.03385, with as many units as ``spec`` has. Under autocast, ``input`` and the
    convolutions' tensors are cast as the stock modules would cast them; norms keep their float32 parameters.

    Args:
        input: ``(N, C, ...)``, float32, float64, bfloat16 or float16; channels_last is fastest.
        spec: what the block is.
        tensors: its tensors, flat, in the order of :meth:`BlockSpec.tensor_names`. Running statistics are updated in
            place where their unit is training.
        training: whether norms use the statistics of the batch; one value, or one for each unit (projection last).
        momentum: weight of the new batch in the running statistics; one value, or one for each unit.
        recompute: ``"none"`` keeps what makes backward fastest; ``"norm"`` keeps only the convolutions' raw outputs and
            normalises again in backward; ``"conv"`` also runs a bottleneck's last 1x1 convolution and a projection's
            convolution again.
        backend: see :mod:`fused_res.backends`.

    Returns:
        The block's output, of ``input``'s dtype.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing has been written then.
        BackendUnavailableError: a backend asked for by name cannot run here.
    """
    _check_input(input)
    batch_statistics = spec.per_unit(training, "training")
    kernels = registry.resolve(backend, input.device)
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        if input.dtype != torch.float64:  # as autocast does
            input = input.to(dtype)
            tensors = [t.to(dtype) if t is not None and i % 6 < 2 else t for i, t in enumerate(tensors)]

    stats: Sequence[Tensor]
    if _needs_reference((input, *tensors)):
        plan(spec, input, tensors, batch_statistics, recompute, kernels.name)
        output, means, variances = reference_block.residual_block(input, spec, tensors, batch_statistics)
        stats = [torch.stack((mean, mean, mean, mean, var)) for mean, var in zip(means, variances, strict=True)]
    elif torch.compiler.is_compiling():
        output, stats = traceable(input, spec, tensors, batch_statistics, recompute, kernels.name)
    else:
        made = plan(spec, input, tensors, batch_statistics, recompute, kernels.name)
        if made.grad:
            output, *stats = ResidualBlock.apply(made, input, *tensors)
        else:
            output, kept = block.forward(made, kernels, input, tensors)
            stats = kept.stats

    if True in batch_statistics and output.numel() and not recomputing():
        momenta = spec.per_unit(momentum, "momentum")
        updated = [index for index, flag in enumerate(batch_statistics) if flag and tensors[6 * index + 4] is not None]
        if updated:
            kernels.update_running_stats(
                [tensors[6 * index + 4] for index in updated],
                [tensors[6 * index + 5] for index in updated],
                [stats[index] for index in updated],
                [momenta[index] for index in updated],
            )
    return output


def recomputing() -> bool:
    """Whether autograd is running this code in a backward pass: activation checkpointing makes outputs again.

    Running statistics and batch counters took this batch in already, when it went forward.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _needs_reference(tensors: Sequence[Tensor | None]) -> bool:
    """Whether something looks into the computation that an opaque kernel would not let through."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def _check_input(input: Tensor) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}")
    if input.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"input must be one of {names}, got {input.dtype}")


def _check_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    activation: str,
) -> None:
    _check_input(input)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if not isinstance(momentum, (int, float)):
        raise TypeError(f"momentum must be a number, got {momentum!r}")
    shape = input.shape
    if not 2 <= len(shape) <= 5:
        raise ValueError(f"input must have 2 to 5 dimensions (N, C, ...), got {len(shape)}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given, or neither")
    if running_mean is None and not training:
        raise ValueError("running_mean and running_var are needed when training is False")
    for name, tensor in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape[1:2]:
            raise ValueError(f"{name} must have the shape ({shape[1]},), got {tuple(tensor.shape)}")
        if tensor.device != input.device:
            raise ValueError(f"{name} must be on {input.device} as input is, got {tensor.device}")
        if tensor.dtype != input.dtype and (tensor.dtype != torch.float32 or input.dtype == torch.float64):
            raise TypeError(f"{name} must be of input's dtype {input.dtype}{_or_float32(input)}, got {tensor.dtype}")
    if residual is not None:
        if residual.shape != shape:
            raise ValueError(f"residual must have input's shape {tuple(shape)}, got {tuple(residual.shape)}")
        if residual.dtype != input.dtype:
            raise TypeError(f"residual must have input's dtype {input.dtype}, got {residual.dtype}")
        if residual.device != input.device:
            raise ValueError(f"residual must be on {input.device} as input is, got {residual.device}")
    if training:
        check_batch(shape)


def _or_float32(input: Tensor) -> str:
    return "" if input.dtype in (torch.float32, torch.float64) else " or float32"
