"""The CPU's bfloat16 training kernels with invalid input, values that are not finite, and exceptions in mid-step.

Results and exceptions are those of stock PyTorch, and a step that fails leaves no block's state half-written.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_res.block.plan import Plan
from fused_res.block.program import link
from tests.support import bf16_training as bf16
from tests.support.bf16_training import (
    MODES,
    assert_error_at_most_stocks,
    assert_same_bits,
    autocast,
    buffers_of,
    fused,
    gradients_of,
    loss_of,
    state_of,
)

pytestmark = bf16.needs_bf16_products


def in_mode(model: Any, mode: str) -> Any:
    return model.bfloat16() if mode == "bfloat16" else model


# Shapes


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["basic", "bottleneck, projection"])
def test_one_value_per_channel_raises_stocks_error(kind: str, mode: str, channels_last: bool) -> None:
    stock = in_mode(bf16.block(kind), mode)
    ours, x = fused(stock), bf16.images(1, 64, 1, 1, channels_last=channels_last).bfloat16()
    before = state_of(stock)
    messages, states = [], []
    for model in (ours, stock):
        with autocast(enabled=mode == "autocast"), pytest.raises(ValueError, match="more than 1 value") as error:
            model(x)
        messages.append(str(error.value))
        states.append(state_of(model))
    assert messages[0] == messages[1]
    assert_same_bits(*states)
    # PyTorch counts the batch before it checks the shape.
    assert [name for name, value in states[0].items() if not torch.equal(value, before[name])] == [
        "bn1.num_batches_tracked"
    ]


@pytest.mark.parametrize("mode", MODES)
def test_one_value_per_channel_in_a_later_unit_leaves_stocks_state(mode: str) -> None:
    """The strides leave one pixel for the second norm, after the first has counted the batch."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(64, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3, 2, 1), nn.BatchNorm2d(48))
    stock = in_mode(bf16.round_weights(nn.Sequential(*layers, nn.ReLU())), mode)
    before, x = state_of(stock), bf16.images(1, 64, 2, 2).bfloat16()
    states = []
    for model in (fused(stock), stock):
        with autocast(enabled=mode == "autocast"), pytest.raises(ValueError, match="more than 1 value per channel"):
            model(x)
        states.append(state_of(model))
    for name, expected in states[1].items():
        assert torch.equal(states[0][name], before[name]) == torch.equal(expected, before[name]), name
        torch.testing.assert_close(states[0][name], expected, rtol=1e-2, atol=1e-3)
    assert not torch.equal(states[0]["1.running_mean"], before["1.running_mean"])
    assert torch.equal(states[0]["4.running_mean"], before["4.running_mean"])


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["basic, stride 2", "bottleneck"])
def test_empty_batch_is_stocks(kind: str, mode: str, channels_last: bool) -> None:
    """Output, gradients and state, or the same exception in forward or backward."""
    stock = in_mode(bf16.block(kind), mode)
    format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(0, 64, 6, 6, dtype=torch.bfloat16).contiguous(memory_format=format)
    results = []
    for model in (fused(stock), stock):
        leaf = x.clone().requires_grad_()
        found: dict[str, Any] = {}
        try:
            with autocast(enabled=mode == "autocast"):
                found["output"] = model(leaf)
            found["output"].sum().backward()
            found |= {"input": leaf.grad} | gradients_of(model)
        except (RuntimeError, ValueError) as error:
            found["error"] = type(error)
        results.append(found | state_of(model))
    ours, theirs = results
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        if isinstance(expected, Tensor):
            assert ours[name].dtype == expected.dtype and ours[name].shape == expected.shape, name
            assert torch.equal(ours[name].isnan(), expected.isnan()), name
            assert torch.equal(ours[name].nan_to_num(), expected.nan_to_num()), name
        else:
            assert ours[name] == expected


# Values that are not finite


def stepped(model: Any, x: Tensor, gradient: Tensor, mode: str | None) -> dict[str, Tensor]:
    """Return output, gradients and buffers of one step with this gradient of the output."""
    if mode is None:
        model, x = model.double(), x.double()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with autocast(enabled=mode == "autocast"):
        y = model(x)
    y.backward(gradient.to(y.dtype))
    assert x.grad is not None
    return {"output": y.detach(), "input": x.grad, **gradients_of(model), **buffers_of(model)}


def assert_finite_where_stock_is(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> int:
    """Compare the positions of NaN and of infinite values; return their number."""
    different = []
    for name, expected in theirs.items():
        if expected.is_floating_point() and not torch.equal(ours[name].isfinite(), expected.isfinite()):
            different.append(f"{name}: {(~ours[name].isfinite()).sum()} and {(~expected.isfinite()).sum()} in stock")
    assert not different, "; ".join(different)
    return sum(int((~value.isfinite()).sum()) for value in ours.values() if value.is_floating_point())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["basic", "basic, stride 2", "bottleneck", "bottleneck, projection"])
def test_nan_in_the_output_gradient(kind: str, mode: str, value: float) -> None:
    """At an element whose ReLU is active it reaches what stock's reaches; at a masked one it is dropped."""
    stock = in_mode(bf16.block(kind), mode)
    ours, x = fused(stock), bf16.images(4, 64, 6, 6).bfloat16()
    with autocast(enabled=mode == "autocast"), torch.no_grad():
        outputs = [copy.deepcopy(model)(x) for model in (ours, stock)]
    # Not at elements that rounding alone makes active.
    active = (outputs[0] > 0.1) & (outputs[1] > 0.1)
    masked = (outputs[0] == 0) & (outputs[1] == 0)
    for positions, expect in ((active, True), (masked, False)):
        gradient = torch.ones_like(outputs[1])
        n, c, h, w = positions.nonzero()[17].tolist()
        gradient[n, c, h, w] = value
        models = copy.deepcopy(ours), copy.deepcopy(stock)
        found, expected = (stepped(model, x, gradient, mode) for model in models)
        assert (assert_finite_where_stock_is(found, expected) > 0) == expect
        # The norm's gradients are per channel: those of the other channels stay finite.
        last = "bn3.weight" if "bn3.weight" in found else "bn2.weight"
        assert int((~found[last].isfinite()).sum()) == expect


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["basic, stride 2", "bottleneck", "bottleneck, projection"])
def test_nan_in_the_input(kind: str, mode: str, value: float) -> None:
    """NaN is in the batch statistics, so all of the output is NaN: no ReLU turns it into a zero."""
    stock = in_mode(bf16.block(kind), mode)
    x = bf16.images(4, 64, 6, 6).bfloat16()
    x[1, 5, 2, 2] = value
    with torch.no_grad(), autocast(enabled=mode == "autocast"):
        gradient = torch.ones_like(copy.deepcopy(stock)(x))
    found, expected = (stepped(model, x, gradient, mode) for model in (fused(stock), copy.deepcopy(stock)))
    assert assert_finite_where_stock_is(found, expected) > found["output"].numel()
    if value != value:
        assert found["output"].isnan().all() and found["bn1.running_mean"].isnan().all()


@pytest.mark.parametrize("mode", MODES)
def test_nan_in_one_channel_of_a_weight_stays_there(mode: str) -> None:
    """In the last convolution: the other channels keep their statistics, outputs and gradients."""
    stock = in_mode(bf16.block("bottleneck, projection"), mode)
    with torch.no_grad():
        stock.conv3.weight[3, 2] = float("nan")
    x = bf16.images(4, 64, 6, 6).bfloat16()
    with torch.no_grad(), autocast(enabled=mode == "autocast"):
        gradient = torch.ones_like(copy.deepcopy(stock)(x))
    found, expected = (stepped(model, x, gradient, mode) for model in (fused(stock), copy.deepcopy(stock)))
    assert_finite_where_stock_is(found, expected)
    for name in ("bn3.running_mean", "bn3.running_var", "bn3.weight"):
        assert found[name].isnan().nonzero().flatten().tolist() == [3], name


# Tensors that change between forward and backward


@pytest.mark.parametrize("name", ["conv1.weight", "conv2.weight", "conv3.weight", "downsample.0.weight", "bn1.weight"])
@pytest.mark.parametrize("mode", MODES)
def test_parameter_changed_before_backward_raises(mode: str, name: str) -> None:
    model = fused(in_mode(bf16.block("bottleneck, projection"), mode))
    with autocast(enabled=mode == "autocast"):
        y = model(bf16.images(4, 64, 6, 6).bfloat16().requires_grad_())
    with torch.no_grad():
        model.get_parameter(name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert gradients_of(model) == {}


@pytest.mark.parametrize("mode", MODES)
def test_input_or_output_changed_before_backward(mode: str) -> None:
    """The block reads its input in backward, and of its output only the ReLU's mask, which is saved as bits."""
    stock = in_mode(bf16.block("bottleneck"), mode)
    x = bf16.images(4, 64, 6, 6).bfloat16()
    model = fused(stock)
    with autocast(enabled=mode == "autocast"):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        inner = leaf * 1
        y = model(inner)
    inner.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    results = []
    for change in (False, True):
        model = fused(stock)
        with autocast(enabled=mode == "autocast"):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            y = model(leaf)
        if change:
            y.detach().zero_()
        y.backward(torch.ones_like(y))
        assert leaf.grad is not None
        results.append({"input": leaf.grad, **gradients_of(model)})
    assert_same_bits(*results)


# Exceptions in mid-step


class InjectedError(RuntimeError):
    pass


class FailingKernels:
    """A backend's operators, of which the call number `fail_at` raises; they are counted if it is None."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at, self.calls = fail_at, 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls += 1
            if self.calls - 1 == self.fail_at:
                raise InjectedError(call.__name__)
            return function(*args)

        return call

    @contextlib.contextmanager
    def active(self) -> Iterator[FailingKernels]:
        """Link every program anew, with wrapped operators."""

        def linked(self_: Plan, direction: str, kernels: Any) -> Any:
            program = getattr(self_, direction)
            live_out = (*self_.saved_slots, *self_.stats_slots) if direction == "forward" else ()
            return link(program, Wrapped(kernels, self.wrap), live_out)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Plan, "_linked", linked)
            yield self


class Wrapped:
    def __init__(self, kernels: Any, wrap: Callable[..., Any]) -> None:
        self.kernels, self.wrap = kernels, wrap

    def implementation(self, operation: Any, algorithm: Any) -> Any:
        return self.wrap(self.kernels.implementation(operation, algorithm))

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.kernels, name)
        wrapped = self.wrap(getattr(function, "implementation", function))
        wrapped.__name__ = name
        return wrapped


BLOCKS = ("stem.1", "first", "second", "third")


def updated_norms(model: nn.Module, before: dict[str, Tensor]) -> dict[str, bool]:
    """Return for each norm whether its state has counted a batch; none may be half-written."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            changed = {not torch.equal(value, before[f"{name}.{key}"]) for key, value in module.named_buffers()}
            assert len(changed) == 1, f"{name}: a part of its state was updated"
            found[name] = changed.pop()
    return found


def assert_next_step_is_that_of_a_new_model(model: Any, stock: nn.Module) -> None:
    """The state is all that a failed step leaves: a new model that loads it continues with the same bits."""
    new = fused(stock)
    new.load_state_dict(model.state_dict())
    x, labels = bf16.batch(seed=9)
    for each in (model, new):
        each.zero_grad()
        loss_of(each, x, labels).backward()
    assert_same_bits(gradients_of(model), gradients_of(new))
    assert_same_bits(state_of(model), state_of(new))


def test_failing_operator_leaves_no_state_half_written() -> None:
    """Every operator of a step fails once, in forward and in backward."""
    stock = bf16.network()
    before = state_of(stock)
    x, labels = bf16.batch(4, 8)
    with FailingKernels().active() as forward:
        loss = loss_of(fused(stock), x, labels)
    with FailingKernels().active() as backward:
        loss.backward()
    assert forward.calls > 15 and backward.calls > 9
    operators = set()
    for fail_at in range(forward.calls):
        model = fused(stock)
        with pytest.raises(InjectedError) as error, FailingKernels(fail_at).active():
            loss_of(model, x, labels)
        operators.add(str(error.value))
        norms = updated_norms(model, before)
        # A block's norms are updated together, after its last operator, and no later block's are.
        blocks = [{updated for name, updated in norms.items() if name.startswith(block)} for block in BLOCKS]
        assert all(len(updated) == 1 for updated in blocks)
        order = [updated.pop() for updated in blocks]
        assert order == sorted(order, reverse=True) and not order[-1]
        if fail_at % 4 == 0:
            assert_next_step_is_that_of_a_new_model(model, stock)
    for fail_at in range(backward.calls):
        model = fused(stock)
        loss = loss_of(model, x, labels)
        state = state_of(model)
        with pytest.raises(InjectedError) as error, FailingKernels(fail_at).active():
            loss.backward()
        operators.add(str(error.value))
        assert_same_bits(state_of(model), state)
        # Gradients of complete blocks only: the failed one has none.
        for block in BLOCKS[1:]:
            assert len({parameter.grad is None for parameter in getattr(model, block).parameters()}) == 1
        if fail_at % 4 == 0:
            assert_next_step_is_that_of_a_new_model(model, stock)
    assert {"conv_bn_stats", "conv_backward"} <= operators


def raise_error(*_: Any) -> Any:
    raise InjectedError


def forward_hook(model: Any) -> Any:
    return model.second.register_forward_hook(raise_error)


def forward_pre_hook(model: Any) -> Any:
    return model.second.register_forward_pre_hook(raise_error)


def backward_hook(model: Any) -> Any:
    return model.second.register_full_backward_hook(raise_error)


def inner_forward_hook(model: Any) -> Any:
    return model.second.bn2.register_forward_hook(raise_error)


def gradient_hook(model: Any) -> Any:
    return model.second.conv1.weight.register_hook(raise_error)


HOOKS = (forward_hook, forward_pre_hook, backward_hook, inner_forward_hook, gradient_hook)


@pytest.mark.parametrize("register", HOOKS, ids=lambda register: register.__name__)
def test_raising_hook_leaves_the_state_of_stock(register: Callable[[Any], Any]) -> None:
    """The norms that have counted the batch are those of stock, and the next step is that of a new model."""
    stock = bf16.network()
    before = state_of(stock)
    x, labels = bf16.batch()
    states, gradients = [], []
    ours = fused(stock)
    for model in (ours, copy.deepcopy(stock)):
        handle = register(model)
        with pytest.raises(InjectedError):
            loss_of(model, x, labels).backward()
        handle.remove()
        states.append(updated_norms(model, before))
        gradients.append(set(gradients_of(model)))
    assert states[0] == states[1] and any(states[0].values())
    # Our gradients of a block come at once: a hook of one of them may leave others of the same block.
    assert {name for name in gradients[0] ^ gradients[1] if not name.startswith("second")} == set()
    assert_next_step_is_that_of_a_new_model(ours, stock)


def test_later_steps_after_a_failed_one_are_as_accurate_as_stocks() -> None:
    """A failed backward, then a step without ``zero_grad``: the gradients add up as in stock."""
    stock = bf16.network()
    results = []
    for model, exact in ((fused(stock), False), (copy.deepcopy(stock), False), (copy.deepcopy(stock).double(), True)):
        for seed in range(4):
            x, labels = bf16.batch(seed=seed)
            x, dtype = (x.double(), None) if exact else (x, torch.bfloat16)
            if seed == 1:
                handle = model.second.register_full_backward_hook(raise_error)
                with pytest.raises(InjectedError):
                    loss_of(model, x, labels, dtype).backward()
                handle.remove()
            else:
                loss_of(model, x, labels, dtype).backward()
        results.append({"gradients": bf16.flat(gradients_of(model)), "statistics": bf16.flat(buffers_of(model))})
    assert_error_at_most_stocks(*results)
