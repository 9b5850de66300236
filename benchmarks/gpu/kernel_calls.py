"""One call of every operator, with operands as in the first stages of ResNet-50."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.settings import Settings
from fused_res import backends


@dataclass(frozen=True)
class Call:
    """An operator of every backend's kernels, and its arguments."""

    operator: str
    arguments: Sequence[Any]

    def on(self, kernels: Any) -> list[Tensor]:
        """Run the operator on copies of what it writes, and return its results or the arguments that it wrote."""
        arguments = list(self.arguments)
        written = 2 if self.operator == "update_running_stats" else 1 if self.operator.endswith("_") else 0
        for index in range(written):
            arguments[index] = _map(arguments[index], lambda tensor: tensor.clone(memory_format=torch.preserve_format))
        results = getattr(kernels, self.operator)(*arguments)
        values = arguments[:written] if written else [results]
        return [tensor for value in values for tensor in ([value] if isinstance(value, Tensor) else value)]

    def in_float64(self) -> "Call":
        def widen(tensor: Tensor) -> Tensor:
            return tensor.double() if tensor.is_floating_point() else tensor

        return Call(self.operator, [_map(argument, widen) for argument in self.arguments])


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [function(tensor) for tensor in value]
    return value


class Operands:
    """Random operands: channels differ in mean and scale, and one in eight has a mean of 100.

    Args:
        settings: sets device and sizes.
        batch: number of images; default: as few as fill a GPU.
        memory_format: memory format of the activations.
    """

    def __init__(
        self, settings: Settings, batch: int = 16, memory_format: torch.memory_format = torch.channels_last
    ) -> None:
        small = settings.small or settings.rehearse
        self.batch, self.side = (2, 5) if small else (batch, 56)
        self.narrow, self.wide = (16, 24) if small else (64, 256)
        # Triton's interpreter computes bfloat16 incorrectly, the simulator does not.
        self.dtype = torch.float32 if settings.rehearse and settings.backend != "cuda" else torch.bfloat16
        self.device = torch.device(settings.device)
        self.memory_format = memory_format
        self.reference = backends.resolve("reference", self.device)
        self.generator = torch.Generator(self.device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def activation(self, channels: int, side: int | None = None, mean: float = 100.0) -> Tensor:
        size = side or self.side
        means = self.normal(1, channels, 1, 1)
        means[:, ::8] = mean
        x = self.normal(self.batch, channels, size, size) * (0.5 + self.normal(1, channels, 1, 1).abs()) + means
        return x.to(self.dtype).contiguous(memory_format=self.memory_format)

    def weight(self, outputs: int, inputs: int, kernel: int = 1) -> Tensor:
        weight = self.normal(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5
        return weight.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def stats(self, x: Tensor) -> Tensor:
        """Return the `stats` of `x`, as of `batch_norm_stats`."""
        channels = x.shape[1]
        vectors = 1 + 0.2 * self.normal(channels), 0.5 * self.normal(channels)
        return self.reference.batch_norm_stats(
            x.double(), *(v.double() for v in vectors), None, None, True, 1e-5
        ).float()

    def mask(self, x: Tensor) -> Tensor:
        from fused_res.backends.reference.batch_norm_act import pack_mask

        return pack_mask(self.normal(*x.shape).contiguous(memory_format=self.memory_format) > 0)


def _norm_forward(o: Operands) -> Call:
    x, residual = o.activation(o.wide), o.activation(o.wide, mean=0)
    return Call(
        "batch_norm_act_forward",
        (x, residual, None, 1 + 0.2 * o.normal(o.wide), o.normal(o.wide), None, None, True, 1e-5, "relu", True),
    )


def _norm_backward(o: Operands) -> Call:
    x = o.activation(o.wide)
    dy = o.activation(o.wide, mean=0)
    return Call(
        "batch_norm_act_backward",
        (dy, x, 1 + 0.2 * o.normal(o.wide), o.stats(x), o.mask(x), True, "identity", [True] * 4),
    )


def _norm_backward_pair(o: Operands) -> Call:
    x, residual, dy = o.activation(o.wide), o.activation(o.wide), o.activation(o.wide, mean=0)
    weights = 1 + 0.2 * o.normal(o.wide), 1 + 0.2 * o.normal(o.wide)
    return Call(
        "batch_norm_act_backward_pair",
        (dy, x, weights[0], o.stats(x), residual, weights[1], o.stats(residual), o.mask(x), True, True, [True] * 6),
    )


def _norm_inference(o: Operands) -> Call:
    x, c = o.activation(o.wide, mean=1), o.wide
    vectors = 1 + 0.2 * o.normal(c), o.normal(c), o.normal(c), 1 + o.normal(c).abs()
    return Call("batch_norm_act_inference_", (x, o.activation(c, mean=0), None, *vectors, 1e-5, "relu"))


def _partials(o: Operands) -> Call:
    return Call("batch_norm_partials", (o.activation(o.wide),))


def _merge(o: Operands) -> Call:
    count = torch.full((500, 1, o.wide), 40.0, device=o.device)
    partials = torch.cat([count, o.normal(500, 1, o.wide) + 10, o.normal(500, 1, o.wide).abs()], 1).double()
    return Call("merge_stats", (partials, o.normal(o.wide), o.normal(o.wide), 1e-5, False))


def _sums(o: Operands) -> Call:
    x = o.activation(o.narrow)
    return Call("batch_norm_sums", (o.activation(o.narrow, mean=0), x, o.stats(x), None, "relu", None, None))


def _dx(o: Operands) -> Call:
    dy, x, stats, mask, activation, *_ = _sums(o).arguments
    sums = o.reference.batch_norm_sums(dy.double(), x.double(), stats.double(), mask, activation, None, None).float()
    return Call("batch_norm_act_dx", (dy, x, stats, mask, activation, sums, x.numel() // x.shape[1]))


def _add_masked(o: Operands) -> Call:
    x = o.activation(o.wide, mean=0)
    return Call("add_masked_", (x, o.activation(o.wide, mean=0), o.mask(x)))


def _running(o: Operands) -> Call:
    x = o.activation(o.narrow)
    running = [o.normal(o.narrow)], [o.normal(o.narrow).abs()]
    return Call("update_running_stats", (*running, [o.stats(x)], [0.1]))


def _pool_forward(o: Operands) -> Call:
    return Call("max_pool_forward", (o.activation(o.narrow, 2 * o.side), None, True, [3, 3], [2, 2], [1, 1]))


def _pool_backward(o: Operands) -> Call:
    x, *_, kernel, stride, padding = _pool_forward(o).arguments
    y, indices = o.reference.max_pool_forward(x, None, True, kernel, stride, padding)
    dy = o.normal(*y.shape).to(o.dtype).contiguous(memory_format=o.memory_format)
    return Call("max_pool_backward", (dy, indices, x, kernel, stride, padding))


def _conv_1x1(o: Operands) -> Call:
    x, residual = o.activation(o.narrow, mean=1), o.activation(o.wide, mean=0)
    bias = o.normal(o.wide).to(o.dtype)
    return Call("conv_bias_act", (x, o.weight(o.wide, o.narrow), bias, residual, [1, 1], [0, 0], [1, 1], 1, True))


def _conv_3x3(o: Operands) -> Call:
    x = o.activation(o.narrow, mean=1)
    return Call("conv_bias_act", (x, o.weight(o.narrow, o.narrow, 3), None, None, [1, 1], [1, 1], [1, 1], 1, True))


def _conv_stem(o: Operands) -> Call:
    x = o.activation(3, 2 * o.side, mean=1)
    return Call("conv_bias_act", (x, o.weight(o.narrow, 3, 7), None, None, [2, 2], [3, 3], [1, 1], 1, True))


def _conv_grouped(o: Operands) -> Call:
    x = o.activation(o.narrow, mean=1)
    weight = o.weight(o.narrow, o.narrow // 4, 3)
    return Call("conv_bias_act", (x, weight, None, None, [1, 1], [1, 1], [1, 1], 4, False))


def _stats_1x1(o: Operands) -> Call:
    x = o.activation(o.wide, mean=1)
    geometry = [1, 1], [0, 0], [1, 1], 1
    return Call("conv_bn_stats", (x, o.weight(o.narrow, o.wide), None, o.stats(x), True, *geometry, True))


def _stats_3x3(o: Operands) -> Call:
    x = o.activation(o.narrow, mean=1)
    geometry = [1, 1], [1, 1], [1, 1], 1
    return Call("conv_bn_stats", (x, o.weight(o.narrow, o.narrow, 3), None, o.stats(x), True, *geometry, True))


def _gradient(o: Operands) -> tuple[Any, ...]:
    """Return the arguments that conv_dgrad and conv_wgrad share, of a 1x1 convolution from `narrow` to `wide`."""
    z, dy = o.activation(o.wide, mean=1), o.activation(o.wide, mean=0)
    stats, mask = o.stats(z), o.mask(z)
    sums = o.reference.batch_norm_sums(dy.double(), z.double(), stats.double(), mask, "identity", None, None).float()
    return dy, z, stats, mask, False, sums, z.numel() // o.wide, o.weight(o.wide, o.narrow)


def _dgrad(o: Operands) -> Call:
    x = o.activation(o.narrow, mean=1)
    return Call("conv_dgrad", (*_gradient(o), x, o.stats(x), True))


def _dgrad_added(o: Operands) -> Call:
    added = o.activation(o.narrow, mean=0)
    return Call("conv_dgrad", (*_gradient(o), None, None, False, added, o.mask(added)))


def _dgrad_without_prologue(o: Operands) -> Call:
    dz, added = o.activation(o.narrow, mean=0), o.activation(o.wide, mean=0)
    no_prologue = None, None, None, False, None, 0
    weight = o.weight(o.narrow, o.wide)
    return Call("conv_dgrad", (dz, *no_prologue, weight, None, None, False, added, o.mask(added)))


def _wgrad(o: Operands) -> Call:
    x = o.activation(o.narrow, mean=1)
    return Call("conv_wgrad", (*_gradient(o), x, o.stats(x), True, [1, 1]))


#: Calls by name. First those that use what only hardware can try: tensor cores (wgmma through Triton's dot, mma.sync),
#: asynchronous copies, split-K.
CALLS: dict[str, Callable[[Operands], Call]] = {
    "conv 1x1": _conv_1x1,
    "conv 3x3 with statistics": _stats_3x3,
    "weight gradient": _wgrad,
    "input gradient": _dgrad,
    "norm forward": _norm_forward,
    "norm backward": _norm_backward,
    "conv 1x1 with statistics": _stats_1x1,
    "input gradient with shortcut": _dgrad_added,
    "input gradient without prologue": _dgrad_without_prologue,
    "norm pair backward": _norm_backward_pair,
    "conv 3x3": _conv_3x3,
    "max pool": _pool_forward,
    "max pool backward": _pool_backward,
    "partial statistics": _partials,
    "merge of statistics": _merge,
    "gradient sums": _sums,
    "norm input gradient": _dx,
    "norm in inference": _norm_inference,
    "masked addition": _add_masked,
    "running statistics": _running,
    "conv 7x7": _conv_stem,
    "conv 3x3 grouped": _conv_grouped,
}
