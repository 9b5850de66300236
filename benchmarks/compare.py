"""`compare A B`: compare two results folders, from before and after a change.

The exit code is 1 if a provider of fused_res (`ours...`) is significantly slower or needs significantly more memory
in B, and 2 if the folders have no measurement in common.

r = ln(median of B / median of A) of one measurement. Its noise is three standard errors, because a comparison has
hundreds of measurements:

    e      relative standard error of a median: sqrt(pi / 2 / rounds) (p90 - p10) / (w median), where w is the expected
           p90 - p10 of that many standard normal samples (Blom 1958): 2.56 in the limit, 1.33 for three
    s      standard error of r: sqrt(e_A^2 + e_B^2)
    drift  mean r of the case's k peers. A peer is a provider other than fused_res: its code is unchanged, so it is a
           control. The providers of a case run interleaved, so a slow machine slows all of them alike
    sigma  pooled standard deviation of peers from the drift of their case: sqrt(sum (r - drift)^2 / sum (k - 1)) over
           the cases of a document's run; over all documents if no case of that run has two peers
    ours   r - drift, noise 3 sqrt(s^2 + sum s_peer^2 / k^2 + sigma^2). Without peers: r, noise 3 s
    peers  r, noise 3 s: shows the drift and does not affect the exit code

Bytes are counted, not sampled: their noise is set to 0.1%.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

from benchmarks import peers, report

HELP = "compare two results folders: which providers are significantly faster or slower"

TIME = "median_s"
QUANTITIES = {TIME: "", "saved_bytes": ", saved for backward", "peak_tensor_bytes": ", peak tensor memory"}
BYTES_NOISE = 0.001
#: Entries of a run's environment that must be equal for a fair comparison, besides those about a GPU.
ENVIRONMENT = ("cpu", "cores", "threads", "isa", "backend", "python", "torch", "torchvision", *peers.NAMES)


class Key(NamedTuple):
    document: str
    setting: str  # allocator setting
    case: str
    provider: str
    quantity: str

    @property
    def ours(self) -> bool:
        return self.provider.startswith("ours")


class Change(NamedTuple):
    a: float
    b: float
    ratio: float  # r
    corrected: float | None  # r - drift
    noise: float

    @property
    def verdict(self) -> str:
        change = self.ratio if self.corrected is None else self.corrected
        return "within noise" if abs(change) <= self.noise else "slower" if change > 0 else "faster"


Runs = dict[tuple[str, str], dict[str, Any]]  # by document and allocator setting
Measurements = dict[Key, tuple[float, float]]  # a value and its relative standard error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folders", nargs=2, type=Path, metavar="FOLDER", help="A, before, and B, after")


def load(folder: Path) -> tuple[Runs, Measurements]:
    """Return the runs and the measurements of every document in a results folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a results folder, got no folder")
    runs, measured = {}, {}
    for path in sorted(folder.glob("*.json")):
        try:
            for run in json.loads(path.read_text())["runs"]:
                key = path.stem, str(run["allocator"])
                runs[key] = run
                measured |= measurements(key, run)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected a benchmark's results, got {error!r}") from None
    return runs, measured


def measurements(key: tuple[str, str], run: dict[str, Any]) -> Measurements:
    return {
        Key(*key, case["name"], name, quantity): (value, relative_error(provider) if quantity == TIME else 0.0)
        for case in run["cases"]
        for name, provider in case.get("providers", {}).items()  # a calculated document has no providers
        for quantity in QUANTITIES
        if (value := provider.get(quantity))
    }


def relative_error(provider: dict[str, Any]) -> float:
    """Return the relative standard error of a median time: `e` in the module's docstring."""
    if (rounds := provider["rounds"]) < 2:
        return math.inf
    width = -2 * NormalDist().inv_cdf((0.625 + 0.1 * (rounds - 1)) / (rounds + 0.25))
    return math.sqrt(math.pi / 2 / rounds) * (provider["p90_s"] - provider["p10_s"]) / width / provider[TIME]


def pooled_std(cases: Iterable[list[float]]) -> float:
    """Return the standard deviation within cases, pooled over the cases with at least two values."""
    cases = [ratios for ratios in cases if len(ratios) > 1]
    squares = sum((ratio - fmean(ratios)) ** 2 for ratios in cases for ratio in ratios)
    return math.sqrt(squares / sum(len(ratios) - 1 for ratios in cases)) if cases else 0.0


def compare(before: Measurements, after: Measurements) -> dict[Key, Change]:
    """Return the change of every measurement in both; the formulas are in the module's docstring."""
    ratio = {key: math.log(after[key][0] / before[key][0]) for key in before if key in after}
    error = {key: math.hypot(before[key][1], after[key][1]) for key in ratio}
    controls: dict[tuple[str, ...], dict[Key, float]] = defaultdict(dict)  # r of the peers of each case
    for key in ratio:
        if key.quantity == TIME and not key.ours:
            controls[key[:3]][key] = ratio[key]

    def sigma(run: tuple[str, ...]) -> float:
        return pooled_std(list(ratios.values()) for case, ratios in controls.items() if case[: len(run)] == run)

    sigmas = {run: sigma(run) or sigma(()) for run in {key[:2] for key in ratio}}
    found = {}
    for key, r in ratio.items():
        corrected, errors = None, [error[key]]
        if key.ours and key.quantity == TIME and (control := controls.get(key[:3])):
            corrected = r - fmean(control.values())
            errors += [sigmas[key[:2]], *(error[peer] / len(control) for peer in control)]
        noise = 3 * math.hypot(*errors) if key.quantity == TIME else BYTES_NOISE
        found[key] = Change(before[key][0], after[key][0], r, corrected, noise)
    return found


def table(found: dict[Key, Change]) -> str:
    """Return the table of one run of one document, with the geometric mean of each provider at its end."""

    def ratios(*logarithms: float | None) -> list[str]:
        return ["-" if one is None else f"{math.exp(one):.3f}" for one in logarithms]

    rows, groups = [], defaultdict(list)
    for key, change in found.items():
        text, unit = (report.milliseconds, "ms") if key.quantity == TIME else (report.megabytes, "MB")
        amounts = [f"{text(amount)} {unit}" for amount in (change.a, change.b)]
        noise = f"±{math.expm1(min(change.noise, 9)):.1%}"
        name = key.case + QUANTITIES[key.quantity]
        rows.append([name, key.provider, *amounts, *ratios(change.ratio, change.corrected), noise, change.verdict])
        groups[key.provider, QUANTITIES[key.quantity]].append(change)
    for (provider, quantity), changes in groups.items():
        if len(changes) > 1:
            corrected = [change.corrected for change in changes if change.corrected is not None]
            both = ratios(fmean(change.ratio for change in changes), fmean(corrected) if corrected else None)
            rows.append([f"geometric mean of {len(changes)}{quantity}", provider, "", "", *both, "", ""])
    return report.table(["case", "provider", "A", "B", "B/A", "drift-corrected", "noise", "verdict"], rows)


def conditions(run: dict[str, Any]) -> dict[str, Any]:
    """Return the properties of a run that must be equal for a fair comparison."""
    env = run["environment"]
    gpu = {f"gpu {name}": value for name, value in (env.get("gpu") or {}).items()}
    dtypes = sorted({case["dtype"] for case in run["cases"] if "dtype" in case})
    return {**{name: env.get(name) for name in ENVIRONMENT}, **gpu, "dtype": ", ".join(dtypes) or None}


def warnings(before: Runs, after: Runs) -> Iterator[str]:
    documents: dict[str, list[str]] = defaultdict(list)
    for key in (key for key in before if key in after):
        a, b = conditions(before[key]), conditions(after[key])
        for name in a | b:
            installed_once = name in peers.NAMES and None in (a[name], b[name])  # its provider is absent from the other
            if a.get(name) != b.get(name) and not installed_once:
                documents[f"{name}: A has {a.get(name)}, B has {b.get(name)}"].append(key[0])
    for text, names in documents.items():
        yield f"warning: {text} ({', '.join(dict.fromkeys(names))})"


def unmatched_measurements(side: str, one: Measurements, other: Measurements) -> Iterator[str]:
    cases: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for key in (key for key in one if key not in other):
        cases[key.document, key.setting, key.provider + QUANTITIES[key.quantity]].append(key.case)
    for group, names in cases.items():
        yield f"only in {side}: {', '.join(group)}: {'; '.join(names) if len(names) <= 3 else f'{len(names)} cases'}"


def run(options: argparse.Namespace) -> int:
    """Print the comparison and return the exit code."""
    try:
        (runs_a, before), (runs_b, after) = map(load, options.folders)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    found = compare(before, after)
    if not found:
        print(f"{options.folders[0]} and {options.folders[1]}: no measurement in common", file=sys.stderr)
        return 2
    for side, folder, runs in zip("AB", options.folders, (runs_a, runs_b), strict=True):
        print(f"{side}: {folder} · {report.environment({'runs': list(runs.values())})}")
    for warning in warnings(runs_a, runs_b):
        print(warning)
    for document, setting in dict.fromkeys(key[:2] for key in found):
        of_run = {key: change for key, change in found.items() if key[:2] == (document, setting)}
        print(f"\n== {document}, {report.ALLOCATOR_TITLES.get(setting, setting)} ==\n\n{table(of_run)}")
    slower = [key for key, change in found.items() if key.ours and change.verdict == "slower"]
    regressions = [f"regression: {', '.join(key[:4])}{QUANTITIES[key.quantity]}" for key in slower]
    unmatched = [*unmatched_measurements("A", before, after), *unmatched_measurements("B", after, before)]
    print("", *unmatched, *(regressions or ["no significant regression of fused_res"]), sep="\n")
    return int(bool(slower))
