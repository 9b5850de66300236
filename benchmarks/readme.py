"""`python -m benchmarks.readme`: writes the measured summaries under benchmarks/results/ into README.md."""

import json
from pathlib import Path

from benchmarks import report
from benchmarks.__main__ import SUBCOMMANDS

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->\n"


def measured() -> str:
    """One section for each committed device, in the words of the benchmarks' own summaries."""
    sections, gpus = [], 0
    for device in sorted(p for p in (ROOT / "benchmarks" / "results").iterdir() if p.is_dir() and p.name != "latest"):
        documents = [json.loads(path.read_text()) for path in sorted(device.glob("*.json"))]
        gpus += bool(documents[0]["runs"][0]["environment"].get("gpu"))
        texts = [report.environment(documents[0])]
        for document in documents:
            texts.append(f"$ {document['command']}")
            texts += [SUBCOMMANDS[document["command"].split()[3]].summary(run) for run in document["runs"]]
        body = "\n\n".join(texts)
        sections.append(f"### {device.name}\n\n```text\n{body}\n```\n")
    if not gpus:
        sections.append("### GPU\n\nNot measured yet: no GPU was there to measure on. `make gpu` does it.\n")
    return "\n" + "\n".join(sections) + "\n"


def updated(text: str) -> str:
    before, rest = text.split(BEGIN)
    return before + BEGIN + measured() + END + rest.split(END)[1]


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))
