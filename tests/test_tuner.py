"""SliceFine on plain modules: attach, save, load, unload; and the counts that the paper prints."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.testing import assert_close

from core_helpers import batches, mlp, step
from slicefine import attach
from slicefine.errors import AdapterFileError, ConfigError
from slicefine.geometry import Slice, entry_indices
from slicefine.layer import SliceLayer
from slicefine.schedule import Schedule
from slicefine.targets import match_layers
from slicefine.tuner import FORMAT_VERSION

MODES = ["row", "column", "alternate", "random_mask"]


def trained(mode="alternate", steps=8, seed=0, dtype=torch.float64, **settings):
    model = mlp(seed, dtype)
    tuner = attach(model, mode=mode, r=2, interval=3, **settings)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.05)
    for x, y in batches(steps, dtype=dtype):
        step(model, optimizer, x, y)
    return model, tuner, optimizer


def dense(tuner):
    return {name: layer.dense().clone() for name, layer in tuner.layers.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def linear_weights(model):
    return {n: m.weight.detach() for n, m in model.named_children() if isinstance(m, nn.Linear)}


# -- save, load, unload -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_save_and_load_are_bit_exact(mode, dtype, tmp_path):
    model, tuner, _ = trained(mode, dtype=dtype)
    tuner.save(tmp_path / "slices.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["slices.safetensors"]
    other = mlp(dtype=dtype)
    other_tuner = attach(other, mode=mode, r=2, interval=3)
    other_tuner.load(tmp_path / "slices.safetensors")
    x = batches(1, dtype=dtype)[0][0]
    assert torch.equal(other(x), model(x))
    assert same(dense(other_tuner), dense(tuner))
    assert other_tuner.mover.slices() == tuner.mover.slices()
    assert other_tuner.mover.step == 8
    for mine, theirs in zip(tuner.parameters(), other_tuner.parameters(), strict=True):
        assert torch.equal(mine, theirs)  # the fp32 masters too
    assert same(linear_weights(other_tuner.unload()), linear_weights(mlp(dtype=dtype)))


def test_a_loaded_run_continues_like_the_saved_one(tmp_path):
    model, tuner, optimizer = trained()
    tuner.save(tmp_path / "slices.safetensors")
    other = mlp()
    other_tuner = attach(other, r=2, interval=3)
    other_tuner.load(tmp_path / "slices.safetensors")
    other_optimizer = torch.optim.AdamW(other_tuner.parameters(), lr=0.05)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it would share its tensors otherwise
    for x, y in batches(7, seed=2):
        step(model, optimizer, x, y)
        step(other, other_optimizer, x, y)
    assert tuner.mover.visits == other_tuner.mover.visits == 6
    assert same(dense(other_tuner), dense(tuner))


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_unload_leaves_the_originals_or_the_trained_weights(mode, merge):
    model, tuner, optimizer = trained(mode)
    expected = dense(tuner) if merge else linear_weights(mlp())
    x, _y = batches(1)[0]
    output = model(x) if merge else mlp()(x)
    names = {n for n, _ in mlp().named_parameters()}
    plain = tuner.unload(merge=merge)
    assert plain is model
    assert same(linear_weights(model), expected)
    assert torch.equal(model(x), output)
    assert {n for n, _ in model.named_parameters()} == names
    assert not any(isinstance(m, SliceLayer) for m in model.modules())
    optimizer.step()  # a leftover optimizer moves nothing
    assert same(linear_weights(model), expected)
    attach(model, r=1, interval=1)  # and a new start is possible


def test_disabled_may_be_nested():
    _, tuner, _ = trained()
    after = dense(tuner)
    with tuner.disabled():
        before = dense(tuner)
        with tuner.disabled():
            pass
        assert same(dense(tuner), before)
    assert same(dense(tuner), after)


def test_disabled_restores_the_base_even_after_an_error():
    model, tuner, _ = trained()
    weights, x = dense(tuner), batches(1)[0][0]
    with tuner.disabled():
        assert torch.equal(model(x), mlp()(x))
        assert same(dense(tuner), linear_weights(mlp()))
    assert same(dense(tuner), weights)
    with pytest.raises(ZeroDivisionError), tuner.disabled():
        raise ZeroDivisionError
    assert same(dense(tuner), weights)


@pytest.mark.parametrize("mode", MODES)
def test_deltas_sum_to_the_change(mode):
    _, tuner, _ = trained(mode, steps=17)
    base, weights = linear_weights(mlp()), dense(tuner)
    deltas = tuner.delta()
    assert list(deltas) == ["0", "2", "4"]
    for name, blocks in deltas.items():
        total = torch.zeros_like(base[name])
        for block, values in blocks:
            if block.axis == "row":
                total[block.start : block.start + block.width] += values
            elif block.axis == "column":
                total[:, block.start : block.start + block.width] += values.t()
            else:
                total.view(-1)[entry_indices(block, tuple(total.shape))] += values[0]
        torch.testing.assert_close(total, weights[name] - base[name], rtol=0, atol=0)
    assert same(dense(tuner), weights)


# -- refused files ----------------------------------------------------------------------------------------------------


def rewritten(path, change=lambda tensors: tensors, version=FORMAT_VERSION, metadata=None):
    tensors = change(safetensors.torch.load_file(path))
    header = {"slicefine": json.dumps({"version": version})} if metadata is None else metadata
    safetensors.torch.save_file(tensors, path, metadata=header)


BROKEN = {
    "missing": (lambda p: p.unlink(), "cannot be read as a safetensors file"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-7]), "cannot be read as a safetensors file"),
    "not safetensors": (lambda p: p.write_bytes(b"hello"), "cannot be read as a safetensors file"),
    "no header": (lambda p: rewritten(p, metadata={"format": "pt"}), "not written by slicefine"),
    "broken header": (lambda p: rewritten(p, metadata={"slicefine": "{"}), "not readable as JSON"),
    "newer": (
        lambda p: rewritten(p, version=FORMAT_VERSION + 1),
        f"format version {FORMAT_VERSION + 1} is newer than {FORMAT_VERSION}; update slicefine",
    ),
    "other layers": (
        lambda p: rewritten(p, lambda t: {k.replace("4.", "5."): v for k, v in t.items()}),
        r"the file's layers differ from the model's \(4, 5",
    ),
    "no journal": (
        lambda p: rewritten(p, lambda t: {k: v for k, v in t.items() if k != "4.slicefine_journal"}),
        r"4: the file has an active block of shape \(2, 5\) and no journal",
    ),
    "no rows": (
        lambda p: rewritten(p, lambda t: {k: v for k, v in t.items() if k != "4.slicefine_rows"}),
        "4: slicefine_rows has shape None, but the journal implies",
    ),
    "other rank": (
        lambda p: rewritten(p, lambda t: t | {"4.slicefine_active": torch.zeros(3, 5)}),
        r"4: the file has an active block of shape \(3, 5\), expected \(2, 5\). The file is incomplete",
    ),
    "corrupt journal": (
        lambda p: rewritten(p, lambda t: t | {"4.slicefine_journal": -t["4.slicefine_journal"]}),
        "journal: impossible entry",
    ),
    "other base": (
        lambda p: rewritten(
            p, lambda t: t | {"4.slicefine_journal": t["4.slicefine_journal"] * torch.tensor([1, 9, 1, 1, 1, 1])}
        ),
        "lies outside a matrix",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_and_nothing_changes(case, tmp_path):
    breaking, message = BROKEN[case]
    path = tmp_path / "slices.safetensors"
    _, tuner, _ = trained()
    tuner.save(path)
    breaking(path)
    model, other, optimizer = trained(steps=4)
    weights, slices = dense(other), other.mover.slices()
    with pytest.raises(AdapterFileError, match=message) as error:
        other.load(path)
    assert "slices.safetensors" in str(error.value) or "4" in str(error.value) or "journal" in str(error.value)
    x, y = batches(1)[0]
    model(x)
    assert same(dense(other), weights)
    assert other.mover.slices() == slices
    step(model, optimizer, x, y)  # training goes on


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    _, tuner, _ = trained()
    path = tmp_path / "slices.safetensors"
    tuner.save(path)
    before = path.read_bytes()

    def fail(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(ConfigError, match=r"slices.safetensors cannot be written \(disk full\)"):
        tuner.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["slices.safetensors"]


# -- attach -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)})
        self.dense = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        ("all-linear", (), ["attention.query", "attention.value", "dense", "head"]),
        ("all-linear", ["head"], ["attention.query", "attention.value", "dense"]),
        (["query", "dense"], (), ["attention.query", "dense"]),
        (["attention.value"], (), ["attention.value"]),
        (r".*\.(query|value)", (), ["attention.query", "attention.value"]),
        (r"attention\..*", r".*query", ["attention.value"]),
    ],
)
def test_target_modules(targets, exclude, expected):
    assert match_layers(Block(), targets, exclude) == expected
    model = Block()
    assert list(attach(model, target_modules=targets, exclude_modules=exclude, r=1, interval=1).layers) == expected


@pytest.mark.parametrize("targets", ["quer", ["uery"], ["norm"], []])
def test_no_match_is_refused_with_examples(targets):
    model = Block()
    with pytest.raises(
        ConfigError, match=r"target_modules=.* matches no layer that can be .* example \['attention.query'"
    ):
        attach(model, target_modules=targets)
    assert all(p.requires_grad for p in model.parameters())


def test_a_name_that_the_model_does_not_have_is_warned_of():
    with pytest.warns(UserWarning, match=r"target_modules names 'quary', .* no such module; did you mean query\?"):
        attach(Block(), target_modules=["quary", "dense"], r=1, interval=1)


def test_tied_weights_are_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(9, 4)
            self.body = nn.Linear(4, 4)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    with pytest.raises(ConfigError, match=r"head: its weight is tied to embedding.weight; .*Exclude the layer"):
        attach(model)
    assert list(attach(model, exclude_modules=["head"], r=2, interval=1).layers) == ["body"]


def test_what_trains_and_what_does_not():
    model = Block()
    tuner = attach(model, target_modules=["query"], r=1, interval=1)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["attention.query.slicefine_active.default"]
    assert tuner.parameters()[0] is model.attention["query"].slicefine_active["default"]
    model = Block()
    model.norm.requires_grad_(False)
    attach(model, target_modules=["query"], r=1, interval=1, train_rest=True)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["attention.query.base_layer.weight", "norm.weight", "norm.bias"]


def test_attach_twice_is_refused():
    model = Block()
    attach(model, target_modules=["query"], r=2, interval=1)
    with pytest.raises(ConfigError, match="the model has slices already; unload them first"):
        attach(model, interval=1)


def test_a_rank_above_a_thin_matrix_is_clamped_and_listed():
    with pytest.warns(UserWarning, match=r"larger than 1 thin layers and was clamped there: attention\.query to 4"):
        tuner = attach(Block(), target_modules=["query"], r=9, mode="row", interval=1)
    assert [p.shape[0] for p in tuner.parameters()] == [4]


def test_attach_that_fails_changes_nothing():
    model = mlp()
    with pytest.raises(ConfigError, match="positions list, layer '2': row slice of width 1 at 7 does not fit"):
        attach(model, mode="row", r=1, positions=[7], interval=1)  # fits the first layer only
    assert not any(isinstance(m, SliceLayer) for m in model.modules())


def test_rank_0_of_one_orientation_is_refused():
    for rank in ("r_row", "r_column"):
        with pytest.raises(ConfigError, match="r=0 must be an integer of at least 1"):
            attach(mlp(), interval=1, **{rank: 0})


@pytest.mark.parametrize(("block", "shape"), [(Slice("row", 0, 3), "3, 6"), (Slice("column", 0, 3), "3, 11")])
def test_a_first_position_that_does_not_fit_the_mode_is_refused(block, shape):
    with pytest.raises(ConfigError, match=rf"0: a {block.axis} slice .* needs a parameter of shape \({shape}\)"):
        attach(mlp(), mode="column", r=2, positions=lambda visit, layer, shape: block, interval=1)


def test_a_start_that_fits_nowhere_is_refused_before_its_turn():
    with pytest.raises(ConfigError, match="positions list, layer '2': row slice of width 1 at 7 does not fit"):
        attach(mlp(), mode="row", r=1, positions=[0, 7], interval=1)


def test_a_transformer_trains_all_linear_layers_and_its_packed_attention():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    tuner = attach(model, r=2, interval=1)
    parts = ("self_attn", "self_attn.out_proj", "linear1", "linear2")
    assert list(tuner.layers) == [f"layers.{i}.{part}" for i in (0, 1) for part in parts]
    model(torch.randn(2, 3, 8)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in tuner.parameters())
    model.eval()
    with torch.no_grad():  # PyTorch's fused inference path reads the layers' weights
        fused = model(torch.ones(2, 3, 8))
    assert_close(fused, model(torch.ones(2, 3, 8)).detach())


def test_ranks_per_orientation():
    tuner = attach(mlp(), r=1, r_row=3, r_column=2, mode="alternate", interval=1)
    assert [tuple(p.shape) for p in tuner.parameters()] == [(3, 11), (3, 11), (3, 5)]
    assert tuner.mover.active_entries() == 3 * 6 + 3 * 11 + 3 * 5
    tuner.move()
    assert tuner.mover.active_entries() == 2 * 11 + 2 * 5 + 2 * 5


# -- the paper's counts (audit: Tables 6 and 7 are exact, Llama-3-8B's 1 row is the poster's 1.25M) -------------------


def encoder(layers, width, inner):
    """The six linears of each RoBERTa encoder layer, without values."""
    with torch.device("meta"):
        return nn.ModuleList(
            nn.ModuleDict(
                {n: nn.Linear(width, width) for n in ("query", "key", "value", "attention_output")}
                | {"intermediate": nn.Linear(width, inner), "output": nn.Linear(inner, width)}
            )
            for _ in range(layers)
        )


def roberta_base():
    return encoder(12, 768, 3072)


def roberta_large():
    return encoder(24, 1024, 4096)


def llama_3_8b():
    shapes = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096)}
    shapes |= {"gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096)}
    with torch.device("meta"):
        return nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(i, o, bias=False) for n, (i, o) in shapes.items()}) for _ in range(32)
        )


@pytest.mark.parametrize(
    ("model", "mode", "rank", "count"),
    [
        *((roberta_base, mode, 1, 82_944) for mode in ("row", "column", "random_mask")),
        *((roberta_base, mode, 5, 414_720) for mode in ("row", "column")),
        *((roberta_large, mode, 1, 221_184) for mode in ("row", "column")),
        *((roberta_large, mode, 5, 1_105_920) for mode in ("row", "column")),
        (llama_3_8b, "row", 1, 1_245_184),
        (llama_3_8b, "column", 5, 6_881_280),
        (roberta_base, "alternate", 1, 82_944),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_trainable_counts(model, mode, rank, count):
    model = model()
    tuner = attach(model, mode=mode, r=rank, interval=1)
    assert tuner.mover.active_entries() == count
    if mode != "alternate":  # its parameters are padded
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    schedule = Schedule(mode, rank, rank)
    shapes = [schedule.block_shape(layer.shape) for layer in tuner.layers.values()]
    assert shapes == [tuple(p.shape) for p in tuner.parameters()]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"intervall": 5}, r"attach got an unexpected keyword argument 'intervall': did you mean interval\?"),
        ({"rank": 5}, r"attach got an unexpected keyword argument 'rank': see its docstring"),
    ],
)
def test_unknown_settings_are_named(setting, message):
    with pytest.raises(ConfigError, match=message):
        attach(nn.Sequential(nn.Linear(4, 4)), **setting)
