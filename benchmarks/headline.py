"""What a selection of benchmarks came to, in sentences for somebody who has never seen their tables."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import report

Case = dict[str, Any]


def times_as_fast(case: Case, rest: Sequence[str]) -> str:
    """How the first provider does against the fastest of the others, who is named."""
    providers = case["providers"]
    first = next(iter(providers))
    seconds, name = min((providers[name]["median_s"], name) for name in rest)
    ratio = seconds / providers[first]["median_s"]
    return f"{ratio:.2f} times as fast as {report.title_of(name)}"


def others(case: Case) -> list[str]:
    """All that is not ours."""
    return [name for name in case["providers"] if not name.startswith("ours")]


def of_networks(cases: Sequence[Case], doing: Callable[[Case], str]) -> Iterator[str]:
    for case in cases:
        if case["providers"] and others(case):
            seconds = next(iter(case["providers"].values()))["median_s"]
            what = f"{case['model']} {doing(case)} {case['batch']} x {case['size']}x{case['size']} pixels"
            fastest = times_as_fast(case, others(case))
            yield f"{what} in {report.milliseconds(seconds)} ms, {fastest}, the fastest of {len(others(case))} others"


def of_norms(cases: Sequence[Case]) -> Iterator[str]:
    names = report.common_providers(cases)
    means = {n: report.geometric_mean(report.ratios(cases, n, names[0])) for n in names if not n.startswith("ours")}
    if means:
        name = min(means, key=means.__getitem__)
        yield (
            f"batch norm, addition and ReLU alone are {means[name]:.2f} times as fast as those of {report.title_of(name)}"
            f" (geometric mean over {len(cases)} shapes)"
        )


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
