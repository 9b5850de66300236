"""Items of the training stages: the providers of ResNet-50's training step, in one process, from equal weights."""

import gc
import time
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.gpu.errors import Unavailable
from benchmarks.gpu.journal import Record
from benchmarks.gpu.settings import Settings
from benchmarks.providers import NETWORK_PROVIDERS, build_module
from benchmarks.steps import ModelStep
from benchmarks.stock import stock_model
from benchmarks.timing import EventClock, measure_interleaved
from fused_res import backends, models, unfuse

#: Timed steps, and seconds of them at least.
REPEAT, MIN_TIME = 20, 1.5
REHEARSED_REPEAT = 2


def items(settings: Settings) -> list[str]:
    return list(settings.only)


def network(settings: Settings) -> tuple[nn.Module, int, int]:
    """Return the stock model, its image size and its number of classes."""
    if settings.rehearse:
        return unfuse(models.cifar_resnet(8, num_classes=10)), 8, 10
    if settings.model.startswith("timm/"):
        import timm

        return timm.create_model(settings.model.removeprefix("timm/")), 224, 1000
    return stock_model(settings.model), 224, 1000


def run(item: str, settings: Settings) -> Iterator[Record]:
    provider = NETWORK_PROVIDERS[item]
    if provider.backend and (reason := backends.unavailable(provider.backend)) is not None:
        raise Unavailable(reason)
    torch.backends.cudnn.benchmark = True  # for all providers, as shapes do not change
    torch._dynamo.reset()
    torch.manual_seed(0)
    stock, size, classes = network(settings)
    batch = 2 if settings.rehearse else settings.batch
    images = torch.randn(batch, 3, size, size, device=settings.device).to(memory_format=provider.memory_format)
    target = torch.randint(classes, (batch,), device=settings.device)
    dtype = torch.float32 if settings.rehearse else torch.bfloat16
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    with provider.settings():
        module = build_module(provider, stock.to(settings.device))
        step = ModelStep(module, images, target, "train", dtype, provider.cuda_graph)
        first_loss = step.step().item()
        workload = {} if settings.warm else step.workload()
    torch.cuda.synchronize()
    start_s = time.perf_counter() - started
    if settings.warm:
        return
    repeat, min_time = (REHEARSED_REPEAT, 0.0) if settings.rehearse else (REPEAT, MIN_TIME)
    clock = EventClock(False, settings.device)
    workloads = {item: provider.workload(workload)}
    samples = measure_interleaved(
        workloads, repeat=repeat, min_time=min_time, label=item, clock=clock, sample_seconds=0
    )
    times = samples[item].summary()
    yield {
        "kind": "train",
        "case": f"{settings.model} train {batch}x{size}x{size}",
        "backend": backends.resolve(provider.backend or "auto", images.device).name if provider.fused else None,
        "providers": {item: times},
        "images_per_s": batch / times["median_s"],
        "start_s": start_s,
        "first_loss": first_loss,
        "last_loss": step.step().item(),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }
    del module, step, workload, stock, images
    gc.collect()
    torch.cuda.empty_cache()
