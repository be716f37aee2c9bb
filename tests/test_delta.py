"""What a file holds for one layer: packing and unpacking, and what is refused."""

from __future__ import annotations

import pytest
import torch

from slicefine.delta import expected_shapes, pack, unpack
from slicefine.errors import AdapterFileError
from slicefine.functional import write_block
from slicefine.geometry import Slice
from slicefine.journal import Journal, visit_table
from slicefine.schedule import Schedule, slice_at

SHAPE = (7, 9)


def trained(
    schedule: Schedule, visits: int, dtype: torch.dtype = torch.float32
) -> tuple[Journal, torch.Tensor, torch.Tensor]:
    """A journal after ``visits`` positions, its base weight and its trained weight."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(SHAPE, generator=generator).to(dtype)
    weight, journal = base.clone(), Journal()
    for visit in range(visits):
        block = slice_at(schedule, visit, SHAPE, "fc")
        values = journal.begin(weight, block)
        write_block(weight, block, values + torch.randn(values.shape, generator=generator).to(dtype))
        journal.count_step()
    return journal, base, weight


def active_parameter(journal: Journal, weight: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    values = dict(journal.trained(weight))[journal.active]
    parameter = torch.zeros(schedule.block_shape(SHAPE))
    parameter[: values.shape[0], : values.shape[1]] = values
    return parameter


SCHEDULES = [
    Schedule("row", 2, 2),
    Schedule("column", 2, 2),
    Schedule("alternate", 3, 2),
    Schedule("random_mask", 1, 1),
]


@pytest.mark.parametrize("reverted", [False, True])
@pytest.mark.parametrize("visits", [1, 2, 5, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.mode)
def test_round_trip(schedule, visits, reverted, dtype):
    journal, base, weight = trained(schedule, visits, dtype)
    active = active_parameter(journal, weight, schedule)
    state = weight.clone()
    if reverted:
        journal.revert(state)
    tensors = pack(journal, state)
    shapes = {k: tuple(t.shape) for k, t in tensors.items() if k != "journal"}
    assert expected_shapes(tensors["journal"], SHAPE) == shapes
    if schedule.mode != "random_mask":  # every line once, the active block's lines not at all
        for kind, axis in (("rows", 0), ("columns", 1)):
            assert shapes.get(kind, (0,))[0] <= SHAPE[axis]
        if visits == 1:
            assert not shapes
    values = unpack(tensors, active, SHAPE, "fc")
    assert list(values) == journal.slices()
    other = Journal()
    other.load(tensors["journal"], values, tensors.get("before"))
    rebuilt = base.clone()
    other.apply(rebuilt)
    assert torch.equal(rebuilt, weight)
    assert other.visits == journal.visits
    other.revert(rebuilt)
    assert torch.equal(rebuilt, base)


def test_the_active_master_keeps_its_precision():
    schedule = SCHEDULES[0]
    journal, _, weight = trained(schedule, 3, torch.bfloat16)
    active = active_parameter(journal, weight, schedule) + 1e-6
    values = unpack(pack(journal, weight), active, SHAPE, "fc")
    assert torch.equal(values[journal.active], active)
    assert pack(journal, weight)["rows"].dtype == torch.bfloat16


def test_what_unpack_gives_is_apart_from_the_parameter():
    schedule = SCHEDULES[0]
    journal, _, weight = trained(schedule, 3)
    active = active_parameter(journal, weight, schedule)
    values = unpack(pack(journal, weight), active, SHAPE, "fc")
    before = {block: kept.clone() for block, kept in values.items()}
    active.add_(1)
    assert all(torch.equal(values[block], kept) for block, kept in before.items())


def test_overlapping_lines_of_the_clamped_last_block_come_from_the_active_one():
    schedule = Schedule("row", 2, 2)  # 7 rows: blocks at 0, 2, 4, 5
    journal, _, weight = trained(schedule, 4)
    tensors = pack(journal, weight)
    assert tensors["rows"].shape == (5, 9)
    values = unpack(tensors, active_parameter(journal, weight, schedule), SHAPE, "fc")
    assert torch.equal(values[Slice("row", 4, 2)], weight[4:6])
    assert torch.equal(values[Slice("row", 5, 2)], weight[5:7])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.mode)
def test_a_missing_tensor_is_refused(schedule):
    journal, _, weight = trained(schedule, 5)
    tensors = pack(journal, weight)
    active = active_parameter(journal, weight, schedule)
    kinds = [kind for kind in tensors if kind != "journal"]
    assert kinds
    for kind in kinds:
        partial = {k: t for k, t in tensors.items() if k != kind}
        with pytest.raises(AdapterFileError, match=rf"fc: slicefine_{kind} has shape None, but the journal implies"):
            unpack(partial, active, SHAPE, "fc")
        wrong = tensors | {kind: tensors[kind][:-1]}
        with pytest.raises(AdapterFileError, match=rf"fc: slicefine_{kind} has shape \(.*\), but the journal implies"):
            unpack(wrong, active, SHAPE, "fc")


def test_a_tensor_that_the_journal_does_not_know_is_refused():
    journal, _, weight = trained(SCHEDULES[0], 1)
    extra = pack(journal, weight) | {"columns": torch.zeros(2, 7)}
    with pytest.raises(AdapterFileError, match=r"slicefine_columns has shape \(2, 7\), but the journal implies None"):
        unpack(extra, active_parameter(journal, weight, SCHEDULES[0]), SHAPE, "fc")


@pytest.mark.parametrize("active", [torch.zeros(1, 9), torch.zeros(2, 8), torch.zeros(18)], ids=str)
def test_an_active_block_that_is_too_small_is_refused(active):
    journal, _, weight = trained(SCHEDULES[0], 3)
    with pytest.raises(AdapterFileError, match=r"fc: slicefine_active has shape \(.*\), too small for Slice"):
        unpack(pack(journal, weight), active, SHAPE, "fc")


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.mode)
def test_a_foreign_base_is_refused(schedule):
    journal, _, _ = trained(schedule, 8)
    with pytest.raises(AdapterFileError, match=r"lies outside a matrix of shape \(2, 2\); .* another base model"):
        expected_shapes(visit_table(journal.visits), (2, 2))


def test_a_history_of_another_length_is_refused():
    journal, _, weight = trained(SCHEDULES[2], 4)
    tensors = pack(journal, weight)
    active = active_parameter(journal, weight, SCHEDULES[2])
    assert tensors["before"].numel() > 2
    wrong = tensors["journal"].clone()
    counts = wrong[:, 5].tolist()
    last = max(i for i, count in enumerate(counts) if count > 0)
    wrong[last, 5] -= 1
    with pytest.raises(AdapterFileError, match=rf"fc: slicefine_before has shape \({sum(counts)},\), but the journal"):
        unpack(tensors | {"journal": wrong}, active, SHAPE, "fc")
    with pytest.raises(AdapterFileError, match=rf"fc: the history of visit {last + 1} has {counts[last] - 1} values"):
        unpack(tensors | {"journal": wrong, "before": tensors["before"][1:]}, active, SHAPE, "fc")


def test_a_shape_that_the_tensors_contradict_allocates_nothing(monkeypatch):
    journal, _, weight = trained(SCHEDULES[2], 4)
    tensors, huge = pack(journal, weight), (10**9, 10**9)
    made = []
    monkeypatch.setattr("slicefine.journal.covered", lambda *args: made.append(args))
    with pytest.raises(AdapterFileError, match="but the journal implies"):
        unpack(tensors, active_parameter(journal, weight, SCHEDULES[2]), huge, "fc")
    assert not made
