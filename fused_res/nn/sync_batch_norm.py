"""Batch norm with statistics synchronized across a process group, on any device."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fused_res import distributed
from fused_res._torch_compat import BatchNorm
from fused_res.nn import chain
from fused_res.nn.batch_norm_act import BatchNormAct2d
from fused_res.nn.fusable_module import check_model

Model = TypeVar("Model", bound=nn.Module)


class SyncBatchNorm(BatchNorm):
    """:class:`torch.nn.SyncBatchNorm` for any device and any ``torch.distributed`` backend, including gloo on the CPU.

    In training, mean and variance are computed over the batches of all ranks of the process group; local batch sizes
    may differ and may be 0. The forward communicates by one all-gather of the partial statistics ``(count, mean, M2)``,
    the backward by one all-reduce of ``(sum dy, sum dy * xhat)``, C numbers each. In a fused block both run between the
    block's kernels. Gradients of weight and bias are computed from the local batch; DistributedDataParallel averages
    them like those of all other parameters.

    It is not a subclass of :class:`torch.nn.SyncBatchNorm`, which DistributedDataParallel rejects on the CPU.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: arguments of
            :class:`torch.nn.BatchNorm2d`. Inputs are ``(N, C, ...)`` with 2 to 5 dimensions.
        process_group: process group to synchronize across, default None: all processes. With a single process the
            module is an ordinary batch norm.

    Raises:
        TypeError: ``process_group`` is not a process group.
    """

    def __init__(self, *args: Any, process_group: ProcessGroup | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        distributed.check_group(process_group)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        group = chain.sync_process_group(self.__dict__)
        if group is None:
            return super().forward(input)
        norm_args = chain.read_norm(self.__dict__)
        if isinstance(norm_args, str):
            reason = norm_args
            raise RuntimeError(f"a synchronized batch norm that {reason} cannot run")
        return chain.apply_norm(input, None, norm_args, self.eps, "identity", "auto", process_group=group)

    def _check_input_dim(self, input: Tensor) -> None:
        if not 2 <= input.dim() <= 5:
            raise ValueError(f"expected 2D to 5D input (got {input.dim()}D input)")


class SyncBatchNormAct2d(BatchNormAct2d, SyncBatchNorm):
    """:class:`BatchNormAct2d` with statistics synchronized across a process group.

    Args:
        num_features, activation, backend and the remaining arguments: arguments of :class:`BatchNormAct2d`.
        process_group: process group to synchronize across, default None: all processes.
    """


_SYNCHRONIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: SyncBatchNorm,
    nn.BatchNorm2d: SyncBatchNorm,
    nn.BatchNorm3d: SyncBatchNorm,
    nn.SyncBatchNorm: SyncBatchNorm,
    SyncBatchNorm: SyncBatchNorm,
    BatchNormAct2d: SyncBatchNormAct2d,
    SyncBatchNormAct2d: SyncBatchNormAct2d,
}
chain.norm_types.add(SyncBatchNorm)


def convert_sync_batchnorm(model: Model, process_group: ProcessGroup | None = None) -> Model:
    """Synchronize the statistics of every batch norm of `model` across a process group, in place.

    Like ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, but for any device, and :class:`fused_res.nn.BatchNormAct2d`
    retains its activation. Modules remain the same objects, with their parameters, buffers, hooks and state_dict keys.
    Call it before or after :func:`fused_res.fuse`, and before DistributedDataParallel.

    Args:
        model: any module, including a single batch norm.
        process_group: process group to synchronize across, default None: all processes at the time of each call.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module, contains a batch norm of an unsupported class, which may do more than
            normalize, or `process_group` is not a process group. `model` is unchanged in this case.
    """
    check_model(model)
    distributed.check_group(process_group)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm)}
    for name, norm in norms.items():
        if type(norm) not in _SYNCHRONIZED:
            raise TypeError(
                f"{name or 'model'} is a {type(norm).__module__}.{type(norm).__qualname__}: converting it would lose"
                " whatever this class does in addition to batch norm; look for a SyncBatchNorm conversion in the"
                " library that defines it"
            )
    for norm in norms.values():
        norm.__class__ = _SYNCHRONIZED[type(norm)]  # type: ignore[assignment]
        norm.process_group = process_group  # type: ignore[assignment]
    # The programs of fused modules were recorded with the norms' other classes.
    for module in model.modules() if norms else ():
        if (fusion := module.__dict__.get("_fused_res")) is not None:
            fusion.record(module)
    return model
