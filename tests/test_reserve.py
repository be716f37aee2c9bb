"""Runs that keep apart by design: positions that do not meet, and crossings that nobody touches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

from core_helpers import batches, mlp, slice_mask, step
from peft_helpers import THIRD_PARTY, config, gpt2, llama, train
from slicefine import SliceFineConfig, attach
from slicefine.errors import AdapterFileError, ConfigError
from slicefine.files.adapter import read_adapter, write_adapter
from slicefine.files.checkpoint import Checkpoint
from slicefine.files.compose import compose
from slicefine.geometry import Slice, covered
from slicefine.mover import movers_of
from slicefine.reference import ReferenceSliceLinear
from slicefine.schedule import Schedule, own_starts, slice_at, slices_of_others
from slicefine.training.counts import model_touched, touched_entries

pytestmark = THIRD_PARTY
MODES = ("row", "column", "alternate")


def dense(blocks, shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    for block in blocks:
        mask |= slice_mask(block, shape)
    return mask


def trained_mask(schedule, shape, visits, layer="fc"):
    """Entries that a run with this schedule changes."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for visit in range(visits):
        block = slice_at(schedule, visit, shape, layer)
        own = slice_mask(block, shape)
        fixed = covered(block, slices_of_others(schedule, shape, layer), shape)
        lines = torch.zeros(shape, dtype=torch.bool)
        part = lines[block.start : block.start + block.width] if block.axis == "row" else None
        if part is not None:
            part.copy_(fixed)
        else:
            lines[:, block.start : block.start + block.width] = fixed.t()
        mask |= own & ~lines
    return mask


@given(
    rows=st.integers(6, 20),
    columns=st.integers(6, 20),
    r=st.integers(1, 3),
    parts=st.integers(2, 3),
    visits=st.integers(1, 9),
    mode=st.sampled_from(MODES),
    positions=st.sampled_from(["sweep", "random", "fixed"]),
)
def test_shares_train_no_common_entry(rows, columns, r, parts, visits, mode, positions):
    shape = (rows, columns)
    if min(shape) < r * parts:
        return
    masks = [
        trained_mask(Schedule(mode, r, r, positions, None, 3, share=(i, parts), share_visits=visits), shape, visits)
        for i in range(parts)
    ]
    assert int(torch.stack(masks).sum(0).max()) <= 1
    assert all(mask.any() for mask in masks)


@given(rows=st.integers(4, 20), r=st.integers(1, 4), parts=st.integers(1, 4), mode=st.sampled_from(["row", "column"]))
def test_shares_take_every_position_once(rows, r, parts, mode):
    shape = (rows, 7) if mode == "row" else (7, rows)
    whole = own_starts(Schedule(mode, r, r), mode, shape)
    if len(whole) < parts:
        with pytest.raises(ConfigError, match=r"layer 'fc': .*too few for part"):
            own_starts(Schedule(mode, r, r, share=(parts - 1, parts)), mode, shape, "fc")
        return
    found = [list(own_starts(Schedule(mode, r, r, share=(i, parts)), mode, shape, "fc")) for i in range(parts)]
    assert sorted(start for own in found for start in own) == list(whole)


@given(
    reserved=st.lists(
        st.builds(Slice, st.sampled_from(["row", "column"]), st.integers(0, 8), st.integers(1, 2)),
        min_size=1,
        max_size=4,
    ),
    mode=st.sampled_from(MODES),
    positions=st.sampled_from(["sweep", "random", [0, 3, 6, 9]]),
)
def test_reserved_lines_are_kept_out_of(reserved, mode, positions):
    shape = (11, 12)
    schedule = Schedule(mode, 2, 2, positions, reserve={"fc": reserved})
    starts = {"row": (0, 2, 4, 6, 8, 9), "column": (0, 2, 4, 6, 8, 10)}
    lines = {axis: {i for s in reserved if s.axis == axis for i in s.indices()} for axis in starts}
    axes = ("row", "column") if mode == "alternate" else (mode,)
    given_or_all = {axis: positions if isinstance(positions, list) else starts[axis] for axis in axes}
    if any(all({s, s + 1} & lines[axis] for s in given_or_all[axis]) for axis in axes):
        with pytest.raises(ConfigError, match="reserve= leaves 0 of"):
            [slice_at(schedule, visit, shape, "fc") for visit in range(2)]
        return
    blocks = [slice_at(schedule, visit, shape, "fc") for visit in range(12)]
    owned = dense(reserved, shape)
    for block in blocks:
        assert not any(slice_mask(other, shape)[slice_mask(block, shape)].all() for other in reserved)
        assert all(other.axis != block.axis or not set(other.indices()) & set(block.indices()) for other in reserved)
    assert not (trained_mask(schedule, shape, 12) & owned).any()
    assert set(slices_of_others(schedule, shape, "fc")) == set(reserved)
    assert slices_of_others(schedule, shape, "another layer") == []


RESERVED = {
    "0": [Slice("row", 1, 3), Slice("column", 2, 2)],
    "2": [Slice("column", 4, 2), Slice("row", 4, 1)],
    "4": [Slice("row", 0, 1)],
}


@pytest.mark.parametrize("policy", ["reset", "rewarm", "keep"])
@pytest.mark.parametrize("additive", [False, True], ids=["in place", "additive"])
@pytest.mark.parametrize("mode", MODES)
def test_reserved_entries_stay_and_the_rest_equals_the_twin(mode, additive, policy):
    """The twin masks the gradient before the step and puts reserved values back after it."""
    model, plain = mlp(), mlp()
    if additive and policy != "reset":
        return
    decay = 0.0 if additive else 0.1  # beside the weights it pulls towards zero change, not towards zero
    tuner = attach(
        model, r=2, mode=mode, interval=3, reserve=RESERVED, train_rest=False, additive=additive, state_policy=policy
    )
    base = {name: layer.weight.clone() for name, layer in tuner.layers.items()}
    twins = {}
    schedule = Schedule(mode, 2, 2, reserve=RESERVED)
    for name in RESERVED:
        twins[name] = ReferenceSliceLinear(plain.get_submodule(name), schedule, name)
        setattr(plain, name, twins[name])
    mine = torch.optim.AdamW(tuner.parameters(), lr=0.05, weight_decay=decay)
    theirs = torch.optim.AdamW([twin.part_T for twin in twins.values()], lr=0.05, weight_decay=decay)
    for number, (x, y) in enumerate(batches(14), start=1):
        step(model, mine, x, y)
        theirs.zero_grad()
        (plain(x) - y).square().mean().backward()
        kept = {}
        for name, twin in twins.items():
            lines = twin.lines()
            fixed = torch.zeros_like(twin.part_T, dtype=torch.bool)
            fixed[: lines.shape[0], : lines.shape[1]] = covered(twin.active, RESERVED[name], twin.shape)
            twin.part_T.grad[fixed] = 0
            kept[name] = (fixed, twin.part_T.detach().clone())
        theirs.step()
        since = (number - 1) % 3 + 1
        for name, twin in twins.items():
            fixed, before = kept[name]
            with torch.no_grad():
                if policy == "rewarm" and number > 3:
                    twin.part_T.copy_(before + min(1, since / 10) * (twin.part_T - before))
                twin.part_T[fixed] = before[fixed]
                twin.part_T[twin.lines().shape[0] :] = 0
                twin.part_T[:, twin.lines().shape[1] :] = 0
            if number % 3 == 0:
                twin.move()
                if policy != "keep":
                    theirs.state.pop(twin.part_T, None)
    for name, layer in tuner.layers.items():
        assert layer.states["default"].journal.active == twins[name].active
        weight = tuner.layers[name].weight.detach().clone()
        layer.fold()
        folded = layer.weight.detach()
        assert_close(folded, twins[name].weight().detach())
        owned = dense(RESERVED[name], layer.shape)
        assert torch.equal(folded[owned], base[name][owned])
        assert not torch.equal(folded, base[name])
        assert additive == torch.equal(weight, base[name])


def test_gradients_of_reserved_entries_are_zero_under_checkpointing_too():
    found = []
    for checkpointed in (False, True):
        model = mlp()
        tuner = attach(model, r=2, mode="alternate", interval=3, reserve=RESERVED)
        x, y = batches(1)[0]
        run = torch.utils.checkpoint.checkpoint if checkpointed else lambda f, x, **_: f(x)
        (run(model, x.requires_grad_(), use_reentrant=False) - y).square().mean().backward()
        found.append([parameter.grad.clone() for parameter in tuner.parameters()])
    for plain, other in zip(*found, strict=True):
        assert_close(plain, other)
        assert plain.any()
    block = tuner.layers["0"].states["default"].journal.active
    fixed = covered(block, RESERVED["0"], (11, 6))
    assert fixed.any()
    assert not found[1][0][: block.width, : fixed.shape[1]][fixed].any()


@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_parallel_runs_of_a_share_are_composed_untouched(tmp_path: Path, mode, dtype, build):
    build(dtype).save_pretrained(tmp_path / "base")
    targets = ["q_proj", "down_proj"] if build is llama else ["c_attn", "c_fc"]
    base, ends = None, []
    for number in range(2):
        plain = build(dtype)
        base = {n: p.clone() for n, p in plain.state_dict().items() if any(f"{t}.weight" in n for t in targets)}
        shared = config(mode, target_modules=targets, share=[number, 2], total_steps=6)
        model = get_peft_model(plain, shared)
        train(model, 6, ids=torch.randint(3, 30, (3, 8), generator=torch.Generator().manual_seed(number)))
        model.save_pretrained(tmp_path / str(number))
        merged = model.merge_and_unload().state_dict()
        ends.append({n: merged[n] for n in base})
    adapters = [read_adapter(tmp_path / str(number)) for number in range(2)]
    with Checkpoint(tmp_path / "base") as files:
        write_adapter(compose(adapters, files, "refuse"), tmp_path / "both")
    both = PeftModel.from_pretrained(build(dtype), tmp_path / "both").merge_and_unload().state_dict()
    for name, first in ends[0].items():
        changed = first != base[name]
        assert torch.equal(both[name], torch.where(changed, first, ends[1][name]))
        assert not (changed & (ends[1][name] != base[name])).any()


def test_a_second_task_on_top_of_the_first_keeps_out_and_comes_off_again(tmp_path: Path):
    first = get_peft_model(llama(), config(target_modules=["q_proj"]))
    train(first, 6)
    first.save_pretrained(tmp_path / "a")
    merged = first.merge_and_unload()
    before = {n: p.clone() for n, p in merged.state_dict().items()}
    settings = config(target_modules=["q_proj"], reserve=[str(tmp_path / "a")])
    second = get_peft_model(merged, settings)
    train(second, 6)
    second.save_pretrained(tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert saved["reserve"] == settings.reserve
    assert str(tmp_path) not in json.dumps(saved["reserve"])  # what folders become, not where they were
    restored = second.unload().state_dict()
    assert all(torch.equal(restored[n], before[n]) for n in before)
    # both in one, over the original base: values of the first that the second's blocks carry are no clash
    llama().save_pretrained(tmp_path / "base")
    with Checkpoint(tmp_path / "base") as files:
        both = compose([read_adapter(tmp_path / n) for n in "ab"], files, "refuse")
        write_adapter(both, tmp_path / "both")
    stacked = PeftModel.from_pretrained(llama(), tmp_path / "both").merge_and_unload().state_dict()
    again = PeftModel.from_pretrained(merged, tmp_path / "b").merge_and_unload().state_dict()
    assert all(torch.equal(stacked[n], again[n]) for n in again)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": [2, 2]}, r"share=\(2, 2\): expected \(i, n\) with 0 <= i < n"),
        ({"share": [0]}, r"share=\[0\]: expected \[i, n\]"),
        ({"share": [0, 2], "interval": 5}, "needs the number of visits.*interval= with total_steps="),
        ({"share": [0, 2], "mode": "random_mask"}, "draws entries all over the matrix"),
        ({"reserve": {"fc": [["row", 0, 1]]}, "mode": "random_mask"}, "draws entries all over the matrix"),
        ({"share": [0, 2], "positions": lambda *_: None}, "a function has to do so by itself"),
        ({"reserve": 5}, "expected folders of adapters"),
        ({"reserve": {"fc": [["diagonal", 0, 1]]}}, r"expected folders of adapters, or \{layer"),
        ({"reserve": {"fc": [[0, 1]]}}, r"expected folders of adapters, or \{layer"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SliceFineConfig(**settings)


def test_more_visits_than_planned_are_refused():
    model = nn.Sequential(nn.Linear(16, 16))
    tuner = attach(model, r=2, mode="alternate", moves=2, total_steps=300, share=(0, 2))
    tuner.move()
    tuner.move()
    with pytest.raises(ConfigError, match="was planned for 3 visits per run"):
        tuner.move()


def test_layers_that_nobody_trains_here_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none of its 1 layers \(bert.fc, ...\) is trained here \(model.layers"):
        get_peft_model(llama(), config(reserve={"bert.fc": [["row", 0, 2]]}))
    with pytest.raises(ConfigError, match=r"reserve= leaves 0 of 3 positions of 2 rows"):
        attach(nn.Sequential(nn.Linear(4, 6)), r=2, mode="row", reserve={"0": [Slice("row", 0, 6)]})


BLOCKS = st.lists(
    st.builds(Slice, st.sampled_from(["row", "column"]), st.integers(0, 8), st.integers(1, 3)), max_size=4
)


@given(own=BLOCKS, others=BLOCKS)
def test_entries_of_others_are_not_counted(own, others):
    shape = (11, 12)
    assert touched_entries(own, shape, others) == int((dense(own, shape) & ~dense(others, shape)).sum())


@pytest.mark.parametrize("mode", MODES)
def test_counts_are_of_entries_that_change(mode):
    model = mlp()
    tuner = attach(model, r=2, mode=mode, interval=3, reserve=RESERVED)
    base = {name: layer.weight.clone() for name, layer in tuner.layers.items()}
    expected = tuner.mover.active_entries()
    assert tuner.mover.fixed_entries() > 0
    assert expected + tuner.mover.fixed_entries() == sum(
        layer.block("default").numel() for layer in tuner.layers.values()
    )
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for number, (x, y) in enumerate(batches(8)):
        step(model, optimizer, x, y)
        if number == 0:
            assert sum(int((layer.weight != base[name]).sum()) for name, layer in tuner.layers.items()) == expected
    changed = sum(int((layer.weight != base[name]).sum()) for name, layer in tuner.layers.items())
    assert changed == model_touched(model)


@pytest.mark.parametrize("additive", [False, True], ids=["in place", "additive"])
def test_writes_past_the_optimizer_leave_reserved_entries_alone(additive):
    model = mlp()
    tuner = attach(model, r=2, mode="row", interval=9, reserve=RESERVED, additive=additive)
    before = {name: layer.weight.clone() for name, layer in tuner.layers.items()}
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(1.0)
    model(batches(1)[0][0])
    for name, layer in tuner.layers.items():
        layer.fold()
        owned = dense(RESERVED[name], layer.shape)
        assert torch.equal(layer.weight[owned], before[name][owned])
        assert not torch.equal(layer.weight, before[name])


def stacked_pair(tmp_path: Path, dtype=torch.float32):
    """Adapter a, and adapter b trained on the base with a merged into it, out of a's way; both folders."""
    llama(dtype).save_pretrained(tmp_path / "base")
    first = get_peft_model(llama(dtype), config(target_modules=["q_proj"]))
    train(first, 5)
    first.save_pretrained(tmp_path / "a")
    second = get_peft_model(first.merge_and_unload(), config(target_modules=["q_proj"], reserve=[str(tmp_path / "a")]))
    train(second, 5)
    second.save_pretrained(tmp_path / "b")
    return {n: p.clone() for n, p in second.merge_and_unload().state_dict().items() if "q_proj" in n}


def test_the_first_tasks_change_counts_once_when_both_are_active(tmp_path: Path):
    wanted = stacked_pair(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    model.base_model.set_adapter(["a", "b"], inference_mode=True)
    found = {n: p for n, p in model.named_parameters() if "base_layer.weight" in n}
    for name, weight in wanted.items():
        (key,) = (n for n in found if n.endswith(name.replace(".weight", ".base_layer.weight")))
        assert_close(found[key], weight)
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")
    model.set_adapter("both")
    found = {n: p for n, p in model.named_parameters() if "base_layer.weight" in n}
    for name, weight in wanted.items():
        (key,) = (n for n in found if n.endswith(name.replace(".weight", ".base_layer.weight")))
        assert_close(found[key], weight)


def test_stacked_half_precision_adapters_compose_without_a_clash(tmp_path: Path):
    wanted = stacked_pair(tmp_path, torch.bfloat16)
    with Checkpoint(tmp_path / "base") as files:
        write_adapter(compose([read_adapter(tmp_path / n) for n in "ab"], files, "refuse"), tmp_path / "both")
    both = PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path / "both").merge_and_unload().state_dict()
    assert all(torch.equal(both[name], weight) for name, weight in wanted.items())


def test_a_sum_of_shares_trains_like_any_adapter():
    plain = llama()
    model = get_peft_model(plain, config("alternate", share=[0, 2], total_steps=4, target_modules=["q_proj"]), "a")
    train(model, 4)
    model.add_adapter("b", config("alternate", share=[1, 2], total_steps=4, target_modules=["q_proj"]))
    model.set_adapter("b")
    train(model, 4)
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c")
    model.set_adapter("c")
    (mover,) = (m for m in movers_of(model) if m.name == "c")
    assert mover.fixed_entries() == 0
    assert mover.active_entries() > 0
    before = {n: p.clone() for n, p in model.named_parameters() if "base_layer.weight" in n and "q_proj" in n}
    train(model, 5)
    after = {n: p for n, p in model.named_parameters() if n in before}
    assert all(not torch.equal(after[n], before[n]) for n in before)


def test_what_leaves_nothing_to_train_is_refused():
    layer = {"0": [Slice("row", 0, 2), Slice("column", 0, 6)]}
    with pytest.raises(ConfigError, match="0: every entry of Slice.* belongs to other runs"):
        attach(nn.Sequential(nn.Linear(6, 6)), r=2, mode="row", reserve=layer)
    with pytest.raises(ConfigError, match=r"reserve, layer '0': row slice of width 9 at 0 does not fit"):
        attach(nn.Sequential(nn.Linear(6, 6)), r=2, mode="row", reserve={"0": [Slice("row", 0, 9)]})
    with pytest.raises(ConfigError, match=r"reserve= speaks of 'fc', ..., and none of its layers is trained here \(0"):
        attach(nn.Sequential(nn.Linear(6, 6)), r=2, mode="row", reserve={"fc": [Slice("row", 0, 2)]})
    for nonsense in ("folder", {"0": [["row", 0, 2]]}, {"0": 5}):
        with pytest.raises(ConfigError, match="reserve=.*: expected {layer name"):
            attach(nn.Sequential(nn.Linear(6, 6)), r=2, reserve=nonsense)


def test_a_file_cannot_make_a_loader_read_other_folders(tmp_path: Path, monkeypatch):
    model = get_peft_model(llama(), config(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"reserve": ["somebody/else"]}))
    monkeypatch.setattr("slicefine.files.adapter._fetched", lambda name: pytest.fail(f"fetches {name}"))
    with pytest.raises(AdapterFileError, match=r"reserves \['somebody/else'\]; a file has the slices themselves"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_where_others_train_is_looked_up_once(monkeypatch):
    calls = []
    monkeypatch.setattr("slicefine.adapters.slices_of_others", lambda *args: calls.append(args) or [])
    tuner = attach(mlp(), r=2, mode="row", interval=1, share=(0, 2))
    for _ in range(2):
        tuner.move()
    assert len(calls) == 3  # layers
