"""Models shared by threads, forked, sent to workers: the same bits as alone, and nobody waits for ever."""

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

PATIENCE_S = 120


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return cifar_resnet(8).to(memory_format=torch.channels_last)


def images(seed: int, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)


def train(model: nn.Module, seed: int = 0, steps: int = 3) -> list[Tensor]:
    """Losses and all that a model consists of behind some steps."""
    torch.set_num_threads(1)  # stock's bits, of the loss and the last layer, depend on it
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


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_threads_train_models_of_their_own() -> None:
    """Of one model frozen and called by many threads: test_program.py."""
    expected = [train(network(seed), seed) for seed in range(8)]
    models = [network(seed) for seed in range(8)]  # here, as all threads draw from one generator
    found: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: train(models[i], i)})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(found[seed], expected[seed]) for seed in range(8))


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def forked(work: Callable[[], bool]) -> bool:
    """Whether a forked child's work came out true; a child that hangs is ended."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


def test_a_forked_child_with_one_thread() -> None:
    """GNU's OpenMP, which is PyTorch's, waits in a forked child for threads that only the parent has, as soon as a loop
    is parallel, stock's loops as ours. With ``torch.set_num_threads(1)`` in the child there are none. (Workers of a
    DataLoader do that by themselves.)"""
    frozen, x = fused_res.freeze(network()), images(1, 16)
    with torch.no_grad():
        expected = frozen(x)
    fused_res.fuse(network().train())(x).sum().backward()  # OpenMP's two threads have been at both
    trained = train(network(3))

    def work() -> bool:
        torch.set_num_threads(1)
        with torch.no_grad():
            logits = frozen(x)
        return torch.allclose(logits, expected, rtol=1e-4, atol=1e-5) and same(train(network(3)), trained)

    assert forked(work)
    torch.set_num_threads(2)
    with torch.no_grad():
        assert torch.equal(frozen(x), expected), "the parent goes on"


class Features(Dataset[Tensor]):
    """What a model that travels to the workers says about images."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.model(images(index))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(start: str) -> None:
    """With models that were used before, frozen and fused."""
    trained = fused_res.fuse(network().train())
    trained(images(0)).sum().backward()
    for model in (fused_res.freeze(network()), trained.eval()):
        dataset = Features(model)
        expected = [dataset[index] for index in range(6)]
        loader = DataLoader(dataset, None, num_workers=2, multiprocessing_context=start, timeout=PATIENCE_S)
        for found, right in zip(loader, expected, strict=True):  # workers have one thread, this process two
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def _train_shared(model: nn.Module, barrier: Any, results: Any, rank: int) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        results.put(("first", model(images(5)).tolist()))  # no tensor: whose memory would end with this process
    barrier.wait(PATIENCE_S)
    if rank == 0:  # the others see what one changes
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.mul_(0.5)
    barrier.wait(PATIENCE_S)
    with torch.no_grad():
        results.put(("again", model(images(5)).tolist()))


@pytest.mark.parametrize("frozen", [False, True], ids=["fused", "frozen"])
def test_a_model_in_shared_memory(frozen: bool) -> None:
    """Two spawned processes read it; and read anew what one of them writes, unless frozen: weights are packed then."""
    model = fused_res.freeze(network()) if frozen else fused_res.fuse(network()).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.share_memory()
    torch.set_num_threads(1)
    with torch.no_grad():
        before = model(images(5)).tolist()
    context = mp.get_context("spawn")
    barrier, results = context.Barrier(2), context.SimpleQueue()
    workers = [context.Process(target=_train_shared, args=(model, barrier, results, rank)) for rank in range(2)]
    for worker in workers:
        worker.start()
    answers: dict[str, list[Any]] = {"first": [], "again": []}
    for _ in range(4):
        which, logits = results.get()
        answers[which].append(logits)
    for worker in workers:
        worker.join(PATIENCE_S)
    with torch.no_grad():
        after = model(images(5)).tolist()
    assert frozen or after != before
    assert answers["first"] == [before, before]
    assert frozen or answers["again"] == [after, after]
