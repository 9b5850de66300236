"""Groups of processes on this machine, joined by gloo, that run a test's functions and give back what these return.

Python's forkserver imports torch and the tests' modules once; each process is a fork of it.
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

#: A process that waits for another for so long waits in vain.
_PATIENCE_S = 120
#: Modules with the functions that run in the processes.
_PRELOADED = ["tests.distributed.test_sync_batch_norm", "examples.train"]


def _forkserver() -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _serve(rank: int, world: int, meeting: str, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no processes below this one
    patience = datetime.timedelta(seconds=_PATIENCE_S)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world, timeout=patience)
    while True:
        function, arguments = tasks.get()
        try:
            results.put((rank, function(*arguments), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))


class Processes:
    """``run(function, ...)`` calls a function of a module in every process; there it may use ``torch.distributed``."""

    def __init__(self, world: int, folder: Path) -> None:
        context = _forkserver()
        self.world = world
        self._results = context.SimpleQueue()
        self._tasks = [context.SimpleQueue() for _ in range(world)]
        self._processes = [
            context.Process(
                target=_serve, args=(rank, world, str(folder / "meeting"), tasks, self._results), daemon=True
            )
            for rank, tasks in enumerate(self._tasks)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each process returned, by rank. Raises AssertionError with the traceback of each that raised."""
        for tasks in self._tasks:
            tasks.put((function, arguments))
        answers = sorted((self._results.get() for _ in range(self.world)), key=lambda answer: answer[0])
        errors = [f"process {rank}:\n{error}" for rank, _, error in answers if error is not None]
        assert not errors, "\n".join(errors)
        return [value for _, value, _ in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


@contextlib.contextmanager
def processes(world: int, folder: Path) -> Iterator[Processes]:
    group = Processes(world, folder)
    try:
        yield group
    finally:
        group.close()


def _rank(main: Callable[[list[str]], int], arguments: list[str], variables: dict[str, str]) -> None:
    os.environ.update(variables)
    raise SystemExit(main(arguments))


def run_ranks(world: int, main: Callable[[list[str]], int], arguments: list[str]) -> None:
    """Calls ``main(arguments)`` in `world` processes with torchrun's variables; each has to return 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    ranks = [
        _forkserver().Process(
            target=_rank,
            args=(
                main,
                arguments,
                common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)},
            ),
            daemon=True,
        )
        for rank in range(world)
    ]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(_PATIENCE_S)
        assert [rank.exitcode for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()
