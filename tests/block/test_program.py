"""Step programs: what they hold, that no slot is read before it is written or after it is freed, what they print."""

import itertools

import pytest
import torch

from fused_res import BlockSpec, PoolSpec, UnitSpec
from fused_res.block.plan import BlockConfig
from fused_res.block.planner import plan
from fused_res.block.program import NONE, Program, Slot, Step, run
from fused_res.dispatch import Selected
from tests.support.cpu_backends import FAST

ONE, THREE = UnitSpec(), UnitSpec(padding=(1, 1))
STRIDED = UnitSpec((2, 2), (1, 1))
PROJECTION = UnitSpec((2, 2), activation="identity")
SPECS = {
    "plain": BlockSpec((THREE, THREE)),
    "identity": BlockSpec((ONE, THREE, ONE), "identity"),
    "projection": BlockSpec((ONE, STRIDED, ONE), PROJECTION),
    "stem": BlockSpec((UnitSpec((2, 2), (3, 3)),), pool=PoolSpec()),
}


def make(spec, backend, training=True, recompute="none", preference="planned", group="", frozen=()):
    x = torch.empty(4, 32, 16, 16, memory_format=torch.channels_last)
    tensors = []
    for index, unit in enumerate(spec.convolutions):
        taps = 2 * unit.padding[0] + 1
        norm = [torch.ones(32), torch.zeros(32), torch.zeros(32), torch.ones(32)]
        tensors += [torch.empty(32, 32, taps, taps), torch.zeros(32) if index == 1 else None, *norm]
    wanted = tuple(t is not None and at % 6 < 4 and at not in frozen for at, t in enumerate(tensors))
    config = BlockConfig(spec, (training,) * len(spec.convolutions), backend, recompute, preference, group)
    return plan(config, x, tensors, (0 not in frozen, *wanted))


ALL = list(
    itertools.product(
        SPECS, FAST, (True, False), ("none", "norm", "conv"), ("planned", "fused", "aten"), ("", "group"),
        ((), (0,), (0, 2, 3), tuple(range(12))),
    )
)  # fmt: skip


def test_every_slot_is_written_before_it_is_read_and_freed_after_its_last_use():
    for name, backend, training, recompute, preference, group, frozen in ALL:
        made = make(SPECS[name], backend, training, recompute, preference, group, frozen)
        given = {Slot(at) for at in range(1 + len(made.config.spec.tensor_names()))}
        alive = follow(made.forward, given)
        assert {*made.saved, *made.stats, *made.forward.results} <= alive
        assert alive - given <= {*made.saved, *made.stats, *made.forward.results}, "a slot outlives the program"
        if made.grad:
            dy = Slot(made.slots.index("dy"))
            alive = follow(made.backward, (given - {Slot(0)}) | {*made.saved, dy})
            assert {slot for slot in made.backward.results if slot != NONE} <= alive
        else:
            assert not made.backward.steps and not made.saved


def follow(program: Program, alive: set[Slot]) -> set[Slot]:
    """The slots that hold a tensor at the end; fails at a step that reads one that does not."""
    alive = set(alive)
    for step in program.steps:
        assert set(step.operands) <= alive, step
        alive |= {slot for slot in step.results if slot != NONE}
        assert set(step.frees) <= alive, step
        alive -= set(step.frees)
    return alive


def is_data(value) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(is_data, value))
    return value is None or isinstance(value, (int, float, bool, str))


def test_a_program_holds_numbers_booleans_and_names_only():
    for name, backend, preference in itertools.product(SPECS, FAST, ("planned", "fused")):
        for step in make(SPECS[name], backend, preference=preference).steps:
            *fields, algorithm, recomputed, frees = step
            assert is_data(fields) and is_data(frees) and isinstance(recomputed, bool)
            assert algorithm is None or isinstance(algorithm, Selected)


@pytest.mark.parametrize("recompute", ["none", "norm", "conv"])
def test_recomputation_and_saved_values_are_steps_and_slots(recompute):
    made = make(SPECS["identity"], "reference", recompute=recompute)
    again = [made.slots[step.results[0]] for step in made.backward.steps if step.recomputed]
    assert again == {"none": [], "norm": ["a1", "a0"], "conv": ["a1", "z2", "a0"]}[recompute]
    saved = {made.slots[slot] for slot in made.saved}
    activations = {"a0", "a1"} if recompute == "none" else set()
    raw = {"z0", "z1"} | ({"z2"} if recompute != "conv" else set())
    assert saved == {"x", "mask", "stats0", "stats1", "stats2"} | activations | raw


def test_process_groups_and_fused_norms_are_steps():
    text = str(make(SPECS["projection"], "reference", preference="fused", group="group"))
    for operator in ("conv_bn_stats", "conv_dgrad", "conv_wgrad", "gather_partials", "total_sums", "add_strided_"):
        assert f"  {operator}(" in text
    assert "a0" not in text.replace("grad a0", "") or "recomputed" in text
    assert "saved for backward: " in text and "frees " in text


def test_the_interpreter_passes_slots_and_constants_in_order():
    slots = [torch.tensor(2.0), torch.tensor(3.0), None, None]

    def both(a, factor, absent, b):
        assert absent is None
        return a * factor, b

    step = Step("both", (Slot(0), 10, NONE, Slot(1)), (Slot(2), NONE), frees=(Slot(0),))
    from fused_res.block import program

    program.OPERATORS["both"] = both
    try:
        run(program.link(Program((step,), (Slot(2),)), None), slots)
    finally:
        del program.OPERATORS["both"]
    assert slots[0] is None and slots[1] == 3 and slots[2] == 20 and slots[3] is None
