"""`python -m benchmarks.frozen --out FILE`: freezing ResNet-50 for bfloat16, and 8 threads that call it at once.

One process measures the first freeze and the first call, which do everything that happens once, and writes a document
with one case: their seconds, and whether every call of a thread returned the bits of the same call alone.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from fused_res import freeze, models

THREADS = 8


def measure(model: str, size: int, calls: int) -> dict[str, object]:
    """Freeze `model` for bfloat16; then compare calls of `THREADS` threads, each with another batch size."""
    torch.manual_seed(0)
    source = getattr(models, model)().eval().to(memory_format=torch.channels_last)
    inputs = [torch.randn(1 + i % 4, 3, size, size) for i in range(THREADS)]
    begin = time.perf_counter()
    frozen = freeze(source, dtype=torch.bfloat16)
    call = torch.inference_mode()(frozen)
    call(inputs[0])  # folds and packs the weights
    seconds = time.perf_counter() - begin
    alone = [call(x) for x in inputs]
    with ThreadPoolExecutor(THREADS) as threads:
        outputs = list(threads.map(call, inputs * calls))
    equal = sum(torch.equal(output, alone[i % THREADS]) for i, output in enumerate(outputs))
    return {"name": model, "freeze_s": seconds, "threads": THREADS, "equal": equal, "calls": len(outputs)}


def summary(run: dict[str, Any]) -> str:
    """Return one line per case."""
    return "\n".join(
        "{name}: frozen for bfloat16, with the first call, in {freeze_s:.2f} s; {equal} of {calls} calls from "
        "{threads} threads return the bits of the same call alone".format(**case)
        for case in run["cases"]
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frozen", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file of the document")
    parser.add_argument("--quick", action="store_true", help="a small network and small images")
    options = parser.parse_args(arguments)
    case = measure(*(("resnet18", 33, 1) if options.quick else ("resnet50", 224, 5)))
    run = {"allocator": "as-shipped", "environment": environment.describe() | {"backend": "cpu"}, "cases": [case]}
    document = {"command": "python -m benchmarks.frozen", "runs": [run]}
    options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
