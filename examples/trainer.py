"""Resumable training loop: SGD, warm-up and cosine decay, AMP, EMA, DDP and FSDP2.

A run can be interrupted at any point and resumes from its newest checkpoint; on a CPU the result is bit-identical to
that of an uninterrupted run.
"""

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
from examples.distributed import DistributedContext, gradient_sync, shard, wrap_ddp
from examples.logs import COLUMNS, Log, Row
from examples.options import AMP, trajectory_options
from examples.schedule import lr_factor

#: Unsharded tensors on rank 0's CPU: one checkpoint format for every training configuration.
FULL_STATE_OPTIONS = distributed_state.StateDictOptions(full_state_dict=True, cpu_offload=True)


class TrainingError(Exception):
    """Training cannot continue."""


class TrainingInterrupted(Exception):
    """A signal stopped the run after its state was saved."""


class StopSignal:
    """A context manager in which SIGTERM and SIGINT only set ``received``.

    Args:
        terminate_on_second_signal: False for distributed runs, whose processes receive each signal several times, from
            the terminal and from torchrun.
    """

    def __init__(self, terminate_on_second_signal: bool) -> None:
        self.received = False
        self.terminate_on_second_signal = terminate_on_second_signal
        self.previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous_handlers[number] = signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        self.received = True
        if self.terminate_on_second_signal:
            signal.signal(number, signal.SIG_DFL)


@dataclass
class Totals:
    """Sums over the steps of the current epoch.

    Steps are added one by one, so the sums do not depend on how many steps are flushed at a time.
    """

    loss: float = 0.0
    errors: float = 0.0
    count: int = 0  #: number of images
    seconds: float = 0.0

    def means(self) -> tuple[float, float]:
        """Return the mean loss and the error rate."""
        return self.loss / max(self.count, 1), self.errors / max(self.count, 1)


class Trainer:
    """A training run. :meth:`state` is what checkpoints save; everything else is determined by the options.

    Args:
        options: the parsed command line, see :mod:`examples.options`.
        data: the data set.
        processes: the distributed context.
    """

    def __init__(self, options: argparse.Namespace, data: Data, processes: DistributedContext) -> None:
        self.options = options
        self.data = data
        self.processes = processes
        self.stop_signal = StopSignal(terminate_on_second_signal=processes.world_size == 1)

        rank_and_world_size = processes.rank, processes.world_size
        self.train_loader = data.train_loader(
            options.batch_size, options.seed, *rank_and_world_size, augment=options.augment
        )
        self.test_loader = data.test_loader(options.batch_size, *rank_and_world_size)
        self.steps = options.epochs * self.train_loader.steps
        self.warmup_steps = round(options.warmup_epochs * self.train_loader.steps)
        self.settings = trajectory_options(options) | {"data": data.name}
        self._build()

        self.epoch = 0  # number of finished epochs
        self.step = 0  # number of finished steps over all epochs
        self.totals = Totals()
        self.history: list[Row] = []
        self.started = time.perf_counter()
        self.pending_sums: list[tuple[Tensor, int]] = []  # sums and image counts of steps not yet in `totals`

    def _build(self) -> None:
        options, processes = self.options, self.processes
        torch.manual_seed(options.seed)  # the same weights in every process
        model = networks.build(options.model, self.data.classes, options.width, options.plain)
        if options.sync_bn:
            model = fused_res.convert_sync_batchnorm(model)
        self.memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        # FSDP2 requires contiguous weights; the images' memory format is enough to select channels-last kernels.
        model.to(processes.device, memory_format=torch.contiguous_format if options.fsdp else self.memory_format)
        networks.set_fusion(model, options.fuse, options.backend, options.recompute)
        if options.checkpoint_blocks:
            networks.checkpoint_blocks(model)

        self.model = model
        self.ema_model = None
        if options.ema is not None:
            # FSDP's parameters (DTensor) and buffers (Tensor) cannot share a multi-tensor update, so under FSDP
            # they are averaged one by one.
            average_function: Any = (
                {"avg_fn": get_ema_avg_fn(options.ema)}
                if options.fsdp
                else {"multi_avg_fn": get_ema_multi_avg_fn(options.ema)}
            )
            self.ema_model = AveragedModel(model, use_buffers=True, **average_function)
        if options.fsdp:
            for module in (model, self.ema_model.module) if self.ema_model else (model,):
                shard(module, networks.residual_blocks(module), processes)
        # After sharding, which replaces the parameters.
        groups = networks.parameter_groups(model, options.weight_decay)
        self.optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=options.amp == "fp16")
        if options.compile:
            model.compile()
        self.parallel_model = wrap_ddp(model, processes) if processes.world_size > 1 and not options.fsdp else model
        torch.manual_seed(options.seed + processes.rank)  # for networks with dropout

    def run(self) -> Row:
        """Train to the last epoch, resuming from a checkpoint if there is one, and return the last epoch's log row.

        Raises:
            TrainingInterrupted: SIGTERM or SIGINT was received.
            TrainingError: the loss or a weight is not finite, or the checkpoint is of another run.
            CheckpointError: the checkpoint is damaged, or all of them are.
        """
        out, tensorboard = self.options.out, self.options.tensorboard
        out.mkdir(parents=True, exist_ok=True)
        with self.stop_signal:
            self._resume()
            log = Log(out, self.steps, self.step, tensorboard, silent=not self.processes.is_main)
            try:
                log.write_csv(self.history)
                while self.epoch < self.options.epochs:
                    self._train_epoch(log)
                    self._finish_epoch(log, *self._evaluate())
            except TrainingInterrupted:
                self.save()
                raise
            finally:
                log.close()
        return self.history[-1]

    def _train_epoch(self, log: Log) -> None:
        """Run the remaining steps of the current epoch."""
        self.model.train()
        options, steps = self.options, self.train_loader.steps
        previous = time.perf_counter()
        for batch in self.train_loader.batches(self.epoch, self.step - self.epoch * steps):
            self._raise_if_stopped()
            self.pending_sums.append((self._train_step(batch), batch.global_batch_size))
            self.step += 1
            if self.step % options.log_every == 0 or self.step % steps == 0:
                self._flush_pending_sums()
                loss, error = self.totals.means()
                log.progress(self.step, {"train/loss": loss, "train/error": error, "lr": self._lr(self.step - 1)})
            now = time.perf_counter()
            self.totals.seconds += now - previous
            previous = now
            if options.checkpoint_every and self.step % options.checkpoint_every == 0 and self.step % steps:
                self.save()

    def _train_step(self, batch: Batch) -> Tensor:
        """Run one optimizer step; return this process's sums of losses and errors, float64 of shape (2,)."""
        options, world_size = self.options, self.processes.world_size
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(self.step)
        images, labels = self._to_device(batch)
        sums = torch.zeros(2, dtype=torch.float64, device=images.device)
        parts = zip(images.tensor_split(options.accumulate), labels.tensor_split(options.accumulate), strict=True)
        for index, (images, labels) in enumerate(parts):
            with gradient_sync(self.parallel_model, complete=index == options.accumulate - 1):
                outputs = self._compute_logits(self.parallel_model, images)
                # A sum, because a process may have no image. Gradients are averaged over processes: scaled by the world
                # size over the global batch size, they are the gradient of the mean loss per image.
                loss = F.cross_entropy(outputs, labels, reduction="sum", label_smoothing=options.label_smoothing)
                self.scaler.scale(loss * (world_size / batch.global_batch_size)).backward()
            sums += _loss_and_error_sums(loss, outputs, labels)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema_model is not None:
            self.ema_model.update_parameters(self.model)
        return sums

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        """Return mean loss and error rate on the test set, of the EMA weights if there are any."""
        self.processes.broadcast_buffers(self.model, self.ema_model)
        model = self.model if self.ema_model is None else self.ema_model
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.processes.device)
        for batch in self.test_loader.batches():
            self._raise_if_stopped()
            images, labels = self._to_device(batch)
            outputs = self._compute_logits(model, images)
            sums += _loss_and_error_sums(F.cross_entropy(outputs, labels, reduction="sum"), outputs, labels)
        loss, errors = self.processes.all_reduce_sum(sums).tolist()
        count = len(self.data.test.labels)
        return loss / count, errors / count

    def _finish_epoch(self, log: Log, test_loss: float, test_error: float) -> None:
        self.epoch += 1
        speed = self.totals.count / self.totals.seconds
        values = self._lr(self.step - 1), *self.totals.means(), test_loss, test_error, speed, self._seconds()
        row = dict(zip(COLUMNS, (self.epoch, self.step, *values), strict=True))
        self.history.append(row)
        self.totals = Totals()
        log.epoch(row, self.options.epochs)
        log.write_csv(self.history)
        self.save()

    def _lr(self, step: int) -> float:
        return self.options.lr * lr_factor(step, self.steps, self.warmup_steps)

    def _seconds(self) -> float:
        return time.perf_counter() - self.started

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device = self.processes.device
        return batch.images.to(device, memory_format=self.memory_format), batch.labels.to(device)

    def _compute_logits(self, model: torch.nn.Module, images: Tensor) -> Tensor:
        dtype = AMP[self.options.amp]
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            return model(images).float()

    def _raise_if_stopped(self) -> None:
        if self.processes.any_rank(self.stop_signal.received):
            raise TrainingInterrupted

    def _flush_pending_sums(self) -> None:
        """Add the pending steps to `totals`. Called every few steps only, because it synchronizes with the GPU."""
        if not self.pending_sums:
            return
        first = self.step - len(self.pending_sums)
        sums = self.processes.all_reduce_sum(torch.stack([sums for sums, _ in self.pending_sums])).tolist()
        for step, (loss, errors), (_, count) in zip(range(first, self.step), sums, self.pending_sums, strict=True):
            if not math.isfinite(loss):
                raise TrainingError(self._divergence_message(f"the loss is {loss}", step))
            self.totals.loss += loss
            self.totals.errors += errors
            self.totals.count += count
        self.pending_sums.clear()

    def _divergence_message(self, what: str, step: int) -> str:
        epoch = step // self.train_loader.steps + 1
        return (
            f"{what} in epoch {epoch}, step {step + 1}, at a learning rate of {self._lr(step):.4g}: this state was"
            " not saved; try a lower --lr or a longer --warmup-epochs; if the saved checkpoints have already diverged,"
            " restart with --resume never"
        )

    # Saving and resuming

    def save(self) -> None:
        """Write a checkpoint. A collective operation: every process must call it.

        Raises:
            TrainingError: a loss or a weight is not finite; nothing is written.
        """
        if not self.optimizer.state:  # no optimizer step was applied yet: there is nothing to save
            return
        self._flush_pending_sums()
        self.processes.broadcast_buffers(self.model, self.ema_model)
        state = self.state()
        broken = [name for name, value in state["model"].items() if not value.isfinite().all()]
        if self.processes.any_rank(bool(broken)):
            raise TrainingError(
                self._divergence_message(f"{broken[0] if broken else 'a weight'} is not finite", self.step - 1)
            )
        if self.processes.is_main:
            checkpoint.save(state, self.options.out / checkpoint.file_name(self.step))
            checkpoint.prune(self.options.out, self.options.keep)

    def state(self) -> dict[str, Any]:
        """Return the state that a run resumes from, in tensors and plain containers; complete on rank 0 only."""
        model, optimizer = distributed_state.get_state_dict(self.model, self.optimizer, options=FULL_STATE_OPTIONS)
        average = None
        if self.ema_model is not None:
            average = distributed_state.get_model_state_dict(self.ema_model, options=FULL_STATE_OPTIONS)
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
        # Rank 0 chooses the checkpoint and broadcasts its path, or its error, which then is raised in every process.
        path = self.processes.broadcast_object(self._checkpoint() if self.processes.is_main else None)
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
            options=FULL_STATE_OPTIONS,
        )
        if self.ema_model is not None:
            distributed_state.set_model_state_dict(self.ema_model, state["average"], options=FULL_STATE_OPTIONS)
        self.scaler.load_state_dict(state["scaler"])
        if self.processes.rank < len(state["random"]):
            _set_random_state(state["random"][self.processes.rank], self.processes.device)
        self.epoch, self.step = state["epoch"], state["step"]
        self.totals = Totals(**state["totals"])
        self.history = state["history"]
        self.started = time.perf_counter() - state["seconds"]
        if self.processes.is_main:
            print(f"resuming from {path}: {self.epoch} epochs, {self.step} steps done", flush=True)
            # Later checkpoints are of another run, or damaged: they must not be taken for the newest one.
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
                " never to start from scratch"
            )


def _loss_and_error_sums(loss: Tensor, outputs: Tensor, labels: Tensor) -> Tensor:
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
