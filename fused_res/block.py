"""The two executors: they walk a plan, forward and backward, and know nothing of autograd.

What lies between them is :class:`Kept`: exactly the tensors that backward needs. Values have the names that
:mod:`fused_res.plan` gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_res import convolution
from fused_res.backends.registry import Backend
from fused_res.ops import SCALE, laid_out
from fused_res.plan import Plan, Unit

Tensors = Sequence[Tensor | None]


@dataclass
class Kept:
    """What a forward leaves for its backward."""

    values: dict[str, Tensor]  # exactly plan.saved
    stats: list[Tensor]  # (5, C) of every unit, the projection's last; after an inference what was needed
    mask: Tensor | None  # the last ReLU's relu_mask, or the pool's indices


def forward(plan: Plan, backend: Backend, input: Tensor, tensors: Tensors) -> tuple[Tensor, Kept]:
    """Runs the block, and keeps what ``plan.saved`` names."""
    values: dict[str, Tensor] = {}
    stats: dict[int, Tensor] = {}

    def convolve(unit: Unit, x: Tensor) -> tuple[Tensor, Tensor | None]:
        through = stats[unit.index - 1] if unit.forward_reads != unit.reads else None
        z, partials = _convolve(plan, backend, unit, x, through, tensors, unit.training)
        for name, value in ((unit.forward_reads, x), (unit.makes, z)):
            if name in plan.saved:
                values[name] = value
        return z, partials

    def norm(unit: Unit) -> Tensors:
        return tensors[6 * unit.index + 2 : 6 * unit.index + 6]

    def only_stats(unit: Unit, z: Tensor, partials: Tensor | None) -> Tensor:
        if partials is None:
            made = backend.batch_norm_stats(z, *norm(unit), unit.training, unit.spec.eps)
        else:
            made = backend.merge_stats(partials, *norm(unit)[:2], unit.spec.eps, z.dtype == torch.float64)
        stats[unit.index] = made
        return made

    def normalise(
        unit: Unit,
        z: Tensor,
        partials: Tensor | None,
        residual: Tensor | None,
        residual_stats: Tensor | None,
        save_mask: bool,
    ) -> tuple[Tensor, Tensor | None]:
        spec = unit.spec
        if plan.inference:
            backend.batch_norm_act_inference_(z, residual, residual_stats, *norm(unit), spec.eps, spec.relu)
            return z, None
        if partials is None:
            y, stats[unit.index], mask = backend.batch_norm_act_forward(
                z, residual, residual_stats, *norm(unit), unit.training, spec.eps, spec.relu, save_mask
            )
        else:
            made = only_stats(unit, z, partials)
            y, mask = backend.batch_norm_act_apply(z, made, residual, residual_stats, spec.relu, save_mask)
        return y, mask if save_mask else None

    *inner, last = plan.units
    y = input
    for unit, following in zip(inner, plan.units[1:], strict=True):
        z, partials = convolve(unit, y)
        if following.forward_reads == unit.makes:
            only_stats(unit, z, partials)
            y = z
        else:
            y, _ = normalise(unit, z, partials, None, None, False)
    z, partials = convolve(last, y)
    mask: Tensor | None
    if (pool := plan.spec.pool) is not None:
        y, mask = backend.max_pool_forward(
            z, only_stats(last, z, partials), last.spec.relu, pool.kernel_size, pool.stride, pool.padding
        )
    else:
        residual = input if plan.spec.shortcut == "identity" else None
        residual_stats = None
        if plan.projection is not None:
            # Never written normalised: that happens where it is added.
            residual, its_partials = convolve(plan.projection, input)
            residual_stats = only_stats(plan.projection, residual, its_partials)
        y, mask = normalise(last, z, partials, residual, residual_stats, plan.save_mask)
    values = {name: values[name] for name in plan.saved}
    return y, Kept(values, [stats[index] for index in sorted(stats)], mask if plan.grad else None)


@dataclass
class _Behind:
    """A gradient behind a unit's norm, and what is known of it already."""

    dy: Tensor
    mask: Tensor | None = None  # bits of the ReLU in between
    masked: bool = False  # that ReLU has been seen to
    sums: Tensor | None = None  # (2, C) of the masked gradient: of itself, and of it times xhat
    dz: Tensor | None = None  # the gradient before the norm


def backward(plan: Plan, backend: Backend, grad_output: Tensor, tensors: Tensors, kept: Kept) -> list[Tensor | None]:
    """Gradients of the input and of every tensor, in their order; None where ``plan`` wants none."""
    if plan.spec.shortcut != "none":
        grad_output = laid_out(grad_output, plan.channels_last)
    values = _Values(plan, backend, tensors, kept)
    grads: list[Tensor | None] = [None] * (1 + len(tensors))

    def keep(unit: Unit, dweight: Tensor, dbias: Tensor) -> None:
        """Gradients of a norm's parameters, where they are wanted."""
        at = 1 + 6 * unit.index + 2
        if unit.grad_norm_weight:
            grads[at] = dweight
        if unit.grad_norm_bias:
            grads[at + 1] = dbias

    def pair(unit: Unit, other: Unit, behind: _Behind, other_behind: _Behind) -> None:
        """One reduction for the two norms that meet in the addition; one pass, too, unless convolutions do the rest."""
        z, other_z = values[unit.makes], values[other.makes]
        stats, other_stats = kept.stats[unit.index], kept.stats[other.index]
        if "fused" in (unit.kernels.backward, other.kernels.backward):
            sums = backend.batch_norm_sums(behind.dy, z, stats, behind.mask, False, other_z, other_stats)
            behind.sums, other_behind.sums = sums[:2], sums[::2].contiguous()
            return
        weight, other_weight = tensors[6 * unit.index + 2], tensors[6 * other.index + 2]
        wanted = [unit.grad_z, other.grad_z]
        wanted += [unit.grad_norm_weight, unit.grad_norm_bias, other.grad_norm_weight, other.grad_norm_bias]
        behind.dz, other_behind.dz, *norm_grads = backend.batch_norm_act_backward_pair(
            behind.dy, z, weight, stats, other_z, other_weight, other_stats, behind.mask, unit.training,
            other.training, wanted,
        )  # fmt: skip
        keep(unit, *norm_grads[:2])
        keep(other, *norm_grads[2:])

    def sums_of(unit: Unit, behind: _Behind) -> Tensor | None:
        """The reduction of a norm's backward, if anybody asks for it; gives its parameters their gradients."""
        if not (unit.training or unit.grad_bias or unit.grad_norm_weight or unit.grad_norm_bias):
            return None
        if behind.sums is None:
            relu = unit.spec.relu and behind.mask is None and not behind.masked
            behind.sums = backend.batch_norm_sums(
                behind.dy, values[unit.makes], kept.stats[unit.index], behind.mask, relu, None, None
            )
        weight = tensors[6 * unit.index + 2]
        dtype = behind.sums.dtype if weight is None else weight.dtype
        # Copies: gradients are accumulated in place, and must not share memory.
        dbias, dweight = (row.to(dtype, copy=True) for row in behind.sums)
        keep(unit, dweight, dbias)
        return behind.sums

    def before_norm(unit: Unit, behind: _Behind) -> Tensor:
        if behind.dz is not None:
            return behind.dz
        z, stats, relu = values[unit.makes], kept.stats[unit.index], unit.spec.relu
        if behind.masked or behind.sums is not None:
            sums = sums_of(unit, behind)
            relu = relu and behind.mask is None and not behind.masked
            count = z.numel() // z.shape[1]
            return backend.batch_norm_act_dx(
                behind.dy, z, stats, behind.mask, relu, sums if unit.training else None, count
            )
        wanted = [unit.grad_z, False, unit.grad_norm_weight, unit.grad_norm_bias]
        weight = tensors[6 * unit.index + 2]
        dz, _, *norm_grads = backend.batch_norm_act_backward(
            behind.dy, z, weight, stats, behind.mask, unit.training, relu, wanted
        )
        keep(unit, *norm_grads)
        return dz

    def aten(unit: Unit, behind: _Behind) -> _Behind | None:
        dz = before_norm(unit, behind)
        values.drop(unit.makes)
        if not unit.grad_z:
            return None
        weight, bias = tensors[6 * unit.index : 6 * unit.index + 2]
        at = 1 + 6 * unit.index
        if not (unit.grad_reads or unit.grad_weight):
            grads[at + 1] = dz.sum([0, *range(2, dz.dim())])
            return None
        # Only the weight's gradient reads x; the input's takes its shape, which the value before the norm has too.
        x = values[unit.reads if unit.grad_weight else unit.source]
        dx, grads[at], grads[at + 1] = convolution.backward(
            dz, x, weight, bias, unit.spec, [unit.grad_reads, unit.grad_weight, unit.grad_bias]
        )
        return None if dx is None else _Behind(dx)

    def fused(unit: Unit, behind: _Behind) -> _Behind | None:
        """Without the gradient before the norm, and without the activation that the convolution read."""
        z, stats = values[unit.makes], kept.stats[unit.index]
        weight, bias = tensors[6 * unit.index : 6 * unit.index + 2]
        count = z.numel() // z.shape[1]
        sums = sums_of(unit, behind)
        relu = unit.spec.relu and behind.mask is None and not behind.masked
        common = (behind.dy, z, stats, behind.mask, relu, sums if unit.training else None, count, weight)
        x = values[unit.source] if unit.grad_reads or unit.grad_weight else None
        x_stats, x_relu = None, False
        if unit.reads != "x":
            x_stats, x_relu = kept.stats[unit.index - 1], plan.units[unit.index - 1].spec.relu
        at = 1 + 6 * unit.index
        if unit.grad_weight:
            grads[at] = backend.conv_wgrad(*common, x, x_stats, x_relu, unit.spec.stride)
        if unit.grad_bias:
            assert bias is not None and sums is not None
            # The mean of a batch takes the bias away again.
            grads[at + 1] = torch.zeros_like(bias) if unit.training else (stats[SCALE] * sums[0]).to(bias.dtype)
        values.drop(unit.makes)
        if not unit.grad_reads:
            return None
        added = shortcut_grad() if unit.reads == "x" and unit is not plan.projection else (None, None)
        dx, its_sums = backend.conv_dgrad(*common, None if x_stats is None else x, x_stats, x_relu, *added)
        return _Behind(dx, masked=True, sums=None if x_stats is None else its_sums)

    def through(unit: Unit, behind: _Behind | None) -> _Behind | None:
        """From the gradient behind a unit's norm to the one behind the norm before it."""
        if behind is None or not unit.grad_norm:
            return None
        reached = (fused if unit.kernels.backward == "fused" else aten)(unit, behind)
        if unit.reads != "x":
            values.drop(unit.reads)
        return reached

    last, projection = plan.units[-1], plan.projection
    first = _Behind(grad_output, kept.mask)
    if (pool := plan.spec.pool) is not None:
        z = values[last.makes]
        first = _Behind(
            backend.max_pool_backward(grad_output, kept.mask, z, pool.kernel_size, pool.stride, pool.padding)
        )
    # The projection's norm has no ReLU, but stands before the block's: its gradient is masked by that one.
    shortcut = _Behind(grad_output, kept.mask)
    if projection is not None and last.grad_norm and projection.grad_norm:
        pair(last, projection, first, shortcut)
    # The projection first: it lets go of more than it brings, and the chain can add what it brings.
    reached = None if projection is None else through(projection, shortcut)

    def shortcut_grad() -> tuple[Tensor | None, Tensor | None]:
        """The gradient that the shortcut brings to the block's input, and its mask, if one addition is all it takes."""
        if plan.spec.shortcut == "identity":
            return grad_output, kept.mask
        whole = projection is not None and (projection.kernels.backward == "aten" or projection.spec.stride == (1, 1))
        return (reached.dy if whole and reached is not None else None), None

    behind: _Behind | None = first
    for unit in reversed(plan.units):
        behind = through(unit, behind)
    if not plan.grad_input:
        return grads

    assert behind is not None
    grads[0] = grad = behind.dy
    added, mask = shortcut_grad()
    if plan.units[0].kernels.backward == "fused" and added is not None:
        return grads
    if projection is not None:
        assert reached is not None
        # A fused projection with a stride brings only the pixels that it has read.
        into = grad if added is not None else grad[:, :, :: projection.spec.stride[0], :: projection.spec.stride[1]]
        into.add_(reached.dy)
    elif added is not None:
        # The masked gradient goes straight into the first convolution's: it is never a tensor of its own.
        backend.add_masked_(grad, added, mask)
    return grads


def _convolve(
    plan: Plan,
    backend: Backend,
    unit: Unit,
    x: Tensor,
    through: Tensor | None,
    tensors: Tensors,
    statistics: bool,
) -> tuple[Tensor, Tensor | None]:
    """The raw output, and where the kernel brings them, partial statistics; ``through`` are those of the norm that
    ``x`` has yet to go through."""
    weight, bias = tensors[6 * unit.index : 6 * unit.index + 2]
    spec, partials = unit.spec, None
    if unit.kernels.forward == "fused":
        relu = through is not None and plan.units[unit.index - 1].spec.relu
        z, partials = backend.conv_bn_stats(
            x, weight, bias, through, relu, spec.stride, spec.padding, spec.dilation, spec.groups, statistics
        )
    else:
        z = convolution.forward(x, weight, bias, spec)
    # What meets in the addition has one layout, whatever each convolution chose: the mask's bits lie in its order.
    return laid_out(z, plan.channels_last) if unit.makes in plan.added else z, partials if statistics else None


class _Values(dict[str, Tensor]):
    """The kept values; those that were not kept are made again when they are first asked for."""

    def __init__(self, plan: Plan, backend: Backend, tensors: Tensors, kept: Kept) -> None:
        super().__init__(kept.values)
        self._plan, self._backend, self._tensors, self._stats = plan, backend, tensors, kept.stats
        self._made_by = {unit.makes: unit for unit in plan.all_units}
        self._activated = {f"a{unit.index}": unit for unit in plan.units}

    def __missing__(self, name: str) -> Tensor:
        if name in self._activated:
            unit = self._activated[name]
            z, stats = self[unit.makes], self._stats[unit.index]
            value, _ = self._backend.batch_norm_act_apply(z, stats, None, None, unit.spec.relu, False)
        else:
            unit = self._made_by[name]
            through = self._stats[unit.index - 1] if unit.forward_reads != unit.reads else None
            x = self[unit.forward_reads]
            value, _ = _convolve(self._plan, self._backend, unit, x, through, self._tensors, False)
        self[name] = value
        return value

    def drop(self, name: str) -> None:
        """Lets go of a value that no later step reads."""
        self.pop(name, None)
