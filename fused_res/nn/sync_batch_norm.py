"""Batch norm with the statistics of several processes, on any device."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fused_res import distributed
from fused_res._torch_compat import BatchNorm
from fused_res.nn import chain
from fused_res.nn.batch_norm_act import BatchNormAct2d
from fused_res.nn.configured import check_model

Model = TypeVar("Model", bound=nn.Module)


class SyncBatchNorm(BatchNorm):
    """:class:`torch.nn.SyncBatchNorm` for any device and any backend of ``torch.distributed``: gloo on the CPU, too.

    In training, mean and variance are those of the batches of all processes together; each process may have any number
    of images, and some none at all. One all-gather of ``(count, mean, M2)`` forward and one all-reduce of ``(sum dy,
    sum dy * xhat)`` backward, C numbers each. In a fused block they stand between the block's own kernels. Gradients of
    weight and bias are those of the own images, for DistributedDataParallel to average as all others.

    It is no subclass of :class:`torch.nn.SyncBatchNorm`, which DistributedDataParallel refuses on the CPU.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in :class:`torch.nn.BatchNorm2d`;
            inputs are ``(N, C, ...)`` with 2 to 5 dimensions.
        process_group: the processes to synchronise with; None stands for all. Alone, this is a batch norm.

    Raises:
        TypeError: ``process_group`` is no group.
    """

    def __init__(self, *args: Any, process_group: ProcessGroup | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        distributed.check_group(process_group)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        if chain.group_of(self.__dict__) is None:
            return super().forward(input)
        read = chain.read_norm(self.__dict__)
        if isinstance(read, str):
            raise RuntimeError(f"a synchronised batch norm that {read} cannot run")
        return chain.apply_norm(input, self, read, None, "identity", "auto")

    def _check_input_dim(self, input: Tensor) -> None:
        if not 2 <= input.dim() <= 5:
            raise ValueError(f"expected 2D to 5D input (got {input.dim()}D input)")


class SyncBatchNormAct2d(BatchNormAct2d, SyncBatchNorm):
    """:class:`BatchNormAct2d` with the statistics of several processes.

    Args:
        num_features, activation, backend and the others: those of :class:`BatchNormAct2d`.
        process_group: as in :class:`SyncBatchNorm`.
    """


_SYNCHRONISED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: SyncBatchNorm,
    nn.BatchNorm2d: SyncBatchNorm,
    nn.BatchNorm3d: SyncBatchNorm,
    nn.SyncBatchNorm: SyncBatchNorm,
    SyncBatchNorm: SyncBatchNorm,
    BatchNormAct2d: SyncBatchNormAct2d,
    SyncBatchNormAct2d: SyncBatchNormAct2d,
}
chain.norms.add(SyncBatchNorm)


def convert_sync_batchnorm(model: Model, process_group: ProcessGroup | None = None) -> Model:
    """Makes every batch norm of `model` take its statistics from all processes of a group, in place.

    As ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, but for any device, and :class:`fused_res.nn.BatchNormAct2d`
    keeps its activation. Modules stay the same objects, with their parameters, buffers, hooks and state_dict keys.
    Before or after :func:`fused_res.fuse`; before DistributedDataParallel.

    Args:
        model: any module; a batch norm itself, too.
        process_group: the processes to synchronise with; None stands for all, those of the time of each call.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module, or holds a batch norm of a class of its own, which may do more than normalise;
            or `process_group` is no group. Nothing has been changed then.
    """
    check_model(model)
    distributed.check_group(process_group)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm)}
    for name, norm in norms.items():
        if type(norm) not in _SYNCHRONISED:
            raise TypeError(
                f"{name or 'model'} is a {type(norm).__module__}.{type(norm).__qualname__}: what that does besides"
                " normalising would be lost; its own library may have a conversion"
            )
    for norm in norms.values():
        norm.__class__ = _SYNCHRONISED[type(norm)]  # type: ignore[assignment]
        norm.process_group = process_group  # type: ignore[assignment]
    return model
