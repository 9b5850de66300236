"""The two executors: they walk a plan, forward and backward, and know nothing of autograd.

What lies between them is :class:`Kept`: exactly the tensors that backward needs. Values have the names that
:mod:`fused_res.plan` gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fused_res import convolution
from fused_res.backends.registry import Backend
from fused_res.ops import laid_out
from fused_res.plan import Plan, Unit

Tensors = Sequence[Tensor | None]


@dataclass
class Kept:
    """What a forward leaves for its backward."""

    values: dict[str, Tensor]  # exactly plan.saved
    stats: list[Tensor]  # (5, C) of every unit, the projection's last; none after an inference
    mask: Tensor | None  # the last ReLU's relu_mask, or the pool's indices


def forward(plan: Plan, backend: Backend, input: Tensor, tensors: Tensors) -> tuple[Tensor, Kept]:
    """Runs the block, and keeps what ``plan.saved`` names."""
    values: dict[str, Tensor] = {}
    stats: dict[int, Tensor] = {}

    def convolve(unit: Unit, x: Tensor) -> Tensor:
        z = _convolve(plan, unit, x, tensors)
        for name, value in ((unit.reads, x), (unit.makes, z)):
            if name in plan.saved:
                values[name] = value
        return z

    def normalise(unit: Unit, z: Tensor, residual: Tensor | None, save_mask: bool) -> tuple[Tensor, Tensor | None]:
        spec, norm = unit.spec, tensors[6 * unit.index + 2 : 6 * unit.index + 6]
        if plan.inference:
            backend.batch_norm_act_inference_(z, residual, *norm, spec.eps, spec.relu)
            return z, None
        y, stats[unit.index], mask = backend.batch_norm_act_forward(
            z, residual, *norm, unit.training, spec.eps, spec.relu, save_mask
        )
        return y, mask if save_mask else None

    *inner, last = plan.units
    y = input
    for unit in inner:
        y, _ = normalise(unit, convolve(unit, y), None, False)
    z = convolve(last, y)
    mask: Tensor | None
    if (pool := plan.spec.pool) is not None:
        norm = tensors[6 * last.index + 2 : 6 * last.index + 6]
        stats[last.index] = backend.batch_norm_stats(z, *norm, last.training, last.spec.eps)
        y, mask = backend.max_pool_forward(
            z, stats[last.index], last.spec.relu, pool.kernel_size, pool.stride, pool.padding
        )
    else:
        residual = input if plan.spec.shortcut == "identity" else None
        if plan.projection is not None:
            residual, _ = normalise(plan.projection, convolve(plan.projection, input), None, False)
        y, mask = normalise(last, z, residual, plan.save_mask)
    values = {name: values[name] for name in plan.saved}
    return y, Kept(values, [stats[index] for index in sorted(stats)], mask if plan.grad else None)


def backward(plan: Plan, backend: Backend, grad_output: Tensor, tensors: Tensors, kept: Kept) -> list[Tensor | None]:
    """Gradients of the input and of every tensor, in their order; None where ``plan`` wants none."""
    if plan.spec.shortcut != "none":
        grad_output = laid_out(grad_output, plan.channels_last)
    values = _Values(plan, backend, tensors, kept)
    grads: list[Tensor | None] = [None] * (1 + len(tensors))

    def unit_backward(unit: Unit, dy: Tensor, mask: Tensor | None) -> Tensor | None:
        """From the gradient behind a unit's norm to the gradient of what its convolution read."""
        if not unit.grad_norm:
            return None
        weight, bias, norm_weight, _ = tensors[6 * unit.index : 6 * unit.index + 4]
        wanted = [unit.grad_z, False, unit.grad_norm_weight, unit.grad_norm_bias]
        dz, _, *norm_grads = backend.batch_norm_act_backward(
            dy,
            values[unit.makes],
            norm_weight,
            kept.stats[unit.index],
            mask,
            unit.training,
            unit.spec.relu,
            wanted,
        )
        values.drop(unit.makes)
        at = 1 + 6 * unit.index
        grads[at + 2 : at + 4] = (grad if flag else None for grad, flag in zip(norm_grads, wanted[2:], strict=True))
        if not unit.grad_z:
            return None
        # Only the weight's gradient reads x; the input's takes its shape, which the value before the norm has too.
        x = values[unit.reads if unit.grad_weight or unit.reads == "x" else "z" + unit.reads[1:]]
        dx, grads[at], grads[at + 1] = convolution.backward(
            dz, x, weight, bias, unit.spec, [unit.grad_reads, unit.grad_weight, unit.grad_bias]
        )
        return dx

    mask = kept.mask
    dx: Tensor | None = grad_output
    if (pool := plan.spec.pool) is not None:
        dx = backend.max_pool_backward(
            grad_output, mask, values[plan.units[-1].makes], pool.kernel_size, pool.stride, pool.padding
        )
        mask = None
    for unit in reversed(plan.units):
        if dx is not None:
            dx = unit_backward(unit, dx, mask)
        if unit.reads != "x":
            values.drop(unit.reads)
        mask = None

    if plan.projection is not None:
        # The shortcut's norm has no ReLU, but stands before the block's: its gradient is masked by that one.
        shortcut = unit_backward(plan.projection, grad_output, kept.mask)
        if plan.grad_input:
            assert dx is not None and shortcut is not None
            dx.add_(shortcut)
    elif plan.spec.shortcut == "identity" and plan.grad_input:
        # The masked gradient goes straight into the first convolution's: it is never a tensor of its own.
        backend.add_masked_(dx, grad_output, kept.mask)
    grads[0] = dx
    return grads


def _convolve(plan: Plan, unit: Unit, x: Tensor, tensors: Tensors) -> Tensor:
    weight, bias = tensors[6 * unit.index : 6 * unit.index + 2]
    z = convolution.forward(x, weight, bias, unit.spec)
    # What meets in the addition has one layout, whatever each convolution chose: the mask's bits lie in its order.
    return laid_out(z, plan.channels_last) if unit.makes in plan.added else z


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
            value = self._backend.batch_norm_act_apply(self[unit.makes], self._stats[unit.index], unit.spec.relu)
        else:
            unit = self._made_by[name]
            value = _convolve(self._plan, unit, self[unit.reads], self._tensors)
        self[name] = value
        return value

    def drop(self, name: str) -> None:
        """Lets go of a value that no later step reads."""
        self.pop(name, None)
