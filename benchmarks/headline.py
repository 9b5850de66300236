"""Headlines: the main results of a suite in sentences, for readers who have not seen its tables."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import report

Case = dict[str, Any]


def network_headlines(cases: Sequence[Case], verb: Callable[[Case], str]) -> Iterator[str]:
    """Yield the speed of the first provider relative to the fastest provider other than fused_res."""
    for case in cases:
        medians = {name: provider["median_s"] for name, provider in case["providers"].items()}
        ours = next(iter(medians.values()))
        others = {name: seconds for name, seconds in medians.items() if not name.startswith("ours")}
        if others:
            fastest = min(others, key=others.__getitem__)
            images = f"{case['batch']} image{'s' * (case['batch'] > 1)} of {case['size']}x{case['size']}"
            images += "" if case.get("dtype", "float32") == "float32" else f" in {case['dtype']}"
            yield (
                f"{case['model']} {verb(case)} {images} in {report.milliseconds(ours)} ms,"
                f" {others[fastest] / ours:.2f} times as fast as {report.provider_title(fastest)}, the fastest of"
                f" {len(others)} others"
            )


def norm_headlines(cases: Sequence[Case]) -> Iterator[str]:
    """Yield the mean speed of the first provider's batch norms relative to the fastest other provider."""
    names = report.common_providers(cases)
    means = {n: report.geometric_mean(report.ratios(cases, n, names[0])) for n in names if not n.startswith("ours")}
    if means:
        name = min(means, key=means.__getitem__)
        ratio, over = f"{means[name]:.2f} times as fast as", f"(geometric mean over {len(cases)} shapes)"
        yield f"batch norm + add + ReLU alone is {ratio} {report.provider_title(name)} {over}"


def memory_headlines(cases: Sequence[Case]) -> Iterator[str]:
    """Yield how many bytes fewer recomputation saves for backward."""
    for case in cases:
        saved = {name: provider["saved_bytes"] for name, provider in case["providers"].items()}
        if {"ours conv", "eager-channels-last"} <= saved.keys():
            reduction = 1 - saved["ours conv"] / saved["eager-channels-last"]
            yield f'{case["model"]} with recompute="conv" saves {reduction:.0%} fewer bytes for backward than PyTorch'


SENTENCES: dict[str, Callable[[Sequence[Case]], Iterator[str]]] = {
    "infer": lambda cases: network_headlines(cases, lambda case: "infers"),
    "model": lambda cases: network_headlines(
        cases, lambda case: "trains on" if case["mode"] == "train" else "evaluates"
    ),
    "op": norm_headlines,
    "memory": memory_headlines,
}


def headline_text(documents: Sequence[dict[str, Any]]) -> str:
    """Return one line per headline of the first run of each document; subcommands without SENTENCES are omitted."""
    lines = [
        f"- {line}"
        for document in documents
        if (sentences := SENTENCES.get(report.subcommand_of(document)))
        for run in document["runs"][:1]
        for line in sentences(run["cases"])
    ]
    return "\n".join(["Headlines (medians of this run):", *lines])
