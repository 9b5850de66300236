"""Train a residual network for image classification with the fused blocks of fused_res.

Without options, `python examples/train.py` trains ResNet-20 on scikit-learn's digits; nothing is downloaded. Examples:

  CIFAR-10 from a folder, with its usual recipe, in bfloat16:
    python examples/train.py --data cifar-10-batches-py --model cifar_resnet56 --epochs 180 --batch-size 128 --amp bf16

  torchvision's ResNet-50 on a folder of images, on all GPUs of a machine:
    torchrun --nproc-per-node gpu examples/train.py --data imagenet --model torchvision/resnet50 --sync-bn \\
      --epochs 90 --batch-size 1024 --lr 0.4 --warmup-epochs 5 --label-smoothing 0.1 --ema 0.9999 --workers 8

  gradient accumulation and recomputation, for a batch that does not fit into memory:
    python examples/train.py --model resnet18 --image-size 64 --accumulate 4 --recompute conv

  the same training with stock PyTorch, for comparison:
    python examples/train.py --no-fuse --out runs/stock

Checkpoints, log.csv with a row per epoch, and TensorBoard files are written to --out (runs/<model>-<data>). Run the
same command again to resume a killed run from its newest valid checkpoint; on a CPU the result is bit-identical to that
of an uninterrupted run. `torchrun --max-restarts` resumes the same way. SIGTERM and Ctrl-C finish the step and save.
torch.load(path, weights_only=True) reads the checkpoints. They do not depend on the number of processes, DDP or FSDP.

Exit status: 0 if training finished or was stopped by a signal, 1 if it failed (a loss that is not finite, a damaged
checkpoint, missing data), 2 for an invalid command line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run by its path: put the folder that contains `examples` on sys.path instead of this one
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
    with distributed.distributed_context(chosen.device) as processes:
        return train(chosen, loaded, processes)


def train(chosen: argparse.Namespace, loaded: data.Data, processes: distributed.DistributedContext) -> int:
    """Run one training and return its exit status.

    The trainer is local to this function: DDP has to be destroyed before the process group is.
    """
    report = print if processes.is_main else lambda text, **_: None
    try:
        run = trainer.Trainer(chosen, loaded, processes)
        last = run.run()
    except trainer.TrainingInterrupted:
        report(f"stopped by a signal after step {run.step} of {run.steps}; the same command resumes it", flush=True)
        return 0
    except FAILURES as error:
        return failure(error)
    report(
        f"{chosen.model} on {loaded.name}: {1 - last['test_error']:.2%} of {len(loaded.test.labels)} test images"
        f" classified correctly after {last['epoch']:.0f} epochs in {last['seconds']:.0f} s,"
        f" {last['images_per_second']:.0f} images/s in the last epoch; checkpoints and log in {chosen.out}"
    )
    return 0


def failure(error: Exception) -> int:
    print(f"train.py: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
