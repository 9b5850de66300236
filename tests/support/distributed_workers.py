"""Worker processes on this machine, connected by gloo, that run functions of a test and return their results.

Python's forkserver imports torch and the test modules once; each worker is forked from it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: Timeout of the process group and of joining a worker.
_TIMEOUT_S = 120
#: Modules with the functions that run in the workers.
_PRELOADED_MODULES = [
    "tests.distributed.test_sync_batch_norm",
    "tests.distributed.test_bf16_training",
    "examples.train",
]


def _forkserver() -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED_MODULES)
    return context


def _worker_loop(rank: int, world_size: int, init_file: str, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # Inductor starts no child processes
    timeout = datetime.timedelta(seconds=_TIMEOUT_S)
    dist.init_process_group("gloo", f"file://{init_file}", rank=rank, world_size=world_size, timeout=timeout)
    while True:
        function, arguments = tasks.get()
        try:
            results.put((rank, function(*arguments), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))


class WorkerGroup:
    """A group of worker processes in which functions can use ``torch.distributed``.

    Args:
        world_size: number of processes.
        folder: an empty folder for the rendezvous file.
    """

    def __init__(self, world_size: int, folder: Path) -> None:
        context = _forkserver()
        self.world_size = world_size
        self._results = context.SimpleQueue()
        self._tasks = [context.SimpleQueue() for _ in range(world_size)]
        self._processes = [
            context.Process(
                target=_worker_loop,
                args=(rank, world_size, str(folder / "rendezvous"), tasks, self._results),
                daemon=True,
            )
            for rank, tasks in enumerate(self._tasks)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a module-level function in every process and return the results by rank.

        Raises:
            AssertionError: a process raised; the message has the traceback of each.
        """
        for tasks in self._tasks:
            tasks.put((function, arguments))
        results = sorted((self._results.get() for _ in range(self.world_size)), key=lambda result: result[0])
        errors = [f"process {rank}:\n{error}" for rank, _, error in results if error is not None]
        assert not errors, "\n".join(errors)
        return [value for _, value, _ in results]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


@contextlib.contextmanager
def worker_group(world_size: int, folder: Path) -> Iterator[WorkerGroup]:
    """Start a :class:`WorkerGroup`, and kill its processes when the block ends."""
    group = WorkerGroup(world_size, folder)
    try:
        yield group
    finally:
        group.close()


def _rank_main(main: Callable[[list[str]], int], arguments: list[str], variables: dict[str, str]) -> None:
    os.environ.update(variables)
    raise SystemExit(main(arguments))


def run_ranks(world_size: int, main: Callable[[list[str]], int], arguments: list[str]) -> None:
    """Call ``main(arguments)`` in `world_size` processes with torchrun's environment variables; each must return 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        _forkserver().Process(
            target=_rank_main,
            args=(
                main,
                arguments,
                common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)},
            ),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(_TIMEOUT_S)
        assert [rank.exitcode for rank in ranks] == [0] * world_size
    finally:
        for rank in ranks:
            rank.kill()
