"""The degradation problem: final errors of plain and residual networks by depth and seed.

Plain networks are also trained at other learning rates, to rule out that a deep one only needs a different rate.
"""

from __future__ import annotations

from typing import Any

from examples.depth_study.networks import KINDS
from examples.depth_study.settings import Study, TrainingConfig
from examples.depth_study.store import Store

#: Further learning rates of the plain networks, as multiples of the study's.
OTHER_RATES = (2, 1 / 3, 1 / 10)


def by_depth(study: Study) -> list[TrainingConfig]:
    return [
        study.training(kind, depth, seed) for seed in range(study.seeds) for depth in study.depths for kind in KINDS
    ]


def by_rate(study: Study) -> list[TrainingConfig]:
    return [
        study.training("plain", depth, 0, study.learning_rate * factor)
        for factor in (1, *OTHER_RATES)
        for depth in (study.shallow, study.deep)
    ]


def training_runs(study: Study) -> list[TrainingConfig]:
    return by_depth(study) + by_rate(study)


def measure(study: Study, store: Store) -> dict[str, Any]:
    return {
        "shallow": study.shallow,
        "deep": study.deep,
        "by_depth": [_entry(training, store) for training in by_depth(study)],
        "by_rate": [_entry(training, store) for training in by_rate(study)],
    }


def _entry(training: TrainingConfig, store: Store) -> dict[str, Any]:
    result = store.result(training)
    assert result is not None
    network = training.network
    entry = {"kind": network.kind, "depth": network.depth, "seed": training.seed, "rate": training.learning_rate}
    return entry | {name: value for name, value in result.items() if name != "settings"}
