"""A training run that can be interrupted anywhere and goes on as if it had not been."""

from __future__ import annotations

import argparse
import math
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint import state_dict as distributed_state
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import fused_res
from examples import checkpoint, networks
from examples.data import Batch, Data
from examples.distributed import Processes, gradients, replicate, shard
from examples.logs import COLUMNS, Log, Row
from examples.options import AMP, curve
from examples.schedule import rate_factor

#: Whole tensors, on the first process's CPU: one kind of checkpoint for every way of training.
WHOLE = distributed_state.StateDictOptions(full_state_dict=True, cpu_offload=True)


class TrainingError(Exception):
    """Training cannot go on."""


class Stopped(Exception):
    """A signal asked for it, and everything is saved."""


class StopSignal:
    """Inside of its block, SIGTERM and SIGINT only set ``came``.

    The second one ends a process that is by itself; many processes get several, from the terminal and from torchrun.
    """

    def __init__(self, only_once: bool) -> None:
        self.came = False
        self.only_once = only_once
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        self.came = True
        if self.only_once:
            signal.signal(number, signal.SIG_DFL)


@dataclass
class Totals:
    """Sums over the running epoch, brought in step by step, so that it does not matter how many at a time."""

    loss: float = 0.0
    errors: float = 0.0
    count: int = 0  #: of images
    seconds: float = 0.0

    def means(self) -> tuple[float, float]:
        """The loss and the share of errors of an image."""
        return self.loss / max(self.count, 1), self.errors / max(self.count, 1)


class Trainer:
    """Everything that a run consists of. What :meth:`state` holds is saved; the rest follows from the options."""

    def __init__(self, options: argparse.Namespace, data: Data, processes: Processes) -> None:
        self.options = options
        self.data = data
        self.processes = processes
        self.stop_signal = StopSignal(only_once=processes.world == 1)

        place = processes.rank, processes.world
        self.train_loader = data.training(options.batch_size, options.seed, *place, augment=options.augment)
        self.test_loader = data.testing(options.batch_size, *place)
        self.steps = options.epochs * self.train_loader.steps
        self.warmup = round(options.warmup_epochs * self.train_loader.steps)
        self.settings = curve(options) | {"data": data.name}
        self._build()

        self.epoch = 0  # how many are finished
        self.step = 0  # likewise, over all epochs
        self.totals = Totals()
        self.history: list[Row] = []
        self.started = time.perf_counter()
        self.unseen: list[tuple[Tensor, int]] = []  # sums of steps that are not in `totals` yet, and their images

    def _build(self) -> None:
        options, processes = self.options, self.processes
        torch.manual_seed(options.seed)  # the same weights in every process
        model = networks.build(options.model, self.data.classes, options.width, options.plain)
        if options.sync_bn:
            model = fused_res.convert_sync_batchnorm(model)
        self.memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        # FSDP2 wants contiguous weights; the images' format is enough to choose the convolutions by.
        model.to(processes.device, memory_format=torch.contiguous_format if options.fsdp else self.memory_format)
        networks.set_fusion(model, options.fuse, options.backend, options.recompute)
        if options.checkpoint_blocks:
            networks.checkpoint_blocks(model)

        self.model = model
        self.average = None
        if options.ema is not None:
            # One by one under FSDP, whose parameters are of another class than the buffers; else all at once.
            how: Any = (
                {"avg_fn": get_ema_avg_fn(options.ema)}
                if options.fsdp
                else {"multi_avg_fn": get_ema_multi_avg_fn(options.ema)}
            )
            self.average = AveragedModel(model, use_buffers=True, **how)
        if options.fsdp:
            for module in (model, self.average.module) if self.average else (model,):
                shard(module, networks.residual_blocks(module), processes)
        # With the parameters that there are now: sharding makes new ones.
        groups = networks.parameter_groups(model, options.weight_decay)
        self.optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=options.amp == "fp16")
        if options.compile:
            model.compile()
        self.runner = replicate(model, processes) if processes.world > 1 and not options.fsdp else model
        torch.manual_seed(options.seed + processes.rank)  # for dropout, where a network has it

    def run(self) -> Row:
        """Trains to the end, from a checkpoint if there is one; returns the last epoch's row.

        Raises: Stopped: after SIGTERM or SIGINT. TrainingError: the loss or a weight is not finite, or the checkpoint
        is of another run. CheckpointError: the checkpoint is damaged, or all of them are.
        """
        out, tensorboard = self.options.out, self.options.tensorboard
        out.mkdir(parents=True, exist_ok=True)
        with self.stop_signal:
            self._resume()
            log = Log(out, self.steps, self.step, tensorboard, silent=not self.processes.first)
            try:
                log.write_csv(self.history)
                while self.epoch < self.options.epochs:
                    self._train_epoch(log)
                    self._finish_epoch(log, *self._test())
            except Stopped:
                self.save()
                raise
            finally:
                log.close()
        return self.history[-1]

    def _train_epoch(self, log: Log) -> None:
        """What is left of the running epoch."""
        self.model.train()
        options, steps = self.options, self.train_loader.steps
        mark = time.perf_counter()
        for batch in self.train_loader.batches(self.epoch, self.step - self.epoch * steps):
            self._stop_if_asked()
            self.unseen.append((self._train_step(batch), batch.global_count))
            self.step += 1
            if self.step % options.log_every == 0 or self.step % steps == 0:
                self._see_losses()
                loss, error = self.totals.means()
                log.progress(self.step, {"train/loss": loss, "train/error": error, "lr": self._rate(self.step - 1)})
            mark, before = time.perf_counter(), mark
            self.totals.seconds += mark - before
            if options.checkpoint_every and self.step % options.checkpoint_every == 0 and self.step % steps:
                self.save()

    def _train_step(self, batch: Batch) -> Tensor:
        """One step of the optimizer; returns the sums of this process's losses and errors, float64 of shape (2,)."""
        options, world = self.options, self.processes.world
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.step)
        images, labels = self._moved(batch)
        sums = torch.zeros(2, dtype=torch.float64, device=images.device)
        parts = zip(images.tensor_split(options.accumulate), labels.tensor_split(options.accumulate), strict=True)
        for index, (images, labels) in enumerate(parts):
            with gradients(self.runner, complete=index == options.accumulate - 1):
                outputs = self._outputs(self.runner, images)
                # A sum, for a process may have no image at all. Gradients are averaged over processes: times `world`,
                # over the images of all of them, that is the gradient of the mean loss of an image.
                loss = F.cross_entropy(outputs, labels, reduction="sum", label_smoothing=options.label_smoothing)
                self.scaler.scale(loss * (world / batch.global_count)).backward()
            sums += _sums(loss, outputs, labels)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return sums

    @torch.no_grad()
    def _test(self) -> tuple[float, float]:
        """Loss and share of errors over the whole test set, of the averaged weights if there are such."""
        self.processes.share_buffers(self.model, self.average)
        model = self.model if self.average is None else self.average
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.processes.device)
        for batch in self.test_loader.batches():
            self._stop_if_asked()
            images, labels = self._moved(batch)
            outputs = self._outputs(model, images)
            sums += _sums(F.cross_entropy(outputs, labels, reduction="sum"), outputs, labels)
        loss, errors = self.processes.sum(sums).tolist()
        count = len(self.data.test.labels)
        return loss / count, errors / count

    def _finish_epoch(self, log: Log, test_loss: float, test_error: float) -> None:
        self.epoch += 1
        speed = self.totals.count / self.totals.seconds
        values = self._rate(self.step - 1), *self.totals.means(), test_loss, test_error, speed, self._seconds()
        row = dict(zip(COLUMNS, (self.epoch, self.step, *values), strict=True))
        self.history.append(row)
        self.totals = Totals()
        log.epoch(row, self.options.epochs)
        log.write_csv(self.history)
        self.save()

    def _rate(self, step: int) -> float:
        return self.options.lr * rate_factor(step, self.steps, self.warmup)

    def _seconds(self) -> float:
        return time.perf_counter() - self.started

    def _moved(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device = self.processes.device
        return batch.images.to(device, memory_format=self.memory_format), batch.labels.to(device)

    def _outputs(self, model: torch.nn.Module, images: Tensor) -> Tensor:
        dtype = AMP[self.options.amp]
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            return model(images).float()

    def _stop_if_asked(self) -> None:
        if self.processes.any(self.stop_signal.came):
            raise Stopped

    def _see_losses(self) -> None:
        """Brings the steps done since the last time into `totals`: now and then, because a GPU is waited for."""
        if not self.unseen:
            return
        first = self.step - len(self.unseen)
        sums = self.processes.sum(torch.stack([sums for sums, _ in self.unseen])).tolist()
        for step, (loss, errors), (_, count) in zip(range(first, self.step), sums, self.unseen, strict=True):
            if not math.isfinite(loss):
                raise TrainingError(self._diverged(f"the loss is {loss}", step))
            self.totals.loss += loss
            self.totals.errors += errors
            self.totals.count += count
        self.unseen.clear()

    def _diverged(self, what: str, step: int) -> str:
        epoch = step // self.train_loader.steps + 1
        return (
            f"{what} in epoch {epoch}, step {step + 1}, at a learning rate of {self._rate(step):.4g}: nothing of it is"
            " saved; try a lower --lr or a longer --warmup-epochs, with --resume never if earlier steps broke it"
        )

    # Saving, and going on

    def save(self) -> None:
        """Writes a checkpoint; all processes have to call it.

        Raises: TrainingError: a loss or a weight is not finite, and so nothing is written.
        """
        if not self.optimizer.state:  # before the first step that the scaler let pass: there is nothing to lose
            return
        self._see_losses()
        self.processes.share_buffers(self.model, self.average)
        state = self.state()
        broken = [name for name, value in state["model"].items() if not value.isfinite().all()]
        if self.processes.any(bool(broken)):
            raise TrainingError(self._diverged(f"{broken[0] if broken else 'a weight'} is not finite", self.step - 1))
        if self.processes.first:
            checkpoint.save(state, self.options.out / checkpoint.file_name(self.step))
            checkpoint.prune(self.options.out, self.options.keep)

    def state(self) -> dict[str, Any]:
        """What a run goes on from, in tensors and plain containers; weights and such only in the first process."""
        model, optimizer = distributed_state.get_state_dict(self.model, self.optimizer, options=WHOLE)
        average = None
        if self.average is not None:
            average = distributed_state.get_model_state_dict(self.average, options=WHOLE)
        return {
            "settings": self.settings,
            "model": model,
            "average": average,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "random": self.processes.gather(_random_state(self.processes.device)),
            "epoch": self.epoch,
            "step": self.step,
            "totals": asdict(self.totals),
            "history": self.history,
            "seconds": self._seconds(),
        }

    def _resume(self) -> None:
        # The first process decides, and if it cannot, all of them have to hear of it.
        path = self.processes.of_first(self._checkpoint() if self.processes.first else None)
        if isinstance(path, checkpoint.CheckpointError):
            raise path
        if path is None:
            return
        state = checkpoint.load(path)
        self._check_settings(state, path)
        distributed_state.set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=WHOLE,
        )
        if self.average is not None:
            distributed_state.set_model_state_dict(self.average, state["average"], options=WHOLE)
        self.scaler.load_state_dict(state["scaler"])
        if self.processes.rank < len(state["random"]):
            _set_random_state(state["random"][self.processes.rank], self.processes.device)
        self.epoch, self.step = state["epoch"], state["step"]
        self.totals = Totals(**state["totals"])
        self.history = state["history"]
        self.started = time.perf_counter() - state["seconds"]
        if self.processes.first:
            print(f"going on from {path}: {self.epoch} epochs, {self.step} steps done", flush=True)
            # What lies ahead is another run's, or damaged: it must not be taken for the newest one.
            for ahead in checkpoint.newest_first(self.options.out):
                if ahead.name > checkpoint.file_name(self.step):
                    ahead.unlink()

    def _checkpoint(self) -> Path | checkpoint.CheckpointError | None:
        out, resume = self.options.out, self.options.resume
        try:
            if resume == "auto":
                return checkpoint.latest(out)
            if resume != "never":
                checkpoint.check(Path(resume))
                return Path(resume)
        except checkpoint.CheckpointError as error:
            return error
        checkpoint.prune(out, keep=0)
        return None

    def _check_settings(self, state: dict[str, Any], path: Path) -> None:
        if not isinstance(saved := state.get("settings"), dict):
            raise TrainingError(f"{path} is not a checkpoint of this script")
        differences = [
            f"{name} was {saved.get(name)}, is {value}"
            for name, value in self.settings.items()
            if saved.get(name) != value
        ]
        if differences:
            raise TrainingError(
                f"{path} is of a run with other settings ({'; '.join(differences)}): choose another --out, or --resume"
                " never to start anew"
            )


def _sums(loss: Tensor, outputs: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([loss.detach().double(), (outputs.argmax(1) != labels).sum().double()])


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
