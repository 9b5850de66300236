"""Training loop of the study: one optimizer, schedule and data order for every network, resumable after each epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from examples.data import Data, Images
from examples.depth_study.settings import MOMENTUM, WARMUP_EPOCHS, WEIGHT_DECAY, TrainingConfig
from examples.depth_study.store import Store
from examples.schedule import lr_factor

#: Shortest interval between two saved states of an unfinished training run.
SECONDS_BETWEEN_STATES = 10.0


class DivergedError(RuntimeError):
    """The loss is infinite or not a number."""


def train(training: TrainingConfig, data: Data, store: Store, epoch_done: Callable[[int], None]) -> dict[str, Any]:
    """Train, resuming an interrupted run, and store weights and result.

    Args:
        training: settings of the training.
        data: the data set.
        store: where states, weights and the result are stored.
        epoch_done: called with the number of newly finished epochs: 1 after each epoch, and on resume the number of
            epochs that an earlier process finished.

    Returns:
        ``curve_loss`` and ``curve_error``: means over each epoch, measured during training, with augmentation.
        ``train_loss``, ``train_error``, ``test_loss``, ``test_error``: at the end of training, in eval mode, without
        augmentation. Errors are in percent. ``seconds``: training time.

    Raises:
        DivergedError: the loss is infinite or not a number.
    """
    torch.manual_seed(training.seed)
    model = training.network.build(data.classes, training.backend).to(memory_format=torch.channels_last)
    loader = data.train_loader(training.batch_size, training.seed)
    optimizer = torch.optim.SGD(
        model.parameters(), training.learning_rate, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    steps, warmup = training.epochs * loader.steps, min(WARMUP_EPOCHS, training.epochs) * loader.steps
    curve: list[dict[str, float]] = []
    seconds = 0.0
    if state := store.load_unfinished(training):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        curve, seconds = state["curve"], state["seconds"]
        epoch_done(len(curve))

    started = stored = time.monotonic()
    for epoch in range(len(curve), training.epochs):
        model.train()
        total, wrong = 0.0, 0
        for step, batch in enumerate(loader.batches(epoch), start=epoch * loader.steps):
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * lr_factor(step, steps, warmup)
            output = model(batch.images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(output, batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch.labels)
            wrong += int((output.argmax(1) != batch.labels).sum())
        if not math.isfinite(total):
            raise DivergedError(f"{training.label}: the loss is {total} in epoch {epoch + 1}; a smaller --lr may help")
        count = len(data.train.labels)
        curve.append({"loss": total / count, "error": 100 * wrong / count})
        now = time.monotonic()
        if now - stored > SECONDS_BETWEEN_STATES:
            stored = now
            so_far = {"curve": curve, "seconds": seconds + now - started}
            store.save_unfinished(
                training, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **so_far}
            )
        epoch_done(1)

    train_loss, train_error = evaluate(model, data, data.train)
    test_loss, test_error = evaluate(model, data, data.test)
    result = {
        "curve_loss": [round(point["loss"], 5) for point in curve],
        "curve_error": [round(point["error"], 3) for point in curve],
        "train_loss": train_loss,
        "train_error": train_error,
        "test_loss": test_loss,
        "test_error": test_error,
        "seconds": round(seconds + time.monotonic() - started, 1),
    }
    store.finish(training, result, model.state_dict())
    return result


def evaluate(model: nn.Module, data: Data, split: Images) -> tuple[float, float]:
    """Return mean cross entropy and error in percent, in eval mode, without augmentation."""
    model.eval()
    total, wrong = 0.0, 0
    with torch.no_grad():
        for batch in data.test_loader(256, split=split).batches():
            output = model(batch.images.contiguous(memory_format=torch.channels_last))
            total += F.cross_entropy(output, batch.labels, reduction="sum").item()
            wrong += int((output.argmax(1) != batch.labels).sum())
    return total / len(split.labels), 100 * wrong / len(split.labels)
