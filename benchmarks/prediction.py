"""The committed predictions for an H200, which every run on such a GPU is compared with.

``python -m benchmarks launches --write`` regenerates them after a change of kernels, selection or model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import conv, launches
from benchmarks.cases import ModelCase, OpCase, resnet50_op_cases
from benchmarks.events import Event
from benchmarks.gpu_model import GPUS, Gpu, predict_all
from benchmarks.infer import InferCase
from benchmarks.launch_model import compiled_works, works_of
from benchmarks.network import Convolution
from benchmarks.providers import stock_batch_norm_act
from benchmarks.recording import Recorder
from benchmarks.resources import Resources
from fused_res import backends
from fused_res.functional import batch_norm_act, conv_bias_act

FILE = Path(__file__).parent / "results" / "predictions-h200.json"
PAGE = Path(__file__).parents[1] / "docs" / "predictions.md"
BEGIN, END = "<!-- predicted -->\n", "<!-- /predicted -->\n"
MODEL, SIZE, DTYPE = "resnet50", 224, "bfloat16"
TRAIN_BATCHES = (1, 32, 64, 256)
INFER_BATCHES = (1, 32, 256)
#: Batch size of the cases of single operators, whose names do not contain it: that of `make gpu`.
OPERATOR_BATCH = 256

Milliseconds = dict[str, dict[str, float]]


def predicted(kind: str, case: str, provider: str) -> float | None:
    """Return the predicted milliseconds of one provider on an H200; None if there is no prediction.

    Args:
        kind: ``"op"`` (forward and backward, each with cold caches), ``"conv"``, both at batch size 256, ``"train"`` or
            ``"infer"``.
        case: name of the case, as the benchmark of that kind prints it.
        provider: name of the provider, as the benchmark of that kind prints it. With ``+graph``: in a CUDA graph, where
            launches cost no CPU time.
    """
    value: float | None = _load()["milliseconds"].get(kind, {}).get(case, {}).get(provider)
    return value


@cache
def _load() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"resources": {}, "milliseconds": {}}
    return document


def known_resources() -> Resources:
    """Return the committed resource usage of the kernels; other variants have to be compiled."""
    return Resources(_load()["resources"])


def write() -> None:
    """Regenerate the committed file and the tables of docs/predictions.md; new variants of kernels are compiled."""
    text = json.dumps(build(known_resources()), indent=1, sort_keys=True) + "\n"
    FILE.write_text(text)
    _load.cache_clear()
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + tables() + END + rest.partition(END)[2])


def tables() -> str:
    """Return the generated tables of docs/predictions.md: published timings, then the predicted steps."""
    from benchmarks.published import TIMINGS

    published = [
        [
            one.name, GPUS[one.gpu].peak.name, _text(one.seconds), _text(one.predicted), f"{one.error:+.0%}",
            "fitted" if one.fitted else "held out", one.source,
        ]
        for one in TIMINGS
    ]  # fmt: skip
    parts = [
        _markdown(["published timing", "GPU", "published", "predicted", "error", "", "source"], published),
        *(_steps(kind) for kind in ("train", "infer")),
    ]
    return "\n".join(parts)


def _steps(kind: str) -> str:
    cases: Milliseconds = _load()["milliseconds"][kind]
    cases = dict(sorted(cases.items(), key=lambda case: (len(case[0]), case[0])))
    names = [name for name in cases[next(iter(cases))] if name != "compile-reduce-overhead"]
    rows = [[name, *(f"{times[name]:.2f}" for times in cases.values())] for name in sorted(names)]
    return _markdown(["H200, predicted ms", *cases], rows)


def _text(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds > 1e-3 else f"{seconds * 1e6:.1f} us"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def build(resources: Resources, kinds: Sequence[str] = ("op", "conv", "train", "infer")) -> dict[str, Any]:
    """Return the content of the committed file.

    Args:
        resources: the kernels' resource usage; missing variants are compiled.
        kinds: kinds of predictions.
    """
    builder = _Builder(GPUS["h200"], resources)
    milliseconds = {kind: getattr(builder, kind)() for kind in kinds}
    return {
        "device": builder.gpu.peak.name,
        "resources": resources.as_json(builder.used),
        "milliseconds": milliseconds,
    }


class _Builder:
    """Predicts the cases of every kind, and collects the variants of the kernels that they launch."""

    def __init__(self, gpu: Gpu, resources: Resources) -> None:
        self.gpu, self.resources = gpu, resources
        self.used: list[Event] = []

    def train(self) -> Milliseconds:
        def name(batch: int) -> str:
            return ModelCase(MODEL, "train", batch, SIZE).name

        return {
            name(batch): self._network(
                launches.record_training, batch, ("compile-channels-last", "compile-reduce-overhead")
            )
            for batch in TRAIN_BATCHES
        }

    def infer(self) -> Milliseconds:
        def name(batch: int) -> str:
            return InferCase(MODEL, batch, SIZE, DTYPE, "cuda").name

        return {
            name(batch): self._network(launches.record_inference, batch, ("compile-freezing",))
            for batch in INFER_BATCHES
        }

    def _network(
        self, record: Callable[..., list[Event]], batch: int, compiled_names: Sequence[str]
    ) -> dict[str, float]:
        stock = record(MODEL, batch)
        providers = {"eager-channels-last": launches.predict_stock(stock, self.gpu)}
        for backend in launches.BACKENDS:
            for preference in launches.PREFERENCES:
                events = self._compiled(record(MODEL, batch, backend, preference))
                name = launches.provider_name(backend, preference)
                providers[name] = launches.predict_ours(name, events, self.gpu, self.resources)
        seconds = {name: one.eager_seconds for name, one in providers.items()}
        seconds |= {f"{name}+graph": one.gpu_seconds for name, one in providers.items()}
        seconds |= dict.fromkeys(compiled_names, launches.predict_compiled(stock, self.gpu).gpu_seconds)
        return _milliseconds(seconds)

    def _compiled(self, events: list[Event]) -> list[Event]:
        self.resources.measure(events)
        self.used += events
        return events

    def op(self) -> Milliseconds:
        return {case.name: self._operator(case) for case in resnet50_op_cases(OPERATOR_BATCH, SIZE)}

    def _operator(self, case: OpCase) -> dict[str, float]:
        stock, output = _record_norm(case)
        compiled = compiled_works([*chain.from_iterable(stock)], self.gpu, [output])
        seconds = {
            "eager-channels-last": self._seconds(stock),
            "cudnn": self._seconds(stock, norm="cudnn"),
            "compile-channels-last": sum(one.seconds for one in predict_all(compiled, self.gpu)),
        }
        for backend in launches.BACKENDS:
            phases, _ = _record_norm(case, backend)
            self._compiled([*chain.from_iterable(phases)])
            seconds[launches.provider_name(backend, "planned")] = self._seconds(phases)
        return _milliseconds(seconds)

    def conv(self) -> Milliseconds:
        options = argparse.Namespace(
            model=[MODEL], batch=OPERATOR_BATCH, size=SIZE, quick=False, cases=None, device="cuda"
        )
        return {case.name: self._convolution(case.layer) for case in conv.select_cases(options)}

    def _convolution(self, layer: Convolution) -> dict[str, float]:
        spec, t = layer.spec, _operands(layer)
        geometry = spec.stride, spec.padding, spec.dilation, spec.groups

        def fused() -> None:
            conv_bias_act(t.x, t.weight, t.bias, t.residual, *geometry, spec.activation)

        def with_statistics() -> None:
            kernels = backends.resolve("auto", t.x.device)
            kernels.conv_bn_stats(t.x, t.weight, None, None, False, *geometry, True)

        def aten_with_statistics() -> None:
            backends.resolve("auto", t.x.device).batch_norm_partials(conv.aten(t, layer))

        calls: dict[str, tuple[Callable[[], Any], str | None, str]] = {
            "aten": (lambda: conv.aten(t, layer), None, ""),
            "aten-unfused": (lambda: conv.aten_unfused(t, layer), None, ""),
            "ours": (fused, launches.AUTO, "planned"),
            "ours+stats": (with_statistics, launches.AUTO, "planned"),
            "aten+stats": (aten_with_statistics, launches.AUTO, "planned"),
        }
        for backend in conv.GPU_BACKENDS:  # the benchmark forces the kernels of a named backend
            calls[f"ours-{backend}"] = fused, backend, "fused"
            calls[f"ours-{backend}+stats"] = with_statistics, backend, "fused"
        seconds = {}
        for name, (call, backend, preference) in calls.items():
            with Recorder(backend, preference) as recorder, torch.no_grad():
                call()
            seconds[name] = self._seconds([self._compiled(recorder.events)])
        return _milliseconds(seconds)

    def _seconds(self, phases: Sequence[list[Event]], norm: str = "native") -> float:
        """Return the seconds of phases that each start with a cold L2 cache."""
        return sum(
            one.seconds
            for events in phases
            for one in predict_all(works_of(events, self.gpu, self.resources, norm), self.gpu)
        )


def _meta(shape: Sequence[int], dtype: torch.dtype, requires_grad: bool = False) -> Tensor:
    tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
    if tensor.dim() == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor.requires_grad_(requires_grad)


def _record_norm(case: OpCase, backend: str | None = None) -> tuple[list[list[Event]], int]:
    """Record ``act(bn(x) [+ residual])`` as the benchmark `op` runs it.

    Returns:
        The launches of forward and backward, and the recorder's number of the output.
    """
    half, single, channels = torch.bfloat16, torch.float32, case.shape[1:2]
    x = _meta(case.shape, half, True)
    weight, bias = _meta(channels, single, True), _meta(channels, single, True)
    mean, var = _meta(channels, single), _meta(channels, single)
    residual = _meta(case.shape, half, True) if case.residual else None
    leaves = [t for t in (x, weight, bias, residual) if t is not None]
    with Recorder(backend, "planned") as recorder:
        if backend is None:
            output = stock_batch_norm_act(case.activation, True)(x, mean, var, weight, bias, residual)
        else:
            output = batch_norm_act(x, mean, var, weight, bias, residual, True, activation=case.activation)
        forward = len(recorder.events)
        torch.autograd.grad(output, leaves, _meta(case.shape, half))
        result = recorder.tensor_id(output)
    return [recorder.events[:forward], recorder.events[forward:]], result


def _operands(layer: Convolution) -> conv.Operands:
    half = torch.bfloat16
    residual = _meta(layer.z, half) if layer.residual else None
    return conv.Operands(_meta(layer.x, half), _meta(layer.weight, half), _meta(layer.weight[:1], half), residual)


def _milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    """Return milliseconds with four significant digits, more than the predictions have."""
    return {name: float(f"{one * 1e3:.4g}") for name, one in seconds.items()}
