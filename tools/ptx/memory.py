"""Global and shared memory with checked accesses: bounds, alignment, write conflicts, races, cp.async."""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np
import torch

from tools.ptx.numerics import Array


class Fault(Exception):
    """Undefined behavior, a race or a deadlock that a GPU would not report, or an error that it would abort with.

    Args:
        message: the reason.
        lane: index of the thread among those of all resident CTAs, or None.
    """

    def __init__(self, message: str, lane: int | None = None) -> None:
        super().__init__(message)
        self.lane = lane


def _cells(data: Array, offset: int, width: int) -> Array:
    """Return a view of raw memory as items of ``width`` bytes, from ``offset`` on."""
    count = (data.size - offset) // width
    return data[offset : offset + count * width].view(f"V{width}")


class Memory:
    """Global memory: buffers at 64-bit addresses, each surrounded by unmapped addresses."""

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._arrays: list[tuple[Array, bool]] = []
        self._next = 0x7F00_0000_0000

    def map_buffer(self, values: Array | torch.Tensor, address: int | None = None, readonly: bool = False) -> int:
        """Map the memory of `values`, without a copy, and return its address.

        Two views of one array can be mapped at two addresses. Strided tensors are mapped from their first to their last
        element.

        Args:
            values: a contiguous array, or a tensor.
            address: the address; by default a free one with the alignment that the memory really has, up to 256 bytes.
            readonly: whether stores are faults.

        Raises:
            ValueError: the address range overlaps another buffer.
        """
        data = _bytes(values)
        if address is None:
            address = self._next + data.ctypes.data % 256
            self._next = (address + data.size + 4096) // 256 * 256
        position = bisect.bisect(self._bases, address)
        following = self._bases[position] if position < len(self._bases) else 1 << 64
        if address + data.size > following or (position and self._end(position - 1) > address):
            raise ValueError(f"address: {address:#x} is already mapped")
        self._bases.insert(position, address)
        self._arrays.insert(position, (data, readonly))
        return address

    def _end(self, position: int) -> int:
        return self._bases[position] + self._arrays[position][0].size

    def _split_by_allocation(
        self, addresses: Array, width: int, lanes: Array, write: bool
    ) -> list[tuple[Any, Array, Array]]:
        """Check an access and split it by buffer.

        Returns:
            For each buffer: the selected accesses, the buffer's cells of `width` bytes, and the cell of each access.
        """
        if (misaligned := addresses & np.uint64(width - 1)).any():
            one = int(np.flatnonzero(misaligned)[0])
            raise Fault(f"misaligned {width}-byte access at {int(addresses[one]):#x}", lanes[one])
        first = bisect.bisect(self._bases, int(addresses.min())) - 1
        if first >= 0 and int(addresses.max()) + width <= self._end(first):
            return [(slice(None), *self._index(first, addresses, width, lanes, write))]
        ends = np.array([0, *map(self._end, range(len(self._bases)))], "u8")
        owner = np.searchsorted(np.array(self._bases, "u8"), addresses, side="right")
        outside = addresses + np.uint64(width) > ends[owner]
        if outside.any():
            one = int(np.flatnonzero(outside)[0])
            raise Fault(f"{width}-byte access at {self._describe(int(addresses[one]))}", lanes[one])
        chosen = [(int(one), np.flatnonzero(owner == one)) for one in np.unique(owner)]
        return [(part, *self._index(one - 1, addresses[part], width, lanes[part], write)) for one, part in chosen]

    def _index(self, position: int, addresses: Array, width: int, lanes: Array, write: bool) -> tuple[Array, Array]:
        base, (data, readonly) = self._bases[position], self._arrays[position]
        if write and readonly:
            raise Fault(f"store to read-only memory at {int(addresses[0]):#x}", lanes[0])
        start = -base % width
        return _cells(data, start, width), ((addresses - np.uint64(base + start)) // np.uint64(width)).astype("i8")

    def _describe(self, address: int) -> str:
        if not self._bases:
            return f"{address:#x}, and nothing is allocated"
        ends = [self._end(position) for position in range(len(self._bases))]
        distances = [max(base - address, address - end) for base, end in zip(self._bases, ends, strict=True)]
        near = int(np.argmin(distances))
        return (
            f"{address:#x} is outside of every allocation;"
            f" it is at byte {address - self._bases[near]:+} of the nearest one, of {self._arrays[near][0].size} bytes"
        )

    def load(self, addresses: Array, width: int, lanes: Array) -> Array:
        result = np.empty(len(addresses), f"V{width}")
        for part, cells, index in self._split_by_allocation(addresses, width, lanes, write=False):
            result[part] = cells[index]
        return result

    def store(self, addresses: Array, values: Array, lanes: Array) -> None:
        for part, cells, index in self._split_by_allocation(addresses, values.itemsize, lanes, write=True):
            cells[index] = values[part]
            _check_write_conflict(cells[index], values[part], lanes[part])


def _check_write_conflict(stored: Array, values: Array, lanes: Array) -> None:
    """Raise a fault if memory does not hold what each thread stored."""
    width = values.itemsize
    differ = (stored.view("u1") != np.ascontiguousarray(values).view("u1")).reshape(-1, width).any(1)
    if differ.any():
        raise Fault("two threads store different values to one address", lanes[int(np.flatnonzero(differ)[0])])


def _bytes(values: Array | torch.Tensor) -> Array:
    if isinstance(values, torch.Tensor):
        values = values.detach()
        extent = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, values.stride(), strict=True))
        flat = values.as_strided((extent if values.numel() else 0,), (1,), values.storage_offset())
        return flat.view(torch.uint8).numpy()
    return values.reshape(-1).view("u1")


class SharedMemory:
    """The shared memory of several CTAs, initialized with NaN, with a race detector.

    Conflicting accesses of two warps to one byte without a barrier in between are faults. A write that does not change
    the value, as when several warps store the same one, is no conflict.

    Args:
        ctas: number of CTAs.
        size: bytes of shared memory per CTA.
        cta_of, warp_of: CTA and warp of each lane.
    """

    _SEVERAL_WARPS = 62  # warp id that stands for several readers

    def __init__(self, ctas: int, size: int, cta_of: Array, warp_of: Array) -> None:
        self._size, self._stride = size, -(-size // 16) * 16
        self._data = np.full(ctas * self._stride, 0xFF, "u1")
        self._cta, self._warp = cta_of, warp_of
        self._tracked = bool(warp_of.size) and int(warp_of.max()) > 0
        self._epochs = np.ones(ctas, "i4")
        # The last writer and reader of each byte: epoch * 64 + warp.
        self._writers = np.zeros(self._data.size if self._tracked else 0, "i4")
        self._readers = np.zeros_like(self._writers)

    def barrier(self, ctas: Array) -> None:
        """Start a new epoch: earlier accesses of these CTAs do not conflict with later ones."""
        self._epochs[ctas] += 1

    def _index(self, addresses: Array, width: int, lanes: Array) -> Array:
        addresses = addresses.astype("i8")
        misaligned = addresses & (width - 1) != 0
        bad = misaligned | (addresses < 0) | (addresses + width > self._size)
        if bad.any():
            one = int(np.flatnonzero(bad)[0])
            problem = "is misaligned" if misaligned[one] else f"is outside of the CTA's {self._size} bytes"
            raise Fault(f"{width}-byte access to shared memory at {addresses[one]} {problem}", lanes[one])
        return addresses + self._cta[lanes] * self._stride

    def _tags(self, index: Array, width: int, lanes: Array) -> tuple[Array, Array]:
        tags = self._epochs[self._cta[lanes]] * 64 + self._warp[lanes]
        return index[:, None] + np.arange(width), np.broadcast_to(tags[:, None], (len(tags), width))

    def _check_race(self, previous: Array, tags: Array, lanes: Array, what: str) -> None:
        conflict = (previous >> 6 == tags >> 6) & (previous != tags)
        if conflict.any():
            row, column = map(int, np.argwhere(conflict)[0])
            other = int(previous[row, column]) & 63
            warps = "several warps" if other == self._SEVERAL_WARPS else f"warp {other}"
            used = "read" if what == "overwrites" else "written"
            raise Fault(f"race: {what} shared memory {used} by {warps}, with no barrier in between", lanes[row])

    def load(self, addresses: Array, width: int, lanes: Array) -> Array:
        index = self._index(addresses, width, lanes)
        if self._tracked:
            byte_indices, tags = self._tags(index, width, lanes)
            self._check_race(self._writers[byte_indices], tags, lanes, "reads")
            before = self._readers[byte_indices]
            shared = (before >> 6 == tags >> 6) & (before != tags)
            self._readers[byte_indices] = np.where(shared, tags >> 6 << 6 | self._SEVERAL_WARPS, tags)
            # Of several readers in this access, the assignment has kept one per byte: mark their bytes too.
            lost = self._readers[byte_indices] != tags
            self._readers[byte_indices[lost]] = tags[lost] >> 6 << 6 | self._SEVERAL_WARPS
        return self._data.view(f"V{width}")[index // width]

    def store(self, addresses: Array, values: Array, lanes: Array, poison: bool = False) -> None:
        """Store values, or NaN with ``poison``, for a copy in flight."""
        width = values.itemsize
        index = self._index(addresses, width, lanes)
        cells = self._data.view(f"V{width}")
        if poison:
            values = np.full(len(lanes) * width, 0xFF, "u1").view(f"V{width}")
        if self._tracked:
            old, new = (
                np.ascontiguousarray(one).view("u1").reshape(-1, width) for one in (cells[index // width], values)
            )
            changed = (old != new) | poison
            byte_indices, tags = self._tags(index, width, lanes)
            rows = np.broadcast_to(np.arange(len(lanes))[:, None], changed.shape)[changed]
            byte_indices, tags = byte_indices[changed][:, None], tags[changed][:, None]
            self._check_race(self._writers[byte_indices], tags, lanes[rows], "writes")
            self._check_race(self._readers[byte_indices], tags, lanes[rows], "overwrites")
            self._writers[byte_indices] = tags
        cells[index // width] = values
        _check_write_conflict(cells[index // width], values, lanes)


class AsyncCopies:
    """``cp.async``: shared memory holds NaN while a copy is in flight, and the data after the matching wait."""

    def __init__(self, lanes: int, shared: SharedMemory) -> None:
        self._shared = shared
        self._committed = np.zeros(lanes, "i8")
        self._pending: list[tuple[Array, Array, Array, Array]] = []  # lanes, their groups, addresses, values

    def issue(self, addresses: Array, values: Array, lanes: Array) -> None:
        self._shared.store(addresses, values, lanes, poison=True)
        self._pending.append((lanes, self._committed[lanes], addresses, values))

    def commit(self, active: Array) -> None:
        self._committed[active] += 1

    def wait(self, active: Array, groups: int) -> None:
        """Complete all but the last ``groups`` committed groups of the active threads; -1: uncommitted copies too."""
        remaining = []
        for lanes, group, addresses, values in self._pending:
            complete = active[lanes] & (group < self._committed[lanes] - groups)
            if complete.any():
                self._shared.store(addresses[complete], values[complete], lanes[complete])
            if not complete.all():
                remaining.append((lanes[~complete], group[~complete], addresses[~complete], values[~complete]))
        self._pending = remaining


def pack_argument(value: Any, type_: str, size: int) -> bytes:
    """Return the bytes of a kernel argument in parameter memory."""
    if isinstance(value, bytes):
        return value
    if type_ in ("f32", "f64"):
        return np.array(value, f"f{size}").tobytes()
    return (int(value) % (1 << 8 * size)).to_bytes(size, "little")
