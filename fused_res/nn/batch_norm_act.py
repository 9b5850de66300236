"""Batch norm, an optional residual, and the activation, as one layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fused_res.nn import chain
from fused_res.nn.configured import Configured
from fused_res.ops.checks import Activation, check_activation


class BatchNormAct2d(Configured, nn.BatchNorm2d):
    """``activation(batch_norm(input) [+ residual])``; the arguments and state of :class:`torch.nn.BatchNorm2d`.

    Called with ``input`` ``(N, C, H, W)`` and, if there is one, ``residual`` of its shape and dtype; the output has
    them, too. Batch norm is that of Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167.

    Args:
        num_features: channels, C.
        eps, momentum, affine, track_running_stats, device, dtype: as in :class:`torch.nn.BatchNorm2d`.
        activation: ``"relu"`` or ``"identity"``.
        backend: see :mod:`fused_res.backends`.

    Raises:
        ValueError: ``activation`` or ``backend`` is not a known name.
        BackendUnavailableError: the backend was asked for by name and cannot run here.
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
        if self.fused:
            output = chain.run_norm(input, self, residual, self.activation, self.backend)
            if output is not None:
                return output
        output = super().forward(input)
        if residual is not None:
            output = (output + residual).to(output.dtype)
        return F.relu(output) if self.activation == "relu" else output

    @property
    def qconfig(self) -> None:
        """Asked for by ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, which would put a norm without an activation,
        and without a residual, in this one's place."""
        raise RuntimeError(
            "torch.nn.SyncBatchNorm.convert_sync_batchnorm would drop the activation of a fused_res.nn.BatchNormAct2d:"
            " use fused_res.convert_sync_batchnorm(model, process_group)"
        )

    def refusal(self) -> chain.Refusal | None:
        state = chain.read_norm(self.__dict__)
        return chain.Refusal(state, self) if isinstance(state, str) else None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}{self.settings_repr()}"
