"""Step programs of blocks: their liveness, their steps and saved slots, and their interpreter."""

import itertools

import pytest
import torch

from fused_res import BlockSpec, PoolSpec, UnitSpec
from fused_res.block.plan import BlockConfig
from fused_res.block.planner import plan
from fused_res.block.program import NO_SLOT, Program, Slot, Step
from fused_res.dispatch import Selection
from tests.support.cpu_backends import FAST_BACKENDS

ONE, THREE = UnitSpec(), UnitSpec(padding=(1, 1))
STRIDED = UnitSpec((2, 2), (1, 1))
PROJECTION = UnitSpec((2, 2), activation="identity")
SPECS = {
    "plain": BlockSpec((THREE, THREE)),
    "identity": BlockSpec((ONE, THREE, ONE), "identity"),
    "projection": BlockSpec((ONE, STRIDED, ONE), PROJECTION),
    "stem": BlockSpec((UnitSpec((2, 2), (3, 3)),), pool=PoolSpec()),
}


def make_plan(spec, backend, training=True, recompute="none", preference="planned", group="", frozen=()):
    x = torch.empty(4, 32, 16, 16, memory_format=torch.channels_last)
    tensors = []
    for index, unit in enumerate(spec.convolutions):
        kernel = 2 * unit.padding[0] + 1
        norm = [torch.ones(32), torch.zeros(32), torch.zeros(32), torch.ones(32)]
        tensors += [torch.empty(32, 32, kernel, kernel), torch.zeros(32) if index == 1 else None, *norm]
    requires_grad = tuple(t is not None and i % 6 < 4 and i not in frozen for i, t in enumerate(tensors))
    config = BlockConfig(spec, (training,) * len(spec.convolutions), backend, recompute, preference, group)
    return plan(config, x, tensors, (0 not in frozen, *requires_grad))


ALL = list(
    itertools.product(
        SPECS, FAST_BACKENDS, (True, False), ("none", "norm", "conv"), ("planned", "fused", "aten"), ("", "group"),
        ((), (0,), (0, 2, 3), tuple(range(12))),
    )
)  # fmt: skip


def test_slots_are_defined_before_use_and_freed_after_last_use():
    for name, backend, training, recompute, preference, group, frozen in ALL:
        plan = make_plan(SPECS[name], backend, training, recompute, preference, group, frozen)
        inputs = {Slot(index) for index in range(1 + len(plan.config.spec.tensor_names()))}
        live = live_after(plan.forward, inputs)
        assert {*plan.saved_slots, *plan.stats_slots, *plan.forward.results} <= live
        assert live - inputs <= {*plan.saved_slots, *plan.stats_slots, *plan.forward.results}, (
            "a slot outlives the program"
        )
        if plan.needs_backward:
            dy = Slot(plan.slot_names.index("dy"))
            live = live_after(plan.backward, (inputs - {Slot(0)}) | {*plan.saved_slots, dy})
            assert {slot for slot in plan.backward.results if slot != NO_SLOT} <= live
        else:
            assert not plan.backward.steps and not plan.saved_slots


def live_after(program: Program, live: set[Slot]) -> set[Slot]:
    """Return the slots that are live after the program; fail at a step that reads a slot that is not live."""
    live = set(live)
    for step in program.steps:
        assert set(step.operands) <= live, step
        live |= {slot for slot in step.results if slot != NO_SLOT}
        assert set(step.last_uses) <= live, step
        live -= set(step.last_uses)
    return live


def is_data(value) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(is_data, value))
    return value is None or isinstance(value, (int, float, bool, str))


def test_program_contains_only_numbers_booleans_and_names():
    for name, backend, preference in itertools.product(SPECS, FAST_BACKENDS, ("planned", "fused")):
        for step in make_plan(SPECS[name], backend, preference=preference).steps:
            *fields, algorithm, recomputed, frees = step
            assert is_data(fields) and is_data(frees) and isinstance(recomputed, bool)
            assert algorithm is None or isinstance(algorithm, Selection)


@pytest.mark.parametrize("recompute", ["none", "norm", "conv"])
def test_recompute_level_determines_recomputed_steps_and_saved_slots(recompute):
    plan = make_plan(SPECS["identity"], "reference", recompute=recompute)
    recomputed = [plan.slot_names[step.results[0]] for step in plan.backward.steps if step.recomputed]
    assert recomputed == {"none": [], "norm": ["a1", "a0"], "conv": ["a1", "z2", "a0"]}[recompute]
    saved = {plan.slot_names[slot] for slot in plan.saved_slots}
    activations = {"a0", "a1"} if recompute == "none" else set()
    raw = {"z0", "z1"} | ({"z2"} if recompute != "conv" else set())
    assert saved == {"x", "mask", "stats0", "stats1", "stats2"} | activations | raw


def test_mask_and_pooling_indices_are_saved_last():
    """Graphs in Inductor's on-disk cache rely on the order, which its key does not cover."""
    for name, last in (("stem", "indices"), ("identity", "mask")):
        plan = make_plan(SPECS[name], "reference")
        saved = [plan.slot_names[slot] for slot in plan.saved_slots]
        assert saved == [*sorted(set(saved) - {last}), last]


def test_plan_text_contains_collectives_and_fused_operators():
    plan = make_plan(SPECS["projection"], "reference", preference="fused", group="group")
    text = str(plan)
    for operator in ("conv_bn_stats", "conv_dgrad", "conv_wgrad", "gather_partials", "total_sums", "add_strided_"):
        assert f"  {operator}(" in text
    # Operand prologues compute a0 and a1 from z0 and z1. Only the backward of the 3x3 convolution is not fused: it
    # recomputes a0.
    computed = {plan.slot_names[slot]: step for step in plan.steps for slot in step.results if slot != NO_SLOT}
    assert computed["a0"].recomputed and "a1" not in computed
    assert "saved for backward: " in text and "frees " in text


def test_linked_program_passes_slots_and_constants_in_order():
    slots = [torch.tensor(2.0), torch.tensor(3.0), None, None]

    def both(a, factor, absent, b):
        assert absent is None
        return a * factor, b

    step = Step("both", (Slot(0), 10, NO_SLOT, Slot(1)), (Slot(2), NO_SLOT), last_uses=(Slot(0),))
    from fused_res.block import program

    program.OPERATORS["both"] = both
    try:
        program.link(Program((step,), (Slot(2),)), None)(slots)
    finally:
        del program.OPERATORS["both"]
    assert slots[0] is None and slots[1] == 3 and slots[2] == 20 and slots[3] is None
