"""A call of a fused operator, kept to run later calls that differ from it only in the values of the tensors.

Reading the modules, checking their tensors and looking up the plan takes 15 us, more than the batch norm
itself for a small input. A :class:`CachedCall` has the results of one call, and verifies in 2 us that another one would
have the same: the attributes of the modules are the same objects, and all tensors have the same metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_res import _torch_compat, functional
from fused_res.backends import registry
from fused_res.nn.snapshot import Attributes, attributes_are_current, read_attributes

#: The modules and options of an operator, as a function of :mod:`fused_res.nn.chain` gets them -> its last call.
Calls = dict[Any, "CachedCall"]

_ATTRIBUTES = (
    *("_parameters", "_buffers", "training", "eps", "momentum", "track_running_stats"),
    *("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size", "return_indices", "ceil_mode"),
)


class CachedCall:
    """A call of a fused operator with what its results depended on, apart from the values of tensors.

    Args:
        attributes: attributes of the modules that the tensors and settings were read from.
        operands: the input, and the residual if there is one; only their metadata is kept.
        tensors: tensors of the modules.
        counters: ``num_batches_tracked`` of the norms that count the batch.
        function: computes the output from the operands.
    """

    __slots__ = ("_attributes", "_counters", "_function", "_present", "_same", "_state")

    def __init__(
        self,
        attributes: Attributes,
        operands: Sequence[Tensor],
        tensors: Sequence[Tensor | None],
        counters: Sequence[Tensor],
        function: Callable[..., Tensor],
    ) -> None:
        self._attributes, self._counters, self._function = attributes, list(counters), function
        self._present = [tensor for tensor in tensors if tensor is not None]
        self._same: Callable[..., bool] = _torch_compat.metadata_check([*operands, *self._present])
        self._state = _state()

    def run(self, *operands: Tensor) -> Tensor | None:
        """Return the output for `operands`, or None if anything that the call depended on has changed.

        The caller has checked :func:`fused_res.nn.chain.unsupported_context`.
        """
        if (
            not attributes_are_current(self._attributes)
            or not self._same(*operands, *self._present)
            or self._state != _state()
        ):
            return None
        output = self._function(*operands)
        if self._counters and not functional.is_recomputing():
            _torch_compat.foreach_add_(self._counters, 1)
        return output


def read_modules(modules: Iterable[nn.Module]) -> Attributes | None:
    """Return the attributes that an operator is read from; None if one may change without being replaced.

    Args:
        modules: convolutions, norms and poolings.
    """
    found = read_attributes(row for module in modules for row in _rows(module.__dict__))
    return None if any(type(value) is list for value in found[2]) else found


def _rows(state: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Iterable[str]]]:
    yield state, [name for name in _ATTRIBUTES if name in state]
    yield state["_parameters"], state["_parameters"].keys()
    yield state["_buffers"], state["_buffers"].keys()


def _state() -> tuple[bool, int, bool]:
    """Return the settings that a plan depends on, besides the modules and tensors."""
    return torch.is_grad_enabled(), registry.defaults_version(), _torch_compat.mkldnn_enabled()
