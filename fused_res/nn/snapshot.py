"""Snapshots of modules' attributes and tensors, to detect every change since a value was derived from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fused_res import _extension

#: Columns of equal length: dictionary, key and value.
Attributes = tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]
#: Columns of equal length: tensor, alias, version and data pointer. The alias keeps the memory allocated, so that new
#: memory cannot have the same address, and holds the shape, strides and dtype of the time of the snapshot.
Tensors = tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[int, ...], tuple[int, ...]]


class Snapshot:
    """Values of dictionaries, such as a module's ``_parameters``, and the memory and version of tensors.

    :meth:`is_current` detects a value that was replaced and a tensor with other memory, another shape, strides or
    dtype, or a write that PyTorch counts in ``Tensor._version``. Writes that PyTorch does not count are not detected:
    through ``Tensor.data``, ``numpy()`` or a raw pointer, and to tensors created in inference mode.

    Args:
        attributes: (dictionary, keys) pairs; values are compared by identity, and those that are tensors also by
            memory and version.

    Raises:
        KeyError: a dictionary lacks a key.
        RuntimeError: a tensor has no storage.
    """

    __slots__ = ("_attributes", "_tensors")

    def __init__(self, attributes: Iterable[tuple[Mapping[str, Any], tuple[str, ...]]]) -> None:
        self._attributes = read_attributes(attributes)
        tensors = [value for value in self._attributes[2] if isinstance(value, Tensor)]
        # The aliases first: a write that comes after the version was read is detected.
        aliases = tuple([tensor.detach() for tensor in tensors])
        versions = tuple([_version(tensor) for tensor in tensors])
        self._tensors: Tensors = (tuple(tensors), aliases, versions, tuple([t.data_ptr() for t in aliases]))

    @classmethod
    def join(cls, snapshots: Iterable[Snapshot]) -> Snapshot:
        """Return one snapshot of everything that `snapshots` contain."""
        joined, parts = cls(()), list(snapshots)
        joined._attributes = _concatenate([part._attributes for part in parts], joined._attributes)
        joined._tensors = _concatenate([part._tensors for part in parts], joined._tensors)
        return joined

    def is_current(self, refuse_grad: bool = False) -> bool:
        """Return whether nothing has changed.

        Args:
            refuse_grad: whether to return False also if a tensor requires a gradient.
        """
        return _is_current(self._attributes, self._tensors, refuse_grad)

    def requires_grad(self) -> bool:
        """Return whether a tensor requires a gradient."""
        return any(tensor.requires_grad for tensor in self._tensors[0])


def read_attributes(attributes: Iterable[tuple[Mapping[str, Any], Iterable[str]]]) -> Attributes:
    """Return the values of (dictionary, keys) pairs as columns."""
    rows = [(dictionary, key, dictionary[key]) for dictionary, keys in attributes for key in keys]
    states, keys, values = (tuple([row[column] for row in rows]) for column in range(3))
    return states, keys, values


def attributes_are_current(attributes: Attributes) -> bool:
    """Return whether all values are the same objects."""
    return _is_current(attributes, _NO_TENSORS, False)


_NO_TENSORS: Tensors = ((), (), (), ())


def _concatenate(tables: list[Any], empty: Any) -> Any:
    return tuple(tuple([value for part in column for value in part]) for column in zip(empty, *tables, strict=True))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _data_pointer(tensor: Tensor) -> int | None:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # no storage, for example a sparse tensor that torch.utils.swap_tensors has put here
        return None


_MISSING = object()


def _is_current_in_python(attributes: Attributes, tensors: Tensors, refuse_grad: bool) -> bool:
    for dictionary, key, value in zip(*attributes, strict=True):
        if dictionary.get(key, _MISSING) is not value:
            return False
    for tensor, alias, version, pointer in zip(*tensors, strict=True):
        if (
            _version(tensor) != version
            or _data_pointer(tensor) != pointer
            or tensor.dtype != alias.dtype
            or tensor.shape != alias.shape
            or tensor.stride() != alias.stride()
            or (refuse_grad and tensor.requires_grad)
        ):
            return False
    return True


# For ResNet-50's 53 layers the check takes 23 us in C++ (csrc/snapshot.cpp), and ten times as long or more in Python.
_is_current = _extension.cpp.snapshot_is_current if _extension.loaded else _is_current_in_python
