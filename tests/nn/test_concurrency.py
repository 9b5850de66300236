"""Models in threads, forked processes, DataLoader workers and shared memory: no deadlocks, bitwise equal results."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fused_res
from fused_res.models import cifar_resnet

TIMEOUT_S = 120


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return cifar_resnet(8).to(memory_format=torch.channels_last)


def images(seed: int, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)


def train(model: nn.Module, seed: int = 0, steps: int = 3) -> list[Tensor]:
    """Return the losses of some training steps, then the state after them."""
    torch.set_num_threads(1)  # PyTorch's results, of the loss and the last layer, depend on the number of threads
    fused_res.fuse(model.train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        loss = model(images(100 * seed + step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(t.detach().clone() for t in model.state_dict().values())]


def bitwise_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_concurrent_training_of_separate_models_is_bitwise_equal() -> None:
    """Eight threads train one model each; the results equal those of sequential training.

    tests/backends/cpu/test_inference_graph.py tests one frozen model that several threads call.
    """
    expected = [train(network(seed), seed) for seed in range(8)]
    models = [network(seed) for seed in range(8)]  # created here, because all threads share one random generator
    actual: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=lambda i=i: actual.update({i: train(models[i], i)})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(bitwise_equal(actual[seed], expected[seed]) for seed in range(8))


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def run_in_forked_child(work: Callable[[], bool]) -> bool:
    """Return the result of `work` in a forked child; kill a child that exceeds the timeout."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child exceeded the timeout")


def test_forked_child_with_one_thread_does_not_hang() -> None:
    """Run a model that the parent has already used, in a forked child with one thread.

    In a forked child, GNU OpenMP, which PyTorch uses, waits in the first parallel loop (PyTorch's or this library's)
    for threads that exist in the parent only. ``torch.set_num_threads(1)`` in the child avoids parallel loops;
    DataLoader workers call it by default.
    """
    frozen, x = fused_res.freeze(network()), images(1, 16)
    with torch.no_grad():
        expected = frozen(x)
    fused_res.fuse(network().train())(x).sum().backward()  # both models have run with OpenMP's two threads
    trained = train(network(3))

    def work() -> bool:
        torch.set_num_threads(1)
        with torch.no_grad():
            logits = frozen(x)
        return torch.allclose(logits, expected, rtol=1e-4, atol=1e-5) and bitwise_equal(train(network(3)), trained)

    assert run_in_forked_child(work)
    torch.set_num_threads(2)
    with torch.no_grad():
        assert torch.equal(frozen(x), expected), "the parent's results changed"


class Logits(Dataset[Tensor]):
    """The logits of a model that is sent to the workers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.model(images(index))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers_run_models(start: str) -> None:
    """A frozen and a fused model, both used in the parent before, run in DataLoader workers."""
    trained = fused_res.fuse(network().train())
    trained(images(0)).sum().backward()
    for model in (fused_res.freeze(network()), trained.eval()):
        dataset = Logits(model)
        expected = [dataset[index] for index in range(6)]
        loader = DataLoader(dataset, None, num_workers=2, multiprocessing_context=start, timeout=TIMEOUT_S)
        for actual, reference in zip(loader, expected, strict=True):  # workers have one thread, this process two
            torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-5)


def _evaluate_shared(model: nn.Module, barrier: Any, results: Any, rank: int) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        results.put(
            ("first", model(images(5)).tolist())
        )  # a list: a tensor's shared memory would be freed when this process ends
    barrier.wait(TIMEOUT_S)
    if rank == 0:  # modify the shared tensors once
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.mul_(0.5)
    barrier.wait(TIMEOUT_S)
    with torch.no_grad():
        results.put(("again", model(images(5)).tolist()))


@pytest.mark.parametrize("frozen", [False, True], ids=["fused", "frozen"])
def test_model_in_shared_memory(frozen: bool) -> None:
    """Two spawned processes run one model; after one modifies it, both use the new values.

    A frozen model is exempt: each process caches packed weights.
    """
    model = fused_res.freeze(network()) if frozen else fused_res.fuse(network()).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.share_memory()
    torch.set_num_threads(1)
    with torch.no_grad():
        before = model(images(5)).tolist()
    context = mp.get_context("spawn")
    barrier, results = context.Barrier(2), context.SimpleQueue()
    workers = [context.Process(target=_evaluate_shared, args=(model, barrier, results, rank)) for rank in range(2)]
    for worker in workers:
        worker.start()
    received: dict[str, list[Any]] = {"first": [], "again": []}
    for _ in range(4):
        which, logits = results.get()
        received[which].append(logits)
    for worker in workers:
        worker.join(TIMEOUT_S)
    with torch.no_grad():
        after = model(images(5)).tolist()
    assert frozen or after != before
    assert received["first"] == [before, before]
    assert frozen or received["again"] == [after, after]
