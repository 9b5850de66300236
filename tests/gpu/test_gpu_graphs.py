"""CUDA graphs of whole training steps with fused blocks, by PyTorch's own tools: the same bits as eager steps.

Every test trains two copies of a network on the same batches, one eagerly and one through a graph, and compares losses,
parameters and running statistics after each of three steps, whose inputs differ.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_res
from tests.support import gpu_backends as gpu

if not torch.cuda.is_available():
    pytest.skip("CUDA graphs need a GPU", allow_module_level=True)

DEVICE = torch.device("cuda")
STEPS, BATCH, CLASSES = 3, 8, 10
on_all = pytest.mark.parametrize("backend", gpu.BACKENDS)
with_preferences = pytest.mark.parametrize("convolution", ["aten", "fused"])


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def network(backend: str) -> nn.Module:
    """Return two bottlenecks, one with a projection shortcut, and a linear layer."""
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(32, 64, 1, stride=2, bias=False), nn.BatchNorm2d(64))
    blocks = [
        fused_res.nn.Bottleneck(32, 16, stride=2, downsample=down, backend=backend),
        fused_res.nn.Bottleneck(64, 16, backend=backend),
    ]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))
    return model.to(DEVICE, memory_format=torch.channels_last).train()


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the input and the target of each step."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(BATCH, 32, 16, 16, device=DEVICE, generator=generator)
        target = torch.randint(CLASSES, (BATCH,), device=DEVICE, generator=generator)
        yield x.to(memory_format=torch.channels_last), target


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, amp: bool = True) -> Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=amp):
        return nn.functional.cross_entropy(model(x), target)


def step_of(
    model: nn.Module, forward: Callable[[Tensor], Tensor] | None = None, amp: bool = True
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return an eager training step of `model`, whose forward may be replaced."""
    optimizer = optimizer_of(model)

    def step(x: Tensor, target: Tensor) -> Tensor:
        loss = loss_of(forward or model, x, target, amp)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach().clone()

    return step


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Undo warm-up steps in place: captured graphs keep the addresses of the tensors."""
    model.load_state_dict(state)
    for slots in optimizer.state.values():
        for value in slots.values():
            if isinstance(value, Tensor):
                value.zero_()


def check_equal(actual: nn.Module, expected: nn.Module, losses: tuple[Tensor, Tensor], step: int) -> None:
    assert torch.equal(*losses), f"loss of step {step}: {losses}"
    for (name, a), b in zip(actual.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{name} after step {step}"
    counts = [value for name, value in actual.state_dict().items() if name.endswith("num_batches_tracked")]
    assert all(int(count) == step + 1 for count in counts), "the running statistics are updated once a replay"


@on_all
@with_preferences
def test_a_captured_training_step_has_the_bits_of_an_eager_one(backend: str, convolution: str) -> None:
    with fused_res.backends.use("auto", convolution):
        expected, model = network(backend), network(backend)
        eager, optimizer = step_of(expected), optimizer_of(model)
        state = copy.deepcopy(model.state_dict())
        static_x, static_target = (t.clone() for t in next(batches()))

        def step() -> Tensor:
            loss = loss_of(model, static_x, static_target)
            loss.backward()
            optimizer.step()
            return loss.detach()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                optimizer.zero_grad(set_to_none=True)
                step()
        torch.cuda.current_stream().wait_stream(stream)
        optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static_loss = step()
        restore(model, optimizer, state)
        for index, (x, target) in enumerate(batches()):
            static_x.copy_(x)
            static_target.copy_(target)
            graph.replay()
            check_equal(model, expected, (static_loss, eager(x, target)), index)


@on_all
@with_preferences
def test_make_graphed_callables_has_the_bits_of_eager_steps(backend: str, convolution: str) -> None:
    with fused_res.backends.use("auto", convolution):
        expected, model = network(backend), network(backend)
        state = copy.deepcopy(model.state_dict())
        sample = next(batches())[0].clone().requires_grad_()
        features = model[0](sample).detach().requires_grad_()
        # In float32: a graphed callable has the dtypes and the autocast state of its capture.
        model[1] = torch.cuda.make_graphed_callables(model[1], (features,))
        model.load_state_dict(state)  # warm-up and capture have updated the running statistics
        eager, graphed = step_of(expected, amp=False), step_of(model, amp=False)
        for index, (x, target) in enumerate(batches()):
            check_equal(model, expected, (graphed(x, target), eager(x, target)), index)


@on_all
def test_reduce_overhead_has_the_bits_of_compiled_steps_without_graphs(backend: str) -> None:
    torch._dynamo.reset()
    with fused_res.backends.use("auto", "aten"):
        expected, model = network(backend), network(backend)
        plain = step_of(expected, torch.compile(expected, mode="default"))
        graphed = step_of(model, torch.compile(model, mode="reduce-overhead"))
        for index, (x, target) in enumerate(batches()):
            torch.compiler.cudagraph_mark_step_begin()
            loss = graphed(x, target)
            check_equal(model, expected, (loss, plain(x, target)), index)
