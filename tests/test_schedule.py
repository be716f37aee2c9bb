"""Positions and moves as pure functions: properties, and brute force beside the formulas."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_helpers import slice_mask
from slicefine.errors import ConfigError
from slicefine.geometry import Slice, entry_indices
from slicefine.schedule import Moves, Schedule, plan_moves, slice_at, widened, wrap_visit

shapes = st.tuples(st.integers(1, 14), st.integers(1, 14))
ranks = st.integers(1, 6)


@given(st.sampled_from(["row", "column"]), st.sampled_from(["sweep", "random"]), ranks, shapes, st.integers(0, 5))
def test_one_cycle_covers_the_matrix_before_anything_repeats(mode, positions, rank, shape, seed):
    schedule = Schedule(mode, rank, rank, positions, seed=seed)
    wrap = wrap_visit(schedule, shape)
    blocks = [slice_at(schedule, visit, shape, "fc") for visit in range(wrap)]
    assert len(set(blocks)) == wrap
    assert {b.width for b in blocks} == {min(rank, shape[0] if mode == "row" else shape[1])}
    covered = slice_mask(blocks[0], shape)
    for block in blocks:
        assert block.axis == mode
        block.check(shape, "fc")
        covered |= slice_mask(block, shape)
    assert covered.all()
    next_cycle = {slice_at(schedule, visit, shape, "fc") for visit in range(wrap, 2 * wrap)}
    assert next_cycle == set(blocks)


@given(ranks, ranks, shapes, st.sampled_from(["sweep", "random"]))
def test_alternate_gives_each_orientation_its_own_cycle(row_rank, column_rank, shape, positions):
    both = Schedule("alternate", row_rank, column_rank, positions)
    rows, columns = Schedule("row", row_rank, 1, positions), Schedule("column", 1, column_rank, positions)
    for turn in range(9):
        assert slice_at(both, 2 * turn, shape, "fc") == slice_at(rows, turn, shape, "fc")
        assert slice_at(both, 2 * turn + 1, shape, "fc") == slice_at(columns, turn, shape, "fc")


def test_sweep_starts_at_index_0_with_a_stride_of_its_rank():
    schedule = Schedule("row", row_rank=3)
    assert [slice_at(schedule, v, (8, 2)).start for v in range(7)] == [0, 3, 5, 0, 3, 5, 0]


def test_fixed_positions_never_change_place():
    for mode in ("row", "column"):
        assert {slice_at(Schedule(mode, 5, 5, "fixed"), v, (20, 20)) for v in range(9)} == {Slice(mode, 0, 5)}
    masks = {slice_at(Schedule("random_mask", 5, positions="fixed"), v, (20, 20), "fc") for v in range(9)}
    assert len(masks) == 1


def test_random_positions_differ_between_layers_seeds_axes_and_cycles():
    def starts(layer="fc", seed=0, mode="row", first=0):
        schedule = Schedule(mode, 1, 1, "random", seed=seed)
        return [slice_at(schedule, first + v, (30, 30), layer).start for v in range(30)]

    base = starts()
    assert base == starts()
    for other in (starts(layer="fd"), starts(seed=1), starts(mode="column"), starts(first=30)):
        assert other != base
        assert sorted(other) == sorted(base)


def test_random_masks_differ_between_layers_seeds_and_visits():
    def mask(visit=0, layer="fc", seed=0):
        return tuple(
            entry_indices(slice_at(Schedule("random_mask", 5, seed=seed), visit, (9, 9), layer), (9, 9)).tolist()
        )

    assert mask() == mask()
    assert len({mask(), mask(visit=1), mask(layer="fd"), mask(seed=1)}) == 4


def test_positions_are_the_same_in_another_process():
    code = (
        "from slicefine.schedule import Schedule, slice_at;"
        "print([tuple(slice_at(Schedule(m, positions='random', seed=3), v, (50, 40), 'a.b')) "
        "for m in ('alternate', 'random_mask') for v in range(6)])"
    )
    here = [
        tuple(slice_at(Schedule(m, positions="random", seed=3), v, (50, 40), "a.b"))
        for m in ("alternate", "random_mask")
        for v in range(6)
    ]
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert there.strip() == str(here)


def test_a_list_of_starts_is_used_in_turn():
    schedule = Schedule("alternate", 2, 2, [4, 0, 1])
    blocks = [slice_at(schedule, v, (6, 6)) for v in range(8)]
    assert [b.start for b in blocks] == [4, 4, 0, 0, 1, 1, 4, 4]
    with pytest.raises(ConfigError, match="positions list, layer 'fc', visit 0: row slice of width 2 at 4"):
        slice_at(schedule, 0, (5, 6), "fc")
    with pytest.raises(ConfigError, match=r"positions=\[\] is an empty list"):
        Schedule(positions=[])
    for wrong in (3, ["a"], [0.5], None):
        with pytest.raises(ConfigError, match="expected a name, a function, or a list of integer start indices"):
            Schedule(positions=wrong)
    with pytest.raises(ConfigError, match="layer 'fc', visit 2: it returned 4; expected a slicefine.Slice"):
        slice_at(Schedule(positions=lambda visit, layer, shape: 4), 2, (9, 9), "fc")


def test_a_function_of_the_user_decides():
    schedule = Schedule("row", 1, 1, lambda visit, layer, shape: Slice("row", visit + len(layer), 1))
    assert slice_at(schedule, 2, (6, 6), "ab") == Slice("row", 4, 1)
    with pytest.raises(ConfigError, match=r"positions function, layer 'ab', visit 4: row slice .* does not fit"):
        slice_at(schedule, 4, (6, 6), "ab")


@given(st.sampled_from(["row", "column", "alternate"]), st.sampled_from(["sweep", "random"]), ranks, ranks, shapes)
def test_wrap_visit_equals_brute_force(mode, positions, row_rank, column_rank, shape):
    schedule = Schedule(mode, row_rank, column_rank, positions)
    seen: set[Slice] = set()
    visit = 0
    while (block := slice_at(schedule, visit, shape, "fc")) not in seen:
        seen.add(block)
        visit += 1
    assert wrap_visit(schedule, shape) == visit


@pytest.mark.parametrize(
    "schedule", [Schedule("random_mask"), Schedule("row", positions="fixed"), Schedule(positions=[1])]
)
def test_wrap_visit_is_none_where_there_is_no_sweep(schedule):
    assert wrap_visit(schedule, (8, 8)) is None


@given(st.integers(0, 30), st.integers(1, 3000), st.integers(1, 200))
def test_plan_moves_gives_every_position_its_minimum_and_no_move_too_many(moves, total, minimum):
    plan = plan_moves(moves, total, minimum)
    made, last, stays = 0, 0, []
    for step in range(1, total + 1):
        if plan.due(step, made):
            stays.append(step - last)
            made, last = made + 1, step
    stays.append(total - last)
    assert made == plan.limit
    assert made <= moves
    if made:
        assert min(stays) >= minimum
    if made < moves:  # one more position would have been too short
        assert total // (made + 2) < minimum
    assert stays[-1] >= 1  # never a move after the last step
    assert stays[-1] - min(stays) < max(1, len(stays))  # spread evenly


def test_moves_are_due_at_multiples_of_the_interval():
    assert [s for s in range(31) if Moves(10).due(s, 0)] == [10, 20, 30]
    assert not Moves(None, 0).due(10, 0)
    assert Moves(10, 2).due(10, 1)
    assert not Moves(10, 2).due(10, 2)


@given(st.sampled_from(["row", "column", "alternate", "random_mask"]), ranks, ranks, shapes)
def test_block_shape_holds_every_visit(mode, row_rank, column_rank, shape):
    schedule = Schedule(mode, row_rank, column_rank)
    room = schedule.block_shape(shape)
    needed = []
    for visit in range(4):
        block = slice_at(schedule, visit, shape, "fc")
        if block.axis == "entries":
            needed.append((1, block.width))
        else:
            needed.append((block.width, shape[1] if block.axis == "row" else shape[0]))
    assert room == (max(n[0] for n in needed), max(n[1] for n in needed))  # no larger than needed either


def test_mask_budget():
    assert Schedule("random_mask", row_rank=2).mask_count((10, 7)) == 14  # an equal-rank row slice
    assert Schedule("random_mask", row_rank=20).mask_count((10, 7)) == 70
    assert Schedule("random_mask", mask_fraction=0.1).mask_count((10, 7)) == 7
    assert Schedule("random_mask", mask_fraction=1e-9).mask_count((10, 7)) == 1
    assert Schedule("random_mask", mask_fraction=1.0).mask_count((10, 7)) == 70


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "diagonal"}, "mode='diagonal' is unknown; expected one of row, column, alternate, random_mask"),
        ({"row_rank": 0}, "row rank r=0 must be an integer of at least 1"),
        ({"column_rank": 2.5}, "column rank r=2.5 must be an integer"),
        ({"row_rank": True}, "row rank r=True must be an integer"),
        ({"positions": "spiral"}, "positions='spiral' is unknown; expected one of sweep, random, fixed"),
        ({"mask_fraction": 0.0}, r"mask_fraction=0.0 must lie in \(0, 1\]"),
        ({"mask_fraction": 1.01}, r"mask_fraction=1.01 must lie in \(0, 1\]"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(**settings)


def test_only_columns_are_counted_in_input_features():
    """A convolution's matrix has several columns per input channel, and one row per output channel."""
    wide = widened(Schedule("alternate", 2, 2, positions=[1, 3]), 9, "conv")
    found = [slice_at(wide, visit, (8, 72), "conv") for visit in range(4)]
    assert found == [Slice("row", 1, 2), Slice("column", 9, 18), Slice("row", 3, 2), Slice("column", 27, 18)]
