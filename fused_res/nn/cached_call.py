"""A call of a fused chain, kept to run later calls that differ from it only in the values of the tensors.

Reading the modules of a chain, checking their tensors and looking up the plan takes 15 us, more than the batch norm
itself for a small input. A :class:`CachedCall` has the results of one call, and verifies in 2 us that another one would
have the same: the attributes of the modules are the same objects, and all tensors have the same metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_res import _torch_compat, functional
from fused_res.backends import registry
from fused_res.block.plan import Plan
from fused_res.dispatch.backend import Kernels
from fused_res.nn.snapshot import Attributes, attributes_are_current, read_attributes

#: The modules of a chain, as :func:`fused_res.nn.chain.run_fused` gets them -> its last call.
Calls = dict[Any, "CachedCall"]

_CONV = ("_parameters", "stride", "padding", "dilation", "groups", "padding_mode")
_NORM = ("_parameters", "_buffers", "training", "eps", "momentum", "track_running_stats")
_POOL = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")


class CachedCall:
    """The plan of one call and its tensors, with what they depended on.

    Args:
        attributes: attributes of the modules that the tensors and settings were read from.
        plan: the plan of the call.
        kernels: the backend's kernels.
        input: input of the call; only its metadata is kept.
        tensors, momentum: as of :func:`fused_res.functional.run_block`.
        counters: ``num_batches_tracked`` of the norms that count the batch.
    """

    __slots__ = (
        "_attributes",
        "_counters",
        "_kernels",
        "_momentum",
        "_plan",
        "_present",
        "_same",
        "_state",
        "_tensors",
    )

    def __init__(
        self,
        attributes: Attributes,
        plan: Plan,
        kernels: Kernels,
        input: Tensor,
        tensors: Sequence[Tensor | None],
        momentum: Sequence[float],
        counters: Sequence[Tensor],
    ) -> None:
        self._attributes, self._plan, self._kernels = attributes, plan, kernels
        self._tensors, self._momentum, self._counters = tensors, momentum, list(counters)
        self._present = [tensor for tensor in tensors if tensor is not None]
        self._same: Callable[..., bool] = _torch_compat.metadata_check([input, *self._present])
        self._state = _state()

    def run(self, input: Tensor) -> Tensor | None:
        """Return the output for `input`, or None if anything that the call depended on has changed.

        The caller has checked :func:`fused_res.nn.chain.unsupported_context`.
        """
        if (
            not attributes_are_current(self._attributes)
            or not self._same(input, *self._present)
            or self._state != _state()
        ):
            return None
        output = functional.run_planned_block(self._plan, self._kernels, input, self._tensors, self._momentum)
        if self._counters and not functional.is_recomputing():
            _torch_compat.foreach_add_(self._counters, 1)
        return output


def chain_attributes(units: Sequence[Any], pool: nn.Module | None) -> Attributes | None:
    """Return the attributes that a chain is read from; None if one may change without being replaced.

    Args:
        units: (convolution, norm, ...) modules, the projection included.
        pool: max pooling, or None.
    """
    found = read_attributes(_rows(units, pool))
    return None if any(type(value) is list for value in found[2]) else found


def _rows(units: Sequence[Any], pool: nn.Module | None) -> Iterator[tuple[dict[str, Any], Sequence[str]]]:
    for conv, norm, *_ in units:
        for module, names in ((conv, _CONV), (norm, _NORM)):
            state = module.__dict__
            yield state, [name for name in names if name in state]
            yield state["_parameters"], [*state["_parameters"]]
            yield state["_buffers"], [*state["_buffers"]]
    if pool is not None:
        yield pool.__dict__, _POOL


def _state() -> tuple[bool, int, bool]:
    """Return the settings that a plan depends on, besides the modules and tensors."""
    return torch.is_grad_enabled(), registry.defaults_version(), _torch_compat.mkldnn_enabled()
