"""What the study claims, each claim decided by the results: it holds here, or it does not, and by which numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from examples.depth_study.gradients import first_to_last

#: Percentage points up to which a difference of errors counts for nothing: of the digits, 14 training images.
NEGLIGIBLE = 1.0
#: Gradients whose norm changes by less than this from the first to the last third of the layers are called even.
EVEN = 10.0

Measured = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A sentence that is true or false of the results, the numbers that decide it, and where to see them."""

    text: str
    holds: bool
    numbers: str
    shown_in: str  # a figure's name, or "" where a table under the claims shows it

    @property
    def verdict(self) -> str:
        return "holds here" if self.holds else "does not hold here"


@dataclass(frozen=True)
class Spread:
    """Values of several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        return f"{self.mean:.2f} %" + (f" ({low:.2f} to {high:.2f})" if len(self.values) > 1 else "")

    def above(self, other: Spread) -> bool:
        """By more than `NEGLIGIBLE` in the mean, and for every pair of seeds."""
        return self.mean - other.mean > NEGLIGIBLE and min(self.values) > max(other.values)


def errors(measured: Measured, kind: str, depth: int, which: str = "train") -> Spread:
    """Of all seeds of one network, in the end of training."""
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
            f"The deeper plain network ends with a higher training error: plain-{deep} above plain-{shallow}.",
            rises("plain"),
            pair("plain"),
            figure,
        ),
        Claim(
            f"The deeper residual network does not: residual-{deep} is not above residual-{shallow}.",
            not rises("residual"),
            pair("residual"),
            figure,
        ),
        Claim(
            "It is not overfitting: where the test error rises with depth in plain networks, the training error does.",
            rises("plain", "test") and rises("plain"),
            f"test error: {pair('plain', 'test')}",
            figure,
        ),
        Claim(
            f"It is not the learning rate: of {len(rates)} rates, plain-{deep}'s best is above plain-{shallow}'s best.",
            best[deep] - best[shallow] > NEGLIGIBLE,
            "; ".join(
                f"rate {rate:.3g}: "
                + ", ".join(f"plain-{depth} {by_rate[depth, rate]:.2f} %" for depth in (shallow, deep))
                for rate in reversed(rates)
            )
            + " (one seed)",
            "",
        ),
        *_other_depths(measured, figure),
        _twins(measured, figure),
    ]


def _other_depths(measured: Measured, figure: str) -> Iterable[Claim]:
    """What is seen at the depths between and beyond, so that nothing is left out that speaks against the others."""
    shallow, deep = measured["shallow"], measured["deep"]
    others = sorted({entry["depth"] for entry in measured["by_depth"]} - {shallow, deep})
    if not others:
        return
    for kind, rising in (("plain", True), ("residual", False)):
        start = errors(measured, kind, shallow)
        found = {depth: errors(measured, kind, depth) for depth in others}
        yield Claim(
            f"The other {kind} networks: each is {'' if rising else 'not '}above {kind}-{shallow}.",
            all(spread.above(start) is rising for spread in found.values()),
            ", ".join(f"{kind}-{depth} {spread}" for depth, spread in found.items()),
            figure,
        )


def _twins(measured: Measured, figure: str) -> Claim:
    depths = sorted({entry["depth"] for entry in measured["by_depth"] if entry["depth"] >= measured["deep"]})
    found = {depth: [errors(measured, kind, depth) for kind in ("plain", "residual")] for depth in depths}
    return Claim(
        f"From {measured['deep']} layers on, a residual network ends below its plain twin.",
        all(plain.above(residual) for plain, residual in found.values()),
        "; ".join(f"{depth} layers: plain {plain}, residual {residual}" for depth, (plain, residual) in found.items()),
        figure,
    )


def gradients(measured: Measured) -> list[Claim]:
    ratios = {
        (curve["kind"], curve["depth"], curve["state"]): statistics.geometric_mean(map(first_to_last, curve["norms"]))
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
        return "; ".join(
            f"{depth} layers: "
            + ", ".join(f"{kind} {ratios[kind, depth, state]:.3g}" for kind in ("plain", "residual"))
            for depth in depths
        )

    growth = [ratios["plain", depth, "initial"] for depth in depths]
    bare, loose = ({d: largest[kind, d, "initial, no norm"] for d in depths} for kind in ("plain", "residual"))
    return [
        Claim(
            "With batch norm, a plain network's gradients at initialisation do not vanish towards the input: they "
            "explode, the more the deeper it is.",
            growth[-1] > EVEN and growth == sorted(growth),
            f"norm in the first third of the layers over the last third: {listed('initial')}",
            figure,
        ),
        Claim(
            "With skip connections they change less from layer to layer, at every depth.",
            all(
                _unevenness(ratios["residual", depth, "initial"]) < _unevenness(ratios["plain", depth, "initial"])
                for depth in depths
            ),
            f"{deepest} layers: by a factor of {_unevenness(ratios['residual', deepest, 'initial']):.3g}, "
            f"without them {_unevenness(ratios['plain', deepest, 'initial']):.3g}",
            figure,
        ),
        Claim(
            "Without batch norm, gradients of deep plain networks vanish, in all layers at once.",
            bare[deepest] < bare[shallowest] / EVEN**2,
            "largest norm in any layer: " + ", ".join(f"plain-{depth} {norm:.2g}" for depth, norm in bare.items()),
            figure,
        ),
        Claim(
            "Without batch norm, shortcuts alone do not put that right: in deep residual networks gradients explode, "
            "since each block adds to what goes through.",
            loose[deepest] > loose[shallowest] * EVEN**2,
            "largest norm in any layer: " + ", ".join(f"residual-{d} {norm:.2g}" for d, norm in loose.items()),
            figure,
        ),
        Claim(
            "After training the residual networks' gradients are even: within a factor of "
            f"{EVEN:g} from the first to the last third of the layers.",
            all(_unevenness(ratios["residual", depth, "trained"]) < EVEN for depth in depths),
            listed("trained"),
            figure,
        ),
    ]


def _unevenness(ratio: float) -> float:
    return max(ratio, 1 / ratio)


def identity(measured: Measured) -> list[Claim]:
    skips = [row for row in measured["single"] if row["shortcut"] == "identity"]
    plain = [row for row in measured["single"] if row["shortcut"] == "none"]
    deepened = {row["kind"]: row for row in measured["deepened"]}
    residual, twin = deepened["residual"], deepened["plain"]
    fresh = measured["fresh"]["blocks"]
    keeping = [block for block in fresh if not block["projects"]]
    moving = [block for block in fresh if block["projects"]]
    spans = [row for row in measured["spans"] if row["kind"] == "residual"]
    (without,) = [row for row in measured["spans"] if row["kind"] == "plain"]
    return [
        Claim(
            "A block whose last norm is zero returns exactly relu(x), however many layers its shortcut passes over.",
            all(row["from_relu"] == 0 for row in skips),
            f"largest difference over 1 to {len(skips)} layers, training and eval mode: "
            f"{max(row['from_relu'] for row in skips):g}",
            "",
        ),
        Claim(
            "The same block without its shortcut returns zeros: the input is lost.",
            all(row["from_zero"] == 0 for row in plain),
            f"largest output: {max(row['from_zero'] for row in plain):g}",
            "",
        ),
        Claim(
            f"Such blocks behind the stages of the trained residual-{residual['from']} make a network of "
            f"{residual['to']} layers with bit-equal outputs.",
            residual["difference"] == 0,
            f"largest difference {residual['difference']:g}, of outputs up to {residual['largest']:.3g}; test error "
            f"{residual['test_error']:.2f} % before and {residual['test_error_deeper']:.2f} % after",
            "",
        ),
        Claim(
            f"In the trained plain-{twin['from']} they undo the training.",
            twin["test_error_deeper"] > twin["test_error"] + NEGLIGIBLE,
            f"test error {twin['test_error']:.2f} % before and {twin['test_error_deeper']:.2f} % after",
            "",
        ),
        Claim(
            f"In a fresh residual-{measured['fresh']['depth']} with zero_init_residual only the blocks that project, "
            "at a change of stage, move what goes through.",
            all(block["difference"] == 0 for block in keeping) and all(b["difference"] != 0 for b in moving),
            f"{sum(block['difference'] == 0 for block in keeping)} of {len(keeping)} blocks with an identity shortcut "
            f"return their input bit by bit; {len(moving)} project",
            "",
        ),
        Claim(
            f"Shortcuts over one, two, three and four layers all train {without['depth']} layers better than none.",
            all(row["train_error"] < without["train_error"] - NEGLIGIBLE for row in spans),
            ", ".join(f"over {row['span']}: {row['train_error']:.2f} %" for row in spans)
            + f"; none: {without['train_error']:.2f} % (training error, one seed)",
            "",
        ),
    ]


def spectrum(measured: Measured) -> list[Claim]:
    def gains(mode: str, quantity: str) -> dict[str, float]:
        """Stock, the better of its two memory formats, over ours."""
        found = {}
        for network in measured["networks"]:
            providers = network[mode]
            stock = min(values[quantity] for name, values in providers.items() if name != "ours")
            found[network["name"]] = stock / providers["ours"][quantity]
        return found

    def listed(found: dict[str, float]) -> str:
        return "stock over ours: " + ", ".join(f"{name} {value:.2f}x" for name, value in found.items())

    train, infer, saved = gains("train", "median_s"), gains("infer", "median_s"), gains("train", "saved_bytes")
    return [
        Claim(
            "A training step on fused blocks is faster than stock at every depth.",
            min(train.values()) > 1,
            listed(train),
            "costs",
        ),
        Claim("So is the frozen network's inference.", min(infer.values()) > 1, listed(infer), "costs"),
        Claim(
            "A fused training step keeps less for backward, at every depth.",
            min(saved.values()) > 1,
            listed(saved),
            "costs",
        ),
    ]


#: By section.
CLAIMS = {"degradation": degradation, "gradients": gradients, "identity": identity, "spectrum": spectrum}
