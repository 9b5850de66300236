"""Trains a residual network on images, with the blocks of fused_res.

Plainly `python examples/train.py` trains ResNet-20 on scikit-learn's digits; nothing is downloaded. Some more:

  a CIFAR-10 folder, with its usual recipe, in bfloat16:
    python examples/train.py --data cifar-10-batches-py --model cifar_resnet56 --epochs 180 --batch-size 128 --amp bf16

  torchvision's ResNet-50 on a folder of images, on all GPUs of a machine:
    torchrun --nproc-per-node gpu examples/train.py --data imagenet --model torchvision/resnet50 --sync-bn \\
      --epochs 90 --batch-size 1024 --lr 0.4 --warmup-epochs 5 --label-smoothing 0.1 --ema 0.9999 --workers 8

  a larger batch than fits, with little memory:
    python examples/train.py --model resnet18 --image-size 64 --accumulate 4 --recompute conv

  that stock PyTorch comes to the same:
    python examples/train.py --no-fuse --out runs/stock

--out (runs/<model>-<data>) gets checkpoints, log.csv with a row for each epoch, and TensorBoard's files. A run that was
killed goes on from its newest sound checkpoint when the same command is given again, and ends, on a CPU bit for bit, as
if nothing had happened; so does one under `torchrun --max-restarts`. SIGTERM or Ctrl-C finishes the step and saves.
Checkpoints are read by torch.load(path, weights_only=True), and fit one process or many, DDP or FSDP.

Exit status: 0 when the training has ended or was stopped by a signal, 1 if it failed (a loss that is not finite, a
damaged checkpoint, data that are not there), 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run by its path: the folder that `examples` is in takes the place of this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from examples import checkpoint, data, distributed, networks, options, trainer

FAILURES = (checkpoint.CheckpointError, data.DataError, networks.NetworkError, trainer.TrainingError, OSError)


def main(arguments: list[str] | None = None) -> int:
    chosen = options.parse(__doc__, arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    try:
        loaded = data.load(chosen.data, chosen.image_size, chosen.workers)
    except data.DataError as error:
        return failure(error)
    with distributed.processes(chosen.device) as processes:
        return train(chosen, loaded, processes)


def train(chosen: argparse.Namespace, loaded: data.Data, processes: distributed.Processes) -> int:
    """One run, of which nothing is left behind: DDP has to be gone before its processes part."""
    say = print if processes.first else lambda text, **_: None
    try:
        run = trainer.Trainer(chosen, loaded, processes)
        last = run.run()
    except trainer.Stopped:
        say(f"stopped by a signal after step {run.step} of {run.steps}; the same command goes on", flush=True)
        return 0
    except FAILURES as error:
        return failure(error)
    say(
        f"{chosen.model} on {loaded.name}: {1 - last['test_error']:.2%} of {len(loaded.test.labels)} test images right"
        f" after {last['epoch']:.0f} epochs in {last['seconds']:.0f} s, {last['images_per_second']:.0f} images/s in the"
        f" last one; checkpoints and log in {chosen.out}"
    )
    return 0


def failure(error: Exception) -> int:
    print(f"train.py: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
