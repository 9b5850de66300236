"""Train in parallel processes of one thread each: faster than one training run after the other on all cores."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import wait
from typing import Any

import torch
from tqdm import tqdm

from examples.data import Data, load
from examples.depth_study.settings import Study, TrainingConfig
from examples.depth_study.store import Store
from examples.depth_study.training import train

#: Queue to which a worker process reports the cost of finished epochs.
_epochs: Any = None


def run(study: Study, runs: Iterable[TrainingConfig], store: Store, jobs: int) -> None:
    """Execute the training runs that `store` has no result of, `jobs` at a time, the longest first.

    The results do not depend on `jobs`.

    Raises:
        Exception: the exception of the first training run that failed, after all others have been terminated.
    """
    images = len(study.data.train.labels)
    requested = sorted(dict.fromkeys(runs), key=lambda training: -training.cost(images))
    missing = [training for training in requested if store.result(training) is None]
    if len(missing) < len(requested):
        print(f"{len(requested) - len(missing)} of {len(requested)} training runs are already finished")
    if not missing:
        return
    # Not fork: PyTorch's thread pool does not survive it.
    context = multiprocessing.get_context("spawn")
    epochs = context.SimpleQueue()
    bar = tqdm(
        total=sum(training.cost(images) for training in missing),
        desc="training",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} remaining{postfix}",
        smoothing=0.05,
    )
    listener = threading.Thread(target=_listen, args=(epochs, bar), daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(min(jobs, len(missing)), context, _init_worker, (epochs,))
    try:
        source = (study.source, study.data.size)
        futures = {pool.submit(_train, training, source, store, images): training for training in missing}
        for done, future in enumerate(as_completed(futures), start=1):
            result = future.result()
            tqdm.write(
                f"{futures[future].label}: training error {result['train_error']:.2f} %,"
                f" test error {result['test_error']:.2f} % ({result['seconds']:.0f} s)"
            )
            bar.set_postfix_str(f"{done} of {len(missing)} training runs", refresh=False)
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        epochs.put(None)
        listener.join()
        bar.close()


def _listen(epochs: Any, bar: tqdm) -> None:
    for cost in iter(epochs.get, None):
        bar.update(cost)


def _init_worker(epochs: Any) -> None:
    """Initialize a worker process."""
    global _epochs
    _epochs = epochs
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent terminates its workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent process ends: a killed parent cannot terminate its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@functools.cache
def _data(source: str, size: int) -> Data:
    return load(source, size)


def _train(training: TrainingConfig, source: tuple[str, int], store: Store, images: int) -> dict[str, Any]:
    cost = training.cost(images) // training.epochs
    return train(training, _data(*source), store, lambda epochs: _epochs.put(epochs * cost))
