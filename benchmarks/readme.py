"""`python -m benchmarks.readme`: from the results committed under benchmarks/results/ to what people read of them.

README.md gets a figure and one short table for each question, benchmarks/results/README.md everything, in the words of
the benchmarks' own summaries.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import plots, report
from benchmarks.__main__ import SUBCOMMANDS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->\n"

Document = dict[str, Any]
NO_GPU = "No GPU was there to measure on: not measured. `make gpu` does it."


def committed() -> dict[str, dict[str, Document]]:
    """Of each device, by name, its documents."""
    folders = sorted(path for path in RESULTS.iterdir() if path.is_dir() and path.name != "latest")
    return {
        folder.name: {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        for folder in folders
    }


def is_gpu(documents: dict[str, Document]) -> bool:
    return any("gpu" in document["runs"][0]["environment"] for document in documents.values())


def networks(documents: list[Document]) -> str:
    """Images a second, a row a network, a column a provider; in brackets how many times as fast the first one is."""
    names = list(dict.fromkeys(name for document in documents for name in document["runs"][0]["cases"][0]["providers"]))
    rows = []
    for document in documents:
        for case in document["runs"][0]["cases"]:
            speeds = {name: case["batch"] / provider["median_s"] for name, provider in case["providers"].items()}
            first = speeds[names[0]]
            rows.append(
                [
                    f"{case['model']}, {case['batch']} x {case['size']}²"
                    + ", training" * (case.get("mode") == "train"),
                    f"**{first:.1f}**",
                    *(f"{speeds[n]:.1f} ({report.ratio(first / speeds[n])})" if n in speeds else "" for n in names[1:]),
                ]
            )
    return report.markdown(["images/s", *map(report.title_of, names)], rows)


def norms(documents: list[Document]) -> str:
    """Milliseconds for all of a network's norms, under each allocator setting."""
    (document,) = documents
    names = list(document["runs"][0]["cases"][0]["providers"])
    rows = []
    for run in document["runs"]:
        cases = run["cases"]
        totals = {n: sum(case["count"] * case["providers"][n]["median_s"] for case in cases) for n in names}
        means = {n: report.geometric_mean(report.ratios(cases, n, names[0])) for n in names[1:]}
        rows.append(
            [
                report.allocator_title(run),
                f"**{report.milliseconds(totals[names[0]])}**",
                *(f"{report.milliseconds(totals[n])} ({report.ratio(means[n])})" for n in means),
            ]
        )
    return report.markdown(["ms", *map(report.title_of, names)], rows)


def footprints(documents: list[Document]) -> str:
    """What each way of training keeps, and what a step of it takes."""
    (document,) = documents
    (case,) = document["runs"][0]["cases"]
    rows = [
        [
            report.title_of(way),
            report.megabytes(provider["saved_bytes"] / case["batch"]),
            report.megabytes(provider["peak_tensor_bytes"]),
            report.milliseconds(provider["median_s"]),
        ]
        for way, provider in case["providers"].items()
    ]
    return report.markdown([case["name"], "kept for backward, MB an image", "peak of tensors, MB", "step, ms"], rows)


@dataclass(frozen=True)
class Question:
    title: str
    names: tuple[str, ...]  # of the documents that answer it
    table: Callable[[list[Document]], str]
    note: str = ""


QUESTIONS = (
    Question(
        "Inference",
        ("infer",),
        networks,
        "Medians, interleaved in one process; in brackets, how many times as fast `fused_res` is.",
    ),
    Question("Training steps", ("model-resnet18", "model"), networks, "Forward, backward and SGD."),
    Question(
        "What each part is worth",
        ("model-ablation", "infer-ablation"),
        networks,
        "Training steps, then inference, with a part left out; the rest is as above.",
    ),
    Question("Small images", ("model-small",), networks, "Evaluation of one image, and a training step of two."),
    Question(
        "Batch norm, addition and ReLU alone",
        ("op",),
        norms,
        "Forward and backward of all of ResNet-50's at batch 16; in brackets, the geometric mean over its shapes."
        " *As shipped*: the allocator as PyTorch uses it, with page faults; *kept warm*: told to keep freed memory.",
    ),
    Question("Memory of training", ("memory",), footprints),
)


def commands(documents: list[Document]) -> Iterator[str]:
    """Which command brought the numbers, when, from which commit."""
    for document in documents:
        env = document["runs"][0]["environment"]
        yield f"`{document['command']}` · {env['date'][:10]} · {(env['commit'] or 'no commit')[:12]}"


def answers(device: str, documents: dict[str, Document]) -> str:
    """The README's section about one device."""
    env = next(iter(documents.values()))["runs"][0]["environment"]
    parts = [f"### {device}", report.machine(env)]
    for question in QUESTIONS:
        asked = [documents[name] for name in question.names if name in documents]
        if asked:
            origin = "<br>\n".join(commands(asked))
            parts += [f"**{question.title}.** {question.note}".rstrip(), question.table(asked), f"<sub>{origin}</sub>"]
    return "\n\n".join(parts)


def everything(device: str, documents: dict[str, Document]) -> str:
    """One device's section of benchmarks/results/README.md."""
    parts = [f"## {device}"]
    for name, document in documents.items():
        subcommand = SUBCOMMANDS[report.subcommand_of(document)]
        texts = [f"$ {document['command']}", *map(subcommand.summary, document["runs"])]
        body = "\n\n".join(texts)
        parts.append(
            f"### {name}\n\n{report.environment(document)}\n\n```text\n{body}\n```\n\n![]({device}/{name}.png)"
        )
    return "\n\n".join(parts)


def between_marks(text: str, new: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{new}\n\n{END}{rest.split(END)[1]}"


def pages() -> dict[Path, str]:
    """What each page has to be."""
    devices = committed()
    sections = [answers(*item) for item in devices.items()]
    if not any(map(is_gpu, devices.values())):
        sections.append(f"### GPU\n\n{NO_GPU}")
    readme = ROOT / "README.md"
    head = (
        "# All results\n\nWritten by `python -m benchmarks.readme` from the JSON files beside it.\n"
        "`python -m benchmarks compare A B` compares two results folders and exits with 1 at a regression of ours."
    )
    return {
        readme: between_marks(readme.read_text(), "\n\n".join(sections)),
        RESULTS / "README.md": "\n\n".join([head, *(everything(*item) for item in devices.items())]) + "\n",
    }


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
    for device, documents in committed().items():
        if {"infer", "model"} <= documents.keys():
            plots.overview(documents, RESULTS / device / "overview.png")
