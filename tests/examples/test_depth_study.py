"""examples/depth_study: killed studies resume, claims follow from the results, and measurements match references."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from examples.data import load
from examples.depth_study import __main__ as command_line
from examples.depth_study import claims, degradation, figures, gradients, identity, report, spectrum, training
from examples.depth_study.networks import Network, layers
from examples.depth_study.settings import Study, TrainingConfig, fingerprint
from examples.depth_study.store import Store
from fused_res import unfuse
from fused_res.nn import ResidualBlock

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--section", "degradation", "--depths", "8", "14", "--seeds", "1", "--width", "4", "--epochs", "3")


@pytest.fixture(scope="module")
def data():
    return load("digits")


@pytest.fixture
def study(data, tmp_path):
    return Study(data, "digits", (8, 14), 1, 3, 4, 128, 0.05, "auto", True, tmp_path)


# --------------------------------------------------------------------------------------------------- complete studies


def without_times(out: Path) -> dict:
    measured = json.loads((out / "report" / "results.json").read_text())["sections"]
    for entry in (*measured["degradation"]["by_depth"], *measured["degradation"]["by_rate"]):
        del entry["seconds"]
    return measured


def finished(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "trainings").glob("*.json")}


def wait_until(condition, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_killed_study_resumes_and_results_do_not_depend_on_jobs(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "examples.depth_study", *TINY, "--jobs", "1", "--out", str(killed)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: finished(killed))
    workers = children_of(process.pid)
    process.kill()
    process.wait()
    assert workers
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 20)
    before = finished(killed)
    assert not (killed / "report").exists()

    command_line.main([*TINY, "--jobs", "2", "--out", str(killed)])
    after = finished(killed)
    # Two kinds of two depths, and the plain networks of two depths at three further learning rates.
    assert len(before) < len(after) == 10
    assert {name: after[name] for name in before} == before
    assert not list((killed / "trainings").glob("*.running"))

    command_line.main([*TINY, "--jobs", "1", "--out", str(whole)])
    assert without_times(whole) == without_times(killed)
    entries = without_times(whole)["degradation"]["by_depth"]
    assert all(entry["curve_loss"][-1] < entry["curve_loss"][0] for entry in entries)

    # Trainings with other settings do not reuse these results.
    settings = command_line.build_parser().parse_args([*TINY, "--batch-size", "64", "--out", str(whole)])
    study = command_line.study_of(settings, command_line.build_parser())
    store = Store(study.out / "trainings")
    assert [store.result(config) for config in degradation.training_runs(study)] == [None] * 12
    same = dataclasses.replace(study, batch_size=128)
    assert all(store.result(config) for config in degradation.training_runs(same))


def test_diverging_training_aborts_the_study(tmp_path):
    with pytest.raises(SystemExit, match=r"lr 1e\+30, seed 0: the loss is .*; a smaller --lr may help"):
        command_line.main([*TINY, "--lr", "1e30", "--jobs", "1", "--out", str(tmp_path)])
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--depths", "20", "21"), "argument --depths: '21': depth must be 6n"),
        (("--depths", "20", "20"), "argument --depths: expected two different depths"),
        (("--data", "nowhere"), "--data nowhere: expected an existing folder"),
        (("--lr", "0"), "argument --lr: expected a number above 0"),
        (("--out", "/proc/nowhere"), "argument --out: /proc/nowhere"),
        (("--section", "spectre"), "argument --section: invalid choice"),
    ],
)
def test_error_names_the_invalid_argument(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        command_line.main(list(arguments))
    assert error.value.code == 2 and message in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- one training


class Interrupted(Exception):
    pass


def test_interrupted_training_ends_with_the_same_weights(study, data, monkeypatch):
    monkeypatch.setattr(training, "SECONDS_BETWEEN_STATES", 0.0)
    config = study.training("residual", 8)
    whole, parts = Store(study.out / "whole"), Store(study.out / "parts")
    expected = training.train(config, data, whole, lambda epochs: None)

    reported = []

    def stop(epochs: int) -> None:
        reported.append(epochs)
        if len(reported) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        training.train(config, data, parts, stop)
    assert parts.result(config) is None
    reported = [0, 0]
    result = training.train(config, data, parts, reported.append)
    assert reported[2:] == [2, 1]  # two epochs were already done
    assert result | {"seconds": 0} == expected | {"seconds": 0}
    weights = whole.weights(config)
    assert all(torch.equal(weights[name], tensor) for name, tensor in parts.weights(config).items())

    # A damaged file is treated as missing.
    (path,) = (study.out / "parts").glob("*.weights")
    os.truncate(path, path.stat().st_size - 100)
    assert parts.result(config) is None and whole.result(config) is not None


def test_evaluate_returns_mean_loss_and_error(study, data):
    class Constant(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(torch.full((len(x),), 3), 10).float()

    loss, error = training.evaluate(Constant(), data, data.test)
    wrong = (data.test.labels != 3).double().mean().item()
    assert error == pytest.approx(100 * wrong)
    # The loss is log(e + 9), less 1 if the prediction is correct.
    assert loss == pytest.approx(torch.tensor(torch.e + 9).log().item() - (1 - wrong), rel=1e-5)


def test_every_setting_changes_the_name(study, data):
    config = study.training("plain", 8)
    other = {"network": Network("plain", 8, 8), "backend": "reference", "data": "other", "versions": "other"}
    names = {config.name}
    for field in dataclasses.fields(TrainingConfig):
        value = other.get(field.name) or getattr(config, field.name) * 2 + 1
        names.add(dataclasses.replace(config, **{field.name: value}).name)
    for field, value in {"kind": "residual", "depth": 14, "width": 5, "span": 1, "norm": False}.items():
        names.add(dataclasses.replace(config, network=dataclasses.replace(config.network, **{field: value})).name)
    assert len(names) == 1 + len(dataclasses.fields(TrainingConfig)) + 5

    images = data.test.images.clone()
    images[0, 0, 0, 0] += 1
    changed = dataclasses.replace(data, test=dataclasses.replace(data.test, images=images))
    assert fingerprint(changed) != fingerprint(data) == fingerprint(load("digits"))


# --------------------------------------------------------------------------------------------------- measurements


@pytest.mark.parametrize("network", [Network("plain", 14, 4), Network("residual", 20, 4, span=3)])
def test_gradient_norms_match_float64(network, data):
    torch.manual_seed(0)
    model = network.build(10)
    reference = unfuse(copy.deepcopy(model)).double()
    batch = next(iter(data.test_loader(64).batches()))
    norms = gradients.layer_gradient_norms(model, batch.images, batch.labels)

    scores = reference.train()(batch.images.double())
    picked = scores.log_softmax(1)[torch.arange(len(scores)), batch.labels]
    (-picked.mean()).backward()
    named = dict(reference.named_parameters())
    names = ["conv1.weight", *[n for n in named if n.startswith("layer") and ".conv" in n]]
    expected = [named[name].grad.square().sum().sqrt().item() for name in names]
    assert len(norms) == network.depth - 1 == len(layers(model))
    assert norms == pytest.approx(expected, rel=1e-3)


def test_first_to_last_ratio_compares_thirds():
    assert gradients.first_to_last_ratio([1, 4, 9, 9, 8, 2]) == pytest.approx(0.5)
    assert gradients.first_to_last_ratio([0.0] * 6) == 1


@pytest.mark.parametrize("span", identity.SPANS)
def test_zeroed_block_returns_its_shortcut(span, study):
    residual = identity.single_block(span, "identity", study)
    assert residual["from_relu"] == 0 and residual["from_zero"] > 1
    assert identity.single_block(span, "none", study)["from_zero"] == 0


def test_block_that_is_not_zeroed_is_detected(study, monkeypatch):
    monkeypatch.setattr(identity, "zero_last_norm", lambda block: block)
    assert identity.single_block(2, "identity", study)["from_relu"] > 0.1


def test_only_projection_blocks_change_their_input_in_a_new_network(study):
    blocks = identity.fresh_network(study)["blocks"]
    assert [block["projects"] for block in blocks] == [False, False, True, False, True, False]
    assert [block["difference"] == 0 for block in blocks] == [not block["projects"] for block in blocks]


def test_zeroed_blocks_do_not_change_a_trained_residual_network(study):
    store = Store(study.out)
    for kind in ("residual", "plain"):
        config = study.training(kind, study.shallow)
        training.train(config, study.data, store, lambda epochs: None)
    residual = identity.deepened_network(study, store, "residual")
    plain = identity.deepened_network(study, store, "plain")
    assert (residual["from"], residual["to"]) == (8, 44)
    assert residual["difference"] == 0 and residual["test_error"] == residual["test_error_deeper"] < 80
    assert plain["difference"] > 0 and plain["test_error_deeper"] > 85


@pytest.mark.parametrize("span", identity.SPANS)
def test_networks_of_other_spans(span):
    model = Network("residual", 38, 4, span).build(10)
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    assert len(layers(model)) == 37 and len(blocks) == 36 // span
    assert sum(block.downsample is not None for block in blocks) == 2


def test_spectrum_measures_parameters_flops_and_memory(study):
    found = spectrum.measure_network("resnet18", spectrum.MeasurementSize(("resnet18",), 2, 32, 1, 0.0), "auto")
    assert found["parameters"] == 11_689_512  # torchvision's
    assert found["flops_per_image"] == pytest.approx(1.82e9 * 2 * (32 / 224) ** 2, rel=0.02)
    assert found["train"]["ours"]["saved_bytes"] < found["train"]["eager"]["saved_bytes"]
    assert all(values["median_s"] > 0 for mode in ("train", "infer") for values in found[mode].values())


# --------------------------------------------------------------------------------------------------- the report


def entry(kind: str, depth: int, seed: int, error: float, rate: float = 0.05) -> dict:
    values = {"curve_error": [90.0, error], "train_error": error, "test_error": error + 2}
    return {"kind": kind, "depth": depth, "seed": seed, "rate": rate, **values}


def document() -> dict:
    """Return synthetic results for which every claim holds."""
    final = {("plain", 20): 0.1, ("plain", 32): 4.0, ("plain", 56): 45.0}
    final |= {("residual", depth): 0.2 for depth in (20, 32, 56)}
    curves = [
        {"kind": kind, "depth": depth, "state": state, "norms": [norms]}
        for kind, state, growth in (
            ("plain", "initial", 1.2),
            ("residual", "initial", 1.01),
            ("plain", "trained", 1.0),
            ("residual", "trained", 1.01),
        )
        for depth in (20, 56)
        for norms in [[growth ** (depth - layer) for layer in range(1, depth)]]
    ]
    curves += [
        {"kind": kind, "depth": depth, "state": "initial, no norm", "norms": [[base**depth] * (depth - 1)]}
        for kind, base in (("plain", 0.7), ("residual", 1.3))
        for depth in (20, 56)
    ]
    span = {"depth": 38, "blocks": 18, "gradient_ratio": 2.0, "train_loss": 0.01, "test_error": 2.0}
    providers = {"ours": 1.0, "eager": 2.0, "eager-channels-last": 1.5}
    costs = {name: dict.fromkeys(("median_s", "saved_bytes", "peak_bytes"), v) for name, v in providers.items()}
    network = {"name": "resnet18", "layers": 18, "parameters": 11e6, "flops_per_image": 1e9}
    sections = {
        "degradation": {
            "shallow": 20,
            "deep": 56,
            "by_depth": [entry(k, d, seed, e + 0.1 * seed) for (k, d), e in final.items() for seed in range(2)],
            "by_rate": [entry("plain", d, 0, e, rate) for rate in (0.05, 0.1) for d, e in ((20, 0.1), (56, 40.0))],
        },
        "gradients": {"batch": 256, "curves": curves},
        "identity": {
            "single": [
                {"span": s, "shortcut": shortcut, "from_relu": other, "from_zero": 3.0 - other}
                for shortcut, other in (("identity", 0.0), ("none", 3.0))
                for s in (1, 2, 3, 4)
            ],
            "fresh": {
                "depth": 56,
                "blocks": [{"projects": False, "difference": 0.0}, {"projects": True, "difference": None}],
            },
            "deepened": [
                {"kind": kind, "from": 20, "to": 56, "difference": far, "largest": 9.0, "test_error": 1.0}
                | {"test_error_deeper": after}
                for kind, far, after in (("residual", 0.0, 1.0), ("plain", 9.0, 90.0))
            ],
            "spans": [
                {"kind": "plain", "span": None, "train_error": 30.0, **span},
                *[{"kind": "residual", "span": s, "train_error": 0.1, **span} for s in (1, 2, 3, 4)],
            ],
        },
        "spectrum": {
            "batch": 4,
            "side": 64,
            "threads": 2,
            "networks": [network | {"train": costs, "infer": copy.deepcopy(costs)}],
        },
    }
    images = {"train": 1437, "test": 360, "side": 8}
    settings = {"data": "digits", "images": images, "classes": 10, "shift": 1, "mirror": False, "depths": [20, 32, 56]}
    settings |= {"seeds": 2, "epochs": 2, "width": 16, "batch_size": 128, "learning_rate": 0.05, "quick": False}
    environment = {"cpu": "a CPU", "cores": 2, "backend": "cpu", "isa": "avx2", "torch": "2", "fused_res": "0"}
    environment |= {"commit": "0123456789abcdef", "date": "today"}
    return {"command": "a command", "settings": settings, "environment": environment, "sections": sections}


def set_errors(kind: str, depth: int, error: float):
    def change(sections: dict) -> None:
        for found in sections["degradation"]["by_depth"]:
            if (found["kind"], found["depth"]) == (kind, depth):
                found["train_error"] = error

    return change


def set_norms(kind: str, depth: int, state: str, norms: list[float]):
    def change(sections: dict) -> None:
        for curve in sections["gradients"]["curves"]:
            if (curve["kind"], curve["depth"], curve["state"]) == (kind, depth, state):
                curve["norms"] = [norms]

    return change


def put(value, section: str, *keys):
    def change(sections: dict) -> None:
        container = sections[section]
        for key in keys[:-1]:
            container = container[key]
        container[keys[-1]] = value

    return change


REFUTED = {
    "The deeper plain network has": set_errors("plain", 56, 0.3),
    "The deeper residual network does not": set_errors("residual", 56, 5.0),
    "Overfitting is not the cause": set_errors("plain", 56, 0.3),
    "The learning rate is not the cause": put(0.2, "degradation", "by_rate", 3, "train_error"),
    "Every other plain network": set_errors("plain", 32, 0.1),
    "No other residual network": set_errors("residual", 32, 3.0),
    "Every residual network of 56 layers or more": set_errors("residual", 56, 44.5),
    "With batch norm, the gradients of plain networks": set_norms("plain", 56, "initial", [1.0] * 55),
    "Skip connections reduce the change": set_norms("residual", 56, "initial", [2.0**-n for n in range(55)]),
    "Without batch norm, the gradients of deep plain networks": set_norms("plain", 56, "initial, no norm", [1.0] * 55),
    "Without batch norm, shortcuts alone": set_norms("residual", 56, "initial, no norm", [1.0] * 55),
    "After training, the gradients of residual networks": set_norms(
        "residual", 20, "trained", [2.0**n for n in range(19)]
    ),
    "A block whose last norm has zero weight": put(1e-7, "identity", "single", 2, "from_relu"),
    "The same block without its shortcut": put(1e-7, "identity", "single", 5, "from_zero"),
    "Appending such blocks to the stages": put(1e-7, "identity", "deepened", 0, "difference"),
    "Appending the same blocks without shortcuts": put(1.0, "identity", "deepened", 1, "test_error_deeper"),
    "In a new residual-56": put(1e-7, "identity", "fresh", "blocks", 0, "difference"),
    "Residual networks of 38 layers": put(31.0, "identity", "spans", 3, "train_error"),
    "A training step with fused blocks": put(1.6, "spectrum", "networks", 0, "train", "ours", "median_s"),
    "Inference with the frozen network": put(1.6, "spectrum", "networks", 0, "infer", "ours", "median_s"),
    "The tensors saved for backward": put(1.6, "spectrum", "networks", 0, "train", "ours", "saved_bytes"),
}


def verdicts(results: dict) -> dict[str, bool]:
    return {claim.text: claim.holds for found in report.claims_of(results).values() for claim in found}


def test_every_claim_holds_for_supporting_results():
    found = verdicts(document())
    assert all(found.values()) and len(found) == len(REFUTED)
    text = report.render(document())
    assert "21 of 21 claims hold here" in text and "✗" not in text


@pytest.mark.parametrize("start", REFUTED)
def test_claim_is_refuted_by_its_numbers(start):
    results = document()
    REFUTED[start](results["sections"])
    (text,) = [text for text in verdicts(results) if text.startswith(start)]
    assert not verdicts(results)[text]
    assert f"- ✗ **{text}** Does not hold here: " in report.render(results)
    assert f"does not hold here: {text}" in report.summary(results)


def test_overlapping_seeds_are_not_above_each_other():
    low = claims.Spread((1.0, 2.0, 9.0))
    assert not claims.Spread((8.0, 12.0, 13.0)).above(low)  # one seed was better
    assert not claims.Spread((9.5,)).above(claims.Spread((9.0,)))  # negligible
    assert claims.Spread((9.5, 12.0)).above(low)


def test_figures_show_the_results(tmp_path):
    results = document()
    figures.draw(results, tmp_path)
    drawn = {name for names in figures.FIGURES.values() for name in names}
    assert {path.stem for path in tmp_path.glob("*.png")} == drawn
    assert all((tmp_path / f"{name}.png").stat().st_size < 150_000 for name in drawn)

    axis = figures.errors_by_depth(results["sections"]["degradation"]).axes[0]
    plain, residual = axis.lines
    assert list(plain.get_xdata()) == [20, 32, 56]
    assert list(plain.get_ydata()) == pytest.approx([0.15, 4.05, 45.05])
    assert list(residual.get_ydata()) == pytest.approx([0.25] * 3)
    assert (plain.get_color(), residual.get_color()) == (figures.COLORS["plain"], figures.COLORS["residual"])

    figure = figures.gradient_norms(results["sections"]["gradients"])
    deep = figure.axes[1].lines[0]
    assert list(deep.get_ydata()) == pytest.approx([1.2 ** (56 - layer) for layer in range(1, 56)])
    figures.plt.close("all")
