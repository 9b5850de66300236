"""The claims of the study, each decided by the measured results, with the numbers that decide it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from examples.depth_study.gradients import first_to_last_ratio

#: Differences of errors up to this many percentage points are negligible: 14 training images of the digits.
NEGLIGIBLE_POINTS = 1.0
#: Gradients count as uniform when their norm changes by less than this factor from the first to the last third of the
#: layers.
UNIFORM_RATIO = 10.0

Measured = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A statement that the results confirm or refute, and the numbers that decide it."""

    text: str
    holds: bool
    numbers: str
    figure_name: str  # name of the figure that shows it, or "" if a table below the claims does

    @property
    def verdict(self) -> str:
        return "holds here" if self.holds else "does not hold here"


@dataclass(frozen=True)
class Spread:
    """The values of several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        return f"{self.mean:.2f} %" + (f" ({low:.2f} to {high:.2f})" if len(self.values) > 1 else "")

    def above(self, other: Spread) -> bool:
        """Return whether the mean is higher by more than `NEGLIGIBLE_POINTS` and the ranges do not overlap."""
        return self.mean - other.mean > NEGLIGIBLE_POINTS and min(self.values) > max(other.values)


def errors(measured: Measured, kind: str, depth: int, which: str = "train") -> Spread:
    """Return the errors of all seeds of one network at the end of training, in percent."""
    return Spread(tuple(e[f"{which}_error"] for e in measured["by_depth"] if e["kind"] == kind and e["depth"] == depth))


def degradation(measured: Measured) -> list[Claim]:
    shallow, deep = measured["shallow"], measured["deep"]
    found = {
        (kind, depth, which): errors(measured, kind, depth, which)
        for kind in ("plain", "residual")
        for depth in (shallow, deep)
        for which in ("train", "test")
    }

    def pair(kind: str, which: str = "train") -> str:
        return f"{kind}-{shallow} {found[kind, shallow, which]}, {kind}-{deep} {found[kind, deep, which]}"

    def rises(kind: str, which: str = "train") -> bool:
        return found[kind, deep, which].above(found[kind, shallow, which])

    figure = "errors-by-depth"
    rates = sorted({entry["rate"] for entry in measured["by_rate"]})
    by_rate = {(e["depth"], e["rate"]): e["train_error"] for e in measured["by_rate"]}
    best = {depth: min(by_rate[depth, rate] for rate in rates) for depth in (shallow, deep)}
    return [
        Claim(
            f"The deeper plain network has a higher final training error: plain-{deep} is above plain-{shallow}.",
            rises("plain"),
            pair("plain"),
            figure,
        ),
        Claim(
            f"The deeper residual network does not have a higher final training error: residual-{deep} is not above "
            f"residual-{shallow}.",
            not rises("residual"),
            pair("residual"),
            figure,
        ),
        Claim(
            "Overfitting is not the cause: in plain networks, both test error and training error rise with depth.",
            rises("plain", "test") and rises("plain"),
            f"test error: {pair('plain', 'test')}",
            figure,
        ),
        Claim(
            f"The learning rate is not the cause: at the best of {len(rates)} rates for each network, "
            f"plain-{deep} is above plain-{shallow}.",
            best[deep] - best[shallow] > NEGLIGIBLE_POINTS,
            "; ".join(
                f"rate {rate:.3g}: "
                + ", ".join(f"plain-{depth} {by_rate[depth, rate]:.2f} %" for depth in (shallow, deep))
                for rate in reversed(rates)
            )
            + " (one seed)",
            "",
        ),
        *_other_depths(measured, figure),
        _residual_below_plain(measured, figure),
    ]


def _other_depths(measured: Measured, figure: str) -> Iterable[Claim]:
    """Yield a claim for the remaining depths of each kind, so that contradicting results are reported too."""
    shallow, deep = measured["shallow"], measured["deep"]
    others = sorted({entry["depth"] for entry in measured["by_depth"]} - {shallow, deep})
    if not others:
        return
    for kind, rising, subject in (
        ("plain", True, "Every other plain network"),
        ("residual", False, "No other residual network"),
    ):
        start = errors(measured, kind, shallow)
        found = {depth: errors(measured, kind, depth) for depth in others}
        yield Claim(
            f"{subject} has a higher final training error than {kind}-{shallow}.",
            all(spread.above(start) is rising for spread in found.values()),
            ", ".join(f"{kind}-{depth} {spread}" for depth, spread in found.items()),
            figure,
        )


def _residual_below_plain(measured: Measured, figure: str) -> Claim:
    depths = sorted({entry["depth"] for entry in measured["by_depth"] if entry["depth"] >= measured["deep"]})
    found = {depth: [errors(measured, kind, depth) for kind in ("plain", "residual")] for depth in depths}
    return Claim(
        f"Every residual network of {measured['deep']} layers or more has a lower final training error than the plain "
        "network of the same depth.",
        all(plain.above(residual) for plain, residual in found.values()),
        "; ".join(f"{depth} layers: plain {plain}, residual {residual}" for depth, (plain, residual) in found.items()),
        figure,
    )


def gradients(measured: Measured) -> list[Claim]:
    ratios = {
        (curve["kind"], curve["depth"], curve["state"]): statistics.geometric_mean(
            map(first_to_last_ratio, curve["norms"])
        )
        for curve in measured["curves"]
    }
    largest = {
        (curve["kind"], curve["depth"], curve["state"]): statistics.median(map(max, curve["norms"]))
        for curve in measured["curves"]
    }
    depths = sorted({depth for _, depth, _ in ratios})
    deepest, shallowest = depths[-1], depths[0]
    figure = "gradient-norms"

    def listed(state: str) -> str:
        return "gradient norm of the first third of the layers divided by that of the last third: " + "; ".join(
            f"{depth} layers: "
            + ", ".join(f"{kind} {ratios[kind, depth, state]:.3g}" for kind in ("plain", "residual"))
            for depth in depths
        )

    growth = [ratios["plain", depth, "initial"] for depth in depths]
    plain, residual = ({d: largest[kind, d, "initial, no norm"] for d in depths} for kind in ("plain", "residual"))
    return [
        Claim(
            "With batch norm, the gradients of plain networks at initialization do not vanish towards the input: they "
            "explode, and the growth increases with depth.",
            growth[-1] > UNIFORM_RATIO and growth == sorted(growth),
            listed("initial"),
            figure,
        ),
        Claim(
            "Skip connections reduce the change of the gradient norm from the first to the last third of the layers "
            "at every depth.",
            all(
                _change_factor(ratios["residual", depth, "initial"]) < _change_factor(ratios["plain", depth, "initial"])
                for depth in depths
            ),
            f"{deepest} layers: a factor of {_change_factor(ratios['residual', deepest, 'initial']):.3g} with skip "
            f"connections, {_change_factor(ratios['plain', deepest, 'initial']):.3g} without",
            figure,
        ),
        Claim(
            "Without batch norm, the gradients of deep plain networks vanish in all layers.",
            plain[deepest] < plain[shallowest] / UNIFORM_RATIO**2,
            "largest gradient norm of any layer: "
            + ", ".join(f"plain-{depth} {norm:.2g}" for depth, norm in plain.items()),
            figure,
        ),
        Claim(
            "Without batch norm, shortcuts alone do not stabilise the gradients: in deep residual networks they "
            "explode, because every residual branch increases the variance of the signal.",
            residual[deepest] > residual[shallowest] * UNIFORM_RATIO**2,
            "largest gradient norm of any layer: "
            + ", ".join(f"residual-{d} {norm:.2g}" for d, norm in residual.items()),
            figure,
        ),
        Claim(
            "After training, the gradients of residual networks are uniform: their norm changes by less than a factor "
            f"of {UNIFORM_RATIO:g} from the first to the last third of the layers.",
            all(_change_factor(ratios["residual", depth, "trained"]) < UNIFORM_RATIO for depth in depths),
            listed("trained"),
            figure,
        ),
    ]


def _change_factor(ratio: float) -> float:
    return max(ratio, 1 / ratio)


def identity(measured: Measured) -> list[Claim]:
    skips = [row for row in measured["single"] if row["shortcut"] == "identity"]
    plain = [row for row in measured["single"] if row["shortcut"] == "none"]
    deepened = {row["kind"]: row for row in measured["deepened"]}
    deeper_residual, deeper_plain = deepened["residual"], deepened["plain"]
    fresh = measured["fresh"]["blocks"]
    identities = [block for block in fresh if not block["projects"]]
    projections = [block for block in fresh if block["projects"]]
    spans = [row for row in measured["spans"] if row["kind"] == "residual"]
    (without,) = [row for row in measured["spans"] if row["kind"] == "plain"]
    return [
        Claim(
            "A block whose last norm has zero weight and bias returns exactly relu(x) for every number of layers under "
            "its shortcut.",
            all(row["from_relu"] == 0 for row in skips),
            f"largest absolute difference for 1 to {len(skips)} layers, in training and eval mode: "
            f"{max(row['from_relu'] for row in skips):g}",
            "",
        ),
        Claim(
            "The same block without its shortcut returns zeros: its output does not depend on the input.",
            all(row["from_zero"] == 0 for row in plain),
            f"largest absolute output: {max(row['from_zero'] for row in plain):g}",
            "",
        ),
        Claim(
            f"Appending such blocks to the stages of the trained residual-{deeper_residual['from']} yields a network "
            f"of {deeper_residual['to']} layers with bit-identical outputs.",
            deeper_residual["difference"] == 0,
            f"largest absolute difference {deeper_residual['difference']:g}, largest absolute output "
            f"{deeper_residual['largest']:.3g}; "
            f"test error {deeper_residual['test_error']:.2f} % before and "
            f"{deeper_residual['test_error_deeper']:.2f} % after",
            "",
        ),
        Claim(
            f"Appending the same blocks without shortcuts to the trained plain-{deeper_plain['from']} increases its "
            "test error.",
            deeper_plain["test_error_deeper"] > deeper_plain["test_error"] + NEGLIGIBLE_POINTS,
            f"test error {deeper_plain['test_error']:.2f} % before and {deeper_plain['test_error_deeper']:.2f} % after",
            "",
        ),
        Claim(
            f"In a new residual-{measured['fresh']['depth']} with zero_init_residual, only the blocks with a "
            "projection shortcut, at the start of a stage, differ from the identity.",
            all(block["difference"] == 0 for block in identities) and all(b["difference"] != 0 for b in projections),
            f"{sum(block['difference'] == 0 for block in identities)} of {len(identities)} blocks with an identity "
            f"shortcut return their input bit for bit; {len(projections)} have a projection shortcut",
            "",
        ),
        Claim(
            f"Residual networks of {without['depth']} layers have a lower final training error than the plain network "
            "for one, two, three and four layers per shortcut.",
            all(row["train_error"] < without["train_error"] - NEGLIGIBLE_POINTS for row in spans),
            "layers per shortcut "
            + ", ".join(f"{row['span']}: {row['train_error']:.2f} %" for row in spans)
            + f"; plain: {without['train_error']:.2f} % (one seed)",
            "",
        ),
    ]


def spectrum(measured: Measured) -> list[Claim]:
    def gains(mode: str, quantity: str) -> dict[str, float]:
        """Return stock PyTorch's value in its better memory format divided by fused_res's, by network."""
        found = {}
        for network in measured["networks"]:
            providers = network[mode]
            stock = min(values[quantity] for name, values in providers.items() if name != "ours")
            found[network["name"]] = stock / providers["ours"][quantity]
        return found

    def listed(quantity: str, found: dict[str, float]) -> str:
        return f"{quantity} with stock PyTorch divided by {quantity} with fused_res: " + ", ".join(
            f"{name} {value:.2f}x" for name, value in found.items()
        )

    train, infer, saved = gains("train", "median_s"), gains("infer", "median_s"), gains("train", "saved_bytes")
    return [
        Claim(
            "A training step with fused blocks is faster than with stock PyTorch at every depth.",
            min(train.values()) > 1,
            listed("time", train),
            "costs",
        ),
        Claim(
            "Inference with the frozen network is faster than with stock PyTorch at every depth.",
            min(infer.values()) > 1,
            listed("time", infer),
            "costs",
        ),
        Claim(
            "The tensors saved for backward are smaller with fused blocks than with stock PyTorch at every depth.",
            min(saved.values()) > 1,
            listed("size", saved),
            "costs",
        ),
    ]


#: The function that returns a section's claims, by section.
CLAIMS = {"degradation": degradation, "gradients": gradients, "identity": identity, "spectrum": spectrum}
