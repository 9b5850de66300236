"""The text of a session: a line per result as it comes, and the table at its end, against the predictions."""

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import Record

#: The committed predictions, milliseconds by kind, case and provider. They are read as data, because
#: benchmarks/prediction.py, which writes them, imports torch and fused_res.
PREDICTIONS = Path(__file__).resolve().parents[1] / "results" / "predictions-h200.json"


@cache
def predictions() -> dict[str, dict[str, dict[str, float]]]:
    """Return the predicted milliseconds by kind, case and provider; empty without a readable file."""
    try:
        milliseconds = json.loads(PREDICTIONS.read_text())["milliseconds"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return milliseconds if isinstance(milliseconds, dict) else {}


def predicted(kind: str, case: str, provider: str) -> float | None:
    """Return the predicted milliseconds, or None without a prediction."""
    return predictions().get(kind, {}).get(case, {}).get(provider)


#: The providers to which others are compared.
BASELINES = {"op": "eager-channels-last", "conv": "aten-unfused", "train": "eager-channels-last"}
#: The device tool returns the last 12,000 characters of the output.
TABLE_CHARACTERS = 9000


def measured(record: Record) -> list[tuple[str, str, str, float]]:
    """Return kind, case, provider and milliseconds of each time in a record; an incomplete record has none."""
    kind, case, providers = record.get("kind"), record.get("case"), record.get("providers")
    if not (isinstance(kind, str) and isinstance(case, str) and isinstance(providers, dict)):
        return []
    times = ((name, one.get("median_s")) for name, one in providers.items() if isinstance(one, dict))
    return [(kind, case, name, 1e3 * seconds) for name, seconds in times if isinstance(seconds, int | float)]


def lines_of(record: Record) -> list[str]:
    """Return what is printed of a result when it comes."""
    lines = [
        f"{case}, {name}: {ms:.3f} ms{_against(kind, case, name, ms)}" for kind, case, name, ms in measured(record)
    ]
    if record.get("kind") in ("op", "conv") and lines:
        lines = ["; ".join(lines)]
    lines += [f"{name} is left out: {reason}" for name, reason in dict(record.get("failures") or {}).items()]
    hidden = {"stage", "seconds", "state", "item", "kind", "case", "providers", "failures", "environment", "backend"}
    if not lines:
        values = {key: value for key, value in record.items() if key not in hidden}
        if errors := values.pop("errors", None):
            values["largest error"] = max(errors.values())
        lines = [f"{record.get('item', '')}: {_short(values)}"] if values else []
    return lines


def _against(kind: str, case: str, name: str, ms: float) -> str:
    expected = predicted(kind, case, name)
    return "" if expected is None else f" (predicted {expected:.3f}, {ms / expected:.2f}x)"


def _short(values: Any) -> str:
    text = ", ".join(f"{key} {value}" for key, value in values.items())
    return text if len(text) < 160 else f"{text[:157]}..."


def text(records: Sequence[Record], left_out: Sequence[str]) -> str:
    """Return what was left out, then the tables, the most important one last."""
    parts = ["left out:\n" + "\n".join(f"- {line}" for line in left_out) if left_out else "nothing was left out"]
    parts += [_smoke(records), _operators(records, "conv"), _operators(records, "op"), _training(records)]
    return "\n\n".join(part for part in parts if part)[-TABLE_CHARACTERS:]


def _smoke(records: Sequence[Record]) -> str:
    passed: dict[str, int] = {}
    for record in records:
        if "errors" in record:
            passed[record["stage"]] = passed.get(record["stage"], 0) + 1
    return "\n".join(f"{stage}: {count} checks passed" for stage, count in passed.items())


def _operators(records: Sequence[Record], kind: str) -> str:
    """Return one row per provider: sum over the network's cases, relative to stock PyTorch and to the prediction."""
    counts: dict[str, int] = {}
    times: dict[str, dict[str, float]] = {}
    for record in records:
        for one, case, name, ms in measured(record):
            if one == kind:
                counts[case] = int(record.get("count", 1))
                times.setdefault(name, {})[case] = ms
    base = times.get(BASELINES[kind], {})
    rows = []
    for name, by_case in times.items():
        expected = {case: value for case in by_case if (value := predicted(kind, case, name))}
        ratios = {case: by_case[case] / value for case, value in expected.items()}
        largest = max(ratios, key=ratios.__getitem__, default="-")
        rows.append(
            [
                name,
                str(len(by_case)),
                f"{sum(counts[case] * ms for case, ms in by_case.items()):.3f}",
                _mean([ms / base[case] for case, ms in by_case.items() if case in base]),
                _mean(list(ratios.values())),
                f"{ratios[largest]:.2f} {largest}" if ratios else "-",
            ]
        )
    header = [kind, "cases", "sum ms", f"time / {BASELINES[kind]}", "measured / predicted", "largest"]
    return _table(header, rows) if rows else ""


def _training(records: Sequence[Record]) -> str:
    rows = []
    base: dict[str, float] = {}
    for record in records:
        for kind, case, name, ms in measured(record):
            if kind != "train":
                continue
            if name == BASELINES[kind]:
                base[case] = ms
            expected = predicted(kind, case, name)
            images = record.get("images_per_s")
            rows.append(
                [
                    case,
                    name,
                    f"{ms:.2f}",
                    f"{images:.0f}" if isinstance(images, int | float) else "-",
                    f"{base[case] / ms:.2f}x" if case in base else "-",
                    f"{expected:.2f}" if expected else "-",
                    f"{ms / expected:.2f}" if expected else "-",
                    f"{record.get('first_loss', math.nan):.3f}",
                ]
            )
    header = ["train", "provider", "ms", "images/s", "speedup", "predicted", "measured / predicted", "first loss"]
    return _table(header, rows) if rows else ""


def _mean(values: Sequence[float]) -> str:
    """Return a geometric mean as text."""
    return f"{math.exp(sum(map(math.log, values)) / len(values)):.3f}" if values else "-"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[index]) for row in [header, *rows]) for index in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in [header, *rows])  # fmt: skip
