"""Analytical time of GPU launches: the longest of memory, tensor core, shared memory and issue time, plus overheads.

Every constant is an assumption with its source next to it. Those marked *fitted* were adjusted to published timings of
others' kernels; :mod:`benchmarks.published` lists these timings and those that were held out, and the tests compare
both with the model. No timing of our own kernels was available, so none was used.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks.devices import DEVICES, Device


@dataclass(frozen=True)
class Gpu:
    """Data of one GPU.

    Args:
        peak: data sheet rates.
        multiprocessors: number of multiprocessors (SMs).
        clock: SM clock under load, Hz.
        streaming: share of the data sheet's bandwidth that a large streaming kernel reaches.
        l2_bandwidth: bytes/s between the L2 cache and the SMs.
        capability: compute capability, 80 or 90.
        sustained: share of the tensor cores' peak that a large product reaches with its operands in shared memory; the
            rest is lost to the power limit and to the pipeline.
    """

    peak: Device
    multiprocessors: int
    clock: float
    streaming: float
    l2_bandwidth: float
    capability: int
    sustained: float

    @property
    def bandwidth(self) -> float:
        """Bytes/s of device memory that a large streaming kernel reaches."""
        return self.peak.bandwidth * self.streaming

    @property
    def tensor_rate(self) -> float:
        """FLOP/s of one SM's tensor cores, sustained."""
        return self.peak.half / self.multiprocessors * self.sustained

    @property
    def hopper(self) -> bool:
        return self.capability >= 90


_H100_PCIE = Device("H100 PCIe", 2.04e12, 756e12, 378e12, 51.2e12, 50 << 20, "NVIDIA H100 PCIe datasheet")
_H20 = Device("H20 141 GB", 4.8e12, 148e12, 74e12, 44e12, 60 << 20, "NVIDIA H20 (H20-3e) data sheet rates")
GPUS = {
    # 4.41 TB/s in cub::DeviceTransform (NVIDIA/cccl #6921). On a machine of the kind that `make gpu` is for, PyTorch
    # reported 60 MB of L2, nvidia-smi 1.98 GHz after a product of 8192^3 in bf16, which ran at 788 TFLOP/s.
    "h200": Gpu(replace(DEVICES["h200"], l2=60 << 20), 132, 1.9e9, 0.918, 5.7e12, 90, 0.80),
    "h100": Gpu(DEVICES["h100"], 132, 1.755e9, 0.918, 5.7e12, 90, 0.79),
    "h100-pcie": Gpu(_H100_PCIE, 114, 1.62e9, 0.918, 4.5e12, 90, 0.79),
    "h20": Gpu(_H20, 78, 1.83e9, 0.885, 4.2e12, 90, 0.95),
    "a100": Gpu(DEVICES["a100"], 108, 1.41e9, 0.88, 4.0e12, 80, 0.85),
}

# --- Assumptions ---

#: Seconds between the starts of two dependent empty kernels in a stream or graph (NVIDIA/cccl #7391, "Batch GPU").
LAUNCH = 2.0e-6
#: Additional seconds of a launch that is timed alone by CUDA events (an empty kernel: 4.3 us, NVIDIA/cccl #5122).
ISOLATED = 2.3e-6
#: Seconds until a streaming kernel has its bandwidth, for a kernel that moves `_RAMP_BYTES` or more: page walks, the
#: first loads' latency, the last blocks. Smaller kernels leave their output in the L2 cache. *Fitted*: cccl #6921.
_RAMP, _RAMP_BYTES = 3.0e-6, 50 << 20
#: Share of the L2 cache that one kernel's output can occupy when the next one reads it. An assumption: half of the
#: cache is nearer to each half of the SMs, and other operands pass through it.
L2_SHARE = 0.6
#: Bytes that an SM must have in flight for full bandwidth: 4.4 TB/s * 0.9 us / 132 (Little's law).
_IN_FLIGHT = 30 << 10
#: Bytes in flight of a block of a streaming kernel: 256 threads with four 16-byte loads.
_BLOCK_IN_FLIGHT = 16 << 10
#: Bytes that one SM's shared memory transfers per clock.
_SHARED_PER_CLOCK = 128
#: Seconds to fill a GEMM's pipeline and to write its last tile: two latencies of device memory.
_PIPELINE = 1.6e-6
#: Share of its GEMM rate that an implicit GEMM with im2col addressing reaches. *Fitted*: cuDNN 3x3, C 64, 56x56, N 32.
_IM2COL = 0.60
#: Share of the streaming bandwidth at which a GEMM moves its operands: loads and stores alternate, and each tile's
#: epilogue waits for its main loop. *Fitted*: ResNet-50 inference on an A100.
GEMM_STREAMING = 0.85
#: Exponent of the norm that adds the times of a GEMM's resources: infinity would be perfect overlap, 1 none. *Fitted*:
#: ResNet-50 inference on an A100. Two resources of equal time take 1.19 times as long.
_OVERLAP = 4
#: Issue slots of an SM: warp instructions per clock.
ISSUE = 4


@dataclass
class Work:
    """What one launch does.

    Args:
        name: kernel.
        touches: tensor and bytes of every pass over a tensor.
        blocks: number of thread blocks; 0: as many as are needed.
        resident: blocks of this kernel that fit on an SM.
        flops: tensor core FLOPs.
        math_time: seconds that the SM with the most work spends in its tensor cores or shared memory; a function of the
            GPU, because it includes the quantization to tiles.
        instructions: warp instructions of the launch, where they may be the limit.
        bandwidth_share: share of the streaming bandwidth that this kernel's accesses reach.
        in_flight: bytes that a block has in flight.
        owner: who wrote the kernel: "ours", "cudnn", "pytorch", "inductor".
        source: the recorded event, for tables.
    """

    name: str
    touches: list[tuple[int, int]]
    blocks: int = 0
    resident: int = 1
    flops: float = 0.0
    math_time: float = 0.0
    math_bound: str = "tensor cores"
    instructions: float = 0.0
    bandwidth_share: float = 1.0
    in_flight: int = _BLOCK_IN_FLIGHT
    owner: str = "pytorch"
    source: object = None

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.touches)


@dataclass(frozen=True)
class Prediction:
    """Predicted time of one launch in a stream of launches."""

    work: Work
    seconds: float
    bound: str  # "memory", "L2", "tensor cores", "shared memory", "issue" or "launch"
    device_bytes: int  # bytes that move between device memory and the L2 cache
    waves: float
    wave_efficiency: float


class Cache:
    """The L2 cache: the tensors that are resident as a whole, least recently used first."""

    def __init__(self, gpu: Gpu) -> None:
        self.capacity = int(gpu.peak.l2 * L2_SHARE)
        self._resident: OrderedDict[int, int] = OrderedDict()

    def misses(self, touches: Iterable[tuple[int, int]]) -> int:
        """Return the bytes of passes that device memory serves, and update the cache."""
        missed = 0
        # A kernel's small tensors (partial statistics) are written or read last: the large ones do not evict them.
        for tensor, size in sorted(touches, key=lambda touch: -touch[1]):
            if self._resident.pop(tensor, 0) < size:
                missed += size
            if size <= self.capacity:
                self._resident[tensor] = size
            else:
                self._resident.clear()
            while sum(self._resident.values()) > self.capacity:
                self._resident.popitem(last=False)
        return missed


def predict(work: Work, gpu: Gpu, cache: Cache | None = None) -> Prediction:
    """Return the predicted time of one launch; without a cache, no tensor is resident in L2."""
    missed = (cache or Cache(gpu)).misses(work.touches)
    share = work.bandwidth_share
    if work.blocks > 0:
        in_flight = min(work.blocks / gpu.multiprocessors, work.resident) * work.in_flight
        share *= min(1.0, in_flight / _IN_FLIGHT)
    ramp = _RAMP * min(1.0, missed / _RAMP_BYTES)
    times = {
        "memory": missed / (gpu.bandwidth * share) + ramp,
        "L2": work.bytes / (gpu.l2_bandwidth * share),
        work.math_bound: work.math_time,
        "issue": work.instructions / (gpu.multiprocessors * ISSUE * gpu.clock),
    }
    bound = max(times, key=times.__getitem__)
    longest = times[bound]
    if work.math_time:  # main loop and memory overlap imperfectly
        longest *= sum((one / longest) ** _OVERLAP for one in times.values()) ** (1 / _OVERLAP)
    seconds = longest + LAUNCH
    slots = gpu.multiprocessors * work.resident
    waves = work.blocks / slots
    efficiency = waves / math.ceil(waves) if waves > 0 else 1.0
    return Prediction(work, seconds, "launch" if longest < LAUNCH else bound, missed, waves, efficiency)


def predict_all(works: Sequence[Work], gpu: Gpu) -> list[Prediction]:
    """Predict consecutive launches, with the L2 cache's contents carried from one to the next."""
    cache = Cache(gpu)
    return [predict(work, gpu, cache) for work in works]


# --- Matrix products ---


@dataclass(frozen=True)
class Tile:
    """Output tile of a GEMM kernel's thread block: rows, columns, depth of a pipeline stage, blocks on one SM."""

    m: int
    n: int
    k: int = 64
    resident: int = 1


#: Tiles that a library chooses from; cuDNN's and cuBLAS's kernels are named after them.
LIBRARY_TILES = tuple(
    Tile(m, n) for m, n in ((128, 256), (256, 128), (128, 128), (256, 64), (64, 256), (128, 64), (64, 128), (64, 64))
)


@dataclass(frozen=True)
class Product:
    """``groups`` products of ``m x n x k``, with K split in ``splits``."""

    m: int
    n: int
    k: int
    groups: int = 1
    im2col: bool = False


def tile_time(tile: Tile, depth: int, gpu: Gpu, im2col: bool) -> tuple[float, str]:
    """Return the seconds that one SM needs for one output tile with ``depth`` along K, and what bounds it.

    The tensor cores read both operands from shared memory (wgmma reads A once per 64 rows and B once per warp group of
    64 rows; mma.sync reads fragments of 64 x 64 warp tiles), and the loads write them there.
    """
    steps = math.ceil(depth / tile.k)
    flops = 2 * tile.m * tile.n * tile.k
    math_seconds = flops / gpu.tensor_rate
    rows = max(1, tile.m // 64)
    columns = 1 if gpu.hopper else max(1, tile.n // 64)
    operand_bytes = 2 * tile.k * (tile.m * columns + tile.n * rows + tile.m + tile.n)
    shared_seconds = operand_bytes / (_SHARED_PER_CLOCK * gpu.clock)
    factor = _IM2COL if im2col else 1.0
    bound = "tensor cores" if math_seconds >= shared_seconds else "shared memory"
    return steps * max(math_seconds, shared_seconds) / factor, bound


def product_time(product: Product, tile: Tile, splits: int, gpu: Gpu) -> tuple[float, str, int]:
    """Return seconds in the main loops of the busiest SM, what bounds it, and the number of blocks."""
    blocks = math.ceil(product.m / tile.m) * math.ceil(product.n / tile.n) * product.groups * splits
    seconds, bound = tile_time(tile, math.ceil(product.k / splits), gpu, product.im2col)
    return math.ceil(blocks / gpu.multiprocessors) * seconds + _PIPELINE, bound, blocks


def library_product(
    product: Product,
    touches: list[tuple[int, int]],
    output_bytes: int,
    gpu: Gpu,
    name: str = "gemm",
    owner: str = "cudnn",
) -> list[Work]:
    """Return the launches of a library's product with the fastest of its tiles and numbers of splits.

    With split-K, the partial accumulators are written in float32 and reduced by a second launch.
    """
    candidates = []
    for tile in LIBRARY_TILES:
        blocks = math.ceil(product.m / tile.m) * math.ceil(product.n / tile.n) * product.groups
        wanted = max(1, gpu.multiprocessors // blocks)
        for splits in {1, wanted, 2 * wanted}:
            if splits > 1 and product.k // splits < 4 * tile.k:
                continue
            seconds, bound, count = product_time(product, tile, splits, gpu)
            workspace = 4 * product.m * product.n * product.groups * splits if splits > 1 else 0
            main = Work(
                name, touches if splits == 1 else [*touches, (-1, workspace)], 0, 1,
                2.0 * product.m * product.n * product.k * product.groups, seconds, bound,
                bandwidth_share=GEMM_STREAMING, owner=owner,
            )  # fmt: skip
            works = [main]
            if splits > 1:
                works.append(Work(f"{name} split-K reduction", [(-1, workspace), (-2, output_bytes)], owner=owner))
            total = sum(p.seconds for p in predict_all(works, gpu))
            candidates.append((total, works, count))
    return min(candidates, key=lambda one: one[0])[1]
