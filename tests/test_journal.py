"""The journal restores, re-applies and undoes bit for bit, whatever crosses whatever."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core_helpers import slice_mask
from slicefine.delta import pack, unpack
from slicefine.errors import AdapterFileError, UnsupportedError
from slicefine.functional import read_block, write_block
from slicefine.geometry import Slice
from slicefine.journal import Journal, Visit, read_table, visit_table

SHAPE = (5, 6)
HISTORY = 3
BLOCKS = [
    *(Slice("row", start, 2) for start in (0, 1, 3)),
    *(Slice("column", start, 2) for start in (0, 1, 4)),
    *(Slice("entries", seed, 7) for seed in range(2)),
]


def base_weight() -> torch.Tensor:
    # values whose differences round: (a + b) - b is not a
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)) * torch.logspace(-6, 6, 30).view(SHAPE)


class JournalMachine(RuleBasedStateMachine):
    """Random sequences of operations beside a model that keeps a dense copy for every visit."""

    @initialize(block=st.sampled_from(BLOCKS))
    def start(self, block):
        self.base = base_weight()
        self.weight, self.trained = self.base.clone(), self.base.clone()
        self.journal = Journal(HISTORY)
        self.snapshots, self.visits, self.kept = [], [], 0
        self.applied = True
        self.generator = torch.Generator().manual_seed(0)
        self.begin(block)

    @precondition(lambda self: self.applied)
    @rule(block=st.sampled_from(BLOCKS))
    def begin(self, block):
        values = self.journal.begin(self.weight, block)
        assert torch.equal(values, read_block(self.trained, block))
        self.snapshots.append(self.trained.clone())
        self.visits.append([block, 0])
        self.kept = min(HISTORY, self.kept + 1)  # an undone visit's place in the history is not refilled

    @precondition(lambda self: self.applied)
    @rule(steps=st.integers(1, 3))
    def train(self, steps):
        block = self.visits[-1][0]
        for _ in range(steps):
            values = read_block(self.weight, block)
            values += torch.randn(values.shape, generator=self.generator)
            write_block(self.weight, block, values)
            self.trained = torch.where(slice_mask(block, SHAPE), self.weight, self.trained)
            self.journal.count_step()
            self.visits[-1][1] += 1

    @rule()
    def revert(self):
        self.journal.revert(self.weight)
        self.applied = False

    @rule()
    def apply(self):
        self.journal.apply(self.weight)
        self.applied = True

    @rule()
    def undo(self):
        if not self.applied:
            with pytest.raises(UnsupportedError, match="not in the weight now"):
                self.journal.undo(self.weight)
        elif len(self.visits) < 2 or self.kept == 0:
            reason = "no slice has moved yet" if len(self.visits) == 1 else f"of {len(self.visits)} visits only"
            with pytest.raises(UnsupportedError, match=reason):
                self.journal.undo(self.weight)
        else:
            self.journal.undo(self.weight)
            self.trained = self.snapshots.pop()
            self.visits.pop()
            self.kept -= 1

    @invariant()
    def weight_is_as_expected(self):
        if hasattr(self, "weight"):
            assert torch.equal(self.weight, self.trained if self.applied else self.base)
            assert self.journal.applied == self.applied
            assert self.journal.step == sum(steps for _, steps in self.visits)
            assert self.journal.active == self.visits[-1][0]

    @invariant()
    def file_form_is_complete(self):
        if not hasattr(self, "weight"):
            return
        assert [v.slice for v in read_table(visit_table(self.journal.visits))] == [block for block, _ in self.visits]
        assert self.journal.slices() == list(dict.fromkeys(block for block, _ in self.visits))
        assert [block for block, _ in self.journal.trained(self.weight)] == self.journal.slices()
        rebuilt = self.base.clone()
        other = Journal()
        other.load(visit_table(self.journal.visits), {b: v.clone() for b, v in self.journal.trained(self.weight)})
        other.apply(rebuilt)
        assert torch.equal(rebuilt, self.trained)
        other.revert(rebuilt)
        assert torch.equal(rebuilt, self.base)
        # deltas count every entry once, whether it was trained in one slice or in several
        total, claimed = torch.zeros(SHAPE), torch.zeros(SHAPE, dtype=torch.int64)
        for block, delta in other.deltas(rebuilt):
            dense = torch.zeros(SHAPE)
            write_block(dense, block, delta)
            total += dense
            claimed += dense != 0
        assert torch.equal(total, self.trained - self.base)
        assert claimed.max() <= 1
        self.history_survives_a_file()

    def history_survives_a_file(self):
        """What `pack` writes undoes as many visits as the journal itself would, to the same bits."""
        tensors = pack(self.journal, self.weight)
        active = dict(self.journal.trained(self.weight))[self.journal.active]
        values = unpack(tensors, active, SHAPE, "fc")
        rebuilt, other = self.base.clone(), Journal(HISTORY)
        other.load(tensors["journal"], values, tensors.get("before"))
        other.apply(rebuilt)
        again = pack(other, rebuilt)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[kind], tensors[kind]) for kind in again)
        for moves in range(1, min(self.kept, len(self.visits) - 1) + 1):
            other.undo(rebuilt)
            assert torch.equal(rebuilt, self.snapshots[-moves])
        other.revert(rebuilt)
        assert torch.equal(rebuilt, self.base)


JournalMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=20)
TestJournal = JournalMachine.TestCase


@pytest.mark.parametrize("seed", range(12))
def test_long_random_walks(seed):
    """The same machine without shrinking: long sequences revisit slices often, which short examples seldom do."""
    chooser = random.Random(seed)
    machine = JournalMachine()
    machine.start(chooser.choice(BLOCKS))
    for _ in range(60):
        action = chooser.choice(["begin", "begin", "train", "train", "undo", "swap"])
        if action == "undo":
            machine.undo()
        elif action == "swap" or not machine.applied:
            machine.revert() if machine.applied else machine.apply()
        elif action == "begin":
            machine.begin(chooser.choice(BLOCKS))
        else:
            machine.train(chooser.randint(1, 2))
        machine.weight_is_as_expected()
        machine.file_form_is_complete()


def trained_journal(blocks: list[Slice], weight: torch.Tensor) -> Journal:
    journal = Journal(history=8)
    for i, block in enumerate(blocks):
        values = journal.begin(weight, block)
        write_block(weight, block, values + 0.1 * (i + 1))
        journal.count_step()
    return journal


def test_undo_goes_back_visit_by_visit_up_to_the_history():
    weight = base_weight()
    journal = Journal(history=2)
    stages = []
    for block in BLOCKS[:4]:
        stages.append(weight.clone())
        write_block(weight, block, journal.begin(weight, block) + 1)
    for stage in (stages[3], stages[2]):
        journal.undo(weight)
        assert torch.equal(weight, stage)
    with pytest.raises(UnsupportedError, match=r"the last 0 of 2 visits only.*Raise `history` before training"):
        journal.undo(weight)
    assert torch.equal(weight, stages[2])


def test_a_visit_without_steps_may_get_some_after_a_file_and_an_undo():
    weight = base_weight()
    journal = trained_journal(BLOCKS[:1], weight)
    for block in BLOCKS[1:3]:
        journal.begin(weight, block)
    tensors, stage = pack(journal, weight), weight.clone()
    values = unpack(tensors, read_block(weight, BLOCKS[2]), SHAPE, "fc")
    journal.revert(weight)
    loaded = Journal(history=8)
    loaded.load(tensors["journal"], values, tensors.get("before"))
    loaded.apply(weight)
    loaded.undo(weight)
    write_block(weight, BLOCKS[1], read_block(weight, BLOCKS[1]) + 1)
    loaded.count_step()
    loaded.restart(weight)
    assert torch.equal(weight, stage)
    assert loaded.step == 1


def test_the_first_visit_cannot_be_undone():
    weight = base_weight()
    journal = trained_journal([BLOCKS[0]], weight)
    with pytest.raises(UnsupportedError, match="the first visit has nothing before it"):
        journal.undo(weight)
    journal = trained_journal(BLOCKS[:2], weight)
    journal.check_undo(1)
    with pytest.raises(UnsupportedError, match="the first visit has nothing before it"):
        journal.check_undo(2)


def test_what_begin_gives_may_be_written_to():
    """It becomes the parameter, or part of it; what the journal keeps must not change with it."""
    weight = base_weight()
    before = weight.clone()
    journal = Journal()
    journal.begin(weight, BLOCKS[0]).add_(1)
    write_block(weight, BLOCKS[0], read_block(weight, BLOCKS[0]) + 1)
    journal.count_step()
    journal.begin(weight, BLOCKS[3]).add_(1)
    journal.undo(weight)
    journal.revert(weight)
    assert torch.equal(weight, before)


def test_originals_are_taken_again_only_before_the_first_step():
    weight = base_weight()
    other = torch.ones(SHAPE)
    journal = Journal()
    journal.begin(weight, BLOCKS[0])
    journal.renew(other)
    assert torch.equal(journal.original(), torch.ones(2, 6))
    journal.count_step()
    journal.renew(weight)
    assert torch.equal(journal.original(), torch.ones(2, 6))
    journal.begin(other, BLOCKS[1])
    journal.renew(weight)
    assert torch.equal(journal.original(), torch.ones(2, 6))


def test_a_loaded_journal_has_nothing_to_undo():
    weight = base_weight()
    journal = trained_journal(BLOCKS[:3], weight)
    table, values = visit_table(journal.visits), dict(journal.trained(weight))
    journal.revert(weight)
    journal.load(table, values)
    journal.apply(weight)
    applied = weight.clone()
    with pytest.raises(UnsupportedError, match="the last 0 of 3 visits only"):
        journal.undo(weight)
    assert torch.equal(weight, applied)


def test_originals_are_kept_once_and_off_the_weight():
    weight = base_weight()
    journal = trained_journal([Slice("row", 0, 2), Slice("row", 3, 2), Slice("row", 0, 2)], weight)
    assert list(journal._originals) == [Slice("row", 0, 2), Slice("row", 3, 2)]
    assert all(v.untyped_storage().nbytes() == 2 * 6 * 4 for v in journal._originals.values())


def test_two_journals_add_up_and_come_off_again():
    weight = base_weight().double()
    base = weight.clone()
    first = trained_journal([Slice("row", 1, 2), Slice("column", 0, 2)], weight)
    only_first = weight - base
    first.revert(weight)
    second = trained_journal([Slice("column", 1, 2), Slice("entries", 1, 7)], weight)
    only_second = weight - base
    second.revert(weight)
    first_deltas, second_deltas = first.deltas(weight), second.deltas(weight)
    first.add(weight, first_deltas)
    second.add(weight, second_deltas, scale=0.5)
    torch.testing.assert_close(weight - base, only_first + 0.5 * only_second)
    second.revert(weight)
    torch.testing.assert_close(weight - base, only_first)
    first.revert(weight)
    assert torch.equal(weight, base)
    first.apply(weight)
    torch.testing.assert_close(weight - base, only_first)


def test_table_round_trip():
    weight = base_weight()
    journal = trained_journal([Slice("row", 0, 2), Slice("column", 1, 2), Slice("entries", 0, 7)], weight)
    table = visit_table(journal.visits)
    assert table.tolist() == [[0, 0, 2, 1, 1, -1], [1, 1, 2, 2, 2, -1], [2, 0, 7, 3, 3, -1]]
    assert read_table(table) == journal.visits
    assert read_table(table)[1] == Visit(Slice("column", 1, 2), 2, 2)
    assert read_table(table[:, :5]) == journal.visits  # version 1
    assert visit_table([]).shape == (0, 6)


@pytest.mark.parametrize(
    "entry",
    [[3, 0, 1, 1, 1], [-1, 0, 1, 1, 1], [0, -1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 1, 0, 1], [0, 0, 1, 5, 3]],
    ids=["axis", "negative axis", "start", "width", "first step", "last step"],
)
def test_impossible_entries_are_refused(entry):
    with pytest.raises(AdapterFileError, match=r"journal: impossible entry \[.*\]; the file is corrupt"):
        read_table(torch.tensor([[0, 0, 1, 1, 1], entry]))


def test_a_history_of_less_than_nothing_is_refused():
    with pytest.raises(AdapterFileError, match=r"journal: impossible entry \[0, 0, 1, 1, 1, -2\]; the file is corrupt"):
        read_table(torch.tensor([[0, 0, 1, 1, 1, -2]]))


@pytest.mark.parametrize(
    "table",
    [
        torch.zeros(2, 4, dtype=torch.int64),
        torch.zeros(0, 5, dtype=torch.int64),
        torch.ones(5).long(),
        torch.ones(1, 5),
    ],
    ids=["columns", "empty", "1-D", "float"],
)
def test_tables_of_another_form_are_refused(table):
    with pytest.raises(AdapterFileError, match=r"expected an integer tensor of shape \(visits, 6\), got torch"):
        read_table(table)


def test_a_smaller_history_keeps_the_last_visits_of_a_file():
    weight = base_weight()
    base, journal, stages = weight.clone(), Journal(history=8), []
    for number, block in enumerate([BLOCKS[0], BLOCKS[3], BLOCKS[2], BLOCKS[4], BLOCKS[1]]):
        stages.append(weight.clone())
        write_block(weight, block, journal.begin(weight, block) + number + 1)
        journal.count_step()
    tensors = pack(journal, weight)
    values = unpack(tensors, dict(journal.trained(weight))[journal.active], SHAPE, "fc")
    for history in (0, 1, 2, 8):
        rebuilt, other = base.clone(), Journal(history)
        other.load(tensors["journal"], values, tensors.get("before"))
        other.apply(rebuilt)
        again = pack(other, rebuilt)
        unpack(again, dict(other.trained(rebuilt))[other.active], SHAPE, "fc")  # its own file is readable
        for moves in range(1, min(history, 4) + 1):
            other.undo(rebuilt)
            assert torch.equal(rebuilt, stages[-moves])
        if history < 4:
            visits = list(other.visits)
            with pytest.raises(UnsupportedError, match="the history holds"):
                other.undo(rebuilt)
            assert other.visits == visits
