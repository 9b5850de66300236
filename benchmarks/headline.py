"""What a selection of benchmarks came to, in sentences for somebody who has never seen their tables."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import report

Case = dict[str, Any]


def of_networks(cases: Sequence[Case], doing: Callable[[Case], str]) -> Iterator[str]:
    """The first provider against the fastest of those that are not ours."""
    for case in cases:
        medians = {name: provider["median_s"] for name, provider in case["providers"].items()}
        ours = next(iter(medians.values()))
        others = {name: seconds for name, seconds in medians.items() if not name.startswith("ours")}
        if others:
            fastest = min(others, key=others.__getitem__)
            images = f"{case['batch']} image{'s' * (case['batch'] > 1)} of {case['size']}x{case['size']}"
            yield (
                f"{case['model']} {doing(case)} {images} in {report.milliseconds(ours)} ms,"
                f" {others[fastest] / ours:.2f} times as fast as {report.title_of(fastest)}, the fastest of"
                f" {len(others)} others"
            )


def of_norms(cases: Sequence[Case]) -> Iterator[str]:
    names = report.common_providers(cases)
    means = {n: report.geometric_mean(report.ratios(cases, n, names[0])) for n in names if not n.startswith("ours")}
    if means:
        name = min(means, key=means.__getitem__)
        ratio, over = f"{means[name]:.2f} times as fast as", f"(geometric mean over {len(cases)} shapes)"
        yield f"batch norm, addition and ReLU alone are {ratio} those of {report.title_of(name)} {over}"


def of_memory(cases: Sequence[Case]) -> Iterator[str]:
    for case in cases:
        saved = {name: provider["saved_bytes"] for name, provider in case["providers"].items()}
        if {"ours conv", "eager-channels-last"} <= saved.keys():
            less = 1 - saved["ours conv"] / saved["eager-channels-last"]
            yield f'{case["model"]} with recompute="conv" keeps {less:.0%} less for backward than PyTorch'


SENTENCES: dict[str, Callable[[Sequence[Case]], Iterator[str]]] = {
    "infer": lambda cases: of_networks(cases, lambda case: "infers"),
    "model": lambda cases: of_networks(cases, lambda case: "trains on" if case["mode"] == "train" else "evaluates"),
    "op": of_norms,
    "memory": of_memory,
}


def in_short(documents: Sequence[dict[str, Any]]) -> str:
    """One line each, of the first setting of each document; what has no sentence is left to the tables."""
    lines = [
        f"- {line}"
        for document in documents
        if (sentences := SENTENCES.get(report.subcommand_of(document)))
        for run in document["runs"][:1]
        for line in sentences(run["cases"])
    ]
    return "\n".join(["In short, medians of what was measured just now:", *lines])
