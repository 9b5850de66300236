"""The two executors: they walk a plan, forward and backward, and know nothing of autograd.

What lies between them is :class:`Kept`: exactly the tensors that backward needs. Values have the names that
:mod:`fused_res.plan` gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_res import convolution, distributed
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

    def together(unit: Unit, z: Tensor, partials: Tensor | None) -> Tensor | None:
        """Partial statistics of all that the unit's are to be of, where those are more than this process's."""
        if not (plan.group and unit.training):
            return partials
        own = backend.batch_norm_partials(z) if partials is None else partials
        return distributed.gather_partials(own, plan.group)

    def only_stats(unit: Unit, z: Tensor, partials: Tensor | None) -> Tensor:
        partials = together(unit, z, partials)
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
        if partials is None and not (plan.group and unit.training):
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
    totals: Tensor | None = None  # these of everybody whose values the statistics are of
    dz: Tensor | None = None  # the gradient before the norm

    def by_sign(self, unit: Unit) -> bool:
        """Whether the ReLU in between is still to be seen to, by the sign of what it clamps."""
        return unit.spec.relu and self.mask is None and not self.masked


def backward(plan: Plan, backend: Backend, grad_output: Tensor, tensors: Tensors, kept: Kept) -> list[Tensor | None]:
    """Gradients of the input and of every tensor, in their order; None where ``plan`` wants none."""
    return _Backward(plan, backend, grad_output, tensors, kept).run()


class _Backward:
    """Walks a plan from the end, norm by norm and convolution by convolution."""

    def __init__(self, plan: Plan, backend: Backend, grad_output: Tensor, tensors: Tensors, kept: Kept) -> None:
        self.plan, self.backend, self.tensors = plan, backend, tensors
        self.grad_output = laid_out(grad_output, plan.channels_last) if plan.spec.shortcut != "none" else grad_output
        self.stats, self.mask = kept.stats, kept.mask
        self.values = _Values(plan, backend, tensors, kept)
        self.grads: list[Tensor | None] = [None] * (1 + len(tensors))
        self.shortcut: Tensor | None = None  # what a projection brings to the input

    def run(self) -> list[Tensor | None]:
        plan = self.plan
        last, projection = plan.units[-1], plan.projection
        behind: _Behind | None = _Behind(self.grad_output, self.mask)
        if (pool := plan.spec.pool) is not None:
            shape = self.values[last.makes]
            behind = _Behind(
                self.backend.max_pool_backward(
                    self.grad_output, self.mask, shape, pool.kernel_size, pool.stride, pool.padding
                )
            )
        if projection is not None:
            # The projection's norm has no ReLU, but stands before the block's: its gradient is masked by that one.
            its = _Behind(self.grad_output, self.mask)
            assert behind is not None
            if last.grad_norm and projection.grad_norm:
                self._pair(last, projection, behind, its)
            # First, because it lets go of more than it brings, and the chain can add what it brings.
            reached = self._through(projection, its)
            self.shortcut = None if reached is None else reached.dy
        for unit in reversed(plan.units):
            behind = self._through(unit, behind)
        if plan.grad_input:
            assert behind is not None
            self.grads[0] = self._with_shortcut(behind.dy)
        return self.grads

    def _through(self, unit: Unit, behind: _Behind | None) -> _Behind | None:
        """From the gradient behind a unit's norm to the one behind the norm before it."""
        if behind is None or not unit.grad_norm:
            return None
        reached = (self._fused if unit.kernels.backward == "fused" else self._plain)(unit, behind)
        self.values.drop(unit.makes)
        if unit.reads != "x":
            self.values.drop(unit.reads)
        return reached

    def _plain(self, unit: Unit, behind: _Behind) -> _Behind | None:
        dz = self._before_norm(unit, behind)
        self.values.drop(unit.makes)
        if not unit.grad_z:
            return None
        weight, bias = self.tensors[6 * unit.index : 6 * unit.index + 2]
        at = 1 + 6 * unit.index
        if not (unit.grad_reads or unit.grad_weight):
            self.grads[at + 1] = dz.sum([0, *range(2, dz.dim())])
            return None
        # Only the weight's gradient reads x; the input's takes its shape, which the value before the norm has too.
        x = self.values[unit.reads if unit.grad_weight else unit.source]
        wanted = [unit.grad_reads, unit.grad_weight, unit.grad_bias]
        if unit.kernels.backward == "own":
            found = self.backend.conv_backward(dz, x, weight, bias, unit.spec, wanted, unit is self.plan.projection)
        else:
            found = convolution.backward(dz, x, weight, bias, unit.spec, wanted)
        dx, self.grads[at], self.grads[at + 1] = found
        return None if dx is None else _Behind(dx)

    def _fused(self, unit: Unit, behind: _Behind) -> _Behind | None:
        """Without the gradient before the norm, and without the activation that the convolution read."""
        z, stats = self.values[unit.makes], self.stats[unit.index]
        weight, bias = self.tensors[6 * unit.index : 6 * unit.index + 2]
        count = z.numel() // z.shape[1]
        sums = self._sums(unit, behind)
        terms = behind.totals if unit.training else None
        common = (behind.dy, z, stats, behind.mask, behind.by_sign(unit), terms, count, weight)
        x = self.values[unit.source] if unit.grad_reads or unit.grad_weight else None
        x_stats, x_relu = None, False
        if unit.reads != "x":
            x_stats, x_relu = self.stats[unit.index - 1], self.plan.units[unit.index - 1].spec.relu
        at = 1 + 6 * unit.index
        if unit.grad_weight:
            self.grads[at] = self.backend.conv_wgrad(*common, x, x_stats, x_relu, unit.spec.stride)
        if unit.grad_bias:
            assert bias is not None and sums is not None
            # The mean of a batch takes the bias away again.
            db = torch.zeros_like(bias) if unit.training else stats[SCALE] * sums[0]
            self.grads[at + 1] = db.to(bias.dtype)
        if not unit.grad_reads:
            return None
        if x_stats is None:
            dx, _ = self.backend.conv_dgrad(*common, None, None, False, *self._carried(unit))
            return _Behind(dx)
        dx, its_sums = self.backend.conv_dgrad(*common, x, x_stats, x_relu)
        return _Behind(dx, masked=True, sums=its_sums)

    def _before_norm(self, unit: Unit, behind: _Behind) -> Tensor:
        if behind.dz is not None:
            dz, behind.dz = behind.dz, None  # nobody else holds it, and it is large
            return dz
        z, stats = self.values[unit.makes], self.stats[unit.index]
        if behind.masked or behind.sums is not None or (self.plan.group and unit.training):
            self._sums(unit, behind)
            terms, count = behind.totals if unit.training else None, z.numel() // z.shape[1]
            return self.backend.batch_norm_act_dx(behind.dy, z, stats, behind.mask, behind.by_sign(unit), terms, count)
        dz, _, *norm_grads = self.backend.batch_norm_act_backward(
            behind.dy,
            z,
            self.tensors[6 * unit.index + 2],
            stats,
            behind.mask,
            unit.training,
            unit.spec.relu,
            [unit.grad_z, False, unit.grad_norm_weight, unit.grad_norm_bias],
        )
        self._keep(unit, *norm_grads)
        return dz

    def _pair(self, unit: Unit, other: Unit, behind: _Behind, other_behind: _Behind) -> None:
        """One reduction for the two norms that meet in the addition; one pass, too, unless convolutions do the rest."""
        z, other_z = self.values[unit.makes], self.values[other.makes]
        stats, other_stats = self.stats[unit.index], self.stats[other.index]
        if self.plan.group or "fused" in (unit.kernels.backward, other.kernels.backward):
            sums = self.backend.batch_norm_sums(behind.dy, z, stats, behind.mask, False, other_z, other_stats)
            totals = self._totals(sums, z)
            behind.sums, behind.totals = sums[:2], totals[:2]
            other_behind.sums, other_behind.totals = sums[::2].contiguous(), totals[::2].contiguous()
            return
        weight, other_weight = self.tensors[6 * unit.index + 2], self.tensors[6 * other.index + 2]
        wanted = [unit.grad_z, other.grad_z]
        wanted += [unit.grad_norm_weight, unit.grad_norm_bias, other.grad_norm_weight, other.grad_norm_bias]
        behind.dz, other_behind.dz, *norm_grads = self.backend.batch_norm_act_backward_pair(
            behind.dy, z, weight, stats, other_z, other_weight, other_stats, behind.mask, unit.training,
            other.training, wanted,
        )  # fmt: skip
        self._keep(unit, *norm_grads[:2])
        self._keep(other, *norm_grads[2:])

    def _sums(self, unit: Unit, behind: _Behind) -> Tensor | None:
        """The reduction of a norm's backward, if anybody asks for it; gives its parameters their gradients.

        Those are of this process's values: whoever averages gradients over processes does so with these, too.
        """
        if not (unit.training or unit.grad_bias or unit.grad_norm_weight or unit.grad_norm_bias):
            return None
        if behind.sums is None:
            z, stats = self.values[unit.makes], self.stats[unit.index]
            behind.sums = self.backend.batch_norm_sums(
                behind.dy, z, stats, behind.mask, behind.by_sign(unit), None, None
            )
        if unit.training and behind.totals is None:
            behind.totals = self._totals(behind.sums, self.values[unit.makes])
        weight = self.tensors[6 * unit.index + 2]
        dtype = behind.sums.dtype if weight is None else weight.dtype
        # Copies: gradients are accumulated in place, and must not share memory.
        dbias, dweight = (row.to(dtype, copy=True) for row in behind.sums)
        self._keep(unit, dweight, dbias)
        return behind.sums

    def _totals(self, sums: Tensor, z: Tensor) -> Tensor:
        group = self.plan.group
        return distributed.total_sums(sums, z.numel() // z.shape[1], group) if group else sums

    def _keep(self, unit: Unit, dweight: Tensor, dbias: Tensor) -> None:
        """Gradients of a norm's parameters, where they are wanted."""
        at = 1 + 6 * unit.index + 2
        if unit.grad_norm_weight:
            self.grads[at] = dweight
        if unit.grad_norm_bias:
            self.grads[at + 1] = dbias

    def _carried(self, unit: Unit) -> tuple[Tensor | None, Tensor | None]:
        """The shortcut's gradient and its mask, where the first convolution's can take it in as it is written."""
        if unit is not self.plan.units[0]:
            return None, None
        if self.plan.spec.shortcut == "identity":
            return self.grad_output, self.mask
        return (None if self._strided else self.shortcut), None

    @property
    def _strided(self) -> bool:
        """Whether the projection brings only those pixels that it has read."""
        projection = self.plan.projection
        if projection is None or self.shortcut is None or max(projection.spec.stride) == 1:
            return False
        return self.shortcut.shape[2:] == self.grad_output.shape[2:]

    def _with_shortcut(self, grad: Tensor) -> Tensor:
        unit = self.plan.units[0]
        if unit.kernels.backward == "fused" and self._carried(unit)[0] is not None:
            return grad
        if self.plan.spec.shortcut == "identity":
            # The masked gradient goes straight into the first convolution's: it is never a tensor of its own.
            self.backend.add_masked_(grad, self.grad_output, self.mask)
        elif (projection := self.plan.projection) is not None:
            assert self.shortcut is not None
            into = grad
            if self._strided:
                every = slice(None)
                into = grad[(every, every, *[slice(None, None, step) for step in projection.spec.stride])]
            into.add_(self.shortcut)
        return grad


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
    elif unit.kernels.forward == "own":
        z, partials = backend.conv_forward(x, weight, bias, spec, statistics)
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
