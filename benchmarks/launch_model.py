"""From recorded launches to predicted ones: the model of PyTorch's, cuDNN's, torch.compile's and our own kernels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from benchmarks.events import Event, Gemm, Touch
from benchmarks.gpu_model import GEMM_STREAMING, ISSUE, Gpu, Product, Tile, Work, library_product, tile_time
from benchmarks.resources import Kernel, Resources

# --- Assumptions about PyTorch's kernels ---

#: Share of the streaming bandwidth that PyTorch's channels_last batch norm kernels reach: they access one element a
#: thread, 2 bytes in 16 bit. Derived: in float32 they reach 0.79 of a V100's data sheet bandwidth, 0.71 TB/s forward
#: and backward at 16x768x64x64 (pytorch/pytorch #60063), and 2-byte accesses have half as many bytes in flight.
_NATIVE_NORM_SHARE = 0.72
#: cuDNN's NHWC batch norm, which PyTorch selects in float16, not in bfloat16. An assumption.
_CUDNN_NORM_SHARE = 0.88
#: PyTorch's channels_last max pooling. An assumption: it accesses one 2-byte element a thread, and int64 indices.
_NATIVE_POOL_SHARE = 0.6
#: Warp instructions for each 32 elements of PyTorch's broadcasting operators, such as the addition of a channels_last
#: bias: every operand's offset is computed with divisions. *Fitted*: the bias of N 32, C 64, 56x56 takes 29.9 us.
_BROADCAST_INSTRUCTIONS = 100
#: Tensors that one launch of a multi-tensor (foreach) kernel covers; PyTorch: 110 tensor addresses per depth.
_FOREACH_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36}

# --- Assumptions about our kernels ---

#: Warp instructions for each 32 elements of the Triton max pooling kernels, which test nine taps for each element.
#: Counted in the source for one tap: about 25 forward, 35 backward (index arithmetic with divisions included).
_POOL_INSTRUCTIONS = {"max_pool_forward_kernel": 9 * 25, "max_pool_backward_kernel": 9 * 35}
#: Warp instructions for each 32 elements of an operand that a GEMM forms on load: conversions, two fused multiply-adds,
#: the ReLU, and the copy to shared memory. Counted in the source.
_FORMED_INSTRUCTIONS = 10
#: Shared memory wavefronts of the epilogue for each element of the output tile, by backend, without and with partial
#: statistics. CUDA C++: 2,800 wavefronts for 128x128 with statistics (estimated by reading epilogue.cuh); without,
#: float32 is written and read once. Triton: 16-bit values are written and read once; two reductions over rows.
_EPILOGUE_WAVEFRONTS = {"cuda": (1024 / 16384, 2800 / 16384), "triton": (512 / 16384, 900 / 16384)}
#: Share of a GEMM's shared memory that asynchronous copies are in flight to: of three stages, two, of which Triton
#: keeps a part for operands that it has formed.
_PIPELINE_IN_FLIGHT = 0.5
#: Share of cuDNN's rate that implicit GEMMs in Triton reach: 0.69 to 0.71 of it, FlagGems #5625 (fp16, H20).
_TRITON_IM2COL = 0.7


def _touches(event: Event) -> list[tuple[int, int]]:
    return [(touch.tensor, touch.bytes) for touch in (*event.reads, *event.writes)]


def _total(touches: Iterable[Touch]) -> int:
    return sum(touch.bytes for touch in touches)


def product_of(gemm: Gemm) -> Product:
    """Return the product that a library computes: fewer than 8 channels are padded to 8, a 16-byte access."""
    padded = max(gemm.channels, 8) / gemm.channels if gemm.channels and not gemm.pointwise else 1.0
    m, n, k = gemm.m, gemm.n, gemm.k
    if gemm.operation == "weight_gradient":
        n = math.ceil(n * padded)
    else:
        k = math.ceil(k * padded)
    return Product(m, n, k, gemm.groups, im2col=not gemm.pointwise)


def aten_works(event: Event, gpu: Gpu, norm: str = "native") -> list[Work]:
    """Return the launches of one PyTorch operator in eager mode.

    Args:
        event: the recorded call.
        gpu: the GPU, on which the tiles of a product depend.
        norm: ``"native"`` or ``"cudnn"``, the batch norm that PyTorch selects.
    """
    touches, name = _touches(event), event.kernel
    if event.gemm is not None:
        works = library_product(
            product_of(event.gemm), touches, _total(event.writes), gpu, f"{name} {event.gemm.operation}"
        )
        if name == "convolution" and len(event.reads) == 3:
            works.append(bias_work(event.writes[0]))
    elif name.startswith("_foreach"):
        works = _foreach(event)
    elif name in ("native_batch_norm", "native_batch_norm_backward"):
        works = _norm(event, norm)
    elif name.startswith("max_pool2d"):
        works = [Work(name, touches, bandwidth_share=_NATIVE_POOL_SHARE)]
        if name.endswith("backward"):
            works.insert(0, Work("fill", [(event.writes[0].tensor, event.writes[0].bytes)]))
    else:
        works = [Work(name, touches)]
    for work in works:
        work.source = event
    return works


def bias_work(output: Touch) -> Work:
    """Return PyTorch's addition of a bias to a channels_last 16-bit output, in place."""
    passes = [(output.tensor, output.bytes)] * 2
    return Work("bias", passes, instructions=_BROADCAST_INSTRUCTIONS * output.bytes / 2 / 32)


def _foreach(event: Event) -> list[Work]:
    depth = max(1, round((len(event.reads) + len(event.writes)) / max(1, len(event.writes))))
    launches = math.ceil(len(event.writes) / _FOREACH_TENSORS.get(depth, 36))
    touches = _touches(event)
    per = math.ceil(len(touches) / launches)
    return [Work(event.kernel, touches[at : at + per]) for at in range(0, len(touches), per)]


def _norm(event: Event, norm: str) -> list[Work]:
    share = _NATIVE_NORM_SHARE if norm == "native" else _CUDNN_NORM_SHARE
    large = [(t.tensor, t.bytes) for t in event.reads if t.bytes >= event.writes[0].bytes]
    small = [(t.tensor, t.bytes) for t in (*event.reads, *event.writes) if t.bytes < event.writes[0].bytes]
    output = (event.writes[0].tensor, event.writes[0].bytes)
    works = [
        Work(f"{event.kernel} reduction", [*large, *small], bandwidth_share=share),
        Work(f"{event.kernel} elementwise", [*large, output, *small], bandwidth_share=share),
    ]
    if norm == "native":  # running statistics; inverse standard deviation
        works.insert(1, Work(f"{event.kernel} statistics", small))
    return works


# --- torch.compile ---


def compiled_works(events: Sequence[Event], gpu: Gpu, results: Iterable[int] = ()) -> list[Work]:
    """Return the launches of torch.compile at its best, from the launches of the stock network.

    Convolutions, products and pooling are the libraries'. Elementwise operators are computed where they are used: in
    the reductions and the elementwise pass of a norm (as Inductor fuses them), or in a pass of their own before a
    convolution. A value with several users is written by the first of them. All passes reach the streaming bandwidth.

    Args:
        events: the recorded launches of the stock network.
        gpu: the GPU.
        results: tensors that must be in memory at the end, besides those that no event reads.
    """
    return _Fusion(events, gpu, results).run()


#: Operators that Inductor fuses into their consumers.
_ELEMENTWISE = {
    "add_",
    "add",
    "relu_",
    "threshold_backward",
    "_to_copy",
    "div",
    "mul",
    "copy_",
    "clone",
    "batch_norm_inference",
}


class _Fusion:
    def __init__(self, events: Sequence[Event], gpu: Gpu, results: Iterable[int]) -> None:
        self.events, self.gpu, self.results = events, gpu, set(results)
        self.works: list[Work] = []
        self.version: dict[int, int] = {}  # storage -> its current value
        self.values = 0
        self.lazy: dict[
            int, dict[int, int]
        ] = {}  # value that is not in memory -> bytes of the values that it is computed from
        self.size: dict[int, int] = {}
        self.users: dict[int, int] = {}

    def run(self) -> list[Work]:
        trace = [self._resolve(event) for event in self.events]
        self.results = {self.version[tensor] for tensor in self.results}
        for _, reads, _ in trace:
            for value in reads:
                self.users[value] = self.users.get(value, 0) + 1
        for event, reads, writes in trace:
            self._step(event, reads, writes)
        return self.works

    def _resolve(self, event: Event) -> tuple[Event, dict[int, int], dict[int, int]]:
        """Return an event with the values that it reads and writes, and their bytes; in-place writes are new values."""
        reads = {self._value(t): t.bytes for t in event.reads}
        writes = {}
        for touch in event.writes:
            self.values += 1
            self.version[touch.tensor] = self.values
            writes[self.values] = touch.bytes
        self.size |= reads | writes
        return event, reads, writes

    def _value(self, touch: Touch) -> int:
        if touch.tensor not in self.version:
            self.values += 1
            self.version[touch.tensor] = self.values
        return self.version[touch.tensor]

    def _leaves(self, reads: dict[int, int]) -> dict[int, int]:
        leaves: dict[int, int] = {}
        for value, size in reads.items():
            leaves |= self.lazy.get(value, {value: size})
        return leaves

    def _emit(self, name: str, reads: dict[int, int], writes: dict[int, int], event: Event) -> None:
        self.works.append(Work(name, [*reads.items(), *writes.items()], owner="inductor", source=event))

    def _shared(self, reads: dict[int, int]) -> dict[int, int]:
        """Return the lazy operands that later events use too; the current launch writes them."""
        shared = {v: self.size[v] for v in reads if v in self.lazy and self.users.get(v, 0) > 1}
        for value in shared:
            del self.lazy[value]
        return shared

    def _materialize(self, reads: dict[int, int], event: Event) -> None:
        for value in [v for v in reads if v in self.lazy]:
            self._emit("elementwise", self.lazy.pop(value), {value: self.size[value]}, event)

    def _write_result(self, value: int, event: Event) -> None:
        """Write a result of the program, such as a gradient or a running statistic."""
        if value in self.results or not self.users.get(value):
            self._materialize({value: self.size[value]}, event)

    def _step(self, event: Event, reads: dict[int, int], writes: dict[int, int]) -> None:
        name = event.kernel
        if name in ("native_batch_norm", "native_batch_norm_backward"):
            largest = max(writes.values())
            leaves, shared = self._leaves(reads), self._shared(reads)
            self._emit(f"{name} reduction", leaves, shared, event)
            small = {v: size for v, size in (reads | writes).items() if size < largest}
            self._emit(f"{name} second stage", small, {}, event)
            output = next(v for v, size in writes.items() if size == largest)
            # Written once, by the elementwise pass into which the following operators are fused.
            self.lazy[output] = self._leaves(reads)
            self._write_result(output, event)
        elif name in _ELEMENTWISE:
            leaves = self._leaves(reads)
            for value in writes:
                self.lazy[value] = leaves
                self._write_result(value, event)
        else:
            self._materialize(reads, event)
            reads_now, writes_now = ([Touch(*one) for one in values.items()] for values in (reads, writes))
            self.works += aten_works(replace(event, reads=reads_now, writes=writes_now), self.gpu)


# --- Our kernels ---


def our_works(event: Event, gpu: Gpu, resources: Resources) -> Work:
    """Return the launch of one of our kernels."""
    kernel = resources.of(event)
    work = Work(kernel.name, _touches(event), event.blocks, kernel.resident_blocks(gpu), owner="ours", source=event)
    if event.gemm is not None and event.tile is not None:
        work.flops = event.gemm.flops
        seconds, work.math_bound = _block_time(event, kernel, gpu)
        work.math_time = math.ceil(event.blocks / gpu.multiprocessors) * seconds
        work.bandwidth_share = GEMM_STREAMING
        work.in_flight = int(_PIPELINE_IN_FLIGHT * kernel.shared)
    if event.backend == "triton":
        # Elements are the largest tensor's, the input's backward and the output's forward.
        sizes = sorted((touch.bytes for touch in event.reads), reverse=True)
        elements = sizes[0 if "backward" in kernel.name else 1] // 2 if kernel.name in _POOL_INSTRUCTIONS else 0
        work.instructions = _POOL_INSTRUCTIONS.get(kernel.name, 0) * elements / 32
    return work


def _block_time(event: Event, kernel: Kernel, gpu: Gpu) -> tuple[float, str]:
    """Return the seconds of an SM for one block of a GEMM kernel of ours, and what bounds it."""
    assert event.gemm is not None and event.tile is not None
    gemm, tile = event.gemm, Tile(*event.tile)
    depth = math.ceil(gemm.k / _splits(event))
    if not gemm.pointwise:  # K blocks do not cross taps
        taps = gemm.k // gemm.channels
        depth = math.ceil(taps * math.ceil(gemm.channels / tile.k) * tile.k / _splits(event))
    seconds, bound = tile_time(tile, depth, gpu, im2col=not gemm.pointwise)
    seconds /= kernel.matrix_share(gpu)
    if event.backend == "triton" and not gemm.pointwise:
        seconds /= _TRITON_IM2COL
    formed = sum(size * depth for size, is_formed in zip((tile.m, tile.n), event.formed, strict=True) if is_formed)
    forming = _FORMED_INSTRUCTIONS * formed / 32 / ISSUE / gpu.clock
    if forming > seconds:
        seconds, bound = forming, "issue"
    wavefronts = _EPILOGUE_WAVEFRONTS[event.backend][event.statistics] * tile.m * tile.n
    return seconds + wavefronts / gpu.clock, bound


def _splits(event: Event) -> int:
    """Return the number of splits of K: the last dimension of the grid."""
    if event.gemm is not None and event.gemm.operation == "input_gradient":
        return 1
    return max(1, event.grid[-1] if len(event.grid) > 1 else 1)


def works_of(events: Iterable[Event], gpu: Gpu, resources: Resources | None = None, norm: str = "native") -> list[Work]:
    """Return the launches of recorded events in eager mode, or in a graph of the same launches."""
    works: list[Work] = []
    for event in events:
        if event.backend == "aten":
            works += aten_works(event, gpu, norm)
        else:
            assert resources is not None
            works.append(our_works(event, gpu, resources))
    return works
