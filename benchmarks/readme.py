"""`python -m benchmarks.readme`: generates the result pages from the JSON files committed under benchmarks/results/.

README.md gets the figure and one table of ResNets against every peer. benchmarks/results/README.md gets one table for
each entry of SECTIONS, then the summaries of all results. docs/models.md gets the tables of the zoo.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import frozen, plots, report
from benchmarks.__main__ import SUBCOMMANDS
from benchmarks.amx import FROZEN
from benchmarks.zoo import page as zoo

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODELS = ROOT / "docs" / "models.md"
#: Name of the zoo's document, which has its own page.
ZOO = "zoo"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->\n"

Document = dict[str, Any]
NO_ZOO = "Not measured yet: `python -m benchmarks zoo --out benchmarks/results/MACHINE` does it."
NO_AMX = "**Xeon with AMX**: not measured: `make bench-amx` measures it, in bfloat16 and float32."
CONVENTIONS = """\
A folder is one kind of machine: processor, what distinguishes it, cores (`epyc-zen4-2-cores`); `make bench-amx` names
its folder from /proc/cpuinfo. To add a document, run a subcommand with `--allocator as-shipped` on a quiet machine; it
writes `SUBCOMMAND.json` and `.png` into `--out` (default: `benchmarks/results/latest`, not committed). Copy both here,
named `SUBCOMMAND-VARIANT`, such as `infer-bf16` or `conv-bf16`; then run `make docs` and commit the pages with them."""
#: Documents in the README's tables.
README_DOCUMENTS = ("infer", "infer-bf16", "model-resnet18", "model", "model-bf16")
#: Documents of inference on a CPU, by dtype; the README says which of them are missing.
INFERENCE = {"float32": "infer", "bfloat16": "infer-bf16"}
NO_GPU = "Not measured: no GPU was available. `make gpu` runs the benchmarks on one."


def load_results() -> dict[str, dict[str, Document]]:
    """Return the committed documents of each device, by name of device and document."""
    folders = sorted(path for path in RESULTS.iterdir() if path.is_dir() and path.name != "latest")
    return {
        folder.name: {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        for folder in folders
    }


def is_gpu(documents: dict[str, Document]) -> bool:
    return any(document["runs"][0]["environment"].get("gpu") for document in documents.values())


def network_table(documents: list[Document]) -> str:
    """Return a table of images/s, one row per network, one column per provider.

    In brackets: the speedup of the first provider over this one.
    """
    names = list(dict.fromkeys(name for document in documents for name in document["runs"][0]["cases"][0]["providers"]))
    rows = []
    for document in documents:
        for case in document["runs"][0]["cases"]:
            speeds = {name: case["batch"] / provider["median_s"] for name, provider in case["providers"].items()}
            first = speeds[names[0]]
            rows.append(
                [
                    case_title(case),
                    f"**{first:.1f}**",
                    *(f"{speeds[n]:.1f} ({report.ratio(first / speeds[n])})" if n in speeds else "" for n in names[1:]),
                ]
            )
    return report.markdown(["images/s", *map(report.provider_title, names)], rows)


def case_title(case: dict[str, Any]) -> str:
    """Return network, shape, dtype unless it is float32, and mode of a case."""
    dtype = "" if case.get("dtype", "float32") == "float32" else f", {case['dtype']}"
    mode = ", training" * (case.get("mode") == "train")
    return f"{case['model']}, {case['batch']} x {case['size']}²{dtype}{mode}"


#: Columns of the README's table: title, and the provider for inference and for training steps.
README_COLUMNS = (
    ("fused_res", ("ours",)),
    ("PyTorch, channels_last", ("eager-channels-last",)),
    ("torch.compile", ("compile-freezing", "compile-channels-last")),
    ("OpenVINO", ("openvino",)),
    ("ONNX Runtime", ("onnxruntime",)),
)


def readme_table(documents: list[Document]) -> str:
    """Return a table of images/s like :func:`network_table`, with one column for both modes of a provider."""
    rows = []
    for case in (case for document in documents for case in document["runs"][0]["cases"]):
        times = {
            title: case["providers"][n]["median_s"]
            for title, names in README_COLUMNS
            for n in names
            if n in case["providers"]
        }
        first = times["fused_res"]
        row = [case_title(case), f"**{case['batch'] / first:.1f}**"]
        for title, _ in README_COLUMNS[1:]:
            time = times.get(title)
            row.append("" if time is None else f"{case['batch'] / time:.1f} ({report.ratio(time / first)})")
        rows.append(row)
    return report.markdown(["images/s", *(title for title, _ in README_COLUMNS)], rows)


def norm_table(documents: list[Document]) -> str:
    """Return a table of the milliseconds for all batch norms of a network, one row per allocator setting."""
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
    return report.markdown(["ms", *map(report.provider_title, names)], rows)


def memory_table(documents: list[Document]) -> str:
    """Return a table of bytes saved for backward, peak memory and time, one row per training configuration."""
    (document,) = documents
    (case,) = document["runs"][0]["cases"]
    rows = [
        [
            report.provider_title(configuration),
            report.megabytes(provider["saved_bytes"] / case["batch"]),
            report.megabytes(provider["peak_tensor_bytes"]),
            report.milliseconds(provider["median_s"]),
        ]
        for configuration, provider in case["providers"].items()
    ]
    return report.markdown([case["name"], "saved for backward, MB/image", "peak tensor memory, MB", "step, ms"], rows)


@dataclass(frozen=True)
class Section:
    """One table of benchmarks/results/README.md."""

    title: str
    names: tuple[str, ...]  # documents in its table
    table: Callable[[list[Document]], str]
    note: str = ""


SECTIONS = (
    Section(
        "Inference",
        ("infer", "infer-bf16"),
        network_table,
        "Medians of interleaved runs in one process; in brackets, the speedup of `fused_res`.",
    ),
    Section(
        "Training steps",
        ("model-resnet18", "model", "model-bf16", "model-bf16-batch4"),
        network_table,
        "Forward, backward and SGD; bfloat16 under autocast.",
    ),
    Section(
        "Ablation",
        ("model-ablation", "infer-ablation"),
        network_table,
        "Training steps, then inference, without one component; in brackets, the speedup of the complete `fused_res`.",
    ),
    Section("Small images", ("model-small",), network_table, "Inference on one image, and a training step on two."),
    Section(
        "Batch norm + add + ReLU alone",
        ("op",),
        norm_table,
        "Forward and backward, total of all batch norms of ResNet-50 at batch 16; in brackets, the geometric mean of"
        " the speedup over its shapes. *Default allocator*: large blocks return to the operating system when they are"
        " freed, so new ones cause page faults; *warm allocator*: freed memory is retained.",
    ),
    Section("Training memory", ("memory",), memory_table),
)


def provenance_lines(documents: list[Document]) -> Iterator[str]:
    """Yield one line per document: command, date and commit of the measurement."""
    for document in documents:
        env = document["runs"][0]["environment"]
        yield f"`{document['command']}` · {env['date'][:10]} · {(env['commit'] or 'no commit')[:12]}"


def readme_section(device: str, documents: dict[str, Document]) -> str:
    """Return the README's paragraph and table about one device; empty without results of networks."""
    shown = [documents[name] for name in README_DOCUMENTS if name in documents]
    if not shown:
        return ""
    env = shown[0]["runs"][0]["environment"]
    note = (
        "Inference, and training steps (forward, backward, SGD): medians of interleaved runs; in brackets, the speedup"
        " of `fused_res`. `torch.compile` is with freezing for inference, in channels_last for training."
    )
    missing = [] if is_gpu(documents) else [dtype for dtype, name in INFERENCE.items() if name not in documents]
    end = f"\n\nInference in {' and '.join(missing)} on this machine: not measured." if missing else ""
    return f"**{device}**: {report.machine(env)}, float32 unless stated. {note}\n\n{readme_table(shown)}{end}"


def tables_section(device: str, documents: dict[str, Document]) -> str:
    """Return the tables of benchmarks/results/README.md about one device."""
    env = next(iter(documents.values()))["runs"][0]["environment"]
    parts = [f"## {device}", report.machine(env)]
    for section in SECTIONS:
        inputs = [documents[name] for name in section.names if name in documents]
        if inputs:
            origin = "<br>\n".join(provenance_lines(inputs))
            parts += [f"**{section.title}.** {section.note}".rstrip(), section.table(inputs), f"<sub>{origin}</sub>"]
    return "\n\n".join(parts)


def summaries_section(device: str, documents: dict[str, Document]) -> str:
    """Return the summaries of all documents of one device, for benchmarks/results/README.md."""
    parts = [f"## {device}: every benchmark"]
    for name, document in documents.items():
        if name == ZOO:
            continue
        summary = frozen.summary if name == FROZEN else SUBCOMMANDS[report.subcommand_of(document)].summary
        body = "\n\n".join([f"$ {document['command']}", *map(summary, document["runs"])])
        parts.append(f"### {name}\n\n{report.environment(document)}\n\n```text\n{body}\n```")
        if name != FROZEN:
            parts.append(f"![]({device}/{name}.png)")
    return "\n\n".join(parts)


def zoo_section(devices: dict[str, dict[str, Document]]) -> str:
    """Return the tables of docs/models.md, of every device that the zoo was measured on."""
    parts = [
        f"**{device}**: {zoo.section(documents[ZOO])}" for device, documents in devices.items() if ZOO in documents
    ]
    return "\n\n".join(parts) or NO_ZOO


def replace_between_markers(text: str, new: str) -> str:
    """Return `text` with `new` between BEGIN and END."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{new}\n\n{END}{rest.split(END)[1]}"


def render_pages() -> dict[Path, str]:
    """Return the text of every generated page."""
    devices = load_results()
    readme = ROOT / "README.md"
    head = (
        "# All results\n\nGenerated by `python -m benchmarks.readme` from the JSON files in this folder.\n"
        "`python -m benchmarks compare A B` compares two results folders and exits with status 1 if fused_res "
        f"regressed.\n\n{CONVENTIONS}"
    )
    parts = [head, *(tables_section(*item) for item in devices.items())]
    if not any(map(is_gpu, devices.values())):
        parts.append(f"## GPU\n\n{NO_GPU}")
    parts += [summaries_section(*item) for item in devices.items()]
    no_amx = "" if any("-amx-" in device for device in devices) else NO_AMX
    tables = "\n\n".join(filter(None, (*(readme_section(*item) for item in devices.items()), no_amx)))
    return {
        readme: replace_between_markers(readme.read_text(), tables),
        RESULTS / "README.md": "\n\n".join(parts) + "\n",
        MODELS: replace_between_markers(MODELS.read_text(), zoo_section(devices)),
    }


if __name__ == "__main__":
    for page, text in render_pages().items():
        page.write_text(text)
    for device, documents in load_results().items():
        if {"infer", "model"} <= documents.keys():
            plots.overview(documents, RESULTS / device / "overview.png")
