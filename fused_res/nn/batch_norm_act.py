"""Fused batch norm, optional residual addition and activation as one layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fused_res.backends.reference.batch_norm_act import activate
from fused_res.nn import chain
from fused_res.nn.fusable_module import FusableModule
from fused_res.ops.checks import RELU_OR_IDENTITY, Activation, check_activation


class BatchNormAct2d(FusableModule, nn.BatchNorm2d):
    """Compute ``activation(batch_norm(input) [+ residual])``.

    Arguments and state are those of :class:`torch.nn.BatchNorm2d`. ``forward(input, residual=None)`` accepts ``input``
    ``(N, C, H, W)`` and an optional ``residual`` of the same shape and dtype, and returns a tensor of that shape and
    dtype. Batch norm: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167.

    Args:
        num_features: number of channels, C.
        eps, momentum, affine, track_running_stats, device, dtype: arguments of :class:`torch.nn.BatchNorm2d`.
        activation: ``"identity"``, ``"relu"``, ``"relu6"``, ``"leaky_relu"`` (with slope 0.01) or ``"silu"``; with a
            residual, ``"identity"`` or ``"relu"``.
        backend: see :mod:`fused_res.backends`.

    Raises:
        ValueError: ``activation`` or ``backend`` is not a known name.
        BackendUnavailableError: the explicitly selected backend cannot run here.
    """

    activation: Activation

    def __init__(
        self, num_features: int, *args: Any, activation: Activation = "relu", backend: str = "auto", **kwargs: Any
    ) -> None:
        check_activation(activation)
        super().__init__(num_features, *args, **kwargs)
        self.activation = activation
        self.configure(backend)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None:
            check_activation(self.activation, RELU_OR_IDENTITY, " with a residual")
        if self.fused and chain.unsupported_context() is None:
            output = chain.run_fused_norm(input, self, residual, self.activation, self.backend)
            if output is not None:
                return output
        output = super().forward(input)
        if residual is not None:
            output = (output + residual).to(output.dtype)
        return activate(output, self.activation)

    @property
    def qconfig(self) -> None:
        """Raise RuntimeError: only ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` reads this attribute, and it would
        replace the module by a norm without activation and residual."""
        raise RuntimeError(
            "torch.nn.SyncBatchNorm.convert_sync_batchnorm would drop the activation of a fused_res.nn.BatchNormAct2d:"
            " use fused_res.convert_sync_batchnorm(model, process_group)"
        )

    def unsupported_reason(self) -> chain.Unsupported | None:
        state = chain.read_norm(self.__dict__)
        return chain.Unsupported(state, self) if isinstance(state, str) else None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}{self.settings_repr()}"
