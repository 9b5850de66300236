"""The plan of an earlier call is recalled only for tensors with exactly the same metadata."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_res import BlockSpec, UnitSpec, functional
from fused_res.block import planner
from fused_res.block.plan import BlockConfig, Plan

SPEC = BlockSpec((UnitSpec(), UnitSpec(padding=(1, 1))), "identity")
CONFIG = BlockConfig(SPEC, (True, True), "reference")


def case() -> tuple[Tensor, list[Any]]:
    def parameters(kernel: int) -> list[Any]:
        vectors = [torch.rand(8, requires_grad=index < 2) for index in range(4)]
        return [torch.randn(8, 8, kernel, kernel, requires_grad=True), None, *vectors]

    return torch.randn(2, 8, 4, 4), parameters(1) + parameters(3)


def fresh(x: Tensor, tensors: list[Any]) -> Plan:
    planner._recent_plans.clear()
    return planner.plan(CONFIG, x, tensors)


def set_data(tensor: Tensor, data: Tensor) -> None:
    tensor.data = data


CHANGES: dict[str, Callable[[Tensor, list[Any]], Any]] = {
    "frozen": lambda x, t: t[2].requires_grad_(False),
    "input requires grad": lambda x, t: x.requires_grad_(),
    "strides of the input": lambda x, t: set_data(x, x.to(memory_format=torch.channels_last)),
    "strides of a weight": lambda x, t: set_data(t[6], t[6].to(memory_format=torch.channels_last)),
    "batch": lambda x, t: set_data(x, torch.randn(3, 8, 4, 4)),
    "dtype of a norm": lambda x, t: t.__setitem__(8, t[8].detach().double()),
    "a bias instead of None": lambda x, t: t.__setitem__(1, torch.zeros(8)),
    "None instead of a norm's weight": lambda x, t: t.__setitem__(2, None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_tensors_get_their_own_plan(change: str):
    x, tensors = case()
    before = fresh(x, tensors)
    assert planner.plan(CONFIG, x, tensors) is before
    CHANGES[change](x, tensors)
    try:
        recalled: Any = planner.plan(CONFIG, x, tensors)
    except (ValueError, TypeError) as error:
        recalled = str(error)
    try:
        expected: Any = fresh(x, tensors)
    except (ValueError, TypeError) as error:
        expected = str(error)
    assert recalled == expected or recalled is expected
    assert recalled is not before


def test_other_tensors_of_the_same_metadata_share_a_plan():
    before = fresh(*case())
    recalled = planner._recent_plans.copy()
    assert planner.plan(CONFIG, *case()) is before and planner._recent_plans == recalled


def test_an_absent_tensor_is_not_mistaken_for_another():
    x, tensors = case()
    fresh(x, tensors)
    moved = [*tensors]
    moved[1], moved[2] = tensors[2], None  # as many tensors, of the same metadata, in the same order
    assert planner.plan(CONFIG, x, moved) is fresh(x, moved)


def test_grad_mode_is_part_of_the_key():
    x, tensors = case()
    with_grad = fresh(x, tensors)
    with torch.no_grad():
        assert not planner.plan(CONFIG, x, tensors).needs_backward
    assert planner.plan(CONFIG, x, tensors) is with_grad and with_grad.needs_backward


def test_dispatch_modes_and_subclasses_do_not_recall_a_plan_of_plain_tensors():
    from torch.utils.flop_counter import FlopCounterMode

    x, tensors = case()
    assert not fresh(x, tensors).key.under_torch_dispatch
    with FlopCounterMode(display=False):
        assert planner.plan(CONFIG, x, tensors).key.under_torch_dispatch


def test_the_number_of_recalled_plans_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planner, "_MAX_RECENT_KEYS", 3)
    _, tensors = case()
    for batch in range(2, 9):
        planner.plan(CONFIG, torch.randn(batch, 8, 4, 4), tensors)
    assert len(planner._recent_plans) <= 3
    x, tensors = case()
    planner._recent_plans.clear()
    for flags in range(2**4):
        for bit, index in enumerate((0, 2, 3, 6)):
            tensors[index].requires_grad_(bool(flags >> bit & 1))
        planner.plan(CONFIG, x, tensors)
    assert max(map(len, planner._recent_plans.values())) == planner._MAX_RECENT_PLANS


def test_the_last_plan_of_a_weight_is_recorded_for_each_weight():
    for _ in range(2):
        x, tensors = case()
        functional.residual_block(x, SPEC, tensors, training=True, backend="reference")
        first = functional.last_plan[tensors[0]]
        functional.residual_block(x[:1], SPEC, tensors, training=True, backend="reference")
        assert functional.last_plan[tensors[0]] is not first
    key = id(tensors[0])
    assert key in functional._recorded
    del tensors
    assert key not in functional._recorded
