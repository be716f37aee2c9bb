"""Positions taken out of a file: the last visits bit for bit, and any single one that the history reaches."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from core_helpers import slice_mask
from peft_helpers import THIRD_PARTY, config, llama, train
from slicefine.cli.main import main
from slicefine.delta import pack, unpack
from slicefine.errors import ConfigError, UnsupportedError
from slicefine.files.adapter import Adapter, LayerFile, read_adapter
from slicefine.files.undo import drop, undo
from slicefine.functional import read_block, write_block
from slicefine.geometry import Slice
from slicefine.journal import Journal, split_history
from slicefine.mover import movers_of

pytestmark = THIRD_PARTY

SHAPE = (5, 6)
BLOCKS = [
    *(Slice("row", start, 2) for start in (0, 1, 3)),
    *(Slice("column", start, 2) for start in (0, 1, 4)),
    *(Slice("entries", seed, 7) for seed in range(2)),
]


class Run:
    """A weight trained visit by visit, with a copy of it from before each one."""

    def __init__(self, blocks: list[Slice], steps: list[int], history: int = 8) -> None:
        self.base = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
        generator = torch.Generator().manual_seed(0)
        weight, journal = self.base.clone(), Journal(history)
        self.blocks, self.steps, self.before = blocks, steps, []
        for block, count in zip(blocks, steps, strict=True):
            self.before.append(weight.clone())
            journal.begin(weight, block)
            for _ in range(count):
                values = read_block(weight, block)
                write_block(weight, block, values + torch.randn(values.shape, generator=generator))
                journal.count_step()
        self.trained = weight
        tensors = pack(journal, weight)
        values = unpack(tensors, dict(journal.trained(weight))[journal.active], SHAPE, "fc")
        kept = split_history(tensors["journal"], tensors.get("before"))
        layer = LayerFile(SHAPE, False, journal.visits, values, [], torch.float32, (7, 7), kept)
        self.adapter = Adapter(Path("somewhere"), {}, {"fc": layer})

    def dense(self, adapter: Adapter) -> Tensor:
        """The base with an adapter's values in it; they agree where blocks cross."""
        weight = self.base.clone()
        for block, values in adapter.layers["fc"].values.items():
            write_block(weight, block, values)
        for block, values in adapter.layers["fc"].values.items():
            assert torch.equal(read_block(weight, block), values)
        return weight

    def value(self, left: list[int]) -> Tensor:
        """Plainly, entry by entry: what the last of the visits that are left made of it."""
        after = [*self.before[1:], self.trained]
        result = self.base.clone()
        for visit in left:
            mask = slice_mask(self.blocks[visit], SHAPE)
            result[mask] = after[visit][mask]
        return result


def random_run(seed: int, fewest_steps: int = 1) -> Run:
    chooser = random.Random(seed)
    count = chooser.randint(2, 7)
    steps = [chooser.choice([fewest_steps, 1, 2]) for _ in range(count)]
    return Run([chooser.choice(BLOCKS) for _ in range(count)], steps)


@pytest.mark.parametrize("seed", range(20))
def test_the_last_visits_go_bit_for_bit(seed):
    run = random_run(seed, fewest_steps=0)
    for moves in range(1, len(run.blocks)):
        assert torch.equal(run.dense(undo(run.adapter, moves)), run.before[-moves])


@pytest.mark.parametrize("seed", range(40))
def test_any_single_visit_goes_and_crossings_with_later_ones_stay(seed):
    run = random_run(seed)
    for visit in range(len(run.blocks)):
        dropped = drop(run.adapter, visit)
        left = [i for i in range(len(run.blocks)) if i != visit]
        assert torch.equal(run.dense(dropped), run.value(left))
        assert [v.slice for v in dropped.layers["fc"].visits] == [run.blocks[i] for i in left]


@pytest.mark.parametrize("seed", range(40))
def test_visits_go_in_any_order_until_one_is_left(seed):
    run = random_run(seed)
    left, adapter = list(range(len(run.blocks))), run.adapter
    chooser = random.Random(seed)
    while len(left) > 1:
        place = chooser.randrange(len(left))
        adapter = drop(adapter, place)
        left.pop(place)
        assert torch.equal(run.dense(adapter), run.value(left))


def test_where_a_layer_waited_outside_its_window_goes_with_the_visit():
    first, second, third = Slice("row", 0, 2), Slice("column", 0, 2), Slice("row", 3, 2)
    run = Run([first, second, second, third], [1, 2, 0, 1])
    dropped = drop(run.adapter, 1)
    assert [v.slice for v in dropped.layers["fc"].visits] == [first, first, third]
    assert torch.equal(run.dense(dropped), run.value([0, 3]))
    with pytest.raises(UnsupportedError, match="fc: after its first visit the layer waited there"):
        drop(Run([first, first, second], [1, 0, 1]).adapter, 0)


def test_a_last_position_that_was_only_entered_holds_nothing():
    run = Run([Slice("row", 0, 2), Slice("row", 2, 2), Slice("column", 0, 1)], [1, 1, 0])
    dropped = drop(run.adapter, 1)
    assert torch.equal(run.dense(dropped), run.value([0]))
    assert len(dropped.layers["fc"].visits) == 1


def test_the_history_limits_what_was_trained_twice_only():
    crossing = Run([Slice("row", 0, 2), Slice("column", 0, 2), Slice("row", 3, 2)], [1, 1, 1], history=1)
    assert torch.equal(crossing.dense(undo(crossing.adapter)), crossing.before[2])
    with pytest.raises(UnsupportedError, match=r"fc: visit 2 of 2 trained 4 entries that earlier.*last 0 visits"):
        undo(crossing.adapter, 2)
    with pytest.raises(UnsupportedError, match=r"visit 2 of 3 trained 4 entries.*the last 1 visits.*Raise history="):
        drop(crossing.adapter, 1)
    apart = Run([Slice("row", 0, 2), Slice("row", 2, 2), Slice("row", 3, 2)], [1, 1, 1], history=1)
    assert torch.equal(apart.dense(drop(apart.adapter, 1)), apart.value([0, 2]))  # nothing was trained before it
    assert torch.equal(apart.dense(drop(apart.adapter, 0)), apart.value([1, 2]))


def test_settings_that_make_no_sense_are_refused():
    run = Run([Slice("row", 0, 2), Slice("row", 2, 2)], [1, 1])
    with pytest.raises(ConfigError, match=r"moves=0 must be at least 1"):
        undo(run.adapter, 0)
    with pytest.raises(ConfigError, match=r"has 2 visits; there is no number 3"):
        drop(run.adapter, 2)
    with pytest.raises(ConfigError, match="has 2 visits, and the first one stays, so at most 1 can be taken back"):
        undo(run.adapter, 2)
    with pytest.raises(ConfigError, match="has one visit, and without it nothing is left"):
        undo(undo(run.adapter), 1)
    uneven = run.adapter.layers | {"other": drop(run.adapter, 0).layers["fc"]}
    with pytest.raises(UnsupportedError, match="visited 1 to 2 times, as in a composed adapter"):
        undo(Adapter(Path("somewhere"), {}, uneven))


def trained_folder(tmp_path: Path, moves: int = 3):
    """An adapter folder, and the model's weights before each of its moves and at the end."""
    model = get_peft_model(llama(), config("alternate", moves=None, interval=2, target_modules=["q_proj", "down_proj"]))
    stages = []
    for number in range(moves + 1):
        stages.append(dense(model))
        train(model, 2 if number < moves else 1)
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "vocab.txt").write_text("kept")
    (tmp_path / "a" / "optimizer.pt").write_text("not kept")
    return model, [*stages, dense(model)]


def dense(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer.weight" in n}


def merged(folder):
    model = PeftModel.from_pretrained(llama(), folder)
    return dense(model)


def test_a_folder_undone_by_the_command_is_the_model_of_then(tmp_path: Path, capsys):
    _, stages = trained_folder(tmp_path)
    words = ["undo", "--adapter", str(tmp_path / "a"), "--output", str(tmp_path / "b")]
    assert main([*words, "--moves", "2"]) == 0
    assert "2 positions left" in capsys.readouterr().out
    for name, weight in merged(tmp_path / "b").items():
        assert torch.equal(weight, stages[2][name])
    assert (tmp_path / "b" / "vocab.txt").read_text() == "kept"
    assert not (tmp_path / "b" / "optimizer.pt").exists()
    assert main([*words, "--position", "1"]) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert main([*words, "--position", "1", "--overwrite"]) == 0
    left = read_adapter(tmp_path / "b")
    assert all([v.first_step for v in layer.visits] == [3, 5, 7] for layer in left.layers.values())
    assert main([*words, "--position", "9", "--overwrite"]) == 1
    assert "has 4 visits; there is no number 9" in capsys.readouterr().err
    assert main([*words, "--position", "1", "--moves", "1"]) == 1
    assert "give moves (the last visits) or position" in capsys.readouterr().err


def test_a_loaded_adapter_undoes_as_the_trained_one_would(tmp_path: Path):
    _, stages = trained_folder(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "a", is_trainable=True)
    for wanted in (stages[3], stages[2]):
        (mover,) = movers_of(loaded)
        mover.undo()
        for name, weight in dense(loaded).items():
            assert torch.equal(weight, wanted[name])
