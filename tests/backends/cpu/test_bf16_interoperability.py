"""The CPU's bfloat16 training kernels with PyTorch's other training features.

Gradient scaling, ``torch.compile``, activation checkpointing, gradient accumulation, frozen layers, double backward.
Errors are against float64 and at most 1.2 times those of stock PyTorch; several processes are in
tests/distributed/test_bf16_training.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_res import fuse
from fused_res.fusion.compiled import fused_res_backend
from fused_res.nn import chain
from tests.support import bf16_training as bf16
from tests.support.bf16_training import (
    MODES,
    assert_error_at_most_stocks,
    assert_same_bits,
    autocast,
    fused,
    gradients_of,
    loss_of,
    state_of,
)

pytestmark = bf16.needs_bf16_products

KINDS = ("basic", "basic, stride 2", "bottleneck", "bottleneck, projection")


def count(model: nn.Module, operator: str) -> int:
    return bf16.operators_of(model).count(operator)


def assert_block_is_accurate(
    stock: Any, mode: str, prepare: Callable[[Any], Any] = lambda model: model, mean: float = 0.0,
    channels_last: bool = True, dtype: torch.dtype = torch.bfloat16,
) -> Any:  # fmt: skip
    """Compare a fused block's step with stock's and float64's, and return the fused block.

    Args:
        stock: the block.
        mode: one of MODES.
        prepare: freezes parts of a block, and returns it.
        mean: mean of the input.
        channels_last: memory format of the input.
        dtype: dtype of the computation.
    """
    ours = prepare(fused(stock))
    models = (ours, mode), (prepare(copy.deepcopy(stock)), mode), (prepare(copy.deepcopy(stock)), None)
    results: list[dict[str, Tensor]] = [{} for _ in models]
    # A ReLU's input that is zero up to rounding decides a few elements: four batches make their number less random.
    for seed in range(4):
        x = bf16.images(6, 64, 9, 9, seed=seed, mean=mean, channels_last=channels_last)
        for (model, precision), result in zip(models, results, strict=True):
            model.zero_grad()
            for name, value in bf16.run(model, x, precision, dtype).items():
                result[name] = torch.cat([result[name], value[None]]) if seed else value[None]
    assert_error_at_most_stocks(*results)
    return ours


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_block_error_is_at_most_stocks(kind: str, mode: str, mean: float) -> None:
    """Outputs, gradients and running statistics; with mean 100, the first norm subtracts nearly all of its input."""
    ours = assert_block_is_accurate(bf16.block(kind), mode, mean=mean)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in ours.modules())
    assert count(ours, "conv_bn_stats") == count(ours, "conv_backward") == convolutions


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["basic, stride 2", "bottleneck"])
def test_contiguous_input(kind: str, mode: str) -> None:
    """Without channels_last other algorithms run; the errors are within the same limits."""
    assert_block_is_accurate(bf16.block(kind), mode, channels_last=False)


def test_both_memory_formats_of_an_input_in_turn() -> None:
    """A plan belongs to one memory format: the same block gets both, and a contiguous gradient."""
    stock = bf16.block("basic, stride 2")
    ours, fresh = fused(stock), fused(stock)
    for channels_last in (True, False, True):
        x = bf16.images(4, 64, 8, 8, channels_last=channels_last)
        found = bf16.run(ours, x, "autocast")
        assert found["output"].is_contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        ours.zero_grad()
        ours.load_state_dict(stock.state_dict())
        assert_same_bits(found, bf16.run(fresh, x, "autocast"))
        fresh = fused(stock)


# Frozen layers


def freeze_all(kind: type[nn.Module], model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, kind):
            module.requires_grad_(False)
    return model


def freeze_convolutions(model: Any) -> Any:
    return freeze_all(nn.Conv2d, model)


def freeze_second_convolution(model: Any) -> Any:
    model.conv2.requires_grad_(False)
    return model


def freeze_norm_parameters(model: Any) -> Any:
    return freeze_all(nn.BatchNorm2d, model)


def evaluate_first_norm(model: Any) -> Any:
    model.bn1.eval()
    return model


def evaluate_norms(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return model


def freeze_everything(model: Any) -> Any:
    return model.requires_grad_(False)


FREEZES = [
    freeze_convolutions, freeze_second_convolution, freeze_norm_parameters, evaluate_first_norm, evaluate_norms,
    freeze_everything,
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("freeze", FREEZES, ids=lambda freeze: freeze.__name__)
@pytest.mark.parametrize("kind", ["basic", "bottleneck, projection"])
def test_frozen_parts(kind: str, freeze: Callable[[Any], Any], mode: str) -> None:
    stock = bf16.block(kind)
    bf16.estimate_running_stats(stock)  # which a frozen norm reads
    before = state_of(stock)
    ours = assert_block_is_accurate(stock, mode, freeze)
    expected = {name for name, parameter in freeze(copy.deepcopy(stock)).named_parameters() if parameter.requires_grad}
    assert {*gradients_of(ours)} == expected
    for name, module in ours.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            for key, value in module.named_buffers():
                # Counters of the four batches, and statistics that only a training norm updates.
                assert torch.equal(value, before[f"{name}.{key}"].to(value.dtype)) is not module.training
    assert count(ours, "conv_backward") > 0, bf16.operators_of(ours)


def test_frozen_block_without_input_gradient_updates_statistics_only() -> None:
    stock = bf16.block("bottleneck")
    ours = fused(stock).requires_grad_(False)
    x = bf16.images(6, 64, 9, 9).bfloat16()
    with autocast():
        y = ours(x)
        expected = fused(stock)(x)
    assert not y.requires_grad and torch.equal(y, expected)
    assert ours.bn3.num_batches_tracked == 1 and not torch.equal(ours.bn3.running_mean, stock.bn3.running_mean)


# Gradient accumulation, and weights that change between steps


def test_gradients_of_three_micro_batches_add_up() -> None:
    """The float32 gradients of the master weights, after a step of the optimizer that changes the weights."""
    stock = bf16.network()
    models = fused(stock), copy.deepcopy(stock), copy.deepcopy(stock).double()
    optimizers = [torch.optim.SGD(model.parameters(), 0.05, momentum=0.9) for model in models]
    ours = models[0]
    for _ in range(2):  # the optimizer's step comes between the two accumulations
        # Each side continues from our weights, so that only the errors of one accumulation are compared.
        for model in models[1:]:
            model.load_state_dict(ours.state_dict())
        bf16.round_convolutions(models[2])
        for model in models:
            model.zero_grad()
        separate: dict[str, Tensor] = {}
        for seed in range(3):
            x, labels = bf16.batch(seed=seed)
            alone = fused(stock)
            alone.load_state_dict(ours.state_dict())
            loss_of(alone, x, labels).backward()
            for model in models:
                exact = model is models[2]
                loss_of(model, x.double() if exact else x, labels, None if exact else torch.bfloat16).backward()
            # A model without a history has the same gradient: nothing is left over from other weights.
            for name, gradient in gradients_of(alone).items():
                separate[name] = separate[name] + gradient if seed else gradient
        assert_same_bits(gradients_of(ours), separate)
        assert_error_at_most_stocks(*({"all": bf16.flat(gradients_of(model))} for model in models))
        assert all(gradient.dtype == torch.float32 for gradient in separate.values())
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("mode", MODES)
def test_changed_weights_are_read_in_the_next_step(mode: str) -> None:
    """Weights are packed in every step: after an optimizer's step, ``.data`` or a replaced parameter, none is stale."""
    stock = bf16.block("bottleneck, projection")
    ours, x = fused(stock), bf16.images(4, 64, 8, 8)

    def assert_step_of_a_new_model() -> None:
        ours.zero_grad()
        fresh = fused(stock)
        fresh = fresh.bfloat16() if mode == "bfloat16" else fresh
        fresh.load_state_dict(ours.state_dict())
        assert_same_bits(bf16.run(ours, x, mode), bf16.run(fresh, x, mode))

    def step() -> None:
        torch.optim.SGD(ours.parameters(), 0.5).step()

    def write_data() -> None:
        ours.conv2.weight.data.mul_(-1)  # does not increase the version counter

    def replace() -> None:
        ours.conv1.weight = nn.Parameter(ours.conv1.weight.detach().flip(0))

    def load() -> None:
        ours.load_state_dict({name: value * 2 for name, value in ours.state_dict().items()})

    assert_step_of_a_new_model()
    for change in (step, write_data, replace, load):
        before = state_of(ours)
        change()
        assert not torch.equal(bf16.flat(before), bf16.flat(state_of(ours)))
        assert_step_of_a_new_model()


# Gradient scaling


def train_with_scaler(
    model: nn.Module, dtype: torch.dtype, scale: float, broken_step: int | None, steps: int = 3
) -> tuple[dict[str, Tensor], list[float]]:
    """Return the state after SGD steps with a gradient scaler, and its scales.

    Args:
        model: the model.
        dtype: dtype of autocast.
        scale: the scaler's initial scale.
        broken_step: number of the step whose loss is infinite, or None.
        steps: number of steps.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    scales = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, *bf16.batch(seed=step), dtype)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        scaler.scale(loss * float("inf") if step == broken_step else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        unchanged = [torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True)]
        assert all(unchanged) if step == broken_step else not any(unchanged)
        scales.append(scaler.get_scale())
    return state_of(model), scales


def test_scaled_gradients_have_the_bits_of_unscaled_ones() -> None:
    """bfloat16 has float32's exponents: a power of two scales every gradient exactly, whatever the kernels reorder."""
    ours, unscaled = fused(bf16.network()), fused(bf16.network())
    x, labels = bf16.batch()
    loss_of(unscaled, x, labels).backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    scaler.scale(loss_of(ours, x, labels)).backward()
    assert float(ours.head.bias.grad.abs().max()) > 1e3
    scaler.unscale_(optimizer)
    assert_same_bits(gradients_of(ours), gradients_of(unscaled))


def test_infinite_gradient_skips_the_step() -> None:
    """The parameters stay, the running statistics include the batch, and later steps are unaffected."""
    stock = bf16.network()
    (ours, scales), (theirs, other_scales) = (
        train_with_scaler(model, torch.bfloat16, 2.0**10, 1) for model in (fused(stock), copy.deepcopy(stock))
    )
    assert scales == other_scales == [2.0**10, 2.0**9, 2.0**9]
    # The same batches with the second step's gradients dropped, without a scaler.
    plain = fused(stock)
    optimizer = torch.optim.SGD(plain.parameters(), 0.02, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(plain, *bf16.batch(seed=step)).backward()
        if step != 1:
            optimizer.step()
    assert_same_bits(ours, state_of(plain))
    for name, value in theirs.items():
        if "num_batches_tracked" in name:
            assert ours[name] == value == 3


@pytest.mark.parametrize("broken_step", [None, 1])
def test_float16_gradient_scaling_error_is_at_most_stocks(broken_step: int | None) -> None:
    """Training in float16 with a scaler, against the float64 training that skips the same step."""
    stock = bf16.network()
    (ours, scales), (theirs, other_scales) = (
        train_with_scaler(model, torch.float16, 2.0**8, broken_step) for model in (fused(stock), copy.deepcopy(stock))
    )
    assert scales == other_scales and scales[-1] == (2.0**8 if broken_step is None else 2.0**7)
    exact = copy.deepcopy(stock).double()
    optimizer = torch.optim.SGD(exact.parameters(), 0.02, momentum=0.9)
    for step in range(3):
        x, labels = bf16.batch(seed=step)
        optimizer.zero_grad()
        loss_of(exact, x.double(), labels, None).backward()
        if step != broken_step:
            optimizer.step()
    start, end = state_of(stock), state_of(exact)
    names = [name for name, value in start.items() if value.is_floating_point()]
    for group in ("running_mean", "running_var", "weight"):
        chosen = [name for name in names if name.endswith(group)]
        changes = ({name: state[name].double() - start[name] for name in chosen} for state in (ours, theirs, end))
        assert_error_at_most_stocks(*({"all": bf16.flat(change)} for change in changes))
    assert all(ours[name] == 3 for name in start if "num_batches_tracked" in name)


# torch.compile


@pytest.fixture
def dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_fused_model_has_the_bits_of_eager(compiler: str) -> None:
    stock = bf16.network()
    ours, eager = fused(stock), fused(stock)
    compiled = torch.compile(ours, backend=compiler, fullgraph=True)
    for seed, size in enumerate((8, 8, 5)):
        x, labels = bf16.batch(size, seed=seed)
        for model in (compiled, eager):
            model.zero_grad()
            loss_of(model, x, labels).backward()
        assert_same_bits(gradients_of(ours), gradients_of(eager))
        assert_same_bits(state_of(ours), state_of(eager))
    assert count(eager, "conv_backward") == 9


@pytest.mark.usefixtures("dynamo")
def test_backend_of_torch_compile_is_as_accurate_as_stock() -> None:
    """``torch.compile(backend="fused_res")`` of a stock block, whose identity has autocast's dtype."""
    stock = bf16.block("bottleneck")
    ours = copy.deepcopy(stock)
    graphs: list[str] = []

    def spy(module: Any, inputs: Any, **options: Any) -> Any:
        runner = fused_res_backend(module, inputs, **options)
        graphs.extend(str(node.target) for node in module.graph.nodes)
        return runner

    compiled = torch.compile(ours, backend=spy)
    x = bf16.images(6, 64, 9, 9)
    results = [
        bf16.run(model, x, mode)
        for model, mode in ((compiled, "autocast"), (copy.deepcopy(stock), "autocast"), (copy.deepcopy(stock), None))
    ]
    results[0] = {name.removeprefix("_orig_mod."): value for name, value in results[0].items()}
    assert_same_bits(results[0], bf16.run(fused(stock), x, "autocast"))
    # One batch: a norm's gradient has few elements, so the error of all gradients together is compared.
    assert_error_at_most_stocks(*({"all": bf16.flat(result)} for result in results))
    assert not any("batch_norm" in target for target in graphs)


# Activation checkpointing


class Checkpointed(nn.Module):
    """The network with one or all of its blocks checkpointed."""

    def __init__(self, inner: Any, reentrant: bool, names: tuple[str, ...]) -> None:
        super().__init__()
        self.inner, self.reentrant, self.names = inner, reentrant, names

    def forward(self, x: Tensor) -> Any:
        for name, child in self.inner.named_children():
            if name == "head":
                x = x.mean((2, 3))
            x = checkpoint(child, x, use_reentrant=self.reentrant) if name in self.names else child(x)
        return x


@pytest.mark.parametrize("names", [("second",), ("first", "second", "third")], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_has_the_bits_of_training_without(reentrant: bool, names: tuple[str, ...]) -> None:
    """The statistics are updated once; stock PyTorch updates those of a checkpointed block twice."""
    ours, plain = fused(bf16.network()), fused(bf16.network())
    for seed in range(2):
        x, labels = bf16.batch(seed=seed)
        for model in (Checkpointed(ours, reentrant, names), plain):
            model.zero_grad()
            loss_of(model, x, labels).backward()
        assert_same_bits(gradients_of(ours), gradients_of(plain))
        assert_same_bits(state_of(ours), state_of(plain))
    assert ours.second.bn1.num_batches_tracked == 2


def test_checkpointed_network_error_is_at_most_stocks() -> None:
    stock = bf16.network()
    models = fused(stock), copy.deepcopy(stock), copy.deepcopy(stock).double()
    for model in models:
        exact = model is models[2]
        for seed in range(4):
            x, labels = bf16.batch(seed=seed)
            target = model if exact else Checkpointed(model, False, ("first", "second", "third"))
            loss_of(target, x.double() if exact else x, labels, None if exact else torch.bfloat16).backward()
    assert_error_at_most_stocks(*({"all": bf16.flat(gradients_of(model))} for model in models))


# Double backward


@pytest.mark.parametrize("kind", ["basic, stride 2", "bottleneck"])
def test_gradient_penalty_under_autocast(kind: str) -> None:
    """The gradient of the squared norm of the input's gradient, for every parameter of the block."""
    stock = bf16.block(kind)
    results: list[dict[str, Tensor]] = []
    models = fused(stock), copy.deepcopy(stock), copy.deepcopy(stock).double()
    for model, precision in zip(models, (True, True, False), strict=True):
        total: Tensor | None = None
        for seed in range(3):
            x = bf16.images(6, 64, 7, 7, seed=seed)
            x = (x.bfloat16() if precision else x.double()).detach().requires_grad_()
            with autocast(enabled=precision):
                y = model(x)
            (dx,) = torch.autograd.grad(y.double().square().sum(), x, create_graph=True)
            penalty = dx.double().square().sum()
            parameters = [parameter for parameter in model.parameters() if parameter.dim() == 4]
            found = torch.cat([grad.double().flatten() for grad in torch.autograd.grad(penalty, parameters)])
            total = found if total is None else torch.cat([total, found])
        assert total is not None
        results.append({"all": total})
    assert_error_at_most_stocks(*results)


def test_fused_calls_are_not_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The helpers of this file compare fused blocks: with the fused forward disabled, no plan is recorded."""
    x, labels = bf16.batch()
    ours = fused(bf16.network())
    loss_of(ours, x, labels).backward()
    assert count(ours, "conv_backward") == 9
    monkeypatch.setattr(chain, "enabled", False)
    disabled = fuse(bf16.network())
    loss_of(disabled, x, labels).backward()
    assert bf16.operators_of(disabled) == []
