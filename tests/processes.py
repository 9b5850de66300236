"""Groups of processes on this machine, joined by gloo, that run a test's functions and give back what these return."""

from __future__ import annotations

import contextlib
import datetime
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: A process that waits for another for so long waits in vain.
_PATIENCE_S = 120


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
        context = mp.get_context("spawn")
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
